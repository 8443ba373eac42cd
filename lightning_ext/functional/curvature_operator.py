"""What all curvature operators share: batches linearised once and kept, sums over ranks, errors that name the batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_ext.functional.batches import batch_size, differentiable
from lightning_ext.functional.influence_objective import InfluenceObjective
from lightning_ext.functional.parameters import ParameterView

__all__ = ["CurvatureOperator"]


class Share(Protocol):
    """One batch's part of the sum, ready for many products."""

    outputs: Tensor  # (B, ...), the loss's inputs or its values

    @property
    def nbytes(self) -> int: ...

    def product(self, rows: Tensor) -> Tensor: ...


class CurvatureOperator(ABC):
    r"""A symmetric matrix :math:`C + \lambda I` of D rows; ``operator(rows)`` multiplies a block ``(R, D)``.

    Args:
        module: the network, in evaluation mode.
        objective: outputs, targets and loss.
        batches: all of the data, a list of batches or a loader, on the parameters' device. It is gone through again for
            every product unless all batches fit into ``cache_bytes``, and must give the same batches each time. Under
            ``reduce`` these are this rank's batches; there may be none.
        view: the parameters; default all that require gradients. Their values are copied when the operator is made.
        damping: :math:`\lambda \ge 0`, weight decay included; default 0.
        num_samples: N where it is known; the batches of all ranks must then hold as many. Default: counted.
        reduce: sums a tensor over ranks and returns the sum. It is called once for every block of rows, and once more
            for N. Default: one rank.
        cache_bytes: memory for linearised batches, at least 0; the rest are linearised anew for every product.
        backend: how Jacobians are multiplied, see :class:`LinearizedBatch`.

    Attributes:
        view: the parameters.
        size: D.
        dtype: the parameters' type, float32 or float64.
        device: where they are.
        damping: :math:`\lambda`.

    Raises:
        ValueError: For parameters of another type, batches that can be gone through only once, a negative damping.
            From a product: if outputs or products are not finite (naming the batch), if the batches changed, or hold
            other than ``num_samples`` samples.

    Note:
        A product with one row costs about two backward passes over the data, the first one a forward pass more. R rows
        cost R times as much, and are reduced over ranks together.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        batches: Iterable[Any],
        view: ParameterView | None = None,
        *,
        damping: float = 0.0,
        num_samples: int | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 2**30,
        backend: Literal["auto", "linearize", "double_backward"] = "auto",
    ) -> None:
        self.module, self.objective, self.batches = module, objective, batches
        self.view = ParameterView(module) if view is None else view
        self.size, self.dtype, self.device = self.view.numel, self.view.dtype, self.view.device
        self.damping, self.reduce, self.cache_bytes, self.backend = damping, reduce, cache_bytes, backend
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"curvature needs float32 or float64, not {self.dtype}: use module.float().")
        if not damping >= 0:
            raise ValueError(f"damping must be at least 0; got {damping}.")
        if isinstance(batches, Iterator):
            raise ValueError("batches must be gone through many times: give a list or a loader, not an iterator.")
        self._claimed = num_samples
        self._counted: int | None = None
        self._params = {name: value.clone() for name, value in self.view.values().items()}
        self._cache: list[Share] = []
        self._cache_left: float = cache_bytes
        self._sizes: list[int] = []
        self._marks: list[Tensor] = []
        self._gone_through = False

    @abstractmethod
    def _share(self, batch: Any, *, check: bool) -> Share:
        """Linearise one batch; with ``check`` see that its derivatives are those of the function."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, damping={self.damping}, {self.view!r})"

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply a block ``(R, D)`` of finite rows."""
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(f"rows must have the shape (R, {self.size}); got {tuple(rows.shape)}.")
        rows = rows.to(self.dtype)
        total = None
        for share in self._shares():
            product = share.product(rows)
            total = product if total is None else total.add_(product)
        total = torch.zeros_like(rows) if total is None else total
        if self.reduce is not None:
            total = self.reduce(total)
        total = total.div_(self.num_samples).add_(rows, alpha=self.damping)
        if not bool(total.sum().isfinite()) and not bool(total.isfinite().all()):
            self._explain(rows)
        return total

    @property
    def num_samples(self) -> int:
        """N over all ranks. Its first use is a collective, like a product."""
        if self._counted is None:
            if not self._gone_through:
                for _ in self._shares():
                    pass
            count = torch.tensor([sum(self._sizes)], device=self.device)
            self._counted = int(count if self.reduce is None else self.reduce(count))
            if not self._counted:
                raise ValueError("batches hold no samples.")
            if self._claimed not in (None, self._counted):
                raise ValueError(f"num_samples is {self._claimed}, but the batches hold {self._counted} samples.")
        return self._counted

    def dense(self, rows_at_once: int = 64) -> Tensor:
        """Return the matrix ``(D, D)``, by D products; for small D.

        Args:
            rows_at_once: rows of a block, at least 1. Default 64.
        """
        blocks = torch.split(torch.eye(self.size, dtype=self.dtype, device=self.device), rows_at_once)
        matrix = torch.cat([self(block) for block in blocks])
        return 0.5 * (matrix + matrix.mT)

    def _shares(self) -> Iterator[Share]:
        """Yield every batch's share: those in the cache, the rest linearised on the way."""
        if self._gone_through and len(self._cache) == len(self._sizes):
            yield from self._cache
            return
        number = -1
        for number, batch in enumerate(self.batches):
            size = batch_size(batch)
            known = number < len(self._sizes)
            if (known and size != self._sizes[number]) or (not known and self._gone_through):
                raise self._changed(number)
            if not known:
                self._sizes.append(size)
            if number < len(self._cache):
                yield self._cache[number]
            else:
                share = self._linearized(number, batch)
                yield share
                self._keep(number, share)  # now its size is known
        if self._gone_through and number + 1 != len(self._sizes):
            raise self._changed(number + 1)
        self._gone_through = True

    def _linearized(self, number: int, batch: Any) -> Share:
        with differentiable(batch) as plain:
            share = self._share(plain, check=not self._marks)
        finite = share.outputs.flatten(1).isfinite().all(1) if share.outputs.ndim > 1 else share.outputs.isfinite()
        if not bool(finite.all()):
            samples = finite.logical_not().nonzero().flatten().tolist()
            raise ValueError(f"outputs or losses of samples {samples[:10]} of batch {number} are not finite.")
        mark = share.outputs.abs().mean()
        if number == len(self._marks):
            self._marks.append(mark)
        elif not torch.isclose(mark, self._marks[number], rtol=1e-3):
            raise self._changed(number)
        return share

    def _keep(self, number: int, share: Share) -> None:
        if number == len(self._cache) and share.nbytes <= self._cache_left:
            self._cache_left -= share.nbytes
            self._cache.append(share)

    def affords(self, share: Share, nbytes: int) -> bool:
        """Whether a share may hold so many more bytes; one that is kept takes them from the cache."""
        if any(kept is share for kept in self._cache):
            if nbytes > self._cache_left:
                return False
            self._cache_left -= nbytes
        return True

    def _changed(self, number: int) -> ValueError:
        return ValueError(
            f"batches gave other samples the second time, at batch {number}: switch off shuffling and random "
            "transformations, or give a list."
        )

    def _explain(self, rows: Tensor) -> None:
        """Say why a product is not finite."""
        if not bool(rows.isfinite().all()):
            raise ValueError("rows must be finite.")
        for number, share in enumerate(self._shares()):
            if not bool(share.product(rows).isfinite().all()):
                raise ValueError(f"the {type(self).__name__} product of batch {number} is not finite.")
        raise ValueError("the product is not finite, by overflow of the sum or because of another rank's batches.")
