"""Low-rank approximations of a symmetric operator behind a matrix-vector product, and what they do for a solver."""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lightning_ext.functional.krylov import conjugate_gradients
from lightning_ext.functional.linear_system import (
    BlockProduct,
    Check,
    LinAlgError,
    LinearSystem,
    Matvec,
    SolveInfo,
    fixed_direction,
)

__all__ = ["NystromApproximation", "lanczos", "nystrom", "nystrom_cg"]


@dataclass(frozen=True, eq=False)
class NystromApproximation:
    r"""A positive semidefinite operator of low rank, :math:`\hat G = U \Lambda U^\top`.

    Args:
        eigenvalues: :math:`\Lambda`, ``(r,)``, descending, at least 0.
        eigenvectors: :math:`U^\top`, orthonormal rows ``(r, D)``.

    >>> approximation = NystromApproximation(torch.tensor([3.0]), torch.tensor([[1.0, 0.0]]))
    >>> approximation.inverse(torch.tensor([[4.0, 1.0]]), damping=1.0)
    tensor([[1., 1.]])
    >>> approximation.logdet(damping=1.0).exp(), approximation.effective_dimension(damping=1.0)
    (tensor(4.), tensor(0.7500))
    """

    eigenvalues: Tensor
    eigenvectors: Tensor

    def inverse(self, rows: Tensor, damping: float) -> Tensor:
        r""":math:`(\hat G + \mu I)^{-1}` times rows ``(R, D)``, for damping :math:`\mu > 0`."""
        _require_positive(damping)
        weights = damping / (self.eigenvalues + damping) - 1.0
        return self._along(rows, weights).div_(damping)

    def preconditioner(self, damping: float) -> Matvec:
        r"""The preconditioner for :math:`G + \mu I`, with the part outside the span of U left as it is.

        .. math:: P^{-1} = (\lambda_r + \mu)\, U (\Lambda + \mu)^{-1} U^\top + (I - U U^\top)

        (Frangella, Tropp & Udell 2021, arXiv:2110.02820, equation 5.3.)
        """
        _require_positive(damping)
        weights = (self.eigenvalues[-1] + damping) / (self.eigenvalues + damping) - 1.0
        return lambda rows: self._along(rows, weights)

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\log\det(\hat G + \mu I)`, a scalar, for damping :math:`\mu > 0`."""
        _require_positive(damping)
        # log1p keeps eigenvalues far below the damping, log(damping) enters once for each dimension.
        size = self.eigenvectors.shape[1]
        return (self.eigenvalues / damping).log1p().sum() + size * self.eigenvalues.new_tensor(damping).log()

    def effective_dimension(self, damping: float) -> Tensor:
        r""":math:`\operatorname{tr} \hat G (\hat G + \mu I)^{-1}`: how many directions exceed the damping."""
        _require_positive(damping)
        return (self.eigenvalues / (self.eigenvalues + damping)).sum()

    def _along(self, rows: Tensor, weights: Tensor) -> Tensor:
        return torch.addmm(rows, (rows @ self.eigenvectors.mT).mul_(weights), self.eigenvectors)


def _require_positive(damping: float) -> None:
    if not damping > 0:
        raise ValueError(f"damping must be positive: an operator of low rank is singular without it; got {damping}.")


def nystrom(
    matvec: Matvec,
    size: int,
    rank: int,
    *,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    max_rows: int | None = None,
) -> NystromApproximation:
    r"""Randomized Nystrom approximation of a positive semidefinite operator.

    .. math:: \hat G = Y (\Omega^\top Y)^{-1} Y^\top, \quad Y = G \Omega

    for a Gaussian test matrix :math:`\Omega` with ``rank`` columns. A shift :math:`\nu \approx \epsilon \lVert Y
    \rVert_F` is added before the Cholesky factorisation and taken off the eigenvalues. Exact when ``rank`` reaches the
    rank of G; never above G in the Loewner order.

    Args:
        matvec: G times rows, undamped, symmetric positive semidefinite; see `BlockProduct`.
        size: D.
        rank: at least 1; no more than D is used.
        generator: draws :math:`\Omega`, on the generator's device. Ranks need generators in the same state.
        dtype: float32 or float64.
        device: where G works; None for the generator's device.
        max_rows: the most rows in one product.

    Returns:
        The approximation with ``min(rank, D)`` eigenpairs.

    Raises:
        ValueError: If ``size`` or ``rank`` is not positive.
        torch.linalg.LinAlgError: If G is not positive semidefinite or its products are not finite.

    Source: Frangella, Tropp & Udell 2021 (arXiv:2110.02820), algorithm 2.1.

    >>> spectrum = torch.tensor([3.0, 1.0, 0.0])
    >>> nystrom(lambda rows: rows * spectrum, 3, 2, generator=torch.Generator().manual_seed(0)).eigenvalues
    tensor([3.0000, 1.0000])

    Note:
        One product with ``rank`` rows, a QR factorisation of ``(D, rank)``, and four blocks of ``rank`` rows.
    """
    if size < 1 or rank < 1:
        raise ValueError(f"size and rank must be at least 1; got size={size}, rank={rank}.")
    return _nystrom(BlockProduct(matvec, max_rows), size, rank, generator, dtype, device)


def _nystrom(
    product: BlockProduct,
    size: int,
    rank: int,
    generator: Generator,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> NystromApproximation:
    test = torch.randn(rank, size, generator=generator, dtype=dtype, device=generator.device).to(device)
    if 4 * rank > size:  # a Gaussian matrix is well conditioned by itself only if it is much longer than wide;
        # of more than D rows, D remain.
        test = torch.linalg.qr(test.mT).Q.mT
    image = product(test)
    shift, image, factor = _shifted(test, image)
    basis, corner = torch.linalg.qr(image.mT)
    core = torch.linalg.solve_triangular(factor, corner.mT.double(), upper=False).mT
    left, singular, _ = torch.linalg.svd(core)
    eigenvalues = (singular.square() - shift).clamp_min(0.0)
    return NystromApproximation(eigenvalues.to(dtype), left.mT.to(dtype) @ basis.mT)


def _shifted(test: Tensor, image: Tensor) -> tuple[float, Tensor, Tensor]:
    """The least of a few shifts of G at which its Gram matrix has a Cholesky factor; the shifted image; the factor."""
    norm = torch.linalg.vector_norm(image).item()
    if not norm < float("inf"):
        raise LinAlgError("nystrom: the products of the operator are NaN or infinite.")
    norm = norm or 1.0
    shift = torch.finfo(image.dtype).eps * norm
    while shift < 1e-2 * norm:  # more than rounding would have it if products are of reduced precision
        shifted = torch.add(image, test, alpha=shift)
        gram = (test @ shifted.mT).double()
        factor, status = torch.linalg.cholesky_ex((gram + gram.mT) / 2)
        if int(status) == 0:
            return shift, shifted, factor
        shift *= 10
    raise LinAlgError(
        "nystrom: the operator is not positive semidefinite. Take the Gauss-Newton matrix in place of the Hessian."
    )


def nystrom_cg(
    matvec: Matvec,
    rhs: Tensor,
    *,
    damping: float,
    rank: int = 100,
    generator: Generator | None = None,
    approximation: NystromApproximation | None = None,
    tol: float = 1e-2,
    atol: float = 0.0,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    max_rows: int | None = None,
    check: Check = "rows",
    basis_bytes: int = 2**30,
) -> tuple[Tensor, SolveInfo]:
    r"""Solve with :math:`G + \mu I` by `block_cg`, preconditioned with a `nystrom` approximation of G.

    For few right-hand sides, or many blocks of them that share one ``approximation``; a single block of many takes
    fewer products with `block_cg` and no sketch. When ``rank`` exceeds about twice the effective dimension
    :math:`\operatorname{tr} G (G + \mu I)^{-1}`, the number of iterations does not depend on G.

    Args:
        matvec: G times rows, undamped, symmetric positive semidefinite; see `BlockProduct`.
        rhs: ``(R, D)``, float32 or float64.
        damping: :math:`\mu > 0`, added here.
        rank: of the sketch, at least 1; no more than D is used.
        generator: draws the sketch; may be None if ``approximation`` is given.
        approximation: one made before of the same G, to save its products.
        tol: relative tolerance on the residual.
        atol: absolute tolerance; the weaker of the two counts.
        max_iterations: at least 1; None for 10 D, but no more than 1000.
        x0: ``(R, D)``, where to start; None for 0.
        max_rows: the most rows in one product, of the sketch too.
        check: "rows" recomputes the residual of every row at the end; "probe" that of one combination of them, see
            `LinearSystem.solve`.
        basis_bytes: what to keep of the earlier directions, see `block_cg`.

    Returns:
        The solutions ``(R, D)`` and a `SolveInfo` whose ``products`` include the sketch.

    Raises:
        ValueError: If an argument has the wrong shape or range, or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If G is not positive semidefinite or its products are not finite.

    Source: Frangella, Tropp & Udell 2021 (arXiv:2110.02820), algorithm 5.1.

    >>> spectrum = torch.tensor([3.0, 1.0, 0.0])
    >>> seeded = torch.Generator().manual_seed(0)
    >>> nystrom_cg(lambda rows: rows * spectrum, torch.ones(1, 3), damping=1.0, rank=2, generator=seeded)[0]
    tensor([[0.2500, 0.5000, 1.0000]])

    Note:
        ``rank`` products for the sketch, the unsolved rows in each iteration, all rows once more at the end.
    """
    _require_positive(damping)
    product = BlockProduct(matvec, max_rows)
    system = LinearSystem(lambda rows: torch.add(product(rows), rows, alpha=damping), rhs, tol=tol, atol=atol)
    if approximation is None:
        if generator is None:
            raise ValueError("nystrom_cg needs a generator to draw its sketch, or an approximation made before.")
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}.")
        approximation = _nystrom(product, rhs.shape[1], rank, generator, rhs.dtype, rhs.device)
    x, info = conjugate_gradients(
        system,
        preconditioner=approximation.preconditioner(damping),
        max_iterations=max_iterations,
        x0=x0,
        check=check,
        method="nystrom_cg",
        shared=True,
        basis_bytes=basis_bytes,
    )
    info = replace(info, products=product.rows)
    info.warn_unless_converged("raise max_iterations, rank, tol or the damping")
    return x, info


def lanczos(
    matvec: Matvec,
    start: Tensor,
    rank: int,
    *,
    max_iterations: int | None = None,
    tol: float = 1e-3,
) -> tuple[Tensor, Tensor, SolveInfo]:
    r"""The eigenpairs of largest magnitude of a symmetric operator, by Lanczos with full reorthogonalisation.

    .. math:: A Q^\top = Q^\top T + \beta_m q_{m+1} e_m^\top, \quad T = S \Theta S^\top, \quad u_i = Q^\top s_i

    Every new direction is made orthogonal to all earlier ones, twice. Where the Krylov space closes before ``rank``
    pairs are found, the recursion goes on from a fixed direction outside it. A repeated eigenvalue may come out fewer
    times than it occurs: one start sees one direction of its eigenspace.

    Args:
        matvec: A times rows; gets one row at a time, and ``rank`` rows at the end.
        start: ``(1, D)``, not zero; a random row or `fixed_direction`.
        rank: how many pairs, between 1 and D.
        max_iterations: the largest dimension of the Krylov space, at least ``rank``; None for 4 rank + 20. Never more
            than D.
        tol: a pair is found when :math:`\lVert A u - \theta u \rVert \le \text{tol} \max |\theta|`.

    Returns:
        Eigenvalues ``(rank,)`` by descending magnitude, orthonormal eigenvectors as rows ``(rank, D)``, a `SolveInfo`.

    Raises:
        ValueError: If ``start`` is not one finite row that is not zero, or ``rank`` or ``max_iterations`` is out of
            range.
        torch.linalg.LinAlgError: If the products are not finite.

    Source: Lanczos 1950; for influence functions Schioppa et al. 2022 (arXiv:2112.03052).

    >>> spectrum = torch.tensor([1.0, -4.0, 2.0])
    >>> lanczos(lambda rows: rows * spectrum, torch.ones(1, 3), rank=2)[0].round(decimals=3)
    tensor([-4.,  2.])

    Note:
        One product with one row per iteration and one with ``rank`` rows at the end. Keeps the whole Krylov basis,
        ``max_iterations`` rows.
    """
    size = start.shape[-1]
    limit = min(size, 4 * rank + 20 if max_iterations is None else max_iterations)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must be between 1 and min(D, max_iterations) = {limit}; got {rank}.")
    system = LinearSystem(matvec, start)
    if len(start) != 1 or not bool(system.rhs_norm > 0):
        raise ValueError(f"start must be one row (1, D) that is not zero; got {len(start)} rows.")
    basis = start.new_empty(limit, size)
    basis[0] = system.rhs[0] / system.rhs_norm
    values, mixing, steps = _krylov(system.product, basis, rank, tol)
    vectors = mixing.to(basis) @ basis[:steps]
    values = values.to(basis)
    residual = torch.linalg.vector_norm(system.product(vectors) - values[:, None] * vectors, dim=1)
    residual = residual / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
    info = SolveInfo("lanczos", steps, residual, bool((residual <= tol).all()), system.product.rows)
    info.warn_unless_converged("raise max_iterations or tol")
    return values, vectors, info


def _krylov(product: BlockProduct, basis: Tensor, rank: int, tol: float) -> tuple[Tensor, Tensor, int]:
    """Fill the basis until the largest pairs are found; their eigenvalues, coordinates (rank, steps), and the steps."""
    limit = len(basis)
    tridiagonal = torch.zeros(limit + 1, limit + 1, dtype=torch.float64)
    step, norm = 0, basis.new_zeros(())
    while True:
        image = product(basis[step : step + 1])
        tridiagonal[step, step] = torch.linalg.vecdot(image, basis[step : step + 1]).item()
        rest = _orthogonal(image, basis[: step + 1])
        beta = torch.linalg.vector_norm(rest).item()
        norm = torch.stack((norm, torch.linalg.vector_norm(image))).amax()  # unlike max(), lets NaN through
        if not bool(norm.isfinite()):
            raise LinAlgError("lanczos: the products of the operator are NaN or infinite.")
        step += 1
        if step == limit or (step >= rank and step % 5 == 0):
            values, vectors = torch.linalg.eigh(tridiagonal[:step, :step])
            order = values.abs().argsort(descending=True)[:rank]
            found = bool((beta * vectors[-1, order].abs() <= 0.5 * tol * values.abs().max()).all())
            if step == limit or found:
                return values[order], vectors[:, order].mT, step
        if beta <= 10 * torch.finfo(basis.dtype).eps * norm:  # the Krylov space is closed: decouple another one
            rest = _outside(basis[:step])
        tridiagonal[step, step - 1] = tridiagonal[step - 1, step] = beta
        basis[step] = rest / torch.linalg.vector_norm(rest)


def _outside(basis: Tensor) -> Tensor:
    for index in itertools.count():
        row = _orthogonal(fixed_direction(basis.shape[1], index, like=basis), basis)
        if torch.linalg.vector_norm(row) > 1e-3:
            return row
    raise AssertionError("the basis spans the whole space")


def _orthogonal(row: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):  # once is not enough in finite precision, twice is (Kahan and Parlett)
        row = row - (row @ basis.mT) @ basis
    return row
