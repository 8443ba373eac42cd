"""Structured preconditioners against dense matrices, autograd and the optima that theory knows; all in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_ext.functional import (
    KroneckerStep,
    MetaStep,
    PreconditionerGradients,
    ProximalObjective,
    apply_preconditioner,
    kronecker_meta_step,
    multiplicative_meta_step,
    preconditioner_gradients,
    rotate_gradient,
    softmax_kl,
    squared_error,
)

OUT, IN = 3, 4
# Which factors a structure has: (A, B, S) as (matrix, vector, none) and (scalar, full).
STRUCTURES = {
    "kron": ("matrix", "matrix", "scalar"),
    "ekfac": ("matrix", "matrix", "full"),
    "diag": (None, None, "full"),
    "kron, wide input": ("vector", "matrix", "scalar"),
    "kron, wide output": ("matrix", "vector", "scalar"),
    "kron, both wide": ("vector", "vector", "scalar"),
    "ekfac, wide input": (None, "matrix", "full"),
    "ekfac, wide output": ("matrix", None, "full"),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def factors(structure, out=OUT, inputs=IN, spread=0.3):
    """Random factors near the identity, neither symmetric nor orthogonal."""

    def factor(kind, width):
        if kind is None:
            return None
        return (
            torch.eye(width) + spread * torch.randn(width, width)
            if kind == "matrix"
            else 1 + spread * torch.rand(width)
        )

    a, b, s = STRUCTURES[structure]
    S = torch.tensor(0.7) if s == "scalar" else 1 + spread * torch.randn(out, inputs)
    return factor(a, inputs), factor(b, out), S


def as_matrix(factor, width):
    return torch.eye(width) if factor is None else factor if factor.ndim == 2 else torch.diag(factor)


def dense(A, B, S, out=OUT, inputs=IN):
    """P for gradients whose columns are stacked."""
    both = torch.kron(as_matrix(A, inputs), as_matrix(B, out))
    return both @ torch.diag(S.expand(out, inputs).T.reshape(-1) ** 2) @ both.T


def vec(matrix):
    return matrix.T.reshape(-1)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_applying_is_multiplying_with_the_dense_matrix(structure):
    A, B, S = factors(structure)
    G = torch.randn(OUT, IN)
    torch.testing.assert_close(vec(apply_preconditioner(G, A, B, S)), dense(A, B, S) @ vec(G), rtol=1e-13, atol=1e-13)
    rotated = rotate_gradient(G, A, B)
    torch.testing.assert_close(vec(rotated), torch.kron(as_matrix(A, IN), as_matrix(B, OUT)).T @ vec(G))
    assert apply_preconditioner(G, A, B, S, rotated=rotated).equal(apply_preconditioner(G, A, B, S))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_preconditioner_is_symmetric_and_never_points_uphill(structure):
    A, B, S = factors(structure, spread=2.0)
    columns = [vec(apply_preconditioner(e.reshape(IN, OUT).T, A, B, S)) for e in torch.eye(OUT * IN)]
    P = torch.stack(columns, 1)
    torch.testing.assert_close(P, P.T, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(P).min() > -1e-12 * P.norm()
    for _ in range(20):
        G = torch.randn(OUT, IN)
        assert (G * apply_preconditioner(G, A, B, S)).sum() >= 0


def test_a_diagonal_takes_tensors_of_any_shape():
    G, S = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert apply_preconditioner(G, None, None, S).equal(G * S.square())


def quadratic_objective(g, X, theta):
    """Loss with gradient g and no curvature; outputs linear in the parameters."""
    return ProximalObjective(lambda: (g * theta).sum(), lambda: X @ theta.reshape(-1), squared_error)


@pytest.mark.parametrize(("lam_f", "lam_w"), [(1.0, 0.1), (0.7, 0.3), (0.0, 20.0)])
def test_theorem_1_the_dense_optimum(lam_f, lam_w):
    m = 5
    X, gs = torch.randn(9, m), torch.randn(7, m)
    # ProximalObjective means over the batch of outputs, here 9 scalars treated as a batch of 9
    G = X.T @ X / 9
    optimum = torch.linalg.inv(lam_f * G + lam_w * torch.eye(m))

    def value_and_gradient(P):
        A = torch.linalg.cholesky(P)
        total, slope = 0.0, torch.zeros(m, m)
        for g in gs:
            theta = torch.zeros(1, m, requires_grad=True)
            objective = quadratic_objective(g, X, theta)
            objective.anchor()
            step = -apply_preconditioner(g[None], A, None, torch.tensor(1.0))
            with torch.no_grad():
                theta += step
            found = objective.gradient([theta], [step], lam_f=lam_f, lam_w=lam_w)
            total += found.value.item() / len(gs)
            slope += preconditioner_gradients(g[None], found.gradient[0], A, None, torch.tensor(1.0)).A / len(gs)
        return total, slope

    value, slope = value_and_gradient(optimum)
    second_moment = gs.T @ gs / len(gs)
    assert value == pytest.approx(-0.5 * torch.trace(optimum @ second_moment).item(), rel=1e-12)
    assert slope.abs().max() < 1e-12
    for other in (1.1 * optimum, optimum + 0.05 * torch.diag(torch.rand(m)) * optimum.diagonal().mean()):
        worse, slope = value_and_gradient(other)
        assert worse > value
        assert slope.abs().max() > 1e-4


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_kfac_is_recovered(structure):
    """With a squared error and one linear layer, P learns the inverse second moment of the inputs, and nothing else."""
    width, steps = 4, 6000  # square, so that factors in the wrong order would fit
    L = torch.randn(width, width)
    Exx = L @ L.T / 4 + 0.1 * torch.eye(width)
    A, B = torch.eye(width, requires_grad=True), torch.eye(width, requires_grad=True)
    S = torch.tensor(1.0) if structure == "kron" else torch.ones(width, width)
    meta = torch.optim.Adam([A, B, S.requires_grad_()], lr=0.01)
    for step in range(steps):
        meta.param_groups[0]["lr"] = 0.01 if step < steps / 2 else 0.001
        G = torch.randn(width, width)
        with torch.no_grad():
            # Q = <G, D> + 1/2 E |D x|^2 for the step D
            V = G - apply_preconditioner(G, A, B, S) @ Exx
            A.grad, B.grad, S.grad = preconditioner_gradients(G, V, A, B, S)
        meta.step()
    optimum = torch.kron(torch.linalg.inv(Exx).contiguous(), torch.eye(width))
    P = dense(A.detach(), B.detach(), S.detach(), width, width)
    assert (P - optimum).norm() / optimum.norm() < 1e-12


def test_multiplicative_steps_recover_kfac_too():
    width = 4
    Exx = torch.diag(torch.tensor([10.0, 1.0, 0.1, 0.01]))
    A, B, S, norms = torch.eye(width), torch.eye(width), torch.tensor(1.0), torch.zeros(3)
    for step in range(1500):
        G = torch.randn(width, width)
        V = G - apply_preconditioner(G, A, B, S) @ Exx
        M, N = rotate_gradient(G, A, B), rotate_gradient(V, A, B)
        A, B, S, norms = multiplicative_meta_step(M, N, A, B, S, norms, 0.1 * 0.995**step)
    optimum = torch.kron(torch.linalg.inv(Exx).contiguous(), torch.eye(width))
    assert (dense(A, B, S, width, width) - optimum).norm() / optimum.norm() < 1e-3


def network(kind):
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(7, 5), torch.randn(6, 5)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return conv, torch.randn(7, 2, 4, 4), torch.randn(6, 2, 4, 4)


def matrix(weight, bias):
    return torch.cat([weight.reshape(len(weight), -1), bias[:, None]], 1)


def largest_error(net, x, x_prev, structure, lam_f=0.5, lam_w=0.2):
    """Distance between the closed forms and autograd through the whole look-ahead."""
    target = torch.randint(0, 3, (7,))
    names = [name for name, _ in net.named_parameters()]
    theta = dict(net.named_parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), target), list(theta.values()))
    layers = [tuple(names[i : i + 2]) for i in range(0, len(names), 2)]
    by_name = dict(zip(names, grads, strict=True))
    blocks = []
    for weight, bias in layers:
        G = matrix(by_name[weight], by_name[bias])
        blocks.append(
            (weight, bias, G, [f if f is None else f.requires_grad_() for f in factors(structure, *G.shape, 0.1)])
        )

    moved = dict(theta)
    for weight, bias, G, (A, B, S) in blocks:
        step = apply_preconditioner(G, A, B, S)
        moved[weight] = theta[weight].detach() - step[:, :-1].reshape(theta[weight].shape)
        moved[bias] = theta[bias].detach() - step[:, -1]
    old = net(x_prev).detach()
    q = nn.functional.cross_entropy(functional_call(net, moved, (x,)), target)
    q = q + lam_f * softmax_kl(functional_call(net, moved, (x_prev,)), old)
    q = q + lam_w / 2 * sum((moved[name] - theta[name].detach()).square().sum() for name in names)
    leaves = [f for *_, fs in blocks for f in fs if f is not None]
    expected = torch.autograd.grad(q, leaves)

    objective = ProximalObjective(lambda: nn.functional.cross_entropy(net(x), target), lambda: net(x_prev), softmax_kl)
    objective.anchor()
    displacement = [(moved[name] - theta[name]).detach() for name in names]
    with torch.no_grad():
        torch._foreach_add_(list(theta.values()), displacement)
    V = dict(
        zip(
            names,
            objective.gradient(list(theta.values()), displacement, lam_f=lam_f, lam_w=lam_w).gradient,
            strict=True,
        )
    )
    found = []
    with torch.no_grad():
        for weight, bias, G, (A, B, S) in blocks:
            slopes = preconditioner_gradients(G, matrix(V[weight], V[bias]), A, B, S)
            assert isinstance(slopes, PreconditionerGradients)
            found += [slope for slope in slopes if slope is not None]
    assert min(slope.abs().max() for slope in expected) > 1e-4
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_meta_gradients_are_those_of_autograd(structure, kind):
    assert largest_error(*network(kind), structure) < 1e-14


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_multiplicative_step_is_the_normalised_gradient_step(structure):
    A, B, S = factors(structure)
    G, V = torch.randn(OUT, IN), torch.randn(OUT, IN)
    M, N = rotate_gradient(G, A, B), rotate_gradient(V, A, B)
    beta = 0.1
    slopes = preconditioner_gradients(G, V, A, B, S)
    step = multiplicative_meta_step(M, N, A, B, S, torch.zeros(3), beta)
    assert isinstance(step, MetaStep)
    for factor, slope, new in zip((A, B), slopes[:2], step[:2], strict=True):
        if factor is None:
            assert new is None
        elif factor.ndim == 2:
            Z = factor.T @ slope
            Z = (Z + Z.T) / 2
            torch.testing.assert_close(new, factor - beta * factor @ Z / Z.norm())
        else:
            z = factor * slope
            torch.testing.assert_close(new, factor - beta * factor * z / z.norm())
    z = S * slopes.S
    exponent = -beta * z.sum().sign() - (beta * z / z.abs().max() if S.ndim else 0)
    torch.testing.assert_close(step.S, S * exponent.exp())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_multiplicative_step_does_not_know_the_units_of_loss_and_gradient(structure):
    A, B, S = factors(structure)
    M, N = torch.randn(OUT, IN), torch.randn(OUT, IN)
    one = multiplicative_meta_step(M, N, A, B, S, torch.zeros(3), 0.1)
    other = multiplicative_meta_step(1e-5 * M, 1e3 * N, A, B, S, torch.zeros(3), 0.1)
    told = multiplicative_meta_step(M, N, A, B, S, torch.zeros(3), 0.1, magnitude=1e-2)
    for a, b in zip(one[:3], other[:3], strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-12)
    torch.testing.assert_close(other.norms, 1e-2 * one.norms)
    torch.testing.assert_close(told.norms, other.norms)
    torch.testing.assert_close(told.S, one.S)


def test_norms_are_decaying_maxima():
    A, B, S = factors("ekfac")
    M, N = torch.randn(OUT, IN), torch.randn(OUT, IN)
    fresh = multiplicative_meta_step(M, N, A, B, S, torch.zeros(3), 0.1)
    large = multiplicative_meta_step(M, N, A, B, S, 100 * fresh.norms, 0.1, decay=0.5)
    torch.testing.assert_close(large.norms, 50 * fresh.norms)
    torch.testing.assert_close(large.A - A, (fresh.A - A) / 50)
    torch.testing.assert_close(large.B - B, (fresh.B - B) / 50)
    small = multiplicative_meta_step(M, N, A, B, S, 0.01 * fresh.norms, 0.1)
    torch.testing.assert_close(small.norms, fresh.norms)


def test_factors_stay_invertible_at_any_rate_below_one():
    A, B, S = torch.eye(IN), torch.eye(OUT), torch.tensor(1.0)
    norms = torch.zeros(3)
    for _ in range(50):
        G = torch.randn(OUT, IN)
        A, B, S, norms = multiplicative_meta_step(
            rotate_gradient(G, A, B), -rotate_gradient(G, A, B), A, B, S, norms, 0.9
        )
    assert all(torch.linalg.svdvals(factor).min() > 0 for factor in (A, B))
    assert S > 0


def test_nothing_to_learn_changes_nothing():
    A, B, S = factors("ekfac")
    zero = torch.zeros(OUT, IN)
    step = multiplicative_meta_step(zero, zero, A, B, S, torch.zeros(3), 0.1)
    assert step.A.equal(A)
    assert step.B.equal(B)
    assert step.S.equal(S)
    assert step.norms.equal(torch.zeros(3))


KRONECKER = [name for name in STRUCTURES if name.startswith("kron")]


def squared(factor):
    return factor @ factor.T if factor.ndim == 2 else factor.square()


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_kronecker_step_is_the_multiplicative_one_to_first_order(structure):
    A, B, S = factors(structure, 5, 6)
    AA, BB, G, V = squared(A), squared(B), torch.randn(5, 6), torch.randn(5, 6)
    M, N = rotate_gradient(G, A, B), rotate_gradient(V, A, B)
    errors = []
    for beta in (1e-2, 1e-3):
        one = multiplicative_meta_step(M, N, A, B, S, torch.zeros(3), beta)
        other = kronecker_meta_step(G, V, AA, BB, S, torch.zeros(3), beta)
        assert isinstance(other, KroneckerStep)
        torch.testing.assert_close(other.S, one.S)
        moves = [(squared(one.A) - AA, other.AA - AA), (squared(one.B) - BB, other.BB - BB)]
        errors.append(max(float((x - y).norm() / y.norm()) for x, y in moves))
        for side, norm, twin, factor in zip((AA, BB), other.norms, one.norms, (A, B), strict=False):
            # multiplicative_meta_step leaves out the factor 2 on both sides of a diagonal's ratio
            torch.testing.assert_close(norm, twin if factor.ndim == 2 else 2 * twin)
            assert side.ndim == factor.ndim
    assert errors[0] < 2e-2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05), "the difference is of second order"


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_kronecker_step_follows_the_slope_of_the_objective(structure):
    """In the metric of the preconditioner itself: the direction is - C (dQ/dC) C."""
    A, B, S = factors(structure)
    sides = [squared(A).requires_grad_(), squared(B).requires_grad_()]
    G, V = torch.randn(OUT, IN), torch.randn(OUT, IN)
    AA, BB = (as_matrix(side, width) for side, width in zip(sides, (IN, OUT), strict=True))
    (V * -(S.square() * BB @ G @ AA)).sum().backward()
    with torch.no_grad():
        step = kronecker_meta_step(G, V, *sides, S, torch.zeros(3), 0.1)
        for side, new in zip(sides, step[:2], strict=True):
            slope = side.grad + side.grad.mT if side.ndim == 2 else side.grad
            expected = -side @ slope @ side if side.ndim == 2 else -side.square() * slope
            found = new - side
            torch.testing.assert_close(found / found.norm(), expected / expected.norm())


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_kronecker_step_does_not_know_units_and_takes_products_that_are_known(structure):
    A, B, S = factors(structure)
    AA, BB, G, V = squared(A), squared(B), torch.randn(OUT, IN), torch.randn(OUT, IN)
    one = kronecker_meta_step(G, V, AA, BB, S, torch.zeros(3), 0.1)
    left = as_matrix(BB, OUT) @ G
    told = kronecker_meta_step(
        G, V, AA, BB, S, torch.zeros(3), 0.1, products=(left, left @ as_matrix(AA, IN)), magnitude=1e-2
    )
    other = kronecker_meta_step(1e-5 * G, 1e3 * V, AA, BB, S, torch.zeros(3), 0.1)
    coordinates = kronecker_meta_step(G, V, 100 * AA, BB / 7, S, torch.zeros(3), 0.1)
    for a, b, c, d in zip(one[:2], told[:2], other[:2], coordinates[:2], strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(a / a.norm(), d / d.norm())
    torch.testing.assert_close(told.norms, 1e-2 * one.norms)
    torch.testing.assert_close(other.norms, 1e-2 * one.norms)
    later = kronecker_meta_step(G, V, AA, BB, S, 100 * one.norms, 0.1, decay=0.5)
    torch.testing.assert_close(later.AA - AA, (one.AA - AA) / 50)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_kronecker_preconditioner_stays_symmetric_and_positive_at_any_rate_below_a_half(sign):
    AA, BB, S, norms = torch.eye(IN), torch.eye(OUT), torch.tensor(1.0), torch.zeros(3)
    for _ in range(50):
        G = torch.randn(OUT, IN)
        AA, BB, S, norms = kronecker_meta_step(G, sign * G, AA, BB, S, norms, 0.49)
        for side in (AA, BB):
            assert side.equal(side.T)
            assert torch.linalg.eigvalsh(side).min() > 0
    assert S > 0
    zero = torch.zeros(OUT, IN)
    still = kronecker_meta_step(zero, zero, AA, BB, S, torch.zeros(3), 0.3)
    assert still.AA.equal(AA)
    assert still.BB.equal(BB)
    assert still.S.equal(S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kronecker_step_of_nothing_but_rounding_moves_no_further_than_any_other(dtype):
    """V is such that the slope of the input side is zero: what its norm is made of cancels."""
    for seed in range(20):
        torch.manual_seed(seed)
        A, B, G, K = (torch.randn(4, 4) for _ in range(4))
        AA, BB = squared(A), squared(B)
        V = torch.linalg.solve(BB, torch.linalg.solve(G.T, K - K.T))
        args = [x.to(dtype) for x in (G, V, AA, BB, torch.tensor(1.0), torch.zeros(3))]
        step = kronecker_meta_step(*args, 0.3)
        for new, old in zip(step[:2], (AA, BB), strict=True):
            assert (new - old).norm() <= 0.6001 * old.norm()


def test_a_kronecker_preconditioner_in_single_precision_stays_positive_but_for_rounding():
    """A thousand steps along noise, the condition number far beyond what single precision resolves."""
    torch.manual_seed(0)
    AA, BB, S, norms = torch.eye(24).float(), torch.eye(16).float(), torch.tensor(1.0).float(), torch.zeros(3).float()
    scale = torch.logspace(0, -6, 24).float()
    for _ in range(1000):
        G = torch.randn(16, 24).float() * scale
        V = G - 3 * (BB @ G @ AA) * scale.square() + 0.3 * torch.randn(16, 24).float() * scale
        AA, BB, S, norms = kronecker_meta_step(G, V, AA, BB, S, norms, 0.3)
        assert AA.isfinite().all()
        for side in (AA, BB):
            eigenvalues = torch.linalg.eigvalsh(side.double())
            assert eigenvalues[0] > -1e-5 * eigenvalues[-1]
