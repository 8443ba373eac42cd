"""Curvature operators against dense matrices in float64, over batches, ranks and caches; against a peer where it is."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_ext.functional import (
    CallableLoss,
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    InfluenceObjective,
    ParameterView,
    concatenate,
    evaluating,
    kronecker_curvature,
    select,
)
from lightning_ext.functional import curvature as curvature_file

OPERATORS = [GGNOperator, HessianOperator, EmpiricalFisherOperator]


class Tied(nn.Module):
    """Embedding and head share their weight, the body's bias is frozen, the batch is a dictionary."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.body.bias.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.drop(self.body(self.embed(tokens)).tanh()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x)[0][:, -1])


def xy(size, shape, targets):
    torch.manual_seed(1)
    return torch.randn(size, *shape, dtype=torch.float64), targets(size)


def labels(classes, *shape):
    return lambda size: torch.randint(classes, (size, *shape))


def reals(*shape):
    return lambda size: torch.randn(size, *shape, dtype=torch.float64)


def tokens(size):
    torch.manual_seed(1)
    target = torch.randint(5, (size, 3))
    return {"ids": torch.randint(5, (size, 3)), "target": target.masked_fill(torch.rand(size, 3) < 0.3, -100)}


def perceptron():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def pseudo_huber(y, t):
    return (1 + (y - t).square()).sqrt().sum(1)


CASES = {
    "softmax": (perceptron, InfluenceObjective(), xy(7, (3,), labels(4))),
    "half square": (perceptron, InfluenceObjective("half_squared_error"), xy(7, (3,), reals(4))),
    "mse": (perceptron, InfluenceObjective("mse"), xy(7, (3,), reals(4))),
    "bernoulli": (perceptron, InfluenceObjective("bce"), xy(7, (3,), lambda n: torch.rand(n, 4).double())),
    "poisson": (perceptron, InfluenceObjective("poisson_nll"), xy(7, (3,), labels(4, 4))),
    "callable": (perceptron, InfluenceObjective(CallableLoss(pseudo_huber)), xy(7, (3,), reals(4))),
    "flat outputs": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)),
        InfluenceObjective("bce"),
        xy(7, (3,), lambda n: torch.rand(n).double()),
    ),
    "tied tokens": (Tied, InfluenceObjective(forward="ids", target="target"), tokens(7)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        InfluenceObjective(),
        xy(7, (1, 3, 3), labels(3)),
    ),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(8, 3)),
        InfluenceObjective(),
        xy(4, (2, 4), labels(3)),
    ),
    "recurrent": (Recurrent, InfluenceObjective(), xy(5, (2, 3), labels(2))),
}
CASE = pytest.mark.parametrize("case", CASES)


def build(case):
    make, objective, batch = CASES[case]
    torch.manual_seed(0)
    module = make().double()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return module.eval(), objective, batch


def split(batch, sizes=(2, 1)):
    """Batches of unequal size."""
    size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
    sizes = [*sizes, size - sum(sizes)]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [select(batch, range(a, b)) for a, b in pairwise(starts)]


def dense(kind, module, objective, batch):
    """The matrix by derivatives of whole functions, one sample at a time."""
    view = ParameterView(module)
    size = sum(map(len, [objective.targets(batch)]))
    theta = view.flatten(view.values())
    total = torch.zeros(view.numel, view.numel, dtype=torch.float64)
    for i in range(size):
        sample = select(batch, [i])
        f, t = objective.function(module, view, sample), objective.targets(sample)

        def outputs(row, f=f):
            return f(view.unflatten(row))

        def loss(row, outputs=outputs, t=t):
            return objective.losses(outputs(row), t).sum()

        if kind is HessianOperator:
            total += torch.autograd.functional.hessian(loss, theta)
        elif kind is EmpiricalFisherOperator:
            g = torch.autograd.functional.jacobian(loss, theta)
            total += torch.outer(g, g)
        else:
            jacobian = torch.autograd.functional.jacobian(outputs, theta).reshape(-1, view.numel)
            y = outputs(theta).detach()
            curvature = torch.autograd.functional.hessian(lambda y, t=t: objective.losses(y, t).sum(), y)
            total += jacobian.T @ curvature.reshape(len(jacobian), -1) @ jacobian
    return total / size


@CASE
@pytest.mark.parametrize("kind", OPERATORS)
def test_an_operator_is_its_dense_matrix_whatever_the_batches_sizes(kind, case):
    module, objective, batch = build(case)
    expected = dense(kind, module, objective, batch)
    operator = kind(module, objective, split(batch), damping=0.3)
    rows = torch.randn(3, operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator(rows), rows @ expected + 0.3 * rows, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        operator.dense(), expected + 0.3 * torch.eye(operator.size, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )
    assert isinstance(operator, CurvatureOperator)
    assert (operator.size, operator.dtype, operator.device.type) == (len(expected), torch.float64, "cpu")


@CASE
@pytest.mark.parametrize("kind", [GGNOperator, EmpiricalFisherOperator])
def test_square_roots_and_traces_are_those_of_the_matrix(kind, case):
    module, objective, batch = build(case)
    expected = dense(kind, module, objective, batch)
    operator = kind(module, objective, split(batch), damping=0.3)
    root = operator.square_root_rows()
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-9, atol=1e-10)
    each = [dense(kind, module, objective, select(batch, [i])).trace() for i in range(operator.num_samples)]
    torch.testing.assert_close(operator.per_sample_traces(), torch.stack(each), rtol=1e-9, atol=1e-10)
    assert operator.trace_bound == pytest.approx(float(max(each)), rel=1e-9)


def test_roots_of_sequences_are_never_whole(monkeypatch):
    """Between positions they are zeros, (T K)^2 of them for each sample."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5)).double().eval()
    batch = torch.randn(2, 6, 3).double(), torch.randint(0, 5, (2, 6))
    objective = InfluenceObjective()
    exact = dense(GGNOperator, module, objective, batch)

    def whole(self, y, t):
        raise AssertionError("the whole root was asked for")

    monkeypatch.setattr(type(objective.loss), "hessian_sqrt", whole)
    monkeypatch.setattr(curvature_file, "_BLOCK_BYTES", 2 * 2 * 6 * 5 * 8)
    operator = GGNOperator(module, objective, [batch])
    root = operator.square_root_rows()
    torch.testing.assert_close(root.T @ root, exact, rtol=1e-9, atol=1e-10)
    assert operator.per_sample_traces().mean().item() == pytest.approx(exact.trace().item())
    fitted = kronecker_curvature(module, objective, [batch])
    assert fitted.eigenvalues().sum().item() == pytest.approx(exact.trace().item())


def test_traces_can_be_estimated_without_bias():
    module, objective, batch = build("softmax")
    operator = GGNOperator(module, objective, split(batch))
    exact = operator.per_sample_traces()
    draws = torch.stack([operator.per_sample_traces(1, torch.Generator().manual_seed(seed)) for seed in range(300)])
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 300**0.5).all()
    many = operator.per_sample_traces(300, torch.Generator().manual_seed(0))
    assert ((many - exact).abs() < 5 * draws.std(0) / 300**0.5).all()


def test_the_matrices_are_those_of_the_peer():
    curvlinops = pytest.importorskip("curvlinops")
    module, objective, batch = build("softmax")
    batches = split(batch)
    peers = {
        GGNOperator: curvlinops.GGNLinearOperator,
        HessianOperator: curvlinops.HessianLinearOperator,
        EmpiricalFisherOperator: curvlinops.EFLinearOperator,
    }
    for kind, peer in peers.items():
        other = peer(module, nn.CrossEntropyLoss(), list(module.parameters()), batches)
        rows = torch.randn(2, other.shape[0], dtype=torch.float64)
        torch.testing.assert_close(kind(module, objective, batches)(rows), (other @ rows.T).T, rtol=1e-9, atol=1e-11)


def test_the_proximal_bregman_objective_has_this_curvature_and_the_gradient_of_the_removed_loss():
    """Ground truth 3 of the influence functions: at weights that are no optimum of anything."""
    module, objective, batch = build("softmax")
    view, removed, epsilon, damping = ParameterView(module), select(batch, [2]), 0.1, 0.05
    theta, t = view.flatten(view.values()), objective.targets(batch)
    f, g = (objective.function(module, view, b) for b in (batch, removed))
    reference = f(view.values()).detach()

    def proximal(row, epsilon):
        params = view.unflatten(row)
        divergence = objective.loss.bregman(f(params), reference, t).mean()
        loss = objective.losses(g(params), objective.targets(removed)).sum()
        return divergence - epsilon * loss + damping / 2 * (row - theta).square().sum()

    gradient = torch.func.grad(proximal)(theta, epsilon)
    loss_gradient = torch.func.grad(lambda row: -proximal(row, 1.0) + proximal(row, 0.0))(theta)
    torch.testing.assert_close(gradient, -epsilon * loss_gradient, rtol=1e-10, atol=1e-12)
    hessian = torch.func.hessian(lambda row: proximal(row, 0.0))(theta)
    ggn = GGNOperator(module, objective, split(batch), damping=damping).dense()
    torch.testing.assert_close(hessian, ggn, rtol=1e-9, atol=1e-11)
    assert torch.linalg.eigvalsh(ggn)[0] > damping - 1e-12
    full = HessianOperator(module, objective, split(batch), damping=damping).dense()
    assert (full - ggn).abs().max() > 0.01
    assert torch.linalg.eigvalsh(full)[0] < 0


class Loader:
    """Batches that count how often they are gone through."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(("batches_kept", "passes"), [(0, 3), (1, 3), (3, 1)])
def test_the_cache_is_bounded_and_changes_no_product(kind, batches_kept, passes, monkeypatch):
    module, objective, batch = build("softmax")
    pieces = split(batch, (2, 2))
    each = kind(module, objective, [select(batch, [0, 1])])
    each(torch.zeros(1, each.size, dtype=torch.float64))
    budget = sum(share.nbytes for share in each._cache) * batches_kept * 3 // 2
    loader = Loader(pieces)
    operator = kind(module, objective, loader, cache_bytes=budget)
    rows = torch.randn(2, operator.size, dtype=torch.float64)
    results = [operator(rows) for _ in range(3)]
    assert loader.passes == passes
    assert len(operator._cache) == batches_kept
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[0], rows @ dense(kind, module, objective, batch), rtol=1e-9, atol=1e-10)


def on_ranks(make, shards, use):
    """Use an operator on every shard as if on a rank each: first note what it would send, then hand out sums."""
    sent = []
    for shard in shards:
        sent.append([])

        def note(tensor, mine=sent[-1]):
            mine.append(tensor.clone())
            return tensor if tensor.is_floating_point() else tensor.clamp(min=1)

        use(make(shard, note))
    results = []
    for shard in shards:
        sums = (torch.stack(parts).sum(0) for parts in zip(*sent, strict=True))
        results.append(use(make(shard, lambda _, sums=sums: next(sums))))
        assert next(sums, None) is None
    return results, [[tuple(tensor.shape) for tensor in mine] for mine in sent]


@pytest.mark.parametrize("kind", OPERATORS)
def test_ranks_sum_each_block_once_also_without_batches(kind):
    module, objective, batch = build("half square")
    shards = [split(batch)[:2], [], split(batch)[2:]]
    rows = torch.randn(3, ParameterView(module).numel, dtype=torch.float64)
    expected = kind(module, objective, [batch], damping=0.1)(rows)
    results, shapes = on_ranks(
        lambda shard, reduce: kind(module, objective, shard, damping=0.1, reduce=reduce, num_samples=None),
        shards,
        lambda operator: (operator(rows), operator(rows[:1]), operator.num_samples),
    )
    for first, second, count in results:
        torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(second, expected[:1], rtol=1e-10, atol=1e-12)
        assert count == 7
    assert shapes == [[(3, rows.shape[1]), (1,), (1, rows.shape[1])]] * 3


def test_square_roots_and_trace_bounds_of_ranks_belong_together():
    module, objective, batch = build("softmax")
    whole = GGNOperator(module, objective, [batch])
    shards = [split(batch)[:1], [], split(batch)[1:]]
    results, _ = on_ranks(
        lambda shard, reduce: GGNOperator(module, objective, shard, reduce=reduce),
        shards,
        lambda operator: (operator.square_root_rows(), operator.trace_bound, operator.per_sample_traces()),
    )
    root = torch.cat([rows for rows, _, _ in results])
    torch.testing.assert_close(root.T @ root, whole.dense(), rtol=1e-9, atol=1e-11)
    assert torch.cat([traces for _, _, traces in results]).tolist() == pytest.approx(whole.per_sample_traces().tolist())
    for _, bound, _ in results:
        assert whole.trace_bound * 0.999999 <= bound <= whole.trace_bound * 3 ** (1 / 16)


@pytest.mark.parametrize("kind", OPERATORS)
def test_parameters_can_be_chosen(kind):
    module, objective, batch = build("softmax")
    whole, part = ParameterView(module), ParameterView(module, "^2")
    place = slice(whole.slices()["2.weight"].start, whole.slices()["2.bias"].stop)
    expected = kind(module, objective, [batch]).dense()[place, place]
    torch.testing.assert_close(kind(module, objective, [batch], part).dense(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_work_under_inference_mode_in_float32_and_for_no_rows(kind):
    module, objective, batch = build("batch norm")
    expected = dense(kind, module, objective, batch)
    module.float()
    with torch.inference_mode():
        floats = (batch[0].float(), batch[1].clone())
        operator = kind(module, objective, [floats])
        rows = torch.randn(2, operator.size)
        product = operator(rows)
    assert product.dtype == operator.dtype == torch.float32
    torch.testing.assert_close(product.double(), rows.double() @ expected, rtol=1e-3, atol=1e-5)
    assert operator(torch.zeros(0, operator.size)).shape == (0, operator.size)
    if kind is not HessianOperator:
        with torch.inference_mode():
            root = operator.square_root_rows()
        torch.testing.assert_close((root.T @ root).double(), expected, rtol=1e-3, atol=1e-5)


def test_an_operator_stays_at_the_weights_it_was_made_with():
    module, objective, batch = build("softmax")
    operator = GGNOperator(module, objective, [batch], cache_bytes=0)
    before = operator.dense()
    with torch.no_grad():
        module[0].weight.mul_(2)
    assert torch.equal(operator.dense(), before)
    with pytest.raises(ValueError, match="parameters changed"):
        operator.square_root_rows()


def test_a_model_that_the_layers_do_not_explain_has_the_same_square_root():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x) + x @ self.layer.weight.T.tanh()

    torch.manual_seed(0)
    module = Functional().double().eval()
    batch = xy(5, (3,), labels(4))
    operator = GGNOperator(module, InfluenceObjective(), split(batch))
    root, expected = operator.square_root_rows(), dense(GGNOperator, module, InfluenceObjective(), batch)
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-9, atol=1e-11)
    assert operator.per_sample_traces().mean().item() == pytest.approx(expected.trace().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (lambda x, t: [(x, t), (x.index_fill(0, torch.tensor([3, 5]), torch.nan), t)], r"samples \[3, 5\] of batch 1 "),
        (lambda x, t: [(x, t.index_fill(0, torch.tensor([2]), torch.nan))], r"samples \[2\] of batch 0 "),
        (lambda x, t: [], "no samples"),
        (lambda x, t: iter([(x, t)]), "list or a loader"),
    ],
)
def test_data_that_give_no_number_are_named(batches, match):
    module, _, (x, t) = build("mse")
    objective = InfluenceObjective("poisson_nll")
    with pytest.raises(ValueError, match=match):
        HessianOperator(module, objective, batches(x * 1e3, t.abs()))(torch.ones(1, 44, dtype=torch.float64))


def test_a_product_that_overflows_names_its_batch():
    module, objective, (x, t) = build("half square")
    pieces = [(x, t), (x, t * torch.inf)]  # outputs are finite, the gradient is not
    operator = EmpiricalFisherOperator(module, objective, pieces)
    rows = torch.ones(1, operator.size, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"EmpiricalFisherOperator product of batch 1 is not finite"):
        operator(rows)
    with pytest.raises(ValueError, match="rows must be finite"):
        GGNOperator(module, objective, [(x, t)])(rows * torch.nan)


class Changing:
    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


@pytest.mark.parametrize("change", ["sizes", "fewer", "more", "values"])
def test_batches_that_change_between_passes_are_refused(change):
    module, objective, batch = build("softmax")
    first, second = split(batch, (3,)), split(batch, (3,))
    second = {
        "sizes": split(batch, (4,)),
        "fewer": second[:1],
        "more": [*second, second[0]],
        "values": [second[0], (second[1][0] + 1, second[1][1])],
    }[change]
    operator = GGNOperator(module, objective, Changing(first, second), cache_bytes=0)
    rows = torch.ones(1, operator.size, dtype=torch.float64)
    operator(rows)
    with pytest.raises(ValueError, match=r"other samples the second time, at batch [012]: switch off shuffling"):
        operator(rows)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": -1.0}, "damping must be at least 0; got -1.0"),
        ({"damping": float("nan")}, "damping"),
        ({"num_samples": 8}, "num_samples is 8, but the batches hold 7"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    module, objective, batch = build("softmax")
    with pytest.raises(ValueError, match=match):
        GGNOperator(module, objective, [batch], **options)(torch.ones(1, 44, dtype=torch.float64))


def test_what_else_does_not_fit_is_refused():
    module, objective, batch = build("softmax")
    operator = GGNOperator(module, objective, [batch])
    with pytest.raises(ValueError, match=r"\(R, 44\); got \(44,\)"):
        operator(torch.ones(44))
    with pytest.raises(ValueError, match="more than 27 rows"):
        operator.square_root_rows(max_rows=27)
    assert len(operator.square_root_rows(max_rows=28)) == 28
    with pytest.raises(ValueError, match=r"float32 or float64, not torch\.bfloat16"):
        GGNOperator(module.bfloat16(), objective, [batch])
    with pytest.raises(ValueError, match=r"in training mode"):
        GGNOperator(build("batch norm")[0].train(), objective, [CASES["batch norm"][2]]).dense()


def test_a_loss_that_is_not_convex_is_refused():
    module, _, batch = build("half square")

    def saturating(y, t):
        return (y - t).square().div(1 + (y - t).square()).sum(1)

    declared = InfluenceObjective(CallableLoss(saturating, convex=False))
    with pytest.raises(ValueError, match="HessianOperator with a solver for indefinite"):
        GGNOperator(module, declared, [batch])
    caught = GGNOperator(module, InfluenceObjective(saturating), [batch])
    with pytest.raises(ValueError, match="not convex in the outputs"):
        caught(torch.ones(1, 44, dtype=torch.float64))
    torch.testing.assert_close(
        HessianOperator(module, declared, [batch]).dense(), dense(HessianOperator, module, declared, batch)
    )


def test_the_mode_of_the_module_is_the_callers():
    module, objective, batch = build("tied tokens")
    expected = GGNOperator(module, objective, [batch]).dense()
    module.train()
    with evaluating(module):
        torch.testing.assert_close(GGNOperator(module, objective, [batch]).dense(), expected)
    assert module.drop.training


def test_batches_joined_are_the_same_operator():
    module, objective, batch = build("tied tokens")
    pieces = split(batch)
    torch.testing.assert_close(
        GGNOperator(module, objective, [concatenate(pieces)]).dense(), GGNOperator(module, objective, pieces).dense()
    )


def test_what_is_kept_stays_within_the_cache_when_blocks_of_rows_come():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    batches = [(torch.randn(16, 32), torch.randint(0, 4, (16,))) for _ in range(5)]
    free = GGNOperator(module, InfluenceObjective(), batches)
    bound = GGNOperator(module, InfluenceObjective(), batches, cache_bytes=2**17)
    rows = torch.randn(9, free.size)
    for _ in range(3):
        torch.testing.assert_close(bound(rows), free(rows), rtol=1e-4, atol=1e-5)
    held = [sum(share.nbytes for share in operator._cache) for operator in (bound, free)]
    assert 0 < held[0] <= 2**17 < held[1]
