r"""Kronecker-factored curvature, K-FAC and EK-FAC: eigenvectors and eigenvalues per layer, and a cheap inverse."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional.influence_objective import InfluenceObjective
from lightning_ext.functional.kronecker_statistics import KroneckerLayer, KroneckerStatistics
from lightning_ext.functional.parameters import ParameterView

__all__ = ["KroneckerBlock", "KroneckerCurvature", "kronecker_curvature"]


@dataclass(frozen=True)
class KroneckerBlock:
    r"""One layer's curvature :math:`(Q_A \otimes Q_S) \operatorname{diag}(\Lambda) (Q_A \otimes Q_S)^\top`.

    Args:
        layer: Where the layer's parameters lie.
        inputs: :math:`Q_A`, ``(G, M, M)``.
        outputs: :math:`Q_S`, ``(G, P, P)``.
        eigenvalues: :math:`\Lambda`, ``(G, P, M)``, at least 0.
        factors: Eigenvalues of A ``(G, M)`` and of S ``(G, P)``, as long as :math:`\Lambda` is their product.
    """

    layer: KroneckerLayer
    inputs: Tensor
    outputs: Tensor
    eigenvalues: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    def scaled(self, rows: Tensor, scale: Tensor, out: Tensor) -> None:
        """Multiply this layer's part of rows by ``scale`` ``(G, P, M)`` in the eigenbasis; write it to ``out``."""
        inputs, outputs = self.inputs.to(rows), self.outputs.to(rows)
        rotated = (outputs.mT @ self.layer.gather(rows) @ inputs).mul_(scale)
        self.layer.scatter(outputs @ rotated @ inputs.mT, out)


def _eigh(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return eigenvalues.clamp(min=0).to(dtype), eigenvectors.to(dtype)


@dataclass(frozen=True)
class KroneckerCurvature:
    r"""A block-diagonal approximation of the Gauss-Newton matrix G, with a cheap inverse.

    For a layer with inputs :math:`\bar a = [a; 1]` and pseudo-gradients :math:`Ds` of its outputs,

    .. math::
        G_\ell \approx A \otimes S = (Q_A \otimes Q_S) (\Lambda_A \otimes \Lambda_S) (Q_A \otimes Q_S)^\top, \qquad
        A = \mathbb E[\bar a \bar a^\top], \quad S = \mathbb E[Ds\,Ds^\top]

    (K-FAC). EK-FAC keeps the eigenvectors and puts
    :math:`\Lambda_{pm} = \mathbb E[(Q_S^\top \textstyle\sum_t Ds_t \bar a_t^\top Q_A)_{pm}^2]` in the middle: of all
    diagonals the nearest to :math:`G_\ell` in Frobenius norm, and of the same trace. Parameters without factors have
    their exact diagonal of G.

    Args:
        blocks: One per layer with factors.
        diagonal: For each parameter without factors its entries of G's diagonal.
        places: Where these parameters lie in the flat vector.

    Note:
        A layer of M inputs and P outputs takes :math:`M^2 + P^2 + MP` numbers, a solved row :math:`2MP(M + P)`
        multiplications. Scores from K-FAC and EK-FAC rank samples; where layers or samples correlate their scale is
        off. Nothing here is reduced over ranks: the sums it is made from are.

    Source: Martens and Grosse 2015 (arXiv 1503.05671); Grosse and Martens 2016 (arXiv 1602.01407) for convolutions;
    George et al. 2018 (arXiv 1806.03884), Eq. 7, for the corrected eigenvalues.
    """

    blocks: tuple[KroneckerBlock, ...]
    diagonal: tuple[Tensor, ...]
    places: tuple[slice, ...]

    @property
    def size(self) -> int:
        """D, the number of chosen parameters."""
        return sum(b.eigenvalues.numel() for b in self.blocks) + sum(values.numel() for values in self.diagonal)

    @staticmethod
    def from_factors(
        layers: Sequence[KroneckerLayer],
        places: Sequence[slice],
        sums: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> "KroneckerCurvature":
        """K-FAC from what :meth:`KroneckerStatistics.factors` gives, added up over batches and ranks.

        Args:
            layers: The layers with factors.
            places: Where the parameters without factors lie.
            sums: ``"count"``, ``"diagonal"``, and ``"<layer>.A"`` and ``"<layer>.S"`` for each layer. They are
                decomposed in their own precision: float64, where the device has it.
            dtype: Of the result. Default float32.

        Returns:
            The curvature of a mean over samples: the sums divided by the count.

        Raises:
            ValueError: If no sample was counted, or a sum is not finite; the message names it.
        """
        count = _count(sums)
        blocks = []
        for layer in layers:
            A, inputs = _eigh(sums[f"{layer.name}.A"] / count, dtype)
            S, outputs = _eigh(sums[f"{layer.name}.S"] / count, dtype)
            blocks.append(KroneckerBlock(layer, inputs, outputs, S.unsqueeze(2) * A.unsqueeze(1), (A, S)))
        diagonal = (sums["diagonal"] / count).to(dtype)
        parts = torch.split(diagonal, [part.stop - part.start for part in places])
        return KroneckerCurvature(tuple(blocks), tuple(parts), tuple(places))

    def corrected(self, sums: Mapping[str, Tensor]) -> "KroneckerCurvature":
        """EK-FAC: the same eigenvectors, other eigenvalues.

        Args:
            sums: ``"count"`` and ``"<layer>"`` for each layer, what :meth:`KroneckerStatistics.corrections` gives for
                ``bases``, added up over batches and ranks.

        Raises:
            ValueError: As :meth:`from_factors`.
        """
        count = _count(sums)
        exact = [(sums[block.layer.name] / count).to(block.inputs.dtype) for block in self.blocks]
        blocks = [replace(b, eigenvalues=new, factors=None) for b, new in zip(self.blocks, exact, strict=True)]
        return replace(self, blocks=tuple(blocks))

    @property
    def bases(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Eigenvectors :math:`(Q_A, Q_S)` of each layer with factors, by name."""
        return {block.layer.name: (block.inputs, block.outputs) for block in self.blocks}

    def eigenvalues(self) -> Tensor:
        """All D eigenvalues, layer by layer; not sorted."""
        return torch.cat([*(b.eigenvalues.flatten() for b in self.blocks), *self.diagonal])

    def __call__(self, rows: Tensor, damping: float = 0.0) -> Tensor:
        """Multiply rows ``(R, D)`` by the approximation plus ``damping`` times the identity."""
        return self._scaled(rows, lambda values, _: values + damping)

    def solve(self, rows: Tensor, damping: float = 0.0, *, relative: float = 0.0, factored: bool = False) -> Tensor:
        r"""Solve :math:`(\hat G + \lambda_\ell I)\, x = v` for rows v.

        Args:
            rows: ``(R, D)``.
            damping: At least 0, on the scale of a mean over samples. Default 0.
            relative: At least 0. :math:`\lambda_\ell` is ``damping`` plus ``relative`` times the mean eigenvalue of
                layer :math:`\ell`. Grosse et al. 2023 (arXiv 2308.03296) take 0.1 without ``damping``. Default 0.
            factored: Damp the factors of K-FAC instead, :math:`(A + \sqrt{\lambda_\ell} I) \otimes (S +
                \sqrt{\lambda_\ell} I)`, which keeps the scale of scores better. Default False.

        Returns:
            ``(R, D)``.

        Raises:
            ValueError: If a damped eigenvalue is 0, or corrected eigenvalues are to be damped by factors.
        """
        if damping < 0 or relative < 0:
            raise ValueError(f"damping and relative must be at least 0, got {damping} and {relative}.")

        def inverse(values: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
            level = damping + relative * float(values.mean())
            damped = values + level
            if factored and factors is not None:
                A, S = (factor + level**0.5 for factor in factors)
                damped = S.unsqueeze(2) * A.unsqueeze(1)
            # without damping, what rounding has made of an eigenvalue 0 must not be divided by
            floor = 0.0 if level > 0 else 10 * torch.finfo(values.dtype).eps * float(values.max())
            if not bool((damped > floor).all()):
                raise ValueError("the curvature is singular where no damping is added; pass damping > 0.")
            return damped.reciprocal()

        if factored and any(block.factors is None for block in self.blocks):
            raise ValueError("factored=True is for K-FAC; the corrected eigenvalues of EK-FAC have no factors.")
        return self._scaled(rows, inverse)

    def _scaled(self, rows: Tensor, scale: Callable[[Tensor, tuple[Tensor, Tensor] | None], Tensor]) -> Tensor:
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(f"rows must have shape (R, {self.size}), got {tuple(rows.shape)}.")
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        out = torch.empty_like(rows)
        with torch.autocast(rows.device.type, enabled=False):
            for block in self.blocks:
                block.scaled(rows, scale(block.eigenvalues, block.factors).to(rows), out)
        for part, values in zip(self.places, self.diagonal, strict=True):
            out[:, part] = rows[:, part] * scale(values, None).to(rows)
        return out


def _count(sums: Mapping[str, Tensor]) -> Tensor:
    for name, value in sums.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"the curvature statistic {name!r} is not finite: look for NaN in parameters and inputs.")
    if not float(sums["count"]) > 0:
        raise ValueError("the curvature statistics have seen no sample; give at least one batch.")
    return sums["count"]


def kronecker_curvature(
    module: nn.Module,
    objective: InfluenceObjective,
    batches: Iterable[Any],
    view: ParameterView | None = None,
    *,
    corrected: bool = True,
    fisher: Literal["type2", "mc", "empirical"] = "type2",
    max_width: int = 8192,
    reduce: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> KroneckerCurvature:
    """Fit EK-FAC or K-FAC to a data set.

    Args:
        module: The network; it is put into eval mode and back.
        objective: Loss and outputs.
        batches: The data; gone through twice for EK-FAC, so not an iterator. Sizes may differ.
        view: The chosen parameters. Default None, all that require gradients.
        corrected: EK-FAC; False stops after one pass, at K-FAC. Default True.
        fisher: "type2", "mc" or "empirical", see :class:`KroneckerStatistics`. Default "type2".
        max_width: Layers with more inputs or outputs per group get their exact diagonal only. Default 8192.
        reduce: Sums a tensor over ranks; called with the same tensors in the same order on each. Default none.
        generator: Draws the labels of ``fisher="mc"``; ranks need different ones. Default None, the global one.

    Returns:
        The curvature, in the parameters' dtype, at least float32.

    Warns:
        UserWarning: Parameters without factors, by name: they get the diagonal of their curvature.

    Raises:
        ValueError: As :class:`KroneckerStatistics` and :class:`KroneckerCurvature` do; and for an iterator.

    Example:
        >>> from lightning_ext.functional import InfluenceObjective
        >>> module, batch = nn.Linear(1, 1, bias=False), (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        >>> curvature = kronecker_curvature(module, InfluenceObjective("half_squared_error"), [batch])
        >>> curvature.eigenvalues()  # the mean of x squared
        tensor([5.])
    """
    if corrected and isinstance(batches, Iterator):
        raise ValueError("batches are gone through twice: pass a list or a data loader, not an iterator.")
    statistics = KroneckerStatistics(module, objective, view, fisher=fisher, max_width=max_width)
    statistics.warn_of_diagonal()

    def total(sums: dict[str, Tensor], add: Callable[..., Any]) -> dict[str, Tensor]:
        for batch in batches:
            add(batch, generator=generator, sums=sums)
        return {name: value if reduce is None else reduce(value) for name, value in sums.items()}

    sums = total(statistics.factor_zeros(), statistics.factors)
    curvature = KroneckerCurvature.from_factors(statistics.layers, statistics.places, sums, statistics.dtype)
    if not corrected:
        return curvature
    sums = total(statistics.correction_zeros(), partial(statistics.corrections, bases=curvature.bases))
    return curvature.corrected(sums)
