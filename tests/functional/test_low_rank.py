"""Low-rank approximations and the solver behind them, against dense eigendecompositions in float64."""

import math

import pytest
import torch

from lightning_ext.functional import (
    ConvergenceWarning,
    NystromApproximation,
    block_cg,
    cg,
    lanczos,
    nystrom,
    nystrom_cg,
)

LinAlgError = torch.linalg.LinAlgError
D, R = 60, 5
SPECTRUM = torch.logspace(1, -4, D, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(spectrum, seed=1):
    basis = torch.linalg.qr(random(len(spectrum), len(spectrum), seed=seed)).Q
    return (basis * spectrum) @ basis.mT


MATRIX = symmetric(SPECTRUM)


def sketch(matrix, rank, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nystrom(lambda v: v @ matrix.to(v), len(matrix), rank, generator=generator, dtype=dtype)


def dense(approximation):
    return (approximation.eigenvectors.mT * approximation.eigenvalues) @ approximation.eigenvectors


# --- Nystrom ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [8, 12, 30])
def test_a_sketch_of_at_least_the_rank_is_exact(rank):
    matrix = symmetric(torch.cat([torch.linspace(1, 4, 8), torch.zeros(D - 8)]).double())
    approximation = sketch(matrix, rank)
    torch.testing.assert_close(dense(approximation), matrix, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(approximation.eigenvalues[:8], torch.linspace(4, 1, 8).double(), rtol=1e-10, atol=1e-10)
    assert 0 <= approximation.eigenvalues[8:].sum() < 1e-12
    assert approximation.eigenvalues.min() >= 0


def test_a_full_sketch_gives_the_eigenvalues():
    approximation = sketch(MATRIX, 2 * D)
    assert approximation.eigenvectors.shape == (D, D)
    torch.testing.assert_close(approximation.eigenvalues, SPECTRUM, rtol=1e-6, atol=1e-13)


def test_a_full_sketch_is_as_exact_as_single_precision():
    assert torch.linalg.matrix_norm(dense(sketch(MATRIX, D, torch.float32)).double() - MATRIX, 2) < 1e-5 * SPECTRUM[0]


def test_products_of_reduced_precision_are_taken_for_what_they_are():
    matrix = symmetric(torch.cat([torch.linspace(1, 4, 8), torch.zeros(D - 8)]).double())
    approximation = nystrom(
        lambda v: (v.float() @ matrix.float()).double(),
        D,
        20,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    torch.testing.assert_close(dense(approximation), matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("rank", [1, 10, 40])
def test_eigenvectors_are_orthonormal_and_eigenvalues_descend(rank, dtype, tolerance):
    approximation = sketch(MATRIX, rank, dtype)
    gram = approximation.eigenvectors @ approximation.eigenvectors.mT
    assert (gram - torch.eye(rank, dtype=dtype)).abs().max() < tolerance
    assert (approximation.eigenvalues.diff() <= 0).all()
    assert approximation.eigenvalues.dtype == dtype


def test_the_sketch_stays_below_the_operator_and_improves_with_its_rank():
    errors = []
    for rank in (2, 5, 10, 20, 40):
        gap = MATRIX - dense(sketch(MATRIX, rank))
        assert torch.linalg.eigvalsh(gap)[0] > -1e-12
        errors.append(torch.linalg.matrix_norm(gap, 2).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_the_same_generator_gives_the_same_sketch():
    assert torch.equal(dense(sketch(MATRIX, 10)), dense(sketch(MATRIX, 10)))
    assert not torch.equal(dense(sketch(MATRIX, 10)), dense(sketch(MATRIX, 10, seed=1)))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    sketch(MATRIX, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_what_an_approximation_computes_is_what_its_matrix_would(damping):
    approximation, rows = sketch(MATRIX, 12), random(R, D)
    matrix = dense(approximation) + damping * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(approximation.inverse(rows, damping), rows @ torch.linalg.inv(matrix))
    torch.testing.assert_close(approximation.logdet(damping), torch.logdet(matrix))
    torch.testing.assert_close(
        approximation.effective_dimension(damping), torch.trace(dense(approximation) @ torch.linalg.inv(matrix))
    )
    U, values = approximation.eigenvectors.mT, approximation.eigenvalues
    preconditioner = (values[-1] + damping) * (U / (values + damping)) @ U.mT + torch.eye(D) - U @ U.mT
    torch.testing.assert_close(approximation.preconditioner(damping)(rows), rows @ preconditioner)


def test_the_preconditioned_operator_has_a_small_condition_number():
    # With a rank of twice the effective dimension it is at most 28 in expectation (Frangella et al. 2021, theorem 5.1).
    damping = 0.1
    rank = 2 * math.ceil(1.5 * (SPECTRUM / (SPECTRUM + damping)).sum().item()) + 1
    inverse = sketch(MATRIX, rank).preconditioner(damping)(torch.eye(D, dtype=torch.float64))
    product = torch.linalg.eigvals(inverse @ (MATRIX + damping * torch.eye(D, dtype=torch.float64))).real
    assert product.max() / product.min() < 28 < (SPECTRUM[0] + damping) / damping


def test_the_operator_zero_has_the_eigenvalue_zero():
    approximation = nystrom(torch.zeros_like, D, 4, generator=torch.Generator().manual_seed(0))
    assert approximation.eigenvalues.abs().max() < 1e-12
    rows = random(R, D).float()
    torch.testing.assert_close(approximation.inverse(rows, 2.0), rows / 2)


def test_max_rows_bounds_the_products_of_a_sketch():
    calls = []

    def operator(rows):
        calls.append(len(rows))
        return rows @ MATRIX

    nystrom(operator, D, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64, max_rows=4)
    assert calls == [4, 4, 2]


def test_nystrom_refuses_what_it_cannot_approximate():
    with pytest.raises(LinAlgError, match="not positive semidefinite"):
        sketch(symmetric(torch.linspace(-1, 2, D, dtype=torch.float64)), 10)
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        sketch(MATRIX * math.nan, 10)
    for size, rank in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="size and rank must be at least 1"):
            nystrom(lambda v: v, size, rank, generator=torch.Generator())


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_an_approximation_needs_damping(damping):
    approximation = NystromApproximation(torch.ones(1), torch.ones(1, 1))
    for call in (
        lambda: approximation.inverse(torch.ones(1, 1), damping),
        lambda: approximation.preconditioner(damping),
        lambda: approximation.logdet(damping),
        lambda: approximation.effective_dimension(damping),
        lambda: nystrom_cg(lambda v: v, torch.ones(1, 1), damping=damping, generator=torch.Generator()),
    ):
        with pytest.raises(ValueError, match="damping must be positive"):
            call()


# --- Nystrom-preconditioned conjugate gradients --------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rank", [5, 20, 100])
def test_preconditioned_solutions_are_those_of_a_dense_solve(rank, dtype, tolerance):
    damping, rhs, matrix = 1e-2, random(R, D), MATRIX.to(dtype)
    x, info = nystrom_cg(
        lambda v: v @ matrix,
        rhs.to(dtype),
        damping=damping,
        rank=rank,
        generator=torch.Generator().manual_seed(0),
        tol=tolerance,
    )
    damped = MATRIX + damping * torch.eye(D, dtype=torch.float64)
    target = torch.linalg.solve(damped, rhs.mT).mT
    assert info.converged
    assert info.method == "nystrom_cg"
    error = torch.linalg.vector_norm(x.double() - target, dim=1) / torch.linalg.vector_norm(target, dim=1)
    assert error.max() < 1e3 * tolerance  # the condition number
    residual = torch.linalg.vector_norm(rhs - x.double() @ damped, dim=1) / torch.linalg.vector_norm(rhs, dim=1)
    assert residual.max() <= 1.5 * tolerance


def test_a_sketch_saves_iterations_and_can_be_used_again():
    damping, rhs = 1e-2, random(1, D)
    _, plain = cg(lambda v: v @ MATRIX + damping * v, rhs, tol=1e-8)
    x, first = nystrom_cg(
        lambda v: v @ MATRIX, rhs, damping=damping, rank=30, generator=torch.Generator().manual_seed(0), tol=1e-8
    )
    again, second = nystrom_cg(lambda v: v @ MATRIX, rhs, damping=damping, approximation=sketch(MATRIX, 30), tol=1e-8)
    assert first.iterations < plain.iterations / 3
    assert first.products == 30 + first.iterations + 1
    assert second.products == second.iterations + 1
    torch.testing.assert_close(x, again)


def test_the_rows_share_one_space_behind_the_sketch():
    damping, rhs, approximation = 1e-2, random(10, D), sketch(MATRIX, 10)
    _, alone = cg(
        lambda v: v @ MATRIX + damping * v, rhs, preconditioner=approximation.preconditioner(damping), tol=1e-6
    )
    _, shared = nystrom_cg(lambda v: v @ MATRIX, rhs, damping=damping, approximation=approximation, tol=1e-6)
    assert shared.products < 0.7 * alone.products
    _, forgetful = nystrom_cg(
        lambda v: v @ MATRIX, rhs, damping=damping, approximation=approximation, tol=1e-6, basis_bytes=0
    )
    assert forgetful.products > shared.products


def test_max_rows_bounds_the_sketch_and_the_solve():
    calls = []

    def operator(rows):
        calls.append(len(rows))
        return rows @ MATRIX

    _, info = nystrom_cg(
        operator, random(R, D), damping=0.1, rank=9, generator=torch.Generator().manual_seed(0), max_rows=4
    )
    assert max(calls) == 4
    assert sum(calls) == info.products


def test_a_caller_gets_its_options_through():
    rhs, generator = random(R, D), torch.Generator().manual_seed(0)
    options = {"damping": 1e-2, "rank": 5, "generator": generator}
    with pytest.warns(ConvergenceWarning, match="nystrom_cg stopped after 1 "):
        nystrom_cg(lambda v: v @ MATRIX, rhs, tol=1e-9, max_iterations=1, **options)
    x, _ = nystrom_cg(lambda v: v @ MATRIX, rhs, tol=1e-9, **options)
    assert nystrom_cg(lambda v: v @ MATRIX, rhs, x0=x, tol=1e-6, **options)[1].iterations == 0
    assert nystrom_cg(lambda v: v @ MATRIX, rhs, tol=0, atol=1e9, check="probe", **options)[1].products == 6
    loose, _ = block_cg(lambda v: v @ MATRIX + 1e-2 * v, rhs, tol=1e-9)
    torch.testing.assert_close(x, loose, rtol=1e-5, atol=1e-5)


def test_a_sketch_needs_a_generator_and_a_rank():
    with pytest.raises(ValueError, match="needs a generator"):
        nystrom_cg(lambda v: v, torch.ones(1, 3), damping=1.0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        nystrom_cg(lambda v: v, torch.ones(1, 3), damping=1.0, rank=0, generator=torch.Generator())


# --- Lanczos ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_lanczos_finds_the_largest_eigenpairs(rank, dtype, tol):
    matrix = MATRIX.to(dtype)
    values, vectors, info = lanczos(lambda v: v @ matrix, random(1, D).to(dtype), rank, tol=tol)
    torch.testing.assert_close(values.double(), SPECTRUM[:rank], rtol=10 * tol, atol=1e-6)
    residual = (vectors.double() @ MATRIX - values.double()[:, None] * vectors.double()).norm(dim=1) / SPECTRUM[0]
    assert residual.max() < 2 * tol
    gram = vectors @ vectors.mT
    assert (gram - torch.eye(rank, dtype=dtype)).abs().max() < 50 * torch.finfo(dtype).eps
    assert info.converged
    assert info.residual.shape == (rank,)
    assert info.products == info.iterations + rank


def test_lanczos_stays_orthogonal_where_the_plain_recursion_does_not():
    # A large isolated eigenvalue makes the plain recursion find copies of it.
    spectrum = torch.cat([torch.tensor([1e6]), torch.linspace(1, 2, D - 1)]).double()
    matrix = symmetric(spectrum)
    values, _, _ = lanczos(lambda v: v @ matrix, random(1, D), 5, max_iterations=D, tol=1e-14)
    torch.testing.assert_close(values, spectrum.sort(descending=True).values[:5], rtol=1e-7, atol=1e-7)


def test_lanczos_orders_by_magnitude():
    spectrum = torch.tensor([3.0, -5.0, 1.0, 0.5, -2.0], dtype=torch.float64)
    matrix = symmetric(spectrum)
    values, _, _ = lanczos(lambda v: v @ matrix, random(1, 5), 3, tol=1e-10)
    torch.testing.assert_close(values, torch.tensor([-5.0, 3.0, -2.0], dtype=torch.float64))


def test_lanczos_goes_on_when_the_krylov_space_closes():
    values, vectors, _ = lanczos(lambda v: 2 * v, random(1, D), 4, tol=1e-12)
    torch.testing.assert_close(values, torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(4, dtype=torch.float64))
    matrix = symmetric(torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(D - 2)]).double())
    start = torch.linalg.eigh(matrix).eigenvectors[:, -1][None]  # an eigenvector: closed after one step
    values, _, info = lanczos(lambda v: v @ matrix, start, 2, tol=1e-12)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0], dtype=torch.float64))
    assert info.converged


def test_lanczos_of_nothing_is_zero():
    values, _, info = lanczos(torch.zeros_like, random(1, D), 2)
    assert values.tolist() == [0.0, 0.0]
    assert info.converged


def test_lanczos_says_when_its_space_is_too_small():
    with pytest.warns(ConvergenceWarning, match="lanczos stopped after 6"):
        _, _, info = lanczos(lambda v: v @ MATRIX, random(1, D), 6, max_iterations=6, tol=1e-6)
    assert not info.converged


@pytest.mark.parametrize(
    ("start", "rank", "message"),
    [
        (torch.ones(2, 5), 1, "start must be one row"),
        (torch.zeros(1, 5), 1, "start must be one row"),
        (torch.full((1, 5), math.nan), 1, "NaN or infinite entries"),
        (torch.ones(1, 5), 0, "rank must be between 1"),
        (torch.ones(1, 5), 6, "rank must be between 1"),
    ],
)
def test_lanczos_names_bad_arguments(start, rank, message):
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, start, rank)


def test_lanczos_refuses_nan():
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        lanczos(lambda v: v * math.nan, random(1, D), 2)
