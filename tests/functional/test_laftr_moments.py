"""The closed form of the function-space distance against draws, data, and networks small enough to count by hand."""

import itertools

import pytest
import torch
from torch.nn.functional import softmax

from lightning_ext.functional import (
    ReferenceMoments,
    class_hessians,
    joint_moments,
    moment_distance,
    softmax_kl,
)

DIMS = (4, 8, 6, 3)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator).double()


def network(generator, dims=DIMS):
    return [(normal(generator, n, m) / m**0.5, 0.3 * normal(generator, n)) for m, n in itertools.pairwise(dims)]


def moved(layers, generator, scale=0.5):
    return [
        tuple(t + scale * normal(generator, *t.shape) / layer[0].shape[1] ** 0.5 for t in layer) for layer in layers
    ]


def forward(layers, x, gates=None):
    """Outputs with the given gates, or with the network's own; and the gates."""
    seen = []
    for i, (w, b) in enumerate(layers):
        x = x @ w.mT + b
        if i + 1 < len(layers):
            seen.append((x > 0).to(x) if gates is None else gates[i])
            x = x * seen[-1]
    return x, seen


def half_square(z, metric=None):
    metric = torch.eye(z.shape[-1], dtype=z.dtype) if metric is None else metric
    return 0.5 * ((z @ metric) * z).sum(-1)


def covariance(x):
    return torch.cov(x.mT, correction=0)


@pytest.fixture
def fixture():
    """Networks, inputs, and their exact statistics."""
    generator = torch.Generator().manual_seed(0)
    old = network(generator)
    new = moved(old, generator)
    x = torch.randn(500, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double() + 0.5
    gates = [g.mean(0) for g in forward(old, x)[1]]
    return old, new, x, (x.mean(0), covariance(x), gates)


def all_ones(gates):
    return [torch.ones_like(g) for g in gates]


def test_one_unit_by_hand():
    def scalar(v):
        return torch.tensor([[float(v)]])

    args = ([(scalar(1), None)] * 2, [(scalar(3), None), (scalar(2), None)], scalar(1)[0], scalar(2), [scalar(0.5)[0]])
    assert moment_distance(*args).item() == 18.75  # mu / 2 * (2 * 3 - 1)^2 * (2 + 1^2)
    assert moment_distance(*args, variant="official").item() == 7.375


@pytest.mark.parametrize("inputs", ["gaussian", "resampled"])
def test_the_mean_of_draws(fixture, inputs):
    old, new, x, (mean, cov, gates) = fixture
    generator = torch.Generator().manual_seed(1)
    total, second, n = 0.0, torch.zeros(3, 3).double(), 10**6
    for _ in range(10):
        if inputs == "gaussian":
            draws = mean + torch.randn(n // 10, 4, generator=generator).double() @ torch.linalg.cholesky(cov).mT
        else:
            draws = x[torch.randint(len(x), (n // 10,), generator=generator)]
        open_ = [torch.bernoulli(g.expand(n // 10, -1), generator=generator) for g in gates]
        change = forward(new, draws, open_)[0] - forward(old, draws, open_)[0]
        total, second = total + change.sum(0) / n, second + change.mT @ change / n
    moments = joint_moments(old, new, mean, cov, gates)
    torch.testing.assert_close(moments.distance(), second.trace() / 2, rtol=0.01, atol=0)
    torch.testing.assert_close(moments.second, second, rtol=0, atol=0.01 * second.abs().max().item())
    torch.testing.assert_close(moments.mean, total, rtol=0, atol=0.01)
    official = moment_distance(old, new, mean, cov, gates, variant="official")
    assert abs(official - moments.distance()) > 0.1 * moments.distance()


def test_exact_for_every_pattern_of_few_gates():
    generator = torch.Generator().manual_seed(2)
    old = network(generator, (3, 4, 3, 2))
    new = moved(old, generator)
    x = torch.randn(5, 3, generator=generator).double()
    gates = [torch.rand(4, generator=generator).double(), torch.rand(3, generator=generator).double()]
    mu, expected = torch.cat(gates), 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=7):
        g = torch.tensor(pattern).double()
        change = forward(new, x, g.split([4, 3]))[0] - forward(old, x, g.split([4, 3]))[0]
        expected += torch.where(g == 1, mu, 1 - mu).prod() * half_square(change).mean()
    distance = moment_distance(old, new, x.mean(0), covariance(x), gates)
    torch.testing.assert_close(distance, expected, rtol=1e-12, atol=0)


def test_linear_network_is_exact(fixture):
    old, new, x, (mean, cov, gates) = fixture
    gates = all_ones(gates)
    change = forward(new, x, gates)[0] - forward(old, x, gates)[0]
    distance = moment_distance(old, new, mean, cov, gates)
    torch.testing.assert_close(distance, half_square(change).mean(), rtol=1e-12, atol=0)
    official = moment_distance(old, new, mean, cov, gates, variant="official")
    assert abs(official / distance - 1) > 0.05
    metric = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()
    metric = metric @ metric.mT
    distance = moment_distance(old, new, mean, cov, gates, metric=metric)
    torch.testing.assert_close(distance, half_square(change, metric).mean(), rtol=1e-12, atol=0)


def test_one_layer_without_gates(fixture):
    old, new, x, (mean, cov, _) = fixture
    change = forward(new[:1], x)[0] - forward(old[:1], x)[0]
    moments = joint_moments(old[:1], new[:1], mean, cov, [])
    torch.testing.assert_close(moments.second, change.mT @ change / 500, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.mean, change.mean(0), rtol=1e-12, atol=1e-14)


def test_gates_of_zero_and_one(fixture):
    old, new, x, (mean, cov, gates) = fixture
    gates = [(g > 0.5).double() for g in gates]
    assert 0 < sum(g.sum() for g in gates) < 14
    change = forward(new, x, gates)[0] - forward(old, x, gates)[0]
    distance = moment_distance(old, new, mean, cov, gates)
    torch.testing.assert_close(distance, half_square(change).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cov", ["none", "zeros"])
def test_one_group_for_each_example_is_the_frozen_mask_distance(fixture, cov):
    old, new, x, _ = fixture
    gates = forward(old, x)[1]
    frozen = half_square(forward(new, x, gates)[0] - forward(old, x)[0])
    distances = moment_distance(old, new, x, None if cov == "none" else torch.zeros(500, 4, 4).double(), gates)
    assert distances.shape == (500,)
    torch.testing.assert_close(distances, frozen, rtol=1e-12, atol=1e-14)
    assert abs(frozen.mean() / half_square(forward(new, x)[0] - forward(old, x)[0]).mean() - 1) > 0.01


@pytest.mark.parametrize("variant", ["exact", "official"])
def test_a_shift_of_the_last_bias(fixture, variant):
    old, _, _, stats = fixture
    (w, b) = old[-1]
    new = [*old[:-1], (w, b + torch.tensor([1.0, 2.0, -2.0]).double())]
    assert moment_distance(old, new, *stats, variant=variant).item() == pytest.approx(4.5, rel=1e-12)
    assert moment_distance(old, new, *stats, variant=variant, heads=[0, 2]).item() == pytest.approx(2.5, rel=1e-12)


@pytest.mark.parametrize("variant", ["exact", "official"])
def test_nothing_where_nothing_changed(fixture, variant):
    old, new, _, stats = fixture
    same = [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in old]
    distance = moment_distance(old, same, *stats, variant=variant)
    assert distance.item() == 0.0
    for gradient in torch.autograd.grad(distance, [t for layer in same for t in layer]):
        assert not gradient.any()
    assert moment_distance(old, new, *stats, variant=variant) > 0


def test_gradients_are_those_of_the_current_network_alone(fixture):
    old, new, _, (mean, cov, gates) = fixture
    parameters = [t.clone().requires_grad_() for layer in new for t in layer]
    constants = [t.clone().requires_grad_() for layer in old for t in layer]

    def pairs(tensors):
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def distance(*tensors):
        return moment_distance(pairs(constants), pairs(tensors), mean, cov, gates)

    assert torch.autograd.gradcheck(distance, parameters)
    assert torch.autograd.gradgradcheck(distance, parameters, atol=1e-4)
    assert torch.autograd.grad(distance(*parameters), constants, allow_unused=True) == (None,) * 6


def test_rescaled_units_change_nothing(fixture):
    old, new, _, stats = fixture
    alpha = torch.linspace(0.1, 3.0, 8).double()

    def rescaled(layers):
        (w, b), (v, c), last = layers
        return [(w * alpha[:, None], b * alpha), (v / alpha, c), last]

    torch.testing.assert_close(
        moment_distance(rescaled(old), rescaled(new), *stats), moment_distance(old, new, *stats), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("linear", [True, False])
def test_groups_and_the_law_of_total_moments(fixture, linear):
    old, new, x, _ = fixture
    group = (torch.arange(500) > 123).long() + (torch.arange(500) > 400)
    parts = [x[group == c] + 2.0 * c for c in range(3)]
    x = torch.cat(parts)
    means, covs = torch.stack([p.mean(0) for p in parts]), torch.stack([covariance(p) for p in parts])
    grouped = [torch.stack(g) for g in zip(*([m.mean(0) for m in forward(old, p)[1]] for p in parts), strict=True)]
    if linear:
        grouped = all_ones(grouped)
    shares = torch.tensor([len(p) / 500 for p in parts], dtype=torch.float64)
    pooled = moment_distance(old, new, x.mean(0), covariance(x), [shares @ g for g in grouped])
    apart = moment_distance(old, new, means, covs, grouped)
    alone = [moment_distance(old, new, means[c], covs[c], [g[c] for g in grouped]) for c in range(3)]
    torch.testing.assert_close(apart, torch.stack(alone), rtol=1e-12, atol=0)
    assert bool((shares @ apart).isclose(pooled, rtol=1e-12, atol=0)) == linear
    assert not apart.mean().isclose(pooled, rtol=1e-3)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("variant", ["exact", "official"])
def test_forms_of_the_covariance(fixture, leading, variant):
    old, new, _, _ = fixture
    generator = torch.Generator().manual_seed(4)
    mean = torch.randn(*leading, 4, generator=generator).double()
    variance = torch.rand(*leading, 4, generator=generator).double()
    factor = torch.randn(*leading, 4, 2, generator=generator).double()
    gates = [torch.rand(*leading, n, generator=generator).double() for n in (8, 6)]
    diagonal, low_rank = torch.diag_embed(variance), factor @ factor.mT
    for dense, given, columns in [
        (diagonal, variance, None),
        (low_rank, None, factor),
        (diagonal + low_rank, variance, factor),
        (diagonal + low_rank, diagonal, factor),
        (0 * diagonal, None, None),
    ]:
        expected = moment_distance(old, new, mean, dense, gates, variant=variant)
        found = moment_distance(old, new, mean, given, gates, factor=columns, variant=variant)
        assert found.shape == leading
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_heads_are_taken_before_the_metric(fixture):
    old, new, _, stats = fixture
    everything = joint_moments(old, new, *stats)
    metric = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    for heads in (slice(1, 3), [1, 2], torch.tensor([1, 2])):
        some = joint_moments(old, new, *stats, heads=heads)
        torch.testing.assert_close(some.second, everything.second[1:, 1:], rtol=1e-12, atol=0)
        torch.testing.assert_close(some.mean, everything.mean[1:], rtol=1e-12, atol=0)
        expected = 0.5 * (metric * everything.second[1:, 1:]).sum()
        found = moment_distance(old, new, *stats, heads=heads, metric=metric)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-5])
def test_single_precision(fixture, step):
    old, _, _, (mean, cov, gates) = fixture
    single = [(w.float(), b.float()) for w, b in old]
    near = [(w.float(), b.float()) for w, b in moved(old, torch.Generator().manual_seed(5), step)]
    found = moment_distance(single, near, mean, cov, gates)
    assert found.dtype == torch.float32
    wide = [[(w.double(), b.double()) for w, b in layers] for layers in (single, near)]
    torch.testing.assert_close(found.double(), moment_distance(*wide, mean, cov, gates), rtol=1e-3, atol=0)


def test_full_precision_under_autocast_and_from_half_stores(fixture):
    old, new, _, (mean, cov, gates) = fixture
    single = [[(w.float(), b.float()) for w, b in layers] for layers in (old, new)]
    for variant in ("exact", "official"):
        expected = moment_distance(*single, mean, cov, gates, variant=variant)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(moment_distance(*single, mean, cov, gates, variant=variant), expected)
        half = [(w.bfloat16(), b.bfloat16()) for w, b in single[0]]
        widened = [(w.float(), b.float()) for w, b in half]
        found = moment_distance(half, single[1], mean, cov, gates, variant=variant)
        assert torch.equal(found, moment_distance(widened, single[1], mean, cov, gates, variant=variant))


def test_kept_reference_serves_many(fixture):
    old, new, _, stats = fixture
    kept = ReferenceMoments(old, *stats)
    for other in (new, old, moved(new, torch.Generator().manual_seed(6))):
        torch.testing.assert_close(kept.compare(other).distance(), moment_distance(old, other, *stats))


def test_layers_without_bias(fixture):
    old, new, _, stats = fixture
    without, zeros = ([[(w, b) for w, _ in layers] for layers in (old, new)] for b in (None, 0))
    zeros = [[(w, torch.zeros(len(w)).double()) for w, _ in layers] for layers in zeros]
    assert torch.equal(moment_distance(*without, *stats), moment_distance(*zeros, *stats))


def test_second_order_divergence(fixture):
    """Small steps of the last layer: half the metric's trace is the Kullback-Leibler divergence, class by class."""
    old, _, x, _ = fixture
    groups = (torch.arange(500) % 3).clamp(max=1)
    gates = forward(old, x)[1]
    logits = forward(old, x, gates)[0]
    shift = 1e-4 * torch.tensor([1.0, -2.0, 0.5]).double()
    new = [*old[:-1], (old[-1][0], old[-1][1] + shift)]
    hessians = class_hessians(logits, groups, 2)
    for c in range(2):
        rows = x[groups == c]
        stats = rows.mean(0), covariance(rows), [g[groups == c].mean(0) for g in gates]
        found = moment_distance(old, new, *stats, metric=hessians[c])
        expected = softmax_kl(logits[groups == c] + shift, logits[groups == c])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_class_hessians(fixture):
    old, _, x, _ = fixture
    logits, groups = forward(old, x)[0], torch.arange(500) % 4
    p = softmax(logits, -1)
    each = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = class_hessians(logits, groups, 5)
    for c in range(4):
        torch.testing.assert_close(found[c], each[groups == c].mean(0))
    assert not found[4].any()
    torch.testing.assert_close(class_hessians(logits)[0], each.mean(0))
    parts = [class_hessians(logits[i], groups[i], 4, "sum") for i in (slice(0, 77), slice(77, 500))]
    torch.testing.assert_close(sum(parts) / 125, found[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": [torch.ones(8)]}, "one tensor for each layer but the last; got 1 for 3"),
        ({"gates": [torch.ones(8), torch.ones(7)]}, r"mean and gates must have \[4, 8, 6\]"),
        ({"mean": torch.ones(5)}, r"mean and gates must have \[4, 8, 6\]"),
        ({"covariance": torch.ones(4, 3)}, r"covariance must have shape \(4, 4\), or \(4,\)"),
        ({"factor": torch.ones(3, 2)}, "factor must have shape"),
        ({"current": []}, "one shape"),
        ({"metric": torch.eye(2)}, "3 outputs that count"),
        ({"variant": "exakt"}, "variant"),
        ({"reference": [(torch.ones(8, 4), None), (torch.ones(6, 7), None), (torch.ones(3, 6), None)]}, "follow one"),
    ],
)
def test_what_does_not_fit_is_refused(fixture, change, message):
    old, new, _, (mean, cov, gates) = fixture
    given = {"reference": old, "current": new, "mean": mean, "covariance": cov, "gates": gates}
    with pytest.raises(ValueError, match=message):
        moment_distance(**(given | change))


def test_class_hessians_refuse():
    with pytest.raises(ValueError, match=r"logits must be \(B, C\)"):
        class_hessians(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="reduction"):
        class_hessians(torch.zeros(2, 3), reduction="none")
    with pytest.raises(ValueError, match=r"groups must have shape \(2,\)"):
        class_hessians(torch.zeros(2, 3), torch.zeros(3).long(), 1)
