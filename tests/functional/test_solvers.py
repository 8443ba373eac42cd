"""Solvers on blocks of rows against torch.linalg in float64, and every way in which one may stop early or go wrong."""

import math
import warnings

import pytest
import torch

from lightning_ext.functional import (
    BlockProduct,
    ConvergenceWarning,
    LinearSystem,
    block_cg,
    cg,
    conjugate_gradients,
    direct,
    direct_dual,
    normal_cg,
)

LinAlgError = torch.linalg.LinAlgError
D, R = 40, 6
SPECTRA = {
    "even": torch.linspace(1, 5, D, dtype=torch.float64),
    "decaying": torch.logspace(1, -3, D, dtype=torch.float64),
    "three values": torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64).repeat_interleave(D)[::3],
    "flat": torch.full((D,), 3.0, dtype=torch.float64),
}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(spectrum, seed=1):
    basis = torch.linalg.qr(random(len(spectrum), len(spectrum), seed=seed)).Q
    return (basis * spectrum) @ basis.mT


def exact(matrix, rhs):
    return torch.linalg.solve(matrix, rhs.mT).mT


def relative_residual(matrix, rhs, x):
    return torch.linalg.vector_norm(rhs - x @ matrix.mT, dim=1) / torch.linalg.vector_norm(rhs, dim=1)


class Counted:
    """An operator that keeps how many rows each call had."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, []

    def __call__(self, rows):
        self.calls.append(len(rows))
        return rows @ self.matrix


SOLVERS = {"cg": cg, "block_cg": block_cg}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["cg", "block_cg", "normal_cg", "direct"])
def test_solutions_are_those_of_a_dense_solve(name, spectrum):
    matrix, rhs = symmetric(SPECTRA[spectrum]), random(R, D)
    call = {"normal_cg": normal_cg, **SOLVERS}.get(name)
    tol = 1e-10 if name == "normal_cg" else 1e-12
    x, info = direct(matrix, rhs) if call is None else call(lambda v: v @ matrix, rhs, tol=tol)
    torch.testing.assert_close(x, exact(matrix, rhs), rtol=1e-8, atol=1e-3 if name == "normal_cg" else 1e-8)
    assert info.converged
    assert info.method == name
    assert info.residual.shape == (R,)


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_cg_needs_as_many_steps_as_there_are_eigenvalues(count):
    matrix = symmetric(torch.linspace(1, 2, count, dtype=torch.float64).repeat_interleave(D // count))
    x, info = cg(lambda v: v @ matrix, random(R, D), tol=1e-10)
    assert info.iterations == count
    torch.testing.assert_close(x, exact(matrix, random(R, D)), rtol=1e-9, atol=1e-9)


def test_a_multiple_of_the_identity_takes_one_step_and_does_not_return_the_start(solver):
    rhs = random(R, D)
    x, info = solver(lambda v: 2.5 * v, rhs, tol=1e-12)
    assert info.iterations == 1
    torch.testing.assert_close(x, rhs / 2.5)


def test_an_operator_that_returns_its_input_is_the_identity(solver):
    rhs = random(R, D)
    kept = rhs.clone()
    torch.testing.assert_close(solver(lambda v: v, rhs)[0], kept)
    torch.testing.assert_close(rhs, kept, rtol=0, atol=0)


def test_the_first_step_is_steepest_descent():
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(1, D)
    with pytest.warns(ConvergenceWarning):
        x, _ = cg(lambda v: v @ matrix, rhs, max_iterations=1, tol=1e-12)
    torch.testing.assert_close(x, rhs * (rhs @ rhs.mT) / (rhs @ matrix @ rhs.mT))


def test_the_error_falls_in_the_norm_of_the_operator(solver):
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(R, D)
    target, before = exact(matrix, rhs), math.inf
    for iterations in range(1, 6):
        with pytest.warns(ConvergenceWarning):
            x, info = solver(lambda v: v @ matrix, rhs, max_iterations=iterations, tol=1e-10)
        error = torch.einsum("rd,de,re->", x - target, matrix, x - target)
        assert info.iterations == iterations
        assert error < before
        before = error


def test_one_parameter_is_enough(solver):
    x, info = solver(lambda v: 4 * v, torch.tensor([[8.0], [0.0]]))
    assert x.tolist() == [[2.0], [0.0]]
    assert info.converged


def test_a_zero_right_hand_side_has_the_solution_zero_and_costs_nothing(solver):
    operator = Counted(symmetric(SPECTRA["even"]))
    x, info = solver(operator, torch.zeros(R, D, dtype=torch.float64), x0=random(R, D), check="probe")
    assert info.iterations == 0
    assert info.converged
    assert x.abs().max() == 0
    assert info.residual.tolist() == [0.0] * R


def test_no_rows_no_work(solver):
    x, info = solver(lambda v: v, torch.zeros(0, D))
    assert x.shape == (0, D)
    assert info.converged


def test_solved_rows_leave_the_products_and_keep_their_solution():
    spectrum = SPECTRA["decaying"]
    basis = torch.linalg.qr(random(D, D, seed=1)).Q
    operator = Counted((basis * spectrum) @ basis.mT)
    rhs = torch.cat([basis[:, :1].mT, basis[:, :3].sum(1)[None], random(1, D)])
    x, info = cg(operator, rhs, tol=1e-8)
    assert operator.calls[:4] == [3, 2, 2, 1]
    assert operator.calls[-1] == 3  # the residuals at the end
    assert sum(operator.calls) == info.products
    torch.testing.assert_close(x[0], basis[:, 0] / spectrum[0])
    assert (relative_residual(operator.matrix, rhs, x) < 1e-8).all()


def test_a_shared_space_takes_fewer_products_and_iterations():
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(12, D)
    _, alone = cg(lambda v: v @ matrix, rhs, tol=1e-6)
    x, shared = block_cg(lambda v: v @ matrix, rhs, tol=1e-6)
    assert (relative_residual(matrix, rhs, x) < 1e-6).all()
    assert shared.iterations < alone.iterations / 4
    assert shared.products < alone.products / 4


def test_dependent_rows_cost_nothing_in_a_shared_space():
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(3, D)
    _, few = block_cg(lambda v: v @ matrix, rhs, tol=1e-6, check="probe")
    many = random(30, 3, seed=4) @ rhs
    x, info = block_cg(lambda v: v @ matrix, many, tol=1e-6, check="probe")
    assert info.products <= 1.2 * few.products
    assert (relative_residual(matrix, many, x) < 1e-6).all()


def test_directions_that_no_row_needs_are_left_out_of_a_shared_space():
    operator = Counted(symmetric(SPECTRA["decaying"]))
    rhs = random(1, D) + 1e-3 * random(20, D, seed=7)
    x, _ = block_cg(operator, rhs, tol=0.1, check="probe")
    assert max(operator.calls) == 1
    assert (relative_residual(operator.matrix, rhs, x) < 0.1).all()


def test_solved_rows_leave_a_shared_space():
    basis = torch.linalg.qr(random(D, D, seed=1)).Q
    operator = Counted((basis * SPECTRA["decaying"]) @ basis.mT)
    block_cg(operator, torch.cat([basis[:, :8].mT, random(2, D)]), tol=1e-6, check="probe")
    assert operator.calls[0] == 10
    assert max(operator.calls[1:]) == 2


@pytest.mark.parametrize("basis_bytes", [0, 2**30])
def test_a_shared_space_solves_with_any_memory_and_better_with_more(basis_bytes):
    spectrum = torch.logspace(0, -4, 200, dtype=torch.float64)
    matrix, rhs = symmetric(spectrum), random(20, 200)
    x, info = block_cg(lambda v: v @ matrix, rhs, tol=1e-2, basis_bytes=basis_bytes)
    assert (relative_residual(matrix, rhs, x) < 1e-2).all()
    assert (info.products - 20 < 205) == (basis_bytes > 0)  # with all directions kept, no more than dimensions


def test_the_residual_is_that_of_the_answer(solver):
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(R, D)
    x, info = solver(lambda v: v @ matrix, rhs, tol=0.1)
    torch.testing.assert_close(info.residual, relative_residual(matrix, rhs, x))
    assert (info.residual <= 0.1).all()


def test_not_converged_is_said_aloud(solver):
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(R, D)
    with pytest.warns(ConvergenceWarning, match=r"stopped after 2 iterations at a relative residual of \d"):
        x, info = solver(lambda v: v @ matrix, rhs, tol=1e-9, max_iterations=2)
    assert not info.converged
    torch.testing.assert_close(info.residual, relative_residual(matrix, rhs, x))


class Unsteady(Counted):
    """Off by a tenth in its first products, so that a recursion is mistaken about its residual."""

    def __call__(self, rows):
        image = super().__call__(rows)
        return image * 1.1 if len(self.calls) <= 2 else image


@pytest.mark.parametrize("check", ["rows", "probe"])
def test_a_recursion_that_lost_the_true_residual_is_found_out_and_goes_on(solver, check):
    matrix, rhs = symmetric(SPECTRA["three values"]), random(R, D)
    x, info = solver(Unsteady(matrix), rhs, tol=1e-6, check=check)
    assert info.converged
    assert (relative_residual(matrix, rhs, x) < 1e-6).all()


def test_a_residual_that_cannot_be_reached_is_reported_as_it_is():
    spectrum = torch.logspace(0, -6, D, dtype=torch.float64)
    matrix, rhs = symmetric(spectrum), random(R, D)
    single = matrix.float()
    with pytest.warns(ConvergenceWarning):
        x, info = cg(lambda v: v @ single, rhs.float(), tol=1e-7, max_iterations=20_000)
    assert not info.converged
    assert info.iterations < 5_000  # it gave up for want of progress, not of patience
    torch.testing.assert_close(
        info.residual.double(), relative_residual(single.double(), rhs, x.double()), rtol=0.5, atol=1e-7
    )


def test_a_probe_costs_one_product_and_bounds_the_residuals(solver):
    matrix, rhs = symmetric(SPECTRA["decaying"]).float(), random(R, D).float()
    _, full = solver(lambda v: v @ matrix, rhs, tol=1e-2)
    x, info = solver(lambda v: v @ matrix, rhs, tol=1e-2, check="probe")
    assert full.products - info.products == R - 1
    true = relative_residual(matrix.double(), rhs.double(), x.double())
    assert info.converged
    assert (info.residual >= 0.999 * true).all()
    assert (info.residual <= true + 1e-3).all()  # the rounding of all rows together


def test_a_probe_is_right_for_rows_that_ran_out_of_iterations(solver):
    basis = torch.linalg.qr(random(D, D, seed=1)).Q
    matrix = (basis * SPECTRA["decaying"]) @ basis.mT
    rhs = torch.cat([basis[:, :1].mT, random(2, D)])
    with pytest.warns(ConvergenceWarning):
        x, info = solver(lambda v: v @ matrix, rhs, tol=1e-6, max_iterations=4, check="probe")
    torch.testing.assert_close(info.residual, relative_residual(matrix, rhs, x), rtol=1e-6, atol=1e-9)
    if solver is cg:
        assert info.products == 3 + 2 + 2 + 2 + 1


def test_the_weaker_tolerance_counts_for_each_row(solver):
    matrix = symmetric(SPECTRA["decaying"])
    rhs = random(2, D) / torch.linalg.vector_norm(random(2, D), dim=1, keepdim=True)
    rhs *= torch.tensor([[1e-3], [1.0]])
    x, info = solver(lambda v: v @ matrix, rhs, tol=1e-8, atol=1e-2)
    if solver is cg:
        assert x[0].abs().max() == 0
        assert info.residual[0] == 1
    assert 1e-8 < info.residual[1] <= 1e-2
    assert info.converged


def test_tiny_and_huge_rows_are_solved_to_the_same_relative_tolerance(solver):
    matrix = symmetric(SPECTRA["even"]).float()
    rhs = random(1, D).float() * torch.tensor([[1e-35], [1.0], [1e30]])
    x, info = solver(lambda v: v @ matrix, rhs, tol=1e-4)
    assert info.converged
    torch.testing.assert_close(x[0] * 1e35, x[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x[2] * 1e-30, x[1], rtol=1e-3, atol=1e-3)


def test_a_start_at_the_solution_takes_no_step_and_a_near_one_fewer(solver):
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(R, D)
    target = exact(matrix, rhs)
    x, info = solver(lambda v: v @ matrix, rhs, x0=target, tol=1e-6)
    assert info.iterations == 0
    torch.testing.assert_close(x, target)
    x, near = solver(lambda v: v @ matrix, rhs, x0=target + 1e-3 * rhs, tol=1e-4)
    assert (relative_residual(matrix, rhs, x) < 1e-4).all()
    assert near.iterations < solver(lambda v: v @ matrix, rhs, tol=1e-4)[1].iterations


def test_max_rows_bounds_each_product_and_changes_nothing(solver):
    operator, rhs = Counted(symmetric(SPECTRA["decaying"])), random(R, D)
    x, info = solver(operator, rhs, max_rows=4)
    assert max(operator.calls) == 4
    free, other = solver(lambda v: v @ operator.matrix, rhs)
    torch.testing.assert_close(x, free, rtol=1e-9, atol=1e-9)
    assert info.products == other.products


def test_single_precision_agrees_with_cholesky(solver):
    matrix, rhs = symmetric(SPECTRA["even"]), random(R, D)
    x, info = solver(lambda v: v @ matrix.float(), rhs.float(), tol=1e-3)
    assert x.dtype == torch.float32
    assert info.converged
    error = torch.linalg.vector_norm(x.double() - exact(matrix, rhs), dim=1)
    assert (error < 1e-2 * torch.linalg.vector_norm(exact(matrix, rhs), dim=1)).all()


def test_an_exact_preconditioner_solves_in_one_step(solver):
    matrix, rhs = symmetric(SPECTRA["decaying"]), random(R, D)
    inverse = torch.linalg.inv(matrix)
    x, info = solver(lambda v: v @ matrix, rhs, preconditioner=lambda v: v @ inverse, tol=1e-8)
    assert info.iterations == 1
    torch.testing.assert_close(x, exact(matrix, rhs), rtol=1e-6, atol=1e-6)


def test_equal_inputs_give_equal_bits_and_equal_calls(solver):
    first, second = Counted(symmetric(SPECTRA["decaying"])), Counted(symmetric(SPECTRA["decaying"]))
    assert torch.equal(solver(first, random(R, D))[0], solver(second, random(R, D))[0])
    assert first.calls == second.calls


def test_an_operator_with_parameters_leaves_no_graph(solver):
    matrix = symmetric(SPECTRA["even"]).requires_grad_()
    x, info = solver(lambda v: v @ matrix, random(R, D).requires_grad_())
    assert not x.requires_grad
    assert not info.residual.requires_grad


def test_an_indefinite_operator_is_refused(solver):
    matrix = symmetric(torch.linspace(-1, 3, D, dtype=torch.float64))
    with pytest.raises(LinAlgError, match=r"not positive definite.*normal_cg"):
        solver(lambda v: v @ matrix, random(R, D), tol=1e-8)


def test_an_indefinite_preconditioner_is_refused():
    with pytest.raises(LinAlgError, match="preconditioner is not positive definite"):
        cg(lambda v: v, random(R, D), preconditioner=lambda v: -v)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_are_refused(solver, bad):
    matrix = symmetric(SPECTRA["even"])
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        solver(lambda v: (v @ matrix).index_fill(1, torch.tensor([3]), bad), random(R, D))


@pytest.mark.parametrize("call", [1, 2])
def test_a_single_product_that_is_not_finite_is_enough(solver, call):
    operator = Counted(torch.eye(D, dtype=torch.float64))

    def failing(rows):  # the second product is that of the final check
        return operator(rows) * (math.inf if len(operator.calls) == call else 1)

    with pytest.raises(LinAlgError, match="NaN or infinite"):
        solver(failing, random(R, D))


def test_a_singular_operator_never_passes_for_solved(solver):
    matrix, rhs = symmetric(torch.cat([SPECTRA["even"][:6], torch.zeros(4, dtype=torch.float64)])), random(2, 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _, info = solver(lambda v: v @ matrix, rhs, tol=1e-6)
        except LinAlgError:  # the curvature along a residual in the null space may round to either sign
            return
    assert not info.converged
    assert issubclass(caught[-1].category, ConvergenceWarning)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1.0}, "tol and atol"),
        ({"tol": math.nan}, "tol and atol"),
        ({"atol": -1.0}, "tol and atol"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"max_rows": 0}, "max_rows"),
        ({"check": "none"}, "check"),
        ({"x0": torch.zeros(R, D + 1)}, "x0 must have the shape"),
    ],
)
def test_bad_options_are_named(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solver(lambda v: v, random(R, D), **options)


@pytest.mark.parametrize("rhs", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.bfloat16)])
def test_what_is_no_block_of_rows_is_refused(solver, rhs):
    with pytest.raises(ValueError, match="rhs must be rows"):
        solver(lambda v: v, rhs)


def test_a_right_hand_side_with_nan_is_named(solver):
    rhs = random(R, D)
    rhs[2, 5], rhs[4, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"NaN or infinite entries in rows \[2, 4\]"):
        solver(lambda v: v, rhs)


@pytest.mark.parametrize("result", [lambda v: v[:, :-1], lambda v: v.float(), lambda v: v[0]])
def test_an_operator_that_returns_something_else_is_refused(solver, result):
    with pytest.raises(ValueError, match="matvec must return rows like those it gets"):
        solver(result, random(R, D))


def test_the_recursion_runs_on_a_system_that_the_caller_made():
    matrix, rhs = symmetric(SPECTRA["even"]), random(R, D)
    product = BlockProduct(lambda v: v @ matrix)
    x, info = conjugate_gradients(LinearSystem(product, rhs, tol=1e-10), method="own", shared=True)
    torch.testing.assert_close(x, exact(matrix, rhs), rtol=1e-8, atol=1e-8)
    assert info.method == "own"
    assert info.products == product.rows


# --- normal equations ---------------------------------------------------------------------------------------------


def test_normal_equations_give_the_pseudo_inverse_of_a_singular_operator():
    matrix, rhs = symmetric(torch.cat([SPECTRA["even"][:6], torch.zeros(4, dtype=torch.float64)])), random(3, 10)
    x, info = normal_cg(lambda v: v @ matrix, rhs, tol=1e-12)
    torch.testing.assert_close(x, rhs @ torch.linalg.pinv(matrix), rtol=1e-8, atol=1e-8)
    assert info.converged


@pytest.mark.parametrize("seed", range(10))
def test_normal_equations_stop_where_only_the_null_space_is_left(seed):
    rows = random(6, 10, seed=seed)
    matrix, rhs = rows.mT @ rows, random(3, 10, seed=seed + 100)
    with pytest.warns(ConvergenceWarning):  # rounding in the null space has curvature of either sign: no reason to fail
        x, _ = normal_cg(lambda v: v @ matrix, rhs, tol=0)
    inverse = torch.linalg.pinv(matrix, rtol=1e-10)
    torch.testing.assert_close(x @ matrix, rhs @ inverse @ matrix, rtol=1e-6, atol=1e-6)


def test_normal_equations_solve_indefinite_and_unsymmetric_systems():
    indefinite = symmetric(torch.tensor([-3.0, -1.0, 1.0, 2.0, 4.0], dtype=torch.float64))
    rhs = random(2, 5)
    x, _ = normal_cg(lambda v: v @ indefinite, rhs, tol=1e-12)
    torch.testing.assert_close(x, exact(indefinite, rhs), rtol=1e-8, atol=1e-8)
    matrix = random(5, 5, seed=3) + 3 * torch.eye(5, dtype=torch.float64)
    x, info = normal_cg(lambda v: v @ matrix.mT, rhs, transpose=lambda v: v @ matrix, tol=1e-12)
    torch.testing.assert_close(x, exact(matrix, rhs), rtol=1e-8, atol=1e-8)
    residual = (rhs - x @ matrix.mT) @ matrix
    torch.testing.assert_close(info.residual, residual.norm(dim=1) / (rhs @ matrix).norm(dim=1), rtol=1, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_normal_equations_count_both_products(transposed):
    operator = Counted(symmetric(SPECTRA["even"]))
    adjoint = Counted(operator.matrix) if transposed else operator
    _, info = normal_cg(operator, random(R, D), transpose=adjoint if transposed else None, max_rows=4)
    assert info.products == sum(operator.calls) + (sum(adjoint.calls) if transposed else 0)
    assert max(operator.calls) == 4


def test_normal_equations_warn_when_they_do_not_get_there():
    matrix = symmetric(SPECTRA["decaying"])
    with pytest.warns(ConvergenceWarning, match="normal_cg stopped after 2"):
        _, info = normal_cg(lambda v: v @ matrix, random(R, D), tol=1e-9, max_iterations=2)
    assert not info.converged


def test_damping_a_singular_system_errs_in_proportion_to_the_damping():
    spectrum = torch.cat([torch.linspace(0.5, 2, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    matrix, rhs = symmetric(spectrum), random(1, 10)
    target = rhs @ torch.linalg.pinv(matrix)
    errors = []
    for damping in (1e-2, 1e-4, 1e-6):
        x, _ = cg(lambda v, e=damping: v @ matrix + e * v, rhs, tol=1e-9)
        errors.append(torch.linalg.vector_norm((x - target) @ matrix).item())  # what leaves the range is dropped
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.1)


# --- dense --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("count", [1, 10, 40, 60])
def test_dual_and_primal_agree(count, damping):
    rows, rhs = random(count, D, seed=5), random(R, D)
    primal, _ = direct(rows.mT @ rows + damping * torch.eye(D, dtype=torch.float64), rhs)
    dual, info = direct_dual(rows, rhs, damping)
    assert torch.linalg.vector_norm(dual - primal) <= 1e-10 * torch.linalg.vector_norm(primal)
    assert info.converged
    torch.testing.assert_close(
        info.residual,
        relative_residual(rows.mT @ rows + damping * torch.eye(D, dtype=torch.float64), rhs, dual),
        rtol=1.0,
        atol=1e-10,
    )


def test_a_singular_matrix_is_refused():
    rows = random(3, D)
    with pytest.raises(LinAlgError, match=r"not positive definite.*add damping"):
        direct(rows.mT @ rows - 1e-9 * torch.eye(D, dtype=torch.float64), random(R, D))
    with pytest.raises(LinAlgError, match="not positive definite"):
        direct(torch.full((2, 2), math.nan), torch.ones(1, 2))


def test_a_matrix_too_close_to_singular_is_reported():
    matrix = symmetric(torch.logspace(0, -6.5, D, dtype=torch.float64)).float()
    with pytest.warns(ConvergenceWarning, match="direct stopped"):
        _, info = direct(matrix, random(R, D).float(), tol=1e-7)
    assert not info.converged


def test_dense_solvers_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"matrix must be \(40, 40\)"):
        direct(torch.eye(3), random(R, D))
    with pytest.raises(ValueError, match=r"rows must be \(M, 40\)"):
        direct_dual(torch.eye(3), random(R, D), 1.0)
    with pytest.raises(ValueError, match="damping must be positive"):
        direct_dual(random(3, D), random(R, D), 0.0)
