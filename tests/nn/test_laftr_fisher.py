"""Quadratic distances: Fisher information in closed form, whatever the batches; Kronecker factors with a joint bias."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from lightning_ext.nn import EWCEstimator, KFACEstimator
from lightning_ext.testing import run_ddp
from tests.nn.laftr_toys import batches, fitted, images, moved, network, table


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).detach()


def jacobians(net, x):
    """Of the outputs, ``(N, C, D)``."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    rows = vmap(lambda one: jacrev(lambda p: functional_call(net, p, (one[None],))[0])(params))(x)
    return torch.cat([rows[name].flatten(2) for name in params], 2)


def fisher(kind, divergence):
    """The diagonal, from the definition."""
    net, (x, labels) = network(), table()
    jacobian, p = jacobians(net, x), net(x).softmax(1).detach()
    if divergence == "mse":
        return jacobian.square().sum(1).mean(0)
    if kind == "empirical":
        return torch.einsum("nc,ncd->nd", p - nn.functional.one_hot(labels, 3), jacobian).square().mean(0)
    squared = torch.einsum("nc,ncd->nd", p, jacobian.square())
    return (squared - torch.einsum("nc,ncd->nd", p, jacobian).square()).mean(0)


@pytest.mark.parametrize("size", [1, 7, 25, 90])
@pytest.mark.parametrize(("kind", "divergence"), [("true", "kl"), ("empirical", "kl"), ("true", "mse")])
def test_the_fisher_information_is_the_definition_for_any_batches(kind, divergence, size):
    estimator = fitted("ewc", data=batches(size), fisher=kind, divergence=divergence)
    torch.testing.assert_close(estimator.fisher_diagonal, fisher(kind, divergence), rtol=1e-10, atol=1e-14)


def test_it_is_the_mean_over_labels_of_squared_gradients_not_the_square_of_a_batch():
    net, (x, _) = network(), table()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def squares(one, label):
        def loss(p):
            return -functional_call(net, p, (one[None],)).log_softmax(1)[0, label]

        return torch.cat([g.flatten() for g in grad(loss)(params).values()]).square()

    p = net(x).softmax(1).detach()
    expected = sum(
        (p[:, c, None] * vmap(squares, (0, None))(x, torch.tensor(c))).mean(0) for c in range(3)
    )  # fmt: skip
    found = fitted("ewc").fisher_diagonal
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    drawn = torch.multinomial(p, 1).flatten()
    shortcut = [grads(net, x[part], drawn[part]).square() for part in torch.arange(90).split(30)]
    assert torch.stack(shortcut).mean(0).sum() < 0.15 * found.sum()  # about 1 / 30


def grads(net, x, labels):
    return flat(torch.autograd.grad(nn.functional.cross_entropy(net(x), labels), list(net.parameters())))


def test_drawn_labels_tend_to_the_closed_form():
    found = fitted("ewc", data=batches() * 60, fisher="mc", seed=3).fisher_diagonal
    exact = fisher("true", "kl")
    assert (found - exact).norm() < 0.05 * exact.norm()
    again = fitted("ewc", data=batches() * 60, fisher="mc", seed=3).fisher_diagonal
    assert torch.equal(found, again)


def test_only_heads_that_count_have_fisher_information():
    net = network()
    ours = fitted("ewc", net, heads=[1, 2])
    cut = copy.deepcopy(net)
    cut[-1] = nn.Linear(6, 2).double()
    cut[-1].load_state_dict({name: value[1:] for name, value in net[-1].state_dict().items()})
    expected = fitted("ewc", cut).fisher_diagonal
    found = ours.fisher_diagonal
    body = sum(p.numel() for p in net[:4].parameters())
    torch.testing.assert_close(found[:body], expected[:body], rtol=1e-10, atol=1e-14)
    assert not found[body : body + 6].any()
    data = [(x, labels) for x, labels in batches() if (labels > 0).all()] or [
        (x[labels > 0], labels[labels > 0]) for x, labels in batches()
    ]
    empirical = fitted("ewc", net, data, heads=[1, 2], fisher="empirical").fisher_diagonal
    shifted = fitted("ewc", cut, [(x, labels - 1) for x, labels in data], fisher="empirical").fisher_diagonal
    torch.testing.assert_close(empirical[:body], shifted[:body], rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match=r"labels must be among the heads \[1, 2\]; got \[0, 1, 2\]"):
        fitted("ewc", net, heads=[1, 2], fisher="empirical")


def kfac(net, other, *, joint):
    """Half of sum tr(D^T S D A) for the layers of a chain, with Fisher information of softmax."""
    x = table()[0]
    total, h, inputs = 0.0, x, {}
    for place, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            inputs[place] = h
        h = layer(h)
    p = h.softmax(1).detach()
    for place, a in inputs.items():
        s = net[place](a).detach()
        j = vmap(jacrev(net[place + 1 :]))(s) if place + 1 < len(net) else torch.eye(3).double().expand(len(x), 3, 3)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        S = torch.einsum("nci,ncd,ndj->ij", j, hessian, j) / len(x)
        weight, bias = (getattr(other[place], n) - getattr(net[place], n) for n in ("weight", "bias"))
        if joint:
            a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
            change = torch.cat([weight, bias[:, None]], 1)
        else:
            change = weight
            total += 0.5 * bias @ S @ bias
        A = a.mT @ a / len(x)
        total += 0.5 * torch.trace(change.mT @ S @ change @ A)
    return float(total.detach())


def test_kronecker_factors_have_the_bias_as_one_more_input():
    net = network()
    other = moved(net)
    found = fitted("kfac", net).distance(other).item()
    assert found == pytest.approx(kfac(net, other, joint=True), rel=1e-10)
    assert found != pytest.approx(kfac(net, other, joint=False), rel=1e-2)
    small = fitted("kfac", net, batches(7)).distance(other).item()
    assert small == pytest.approx(found, rel=1e-10)


def test_one_layer_with_squared_error_is_exact():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    other = moved(net)
    exact = fitted("full", net, divergence="mse").distance(other).item()
    assert fitted("kfac", net, divergence="mse").distance(other).item() == pytest.approx(exact, rel=1e-12)
    assert fitted("ewc", net, divergence="mse").distance(other).item() != pytest.approx(exact, rel=1e-2)
    empirical = fitted(
        "kfac", net, [(x, torch.zeros(len(x), 3).double()) for x, _ in batches()], divergence="mse", fisher="empirical"
    )
    assert empirical.distance(other).item() != pytest.approx(exact, rel=1e-2)  # no Gauss-Newton matrix


def test_layers_without_factors_have_their_diagonal():
    net = images().eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[2].weight += 0.3
    pair = [fitted(name, net).distance(other).item() for name in ("kfac", "ewc")]
    assert pair[0] == pytest.approx(pair[1], rel=1e-10)
    assert pair[0] > 1e-5
    assert fitted("kfac", net).distance(moved(net)).item() != pytest.approx(
        fitted("ewc", net).distance(moved(net)).item()
    )


def test_sequences_count_by_their_mean_over_positions():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x = torch.randn(20, 5, 4, dtype=torch.float64)
    data = [(x, torch.zeros(20, 5, dtype=torch.long))]
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.bias[0] += 1e-3
    exact = fitted("full", net, data).distance(other).item()
    for name in ("ewc", "kfac"):
        found = fitted(name, net, data).distance(other).item()
        assert found == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("name", ["ewc", "kfac"])
def test_tasks_add_up(name):
    first, second = batches(45)
    merged = fitted(name, data=[second])
    merged.absorb(fitted(name, data=[first]))
    whole = fitted(name)
    for key, value in whole._kept.items():
        torch.testing.assert_close(merged._kept[key], value, rtol=1e-10, atol=1e-12)
    other = moved(network())
    assert merged.distance(other).item() == pytest.approx(whole.distance(other).item(), rel=1e-10)
    with pytest.raises(ValueError, match="of the same parameters can be merged"):
        merged.absorb(fitted(name, nn.Linear(4, 3).double()))
    with pytest.raises(ValueError, match="of the same parameters can be merged"):
        merged.absorb(fitted("full"))


def test_online_ewc_lets_earlier_tasks_fade():
    parts = [fitted("ewc", data=[part], online_gamma=0.5) for part in batches(30)]
    single = [part.fisher_diagonal.clone() for part in parts]
    parts[1].absorb(parts[0])
    parts[2].absorb(parts[1])
    expected = single[2] + 0.5 * single[1] + 0.25 * single[0]
    torch.testing.assert_close(parts[2].fisher_diagonal, expected, rtol=1e-10, atol=1e-14)
    assert fitted("online-ewc").online_gamma == 1.0


def test_what_was_frozen_at_fit_has_no_fisher_information():
    net = network()
    net[0].requires_grad_(False)
    for name in ("ewc", "kfac"):
        estimator = fitted(name, net)
        assert estimator.distance(moved(net)) > 0
        with pytest.raises(ValueError, match=r"\['0.bias', '0.weight'\] did not require gradients at fit"):
            estimator.distance(network())


def test_two_shards_give_what_one_pass_gives():
    data = batches(30)

    def of_rank(rank):
        import torch.distributed as dist

        def total(tensor):
            dist.all_reduce(tensor)
            return tensor

        shard = [data[:1], data[1:]][rank]
        estimators = [type(e)().fit(network(), shard, reduce=total) for e in (EWCEstimator(), KFACEstimator())]
        drawn = EWCEstimator("mc").fit(network(), [data[0]], reduce=total).fisher_diagonal  # the same data on each
        return [e.distance(moved(network())).detach() for e in estimators], drawn

    first, second = run_ddp(of_rank)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    expected = [fitted(name).distance(moved(network())).detach() for name in ("ewc", "kfac")]
    torch.testing.assert_close(first[0], expected, rtol=1e-10, atol=1e-13)
    alone = fitted("ewc", data=[data[0]], fisher="mc").fisher_diagonal
    assert not torch.equal(first[1], alone)  # ranks draw labels of their own


def test_the_diagonal_and_factors_agree_with_other_libraries():
    curvlinops = pytest.importorskip("curvlinops")
    net, other = network(), moved(network())
    params = list(net.parameters())
    step = flat([b - a for a, b in zip(net.parameters(), other.parameters(), strict=True)])
    operator = curvlinops.GGNLinearOperator(net, nn.CrossEntropyLoss(), params, batches())
    ggn = torch.stack([torch.cat([part.flatten() for part in column]) if isinstance(column, list) else column.flatten()
                       for column in (operator @ unit for unit in torch.eye(len(step)).double())])  # fmt: skip
    torch.testing.assert_close(fitted("ewc").fisher_diagonal, ggn.diagonal(), rtol=1e-8, atol=1e-12)
    x = table()[0]
    tangent = fitted("ntk", net).distance(moved(net, 1e-5)).item()
    step = flat([b - a for a, b in zip(net.parameters(), moved(net, 1e-5).parameters(), strict=True)])
    assert tangent == pytest.approx(float(0.5 * step @ ggn @ step), rel=1e-3)
    assert len(x) == 90


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="fisher must be one of 'true', 'mc', 'empirical'; got 'exact'"):
        EWCEstimator("exact")
    with pytest.raises(ValueError, match="KFACEstimator knows 'kl' and 'mse'; got divergence='softmax_l2'"):
        KFACEstimator(divergence="softmax_l2")
    for gamma in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"online_gamma must lie in \(0, 1\]"):
            EWCEstimator(online_gamma=gamma)
