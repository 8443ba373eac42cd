"""Estimates of how far a network's outputs on past data have moved, from what was kept of the data."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_ext.functional import Substitution, evaluating, map_tensors, output_divergence, seeded_generator
from lightning_ext.nn._laftr_network import (
    Heads,
    Reduce,
    entry_of,
    grown,
    named_values,
    outside_inference,
    own_buffers,
    plain_heads,
    plain_name,
    require_heads,
    unmoved,
    weight_of,
    widened,
)

__all__ = ["FunctionSpaceEstimator", "MeanDistance"]


def _plain_call(module: Any, x: Any) -> Tensor:
    outputs: Tensor = module(x)
    return outputs


class FunctionSpaceEstimator(nn.Module):
    r"""Estimates :math:`D(\theta_0, \theta_1) = \mathbb E_x\, \rho(f(x; \theta_0), f(x; \theta_1))` without the data.

    ``fit(module, batches)`` takes the module as the reference :math:`\theta_0` and keeps what it needs of the data;
    ``distance(module)`` is the estimate for the module as it then is, differentiable in its parameters. The module runs
    in eval mode on the side; modes, buffers and torch's random state are left alone.

    What is kept is no parameter and no buffer: it moves with ``.to(device)`` but keeps its dtype, and stands in
    ``state_dict`` as tensors and plain values, from which an estimator that was never fitted can be restored.

    To write another estimator, implement ``_fit`` and ``_distance``.

    Args:
        divergence: :math:`\rho`: ``"kl"`` of the softmaxes, reference first, in nats; ``"mse"``, half the squared
            distance summed over outputs; ``"softmax_l2"``, half the squared distance of the softmaxes.
        forward: ``(module, x) -> outputs`` ``(B, ..., C)``, classes last. Default ``module(x)``.
        inputs: the network's inputs x in a batch: a key, or a function of the batch. Default ``batch[0]``, or the batch
            where it is a tensor.
        target: the targets in a batch, likewise. Default ``batch[1]``.
        seed: of all draws.

    Raises:
        ValueError: For another divergence.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519).
    """

    def __init__(
        self,
        *,
        divergence: str = "kl",
        forward: Callable[[Any, Any], Tensor] | None = None,
        inputs: str | Callable[[Any], Any] | None = None,
        target: str | Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        output_divergence(torch.zeros(1, 2), torch.zeros(1, 2), divergence)  # knows the names
        self.divergence, self.inputs, self.target, self.seed = divergence, inputs, target, seed
        self._call = _plain_call if forward is None else forward
        self._unseen = False
        self._reference: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {}
        self._stream: tuple[int, ...] = ()
        self._draws, self._shared = 0, False
        self._seen: tuple[nn.Module, Substitution, dict[str, Tensor]] | None = None
        self._written: set[str] = set()

    def extra_repr(self) -> str:
        """What it measures, and whether it can."""
        return f"divergence={self.divergence!r}, fitted={self.fitted}"

    # -- what a user calls -------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether there is a reference."""
        return bool(self._reference)

    @property
    def kind(self) -> str:
        """What decides how the state is read."""
        return type(self).__name__

    @property
    def nbytes(self) -> int:
        """Bytes that are kept; a reference that is shared with another estimator counts there."""
        held = [*self._kept.values(), *(() if self._shared else self._reference.values())]
        return sum(tensor.nbytes for tensor in held)

    @torch.no_grad()
    def fit(
        self, module: nn.Module, batches: Iterable[Any], *, heads: Heads | None = None, reduce: Reduce | None = None
    ) -> Self:
        """Take the module as reference, and go through the data once.

        Args:
            module: the trained network.
            batches: all of the data, each sample once, on the module's device; over several ranks each rank's share.
            heads: which outputs count, an index into their last dimension. Default all.
            reduce: sums a tensor over ranks; called alike on each. Default: there is one rank.

        Returns:
            The estimator.

        Raises:
            ValueError: If there is no batch, on all ranks or on one of them, a batch does not fit, inputs are not
                finite, heads are no outputs, or the network draws random numbers in eval mode.
            TypeError: If inputs are not floating where moments are taken of them.
        """
        self._facts = {"heads": plain_heads(heads)}
        self._kept, self._stream, self._draws, self._shared, self._unseen = {}, (), 0, False, True
        with self._quiet(module):
            self._reference = {name: tensor.detach().clone() for name, tensor in self.values_of(module).items()}
            try:
                self._fit(module, batches, reduce)
            except BaseException:
                self._reference, self._kept = {}, {}
                raise
        self._forget()
        return self

    def distance(self, module: nn.Module) -> Tensor:
        """The estimate for a module as it is.

        Args:
            module: of the reference's architecture. Layers may have got further outputs, at their end (a new head): the
                outputs that the reference has are compared.

        Returns:
            A scalar, float32 or wider, in nats for ``"kl"``, else in squared units of the outputs; differentiable in
            the module's parameters.

        Raises:
            RuntimeError: Before ``fit``.
            ValueError: If parameters of the reference are missing or have other shapes; the message names them.
        """
        self._require_fitted()
        with self._quiet(module):
            self._require_same(module)
            found = self._distance(module)
        self._draws += 1
        return widened(found)

    def outputs(self, module: nn.Module, batch: Any) -> Tensor:
        """The outputs of a batch, as they are compared, before the choice of heads."""
        return self._forward(module, self.inputs_of(batch))

    def reseed(self, *address: int) -> None:
        """Let the next distances draw from there, whatever was drawn before.

        Args:
            address: any integers that say which stream; the last one is the position in it, one further with each
                distance.
        """
        *stream, self._draws = address
        self._stream = tuple(stream)

    # -- several tasks ------------------------------------------------------------------------------------------------

    @property
    def merges_to_a_sum(self) -> bool:
        """Whether the distance of merged tasks is the sum of theirs rather than the mean over all samples."""
        return False

    def absorb(self, other: "FunctionSpaceEstimator") -> None:
        """Add what another estimator of an earlier task keeps to one's own; one's own reference stays."""
        raise NotImplementedError(f"{type(self).__name__} cannot merge two tasks: use consolidate='all' or 'last'.")

    def share_reference(self, newer: "FunctionSpaceEstimator") -> None:
        """Refer to the weights of another estimator from now on, and keep no copy.

        Of layers that have got further outputs since, one's own part.

        Raises:
            ValueError: If it has not all of one's own parameters, or in other shapes.
        """
        self._require_fitted()
        self._require_alike_or_grown({name: value.shape for name, value in newer._reference.items()})
        cut = {name: self._cut(name, value) for name, value in newer._reference.items()}
        alike = all(cut[name] is value for name, value in newer._reference.items())
        self._reference, self._shared = newer._reference if alike else cut, True
        self._forget()

    @classmethod
    def pool(cls, estimators: "Sequence[FunctionSpaceEstimator]") -> "FunctionSpaceEstimator":
        """One estimator for the mean of several distances."""
        return MeanDistance(estimators)

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def _fit(self, module: nn.Module, batches: Iterable[Any], reduce: Reduce | None) -> None:
        """Fill ``_kept`` (tensors) and ``_facts`` (plain values); in eval mode, without gradients."""
        raise NotImplementedError

    def _distance(self, module: nn.Module) -> Tensor:
        """The estimate, in eval mode."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what was derived from ``_kept`` and ``_reference``."""

    @property
    def heads(self) -> Heads | None:
        """Which outputs count."""
        chosen = self._facts.get("heads")
        return slice(*chosen["slice"]) if isinstance(chosen, dict) else chosen

    def _forward(self, module: nn.Module, x: Any) -> Tensor:
        """Outputs of a copy of inputs, for some networks write into theirs; the first of a fit are looked at."""
        x = map_tensors(Tensor.clone, x)
        if not self._unseen:
            return self._call(module, x)
        self._unseen = False
        with unmoved(weight_of(module).device) as moved:
            outputs, drew = self._call(module, x), moved()
        if drew:
            raise ValueError(
                f"{type(module).__name__} draws random numbers in eval mode, so it has no distance to itself. Let it "
                "draw in training alone: F.dropout(x, training=self.training)."
            )
        require_heads(self.heads, outputs.shape[-1])
        return outputs

    def inputs_of(self, batch: Any) -> Any:
        """The network's inputs in a batch."""
        return entry_of(batch, self.inputs, 0, "inputs")

    def targets_of(self, batch: Any) -> Tensor:
        """The targets in a batch."""
        found: Tensor = entry_of(batch, self.target, 1, "target")
        return found

    def run(self, module: nn.Module, values: Mapping[str, Tensor], x: Any) -> Tensor:
        """Outputs of the module with other parameters and buffers."""
        with self._substitution(module)(values):
            return self._forward(module, x)

    def reference_run(self, module: nn.Module, x: Any) -> Tensor:
        """Outputs of the reference."""
        return self.run(module, self.reference_values(module), x)

    def reference_values(self, module: nn.Module) -> dict[str, Tensor]:
        r""":math:`\theta_0` in the module's dtypes."""
        now = self.values_of(module)
        found = {name: value.to(now[name].dtype) for name, value in self._reference.items() if name in now}
        for name in self._written & found.keys():
            found[name] = found[name].clone()  # a network may count, or keep something, in its buffers
        return found

    def parameters_of(self, module: nn.Module) -> dict[str, Tensor]:
        r""":math:`\theta_1`: parameters and buffers, cut to the reference's shapes."""
        return {name: self._cut(name, value) for name, value in self.values_of(module).items()}

    def values_of(self, module: nn.Module) -> dict[str, Tensor]:
        """What :func:`named_values` gives, looked up once for a distance."""
        seen = self._seen
        return dict(seen[2]) if seen is not None and seen[0] is module else named_values(module)

    def _substitution(self, module: nn.Module) -> Substitution:
        seen = self._seen
        return seen[1] if seen is not None and seen[0] is module else Substitution(module, plain_name)

    def _cut(self, name: str, value: Tensor) -> Tensor:
        kept = self._reference.get(name)
        return value if kept is None or kept.shape == value.shape else value[: len(kept)]

    @property
    def address(self) -> tuple[int, ...]:
        """Where the next distance draws: which stream, and the position in it."""
        return *self._stream, self._draws

    def generator(self, device: torch.device, address: Sequence[int] | None = None) -> torch.Generator:
        """There, or at another address."""
        return seeded_generator(self.seed, *(self.address if address is None else address), device=device)

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} has no reference yet: call fit(module, batches) first.")

    def _require_same(self, module: nn.Module) -> None:
        self._require_alike_or_grown({name: value.shape for name, value in self.values_of(module).items()})

    def _require_alike_or_grown(self, now: Mapping[str, torch.Size]) -> None:
        missing = [name for name in self._reference if name not in now]
        reshaped = [
            f"{name}: {tuple(now[name])}, there {tuple(kept.shape)}"
            for name, kept in self._reference.items()
            if name in now and not grown(kept.shape, now[name])
        ]
        if missing or reshaped:
            raise ValueError(
                f"the module must have the parameters of the reference; missing: {missing[:5]}, of other shape: "
                f"{reshaped[:5]}. Layers may only get further outputs, behind those that they had."
            )

    @contextmanager
    def _quiet(self, module: nn.Module) -> Iterator[None]:
        compiled = any(name.endswith("_orig_mod") for name, _ in module.named_modules())
        plainly = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        full = torch.autocast(weight_of(module).device.type, enabled=False)
        with outside_inference(), evaluating(module), full, plainly, own_buffers(module) as buffers:
            places = Substitution(module, plain_name)
            self._seen, self._written = (module, places, places.values()), buffers
            try:
                yield
            finally:
                self._seen, self._written = None, set()

    # -- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "reference": dict(self._reference), "kept": dict(self._kept), "facts": copy.deepcopy(self._facts),
            "draws": list(self.address), "shared": self._shared, "kind": self.kind,
        }  # fmt: skip

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up.

        Raises:
            ValueError: It is that of another kind of estimator.
        """
        if state.get("kind", self.kind) != self.kind:
            raise ValueError(f"this is the state of {state['kind']}, and the estimator is {self.kind}.")
        self._reference, self._kept = dict(state["reference"]), dict(state["kept"])
        self._facts, self._shared = copy.deepcopy(state["facts"]), state["shared"]
        self.reseed(*state["draws"])
        self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for held in (self._reference, self._kept):
            for name, tensor in held.items():
                held[name] = tensor.to(fn(tensor.new_empty(0)).device)
        self._forget()
        return self


class MeanDistance(FunctionSpaceEstimator):
    """The mean of several estimators' distances, one after the other; what ``pool`` gives by default.

    Args:
        estimators: fitted ones.
    """

    def __init__(self, estimators: Sequence[FunctionSpaceEstimator]) -> None:
        if not estimators:
            raise ValueError("estimators must hold at least one.")
        super().__init__(divergence=estimators[0].divergence)
        self.estimators = list(estimators)  # a plain list: they belong to someone else

    @property
    def fitted(self) -> bool:
        """Whether all are."""
        return all(estimator.fitted for estimator in self.estimators)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(estimator.nbytes for estimator in self.estimators)

    def distance(self, module: nn.Module) -> Tensor:
        """The mean."""
        for number, estimator in enumerate(self.estimators):
            estimator.reseed(*self._stream, number, self._draws)
        self._draws += 1
        return torch.stack([estimator.distance(module) for estimator in self.estimators]).mean()
