"""Neumann series against their closed form, their noise and their divergence; all in float64."""

import math

import pytest
import torch

from lightning_ext.functional import ConvergenceWarning, fixed_direction, lissa, lissa_scale, neumann, power_iteration

LinAlgError = torch.linalg.LinAlgError
D, R = 12, 3


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(spectrum, seed=1):
    basis = torch.linalg.qr(random(len(spectrum), len(spectrum), seed=seed)).Q
    return (basis * spectrum) @ basis.mT


MATRIX = symmetric(torch.logspace(0.3, -1, D, dtype=torch.float64))


def series(matrix, rhs, scale, depth):
    """K^-1 [I - (I - K/s)^(T+1)] v."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    rest = torch.linalg.matrix_power(eye - matrix / scale, depth + 1)
    return torch.linalg.solve(matrix, (eye - rest) @ rhs.mT).mT


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 50])
def test_the_series_has_depth_plus_one_terms(depth):
    rhs = random(R, D)
    with pytest.warns(ConvergenceWarning, match=f"neumann stopped after {depth}"):
        x, info = neumann(lambda v: v @ MATRIX, rhs, scale=3.0, depth=depth, tol=0)
    torch.testing.assert_close(x, series(MATRIX, rhs, 3.0, depth), rtol=1e-11, atol=1e-12)
    assert info.iterations == depth
    assert info.products == (depth + 1) * R
    assert info.scale == 3.0
    assert not info.converged
    torch.testing.assert_close(info.residual, (rhs - x @ MATRIX).norm(dim=1) / rhs.norm(dim=1))


@pytest.mark.parametrize(
    ("depth", "hypergradient"), [(0, 1.3125), (1, 1.96875), (2, 2.296875), (5, 2.583984375), (20, 2.62499875)]
)
def test_the_scalar_bilevel_problem_comes_out_as_by_hand(depth, hypergradient):
    # f = a w^2 / 2 + b w u, F = (w - t)^2 / 2 with a=2, b=3, t=1, u=1/2: w* = -3/4 and dF/du = -b (w* - t) / a = 21/8.
    with pytest.warns(ConvergenceWarning):
        x, _ = neumann(lambda v: 2 * v, torch.tensor([[-1.75]], dtype=torch.float64), scale=4.0, depth=depth, tol=0)
    assert -3 * x.item() == pytest.approx(hypergradient, abs=1e-8 if depth == 20 else 1e-12)


def test_unrolled_gradient_descent_is_the_series():
    rhs, x = random(1, D), torch.zeros(1, D, dtype=torch.float64)
    for _ in range(9):
        x = x - (x @ MATRIX - rhs) / 3.0
    with pytest.warns(ConvergenceWarning):
        torch.testing.assert_close(neumann(lambda v: v @ MATRIX, rhs, scale=3.0, depth=8, tol=0)[0], x)


def test_the_scale_is_found_and_the_series_stops_at_the_tolerance():
    rhs = random(R, D)
    x, info = neumann(lambda v: v @ MATRIX, rhs, tol=1e-6)
    largest = torch.linalg.eigvalsh(MATRIX)[-1].item()
    assert 1.05 * largest < info.scale < 1.3 * largest
    assert info.converged
    assert 1e-7 < info.residual.max() <= 1e-6
    torch.testing.assert_close(x, torch.linalg.solve(MATRIX, rhs.mT).mT, rtol=1e-4, atol=1e-4)


def test_solved_rows_leave_the_products():
    eigenvalues, vectors = torch.linalg.eigh(MATRIX)
    calls = []

    def operator(rows):
        calls.append(len(rows))
        return rows @ MATRIX

    rhs = torch.stack([vectors[:, -1], vectors[:, 0]])
    x, _ = neumann(operator, rhs, scale=eigenvalues[-1].item() * 1.01, tol=1e-6)
    assert calls[:6] == [2, 2, 2, 1, 1, 1]
    assert calls[-1] == 2
    torch.testing.assert_close(x[0], vectors[:, -1] / eigenvalues[-1], rtol=1e-5, atol=1e-6)


def test_a_start_is_used_up_to_the_tolerance():
    rhs = random(R, D)
    target = torch.linalg.solve(MATRIX, rhs.mT).mT
    assert neumann(lambda v: v @ MATRIX, rhs, x0=target, tol=1e-6)[1].iterations == 0
    zero, info = neumann(lambda v: v @ MATRIX, torch.zeros(1, D, dtype=torch.float64), x0=target[:1])
    assert zero.abs().max() == 0
    assert info.converged


def test_a_singular_operator_gives_the_pseudo_inverse_on_its_range():
    matrix = symmetric(torch.cat([torch.linspace(0.5, 2, 6), torch.zeros(4)]).double())
    rhs = random(1, 10)
    with pytest.warns(ConvergenceWarning):
        x, _ = neumann(lambda v: v @ matrix, rhs, depth=400)
    torch.testing.assert_close(x @ matrix, rhs @ torch.linalg.pinv(matrix) @ matrix, rtol=1e-8, atol=1e-8)


def test_an_unsymmetric_operator_converges_at_a_given_scale():
    matrix = torch.eye(D, dtype=torch.float64) + 0.1 * random(D, D, seed=2)
    rhs = random(R, D)
    x, info = neumann(lambda v: v @ matrix.mT, rhs, scale=1.2, tol=1e-10)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, rhs.mT).mT, rtol=1e-7, atol=1e-8)
    assert info.converged


@pytest.mark.parametrize("depth", [1, 5, 20, 100])
def test_truncation_is_close_to_a_damping(depth):
    # Filters on one eigenvalue each, against (mu + eps)^-1 with eps = scale / (depth + 1).
    eigenvalues = torch.logspace(-6, 0, 200, dtype=torch.float64)[None]
    with pytest.warns(ConvergenceWarning):
        x, _ = neumann(lambda v: v * eigenvalues, torch.ones_like(eigenvalues), scale=1.0, depth=depth, tol=0)
    ratio = x * (eigenvalues + 1 / (depth + 1))
    bound = 1.32 if depth >= 20 else 1.5626
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= bound
    assert (x.diff() <= 1e-9).all()
    assert (x * eigenvalues <= 1 + 1e-9).all()


@pytest.mark.parametrize("factor", [0.45, 0.1])
def test_a_scale_below_half_the_largest_eigenvalue_is_refused(factor):
    largest = torch.linalg.eigvalsh(MATRIX)[-1].item()
    with pytest.raises(LinAlgError, match=r"neumann diverges at scale .* curvature (2|1\.9\d)\. Take a scale above"):
        neumann(lambda v: v @ MATRIX, random(R, D), scale=factor * largest)


def test_an_indefinite_operator_is_refused():
    matrix = symmetric(torch.linspace(-1, 2, D, dtype=torch.float64))
    with pytest.raises(LinAlgError, match="not positive definite"):
        neumann(lambda v: v @ matrix, random(R, D))
    with pytest.raises(LinAlgError, match="neumann: the operator is not positive definite"):
        neumann(lambda v: -v @ MATRIX, random(R, D))


def test_products_that_are_nan_are_refused():
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        neumann(lambda v: v * math.nan, random(R, D), scale=1.0)
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        neumann(lambda v: v * math.nan, random(R, D))


@pytest.mark.parametrize("options", [{"depth": -1}, {"scale": 0.0}, {"scale": math.nan}])
def test_neumann_names_bad_options(options):
    with pytest.raises(ValueError, match="depth must be at least 0 and scale positive"):
        neumann(lambda v: v, random(R, D), **options)


# --- power iteration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_power_iteration_finds_the_largest_magnitude(sign):
    matrix = sign * symmetric(torch.tensor([5.0, 3.0, -2.0, 0.1], dtype=torch.float64))
    values, vectors, info = power_iteration(lambda v: v @ matrix, random(2, 4), tol=1e-6)
    torch.testing.assert_close(values, torch.full((2,), sign * 5.0, dtype=torch.float64))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, dtype=torch.float64))
    residual = (vectors @ matrix - values[:, None] * vectors).norm(dim=1) / values.abs()
    torch.testing.assert_close(info.residual, residual)
    assert info.converged
    assert info.products == 2 * info.iterations


def test_power_iteration_says_when_it_stops_early():
    with pytest.warns(ConvergenceWarning, match="power_iteration stopped after 2"):
        _, _, info = power_iteration(lambda v: v @ MATRIX, random(1, D), max_iterations=2, tol=1e-9)
    assert not info.converged


def test_power_iteration_of_nothing_is_zero():
    values, vectors, info = power_iteration(torch.zeros_like, random(1, D))
    assert values.item() == 0
    assert info.converged
    assert vectors.norm().item() == pytest.approx(1)


@pytest.mark.parametrize(("start", "count"), [(torch.zeros(1, 3), 5), (torch.ones(1, 3), 0)])
def test_power_iteration_names_bad_arguments(start, count):
    with pytest.raises(ValueError, match="start must have no zero row and max_iterations be at least 1"):
        power_iteration(lambda v: v, start, max_iterations=count)


def test_power_iteration_refuses_nan():
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        power_iteration(lambda v: v * math.nan, random(1, D))


def test_fixed_directions_are_unit_rows_that_differ():
    rows = torch.cat([fixed_direction(1000, index, like=random(1)) for index in range(20)])
    gram = rows @ rows.mT
    torch.testing.assert_close(gram.diagonal(), torch.ones(20, dtype=torch.float64))
    assert (gram - torch.eye(20, dtype=torch.float64)).abs().max() < 0.2
    assert fixed_direction(5, like=torch.zeros(1)).dtype == torch.float32


# --- LiSSA --------------------------------------------------------------------------------------------------------

SAMPLES = random(40, D, seed=6) * torch.logspace(0, -1, D, dtype=torch.float64)
DAMPING = 0.05
MEAN = SAMPLES.mT @ SAMPLES / len(SAMPLES) + DAMPING * torch.eye(D, dtype=torch.float64)


def sampled(batch, seed=0):
    """Products with the curvature of batches drawn with replacement, one batch for each step."""

    def product(rows, step):
        generator = torch.Generator().manual_seed(100_000 * seed + step)
        drawn = SAMPLES[torch.randint(len(SAMPLES), (batch,), generator=generator)]
        return rows @ drawn.mT @ drawn / batch + DAMPING * rows

    return product


def full(rows):
    return rows @ MEAN


def test_lissa_with_the_full_batch_is_the_series():
    rhs = random(R, D)
    with pytest.warns(ConvergenceWarning):
        x, info = lissa(lambda v, _: full(v), rhs, matvec=full, scale=4.0, depth=30, repeats=2, tol=1e-9)
    torch.testing.assert_close(x, series(MEAN, rhs, 4.0, 30), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(info.residual, (rhs - x @ MEAN).norm(dim=1) / rhs.norm(dim=1))
    assert info.iterations == 60
    assert info.products == 61 * R


def test_the_mean_of_lissa_over_seeds_is_the_series():
    rhs, runs = random(1, D), []
    for seed in range(200):
        x, _ = lissa(sampled(4, seed), rhs, matvec=full, scale=8.0, depth=40, tol=math.inf)
        runs.append(x)
    runs = torch.cat(runs)
    error = runs.mean(dim=0) - series(MEAN, rhs, 8.0, 40)[0]
    standard_error = runs.std(dim=0) / math.sqrt(len(runs))
    assert (error.abs() < 3.5 * standard_error).all()
    assert standard_error.max() < 0.05 * runs.mean(dim=0).abs().max()  # else the line above would say little


def test_repeats_have_batches_of_their_own_and_reduce_the_noise():
    seen = []

    def product(rows, step):
        seen.append(step)
        return sampled(4)(rows, step)

    rhs = random(1, D)
    x, _ = lissa(product, rhs, matvec=full, scale=8.0, depth=5, repeats=3, tol=math.inf)
    assert seen == list(range(15))
    parts = [
        lissa(lambda v, s, m=m: sampled(4)(v, 5 * m + s), rhs, matvec=full, scale=8.0, depth=5, tol=math.inf)[0]
        for m in range(3)
    ]
    torch.testing.assert_close(x, torch.stack(parts).mean(dim=0))


def test_all_pieces_of_a_block_see_the_same_batch():
    rhs = random(5, D)
    options = {"matvec": full, "scale": 8.0, "depth": 20, "tol": math.inf}
    torch.testing.assert_close(lissa(sampled(4), rhs, max_rows=2, **options)[0], lissa(sampled(4), rhs, **options)[0])


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_the_scale_found_keeps_lissa_stable(batch):
    largest = torch.linalg.eigvalsh(MEAN)[-1].item()
    trace = SAMPLES.square().sum(dim=1).max().item() / batch
    rhs = random(R, D)
    x, info = lissa(sampled(batch), rhs, matvec=full, batch_trace=trace, depth=3000, tol=math.inf)
    assert info.scale == pytest.approx(lissa_scale(largest, trace), rel=0.05)
    correlation = torch.cosine_similarity(x, torch.linalg.solve(MEAN, rhs.mT).mT)
    assert correlation.min() > 0.9


def test_a_scale_that_serves_the_full_batch_diverges_on_single_samples():
    largest = torch.linalg.eigvalsh(MEAN)[-1].item()
    rhs = torch.cat([torch.zeros(1, D, dtype=torch.float64), random(R, D)])
    with pytest.raises(LinAlgError, match=r"lissa diverges at scale .*, by step \d+\. Raise the scale"):
        lissa(sampled(1), rhs, matvec=full, scale=0.6 * largest, depth=3000)


def test_lissa_says_what_its_noise_leaves():
    with pytest.warns(ConvergenceWarning, match="lissa stopped after 50"):
        _, info = lissa(sampled(1), random(R, D), matvec=full, scale=20.0, depth=50, tol=1e-3)
    assert not info.converged


@pytest.mark.parametrize("step_of_nan", [0, 13, 19])
def test_lissa_never_returns_nan(step_of_nan):
    with pytest.raises(LinAlgError, match="lissa diverges"):
        lissa(
            lambda v, t: full(v) * (math.nan if t == step_of_nan else 1), random(1, D), matvec=full, scale=4.0, depth=20
        )


def test_lissa_of_zero_is_zero():
    x, info = lissa(sampled(4), torch.zeros(1, D, dtype=torch.float64), matvec=full, scale=8.0, depth=20)
    assert x.abs().max() == 0
    assert info.converged


def test_lissa_names_bad_options():
    for options in ({"depth": -1}, {"repeats": 0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="depth must be at least 0, repeats at least 1"):
            lissa(sampled(4), random(1, D), matvec=full, **{"scale": 1.0, **options})
    with pytest.raises(ValueError, match="needs a scale, or batch_trace"):
        lissa(sampled(4), random(1, D), matvec=full)
    for arguments in ((0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="largest_eigenvalue must be positive"):
            lissa_scale(*arguments)
