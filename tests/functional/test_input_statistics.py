"""Sums of shards are the sums of the whole, their moments are those of the data, and draws have these moments."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import InputModel, InputStatistics, RecordActivations

COVARIANCES = ("full", "diag", "lowrank")


def data(n=60, d=5, groups=4, seed=0):
    """Correlated inputs, groups of unequal size of which number 2 is empty, and the sites of a small network."""
    torch.manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 3.0
    group = torch.randint(groups - 1, (n,))
    group = torch.where(group == 2, 3, group)
    net = nn.Sequential(nn.Linear(d, 6), nn.ReLU(), nn.Linear(6, 4), nn.GELU(), nn.LeakyReLU(0.1)).double()
    return x, group, net


def sites(net, x):
    with torch.no_grad(), RecordActivations() as tape:
        net(x)
    return tape.sites


def collect(parts, net, template, **options):
    """Statistics of one pass over some batches."""
    statistics = InputStatistics.zeros((5,), template, num_groups=4, **options)
    for x, group in parts:
        statistics.add(x, group, sites(net, x))
    return statistics


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_moments_are_those_of_each_group(covariance):
    x, group, net = data()
    model = collect([(x, group)], net, sites(net, x[:1]), covariance=covariance).finalise(jitter=0.0)
    opens = [(F.linear(x, net[0].weight, net[0].bias) > 0), net[3](net[2](net[1](net[0](x)))) > 0]
    for c in (0, 1, 3):
        rows = x[group == c]
        expected = torch.cov(rows.mT, correction=0)
        expected = expected.diag().diag() if covariance == "diag" else expected
        torch.testing.assert_close(model.means[c], rows.mean(0), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(model.covariance()[c], expected, rtol=1e-11, atol=1e-11)
        for mean, open_units in zip(model.gate_means(), opens, strict=True):
            torch.testing.assert_close(mean[c], open_units[group == c].double().mean(0), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(model.weights, torch.bincount(group, minlength=4) / 60.0, check_dtype=False)
    assert model.weights[2] == 0.0


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("cuts", [(10, 25), (1, 59), (0, 30)])
def test_shards_merge_to_the_single_pass(covariance, cuts):
    x, group, net = data()
    template = sites(net, x[:1])
    whole = collect([(x, group)], net, template, covariance=covariance, rank=3)
    parts = zip(x.tensor_split(cuts), group.tensor_split(cuts), strict=True)
    shards = [collect([part], net, template, covariance=covariance, rank=3) for part in parts]
    merged = shards[0].merge(shards[1]).merge(shards[2])
    for name, value in whole.state.items():
        torch.testing.assert_close(merged.state[name], value, rtol=1e-14, atol=1e-13)
    ours, theirs = merged.finalise(), whole.finalise()
    torch.testing.assert_close(ours.covariance(), theirs.covariance(), rtol=1e-9, atol=1e-11)


def test_reduce_may_sum_over_ranks():
    x, group, net = data()
    template = sites(net, x[:1])
    first, second = (collect([(x[part], group[part])], net, template) for part in (slice(20), slice(20, None)))
    names = iter(list(second.state))
    first.reduce(lambda value: value + second.state[next(names)])
    for name, value in collect([(x, group)], net, template).state.items():
        torch.testing.assert_close(first.state[name], value, rtol=1e-14, atol=1e-13)


def test_groups_together_have_the_moments_of_the_whole():
    x, group, _ = data()
    parts = InputStatistics.zeros((5,), num_groups=4).add(x, group).finalise(jitter=0.0)
    whole = InputStatistics.zeros((5,)).add(x).finalise(jitter=0.0)
    second = parts.covariance() + parts.means.unsqueeze(2) * parts.means.unsqueeze(1)
    mean = parts.weights @ parts.means
    torch.testing.assert_close(mean, whole.means[0], rtol=1e-13, atol=1e-13)
    pooled = torch.einsum("g,gij->ij", parts.weights, second) - mean.outer(mean)
    torch.testing.assert_close(pooled, whole.covariance()[0], rtol=1e-11, atol=1e-11)


def test_a_sketch_of_lower_rank_keeps_the_large_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40).double()).Q
    x = torch.randn(400, 40).double() * 0.3 ** torch.arange(40) @ basis.mT + 7.0
    full = InputStatistics.zeros((40,)).add(x).finalise(jitter=0.0).covariance()[0]
    model = InputStatistics.zeros((40,), covariance="lowrank", rank=12).add(x).finalise()
    assert model.factors.shape == (1, 40, 12)
    error = full - model.covariance()[0]
    size = torch.linalg.matrix_norm(full, 2)
    assert torch.linalg.eigvalsh(error).min() > -1e-10 * size  # never above the covariance
    assert torch.linalg.matrix_norm(error, 2) < 1e-4 * size


def test_jitter_is_added_to_the_variances():
    x, _, _ = data()
    for covariance in ("full", "diag"):
        plain, raised = (
            InputStatistics.zeros((5,), covariance=covariance).add(x).finalise(jitter).covariance()
            for jitter in (0.0, 0.5)
        )
        torch.testing.assert_close(raised - plain, 0.5 * torch.eye(5).double()[None], rtol=1e-11, atol=1e-11)


def test_singular_covariances_have_a_root():
    x = torch.randn(3, 5).double()
    full = torch.cat([x, torch.zeros(3, 2).double()], 1)  # three examples of seven inputs, two of them constant
    model = InputStatistics.zeros((7,)).add(full).finalise(jitter=0.0)
    torch.testing.assert_close(model.covariance()[0], torch.cov(full.mT, correction=0), rtol=1e-12, atol=1e-13)
    one = InputStatistics.zeros((7,)).add(full[:1]).finalise(jitter=0.0)
    assert torch.equal(one.sample(2)[0], full[:1].expand(2, 7))


def test_an_origin_saves_the_digits_of_far_inputs():
    torch.manual_seed(0)
    near = torch.randn(200, 2).double()
    far = near + 1e8
    expected = torch.cov(near.mT, correction=0)
    plain = InputStatistics.zeros((2,)).add(far).finalise(jitter=1e-4).covariance()[0]
    shifted = InputStatistics.zeros((2,), origin=far[0]).add(far).finalise(jitter=0.0)
    torch.testing.assert_close(shifted.covariance()[0], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shifted.means[0], far.mean(0), rtol=1e-15, atol=0.0)
    assert (plain - expected).abs().max() > 0.01


def test_one_gate_for_each_channel_is_the_mean_over_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.ReLU())
    tokens = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    images, words = torch.randn(6, 1, 5, 5), torch.randn(6, 7, 5)
    for model, x, shapes in ((net, images, [(3, 1, 1), (4,)]), (tokens, words, [(1, 4)])):
        seen = sites(model, x)
        by_unit = InputStatistics.zeros(x.shape[1:], seen).add(x, sites=seen).finalise()
        by_channel = InputStatistics.zeros(x.shape[1:], seen, granularity="channel").add(x, sites=seen).finalise()
        assert [tuple(gate.shape[1:]) for gate in by_channel.gates] == shapes
        for fine, coarse in zip(by_unit.gates, by_channel.gates, strict=True):
            dims = [dim for dim in range(1, fine.ndim) if coarse.shape[dim] == 1]
            expected = fine.mean(dims, keepdim=True) if dims else fine
            torch.testing.assert_close(coarse, expected, rtol=1e-12, atol=1e-14)
        group = torch.zeros(9, dtype=torch.long)
        draws = by_channel.draw_gates(group)
        assert [draw.shape for draw in draws] == [(9, *site.shape[1:]) for site in seen]


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_draws_have_the_moments_they_were_made_of(covariance):
    x, group, net = data()
    model = collect([(x, group)], net, sites(net, x[:1]), covariance=covariance).finalise()
    drawn, weights, of = model.sample(200_000, torch.Generator().manual_seed(0))
    assert weights.sum().item() == pytest.approx(1.0)
    for c in (0, 1, 3):
        rows = drawn[of == c]
        scale = model.covariance()[c].diagonal().amax().sqrt()
        torch.testing.assert_close(rows.mean(0) / scale, model.means[c] / scale, rtol=0.0, atol=0.02)
        ours = torch.cov(rows.mT) / scale**2
        torch.testing.assert_close(ours, model.covariance()[c] / scale**2, rtol=0.0, atol=0.02)
    assert not (of == 2).any()


def test_gates_are_drawn_for_each_example_and_unit_with_its_groups_mean():
    means = torch.tensor([[0.0, 0.2, 1.0], [0.5, 0.9, 0.0]])
    model = InputModel(torch.tensor([0.5, 0.5]), torch.zeros(2, 1), torch.zeros(2, 1), (means,), ((3,),))
    group = torch.tensor([0, 1]).repeat(20_000)
    [draws] = model.draw_gates(group, torch.Generator().manual_seed(0))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    for c in (0, 1):
        rows = draws[group == c]
        torch.testing.assert_close(rows.mean(0), means[c], rtol=0.0, atol=0.02)
        assert abs(torch.cov(rows.mT)[0, 1].item()) < 0.01  # independent of each other


@pytest.mark.parametrize("num", [1, 7, 40])
def test_every_group_is_drawn_with_its_weight(num):
    model = InputModel(torch.tensor([0.7, 0.0, 0.29, 0.01]), torch.zeros(4, 2), torch.ones(4, 2))
    x, weights, group = model.sample(num)
    assert len(x) == len(weights) == len(group) == sum(max(1, round(num * share)) for share in (0.7, 0.29, 0.01))
    for c, share in enumerate((0.7, 0.0, 0.29, 0.01)):
        assert weights[group == c].sum().item() == pytest.approx(share, rel=1e-6)


def test_gates_of_half_precision_have_the_rates_asked_for():
    rates = torch.tensor([[0.0005, 0.002, 0.3]])
    model = InputModel(torch.ones(1), torch.zeros(1, 1), torch.zeros(1, 1, 1), (rates.bfloat16(),), ((3,),))
    (drawn,) = model.draw_gates(torch.zeros(400_000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.bfloat16
    torch.testing.assert_close(drawn.double().mean(0), rates[0].bfloat16().double(), rtol=0.2, atol=0)


def test_a_generator_makes_draws_repeatable():
    x, group, net = data()
    model = collect([(x, group)], net, sites(net, x[:1])).finalise()
    first, second, third = (
        (model.sample(10, generator)[0], *model.draw_gates(group, generator))
        for generator in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_inputs_keep_their_shape_and_take_a_dtype():
    x = torch.randn(8, 2, 3, 4)
    model = InputStatistics.zeros((2, 3, 4)).add(x).finalise()
    assert model.sample(5)[0].shape == (5, 2, 3, 4)
    assert model.sample(5)[0].dtype == torch.float64
    single = model.to(torch.zeros((), dtype=torch.float32))
    drawn, weights, _ = single.sample(5)
    assert drawn.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(single.means, x.mean(0, keepdim=True))


def test_half_precision_is_summed_in_double():
    x = torch.full((4097, 1), 0.1, dtype=torch.bfloat16)
    mean = InputStatistics.zeros((1,)).add(x).finalise().means
    assert mean.item() == pytest.approx(x[0].item(), rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4), None), r"inputs must have shape \(B, 5\); got \(2, 4\)"),
        ((torch.ones(2, 5), None), "groups must say which of the 4 groups"),
        ((torch.ones(2, 5), torch.tensor([0])), r"integers of shape \(2,\)"),
        ((torch.ones(2, 5), torch.tensor([0.0, 1.0])), "must be integers"),
        ((torch.ones(2, 5), torch.tensor([0, 4])), "between 0 and 3; got 0 to 4"),
        ((torch.ones(2, 5), torch.tensor([-1, 2])), "got -1 to 2"),
        ((torch.ones(2, 5), torch.tensor([1, 2])), r"sites must have gates of shapes \[\(2, 6\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(arguments, message):
    x, _, net = data()
    with pytest.raises(ValueError, match=message):
        InputStatistics.zeros((5,), sites(net, x[:1]), num_groups=4).add(*arguments)


def test_token_ids_are_refused():
    with pytest.raises(TypeError, match=r"floating.*int64.*embedding's output"):
        InputStatistics.zeros((5,)).add(torch.ones(2, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "dense"}, "covariance must be one of 'full', 'diag', 'lowrank'; got 'dense'"),
        ({"granularity": "layer"}, "granularity must be one of 'unit', 'channel'; got 'layer'"),
        ({"num_groups": 0}, "sizes must be at least 1.*0 groups"),
        ({"rank": 0}, "rank 0"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InputStatistics.zeros((5,), **options)


def test_sums_without_meaning_are_refused():
    statistics = InputStatistics.zeros((2,))
    with pytest.raises(ValueError, match="no examples"):
        statistics.finalise()
    with pytest.raises(ValueError, match="jitter must be at least 0; got -1"):
        statistics.finalise(jitter=-1.0)
    statistics.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="not finite"):
        statistics.finalise()
    with pytest.raises(ValueError, match="num must be at least 1; got 0"):
        InputStatistics.zeros((1,)).add(torch.ones(1, 1)).finalise().sample(0)


def test_only_like_statistics_merge():
    kinds = [
        InputStatistics.zeros((2,)),
        InputStatistics.zeros((3,)),
        InputStatistics.zeros((2,), num_groups=2),
        InputStatistics.zeros((2,), covariance="lowrank", rank=2),
        InputStatistics.zeros((2,), covariance="lowrank", rank=2, seed=1),
        InputStatistics.zeros((2,), origin=torch.ones(2)),
    ]
    for first, second in itertools.permutations(kinds, 2):
        with pytest.raises(ValueError, match="only statistics of the same shapes"):
            first.merge(second)


@pytest.mark.parametrize("num", [20_000, 30_001])  # as many of each group, or not
def test_several_models_side_by_side_have_equal_shares(num):
    roots = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])
    half, means = torch.tensor([0.5, 0.5]), torch.tensor([[5.0, 0.0], [0.0, -5.0]])
    parts = [InputModel(half, means * k, roots * k, (torch.rand(2, 3),)) for k in (1.0, 2.0)]
    if num % 2:
        parts[0] = replace(parts[0], weights=torch.tensor([0.25, 0.75]))
    joined = InputModel.mean_of(parts)
    assert torch.equal(joined.gates[0], torch.cat([part.gates[0] for part in parts]))
    x, weights, group = joined.sample(num, torch.Generator().manual_seed(0))
    for place, part in ((0, parts[0]), (2, parts[1])):
        for c in (0, 1):
            rows = x[group == place + c]
            assert weights[group == place + c].sum().item() == pytest.approx(part.weights[c].item() / 2, rel=1e-5)
            torch.testing.assert_close(rows.mean(0), part.means[c], rtol=0.0, atol=0.3)
            torch.testing.assert_close(torch.cov(rows.mT), part.covariance()[c], rtol=0.1, atol=0.6)
