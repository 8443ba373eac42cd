"""InfluenceModule against closed forms: dense matrices by torch.func, ridge regression, limits and symmetries."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_ext.functional import InfluenceObjective, OutputLoss
from lightning_ext.modules import InfluenceModule
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import Dense, N, classes, close, loader, network, numbers

SIZES = (4, 5, 3)


def influence(base=None, *args, **kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, **kwargs}
    return InfluenceModule(network(*SIZES) if base is None else base, *args, **options)


@pytest.fixture(scope="module")
def dense():
    return Dense(network(*SIZES), classes()[:])


# -- what is computed ---------------------------------------------------------------------------------------------


def test_scores_are_one_nth_of_gradients_around_the_inverse(dense):
    close(influence().scores(loader(classes())), dense.scores(ref.queries(), 0.1))


@pytest.mark.parametrize(("damping", "weight_decay"), [(0.1, 0.02), (0.0, 0.12), (1e-3, 0.0)])
def test_weight_decay_adds_to_the_damping(dense, damping, weight_decay):
    module = influence(damping=damping, weight_decay=weight_decay)
    close(module.scores(loader(classes())), dense.scores(ref.queries(), damping + weight_decay))
    assert module.report["damping"] == pytest.approx(damping + weight_decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_automatic_damping_is_a_tenth_of_the_mean_eigenvalue(dense, weight_decay):
    g = dense.ggn()
    damping = 0.1 * float(g.trace()) / len(g) + weight_decay
    module = influence(damping="auto", weight_decay=weight_decay)
    close(module.scores(loader(classes())), dense.scores(ref.queries(), damping))
    assert module.report["damping"] == pytest.approx(damping, rel=1e-9)


@pytest.mark.parametrize("curvature", ["hessian", "empirical_fisher"])
def test_other_curvatures(dense, curvature):
    matrix = dense.hessian() if curvature == "hessian" else dense.fisher()
    lowest = torch.linalg.eigvalsh(matrix)[0]
    assert curvature != "hessian" or lowest < -1e-3, "the Hessian says nothing that the Gauss-Newton matrix does not"
    damping = 0.5
    module = influence(curvature=curvature, damping=damping, solver="direct")
    close(module.scores(loader(classes())), dense.scores(ref.queries(), damping, matrix))


def test_automatic_damping_of_an_empirical_fisher_matrix(dense):
    f = dense.fisher()
    found = influence(curvature="empirical_fisher", damping="auto").scores(loader(classes()))
    close(found, dense.scores(ref.queries(), 0.1 * float(f.trace()) / len(f), f))


@pytest.mark.parametrize("include", [r"^2\.", "bias", r"0\.weight"])
def test_chosen_parameters(include):
    import re

    some = Dense(network(*SIZES), classes()[:], keep=lambda name: re.search(include, name))
    module = influence(include=include)
    close(module.scores(loader(classes())), some.scores(ref.queries(), 0.1))
    assert module.report["parameters"] == len(some.flat(some.params))


def margin(y, t):
    others = torch.where(torch.arange(len(y)) == t, -torch.inf, y)
    return (y * F.one_hot(t, len(y))).sum() - others.logsumexp(0)


MEASUREMENTS = {
    "loss": ("loss", ref.cross_entropy),
    "margin": ("margin", margin),
    "logit": ("logit", lambda y, t: (y * F.one_hot(t, len(y))).sum()),
    "function": (lambda y, t: y.square().sum(1) + t, lambda y, t: y.square().sum() + t),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements(dense, name):
    ours, measure = MEASUREMENTS[name]
    module = influence(None, InfluenceObjective(measurement=ours))
    close(module.scores(loader(classes())), dense.scores(ref.queries(), 0.1, measure=measure))


LOSSES = {
    "mse": ("mse", lambda y, t: (y - t).square().mean()),
    "half_squared_error": ("half_squared_error", ref.half_squared_error),
    "bce": ("bce", lambda y, t: F.binary_cross_entropy_with_logits(y, t.sigmoid(), reduction="sum")),
    "poisson": ("poisson_nll", lambda y, t: (y.exp() - t.exp() * y).sum()),
    "nn.MSELoss": (nn.MSELoss(), lambda y, t: (y - t).square().mean()),
}
TARGETS = {"bce": lambda batch: batch[1].sigmoid(), "poisson": lambda batch: batch[1].exp()}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    """Several outputs, so that a mean in the place of a sum shows."""
    ours, loss = LOSSES[name]
    base, data, asked = network(4, 3, 2), numbers(k=2), [numbers(3, k=2, seed=9)[:]]
    wanted = Dense(base, data[:], loss).scores(asked, 0.1)
    objective = InfluenceObjective(ours, target=TARGETS.get(name))
    close(influence(base, objective, queries=asked).scores(loader(data)), wanted)


def test_self_influence_has_no_factor_one_nth(dense):
    g = dense.gradients()
    wanted = (g @ dense.inverse(0.1) * g).sum(1)
    close(influence(queries=None).self_influence(loader(classes())), wanted)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", [None, "parameter", "loss"])
def test_relative_and_rescaled_scores(dense, normalize, rescale):
    """The sample's own curvature taken out of G, one by one."""
    g, asked, whole = dense.gradients(), dense.gradients(*ref.queries()[0]), dense.ggn()
    columns = []
    for i in range(N):
        matrix = whole - (dense.ggn([i]) if rescale else 0)
        step = dense.inverse(0.1, matrix) @ g[i]
        norm = {None: 1.0, "parameter": step.norm(), "loss": (g[i] @ step).sqrt()}[normalize]
        columns.append(asked @ step / N / norm)
    module = influence(normalize=normalize, rescale=rescale)
    close(module.scores(loader(classes())), torch.stack(columns, dim=1))


# -- sign and scale -----------------------------------------------------------------------------------------------


def ridge(n=50, d=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)[:d] + torch.randn(
        n, generator=generator, dtype=torch.float64
    )
    return x, y[:, None]


def solved(x, y, weight_decay, n):
    """The minimiser of (1/n) sum of half squares + weight_decay / 2 of the square, n not the number of rows."""
    return torch.linalg.solve(x.mT @ x / n + weight_decay * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y / n)


def linear(weight):
    layer = nn.Linear(len(weight), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight.mT)
    return layer


RIDGE = InfluenceObjective("half_squared_error", measurement=lambda y, t: y[:, 0])


@pytest.fixture(scope="module")
def retrained():
    """Ridge regression without each of its samples: what removing them does to predictions."""
    x, y = ridge()
    asked = torch.eye(4, dtype=torch.float64)
    keep = [[j for j in range(len(x)) if j != i] for i in range(len(x))]
    at = solved(x, y, 0.01, len(x))
    moved = torch.cat([asked @ (solved(x[k], y[k], 0.01, len(x)) - at) for k in keep], dim=1)
    return linear(at), TensorDataset(x, y), [(asked, torch.zeros(4, 1, dtype=torch.float64))], moved


def test_rescaled_influence_is_leave_one_out_of_ridge_regression(retrained):
    base, data, asked, moved = retrained
    module = InfluenceModule(base, RIDGE, asked, damping=0.0, weight_decay=0.01, rescale=True)
    close(module.scores(loader(data, 7)), moved, rtol=1e-10)


def test_influence_is_leave_one_out_times_one_minus_the_leverage(retrained):
    base, data, asked, moved = retrained
    x = data.tensors[0]
    inverse = torch.linalg.inv(x.mT @ x / len(x) + 0.01 * torch.eye(4, dtype=torch.float64))
    leverage = (x @ inverse * x).sum(1) / len(x)
    assert leverage.max() > 0.1
    module = InfluenceModule(base, RIDGE, asked, damping=0.0, weight_decay=0.01)
    close(module.scores(loader(data, 7)), moved * (1 - leverage), rtol=1e-10)


def test_positive_means_that_removing_the_sample_makes_the_query_worse(retrained):
    """The definition of torch-influence: change of the test loss by removal, with 1/N."""
    base, data, _, _ = retrained
    x, y = data.tensors
    test = (torch.ones(1, 4, dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64))
    found = InfluenceModule(
        base, InfluenceObjective("half_squared_error"), [test], damping=0.0, weight_decay=0.01, rescale=True
    ).scores(loader(data))[0]

    def loss_without(i):
        keep = [j for j in range(len(x)) if j != i]
        return 0.5 * (test[0] @ solved(x[keep], y[keep], 0.01, len(x)) - test[1]).square().item()

    before = 0.5 * (base(test[0]) - test[1]).square().item()
    actual = torch.tensor([loss_without(i) - before for i in range(len(x))], dtype=torch.float64)
    assert actual.max() > 0 > actual.min()
    large = actual.abs() > actual.abs().median()
    assert torch.equal(found[large].sign(), actual[large].sign())
    assert float((found - actual).norm() / actual.norm()) < 0.05  # what is left is the square of the change


@pytest.mark.parametrize("at", ["optimum", "elsewhere"])
def test_the_proximal_bregman_response_of_a_linear_model_from_any_weights(at):
    """Spec 5.2: K without the sample's curvature, whether or not training has converged."""
    x, y = ridge()
    weight = solved(x, y, 0.01, len(x)) if at == "optimum" else torch.full((4, 1), 0.3, dtype=torch.float64)
    asked = torch.eye(4, dtype=torch.float64)
    K = x.mT @ x / len(x) + 0.06 * torch.eye(4, dtype=torch.float64)
    steps = [
        torch.linalg.solve(K - row.mT @ row / len(x), row.mT @ (row @ weight - y[i]))
        for i, row in enumerate(x[:, None])
    ]
    wanted = torch.stack([(asked @ step)[:, 0] for step in steps], dim=1) / len(x)
    queries = [(asked, torch.zeros(4, 1, dtype=torch.float64))]
    module = InfluenceModule(
        linear(weight), RIDGE, queries, damping=0.05, weight_decay=0.01, rescale=True, solver="nystrom_cg", tol=1e-12
    )
    close(module.scores(loader(TensorDataset(x, y))), wanted, rtol=1e-9)


GROUPS = [[0], [3, 17, 31], list(range(20)), [49, 1]]


def test_groups_leave_a_linear_model_exactly(retrained):
    base, data, asked, _ = retrained
    x, y = data.tensors
    module = InfluenceModule(base, RIDGE, asked, damping=0.0, weight_decay=0.01)
    moved = []
    for group in GROUPS:
        keep = [j for j in range(len(x)) if j not in group]
        moved.append(asked[0][0] @ (solved(x[keep], y[keep], 0.01, len(x)) - base.weight.detach().mT))
    close(module.leave_out(GROUPS, loader(data)), torch.cat(moved, dim=1), rtol=1e-10)


def test_first_order_groups_are_sums(dense):
    module = influence()
    scores = module.scores(loader(classes()))
    groups = [[0, 5, 22], [7], list(range(N))]
    wanted = torch.stack([scores[:, group].sum(1) for group in groups], dim=1)
    close(module.leave_out(groups, loader(classes()), rescale=False), wanted)


def test_groups_of_a_network_leave_its_curvature(dense):
    group = [2, 3, 11]
    step = dense.inverse(0.1, dense.ggn() - dense.ggn(group)) @ dense.gradients()[group].sum(0) / N
    wanted = dense.gradients(*ref.queries()[0]) @ step
    close(influence().leave_out([group], loader(classes()))[:, 0], wanted)
    assert influence().leave_out([], loader(classes())).shape == (3, 0)


# -- limits, symmetries and invariances ---------------------------------------------------------------------------


def test_large_damping_gives_the_inner_product_of_gradients():
    found = 1e6 * influence(damping=1e6).scores(loader(classes()))
    close(found, influence(solver="identity").scores(loader(classes())), rtol=5e-6)


def test_scores_of_the_training_set_on_itself_are_symmetric_and_bounded():
    module = influence(queries=[classes()[:]])
    scores = module.scores(loader(classes()))
    own = module.self_influence(loader(classes()))
    close(scores, scores.mT, rtol=1e-12)
    close(scores.diagonal() * N, own)
    assert (N * scores.abs() <= (own[:, None] * own).sqrt() + 1e-12).all()  # Cauchy and Schwarz


def test_self_influence_falls_with_damping_and_stays_below_the_squared_gradient():
    squares = Dense(network(*SIZES), classes()[:]).gradients().square().sum(1)
    before = torch.full((N,), torch.inf, dtype=torch.float64)
    for damping in (1e-3, 1e-2, 0.1, 1.0):
        own = influence(damping=damping).self_influence(loader(classes()))
        assert (own >= 0).all()
        assert (own < before).all()
        assert (own <= squares / damping).all()
        before = own


def test_duplicates_score_alike_and_the_data_set_may_come_twice():
    data = classes()
    twice = influence().scores(loader(ConcatDataset([data, data]), 7))
    close(twice[:, :N], twice[:, N:], rtol=1e-12)
    close(2 * twice[:, :N], influence().scores(loader(data)), rtol=1e-9)  # the same mean curvature, half the share


@pytest.mark.parametrize("solver", ["direct", "nystrom_cg", "ekfac"])
@pytest.mark.parametrize("double", [False, True])
def test_batches_do_not_matter(solver, double):
    """Sizes of batches, their order, what is kept of them, and how the queries come."""
    options = {"solver": solver, "tol": 1e-8 if double else 1e-5, "double": double, "rank": 20}
    wanted = influence(**options).scores(loader(classes(), 5))
    rtol = 1e-7 if double else 1e-5
    asked = [classes(3, seed=9)[i : i + 1] for i in range(3)]
    for size, more in ((1, {}), (4, {"cache_bytes": 0}), (100, {}), (7, {"queries": asked})):
        close(influence(**options, **more).scores(loader(classes(), size)), wanted, rtol)
    order = torch.randperm(N).tolist()
    close(influence(**options).scores(loader(Subset(classes(), order))), wanted[:, order], rtol)


def test_hidden_units_may_change_places():
    base, order = network(*SIZES), [3, 0, 4, 1, 2]
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[0].weight.copy_(base[0].weight[order])
        other[0].bias.copy_(base[0].bias[order])
        other[2].weight.copy_(base[2].weight[:, order])
    close(influence(other).scores(loader(classes())), influence(base).scores(loader(classes())))


def test_without_damping_the_units_of_the_inputs_do_not_matter():
    """K is then a tensor of the same kind as the gradients; with damping it is not."""
    data, asked = numbers(n=40), ref.queries(k=1)
    base = nn.Linear(4, 1)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.weight.div_(10)
    objective = InfluenceObjective("half_squared_error")

    def scores(module, scale, damping):
        rows = TensorDataset(scale * data.tensors[0], data.tensors[1])
        queries = [(scale * asked[0][0], asked[0][1])]
        return influence(module, objective, queries=queries, damping=damping).scores(loader(rows))

    close(scores(other, 10, 0.0), scores(base, 1, 0.0), rtol=1e-6)
    with pytest.raises(AssertionError, match="apart"):
        close(scores(other, 10, 1.0), scores(base, 1, 1.0), rtol=1e-2)


# -- what is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["direct", "dual", "nystrom_cg", "ekfac", "trak", "lissa"])
@pytest.mark.filterwarnings("ignore:lissa stopped", "ignore:.*have no Kronecker factors", "ignore:rescale takes")
def test_the_base_is_left_as_it_was(solver):
    base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    base[3].weight.grad = torch.ones(3, 5)
    base[0].eval()
    before, state = {k: v.clone() for k, v in base.state_dict().items()}, torch.get_rng_state()
    module = influence(base, double=False, solver=solver, max_iterations=20, rank=5)
    torch.set_rng_state(state)
    module.scores(loader(classes()))
    module.self_influence(loader(classes()))
    module.leave_out([[0, 1]], loader(classes()))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert [part.training for part in base] == [False, True, True, True]
    assert base.training
    assert torch.equal(base[3].weight.grad, torch.ones(3, 5))
    assert all(p.grad is None for n, p in base.named_parameters() if n != "3.weight")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in base.modules())
    assert torch.equal(torch.get_rng_state(), state), "drew from the global generator"


def test_double_works_on_a_copy():
    base = network(*SIZES)
    module = influence(base)
    assert module.base is not base
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert influence(base, double=False).base is base


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("solver", ["direct", "nystrom_cg", "ekfac"])
def test_copies(copied, ran, solver, tmp_path):
    module = influence(solver=solver, output_dir=tmp_path / "scores")
    if ran:
        ref.predict(module, loader(classes()))
    twin = copied(module)
    with torch.no_grad():
        module.base[0].weight.zero_()
    close(twin.scores(loader(classes())), influence(solver=solver).scores(loader(classes())))
    assert twin.report["solver"] == solver


def test_a_parameter_without_dimensions():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return self.layer(x) * self.temperature

    base = Scaled()
    close(influence(base).scores(loader(classes())), Dense(base, classes()[:]).scores(ref.queries(), 0.1))


def test_another_objective_asks_anew(dense):
    module = influence()
    module.scores(loader(data := classes()))
    module.objective = InfluenceObjective(measurement="margin")
    close(module.scores(loader(data)), dense.scores(ref.queries(), 0.1, measure=margin))


def test_an_output_loss_of_ones_own():
    """A convex function of the outputs, by name of nothing."""

    def huber(y, t):
        return F.huber_loss(y, t, reduction="none").sum(1)

    base, data, asked = network(4, 3, 1), numbers(), ref.queries(k=1)
    wanted = Dense(base, data[:], lambda y, t: F.huber_loss(y, t, reduction="sum")).scores(asked, 0.1)
    objective = InfluenceObjective(huber)
    assert isinstance(objective.loss, OutputLoss)
    close(influence(base, objective, queries=asked).scores(loader(data)), wanted)
