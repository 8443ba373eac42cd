"""A replayed network is affine in each single weight, where it is the reference's own linearisation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from lightning_ext.functional import ActivationSite, RecordActivations, ReplayActivations, gates


class Residual(nn.Module):
    """Branches that add up, with an activation called twice."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x):
        h = self.activation(self.first(x))
        if isinstance(self.activation, nn.GELU):
            h += 0.5 * x  # what a recorded value must survive
        return self.last(self.activation(h + self.second(h)))


class Separate(nn.Module):
    """Attention whose query, key and value weights are tensors of their own."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False, batch_first=True)
        self.last, self.need_weights = nn.Linear(4, 3), need_weights

    def forward(self, x):
        mask = torch.tensor([[True, False, False, False, False]] * len(x))
        keys, values = x[..., :3], torch.cat([x, x[..., :1]], -1)
        out, _ = self.attention(x, keys, values, key_padding_mask=mask, need_weights=self.need_weights)
        return self.last(out)


def dense(*layers, width=8):
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(width, 3))


def conv(*layers, width):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(width, 3))


VECTORS, IMAGES, TOKENS = (7, 6), (4, 1, 6, 6), (3, 5, 4)
NETS = {
    "relu": (lambda: dense(nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True)), VECTORS),
    "leaky relu": (lambda: dense(nn.LeakyReLU(0.2), nn.LeakyReLU(inplace=True)), VECTORS),
    "prelu": (lambda: dense(nn.PReLU(8)), VECTORS),
    "gelu": (lambda: dense(nn.GELU(), nn.Linear(8, 8), nn.GELU("tanh")), VECTORS),
    "silu": (lambda: dense(nn.SiLU(inplace=True), nn.Linear(8, 8), nn.Mish()), VECTORS),
    "tanh": (lambda: dense(nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.LogSigmoid()), VECTORS),
    "softplus": (lambda: dense(nn.Softplus(beta=2.0), nn.Linear(8, 8), nn.Softsign()), VECTORS),
    "elu": (lambda: dense(nn.ELU(0.7, inplace=True), nn.Linear(8, 8), nn.CELU(1.3), nn.SELU()), VECTORS),
    "hardtanh": (lambda: dense(nn.Hardtanh(), nn.Linear(8, 8), nn.ReLU6(), nn.Hardswish(), nn.RReLU()), VECTORS),
    "softmax": (lambda: dense(nn.Softmax(-1)), VECTORS),
    "layer norm": (lambda: dense(nn.LayerNorm(8), nn.ReLU(), nn.RMSNorm(8)), VECTORS),
    "dropout in eval": (lambda: dense(nn.ReLU(), nn.Dropout(0.5)), VECTORS),
    "residual": (lambda: Residual(nn.ReLU()), VECTORS),
    "smooth residual": (lambda: Residual(nn.GELU()), VECTORS),
    "batch norm": (lambda: conv(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), width=32), IMAGES),
    "group norm": (lambda: conv(nn.GroupNorm(2, 4), nn.SiLU(), nn.InstanceNorm2d(4, affine=True), width=144), IMAGES),
    "max-pool": (
        lambda: conv(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), width=16),
        IMAGES,
    ),
    "average pool": (lambda: conv(nn.ReLU(), nn.AvgPool2d(2), nn.Tanh(), width=36), IMAGES),
    "attention": (lambda: Separate(need_weights=False), TOKENS),
    "attention with weights": (lambda: Separate(need_weights=True), TOKENS),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.3), nn.Linear(4, 3)),
        TOKENS,
    ),
    "pre-norm transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
        TOKENS,
    ),
}
# Query and key weights in one tensor, or a weight in front of both: the scores are quadratic in it.
QUADRATIC = ("self_attn.in_proj", "norm1")


def build(name):
    make, shape = NETS[name]
    torch.manual_seed(1)
    net = make().double().eval()
    for buffer, value in net.named_buffers():
        if buffer.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    params = {name: value.detach() + 0.1 * torch.randn_like(value) for name, value in net.named_parameters()}
    x = torch.randn(*shape, dtype=torch.float64)
    return (lambda p, x=x: functional_call(net, p, (x,))), params, x


def record(f, params):
    with torch.no_grad(), RecordActivations() as tape:
        outputs = f(params)
    return tape, outputs


def replay(f, params, sites):
    with ReplayActivations(sites):
        return f(params)


@pytest.fixture(autouse=True)
def forward_derivatives_of_attention(monkeypatch):
    """The oracle needs attention kernels that know their forward derivative."""

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", NETS)
def test_a_recorded_pass_is_the_networks_own_and_replays_bit_for_bit(name):
    f, params, _ = build(name)
    tape, outputs = record(f, params)
    torch.testing.assert_close(outputs, f(params), rtol=1e-12, atol=1e-13)
    assert torch.equal(replay(f, params, tape.sites), outputs)
    assert not tape.others


@pytest.mark.parametrize("name", NETS)
def test_in_a_single_weight_it_is_the_tangent_of_the_reference(name):
    f, params, _ = build(name)
    tape, outputs = record(f, params)
    tested = 0
    for key in params:
        if any(word in key for word in QUADRATIC) and "transformer" in name:
            continue
        change = 0.7 * torch.randn_like(params[key])
        tangent = jvp(lambda value, key=key: f({**params, key: value}), (params[key],), (change,))[1]
        for step in (1.0, -3.0):
            moved = replay(f, {**params, key: params[key] + step * change}, tape.sites) - outputs
            torch.testing.assert_close(moved, step * tangent, rtol=1e-12, atol=1e-13 * (1 + moved.abs().max().item()))
        tested += 1
    assert tested >= 4 or name == "prelu"


@pytest.mark.parametrize("name", NETS)
def test_in_several_weights_it_is_not(name):
    f, params, _ = build(name)
    tape, outputs = record(f, params)
    change = {key: 0.7 * torch.randn_like(value) for key, value in params.items()}
    tangent = jvp(f, (params,), (change,))[1]
    moved = replay(f, {key: params[key] + change[key] for key in params}, tape.sites) - outputs
    assert (moved - tangent).abs().max() > 1e-2 * tangent.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_its_first_derivative_is_the_networks_own(name):
    f, params, _ = build(name)
    tape, outputs = record(f, params)
    cotangent = torch.randn_like(outputs)
    ours = grad(lambda p: (replay(f, p, tape.sites) * cotangent).sum())(params)
    theirs = grad(lambda p: (f(p) * cotangent).sum())(params)
    for key in params:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-10, atol=1e-12)


def test_with_relu_it_is_the_network_with_frozen_masks():
    f, params, x = build("relu")
    other = {key: value + 0.5 * torch.randn_like(value) for key, value in params.items()}
    tape, _ = record(f, params)

    def layer(p, i, h):
        return h @ p[f"{i}.weight"].mT + p[f"{i}.bias"]

    first = layer(params, 0, x)
    second = layer(params, 2, first.relu())
    hidden = (first > 0) * layer(other, 0, x)
    expected = layer(other, 4, (second > 0) * layer(other, 2, hidden))
    torch.testing.assert_close(replay(f, other, tape.sites), expected, rtol=1e-13, atol=1e-13)


def test_with_attention_it_keeps_the_products_and_expands_the_softmax():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    q1, k1, v1 = (x + 0.5 * torch.randn_like(x) for x in (q, k, v))
    causal = torch.ones(4, 4).tril().bool()

    def scores(q, k):
        return (0.7 * q @ k.mT).masked_fill(~causal, -50.0)

    def run(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(F, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention)
        with RecordActivations() as tape:
            run(q, k, v)
        with ReplayActivations(tape.sites):
            found = run(q1, k1, v1)
        weights, change = jvp(lambda s: s.softmax(-1), (scores(q, k),), (scores(q1, k1) - scores(q, k),))
    torch.testing.assert_close(found, (weights + change) @ v1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"attn_mask": torch.randn(4, 4).double()},
        {"attn_mask": torch.ones(4, 4).tril(1).bool()},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_attention_is_torchs_own(arguments, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention)
    q = torch.randn(2, 4, 4, 3).double()
    k, v = (torch.randn(2, 2 if "enable_gqa" in arguments else 4, 4, 3).double() for _ in range(2))
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    with RecordActivations() as tape:
        found = F.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert [site.name for site in tape.sites] == ["attention"]


CALLS = {
    "relu": [torch.relu, F.relu, torch.Tensor.relu, torch.relu_, F.relu_, torch.Tensor.relu_, nn.ReLU(inplace=True)],
    "tanh": [torch.tanh, F.tanh, torch.Tensor.tanh, torch.tanh_, torch.Tensor.tanh_, nn.Tanh()],
    "sigmoid": [torch.sigmoid, F.sigmoid, torch.Tensor.sigmoid, torch.sigmoid_, torch.special.expit, nn.Sigmoid()],
    "leaky_relu": [F.leaky_relu, F.leaky_relu_, nn.LeakyReLU()],
    "softmax": [
        lambda x: x.softmax(-1),
        lambda x: torch.softmax(dim=1, input=x),
        lambda x: torch.softmax(x, 1),
        lambda x: F.softmax(x, dim=-1),
        nn.Softmax(1),
    ],
    "clamp": [lambda x: x.clamp(min=0.0), lambda x: torch.clip(x, 0.0), lambda x: x.clone().clamp_(min=0.0)],
}


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls])
def test_every_way_of_calling_is_seen(name, call):
    x, other = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    with RecordActivations() as tape:
        value = call(x.clone())
    torch.testing.assert_close(value, call(x.clone()))
    with ReplayActivations(tape.sites):
        found = call(other.clone())
    expected = value + jvp(CALLS[name][0], (x,), (other - x,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("call", [F.relu_, torch.tanh_, nn.ELU(inplace=True), nn.SiLU(inplace=True)])
def test_in_place_means_in_place(call):
    x = torch.randn(3, 4)
    with RecordActivations() as tape:
        written = x.clone()
        assert call(written) is written
    with ReplayActivations(tape.sites):
        again = x.clone()
        assert call(again) is again
    assert torch.equal(written, again)
    torch.testing.assert_close(written, call(x.clone()))


def test_intercept_and_slope_are_the_affine_map():
    s, other = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    for call in (F.gelu, torch.relu, F.leaky_relu):
        with RecordActivations() as tape:
            call(s)
        [site] = tape.sites
        assert isinstance(site, ActivationSite)
        intercept = 0.0 if site.intercept is None else site.intercept
        torch.testing.assert_close(site.slope * other + intercept, site(other), rtol=1e-13, atol=1e-13)
    with RecordActivations() as tape:
        torch.softmax(s, -1)
    assert tape.sites[0].slope is None
    assert tape.sites[0].intercept is None


def test_a_unit_at_zero_is_closed_as_in_autograd():
    s = torch.tensor([[-1.0, 0.0, 1.0]])
    with RecordActivations() as tape:
        s.relu()
        F.leaky_relu(s, 0.1)
    assert tape.sites[0].gate.tolist() == [[0.0, 0.0, 1.0]]
    torch.testing.assert_close(tape.sites[1].slope, torch.tensor([[0.1, 0.1, 1.0]]))


def test_under_transforms_it_is_what_a_loop_gives():
    f, params, x = build("smooth residual")
    change = {key: torch.randn_like(value) for key, value in params.items()}
    tape, _ = record(f, params)

    def along(step):
        return replay(f, {key: params[key] + step * change[key] for key in params}, tape.sites)

    steps = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(vmap(along)(steps), torch.stack([along(step) for step in steps]))

    def single(row):
        tape, _ = record(lambda p: f(p, row[None]), params)
        moved = {key: params[key] + change[key] for key in params}
        return replay(lambda p: f(p, row[None]), moved, tape.sites)[0]

    torch.testing.assert_close(vmap(single)(x), along(1.0))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x.relu() * x.relu(), {"mul"}),
        (lambda x: x.relu() @ x.tanh().mT, {"matmul"}),
        (lambda x: torch.cat([x.relu(), x], 1).mean() * x.relu(), {"mul"}),
        (lambda x: torch.where(x > 0, x.relu(), x), {"gt"}),
        (lambda x: x.relu().square(), {"square"}),
        (lambda x: x.relu().log_softmax(-1), {"log_softmax"}),
        (lambda x: F.dropout(x.relu(), 0.5, training=True), {"dropout"}),
        (lambda x: F.batch_norm(x.relu(), None, None, training=True), {"batch_norm"}),
        (lambda x: nn.LSTM(4, 3)(x.relu())[0], {"lstm"}),
        (lambda x: torch.ones(4) / (1 + x.relu()), {"div"}),
        (lambda x: x.relu() / torch.full((4,), 2.0), set()),
        (lambda x: torch.ones_like(x.relu()) * x.relu(), set()),
        (lambda x: x.relu() * torch.ones(4) + torch.arange(3).clamp(0, 1).sum() - x.relu().mean(), set()),
    ],
)
def test_others_names_what_is_not_known_to_be_linear(function, names):
    with RecordActivations() as tape:
        function(torch.randn(3, 4))
    assert {name for name in tape.others if "uniform" not in name} == names


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_network_without_activations_is_refused():
    with pytest.raises(RuntimeError, match=r"no activation function was called.*seen: square"), RecordActivations():
        torch.ones(2).square()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(RuntimeError, match="compiled or scripted"), RecordActivations():
        scripted(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.relu(), "called 1 activation functions and the reference 2"),
        (lambda x: x.relu().tanh().tanh(), "at least 3 activation functions and the reference 2"),
        (lambda x: x.tanh().relu(), r"call 0 .* is tanh .* the reference called relu"),
        (lambda x: x[:2].relu(), r"relu with shape \(2, 4\), but the reference called relu with shape \(3, 4\)"),
    ],
)
def test_another_run_than_the_references_is_refused(function, message):
    x = torch.randn(3, 4)
    with RecordActivations() as tape:
        x.relu().tanh()
    with pytest.raises(RuntimeError, match=message), ReplayActivations(tape.sites):
        function(x)


def test_an_error_inside_is_not_hidden_and_the_mode_ends():
    for mode in (RecordActivations(), ReplayActivations([])):
        with pytest.raises(ZeroDivisionError), mode:
            raise ZeroDivisionError
    assert torch.tensor(-1.0).relu() == 0.0


def test_a_batch_of_one_does_not_serve_all():
    with RecordActivations() as tape:
        torch.randn(1, 4).relu()
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\)"), ReplayActivations(tape.sites):
        torch.randn(3, 4).relu()


def test_given_gates_take_the_place_of_the_references_own():
    f, params, x = build("relu")
    tape, _ = record(f, params)
    draws = [torch.bernoulli(torch.full_like(site.gate, 0.5)) for site in tape.sites]
    given = gates(tape.sites, draws)
    hidden = x @ params["0.weight"].mT + params["0.bias"]
    hidden = (draws[0] * hidden) @ params["2.weight"].mT + params["2.bias"]
    expected = (draws[1] * hidden) @ params["4.weight"].mT + params["4.bias"]
    with RecordActivations(given) as again:
        found = f(params)
    torch.testing.assert_close(found, expected)
    assert all(site is one for site, one in zip(again.sites, given, strict=True))


def test_mean_gates_serve_any_batch():
    site = RecordActivations()
    with site:
        F.leaky_relu(torch.randn(3, 4), 0.2)
    [mean] = gates(site.sites, [torch.tensor([0.0, 0.5, 1.0, 1.0])])
    x = torch.ones(5, 4)
    with ReplayActivations([mean]):
        torch.testing.assert_close(F.leaky_relu(x, 0.2), torch.tensor([[0.2, 0.6, 1.0, 1.0]]).expand(5, 4))


def test_what_has_no_gate_is_expanded_under_the_given_ones():
    x = torch.randn(4, 1, 6, 6).double()
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LayerNorm(8)).double()
    with RecordActivations() as tape:
        net(x)
    draws = torch.bernoulli(torch.full_like(tape.sites[0].gate, 0.5))
    given = gates(tape.sites, [draws])
    assert [site is None for site in given] == [False, True, True]
    with pytest.raises(ValueError, match=r"some sites have no gate.*RecordActivations"):
        ReplayActivations(given)
    with RecordActivations(given) as again, torch.no_grad():
        found = net(x)
    expected = net[4](F.max_pool2d(draws * net[0](x), 2).flatten(1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again.sites[2].point, F.max_pool2d(draws * net[0](x), 2).flatten(1))


@pytest.mark.parametrize("call", [F.gelu, torch.tanh, lambda x: F.prelu(x, torch.tensor(0.1)), F.relu6])
def test_gates_refuse_what_has_none(call):
    with RecordActivations() as tape:
        call(torch.randn(2, 3).relu())
    with pytest.raises(ValueError, match=rf"{tape.sites[1].name} has no gate.*mode=\"relu\""):
        gates(tape.sites, [torch.ones(2, 3)])


def test_gates_refuse_other_numbers_and_shapes():
    with RecordActivations() as tape:
        torch.randn(2, 3).relu()
    with pytest.raises(ValueError, match="one tensor for each of 1 ReLU calls; got 2"):
        gates(tape.sites, [torch.ones(3)] * 2)
    with pytest.raises(ValueError, match=r"shape \(3,\), or a batch of them; got \(2, 4\)"):
        gates(tape.sites, [torch.ones(2, 4)])
    with RecordActivations() as smooth:
        torch.randn(2, 3).softmax(-1)
    with pytest.raises(ValueError, match="each of 0 ReLU calls"):
        gates(smooth.sites, [])


def test_channels_lie_where_the_last_layer_put_them():
    x = torch.randn(2, 3, 5)
    with RecordActivations() as tape:
        nn.Linear(5, 4)(nn.Conv1d(3, 6, 1)(x).relu()).relu()
    assert [site.channel for site in tape.sites] == [1, -1]


def test_every_net_of_the_table_is_of_another_kind():
    seen = [tuple(site.name for site in record(*build(name)[:2])[0].sites) for name in NETS]
    assert len(set(itertools.chain(*seen))) >= 24


def test_without_watching_the_expansions_are_the_same():
    network = nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2), nn.Tanh())
    x = torch.randn(5, 1, 4)
    with torch.no_grad(), RecordActivations() as tape:
        network(x).abs()
    with torch.no_grad(), RecordActivations(watch=False) as quick:
        out = network(x).abs()
    assert tape.others == {"abs"}
    assert not quick.others
    for site, twin in zip(tape.sites, quick.sites, strict=True):
        assert torch.equal(site.slope, twin.slope)
        assert site.name == twin.name
    assert not vars(out)


def put(x):
    """The input, by way of another tensor."""
    held = torch.zeros(3, 4)
    held[:, :2] = x[:, :2]
    return held


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: (x * x).relu(), {"mul"}),
        (lambda x: ((x @ torch.ones(4, 4)) * x).relu(), {"mul"}),
        (lambda x: (x / x.sum(1, keepdim=True)).relu(), {"div"}),
        (lambda x: (put(x) * x).relu(), {"mul"}),
        (lambda x: (x @ torch.ones(4, 4) + torch.ones_like(x) * x / 2).relu(), set()),
    ],
)
def test_with_the_inputs_known_their_products_are_no_linear_functions(function, names):
    x = torch.randn(3, 4)
    with RecordActivations(inputs=x) as tape:
        function(x)
    assert tape.others == names
    assert not vars(x)
    with RecordActivations() as tape:
        function(x)
    assert not tape.others


@pytest.mark.parametrize(
    "positive", [F.softplus, torch.sigmoid, lambda p: p.softmax(0), lambda p: F.layer_norm(p, (4,)), torch.tanh]
)
def test_a_function_of_parameters_is_each_networks_own(positive):
    old, new, x = torch.zeros(4), torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.randn(3, 4)
    with RecordActivations(own=[old]) as tape:
        x.relu() * positive(old)
    assert [site.name for site in tape.sites] == ["relu"]
    with ReplayActivations(tape.sites, own=[new]):
        out = x.relu() * positive(new)
    assert torch.equal(out, x.relu() * positive(new))


@pytest.mark.parametrize(
    "clip",
    [
        lambda x, c: torch.clamp(x, max=c), lambda x, c: x.clamp(-c, c), lambda x, c: torch.clamp_max(x, c),
        lambda x, c: x.clone().clamp_(max=c), lambda x, c: x.clip(None, c),
    ],
)  # fmt: skip
def test_learned_bounds_are_each_networks_own(clip):
    x, bound = 2 * torch.randn(30, 4), torch.full((4,), 0.5, requires_grad=True)
    with torch.no_grad(), RecordActivations() as tape:
        clip(x.relu(), torch.ones(4))
    assert tape.others & {"clamp", "clamp_max", "clip"}
    with ReplayActivations(tape.sites):
        out = clip(x.relu(), bound)
    assert torch.equal(out, clip(x.relu(), bound))
    out.sum().backward()
    assert (bound.grad > 0).all()


def test_softmax_without_a_dimension_takes_the_one_that_torch_takes():
    for shape in ((3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)):
        x = torch.randn(shape)
        with pytest.warns(UserWarning, match="Implicit dimension"):
            expected = F.softmax(x)
        with RecordActivations():
            assert torch.equal(F.softmax(x), expected)
