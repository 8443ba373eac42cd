"""LAFTR from stored statistics: each mode is what its mathematics says, whatever the shards, classes and precision."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call

from lightning_ext.functional import gated_distance, output_divergence
from lightning_ext.nn import LAFTREstimator
from lightning_ext.testing import run_ddp
from tests.nn.laftr_toys import batches, fitted, images, moved, network, outputs, shifted, table

MODES = ("relu", "sample", "moments", "mean")
KINDS = [
    {"covariance": covariance, "class_conditional": conditional}
    for covariance in ("full", "diag", "lowrank")
    for conditional in (True, False)
]


def scalar():
    """v relu(w x) with w = v = 1, inputs of mean 1 and variance 2, and half of the gates open."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for one, two, value in zip(net.parameters(), other.parameters(), (3.0, 2.0), strict=True):
            one.fill_(1.0)
            two.fill_(value)
    return net, other, torch.tensor([[1 - 2**0.5], [1 + 2**0.5]], dtype=torch.float64)


def simple(mode, **options):
    return LAFTREstimator(mode, class_conditional=False, divergence="mse", jitter=0.0, **options)


def test_the_scalar_network_by_hand():
    net, other, x = scalar()
    assert simple("moments").fit(net, [x]).distance(other).item() == pytest.approx(18.75, rel=1e-12)
    assert simple("mean").fit(net, [x]).distance(other).item() == pytest.approx(9.375, rel=1e-12)
    official = simple("moments", variant="official").fit(net, [x]).distance(other).item()
    assert official == pytest.approx(7.375, rel=1e-12)
    drawn = simple("sample", num_samples=400_000).fit(net, [x]).distance(other).item()
    assert drawn == pytest.approx(18.75, rel=0.02)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_the_closed_form_is_the_mean_of_draws(kind):
    net = network()
    other = moved(net)
    closed, drawn = (
        fitted("laftr-" + mode, net, divergence="mse", num_samples=200_000, **kind).distance(other).item()
        for mode in ("moments", "sample")
    )
    assert drawn == pytest.approx(closed, rel=0.02)
    mean = fitted("laftr-mean", net, divergence="mse", **kind).distance(other).item()
    assert 0 < mean < closed


@pytest.mark.parametrize("conditional", [True, False])
def test_of_a_linear_network_it_is_the_distance_on_the_data(conditional):
    net = network()
    with torch.no_grad():
        for place in (0, 2):
            net[place].bias += 50.0  # all units open
    other = moved(net, 0.1)
    x, labels = table()
    expected = output_divergence(outputs(other, x), outputs(net, x), "mse").item()
    for mode in ("moments", "mean"):
        estimator = LAFTREstimator(mode, class_conditional=conditional, divergence="mse", jitter=0.0)
        assert estimator.fit(net, [(x, labels)]).distance(other).item() == pytest.approx(expected, rel=1e-9)


def test_one_example_for_each_class_gives_the_frozen_network_on_the_data():
    net = network()
    net[-1] = nn.Linear(6, 12).double()
    x = table()[0][:12]
    other = moved(net)
    expected = gated_distance(
        lambda p, x: functional_call(net, p, (x,)),
        {name: p.detach() for name, p in net.named_parameters()}, dict(other.named_parameters()), x, divergence="mse",
    ).item()  # fmt: skip
    for mode in MODES:
        estimator = LAFTREstimator(mode, divergence="mse", jitter=0.0).fit(net, [(x, torch.arange(12))])
        found = estimator.distance(other).item()
        assert found == pytest.approx(expected, rel=1e-6 if mode in ("relu", "sample") else 1e-10), mode


def test_of_a_small_step_the_second_order_kl_is_the_kl():
    net = network()
    other = shifted(net, torch.tensor([1e-3, 2e-3, -2e-3]))
    exact = fitted("full", net).distance(other).item()
    for mode in ("moments", "mean"):
        assert fitted("laftr-" + mode, net).distance(other).item() == pytest.approx(exact, rel=1e-2)
        pooled = fitted("laftr-" + mode, net, class_conditional=False).distance(other).item()
        assert pooled == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("mode", ["relu", "sample", "mean"])
def test_convolutions_normalisation_and_dropout(mode):
    net = images()
    other = moved(net, 0.05)
    found = fitted("laftr-" + mode, net, num_samples=4000).distance(other)
    exact = fitted("full", net).distance(other).item()
    assert 0.3 * exact < found.item() < 3 * exact
    found.backward()
    assert other[1].weight.grad.abs().max() > 0
    channels = fitted("laftr-sample", net, gates="channel")
    assert channels.nbytes < fitted("laftr-sample", net, gates="unit").nbytes


def test_what_a_mode_cannot_do_says_so():
    convolution = nn.Sequential(*list(images())[1:])
    data = [(x.view(-1, 1, 2, 2), labels) for x, labels in batches()]
    with pytest.raises(NotImplementedError, match=r"the closed form needs a chain .*conv2d.*mode=.relu."):
        fitted("laftr-moments", convolution, data)  # at once, while the data are there
    pooled = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten(),
                           nn.Linear(3, 3)).double()  # fmt: skip
    with pytest.raises(NotImplementedError, match="max_pool1d"):
        fitted("laftr-mean", pooled)
    smooth = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()
    for mode in ("sample", "moments", "mean"):
        with pytest.raises(NotImplementedError, match="the network calls gelu: use mode='relu'"):
            fitted("laftr-" + mode, smooth)
    assert fitted("laftr", smooth).distance(moved(smooth)) > 0
    with pytest.raises(RuntimeError, match="no activation function was called"):
        fitted("laftr", nn.Linear(4, 3).double())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_statistics_are_those_of_the_data(kind):
    x, labels = table()
    model = fitted("laftr-sample", jitter=0.0, rank=4, **kind).input_model
    groups = [labels == c for c in range(3)] if kind["class_conditional"] else [torch.ones(90, dtype=torch.bool)]
    torch.testing.assert_close(model.weights, torch.stack([group.double().mean() for group in groups]))
    for c, group in enumerate(groups):
        torch.testing.assert_close(model.means[c], x[group].mean(0), rtol=1e-10, atol=1e-12)
        sigma = torch.cov(x[group].mT, correction=0)
        expected = torch.diag(sigma.diagonal()) if kind["covariance"] == "diag" else sigma
        torch.testing.assert_close(model.covariance()[c], expected, rtol=1e-9, atol=1e-12)
        rate = (network()[0](x[group]) > 0).double().mean(0)
        torch.testing.assert_close(model.gate_means()[0][c], rate, rtol=1e-12, atol=1e-12)


def test_float32_keeps_moments_far_from_zero():
    x = table()[0].float() * 1e-2 + 100
    net = network().float()
    sigma = LAFTREstimator(class_conditional=False, jitter=0.0).fit(net, [x]).input_model.covariance()[0]
    torch.testing.assert_close(sigma, torch.cov(x.double().mT, correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_shards_and_tasks_add_up(mode):
    net = network()
    data = batches(30)
    whole = fitted("laftr-" + mode, net, data).distance(moved(net)).item()
    assert fitted("laftr-" + mode, net, batches(7)).distance(moved(net)).item() == pytest.approx(whole, rel=1e-9)
    merged = fitted("laftr-" + mode, net, data[1:])
    first = fitted("laftr-" + mode, net, data[:1])
    before = {name: value.clone() for name, value in first._kept.items()}
    merged.absorb(first)
    assert merged.distance(moved(net)).item() == pytest.approx(whole, rel=1e-9)
    assert all(torch.equal(value, first._kept[name]) for name, value in before.items())
    for stranger in (fitted("l2"), fitted("laftr-" + mode, net, heads=[0]), fitted("laftr-sample", divergence="mse")):
        if mode != "sample" or stranger.heads is not None or not isinstance(stranger, LAFTREstimator):
            with pytest.raises(ValueError, match="only LAFTR statistics of one kind"):
                merged.absorb(stranger)


def test_what_was_loaded_shares_nothing_with_where_it_came_from():
    first = fitted("laftr")
    restored = LAFTREstimator()
    restored.load_state_dict(first.state_dict())
    restored.absorb(fitted("laftr", data=batches(10)[:3]))
    assert first.statistics.state["count"].sum() == 90
    assert restored.statistics.state["count"].sum() == 120
    restored.statistics.add(*table())
    assert restored.statistics.state["count"].sum() == 120


def test_two_ranks_agree_with_one():
    data = batches(30)

    def of_rank(rank):
        import torch.distributed as dist

        def total(tensor):
            dist.all_reduce(tensor)
            return tensor

        shard = [data[:1], data[1:]][rank]
        return [
            LAFTREstimator(mode).fit(network(), shard, reduce=total).distance(moved(network())).detach()
            for mode in MODES
        ]

    first, second = run_ddp(of_rank)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    expected = [fitted("laftr-" + mode, data=data).distance(moved(network())).detach() for mode in MODES]
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-12)


def test_draws_are_a_stream_with_addresses():
    net = network()
    other, estimator = moved(net), fitted("laftr", net)
    values = [estimator.distance(other).item() for _ in range(3)]
    assert len(set(values)) == 3
    estimator.reseed(1)
    assert estimator.distance(other).item() == values[1]
    assert fitted("laftr", net, seed=1).distance(other).item() not in values
    fixed = fitted("laftr", net, fixed_draws=True)
    assert len({fixed.distance(other).item() for _ in range(3)}) == 1
    spread = [torch.tensor([fitted("laftr-sample", net, num_samples=n, seed=s).distance(other).item()
                            for s in range(40)]).std() for n in (30, 1000)]  # fmt: skip
    assert spread[1] < 0.4 * spread[0]  # each example has its own gates


def test_pooled_tasks_share_the_samples_and_are_unbiased():
    net = network()
    other = moved(net)
    for mode in ("relu", "sample"):
        parts = [fitted("laftr-" + mode, net, data, num_samples=100_000) for data in (batches(), batches()[:1])]
        pooled = LAFTREstimator.pool(parts).distance(other).item()
        expected = sum(part.distance(other).item() for part in parts) / 2
        assert pooled == pytest.approx(expected, rel=0.02), mode


@pytest.mark.parametrize("mode", ["relu", "sample"])
def test_pooled_tasks_draw_apart_and_anew(mode):
    net = network()
    other = moved(net)
    parts = [fitted("laftr-" + mode, net, num_samples=size) for size in (60, 60)]
    pooled = LAFTREstimator.pool(parts)
    values = [pooled.distance(other).item() for _ in range(2)]
    assert values[0] != values[1]
    alone = fitted("laftr-" + mode, net, num_samples=30)
    alone.reseed(0)
    assert values[0] != pytest.approx(alone.distance(other).item(), rel=1e-6)  # as if both drew the same
    pooled.reseed(0)
    assert pooled.distance(other).item() == values[0]


def test_a_reference_of_half_precision_takes_half_the_memory():
    net = network().float()
    data = [(x.float(), labels) for x, labels in batches()]
    full, half = (fitted("laftr", net, data, divergence="mse", store_dtype=dtype) for dtype in (None, "bfloat16"))
    numbers = sum(p.numel() for p in net.parameters())
    assert full.nbytes - half.nbytes == 2 * numbers
    other = moved(net)
    assert half.distance(other).item() == pytest.approx(full.distance(other).item(), rel=0.1)
    assert half.distance(other).dtype == torch.float32


def test_class_numbers_are_needed_and_checked():
    x, labels = table()
    with pytest.raises(ValueError, match=r"class_conditional=True needs a class number .*torch.float64, \(90, 4\)"):
        fitted("laftr", data=[(x, x)])
    with pytest.raises(ValueError, match="say with target= where"):
        fitted("laftr", data=[(x,)])
    with pytest.raises(ValueError, match="groups must lie between 0 and 2; got 0 to 3"):
        fitted("laftr", data=[(x, labels.clone().index_fill_(0, torch.tensor([4]), 3))])
    two = labels < 2  # of a class without examples nothing is drawn
    estimator = fitted("laftr", data=[(x[two], labels[two])])
    assert estimator.input_model.weights[2] == 0
    _, weights, group, _ = estimator.reference_batches(network())
    assert set(group.tolist()) == {0, 1}
    assert weights.sum().item() == pytest.approx(1.0)
    for mode in ("moments", "mean"):
        assert fitted("laftr-" + mode, data=[(x[two], labels[two])]).distance(moved(network())).isfinite()
    assert fitted("laftr", data=[x], class_conditional=False).distance(moved(network())) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "exact"}, "mode must be one of 'relu', 'sample', 'moments', 'mean'; got 'exact'"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"jitter": -1.0}, "jitter at least 0; got 200, -1.0"),
        ({"mode": "moments", "divergence": "softmax_l2"}, "has a closed form for 'mse' and 'kl' only"),
        ({"mode": "mean", "divergence": "softmax_l2"}, "has a closed form for 'mse' and 'kl' only"),
        ({"variant": "official"}, "variant is 'exact', or 'official' with mode='moments'"),
        ({"store_dtype": "float8"}, "store_dtype must be None, 'bfloat16' or 'float16'; got 'float8'"),
        ({"covariance": "dense"}, "covariance must be one of 'full', 'diag', 'lowrank'; got 'dense'"),
        ({"gates": "layer"}, "granularity must be one of 'unit', 'channel'; got 'layer'"),
        ({"rank": 0}, "sizes must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LAFTREstimator(**arguments)


def test_inputs_must_be_a_tensor():
    with pytest.raises(ValueError, match="inputs must be a tensor to have a mean and a covariance; got dict"):
        LAFTREstimator(forward=lambda m, x: m(x["x"]), inputs=lambda batch: batch).fit(network(), [{"x": table()[0]}])


@pytest.mark.parametrize("mode", ["relu", "sample"])
def test_a_loader_may_use_its_memory_again(mode):
    def reusing():
        x, labels = torch.empty(30, 4, dtype=torch.float64), torch.empty(30, dtype=torch.long)
        for rows, classes in batches(30):
            yield x.copy_(rows), labels.copy_(classes)

    net = network()
    ours, theirs = fitted("laftr-" + mode, net, reusing()), fitted("laftr-" + mode, net, batches(30))
    for name, kept in theirs.statistics.state.items():
        torch.testing.assert_close(ours.statistics.state[name], kept, rtol=1e-12, atol=1e-12)


def test_moments_of_the_inputs_need_one_pass_of_the_network():
    net, calls = network(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    fitted("laftr", net)
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"shape \(B, 4\); got \(5, 3\)"):
        fitted("laftr", net, [*batches(), (torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5).long())])


class InPlace(nn.Sequential):
    """Writes into what it is given."""

    def forward(self, x):
        return super().forward(x.sub_(1.0).mul_(2.0))


@pytest.mark.parametrize("name", ["laftr", "laftr-sample", "coreset", "full", "ntk", "ewc", "kfac"])
def test_networks_may_write_into_their_inputs(name):
    net = InPlace(*network())
    data = batches()
    kept = [x.clone() for x, _ in data]
    estimator = fitted(name, net, data)
    assert all(torch.equal(x, before) for (x, _), before in zip(data, kept, strict=True))
    for _ in range(3):
        assert estimator.distance(net).abs() < 1e-12


def test_functions_of_parameters_are_each_networks_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.raw = network(), nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, x):
            return self.net(nn.functional.softplus(self.raw) * x)

    net = Scaled()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.raw += torch.tensor([2.0, -1.0, 0.5, 1.0], dtype=torch.float64)
    estimator = fitted("laftr", net, divergence="mse", fixed_draws=True)
    x, weights, *_ = estimator.reference_batches(net)

    def forward(values, x):
        return functional_call(net, values, (x,))

    exact = gated_distance(
        forward, dict(net.named_parameters()), dict(other.named_parameters()), x, divergence="mse", weights=weights
    )
    torch.testing.assert_close(estimator.distance(other), exact)


def test_checkpointed_activations_are_refused():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    net = Checkpointed(*network(), nn.Softplus())
    estimator = fitted("laftr", net)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        estimator.distance(moved(net))


@pytest.mark.parametrize("name", ["laftr", "laftr-sample", "laftr-moments", "laftr-mean", "coreset", "ntk", "ewc"])
def test_a_look_in_inference_mode_spoils_no_later_gradient(name):
    net = network()
    with torch.inference_mode():
        data = [(x + 0, labels + 0) for x, labels in batches()]
        estimator = fitted(name, net, data)
        assert estimator.distance(moved(net)).isfinite()
    other = moved(network())
    with torch.inference_mode():
        estimator.distance(other)
    estimator.distance(other).backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
