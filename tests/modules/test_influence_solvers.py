"""Every solver of InfluenceModule against the dense reference, or against what it says it computes."""

import pytest
import torch
from torch import nn

from lightning_ext.functional import ConvergenceWarning, InfluenceObjective, LayerGradients, Projection
from lightning_ext.modules import InfluenceModule, _influence_inverse
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import Dense, N, classes, close, loader, network, numbers

SIZES = (4, 5, 3)
EXACT = ["direct", "dual", "block_cg", "nystrom_cg", "cg", "normal_cg"]


def influence(**kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, "tol": 1e-11, **kwargs}
    return InfluenceModule(network(*SIZES), **options)


@pytest.fixture(scope="module")
def dense():
    return Dense(network(*SIZES), classes()[:])


@pytest.fixture(scope="module")
def exact(dense):
    return dense.scores(ref.queries(), 0.1)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_exact_solvers(dense, solver, damping):
    module = influence(solver=solver, damping=damping, rank=10, max_iterations=1000)
    close(module.scores(loader(classes())), dense.scores(ref.queries(), damping), rtol=1e-7)
    assert module.report["solver"] == solver
    assert module.report["converged"]
    assert 0 <= module.report["residual"] <= 1e-8
    assert module.report["samples"] == N


@pytest.mark.parametrize("solver", EXACT)
def test_exact_solvers_of_an_empirical_fisher_matrix(dense, solver):
    module = influence(solver=solver, curvature="empirical_fisher", rank=10, max_iterations=1000)
    close(module.scores(loader(classes())), dense.scores(ref.queries(), 0.1, dense.fisher()), rtol=1e-7)


@pytest.mark.parametrize("solver", ["auto", "direct", "cg", "normal_cg"])
def test_solvers_of_a_hessian_that_damping_makes_positive(dense, solver):
    module = influence(solver=solver, curvature="hessian", damping=1.0)
    close(module.scores(loader(classes())), dense.scores(ref.queries(), 1.0, dense.hessian()), rtol=1e-7)


@pytest.mark.parametrize("solver", ["auto", "normal_cg"])
def test_an_indefinite_hessian(dense, solver):
    damping = 0.01
    assert torch.linalg.eigvalsh(dense.hessian())[0] < -2 * damping
    module = influence(solver=solver, curvature="hessian", damping=damping, tol=1e-10, max_iterations=2000)
    close(module.scores(loader(classes())), dense.scores(ref.queries(), damping, dense.hessian()), rtol=1e-4)


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_solvers_for_positive_matrices_refuse_an_indefinite_one(solver):
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match="not positive definite"):
        influence(solver=solver, curvature="hessian", damping=1e-3).scores(loader(classes()))


@pytest.mark.parametrize(
    "solver", ["dual", "block_cg", "nystrom_cg", "nystrom", "lanczos", "neumann", "lissa", "ekfac", "trak"]
)
def test_solvers_that_a_hessian_does_not_suit(solver):
    with pytest.raises(ValueError, match=f"solver='{solver}'"):
        influence(solver=solver, curvature="hessian").scores(loader(classes()))


@pytest.mark.parametrize("solver", ["ekfac", "kfac", "trak"])
def test_factors_of_an_empirical_fisher_matrix_are_refused(solver):
    with pytest.raises(ValueError, match="empirical_fisher"):
        influence(solver=solver, curvature="empirical_fisher").scores(loader(classes()))


def test_identity_is_the_inner_product_of_gradients(dense):
    wanted = dense.gradients(*ref.queries()[0]) @ dense.gradients().mT / N
    close(influence(solver="identity").scores(loader(classes())), wanted)


def test_inner_products_of_gradients_write_no_gradient_out(dense, monkeypatch):
    module = influence(solver="identity")
    with monkeypatch.context() as patched:
        patched.setattr(LayerGradients, "explicit", lambda self: pytest.fail("written out"))
        found = module.scores(loader(classes()))
    close(module.solved, dense.gradients(*ref.queries()[0]))  # on request
    close(module.solved @ dense.gradients().mT / N, found)
    assert module.report["solver"] == "identity"


@pytest.mark.parametrize("normalize", ["parameter", "loss"])
def test_relative_inner_products_of_gradients(dense, normalize):
    gradients = dense.gradients()
    wanted = dense.gradients(*ref.queries()[0]) @ gradients.mT / N / gradients.norm(dim=1)
    close(influence(solver="identity", normalize=normalize).scores(loader(classes())), wanted, rtol=1e-6)


def test_a_sketch_of_full_rank_is_exact(exact):
    close(influence(solver="nystrom", rank=43).scores(loader(classes())), exact, rtol=1e-6)


def test_a_sketch_gets_better_with_its_rank(exact):
    def error(rank):
        return (influence(solver="nystrom", rank=rank).scores(loader(classes())) - exact).norm().item()

    assert error(20) < 0.5 * error(8) < 0.5 * error(2)


def spread():
    """Fewer parameters than samples: a curvature of full rank."""
    return network(4, 2, 1), numbers(), ref.queries(k=1), InfluenceObjective("half_squared_error")


def test_leading_eigenvectors():
    """All of them are exact; of fewer, what lies outside counts as nothing."""
    base, data, asked, objective = spread()
    reference = Dense(base, data[:], ref.half_squared_error)
    values, vectors = torch.linalg.eigh(reference.ggn())
    g, m = reference.gradients(), reference.gradients(*asked[0])
    for rank in (13, 3):
        module = InfluenceModule(base, objective, asked, solver="lanczos", rank=rank, damping=0.1, double=True)
        kept = vectors[:, -rank:]
        wanted = m @ kept / (values[-rank:] + 0.1) @ kept.mT @ g.mT / N
        close(module.scores(loader(data)), wanted, rtol=1e-6 if rank == 13 else 0.05)


def test_a_neumann_series_in_closed_form(dense):
    """K^-1 [I - (I - K / s)^(T + 1)] v, for one scale s of those that converge."""
    terms = 25
    with pytest.warns(ConvergenceWarning, match="neumann"):
        found = influence(solver="neumann", max_iterations=terms).scores(loader(classes()))
    K = dense.ggn() + 0.1 * torch.eye(43, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(K)
    m, g = dense.gradients(*ref.queries()[0]) @ vectors, dense.gradients() @ vectors

    def series(scale):
        return m * ((1 - (1 - values / scale) ** (terms + 1)) / values) @ g.mT / N

    scales = torch.linspace(float(values[-1]) * 0.5, float(values[-1]) * 2, 3001, dtype=torch.float64)
    errors = torch.stack([(series(scale) - found).norm() for scale in scales]) / found.norm()
    assert errors.min() < 1e-3
    assert errors[0] > 0.05, "any scale explains the answer, so nothing was shown"


def test_a_long_neumann_series_is_exact(exact):
    close(influence(solver="neumann", max_iterations=3000, tol=1e-9).scores(loader(classes())), exact, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:lissa stopped")
def test_drawn_batches_lead_to_the_answer_and_are_repeatable(exact):
    def found(seed):
        module = influence(solver="lissa", max_iterations=200, seed=seed)
        return module.scores(loader(classes(), 8))

    first = found(0)
    error = (first - exact).norm() / exact.norm()
    assert error < 0.3
    assert torch.equal(found(0), first)
    other = found(1)
    assert not torch.equal(other, first)
    assert ((first + other) / 2 - exact).norm() < 1.01 * max((first - exact).norm(), (other - exact).norm())


@pytest.mark.parametrize(("solver", "damping"), [("ekfac", 0.1), ("kfac", 1e-9)])
def test_kronecker_factors_of_one_layer_with_squared_error_are_exact(solver, damping):
    """G = A x I; with factored damping in the limit of none."""
    base, data, asked = nn.Linear(4, 2), numbers(40, k=2), [numbers(3, k=2, seed=9)[:]]
    reference = Dense(base, data[:], ref.half_squared_error)
    objective = InfluenceObjective("half_squared_error")
    module = InfluenceModule(base, objective, asked, solver=solver, damping=damping, double=True)
    close(module.scores(loader(data)), reference.scores(asked, damping), rtol=1e-8 if solver == "ekfac" else 1e-3)


def test_corrected_factors_rank_better_than_factors(exact):
    def agreement(solver):
        found = influence(solver=solver).scores(loader(classes()))
        return torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]

    assert agreement("ekfac") > 0.8
    assert agreement("kfac") > 0.8
    assert agreement("ekfac") > agreement("identity")


def test_random_projection_of_margins(dense):
    """TRAK's kernel, with Phi the projected gradients of the margins."""
    found = influence(solver="trak", rank=8, seed=3).scores(loader(classes()))
    project = Projection(43, 8, seed=3)

    def margin(y, t):
        others = torch.where(torch.arange(len(y)) == t, -torch.inf, y)
        return (y * nn.functional.one_hot(t, len(y))).sum() - others.logsumexp(0)

    phi = project(dense.gradients(measure=margin))
    kernel = phi.mT @ phi / N + 0.1 * torch.eye(8, dtype=torch.float64)
    asked = project(dense.gradients(*ref.queries()[0]))
    close(found, asked @ torch.linalg.inv(kernel) @ project(dense.gradients()).mT / N)


@pytest.mark.parametrize("solver", ["direct", "dual", "nystrom_cg", "ekfac"])
def test_many_right_hand_sides_go_in_parts(solver, monkeypatch):
    asked = [classes(8, seed=9)[:]]
    wanted = influence(solver=solver, queries=asked).scores(loader(classes()))
    from lightning_ext.modules import _influence_engine

    sizes = []
    kind = _influence_inverse.INVERSES[solver]
    plain = kind.solve
    monkeypatch.setattr(kind, "solve", lambda self, rows: (sizes.append(len(rows)), plain(self, rows))[1])
    monkeypatch.setattr(_influence_engine, "BLOCK_BYTES", 3 * 7 * 43 * 8)
    close(influence(solver=solver, queries=asked).scores(loader(classes())), wanted, rtol=1e-8)
    assert sizes == [3, 3, 2]


CG_BYTES, DUAL_BYTES = 4 * 100 * 43 * 8, 2 * 69 * 43 * 8
CHOICES = {  # limits of parameters, of samples times outputs, of multiplications, of bytes
    "direct": ("direct", (43, 0, 0, 0)),
    "dual": ("dual", (42, 69, 69**2 * 43, DUAL_BYTES)),
    "rows that do not fit": ("ekfac", (42, 69, 69**2 * 43, DUAL_BYTES - 1)),
    "too many samples": ("block_cg", (42, 68, 69**2 * 43, CG_BYTES)),
    "too much work": ("block_cg", (42, 69, 69**2 * 43 - 1, CG_BYTES)),
    "nothing fits": ("ekfac", (42, 68, 69**2 * 43, CG_BYTES - 1)),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_auto_chooses(case, monkeypatch):
    wanted, limits = CHOICES[case]
    for name, value in zip(("DENSE_LIMIT", "DUAL_LIMIT", "DUAL_WORK", "BLOCK_BYTES"), limits, strict=True):
        monkeypatch.setattr(_influence_inverse, name, value)
    module = influence()
    module.scores(loader(classes()))
    assert module.report["solver"] == wanted


def test_auto_never_divides_by_a_damping_of_zero(monkeypatch):
    base, data, asked, objective = spread()
    for name, value in (("DENSE_LIMIT", 0), ("BLOCK_BYTES", 0)):
        monkeypatch.setattr(_influence_inverse, name, value)
    module = InfluenceModule(base, objective, asked, damping=0.0, double=True)
    module.scores(loader(data))
    assert module.report["solver"] == "ekfac"


@pytest.mark.parametrize("solver", ["nystrom", "nystrom_cg", "lanczos", "ekfac", "kfac"])
def test_the_report_says_how_the_curvature_lies(solver, dense):
    module = influence(solver=solver, rank=43)
    module.scores(loader(classes()))
    values = torch.linalg.eigvalsh(dense.ggn())
    if solver in ("nystrom", "nystrom_cg", "lanczos"):
        assert module.report["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-6)
    else:
        assert 0 < module.report["lambda_max"] < 3 * float(values[-1])
    if solver != "lanczos":
        wanted = float((values / (values + 0.1)).sum())
        assert module.report["effective_dimension"] == pytest.approx(wanted, rel=1e-6 if "nystrom" in solver else 0.5)


@pytest.mark.parametrize("solver", ["direct", "dual"])
def test_exact_solvers_say_when_they_miss_the_tolerance(solver):
    options = {"queries": ref.queries(), "damping": 1e-4, "solver": solver, "tol": 1e-9}
    with pytest.warns(ConvergenceWarning):
        InfluenceModule(network(4, 5, 3).float(), **options).scores(loader(classes()))
    module = InfluenceModule(network(4, 5, 3), **options, double=True)
    module.scores(loader(classes()))
    assert module.report["converged"]
    assert module.report["residual"] <= 1e-9
