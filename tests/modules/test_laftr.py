"""Influence from statistics against dense matrices of the estimator's own distance, and against influence from data."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacfwd, jacrev
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.data import RowStore
from lightning_ext.functional import InfluenceObjective
from lightning_ext.modules import InfluenceModule, LAFTRInfluence
from lightning_ext.modules._laftr_newton import newton_steps
from lightning_ext.nn import (
    CoresetEstimator,
    EWCEstimator,
    FullDataEstimator,
    KFACEstimator,
    L2Estimator,
    LAFTREstimator,
    NTKEstimator,
)
from lightning_ext.testing import ddp_trainer_kwargs
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import close, loader, matrix, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

N, DAMPING = 30, 0.1
MODES = ("relu", "sample", "moments", "mean")
NETS = {
    "chain": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3)),
    "relu chain": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.MaxPool1d(2, 1),
        nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 3),
    ),
    "smooth": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 3)),
}  # fmt: skip


def network(name="relu chain", seed=0):
    torch.manual_seed(seed)
    net = NETS[name]().double()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_var.uniform_(0.5, 2.0)
    return net


def data(n=N, seed=1):
    x, t = ref.classes(n, seed=seed)[:]
    return x.double() + t[:, None], t


def fitted(net, mode="relu", n=N, **kwargs):
    options = {"num_samples": 40, **kwargs}
    return LAFTREstimator(mode, **options).fit(net, [data(n)], heads=options.pop("heads", None))


def influence(net, estimator, **kwargs):
    options = {"queries": [data(3, seed=9)], "damping": DAMPING, "solver": "direct", **kwargs}
    return LAFTRInfluence(net, estimator, **options)


class Call(nn.Module):
    """An estimate for what a module holds, so that functional_call swaps it."""

    def __init__(self, estimator, net):
        super().__init__()
        self.net, self.hidden = net, [estimator]

    def forward(self):
        return self.hidden[0].distance(self.net)


def distance_of(estimator, net):
    """The estimator's distance as a function of one flat vector; the estimator must have fixed draws."""
    named = dict(net.named_parameters())
    call = Call(estimator, net)

    def distance(row):
        parts = torch.split(row, [p.numel() for p in named.values()])
        swapped = {f"net.{n}": part.view(p.shape) for (n, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(call, swapped, ())

    return distance


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def dense_hessian(estimator, net):
    estimator.distance(net)  # what it keeps for later is made outside of transforms
    return jacfwd(jacrev(distance_of(estimator, net)), randomness="same")(flat(net))


def gradients(net, x, t):
    def one(x, t):
        return nn.functional.cross_entropy(net(x[None]), t[None])

    net.eval()
    rows = [torch.autograd.grad(one(a, b), list(net.parameters())) for a, b in zip(x, t, strict=True)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def inverse(hessian, damping=DAMPING):
    return torch.linalg.inv(hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype))


CASES = [
    *((mode, "relu chain", divergence, None) for mode in MODES for divergence in ("kl", "mse")),
    *((mode, "relu chain", "softmax_l2", None) for mode in ("relu", "sample")),
    *((mode, "relu chain", "kl", [2, 0]) for mode in MODES),
    ("sample", "chain", "kl", None),
    ("relu", "convolution", "kl", None),
    ("sample", "convolution", "kl", None),
    ("relu", "smooth", "kl", None),
]


# -- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "name", "divergence", "heads"), CASES, ids=str)
def test_the_curvature_is_the_hessian_of_the_distance(mode, name, divergence, heads):
    net = network(name).eval()
    estimator = LAFTREstimator(mode, num_samples=40, divergence=divergence, fixed_draws=True)
    estimator.fit(net, [data()], heads=heads)
    hessian = dense_hessian(estimator, net)
    module = influence(net, estimator)
    found = module.self_influence(loader(TensorDataset(*data())))
    close(module._engine.inverse.problem.operator.dense(), hessian, rtol=1e-10)
    g = gradients(net, *data())
    close(found, (g @ inverse(hessian) * g).sum(1))


@pytest.mark.parametrize("solver", ["auto", "direct", "dual", "block_cg", "nystrom_cg", "cg", "normal_cg", "neumann"])
@pytest.mark.parametrize("mode", MODES)
def test_solvers_agree_with_the_dense_inverse(mode, solver):
    net = network()
    estimator = fitted(net, mode, fixed_draws=True)
    module = influence(net, estimator, solver=solver, tol=1e-9, max_iterations=2000)
    if solver == "dual" and mode in ("moments", "mean"):
        with pytest.raises(ValueError, match="'dual' takes the curvature of single samples, of which there are none"):
            module.scores(loader(TensorDataset(*data())))
        return
    asked = gradients(net, *data(3, seed=9))
    wanted = asked @ inverse(dense_hessian(estimator, net)) @ gradients(net, *data()).mT / N
    close(module.scores(loader(TensorDataset(*data()))), wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chosen", ["0", "weight"])
def test_a_choice_of_parameters(mode, chosen):
    net = network()
    estimator = fitted(net, mode, fixed_draws=True)
    keep = torch.cat([torch.full((p.numel(),), chosen in n) for n, p in net.named_parameters()])
    hessian, g = dense_hessian(estimator, net)[keep][:, keep], gradients(net, *data())[:, keep]
    module = influence(net, estimator, include=chosen)
    close(module.self_influence(loader(TensorDataset(*data()))), (g @ inverse(hessian) * g).sum(1))


def test_the_network_may_be_kept_in_half_the_memory():
    """The curvature is taken at the weights in full precision."""
    net = network()
    exact, coarse = fitted(net), fitted(net, store_dtype="bfloat16")
    samples = loader(TensorDataset(*data()))
    close(influence(net, coarse).scores(samples), influence(net, exact).scores(samples), rtol=1e-12)


def test_n_is_that_of_the_fit_whatever_is_scored():
    net = network()
    module, few = influence(net, fitted(net)), [tensor[5:9] for tensor in data()]
    whole = module.scores(loader(TensorDataset(*data())))
    close(module.scores(loader(TensorDataset(*few))), whole[:, 5:9])
    other = influence(net, fitted(net), num_train=10 * N)
    close(other.scores(loader(TensorDataset(*few))), whole[:, 5:9] / 10)


def test_automatic_damping_is_a_tenth_of_the_mean_eigenvalue():
    net = network()
    estimator = fitted(net, "sample", fixed_draws=True)
    module = influence(net, estimator, damping="auto")
    module.scores(loader(TensorDataset(*data())))
    hessian = dense_hessian(estimator, net)
    assert module.report["damping"] == pytest.approx(0.1 * float(hessian.trace()) / len(hessian), rel=1e-9)


def test_relative_influence():
    net = network()
    estimator = fitted(net, fixed_draws=True)
    solved = gradients(net, *data()) @ inverse(dense_hessian(estimator, net))
    wanted = gradients(net, *data(3, seed=9)) @ solved.mT / N / solved.norm(dim=1)
    close(influence(net, estimator, normalize="parameter").scores(loader(TensorDataset(*data()))), wanted)


def test_groups_leave_by_the_sum_of_their_members():
    net = network()
    module, samples = influence(net, fitted(net)), loader(TensorDataset(*data()))
    scores = module.scores(samples)
    close(module.leave_out([[3], [1, 4, 7]], samples), torch.stack([scores[:, 3], scores[:, [1, 4, 7]].sum(1)], 1))


# -- against the data -----------------------------------------------------------------------------------------------


def one_class_each(n=12):
    """As many classes as samples: every group's Gaussian is one sample's point."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, n)).double().eval()
    return net, (torch.randn(n, 4, dtype=torch.float64), torch.arange(n))


@pytest.mark.parametrize("mode", ["relu", "sample"])
@pytest.mark.parametrize("solver", ["direct", "ekfac"])
def test_with_pseudo_data_that_are_the_data_it_is_influence_from_the_data(mode, solver):
    net, (x, t) = one_class_each()
    estimator = LAFTREstimator(mode, jitter=0.0, num_samples=len(x)).fit(net, [(x, t)])
    samples, queries = loader(TensorDataset(x, t)), [(x[:3] + 0.1, t[:3])]
    wanted = InfluenceModule(net, queries=queries, damping=DAMPING, solver=solver).scores(samples)
    close(LAFTRInfluence(net, estimator, None, queries, damping=DAMPING, solver=solver).scores(samples), wanted, 1e-7)


@pytest.mark.parametrize("kind", [FullDataEstimator, lambda: CoresetEstimator(N), NTKEstimator])
def test_estimators_that_keep_the_data_give_influence_from_the_data(kind):
    net = network()
    samples, queries = loader(TensorDataset(*data())), [data(3, seed=9)]
    module = influence(net, kind().fit(net, [data()]), num_train=N)
    wanted = InfluenceModule(net, queries=queries, damping=DAMPING, solver="direct").scores(samples)
    close(module.scores(samples), wanted)


@pytest.mark.parametrize("kind", [EWCEstimator, KFACEstimator, L2Estimator])
def test_quadratic_forms_of_the_weights(kind):
    net = network()
    estimator = kind().fit(net, [data()])
    g = gradients(net, *data())
    wanted = (g @ inverse(dense_hessian(estimator, net)) * g).sum(1)
    close(influence(net, estimator, num_train=N).self_influence(loader(TensorDataset(*data()))), wanted)


@pytest.mark.parametrize("mode", ["moments", "mean"])
def test_a_linear_unit_needs_nothing_but_the_moments(mode):
    """One ReLU that is always open: ridge regression, whose influence the two moments give in full."""
    torch.manual_seed(0)
    x = torch.rand(N, 3, dtype=torch.float64) + 1
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.abs_()
        net[0].bias.abs_()
    t = torch.randn(N, 1, dtype=torch.float64)
    estimator = LAFTREstimator(mode, class_conditional=False, divergence="mse", jitter=0.0).fit(net, [(x, t)])
    samples, objective, queries = (
        loader(TensorDataset(x, t)),
        InfluenceObjective("half_squared_error"),
        [(x[:3], t[:3])],
    )
    wanted = InfluenceModule(net, objective, queries, damping=DAMPING, solver="direct").scores(samples)
    close(influence(net, estimator, objective=objective, queries=queries).scores(samples), wanted)


# -- the proximal Bregman response ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_the_response_satisfies_its_gradient_equation(mode, divergence):
    net = network()
    estimator = fitted(net, mode, fixed_draws=True, divergence=divergence)
    module, groups = influence(net, estimator), [4, [0], [2, 11, 5]]
    changes = module.respond(groups, loader(TensorDataset(*data())), tolerance=1e-9)
    g, slope = gradients(net, *data()), jacrev(distance_of(estimator, net))
    for group, change in zip([[4], [0], [2, 11, 5]], changes, strict=True):
        pull = g[group].sum(0) / N
        assert (slope(flat(net) + change) + DAMPING * change - pull).norm() < 1e-8 * pull.norm()
        assert change.norm() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_response_is_measured_at_the_queries(mode):
    net = network()
    module, samples = influence(net, fitted(net, mode)), loader(TensorDataset(*data()))
    changes, groups = module.respond([4, 7], samples, tolerance=1e-8), [4, 7]
    x, t = data(3, seed=9)
    columns = []
    for change in changes:
        moved = copy.deepcopy(net).eval()
        nn.utils.vector_to_parameters(flat(net) + change, moved.parameters())
        with torch.no_grad():
            columns.append(
                nn.functional.cross_entropy(moved(x), t, reduction="none")
                - nn.functional.cross_entropy(net(x), t, reduction="none")
            )
    close(module.pbrf(groups, samples, tolerance=1e-8), torch.stack(columns, 1), rtol=1e-7)
    close(module.pbrf(groups, samples, tolerance=1e-8, chunk_size=1), torch.stack(columns, 1), rtol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_to_first_order_the_response_is_influence(mode):
    """A thousand times the samples: a thousandth of the removal."""
    net = network()
    module = influence(net, fitted(net, mode), num_train=1000 * N)
    samples = loader(TensorDataset(*data()))
    scores = module.scores(samples)[:, :5]
    close(module.pbrf(range(5), samples, tolerance=1e-9), scores, rtol=1e-2)
    assert (influence(net, fitted(net, mode)).pbrf(range(5), samples) - 1000 * scores).abs().max() > 1e-4


def test_the_response_of_a_quadratic_distance_is_a_solve():
    net = network()
    module = influence(net, KFACEstimator().fit(net, [data()]), num_train=N)
    samples = loader(TensorDataset(*data()))
    solved = gradients(net, *data())[:4] @ inverse(dense_hessian(module.estimator, net)) / N
    close(module.respond(range(4), samples, tolerance=1e-10), solved)


def test_float32_finds_the_response_of_float64():
    net = network().float()
    estimator = LAFTREstimator("moments").fit(net, [(data()[0].float(), data()[1])])
    samples = loader(TensorDataset(data()[0].float(), data()[1]))
    wide, single = (influence(net, estimator, double=double).pbrf(range(6), samples) for double in (True, False))
    assert wide.dtype == torch.float64
    assert single.dtype == torch.float32
    close(single, wide, rtol=1e-3)


@pytest.mark.parametrize("mode", ["relu", "moments"])
def test_a_removal_that_leads_far_is_followed_to_its_end(mode, monkeypatch):
    """Three samples gone under little damping: curvature at the reference is no guide any more."""
    net = network()
    estimator = fitted(net, mode, fixed_draws=True, divergence="mse")
    module, group = influence(net, estimator, damping=0.02), [0, 3, 8]
    samples, slope = loader(TensorDataset(*data())), jacrev(distance_of(estimator, net))
    monkeypatch.setattr("lightning_ext.modules.laftr._QUASI_NEWTON", 1)  # most of the way by Newton steps alone
    (change,) = module.respond([group], samples, tolerance=1e-8)
    pull = gradients(net, *data())[group].sum(0) / N
    assert (slope(flat(net) + change) + 0.02 * change - pull).norm() < 2e-8 * pull.norm()
    assert change.norm() > 0.1


def test_newton_steps_find_minima_from_saddles_and_along_valleys():
    def objective(row, pull):
        x, y = row
        return 100 * (y - x**2) ** 2 + (1 - x) ** 2 - pull @ row

    def product(row, pull, vector):
        return torch.func.hessian(objective)(row, pull) @ vector

    start = torch.tensor([[-1.2, 1.0], [0.0, 5.0], [0.0, 0.5], [1.0, 1.0]], dtype=torch.float64)  # two are uphill bends
    pull = torch.zeros_like(start)
    evaluate = torch.func.vmap(torch.func.grad_and_value(objective))
    limits = torch.full((4,), 1e-9, dtype=torch.float64)
    found, norms = newton_steps(evaluate, torch.func.vmap(product), start, pull, limits, 100)
    close(found, torch.ones_like(found), rtol=1e-8)
    assert (norms <= 1e-9).all()
    assert torch.equal(start[3], found[3])


def test_a_response_that_is_not_reached_is_told():
    net = network()
    module = influence(net, fitted(net), damping=1e-3)
    with pytest.warns(UserWarning, match=r"of 5 responses stopped at a relative gradient of up to"):
        found = module.respond(range(5), loader(TensorDataset(*data())), tolerance=1e-12, max_steps=2)
    assert found.isfinite().all()


# -- draws ----------------------------------------------------------------------------------------------------------


def test_draws_follow_the_seed_and_leave_the_estimator_alone():
    net = network()
    estimator, samples = fitted(net), loader(TensorDataset(*data()))
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved[0].weight.add_(0.1)
    state = estimator.get_extra_state()["draws"]
    first, again, other = (influence(net, estimator, seed=seed).scores(samples) for seed in (0, 0, 1))
    assert estimator.get_extra_state()["draws"] == state
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-2)
    assert torch.equal(estimator.distance(moved), fitted(net).distance(moved))


def test_more_draws_come_nearer():
    net = network()
    estimator, samples = fitted(net), loader(TensorDataset(*data()))
    many = [influence(net, estimator, seed=seed, num_samples=4000).scores(samples) for seed in range(2)]
    few = [influence(net, estimator, seed=seed, num_samples=40).scores(samples) for seed in range(2)]
    assert (many[0] - many[1]).norm() < 0.3 * (few[0] - few[1]).norm()


def test_new_statistics_are_noticed():
    net = network()
    estimator, samples = fitted(net), loader(TensorDataset(*data()))
    module = influence(net, estimator)
    before = module.scores(samples)
    estimator.fit(net, [data(N, seed=5)])
    after = module.scores(samples)
    assert not torch.allclose(before, after)
    close(after, influence(net, estimator).scores(samples))


# -- with a Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_predict_keeps_every_sample_under_its_id(mode):
    net = network()
    estimator, samples = fitted(net, mode), TensorDataset(*data())
    wanted = influence(net, estimator).self_influence(loader(samples))[None]
    drawn = DataLoader(samples, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(2))
    close(matrix(predict(influence(net, estimator, mode="self"), drawn), N), wanted)
    close(matrix(predict(influence(net, estimator), drawn), N), influence(net, estimator).scores(loader(samples)))


RANKS = [
    *((mode, {"solver": "block_cg", "tol": 1e-10}) for mode in MODES),
    ("relu", {"solver": "ekfac"}),
    ("sample", {"mode": "self", "solver": "cg", "tol": 1e-10}),
    ("moments", {"mode": "self", "solver": "nystrom_cg", "tol": 1e-10}),
]


@pytest.mark.ddp
@pytest.mark.parametrize(("mode", "options"), RANKS, ids=str)
def test_two_ranks_find_what_one_finds(mode, options, tmp_path):
    net = network()
    estimator = fitted(net, mode)
    for folder, kwargs in (("one", ref.QUIET), ("two", ddp_trainer_kwargs(enable_checkpointing=False))):
        module = influence(net, estimator, output_dir=tmp_path / folder, **options)
        predict(module, loader(TensorDataset(*data(7)), 2), return_predictions=False, **kwargs)
    one, two = (RowStore(tmp_path / folder) for folder in ("one", "two"))
    assert not len(two.missing())
    close(two.read(torch.arange(7)), one.read(torch.arange(7)))


def test_a_table_is_not_continued_with_other_statistics(tmp_path):
    net = network()
    samples = loader(TensorDataset(*data(7)))
    predict(influence(net, fitted(net), output_dir=tmp_path), samples)
    with pytest.raises(ValueError, match="curvature_of"):
        predict(influence(net, fitted(net, n=20), output_dir=tmp_path), samples)


def test_it_can_be_copied_and_pickled():
    net = network()
    module, samples = influence(net, fitted(net)), loader(TensorDataset(*data()))
    wanted = module.scores(samples)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.scores(samples), wanted)


def test_the_module_is_left_as_it_was():
    net = network("convolution").train()
    before = copy.deepcopy(net.state_dict())
    module = influence(net, fitted(net))
    module.pbrf([1], loader(TensorDataset(*data())))
    assert all(part.training for part in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"solver": "trak"}, "solver='trak' projects the training samples' gradients"),
        ({"damping": 0.0}, "damping and weight_decay are 0"),
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"num_train": 0}, "num_train must be at least 1; got 0"),
        ({"damping": -1.0}, "damping must be at least 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        influence(net, fitted(net), **kwargs)


def test_automatic_damping_needs_draws():
    net = network()
    with pytest.raises(ValueError, match="damping='auto' takes the trace over drawn inputs"):
        influence(net, fitted(net, "moments"), damping="auto")


@pytest.mark.parametrize("solver", ["lissa", "ekfac", "kfac"])
def test_solvers_of_single_samples_are_refused_for_closed_forms(solver):
    net = network()
    with pytest.raises(ValueError, match=f"solver='{solver}' takes the curvature of single samples"):
        influence(net, fitted(net, "moments"), solver=solver).scores(loader(TensorDataset(*data())))


def test_an_estimator_without_statistics():
    with pytest.raises(ValueError, match=r"LAFTREstimator keeps no statistics yet: call estimator.fit"):
        influence(network(), LAFTREstimator()).scores(loader(TensorDataset(*data())))


@pytest.mark.parametrize("other", [lambda: network(seed=1), lambda: network("smooth")])
def test_another_network(other):
    estimator = fitted(network())
    with pytest.raises(ValueError, match=r"base is not the network that the estimator was fitted with: \['.*differ"):
        influence(other(), estimator).scores(loader(TensorDataset(*data())))


def test_a_network_that_moved_since():
    net = network("convolution")
    module = influence(net, fitted(net))
    module.scores(loader(TensorDataset(*data())))
    net[2].running_mean.add_(0.1)
    with pytest.raises(ValueError, match=r"\['2.running_mean'\] differ"):
        module.scores(loader(TensorDataset(*data())))


def test_other_estimators_do_not_count():
    net = network()
    with pytest.raises(ValueError, match="num_train is None, and EWCEstimator does not count the training samples"):
        influence(net, EWCEstimator().fit(net, [data()])).scores(loader(TensorDataset(*data())))


def test_samples_cannot_leave_the_statistics():
    net = network()
    with pytest.raises(ValueError, match="rescale takes samples out of the curvature"):
        influence(net, fitted(net)).leave_out([[1]], loader(TensorDataset(*data())), rescale=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": [[2, 2]]}, r"a sample can leave only once; got the group \[2, 2\]"),
        ({"groups": [N]}, f"Samples must lie in 0 to {N - 1}"),
        ({"groups": [[]]}, "at least one"),
        ({"groups": []}, "groups must name at least one sample"),
        ({"groups": [1], "tolerance": 0.0}, "tolerance must be between 0 and 1"),
        ({"groups": [1], "max_steps": 0}, "max_steps at least 1"),
    ],
)
def test_bad_removals(arguments, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        influence(net, fitted(net)).respond(loader=loader(TensorDataset(*data())), **arguments)


def test_a_bad_sample_is_named():
    net = network()
    x, t = data()
    x[6, 1] = torch.nan
    with pytest.raises(ValueError, match=r"Samples \[6\] of the data set have no finite gradient"):
        influence(net, fitted(net)).scores(loader(TensorDataset(x, t)))
    with pytest.raises(ValueError, match=r"Samples \[6\] of the data set have no finite gradient"):
        influence(net, fitted(net)).pbrf([[3, 6]], loader(TensorDataset(x, t)))
