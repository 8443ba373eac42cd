"""Conversion in place: what is gated, that gating is scaling of weight rows, and what is left alone."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_ext.nn import (
    GatedFiLM,
    LogUniformBeta,
    LogVarianceGate,
    MLPDecoder,
    MLPEncoder,
    PosteriorGate,
    RateContext,
    RateFiLM,
    RateGate,
    ResNetDecoder,
    ResNetEncoder,
    convert_to_multirate,
    posterior_parameters,
    reconstruction_parameters,
)

F64 = torch.float64


def new_context():
    return RateContext(LogUniformBeta(0.01, 10.0))


def move_gates(*networks, scale=1.0):
    """Away from the identity, so that a wrong channel or sample shows."""
    generator = torch.Generator().manual_seed(7)
    for network in networks:
        for name, parameter in network.named_parameters():
            if "rate_gate" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
                parameter.data += scale * noise.to(parameter.dtype)


def number_of_parameters(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def mlp(hidden=6, latents=2):
    return MLPEncoder([5], [hidden, hidden], latents), MLPDecoder(latents, [hidden], [5])


class ConvEncoder(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.logvar = nn.Linear(2 * channels * 4, 2)  # registered before the layers that run before it
        self.mu = nn.Linear(2 * channels * 4, 2)
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Flatten(),
        )

    def forward(self, x):
        features = self.body(x)
        return self.mu(features), self.logvar(features)


def conv_decoder(channels=4):
    return nn.Sequential(
        nn.Linear(2, 4 * channels),
        nn.Unflatten(1, (channels, 2, 2)),
        nn.ConvTranspose2d(channels, channels, 3, 2, 1, output_padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, 1, 3, 2, 1, output_padding=1),
    )


IMAGE = torch.zeros(2, 1, 8, 8)


def converted_conv(context=None, **kwargs):
    encoder, decoder = ConvEncoder(), conv_decoder()
    context = context or new_context()
    names = convert_to_multirate(encoder, decoder, context, IMAGE, **kwargs)
    return encoder, decoder, context, names


# -- gating is scaling ------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """An encoder that is one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).flatten(1).repeat(1, 2)


LAYERS = {
    "linear": (lambda **k: nn.Linear(4, 6, **k), (4,)),
    "linear-sequence": (lambda **k: nn.Linear(4, 6, **k), (3, 4)),
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, **k), (4, 7)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, 3, stride=2, **k), (4, 6, 5)),
    "conv2d-groups": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), (4, 5, 5)),
    "conv3d": (lambda **k: nn.Conv3d(4, 6, 2, **k), (4, 3, 4, 3)),
    "convT1d": (lambda **k: nn.ConvTranspose1d(4, 6, 3, **k), (4, 4)),
    "convT2d": (lambda **k: nn.ConvTranspose2d(4, 6, 3, stride=2, **k), (4, 3, 3)),
    "convT2d-groups": (lambda **k: nn.ConvTranspose2d(4, 6, 3, groups=2, **k), (4, 3, 3)),
    "convT3d": (lambda **k: nn.ConvTranspose3d(4, 6, 2, **k), (4, 2, 3, 2)),
}


def scaled_rows(layer, gate):
    """Parameters of the layer with the weights of every output channel multiplied by its gate, channel by channel."""
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters() if "rate_gate" not in name}
    weight = parameters["weight"]
    for channel, factor in enumerate(gate):
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            inputs, outputs = weight.shape[0] // layer.groups, weight.shape[1]
            group = channel // outputs
            weight[group * inputs : (group + 1) * inputs, channel % outputs] *= factor
        else:
            weight[channel] *= factor
        if "bias" in parameters:
            parameters["bias"][channel] *= factor
    return parameters


@pytest.mark.parametrize("activation", ["sigmoid", "sqrt"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gating_equals_scaling_the_rows_of_the_weight_and_the_bias(name, bias, activation):
    build, shape = LAYERS[name]
    encoder = OneLayer(build(bias=bias)).double()
    plain, context = copy.deepcopy(encoder.layer), new_context()
    x = torch.randn(4, *shape, dtype=F64)
    latents = plain(x).flatten(1).shape[1]
    decoder = nn.Linear(latents, 3).double()
    names = convert_to_multirate(encoder, decoder, context, x, encoder_activation=activation)
    assert names == ["encoder.layer"]
    move_gates(encoder, scale=2.0)
    betas = torch.tensor([0.01, 0.1, 1.0, 10.0])
    with context.at(betas):
        gated = encoder.layer(x)
        gates = encoder.layer.rate_gate.coefficients(context.t)[0].double()
    assert gates.shape == (4, 6)
    assert (gates[0] - gates[-1]).abs().max() > 0.1
    for sample, gate, output in zip(x, gates, gated, strict=True):
        expected = functional_call(plain, scaled_rows(plain, gate), (sample[None],))[0]
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


# -- one beta per sample ----------------------------------------------------------------------------------------------

BETAS = torch.tensor([0.012, 0.3, 1.0, 9.0, 0.3])


def gated(kind, **kwargs):
    """A converted encoder-decoder pair in eval mode with moved gates, and inputs for it, in float64."""
    if kind == "mlp":
        encoder, decoder, x = *mlp(), torch.randn(5, 5, dtype=F64)
    elif kind == "resnet":
        encoder, decoder, x = ResNetEncoder(2, 8), ResNetDecoder(2, 8), torch.rand(5, 1, 28, 28, dtype=F64)
    else:
        encoder, decoder, x = ConvEncoder(), conv_decoder(), torch.rand(5, 1, 8, 8, dtype=F64)
    encoder, decoder, context = encoder.double(), decoder.double(), new_context()
    convert_to_multirate(encoder, decoder, context, x, **kwargs)
    move_gates(encoder, decoder, scale=0.5)
    for norm in (m for n in (encoder, decoder) for m in n.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)

    def run(x, beta, num_samples=1):
        with context.at(beta, num_samples):
            mu, logvar = encoder(x)
            z = mu.repeat_interleave(num_samples, 0)
            return mu, logvar, decoder(z)

    return encoder.eval(), decoder.eval(), context, x, run


CASES = {
    "mlp": {},
    "resnet": {},
    "conv-paper": {"layout": "paper"},
    "conv-public": {"layout": "public"},
    "conv-table1": {"layout": "table1"},
    "mlp-film": {"conditioning": "film"},
    "mlp-add": {"log_variance": "add", "encoder_activation": "sqrt"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_equals_each_sample_alone(case):
    *_, x, run = gated(case.split("-")[0], **CASES[case])
    mixed = run(x, BETAS)
    for i, beta in enumerate(BETAS):
        alone = run(x[i : i + 1], float(beta))
        for ours, expected in zip(mixed, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], expected, rtol=1e-11, atol=1e-11)
    spread = [(a - b).abs().max() for a, b in zip(run(x, 0.01), run(x, 10.0), strict=True)]
    assert min(spread) > 1e-3, "every output depends on beta"


@pytest.mark.parametrize("case", CASES)
def test_permuting_samples_and_betas_together_permutes_the_outputs(case):
    *_, x, run = gated(case.split("-")[0], **CASES[case])
    order = torch.tensor([3, 0, 4, 1, 2])
    for ours, expected in zip(run(x[order], BETAS[order]), run(x, BETAS), strict=True):
        torch.testing.assert_close(ours, expected[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_mixed_batch_is_the_mean_of_single_gradients(case):
    encoder, decoder, _, x, run = gated(case.split("-")[0], **CASES[case])
    parameters = [*encoder.parameters(), *decoder.parameters()]

    def gradient(x, beta):
        mu, logvar, y = run(x, beta)
        loss = y.square().flatten(1).sum(1) + torch.as_tensor(beta) * (mu.square() + logvar.exp() - logvar).sum(1)
        return torch.autograd.grad(loss.mean(), parameters)

    singles = [gradient(x[i : i + 1], BETAS[i : i + 1]) for i in range(5)]
    for ours, *parts in zip(gradient(x, BETAS), *singles, strict=True):
        torch.testing.assert_close(ours, torch.stack(parts).mean(0), rtol=1e-10, atol=1e-11)


def test_each_sample_may_be_decoded_several_times():
    *_, x, run = gated("conv", layout="public")
    once, often = run(x, BETAS)[2], run(x, BETAS, num_samples=3)[2]
    torch.testing.assert_close(often, once.repeat_interleave(3, 0), rtol=1e-12, atol=1e-12)


def test_betas_of_another_batch_are_refused():
    *_, x, run = gated("mlp")
    with pytest.raises(ValueError, match=r"beta has shape \(5,\) but the layer sees a batch of 4"):
        run(x[:4], BETAS)


def test_without_a_beta_a_converted_network_refuses():
    encoder, _, _, x, _ = gated("mlp")
    with pytest.raises(RuntimeError, match="no beta is set"):
        encoder(x)


# -- the three layouts ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "paper": ["encoder.body.0", "encoder.body.3", "encoder.mu", "encoder.logvar", "decoder.0", "decoder.2"],
    "public": ["encoder.body.1", "encoder.body.4", "decoder.3"],
    "table1": ["encoder.body.1", "encoder.body.4", "decoder.3"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_a_layout(layout):
    encoder, decoder, _, names = converted_conv(layout=layout)
    assert names == LAYOUTS[layout]
    for name in names:
        side, _, path = name.partition(".")
        gate = {"encoder": encoder, "decoder": decoder}[side].get_submodule(path).rate_gate
        assert isinstance(gate, GatedFiLM if layout == "table1" else RateGate)
        scalar = gate.gate if layout == "table1" else gate
        assert scalar.activation == ("sigmoid" if side == "encoder" else "sqrt")


def test_heads_and_output_on_request():
    assert converted_conv(gate_heads=False)[3] == ["encoder.body.0", "encoder.body.3", "decoder.0", "decoder.2"]
    assert converted_conv(gate_output=True)[3] == [*LAYOUTS["paper"], "decoder.5"]


def test_include_and_exclude_are_patterns_of_names():
    assert converted_conv(include=["body.*"])[3] == ["encoder.body.0", "encoder.body.3"]
    assert converted_conv(exclude=["body.?", "2"])[3] == ["encoder.mu", "encoder.logvar", "decoder.0"]
    assert converted_conv(include=["body.*", "mu"], exclude=["body.0"])[3] == ["encoder.body.3", "encoder.mu"]


def test_parameter_counts_of_the_resnet():
    encoder, decoder = ResNetEncoder(), ResNetDecoder()
    assert number_of_parameters(encoder, decoder) == 1_881_217
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(1, 1, 28, 28), layout="public")
    assert number_of_parameters(encoder, decoder) == 1_881_217 + 3_072


def test_parameter_counts_of_the_convolutional_network_in_table_1():
    def block(kind, inputs, outputs, *args, **kwargs):
        return kind(inputs, outputs, *args, **kwargs), nn.BatchNorm2d(outputs), nn.ReLU()

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [1, 128, 256, 512, 1024]
            blocks = [block(nn.Conv2d, a, b, 4, 2, 1) for a, b in itertools.pairwise(widths)]
            self.body = nn.Sequential(*(layer for parts in blocks for layer in parts), nn.Flatten())
            self.mu, self.logvar = nn.Linear(1024, 32), nn.Linear(1024, 32)

        def forward(self, x):
            return self.mu(self.body(x)), self.logvar(self.body(x))

    decoder = nn.Sequential(
        nn.Linear(32, 1024 * 16),
        nn.Unflatten(1, (1024, 4, 4)),
        *block(nn.ConvTranspose2d, 1024, 512, 3, 2, 1),
        *block(nn.ConvTranspose2d, 512, 256, 3, 2, 1, output_padding=1),
        nn.ConvTranspose2d(256, 1, 3, 2, 1, output_padding=1),
        nn.Sigmoid(),
    )
    encoder = Heads()
    base = number_of_parameters(encoder, decoder)
    assert round(base / 1e6, 3) == 17.527
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(1, 1, 28, 28), layout="table1")
    ours = number_of_parameters(encoder, decoder)
    assert round(ours / 1e6, 3) == 17.883
    channels = 128 + 256 + 512 + 1024 + 512 + 256
    # a gate, and two networks 1 - 64 - C, for each norm
    assert ours - base == 2 * channels + 2 * (6 * 128 + 65 * channels)


def test_film_conditions_the_same_layers():
    encoder, _, _, names = converted_conv(conditioning="film")
    assert names == LAYOUTS["paper"]
    assert isinstance(encoder.mu.rate_gate, RateFiLM)


# -- BatchNorm cancels a gate before it -------------------------------------------------------------------------------


def first_block(layout, **kwargs):
    encoder, _, context, _ = converted_conv(layout=layout, gate_heads=False, **kwargs)
    move_gates(encoder)
    x = torch.rand(16, 1, 8, 8)

    def run(beta):
        with context.at(beta), torch.no_grad():
            return encoder.train().body[:2](x)

    return run


def test_one_beta_per_batch_acts_only_after_the_norm():
    before, after = first_block("paper"), first_block("public")
    assert (before(0.01) - before(10.0)).abs().max() < 0.02
    assert (after(0.01) - after(10.0)).abs().max() > 0.1
    mixed = torch.logspace(-2, 1, 16)
    assert (before(mixed) - before(mixed.flip(0))).abs().max() > 0.1


def test_one_beta_per_batch_before_a_batch_norm_warns():
    with pytest.warns(
        UserWarning, match=r"a BatchNorm follows the gates of body.0, body.3, 2: with one beta per batch"
    ):
        converted_conv(one_beta_per_batch=True)


@pytest.mark.parametrize("kwargs", [{}, {"layout": "public", "one_beta_per_batch": True}])
def test_no_warning_where_nothing_cancels(kwargs, recwarn):
    converted_conv(**kwargs)
    assert not recwarn.list


# -- what a conversion leaves alone -----------------------------------------------------------------------------------


def snapshot(*networks):
    return [
        (
            {k: v.clone() for k, v in network.state_dict().items()},
            [(name, m.training, len(m._forward_hooks), type(m)) for name, m in network.named_modules()],
        )
        for network in networks
    ]


def same(before, after):
    for (state, modules), (other_state, other_modules) in zip(before, after, strict=True):
        assert modules == other_modules
        assert list(state) == list(other_state)
        assert all(torch.equal(state[key], other_state[key]) for key in state)


def test_the_dry_run_moves_no_mode_buffer_or_random_state():
    encoder, decoder = ConvEncoder(), conv_decoder()
    encoder.body.insert(3, nn.Dropout(0.5))
    encoder.train()
    encoder.body[1].eval()
    decoder.eval()
    before = snapshot(encoder, decoder)
    random_state = torch.get_rng_state()
    names = convert_to_multirate(encoder, decoder, new_context(), IMAGE)
    assert torch.equal(torch.get_rng_state(), random_state)
    for network, (state, modules) in zip((encoder, decoder), before, strict=True):
        assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
        assert all(network.get_submodule(name).training == training for name, training, *_ in modules)
        hooked = [name for name, m in network.named_modules() if m._forward_hooks]
        assert all(len(network.get_submodule(name)._forward_hooks) == 1 for name in hooked)
    assert len(names) == sum(bool(m._forward_hooks) for n in (encoder, decoder) for m in n.modules())
    assert all(p.grad is None for p in encoder.parameters())


def test_a_network_that_draws_noise_does_not_move_the_random_state():
    class Noisy(MLPEncoder):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    encoder, decoder = Noisy([5], [6], 2), mlp()[1]
    random_state = torch.get_rng_state()
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 5))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_pretrained_checkpoint_loads_with_only_the_gates_missing():
    torch.manual_seed(1)
    base_encoder, base_decoder = ConvEncoder(), conv_decoder()
    encoder, decoder, context, names = converted_conv()
    for network, base, side in ((encoder, base_encoder, "encoder"), (decoder, base_decoder, "decoder")):
        assert {k for k in network.state_dict() if "rate_gate" not in k} == set(base.state_dict())
        report = network.load_state_dict(base.state_dict(), strict=False)
        assert not report.unexpected_keys
        gated = {name.partition(".")[2] for name in names if name.startswith(side)}
        assert set(report.missing_keys) == {f"{name}.rate_gate.{p}" for name in gated for p in ("weight", "bias")}
    x = torch.rand(3, 1, 8, 8)
    with context.at(torch.tensor([0.01, 1.0, 10.0])):
        mu, logvar = encoder.eval()(x)
        expected = base_encoder.eval()(x)
        assert torch.equal(mu, expected[0])
        assert torch.equal(logvar, expected[1])
        assert torch.equal(decoder.eval()(mu), base_decoder.eval()(mu))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kwargs", [{}, {"log_variance": "add"}, {"conditioning": "film"}])
def test_identity_conversion_changes_nothing_at_any_beta(layout, kwargs):
    encoder, decoder = ConvEncoder().eval(), conv_decoder().eval()
    x = torch.rand(3, 1, 8, 8)
    expected = encoder(x)
    picture = decoder(expected[0])
    context = new_context()
    convert_to_multirate(encoder, decoder, context, x, layout=layout, **kwargs)
    for beta in (0.01, 0.7, torch.tensor([0.01, 1.0, 10.0])):
        with context.at(beta):
            assert torch.equal(encoder(x)[0], expected[0])
            assert torch.equal(encoder(x)[1], expected[1])
            assert torch.equal(decoder(expected[0]), picture)


def test_only_the_shape_of_the_example_matters():
    encoder, decoder = (network.double() for network in mlp())
    names = convert_to_multirate(encoder, decoder, new_context(), torch.full((1, 5), torch.nan))
    assert len(names) == 5
    assert all(p.dtype == F64 for p in encoder.parameters()), "gates take the network's precision"


class Reversed(nn.Module):
    """Its layers run in the opposite order of their registration."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(6, 5), nn.Linear(6, 6), nn.Linear(2, 6)

    def forward(self, z):
        return self.last(self.middle(self.first(z).relu()).relu())


def test_the_output_layer_is_the_one_that_runs_last():
    names = convert_to_multirate(mlp()[0], Reversed(), new_context(), torch.zeros(2, 5))
    assert names[-2:] == ["decoder.first", "decoder.middle"]
    names = convert_to_multirate(mlp()[0], Reversed(), new_context(), torch.zeros(2, 5), layout="public")
    assert names[-1:] == ["decoder.middle"], "nor its first linear layer"


def test_layers_that_do_not_run_are_not_gated():
    encoder, decoder = mlp()
    encoder.unused = nn.Linear(3, 3)
    assert "encoder.unused" not in convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 5))


def test_a_shared_layer_is_gated_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.again, self.out = nn.Linear(2, 2), None, nn.Linear(2, 5)
            self.again = self.inner

        def forward(self, z):
            return self.out(self.again(self.inner(z)))

    encoder, decoder, context = mlp()[0], Twice(), new_context()
    names = convert_to_multirate(encoder, decoder, context, torch.zeros(2, 5))
    assert [name for name in names if name.startswith("decoder")] == ["decoder.inner"]
    move_gates(decoder)
    z = torch.randn(3, 2)
    with context.at(0.3):
        gate = decoder.inner.rate_gate.coefficients(context.t)[0]
        once = gate * nn.functional.linear(z, decoder.inner.weight, decoder.inner.bias)
        twice = gate * nn.functional.linear(once, decoder.inner.weight, decoder.inner.bias)
        torch.testing.assert_close(decoder(z), decoder.out(twice))


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_converted_networks_are_copied_with_their_context(how):
    encoder, decoder, context, x, run = gated("conv", layout="table1")
    pair = (encoder, decoder, context)
    if how == "deepcopy":
        other = copy.deepcopy(pair)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    mu, logvar, y = run(x, BETAS)
    assert other[2] is not context
    with other[2].at(BETAS):
        ours = other[0](x)
        assert torch.equal(ours[0], mu)
        assert torch.equal(ours[1], logvar)
        assert torch.equal(other[1](mu), y)
    with context.at(0.01), pytest.raises(RuntimeError, match="no beta is set"):
        other[0](x)


def test_a_compiled_network_follows_beta():
    encoder, _, context, x, _ = gated("mlp")
    compiled = torch.compile(encoder, backend="eager")
    for beta in (0.01, 5.0, BETAS, BETAS.flip(0), 0.01):
        with context.at(beta):
            torch.testing.assert_close(compiled(x), encoder(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="no beta is set"):
        compiled(x)


# -- additive log variance --------------------------------------------------------------------------------------------


def ramp(gate, t):
    return nn.functional.softplus(gate.bias - gate.weight * t) - nn.functional.softplus(torch.zeros(1))


def test_additive_log_variance_with_two_heads():
    encoder, decoder, context = *mlp(), new_context()
    base = copy.deepcopy(encoder)
    convert_to_multirate(encoder, decoder, context, torch.zeros(2, 5), log_variance="add", exclude=["body.*", "mu"])
    assert isinstance(encoder.logvar.rate_gate, LogVarianceGate)
    move_gates(encoder)
    x = torch.randn(4, 5)
    with context.at(0.2) as here:
        mu, logvar = encoder(x)
        expected = base(x)
        assert torch.equal(mu, expected[0])
        torch.testing.assert_close(logvar, expected[1] - ramp(encoder.logvar.rate_gate, here.t))


class JointHead(nn.Module):
    def __init__(self, convolution=False):
        super().__init__()
        self.head = nn.Conv2d(1, 6, 3) if convolution else nn.Linear(5, 6)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize("gate_mean", [True, False])
def test_additive_log_variance_with_one_joint_head(gate_mean):
    encoder, decoder, context = JointHead(), MLPDecoder(3, [4], [5]), new_context()
    base = copy.deepcopy(encoder)
    names = convert_to_multirate(encoder, decoder, context, torch.zeros(2, 5), log_variance="add", gate_heads=gate_mean)
    assert names[0] == "decoder.net.0" if not gate_mean else "encoder.head"
    gate = encoder.head.rate_gate
    assert isinstance(gate, PosteriorGate)
    assert (gate.mean is not None) == gate_mean
    move_gates(encoder)
    x = torch.randn(4, 5)
    with context.at(0.2) as here:
        mu, logvar = posterior_parameters(encoder(x))
        expected_mu, expected_logvar = posterior_parameters(base(x))
        factor = gate.mean.coefficients(here.t)[0] if gate_mean else 1.0
        torch.testing.assert_close(mu, factor * expected_mu)
        torch.testing.assert_close(logvar, expected_logvar - ramp(gate.log_variance, here.t))


def test_additive_log_variance_with_a_convolutional_head():
    encoder, context = JointHead(convolution=True), new_context()
    base = copy.deepcopy(encoder)
    decoder = nn.Sequential(nn.ConvTranspose2d(3, 2, 3), nn.ConvTranspose2d(2, 1, 1))
    convert_to_multirate(encoder, decoder, context, torch.zeros(2, 1, 5, 5), log_variance="add", gate_heads=False)
    move_gates(encoder)
    x = torch.randn(4, 1, 5, 5)
    with context.at(torch.tensor([0.02, 0.2, 2.0, 10.0])) as here:
        mu, logvar = posterior_parameters(encoder(x))
        expected_mu, expected_logvar = posterior_parameters(base(x))
        assert torch.equal(mu, expected_mu)
        shift = ramp(encoder.head.rate_gate.log_variance, here.t)[:, :, None, None]
        torch.testing.assert_close(logvar, expected_logvar - shift)


# -- warnings and errors ----------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.attention = nn.LSTM(5, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        h, _ = self.lstm(x[:, None])
        return self.head(self.attention(h, h, h)[0][:, 0])


def test_recurrent_and_attention_layers_are_listed():
    message = r"not gated: lstm, attention of the encoder stay the same for every beta"
    with pytest.warns(UserWarning, match=message):
        names = convert_to_multirate(Recurrent(), MLPDecoder(2, [4], [5]), new_context(), torch.zeros(2, 5))
    assert names == ["encoder.head", "decoder.net.0"]


def failing(encoder=None, decoder=None, example=None, **kwargs):
    base = mlp()
    return encoder or base[0], decoder or base[1], torch.zeros(2, 5) if example is None else example, kwargs


class Computed(MLPEncoder):
    """Its outputs are not those of its layers."""

    def forward(self, x):
        mu, logvar = super().forward(x)
        return 2 * mu, 0.5 * logvar


class Raises(nn.Linear):
    def forward(self, x):
        raise ArithmeticError("inside the network")


FAILURES = {
    "odd vector": (failing(nn.Linear(5, 3)), ValueError, r"shape \(2, 3\), which does not split into mu and logvar"),
    "unequal heads": (
        failing(type("Uneven", (MLPEncoder,), {"forward": lambda self, x: (x, x[:, 1:])})([5], [4], 2)),
        ValueError,
        r"equal shapes; got \(2, 5\) and \(2, 4\)",
    ),
    "no layer": (failing(include=["nothing"]), ValueError, r"no layer matched.*include=\['nothing'\], exclude=\[\]"),
    "lazy layer": (failing(nn.LazyLinear(4)), ValueError, "layer '' is lazy: run the network once"),
    "heads wanted": (failing(Computed([5], [4], 2), gate_heads=False), ValueError, "mu and logvar were not found"),
    "heads to add to": (failing(Computed([5], [4], 2), log_variance="add"), ValueError, "mu and logvar were not found"),
    "encoder raises": (failing(nn.Sequential(nn.Linear(5, 4), Raises(4, 4))), ArithmeticError, "inside the network"),
    "decoder raises": (failing(decoder=Raises(2, 5)), ArithmeticError, "inside the network"),
    "decoder does not fit": (failing(decoder=nn.Linear(3, 5)), RuntimeError, "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_named_and_leaves_both_networks_as_they_were(case):
    (encoder, decoder, example, kwargs), error, message = FAILURES[case]
    encoder.train()
    if case == "lazy layer":
        with pytest.raises(error, match=message):
            convert_to_multirate(encoder, decoder, new_context(), example, **kwargs)
        return
    before = snapshot(encoder, decoder)
    with pytest.raises(error, match=message):
        convert_to_multirate(encoder, decoder, new_context(), example, **kwargs)
    same(before, snapshot(encoder, decoder))


def test_networks_are_converted_once():
    encoder, decoder = mlp()
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 5))
    for pair in ((encoder, mlp()[1]), (mlp()[0], decoder)):
        with pytest.raises(ValueError, match="the network is multi-rate already"):
            convert_to_multirate(*pair, new_context(), torch.zeros(2, 5))


def test_what_an_encoder_or_decoder_may_return():
    mu, logvar = torch.ones(2, 3), torch.zeros(2, 3)
    for output in ((mu, logvar), [mu, logvar], torch.cat([mu, logvar], 1), {"embedding": mu, "log_covariance": logvar}):
        ours = posterior_parameters(output)
        assert torch.equal(ours[0], mu)
        assert torch.equal(ours[1], logvar)
    assert torch.equal(reconstruction_parameters(mu), mu)
    assert torch.equal(reconstruction_parameters({"reconstruction": mu}), mu)
    for output in ((mu, logvar, mu), {"embedding": mu}, None, (mu, None)):
        with pytest.raises(ValueError, match=f"the encoder returned {type(output).__name__}, which is not"):
            posterior_parameters(output)
    with pytest.raises(ValueError, match="the decoder returned tuple; it must return a tensor or an output with"):
        reconstruction_parameters((mu, logvar))


@pytest.mark.parametrize(
    "choice", [{"layout": "publik"}, {"conditioning": "gates"}, {"log_variance": "plus"}, {"init": "zeros"}]
)
def test_a_misspelt_choice_is_named(choice):
    ((name, value),) = choice.items()
    with pytest.raises(ValueError, match=f"{name} must be .*; got '{value}'"):
        convert_to_multirate(*mlp(), new_context(), torch.zeros(2, 5), **choice)


# -- networks of another library --------------------------------------------------------------------------------------


def test_pythae_networks_are_wrapped_unchanged():
    pytest.importorskip("pythae")
    from pythae.models.nn.default_architectures import Decoder_AE_MLP, Encoder_VAE_MLP
    from pythae.models.vae import VAEConfig

    config = VAEConfig(input_dim=(1, 4, 4), latent_dim=3)
    encoder, decoder, context = Encoder_VAE_MLP(config), Decoder_AE_MLP(config), new_context()
    keys = set(encoder.state_dict())
    names = convert_to_multirate(encoder, decoder, context, torch.zeros(2, 1, 4, 4))
    assert names == ["encoder.layers.0.0", "encoder.embedding", "encoder.log_var", "decoder.layers.0.0"]
    assert {key for key in encoder.state_dict() if "rate_gate" not in key} == keys
    move_gates(encoder, decoder)
    x = torch.rand(3, 1, 4, 4)
    with context.at(torch.tensor([0.01, 0.5, 10.0])):
        mu, _ = posterior_parameters(encoder(x))
        mixed = reconstruction_parameters(decoder(mu))
    with context.at(0.5):
        alone = posterior_parameters(encoder(x))[0][1:2]
        torch.testing.assert_close(mu[1:2], alone)
        torch.testing.assert_close(mixed[1:2], reconstruction_parameters(decoder(alone)))


@pytest.mark.parametrize("norm", [torch.nn.InstanceNorm2d(3), torch.nn.GroupNorm(3, 3)])
def test_a_norm_that_cancels_every_gate_is_named(norm):
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, padding=1), norm, torch.nn.Flatten(), torch.nn.Linear(192, 4)
    )
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    with pytest.warns(UserWarning, match="follows the gates of 0 and divides them out"):
        convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8))


def test_a_norm_over_space_does_not_take_the_gate():
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.LayerNorm([3, 8, 8]), torch.nn.Flatten(), torch.nn.Linear(192, 4)
    )
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    names = convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8), layout="public")
    assert names == ["encoder.0"]


def test_an_excluded_log_variance_head_is_left_alone():
    encoder, decoder = mlp()
    names = convert_to_multirate(
        encoder, decoder, new_context(), torch.zeros(2, 5), log_variance="add", exclude=["logvar"]
    )
    assert "encoder.logvar" not in names
