"""The closed form with mean gates against data, draws, and the closed form with random gates."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_ext.functional import gated_distance, gates, mean_gate_distance, mean_gate_moments, moment_distance
from lightning_ext.functional.activation_replay import RecordActivations


class Convolutional(nn.Module):
    """Convolutions with batch normalisation, a residual sum, average pooling, and ReLU in several guises."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Linear(4 * width, 3)

    def forward(self, x):
        x = self.pool(self.relu(self.norm1(self.conv1(x))))
        x = x + F.leaky_relu(self.norm2(self.conv2(x)), 0.1)
        return self.head(x.flatten(1))


def chain():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


class Case:
    """A network, two sets of parameters, and the exact statistics of its inputs in two unequal groups."""

    def __init__(self, module, shape, seed=0, n=60):
        torch.manual_seed(seed)
        module = module.double()
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0.0))
        self.module = module.eval()
        self.trained = [name for name, _ in module.named_parameters()]
        self.old = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
        self.new = {
            name: t + 0.2 * torch.randn_like(t).abs() * t.abs().clamp(min=0.1) if t.is_floating_point() else t
            for name, t in self.old.items()
        }
        d = torch.Size(shape).numel()
        self.x = (torch.randn(n, d).double() @ torch.randn(d, d).double() / d**0.5 + 0.3).reshape(n, *shape)
        self.groups = [slice(0, n // 3), slice(n // 3, n)]
        with torch.no_grad(), RecordActivations() as tape:
            self(self.old, self.x)
        self.sites = tape.sites
        parts = [self.x[g] for g in self.groups]
        self.mean = torch.stack([part.mean(0) for part in parts])
        self.covariance = torch.stack([torch.cov(part.flatten(1).mT, correction=0) for part in parts])
        centred = [part.flatten(1) - part.flatten(1).mean(0) for part in parts]
        self.factor = torch.stack([F.pad(c.mT / len(c) ** 0.5, (0, n - len(c))) for c in centred])
        self.gates = [torch.stack([site.gate[g].mean(0) for g in self.groups]) for site in tape.sites]

    def __call__(self, params, x):
        return functional_call(self.module, params, (x,))

    def gated(self, group, values, **options):
        """The distance on the group's data with given gates."""
        with torch.no_grad(), RecordActivations() as tape:
            self(self.old, self.x[group])
        sites = gates(tape.sites, values)
        return gated_distance(self, self.old, self.new, self.x[group], sites, divergence="mse", **options)

    def on_data(self, **options):
        return torch.stack([self.gated(g, [m[c] for m in self.gates], **options) for c, g in enumerate(self.groups)])

    def distance(self, factor=None, covariance=None, **options):
        new = options.pop("new", self.new)
        return mean_gate_distance(self, self.old, new, self.mean, factor, self.gates, covariance=covariance, **options)


@pytest.fixture(params=["chain", "convolutional"])
def case(request):
    return Case(chain(), (8,)) if request.param == "chain" else Case(Convolutional(), (2, 4, 4))


def test_mean_of_the_data_by_columns_and_by_outputs(case):
    expected = case.on_data()
    assert (expected > 1e-3).all()
    torch.testing.assert_close(case.distance(covariance=case.covariance), expected, rtol=1e-10, atol=0)  # by outputs
    torch.testing.assert_close(case.distance(case.factor), expected, rtol=1e-10, atol=0)  # more columns than outputs
    half = case.covariance / 2
    torch.testing.assert_close(case.distance(case.factor / 2**0.5, half), expected, rtol=1e-10, atol=0)


def test_few_columns(case):
    """Inputs that vary along two directions only."""
    d = case.mean[0].numel()
    columns = torch.randn(2, d, 2, generator=torch.Generator().manual_seed(1)).double()
    expected = case.distance(covariance=columns @ columns.mT)
    torch.testing.assert_close(case.distance(columns), expected, rtol=1e-10, atol=0)
    assert (expected > 1.001 * case.distance()).all()


def test_fewer_of_columns_and_outputs_are_passed(case):
    """The widest batch that the current network sees: the mean and two columns, or the mean alone."""
    seen = []

    def spy(params, x):
        seen.append(len(x))
        return case(params, x)

    for columns, width in ((2, 3), (5, 1)):
        seen.clear()
        mean_gate_distance(spy, case.old, case.new, case.mean, case.factor[..., :columns], case.gates)
        assert max(seen) == width


def test_diagonal_and_no_covariance(case):
    variance = case.covariance.diagonal(dim1=1, dim2=2)
    expected = case.distance(covariance=torch.diag_embed(variance))
    torch.testing.assert_close(case.distance(covariance=variance), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(case.distance(), case.distance(covariance=0 * variance), rtol=1e-12, atol=0)


def test_moments_are_those_of_the_data(case):
    moments = mean_gate_moments(
        case, case.old, case.new, case.mean, None, case.gates, covariance=case.covariance, heads=[2, 0]
    )
    for c, group in enumerate(case.groups):
        outs = []
        for params in (case.old, case.new):
            with torch.no_grad(), RecordActivations(gates(case.sites, [m[c] for m in case.gates])):
                outs.append(case(params, case.x[group])[:, [2, 0]])
        change = outs[1] - outs[0]
        torch.testing.assert_close(moments.mean[c], change.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments.second[c], change.mT @ change / len(change), rtol=1e-10, atol=1e-12)


def test_metric_and_heads(case):
    columns = case.factor[..., :1]
    metric = torch.stack([torch.eye(2).double(), torch.tensor([[2.0, -1.0], [-1.0, 3.0]]).double()])
    root = torch.linalg.cholesky(metric)
    for form in ({"covariance": case.covariance}, {"factor": columns}):
        found = case.distance(**form, metric=metric, heads=slice(1, 3))
        moments = mean_gate_moments(
            case, case.old, case.new, case.mean, form.get("factor"), case.gates, covariance=form.get("covariance")
        )
        expected = (root.mT @ moments.second[:, 1:, 1:] @ root).diagonal(dim1=1, dim2=2).sum(1) / 2
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="outputs that count"):
        case.distance(metric=metric)


def test_at_most_the_distance_with_random_gates():
    case = Case(chain(), (8,))
    layers = [[(p[f"{i}.weight"], p[f"{i}.bias"]) for i in (0, 2, 4)] for p in (case.old, case.new)]
    stats = case.mean, case.covariance
    mean_gate = case.distance(covariance=case.covariance)
    random_gates = moment_distance(*layers, *stats, case.gates)
    assert (mean_gate < 0.9 * random_gates).all()
    binary = [(g > 0.5).double() for g in case.gates]
    found = mean_gate_distance(case, case.old, case.new, case.mean, None, binary, covariance=case.covariance)
    torch.testing.assert_close(found, moment_distance(*layers, *stats, binary), rtol=1e-12, atol=0)


def test_at_most_the_distance_with_draws_of_a_convolutional_network():
    case = Case(Convolutional(), (2, 4, 4))
    generator = torch.Generator().manual_seed(3)
    group, n = case.groups[1], 40
    draws = [
        case.gated(group, [torch.bernoulli(g[1].expand(n, *g.shape[1:]), generator=generator) for g in case.gates])
        for _ in range(200)
    ]
    assert case.distance(covariance=case.covariance)[1] < torch.stack(draws).mean()


def test_nothing_where_nothing_changed_and_a_shift_of_the_last_bias(case):
    last = list(dict(case.module.named_parameters()))[-1]
    shift = torch.tensor([1.0, 2.0, -2.0]).double()
    shifted = {**case.old, last: case.old[last] + shift}
    for form in ({"covariance": case.covariance}, {"factor": case.factor[..., :2]}, {}):
        same = {k: v.clone().requires_grad_(k in case.trained) for k, v in case.old.items()}
        distance = case.distance(**form, new=same)
        assert not distance.any()
        for gradient in torch.autograd.grad(
            distance.sum(), [v for v in same.values() if v.requires_grad], allow_unused=True
        ):
            assert gradient is None or not gradient.any()
        torch.testing.assert_close(case.distance(**form, new=shifted), torch.full((2,), 4.5).double())


def test_gradients(case):
    names = [name for name, _ in case.module.named_parameters()][-4:]
    tensors = [case.new[name].clone().requires_grad_() for name in names]

    def distance(form):
        return lambda *given: case.distance(**form, new={**case.new, **dict(zip(names, given, strict=True))})

    for form in ({"covariance": case.covariance}, {"factor": case.factor[..., :2]}):
        assert torch.autograd.gradcheck(distance(form), tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(distance(form), tensors, fast_mode=True)
    frozen = {k: v.clone().requires_grad_(k in case.trained) for k, v in case.old.items()}
    out = mean_gate_distance(
        case,
        frozen,
        dict(zip(names, tensors, strict=True)) | {k: v for k, v in case.new.items() if k not in names},
        case.mean,
        None,
        case.gates,
    ).sum()
    assert not any(torch.autograd.grad(out, [v for v in frozen.values() if v.requires_grad], allow_unused=True))


def test_statistics_in_double_serve_single_networks_under_autocast():
    case = Case(chain(), (8,))
    old, new = ({k: v.float() for k, v in params.items()} for params in (case.old, case.new))
    for form in ({"covariance": case.covariance}, {"factor": case.factor[..., :2]}):
        found = mean_gate_distance(
            case, old, new, case.mean, form.get("factor"), case.gates, covariance=form.get("covariance")
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), case.distance(**form), rtol=1e-4, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            again = mean_gate_distance(
                case, old, new, case.mean, form.get("factor"), case.gates, covariance=form.get("covariance")
            )
        assert torch.equal(again, found)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.MaxPool1d(2), NotImplementedError, 'max_pool1d.*mode="relu"'),
        (nn.LayerNorm(8), NotImplementedError, "layer_norm"),
        (nn.Softmax(-1), NotImplementedError, "softmax"),
        (nn.GELU(), ValueError, "gelu has no gate"),
    ],
)
def test_other_nonlinearities_are_refused(layer, error, message):
    module = nn.Sequential(nn.ReLU(), layer)
    with pytest.raises(error, match=message):
        mean_gate_distance(
            lambda params, x: functional_call(module, params, (x,)),
            {},
            {"w": torch.ones(1)},
            torch.ones(2, 8),
            None,
            [torch.ones(2, 8)],
        )


def test_unknown_functions_are_refused():
    with pytest.raises(NotImplementedError, match="exp"):
        mean_gate_distance(
            lambda p, x: (x.relu() * p["w"]).exp(),
            {"w": torch.ones(2)},
            {"w": torch.ones(2)},
            torch.ones(1, 2),
            None,
            [torch.ones(1, 2)],
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": torch.ones(8, 2)}, r"factor must have shape \(2, 8, r\)"),
        ({"covariance": torch.ones(2, 7)}, r"covariance must have shape \(2, 8, 8\), or \(2, 8\)"),
        ({"gates": [torch.ones(3, 6), torch.ones(3, 5)]}, "gates must have 2 groups"),
        ({"gates": [torch.ones(2, 6)]}, "one tensor for each of 2"),
        ({"gates": [torch.ones(2, 5), torch.ones(2, 5)]}, r"shape \(6,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(chain(), (8,))
    given = {"mean": case.mean, "factor": None, "gates": case.gates}
    with pytest.raises(ValueError, match=message):
        mean_gate_distance(case, case.old, case.new, **(given | change))


@pytest.mark.parametrize("function", [lambda x: x * x, lambda x: x / x.sum(1, keepdim=True)])
def test_functions_of_the_input_that_are_not_linear_are_refused(function):
    case = Case(chain(), (8,))
    with pytest.raises(NotImplementedError, match=r"mul|div"):
        mean_gate_moments(
            lambda p, x: case(p, function(x)), case.old, case.new, case.mean, case.factor, case.gates
        )  # fmt: skip
