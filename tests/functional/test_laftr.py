"""The sampled function-space distance is exact where the mathematics says so, and unbiased elsewhere."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.utils.checkpoint import checkpoint

from lightning_ext.functional import (
    InputStatistics,
    RecordActivations,
    gated_distance,
    gates,
    output_divergence,
    softmax_kl,
    softmax_squared_error,
    squared_error,
)

DIVERGENCES = {"kl": softmax_kl, "mse": squared_error, "softmax_l2": softmax_squared_error}
NETS = {
    "relu": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
    "smooth": lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.ReLU(inplace=True), nn.MaxPool1d(2, 1), nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(),
        nn.Linear(8, 3),
    ),
}  # fmt: skip


def build(name="relu", n=50, dtype=torch.float64, scale=0.5):
    """Forward function, reference, current parameters and inputs."""
    torch.manual_seed(2)
    net = NETS[name]().to(dtype).eval()
    reference = {key: value.detach() for key, value in net.named_parameters()}
    current = {key: value + scale * torch.randn_like(value) for key, value in reference.items()}
    return lambda p, x: functional_call(net, p, (x,)), reference, current, torch.randn(n, 4, dtype=dtype)


def recorded(forward, params, x):
    with torch.no_grad(), RecordActivations() as tape:
        forward(params, x)
    return tape.sites


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_relu_it_is_the_divergence_from_the_network_with_frozen_masks(divergence):
    forward, reference, current, x = build()

    def run(p, masks=None):
        h, used = x, []
        for i in (0, 2, 4):
            h = h @ p[f"{i}.weight"].mT + p[f"{i}.bias"]
            if i < 4:
                used.append(h > 0 if masks is None else masks[len(used)])
                h = h * used[-1]
        return h, used

    old, masks = run(reference)
    expected = DIVERGENCES[divergence](run(current, masks)[0], old)
    found = gated_distance(forward, reference, current, x, divergence=divergence)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    exact = DIVERGENCES[divergence](forward(current, x), old)
    assert found.item() != pytest.approx(exact.item(), rel=1e-2)


def test_one_group_for_each_example_gives_back_the_distance_on_the_data():
    forward, reference, current, x = build()
    sites = recorded(forward, reference, x)
    statistics = InputStatistics.zeros((4,), sites, num_groups=len(x)).add(x, torch.arange(len(x)), sites)
    model = statistics.finalise(jitter=0.0)
    drawn, weights, group = model.sample(len(x))
    torch.testing.assert_close(drawn, x, rtol=1e-14, atol=1e-14)
    given = gates(sites, model.draw_gates(group))
    for divergence in DIVERGENCES:
        found = gated_distance(forward, reference, current, drawn, given, divergence=divergence, weights=weights)
        expected = gated_distance(forward, reference, current, x, divergence=divergence)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_scalar_network_by_hand():
    def forward(p, x):
        return p["v"] * (p["w"] * x).relu()

    reference = {"w": torch.ones(1).double(), "v": torch.ones(1).double()}
    current = {"w": torch.full((1,), 3.0).double(), "v": torch.full((1,), 2.0).double()}
    x = torch.tensor([[1 - 2**0.5], [1 + 2**0.5]], dtype=torch.float64)  # mean 1, variance 2
    cases = list(itertools.product(x.flatten().tolist(), [0.0, 1.0]))
    inputs, draws = (torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*cases, strict=True))
    given = gates(recorded(forward, reference, x), [draws])
    found = gated_distance(forward, reference, current, inputs, given, divergence="mse")
    assert found.item() == pytest.approx(18.75, rel=1e-13)  # mu / 2 (v1 w1 - v0 w0)^2 (Var + mean^2)


@pytest.mark.parametrize("name", NETS)
def test_a_change_of_the_last_layer_is_measured_exactly(name):
    forward, reference, current, x = build(name)
    last = [key for key in reference if key.startswith(list(reference)[-1].split(".")[0] + ".")]
    current = {**reference, **{key: current[key] for key in last}}
    for divergence, rho in DIVERGENCES.items():
        expected = rho(forward(current, x), forward(reference, x))
        found = gated_distance(forward, reference, current, x, divergence=divergence)
        assert found.item() == pytest.approx(expected.item(), rel=1e-11)
    shifted = {**reference, last[-1]: reference[last[-1]] + torch.tensor([1.0, 2.0, -2.0])}
    found = gated_distance(forward, reference, shifted, x, divergence="mse")
    assert found.item() == pytest.approx(4.5, rel=1e-12)


def test_no_switch_no_error():
    forward, reference, current, x = build(scale=1e-5)
    switches = [
        int((one.gate != two.gate).sum())
        for one, two in zip(recorded(forward, reference, x), recorded(forward, current, x), strict=True)
    ]
    assert sum(switches) == 0
    for divergence, rho in DIVERGENCES.items():
        expected = rho(forward(current, x), forward(reference, x))
        found = gated_distance(forward, reference, current, x, divergence=divergence)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_at_the_reference_it_is_zero_with_its_gradient(name, dtype):
    forward, reference, current, x = build(name, dtype=dtype)
    same = {key: value.clone().requires_grad_() for key, value in reference.items()}
    options = [None]
    if name == "relu":
        sites = recorded(forward, reference, x)
        options.append(gates(sites, [torch.bernoulli(torch.full_like(site.gate, 0.5)) for site in sites]))
    for sites, divergence in itertools.product(options, DIVERGENCES):
        value = gated_distance(forward, reference, same, x, sites, divergence=divergence)
        assert value.item() == pytest.approx(0.0, abs=torch.finfo(dtype).eps)  # kernels may differ between the two
        for gradient in torch.autograd.grad(value, list(same.values())):
            assert gradient.abs().max() <= torch.finfo(dtype).eps
        assert gated_distance(forward, reference, current, x, sites, divergence=divergence) > 0.0


@pytest.mark.parametrize("name", NETS)
def test_its_curvature_at_the_reference_is_the_gauss_newton_matrix(name):
    forward, reference, _, x = build(name)
    direction = {key: torch.randn_like(value) for key, value in reference.items()}
    hvp = jvp(grad(lambda p: gated_distance(forward, reference, p, x)), (reference,), (direction,))[1]
    found = sum((hvp[key] * direction[key]).sum() for key in direction).item()
    step = 1e-5  # attention kernels lack a forward derivative
    there, back = (
        forward({key: reference[key] + sign * step * direction[key] for key in reference}, x) for sign in (1, -1)
    )
    dz, p = (there - back) / (2 * step), forward(reference, x).softmax(-1)
    expected = ((p * dz.square()).sum(-1) - (p * dz).sum(-1).square()).mean().item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_scaling_a_unit_up_and_its_output_down_in_both_networks_changes_nothing():
    forward, reference, current, x = build()
    factors = torch.linspace(0.2, 5.0, 8, dtype=torch.float64)

    def rescaled(p):
        first = {"0.weight": p["0.weight"] * factors[:, None], "0.bias": p["0.bias"] * factors}
        return {**p, **first, "2.weight": p["2.weight"] / factors}

    for divergence in DIVERGENCES:
        expected = gated_distance(forward, reference, current, x, divergence=divergence)
        found = gated_distance(forward, rescaled(reference), rescaled(current), x, divergence=divergence)
        assert found.item() == pytest.approx(expected.item(), rel=1e-11)


def test_gradients_are_those_of_finite_differences():
    forward, reference, current, x = build(n=5)
    keys = list(current)

    def distance(*values):
        return gated_distance(forward, reference, dict(zip(keys, values, strict=True)), x)

    assert torch.autograd.gradcheck(distance, [current[key].requires_grad_() for key in keys])


@pytest.mark.parametrize("name", NETS)
def test_the_reference_gets_no_gradient(name):
    forward, reference, current, x = build(name)
    reference = {key: value.clone().requires_grad_() for key, value in reference.items()}
    current = {key: value.requires_grad_() for key, value in current.items()}
    gated_distance(forward, reference, current, x).backward()
    assert all(value.grad is None for value in reference.values())
    assert all(value.grad is not None for value in current.values())


def estimates(model, sites, forward, reference, current, num, repeats, shared=False):
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        x, weights, group = model.sample(num, generator)
        drawn = model.draw_gates(group, generator)
        drawn = [draw[0] for draw in drawn] if shared else drawn
        yield gated_distance(forward, reference, current, x, gates(sites, drawn), divergence="mse", weights=weights)


def test_noise_falls_with_the_number_of_samples_because_gates_are_drawn_for_each():
    forward, reference, current, x = build(n=500)
    sites = recorded(forward, reference, x)
    model = InputStatistics.zeros((4,), sites).add(x, sites=sites).finalise()

    def noise(num, shared=False):
        values = torch.stack(list(estimates(model, sites, forward, reference, current, num, 60, shared)))
        return (values.std() / values.mean()).item()

    assert noise(1600) < 0.25 * noise(40)  # 1 / sqrt(40) = 0.16
    assert noise(1600, shared=True) > 3 * noise(1600)


def test_with_one_gate_draw_the_mean_is_that_of_all_gate_patterns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    reference = {key: value.detach() for key, value in net.named_parameters()}
    current = {key: value + torch.randn_like(value) for key, value in reference.items()}
    x = torch.randn(30, 2).double()

    def forward(p, x):
        return functional_call(net, p, (x,))

    sites = recorded(forward, reference, x)
    model = InputStatistics.zeros((2,), sites).add(x, sites=sites).finalise(jitter=0.0)
    [mean], expected = [gate[0] for gate in model.gate_means()], 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=3):
        gate = torch.tensor(pattern).double()
        share = torch.where(gate > 0, mean, 1 - mean).prod()
        expected += share * gated_distance(forward, reference, current, x, gates(sites, [gate]), divergence="mse")
    [found] = estimates(model, sites, forward, reference, current, 200_000, 1)
    assert found.item() == pytest.approx(expected.item(), rel=0.015)


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_in_single_precision_small_steps_are_still_measured(divergence, scale):
    forward, reference, current, x = build(scale=scale)

    def value_and_gradient(dtype):
        first = {key: value.to(dtype) for key, value in reference.items()}
        second = {key: value.to(dtype).requires_grad_() for key, value in current.items()}
        value = gated_distance(forward, first, second, x.to(dtype), divergence=divergence)
        assert value.dtype == dtype
        gradients = torch.autograd.grad(value, list(second.values()))
        return value.item(), torch.cat([gradient.flatten().double() for gradient in gradients])

    expected, slope = value_and_gradient(torch.float64)
    found, ours = value_and_gradient(torch.float32)
    assert (ours - slope).norm() < 1e-5 / scale * slope.norm()
    # terms of the Kullback-Leibler divergence have both signs, so that its rounding does not shrink with it
    assert found == pytest.approx(expected, rel=1e-5 / scale, abs=2e-8 if divergence == "kl" else 0.0)


@pytest.mark.parametrize("heads", [slice(0, 2), [0, 2], torch.tensor([2, 1])])
def test_heads_are_chosen_before_anything_else(heads):
    forward, reference, current, x = build()
    chosen = gated_distance(forward, reference, current, x, heads=heads)
    cut = gated_distance(lambda p, x: forward(p, x)[..., heads], reference, current, x)
    assert chosen.item() == pytest.approx(cut.item(), rel=1e-13)
    assert chosen.item() != pytest.approx(gated_distance(forward, reference, current, x).item(), rel=1e-3)


def test_weights_make_groups_count_by_their_share():
    forward, reference, current, x = build()
    rows = torch.stack([gated_distance(forward, reference, current, row[None]) for row in x])
    weights = torch.rand(len(x), dtype=torch.float64)
    found = gated_distance(forward, reference, current, x, weights=weights)
    assert found.item() == pytest.approx((weights @ rows).item(), rel=1e-11)
    assert gated_distance(forward, reference, current, x).item() == pytest.approx(rows.mean().item(), rel=1e-11)


def test_positions_of_a_sequence_are_averaged():
    new, old = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    expected = softmax_kl(new.flatten(0, 1), old.flatten(0, 1))
    torch.testing.assert_close(output_divergence(new, old), expected)


def test_what_does_not_fit_is_refused():
    forward, reference, current, x = build()
    with pytest.raises(ValueError, match="divergence must be one of 'kl', 'mse', 'softmax_l2'; got 'l2'"):
        gated_distance(forward, reference, current, x, divergence="l2")
    with pytest.raises(ValueError, match=r"weights must have shape \(50,\)"):
        gated_distance(forward, reference, current, x, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"of one shape; got \(2, 3\) and \(2, 4\)"):
        output_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"must be \(S, ..., C\).*\(3,\)"):
        output_divergence(torch.zeros(3), torch.zeros(3))
    sites = recorded(forward, reference, x)
    with pytest.raises(RuntimeError, match=r"shape \(50, 8\), but the reference called relu with shape \(9, 8\)"):
        gated_distance(forward, reference, current, x, gates(sites, [torch.ones(9, 8), torch.ones(9, 6)]))
    with pytest.raises(RuntimeError, match="no activation function was called"):
        gated_distance(lambda p, x: x @ p["0.weight"].mT, reference, current, x)


def test_a_function_of_parameters_alone_is_measured_exactly():
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    reference = {"w": torch.randn(4, 3), "scale": torch.zeros(3)}
    current = {"w": reference["w"], "scale": torch.tensor([2.0, -1.0, 0.5])}

    def forward(p, x):
        return (x @ p["w"]).relu() * torch.nn.functional.softplus(p["scale"])

    expected = squared_error(forward(current, x), forward(reference, x))
    found = gated_distance(forward, reference, current, x, divergence="mse")
    torch.testing.assert_close(found, expected)


def test_what_would_be_computed_again_without_the_reference_is_refused():
    forward, reference, current, x = build()
    for value in current.values():
        value.requires_grad_()

    def saving(p, x):
        return checkpoint(forward, p, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match="activation checkpointing"):
        gated_distance(saving, reference, current, x)
    plain = gated_distance(forward, reference, current, x)
    with torch.autograd.graph.save_on_cpu():  # of the caller
        assert torch.equal(gated_distance(forward, reference, current, x), plain)
    assert torch.isfinite(saving(current, x)).all()
