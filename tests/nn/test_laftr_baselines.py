"""Stored examples: which ones, what their distance is, and that ranks agree on them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from lightning_ext.functional import output_divergence
from lightning_ext.nn import CoresetEstimator, FullDataEstimator, NTKEstimator
from lightning_ext.testing import run_ddp
from tests.nn.laftr_toys import batches, fitted, images, moved, network, outputs, table

DIVERGENCES = ("kl", "mse", "softmax_l2")


def kept(estimator):
    return estimator.state_dict()["_extra_state"]["kept"]["x"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("net", [network, images])
def test_all_of_the_data_gives_the_distance_itself(net, divergence):
    net = net()
    other, x = moved(net), table()[0]
    expected = output_divergence(outputs(other, x), outputs(net, x), divergence)
    for size in (7, 90):
        found = fitted("full", net, batches(size), divergence=divergence).distance(other)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(kept(fitted("full", net)), x)


def test_it_follows_the_running_statistics_of_each_network():
    net = images()
    other = moved(net, 0.0)
    other[2].running_mean += 1.0
    x = table()[0]
    expected = output_divergence(outputs(other, x), outputs(net, x))
    assert expected > 1e-3
    assert fitted("full", net).distance(other).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_tangent_kernel_is_the_derivative_along_the_change(divergence):
    net = network()
    other, x = moved(net), table()[0]
    start = {name: p.detach() for name, p in net.named_parameters()}
    change = {name: p.detach() - start[name] for name, p in other.named_parameters()}
    old, step = jvp(lambda p: functional_call(net, p, (x,)), (start,), (change,))
    expected = output_divergence(old + step, old, divergence)
    estimator = fitted("ntk", net, divergence=divergence)
    assert estimator.distance(other).item() == pytest.approx(expected.item(), rel=1e-12)
    exact = fitted("full", net, divergence=divergence).distance(other).item()
    assert expected.item() != pytest.approx(exact, rel=1e-3)


def test_with_a_change_in_one_layer_laftr_and_the_tangent_kernel_agree():
    net = network()
    inputs, weights, *_ = (estimator := fitted("laftr", net, divergence="mse", num_samples=180)).reference_batches(net)
    assert torch.allclose(weights, weights[0])  # shares of 1/6, 2/6 and 3/6
    for layer in (0, 2, 4):
        other = moved(net, 0.0)
        other[layer] = moved(net)[layer]
        estimator.reseed(0)
        tangent = NTKEstimator(divergence="mse").fit(net, [inputs]).distance(other).item()
        assert estimator.distance(other).item() == pytest.approx(tangent, rel=1e-12)
    estimator.reseed(0)
    tangent = NTKEstimator(divergence="mse").fit(net, [inputs]).distance(moved(net)).item()
    assert estimator.distance(moved(net)).item() != pytest.approx(tangent, rel=5e-2)


def test_the_tangent_kernel_of_attention():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip
    other = moved(net, 1e-4)
    tangent, exact = (fitted(name, net).distance(other) for name in ("ntk", "full"))
    assert tangent.item() == pytest.approx(exact.item(), rel=1e-2)
    tangent.backward()
    assert other[1].weight.grad.abs().max() > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_random_examples_are_some_of_the_data_each_once():
    x = table()[0]
    estimator = fitted("coreset", size=12)
    rows = [int((x == row).all(1).nonzero()) for row in kept(estimator)]
    assert len(set(rows)) == 12
    assert rows != list(range(12))
    assert torch.equal(kept(estimator), kept(fitted("coreset", size=12)))
    assert not torch.equal(kept(estimator), kept(fitted("coreset", size=12, seed=1)))
    assert len(kept(fitted("coreset", size=500))) == 90
    assert estimator.nbytes == sum(p.nbytes for p in network().parameters()) + 12 * (4 + 3) * 8


def test_every_example_is_chosen_equally_often():
    data = [(torch.arange(10.0)[start : start + 4, None],) for start in (0, 4, 8)]
    net, chosen = nn.Linear(1, 2), torch.zeros(10)
    for seed in range(300):
        chosen[kept(CoresetEstimator(3, seed=seed).fit(net, data)).flatten().long()] += 1
    assert (chosen - 90).abs().max() < 4 * (300 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("size", [1, 7, 25, 90])
def test_memorable_points_have_the_largest_softmax_hessians_of_their_class(size):
    net, (x, labels) = network(), table()
    p = net(x).softmax(1).detach()
    trace = (p * (1 - p)).sum(1)
    best = [torch.where(labels == c, trace, -1.0).topk(4).indices for c in range(3)]
    expected = x[torch.cat(best).sort().values]
    found = kept(fitted("coreset", net, batches(size), size=12, selection="lambda"))
    order = [rows[:, 0].argsort() for rows in (found, expected)]
    assert torch.equal(found[order[0]], expected[order[1]])


def test_a_class_with_few_examples_leaves_its_places_to_others():
    x, labels = table()
    few = (labels != 0) | (torch.arange(90) < 1)
    found = kept(fitted("coreset", data=[(x[few], labels[few])], size=9, selection="lambda"))
    mine = [int(labels[(x == row).all(1)]) for row in found]
    assert [mine.count(c) for c in range(3)] == [1, 4, 4]


def test_what_is_stored_does_not_follow_the_data():
    x, _ = table()
    net = network()
    estimator = FullDataEstimator().fit(net, [x])
    expected = estimator.distance(moved(net)).item()
    x.zero_()
    assert estimator.distance(moved(net)).item() == expected


def test_earlier_examples_keep_the_outputs_of_their_time():
    first, second = batches(45)
    net, later = network(), network(3)
    earlier = fitted("full", net, [first])
    merged = fitted("full", later, [second])
    merged.absorb(earlier)
    other = moved(net)
    expected = (earlier.distance(other) + fitted("full", later, [second]).distance(other)) / 2
    assert merged.distance(other).item() == pytest.approx(expected.item(), rel=1e-12)
    for stranger in (fitted("l2"), fitted("full", heads=[0]), fitted("full", nn.Linear(4, 2).double())):
        with pytest.raises(ValueError, match="only stored examples with the same heads, inputs and outputs"):
            merged.absorb(stranger)


def test_ranks_choose_together():
    data = batches(30)

    def of_rank(rank):
        import torch.distributed as dist

        def total(tensor):
            dist.all_reduce(tensor)
            return tensor

        shard = [data[:1], data[1:]][rank]
        estimators = [
            CoresetEstimator(12, "lambda").fit(network(), shard, reduce=total),
            CoresetEstimator(12).fit(network(), shard, reduce=total),
            FullDataEstimator().fit(network(), shard, reduce=total),
        ]
        try:
            FullDataEstimator().fit(network(), [shard[0][0] * (float("nan") if rank else 1.0)], reduce=total)
        except ValueError as error:
            said = str(error)
        return [kept(estimator) for estimator in estimators], said

    first, second = run_ddp(of_rank)
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)
    assert torch.equal(first[0][2], table()[0])
    assert torch.equal(first[0][0], kept(fitted("coreset", size=12, selection="lambda")))
    rows = [int((table()[0] == row).all(1).nonzero()) for row in first[0][1]]
    assert len(set(rows)) == 12
    assert min(rows) < 30 <= max(rows)  # from both shards
    assert first[1] == second[1] == "inputs and outputs must be finite; there are NaN or infinite ones."


def test_bad_arguments_are_named():
    for kind in (CoresetEstimator, NTKEstimator):
        with pytest.raises(ValueError, match="size must be at least 1, or None for all examples; got 0"):
            kind(0)
        with pytest.raises(ValueError, match="selection must be 'random' or 'lambda'; got 'best'"):
            kind(selection="best")
    assert NTKEstimator().size is None
    with pytest.raises(ValueError, match=r"the target must hold 90 class numbers; got torch.float64, \(90, 4\)"):
        fitted("coreset", data=[(table()[0], table()[0])], selection="lambda")
    with pytest.raises(ValueError, match="inputs must be a tensor to be stored; got dict"):
        CoresetEstimator(inputs=lambda batch: batch).fit(network(), [{"x": table()[0]}])
