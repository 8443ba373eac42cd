"""Losses of outputs against autograd: gradients, Hessians, their roots, Bregman divergences that rounding spares."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import (
    BernoulliCrossEntropy,
    CallableLoss,
    GaussianNLL,
    PoissonNLL,
    SoftmaxCrossEntropy,
    SquaredError,
    bernoulli_kl,
    exponential_remainder,
    log_partition_divergence,
    output_loss,
    softmax_kl,
)

LABELS = torch.tensor([2, 0, 3])
TOKENS = torch.tensor([[1, -100, 3], [0, 0, 2], [-100, -100, 1]])


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huberish(y, t):
    return (1 + (y - t).square()).sqrt().flatten(1).sum(1) + torch.logsumexp(y.flatten(1), 1)


CASES = {
    "softmax": (SoftmaxCrossEntropy(), draw(3, 4), LABELS),
    "softmax soft": (SoftmaxCrossEntropy(), draw(3, 4), draw(3, 4, seed=1).softmax(-1)),
    "softmax of several labels": (SoftmaxCrossEntropy(), draw(3, 2, 4), draw(3, 2, 4, seed=1).square()),
    "softmax tokens": (SoftmaxCrossEntropy(), draw(3, 3, 4), TOKENS),
    "softmax grid": (SoftmaxCrossEntropy(ignore_index=0), draw(3, 2, 2, 4), torch.arange(12).reshape(3, 2, 2) % 4),
    "bernoulli": (BernoulliCrossEntropy(), draw(3, 4), draw(3, 4, seed=1).sigmoid()),
    "bernoulli mean": (BernoulliCrossEntropy("mean"), draw(3, 2, 2), draw(3, 2, 2, seed=1).sigmoid()),
    "bernoulli flat": (BernoulliCrossEntropy(), draw(3), torch.tensor([0.0, 1.0, 1.0])),
    "mse": (SquaredError(), draw(3, 4), draw(3, 4, seed=1)),
    "half": (SquaredError(0.5, "sum"), draw(3, 2, 2), draw(3, 2, 2, seed=1)),
    "gaussian": (GaussianNLL(0.3), draw(3, 4), draw(3, 4, seed=1)),
    "poisson": (PoissonNLL(), draw(3, 4), torch.arange(12.0, dtype=torch.float64).reshape(3, 4)),
    "callable": (CallableLoss(huberish), draw(3, 4), draw(3, 4, seed=1)),
    "callable deep": (CallableLoss(huberish), draw(3, 2, 2), draw(3, 2, 2, seed=1)),
}
CASE = pytest.mark.parametrize(("loss", "y", "t"), CASES.values(), ids=CASES)


def hessians(loss, y, t):
    """Per-sample Hessians (B, S, S), by torch.func on the values."""
    size = y[0].numel()
    full = torch.func.hessian(lambda flat: loss.value(flat.reshape(y.shape), t).sum())(y.flatten())
    return torch.stack([full[b * size : (b + 1) * size, b * size : (b + 1) * size] for b in range(len(y))])


def test_values_are_those_of_torch_sample_by_sample():
    for name, reference in {
        "softmax": lambda y, t: F.cross_entropy(y, t, reduction="none"),
        "softmax soft": lambda y, t: F.cross_entropy(y, t, reduction="none"),
        "softmax tokens": lambda y, t: torch.stack([F.cross_entropy(a, b) for a, b in zip(y, t, strict=True)]),
        "bernoulli": lambda y, t: F.binary_cross_entropy_with_logits(y, t, reduction="none").sum(1),
        "bernoulli mean": lambda y, t: F.binary_cross_entropy_with_logits(y, t, reduction="none").mean((1, 2)),
        "mse": lambda y, t: F.mse_loss(y, t, reduction="none").mean(1),
        "half": lambda y, t: 0.5 * F.mse_loss(y, t, reduction="none").sum((1, 2)),
        "gaussian": lambda y, t: -torch.distributions.Normal(y, math.sqrt(0.3)).log_prob(t).sum(1),
        "poisson": lambda y, t: -torch.distributions.Poisson(y.exp()).log_prob(t).sum(1),
        "callable": huberish,
    }.items():
        loss, y, t = CASES[name]
        torch.testing.assert_close(loss.value(y, t), reference(y, t), rtol=1e-12, atol=1e-12, msg=name)


def test_a_sample_whose_tokens_are_all_ignored_counts_nothing():
    loss, y, t = SoftmaxCrossEntropy(), draw(2, 3, 4), torch.full((2, 3), -100)
    for result in (loss.value(y, t), loss.gradient(y, t), loss.hessian_product(y, t, y), loss.bregman(y, 2 * y, t)):
        assert torch.equal(result, torch.zeros_like(result))


@CASE
def test_gradients_are_those_of_the_values(loss, y, t):
    expected = torch.func.grad(lambda y: loss.value(y, t).sum())(y)
    torch.testing.assert_close(loss.gradient(y, t), expected, rtol=1e-10, atol=1e-12)


@CASE
def test_hessian_products_are_those_of_the_values(loss, y, t):
    u = draw(2, 3, *y.shape, seed=5)
    expected = torch.einsum("bij,lkbj->lkbi", hessians(loss, y, t), u.reshape(2, 3, len(y), -1)).reshape(u.shape)
    torch.testing.assert_close(loss.hessian_product(y, t, u), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss.hessian_product(y, t, u[0, 0]), expected[0, 0], rtol=1e-9, atol=1e-11)


@CASE
def test_many_products_at_one_point_are_single_products(loss, y, t):
    multiply = loss.hessian_at(y, t)
    for seed in (2, 3):
        rows = draw(5, *y.shape, seed=seed)
        torch.testing.assert_close(multiply(rows), loss.hessian_product(y, t, rows), rtol=1e-14, atol=1e-15)


@CASE
def test_columns_multiply_to_the_hessian(loss, y, t):
    columns = loss.hessian_sqrt(y, t)
    assert columns.shape[1:] == y.shape
    flat = columns.reshape(len(columns), len(y), -1)
    torch.testing.assert_close(torch.einsum("sbi,sbj->bij", flat, flat), hessians(loss, y, t), rtol=1e-9, atol=1e-10)


@CASE
def test_columns_come_in_blocks_too(loss, y, t):
    columns = loss.hessian_sqrt(y, t)
    for at_once in (1, 2, len(columns) + 1):
        blocks = list(loss.hessian_columns(y, t, at_once))
        assert max(map(len, blocks)) <= at_once
        torch.testing.assert_close(torch.cat(blocks), columns, rtol=0.0, atol=0.0)


@CASE
def test_sampled_gradients_have_the_hessian_as_second_moment(loss, y, t):
    generator, draws = torch.Generator().manual_seed(0), 400 if isinstance(loss, CallableLoss) else 4000
    samples = torch.stack([loss.sample_gradient(y, t, generator) for _ in range(draws)]).reshape(draws, len(y), -1)
    outer = samples.unsqueeze(-1) * samples.unsqueeze(-2)
    error = (outer.mean(0) - hessians(loss, y, t)).abs()
    assert (error < 5 * outer.std(0) / math.sqrt(draws) + 1e-9).all()


def test_sampling_follows_the_generator():
    loss, y, t = CASES["softmax tokens"]
    first, second = (loss.sample_gradient(y, t, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, loss.sample_gradient(y, t, torch.Generator().manual_seed(4)))


@CASE
def test_bregman_is_its_definition(loss, y, t):
    other = y + draw(*y.shape, seed=7)
    slope = (loss.gradient(y, t) * (other - y)).flatten(1).sum(1) if y.ndim > 1 else loss.gradient(y, t) * (other - y)
    expected = loss.value(other, t) - loss.value(y, t) - slope
    torch.testing.assert_close(loss.bregman(other, y, t), expected, rtol=1e-9, atol=1e-12)


@CASE
def test_bregman_has_no_value_and_no_slope_at_the_reference_and_the_losss_curvature(loss, y, t):
    gradient = torch.func.grad(lambda new: loss.bregman(new, y, t).sum())(y)
    assert torch.equal(loss.bregman(y, y, t), torch.zeros(3, dtype=torch.float64))
    assert gradient.abs().max() <= (1e-15 if isinstance(loss, CallableLoss) else 0.0)
    curved = CallableLoss(lambda new, t: loss.bregman(new, y, t))
    torch.testing.assert_close(hessians(curved, y, t), hessians(loss, y, t), rtol=1e-8, atol=1e-9)


@CASE
def test_bregman_differentiates_the_new_outputs_alone(loss, y, t):
    new = (y + draw(*y.shape, seed=7)).requires_grad_()
    old = y.clone().requires_grad_()
    gradient, nothing = torch.autograd.grad(loss.bregman(new, old, t).sum(), [new, old], allow_unused=True)
    assert nothing is None
    torch.testing.assert_close(gradient, loss.gradient(new.detach(), t) - loss.gradient(y, t), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_bregman_keeps_its_precision_in_float32_however_small_the_change(name, size):
    loss, y, t = CASES[name]
    old = y.float()
    new = old + size * draw(*y.shape, seed=9).float()
    t = t.float() if t.is_floating_point() else t
    exact = loss.bregman(new.double(), old.double(), t)
    slope = torch.func.grad(lambda new: loss.bregman(new, old, t).sum())(new)
    exact_slope = torch.func.grad(lambda new: loss.bregman(new, old.double(), t).sum())(new.double())
    torch.testing.assert_close(loss.bregman(new, old, t).double(), exact, rtol=1e-5, atol=1e-30)
    assert (slope.double() - exact_slope).norm() <= 1e-4 * exact_slope.norm()
    quadratic = 0.5 * ((new - old) * loss.hessian_product(old, t, new - old)).reshape(3, -1).sum(1).double()
    cancelled = 1e-15 / size**2 if isinstance(loss, CallableLoss) else 0.0  # by the definition, in float64
    torch.testing.assert_close(exact, quadratic, rtol=10 * size + 1e-5 + 4 * cancelled, atol=1e-30)


def test_log_partition_divergence_far_away_is_the_difference_of_log_partitions():
    old, new = draw(5, 6, scale=50.0), draw(5, 6, seed=1, scale=300.0)
    for dtype in (torch.float32, torch.float64):
        a, b = old.to(dtype), new.to(dtype)
        found = log_partition_divergence(b - a, a.log_softmax(-1))
        p, log_p, log_q = old.softmax(-1), old.log_softmax(-1), new.log_softmax(-1)
        torch.testing.assert_close(found.double(), (p * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-4)
        gradient = torch.func.grad(lambda b, a=a: SoftmaxCrossEntropy().bregman(b, a).sum())(b)
        torch.testing.assert_close(gradient.double(), new.softmax(-1) - p, rtol=1e-3, atol=1e-4)


def test_the_exponential_remainder_has_all_derivatives_in_every_transform():
    x = torch.tensor([-30.0, -0.6, -1e-4, 0.0, 1e-9, 0.3, 0.6, 20.0], dtype=torch.float64)
    reference = torch.special.expm1(x) - x
    torch.testing.assert_close(exponential_remainder(x)[[0, 1, 6, 7]], reference[[0, 1, 6, 7]], rtol=1e-13, atol=0)
    torch.testing.assert_close(exponential_remainder(x)[4], x[4] ** 2 / 2, rtol=1e-8, atol=0)
    assert torch.autograd.gradcheck(exponential_remainder, x[:-1].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(exponential_remainder, x[:-1].clone().requires_grad_())
    slopes = torch.func.vmap(torch.func.grad(exponential_remainder))(x)
    torch.testing.assert_close(slopes, torch.expm1(x), rtol=1e-13, atol=0)
    tangent = torch.func.vmap(lambda v: torch.func.jvp(exponential_remainder, (x,), (v,))[1])(torch.eye(8).double())
    torch.testing.assert_close(tangent.diag(), torch.expm1(x), rtol=1e-13, atol=0)


def test_divergences_of_a_batch_are_the_means_of_those_of_its_samples():
    new, old = draw(4, 5), draw(4, 5, seed=1)
    torch.testing.assert_close(SoftmaxCrossEntropy().bregman(new, old).mean(), softmax_kl(new, old))
    torch.testing.assert_close(BernoulliCrossEntropy("mean").bregman(new, old).mean(), bernoulli_kl(new, old))


def test_divergences_need_no_targets_and_do_not_see_them():
    new, old = draw(3, 4), draw(3, 4, seed=1)
    for loss in (SoftmaxCrossEntropy(), BernoulliCrossEntropy(), SquaredError(), GaussianNLL(), PoissonNLL()):
        t = LABELS if isinstance(loss, SoftmaxCrossEntropy) else draw(3, 4, seed=2)
        assert torch.equal(loss.bregman(new, old), loss.bregman(new, old, t))
        assert (loss.bregman(new, old) > 0).all()
    shifted = new + draw(3, 1, seed=3)  # the same probabilities
    torch.testing.assert_close(SoftmaxCrossEntropy().bregman(shifted, new), torch.zeros(3).double(), atol=1e-14, rtol=0)


def test_a_class_excluded_from_both_outputs_adds_nothing():
    new, old = draw(3, 4), draw(3, 4, seed=1)
    wide = [torch.cat([y, torch.full((3, 1), -torch.inf)], 1) for y in (new, old)]
    torch.testing.assert_close(SoftmaxCrossEntropy().bregman(*wide), SoftmaxCrossEntropy().bregman(new, old))


@CASE
def test_everything_works_over_stacked_outputs_and_under_inference_mode(loss, y, t):
    stacked = torch.stack([y, y + 1e-3, 2 * y])
    with torch.inference_mode():
        values = torch.func.vmap(lambda y: loss.value(y, t))(stacked)
        slopes = torch.func.vmap(torch.func.grad(lambda new: loss.bregman(new, y, t).sum()))(stacked)
        products = torch.func.vmap(lambda y: loss.hessian_product(y, t, y))(stacked)
    for i, one in enumerate(stacked):
        torch.testing.assert_close(values[i], loss.value(one, t))
        torch.testing.assert_close(products[i], loss.hessian_product(one, t, one))
        torch.testing.assert_close(slopes[i], loss.gradient(one, t) - loss.gradient(y, t), rtol=1e-6, atol=1e-9)


def test_16_bit_outputs_are_computed_in_32_bits():
    loss, y, t = CASES["softmax"]
    half = y.bfloat16()
    assert loss.value(half, t).dtype == torch.float32
    assert torch.equal(loss.value(half, t), loss.value(half.float(), t))
    assert loss.bregman(half, half * 2).dtype == torch.float32
    assert loss.gradient(half, t).dtype == loss.hessian_product(half, t, half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cross_entropy", SoftmaxCrossEntropy()),
        ("bce", BernoulliCrossEntropy("sum")),
        ("mse", SquaredError(1.0, "mean")),
        ("half_squared_error", SquaredError(0.5, "sum")),
        ("gaussian_nll", GaussianNLL(1.0)),
        ("poisson_nll", PoissonNLL()),
        (GaussianNLL(2.0), GaussianNLL(2.0)),
        (nn.CrossEntropyLoss(ignore_index=7), SoftmaxCrossEntropy(7)),
        (nn.BCEWithLogitsLoss(), BernoulliCrossEntropy("mean")),
        (nn.BCEWithLogitsLoss(reduction="sum"), BernoulliCrossEntropy("sum")),
        (nn.MSELoss(), SquaredError(1.0, "mean")),
        (nn.MSELoss(reduction="sum"), SquaredError(1.0, "sum")),
        (huberish, CallableLoss(huberish)),
    ],
)
def test_a_loss_is_found_by_name_or_translated(given, expected):
    assert output_loss(given) == expected


@pytest.mark.parametrize(
    "given",
    [
        "hinge",
        3,
        nn.CrossEntropyLoss(weight=torch.ones(4)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)),
        nn.L1Loss(),
    ],
    ids=str,
)
def test_a_loss_without_a_counterpart_is_refused(given):
    with pytest.raises(ValueError, match=r"CallableLoss|OutputLoss"):
        output_loss(given)


def test_a_function_that_is_not_convex_is_caught_and_its_sample_named():
    loss = CallableLoss(lambda y, t: torch.where(t > 0, -1.0, 1.0) * y.square().sum(1))
    y, t = draw(3, 4), torch.tensor([-1.0, -1.0, 1.0])
    for call in (lambda: loss.hessian_product(y, t, y), lambda: loss.hessian_sqrt(y, t)):
        with pytest.raises(ValueError, match=r"not convex.*sample 2 "):
            call()
    allowed = CallableLoss(loss.function, convex=False)
    assert torch.equal(allowed.hessian_product(y, t, y)[2], -2 * y[2])
    null = CallableLoss(lambda y, t: y.sum(1).square())  # rounding along a flat direction is no negative curvature
    for dtype in (torch.float32, torch.float64):
        flat = torch.tensor([[1.0, -1.0, 0.3, -0.3]], dtype=dtype)
        assert null.hessian_product(flat, None, flat).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SquaredError().value(torch.zeros(3, 1), torch.zeros(2)), r"targets must have .*\(3, 1\); got \(2,\)"),
        (lambda: SquaredError().value(torch.zeros(3, 2), torch.zeros(3)), "targets"),
        (lambda: SoftmaxCrossEntropy().value(torch.zeros(3), torch.zeros(3).long()), "'bce'"),
        (lambda: SoftmaxCrossEntropy().value(torch.zeros(3, 1), torch.zeros(3).long()), "K >= 2"),
        (lambda: SoftmaxCrossEntropy().hessian_product(torch.zeros(3), None, torch.zeros(3)), "'bce'"),
        (lambda: SoftmaxCrossEntropy().value(torch.zeros(3, 4), torch.zeros(4).long()), "without the classes"),
        (lambda: SquaredError(0.0), "factor"),
        (lambda: SquaredError(1.0, "max"), "reduction"),
        (lambda: BernoulliCrossEntropy("none"), "reduction"),
        (lambda: GaussianNLL(-1.0), "variance"),
        (lambda: CallableLoss(lambda y, t: y.sum()).value(torch.zeros(3, 2), None), "one value per sample"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_targets_that_differ_by_a_dimension_of_one_do_not_broadcast():
    loss, y = SquaredError(1.0, "sum"), torch.tensor([[1.0], [2.0]])
    assert torch.equal(loss.value(y, torch.tensor([1.0, 0.0])), torch.tensor([0.0, 4.0]))
    assert torch.equal(SoftmaxCrossEntropy().labels(torch.zeros(2, 3), torch.ones(2, 1).long()), torch.ones(2).long())
