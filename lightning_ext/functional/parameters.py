"""The chosen parameters of a module as one flat vector."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ParameterView", "Substitution"]


class ParameterView:
    r"""Names, shapes and places of a module's trainable parameters in a flat vector :math:`\theta \in \mathbb R^D`.

    Args:
        module: the module; parameters that do not require gradients are left out, a tied one counts once.
        include: a regular expression searched in the names (all the names of a tied parameter); ``None`` takes all.

    Attributes:
        names: the names, in the module's own order; they key every dictionary here.
        shapes: the shapes, in the same order.
        numel: D.
        dtype: the parameters' type.
        device: where they are.

    Raises:
        ValueError: If nothing is chosen, or the chosen parameters differ in type or device.

    >>> view = ParameterView(nn.Linear(2, 1))
    >>> view.names, view.numel
    (('weight', 'bias'), 3)
    >>> view.unflatten(torch.tensor([1.0, 2.0, 3.0]))
    {'weight': tensor([[1., 2.]]), 'bias': tensor([3.])}

    Note:
        The view keeps the module and reads its parameters anew at each call of :meth:`values`.
    """

    def __init__(self, module: nn.Module, include: str | None = None) -> None:
        chosen = _chosen(module, include)
        if not chosen:
            trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
            raise ValueError(
                f"no parameter of {type(module).__name__} is chosen: include={include!r}, and the names of those that "
                f"require gradients are {trainable[:20]}."
            )
        kinds = {(parameter.dtype, parameter.device) for parameter in chosen.values()}
        if len(kinds) > 1:
            found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
            raise ValueError(f"the chosen parameters must share one type and device; got {', '.join(found)}.")
        ((self.dtype, self.device),) = kinds
        self.module = module
        self.names = tuple(chosen)
        self.shapes = tuple(parameter.shape for parameter in chosen.values())
        self._ends = [0, *accumulate(parameter.numel() for parameter in chosen.values())]
        self.numel = self._ends[-1]

    def __repr__(self) -> str:
        return f"ParameterView({len(self.names)} parameters, {self.numel} numbers of {type(self.module).__name__})"

    def values(self) -> dict[str, Tensor]:
        """Return the parameters as they are now, detached but sharing memory with the module."""
        return {name: self.module.get_parameter(name).detach() for name in self.names}

    def slices(self) -> dict[str, slice]:
        """Return each parameter's place in the flat vector."""
        return {name: slice(*ends) for name, ends in zip(self.names, pairwise(self._ends), strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors ``(*leading, *shape)``, one per name and all with the same leading dimensions, to rows.

        Returns:
            ``(*leading, D)``.

        Raises:
            ValueError: If a name is missing or unknown, or a tensor has another shape.
        """
        if tensors.keys() != set(self.names):
            raise ValueError(f"tensors must have the names {list(self.names)}; got {list(tensors)}.")
        first = tensors[self.names[0]].shape
        leading = first[: len(first) - len(self.shapes[0])]
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != leading + shape:
                raise ValueError(
                    f"{name} must have shape {tuple(leading + shape)}; got {tuple(tensors[name].shape)}. All tensors "
                    "need the same leading dimensions."
                )
        shapes = zip(self.names, self.shapes, strict=True)
        return torch.cat([tensors[name].reshape(*leading, shape.numel()) for name, shape in shapes], -1)

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """Split rows ``(*leading, D)`` into tensors ``(*leading, *shape)``, views of the rows where strides allow it.

        Raises:
            ValueError: If the last dimension is not D.
        """
        if not rows.ndim or rows.shape[-1] != self.numel:
            raise ValueError(f"rows must have {self.numel} numbers in the last dimension; got {tuple(rows.shape)}.")
        leading, slices = rows.shape[:-1], self.slices()
        return {
            name: rows[..., slices[name]].reshape(leading + shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        }


def _chosen(module: nn.Module, include: str | None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters one of whose names matches, each under its first name."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run the module once before its parameters are looked at.")
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return {
        aliases[0]: parameter
        for parameter, aliases in names.items()
        if include is None or any(re.search(include, alias) for alias in aliases)
    }


class Substitution:
    """Runs a module with other tensors in the places of its parameters and buffers.

    Unlike ``torch.func.functional_call`` it leaves a module as it was that is registered under two names, and swaps a
    parameter that several modules share in all of them.

    Args:
        module: the module.
        rename: what each of its names is here. Default as it is.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with Substitution(layer)({"weight": torch.tensor([[3.0]])}):
    ...     layer(torch.ones(1, 1)).item()
    3.0
    """

    def __init__(self, module: nn.Module, rename: Callable[[str], str] = str) -> None:
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self.buffers: list[str] = []  # the names of those that are no parameters
        first: dict[int, str] = {}
        parts = list(module.named_modules())
        for kind in ("_parameters", "_buffers"):
            known = len(self._places)
            for prefix, part in parts:
                store = getattr(part, kind)
                for attribute, value in store.items():
                    if value is not None:
                        name = first.setdefault(id(value), rename(f"{prefix}.{attribute}" if prefix else attribute))
                        self._places.setdefault(name, []).append((store, attribute))
            self.buffers = list(self._places)[known:]

    def values(self) -> dict[str, Tensor]:
        """Return the module's own as they are now, parameters before buffers; a tied one by its first name."""
        return {name: store[attribute] for name, [(store, attribute), *_] in self._places.items()}

    @contextmanager
    def __call__(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold values by name, those of ``named_parameters`` and ``named_buffers``; put the module's own back.

        Raises:
            KeyError: For a name that the module does not have.
        """
        before = [(store, key, store[key]) for name in values for store, key in self._places[name]]
        try:
            for name, value in values.items():
                for store, key in self._places[name]:
                    store[key] = value
            yield
        finally:
            for store, key, own in before:
                store[key] = own


@contextmanager
def recomputation_refused() -> Iterator[None]:
    """Refuse networks that leave activations to be computed again in the backward pass, when they hold other tensors.

    Raises:
        RuntimeError: Where one does, as with ``torch.utils.checkpoint``. Its re-entrant kind is not noticed.
    """
    what = (
        "the network saves tensors by hooks, as activation checkpointing does in order to compute them again in the "
        "backward pass, where the network is another one by then. Turn it off in evaluation mode, or say with forward= "
        "how the network is called without."
    )
    with ExitStack() as stack:
        with suppress(RuntimeError):  # hooks that are there already are the caller's, around all of this
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(what))
        yield
