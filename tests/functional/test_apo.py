"""The proximal objective and the meta-steps against closed forms, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import (
    ProximalObjective,
    inner_products,
    rmsprop_log_step,
    secant_log_step,
    sgd_log_step,
    softmax_kl,
    squared_error,
    trust_region_weight,
)

BEST_RATE = 0.27538202564498365  # of the problem below, by the closed form g.d / d.(H + lam_f G + lam_w I).d
SLOPE = -0.6179172446425288  # dQ/dlog(eta) at eta = 0.1
LAM_F, LAM_W = 0.7, 0.3


def problem():
    torch.manual_seed(1)
    xb, y, xp, th = (torch.randn(*shape, dtype=torch.float64) for shape in ((20, 4), (20,), (15, 4), (4,)))
    return xb, y, xp, th.requires_grad_()


def look_ahead(eta, direction=None, lam_f=LAM_F, lam_w=LAM_W):
    """The step of SGD, or along ``direction``: its proximal step, the displacement and the gradient before it."""
    xb, y, xp, th = problem()
    objective = ProximalObjective(
        lambda: 0.5 * (xb @ th - y).square().mean(), lambda: (xp @ th)[:, None], squared_error
    )
    (g,) = torch.autograd.grad(objective.loss_fn(), th)
    objective.anchor()
    moved = -eta * (g if direction is None else direction(xb.T @ xb / 20, g))
    with torch.no_grad():
        th += moved
    return objective.gradient([th], [moved], lam_f=lam_f, lam_w=lam_w), moved, g


def closed_form(lam_f, lam_w):
    xb, y, xp, th = problem()
    g = xb.T @ (xb @ th.detach() - y) / 20
    matrix = xb.T @ xb / 20 + lam_f * xp.T @ xp / 15 + lam_w * torch.eye(4, dtype=torch.float64)
    return (g @ g / (g @ matrix @ g)).item()


# -- the proximal objective -------------------------------------------------------------------------------------------


def test_the_slope_is_zero_at_the_best_learning_rate_and_known_elsewhere():
    step, moved, _ = look_ahead(BEST_RATE)
    assert inner_products(step.gradient, [moved]).item() == pytest.approx(0.0, abs=1e-14)
    step, moved, _ = look_ahead(0.1)
    assert inner_products(step.gradient, [moved]).item() == pytest.approx(SLOPE, rel=1e-14)
    assert closed_form(LAM_F, LAM_W) == pytest.approx(BEST_RATE, rel=1e-14)


@pytest.mark.parametrize(("lam_f", "lam_w"), [(0.0, 0.0), (1.0, 0.0), (0.0, 2.0), (3.0, 0.1)])
def test_the_slope_vanishes_at_the_closed_form_for_any_weights(lam_f, lam_w):
    step, moved, _ = look_ahead(closed_form(lam_f, lam_w), lam_f=lam_f, lam_w=lam_w)
    assert inner_products(step.gradient, [moved]).item() == pytest.approx(0.0, abs=1e-14)


def test_the_parts_of_the_objective_add_up_and_the_slope_is_its_derivative():
    step, moved, _ = look_ahead(0.1)
    xb, y, xp, th = problem()
    after = th.detach() + moved
    assert step.loss.item() == pytest.approx((0.5 * (xb @ after - y).square().mean()).item(), rel=1e-14)
    assert step.fsd.item() == pytest.approx((0.5 * (xp @ moved).square().mean()).item(), rel=1e-13)
    assert step.wsd.item() == pytest.approx(0.5 * (moved @ moved).item(), rel=1e-14)
    assert step.value.item() == pytest.approx((step.loss + LAM_F * step.fsd + LAM_W * step.wsd).item(), rel=1e-14)
    values = [look_ahead(0.1 * math.exp(e))[0].value for e in (1e-5, -1e-5)]
    assert ((values[0] - values[1]) / 2e-5).item() == pytest.approx(SLOPE, rel=1e-8)


@pytest.mark.parametrize("lam_f", [0.0, 0.5, 1.0, 3.0])
def test_along_the_newton_direction_the_best_rate_is_known(lam_f):
    """With the outputs of the same batch the curvature of loss and discrepancy are equal."""
    xb, y, _, th = problem()
    eta = 1 / (1 + lam_f)
    objective = ProximalObjective(
        lambda: 0.5 * (xb @ th - y).square().mean(), lambda: (xb @ th)[:, None], squared_error
    )
    (g,) = torch.autograd.grad(objective.loss_fn(), th)
    objective.anchor()
    moved = -eta * torch.linalg.solve(xb.T @ xb / 20, g)
    with torch.no_grad():
        th += moved
    step = objective.gradient([th], [moved], lam_f=lam_f, lam_w=0.0)
    assert inner_products(step.gradient, [moved]).item() == pytest.approx(0.0, abs=1e-14)


def test_on_a_linear_loss_the_best_rate_is_one_over_the_weight_of_the_weights():
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    th = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    moved = -0.05 * slope
    with torch.no_grad():
        th += moved
    step = ProximalObjective(lambda: slope @ th, None, squared_error).gradient([th], [moved], lam_f=0.0, lam_w=20.0)
    assert inner_products(step.gradient, [moved]).item() == pytest.approx(0.0, abs=1e-15)


def test_a_heavy_weight_on_the_weights_asks_for_no_step():
    assert closed_form(0.0, 1e9) == pytest.approx(1e-9, rel=1e-6)
    step, moved, _ = look_ahead(1e-3, lam_f=0.0, lam_w=1e9)
    assert inner_products(step.gradient, [moved]).item() > 0


def test_on_a_quadratic_the_best_rate_never_lets_the_loss_rise():
    xb, y, xp, th = problem()
    objective = ProximalObjective(
        lambda: 0.5 * (xb @ th - y).square().mean(), lambda: (xp @ th)[:, None], squared_error
    )
    losses = [objective.loss_fn().item()]
    for _ in range(50):
        (g,) = torch.autograd.grad(objective.loss_fn(), th)
        objective.anchor(evaluate_loss=False)
        with torch.no_grad():
            th -= 0.1 * g
        step = objective.gradient([th], [-0.1 * g], lam_f=LAM_F, lam_w=LAM_W)
        before, after = (inner_products([v], [-0.1 * g]) for v in (g, step.gradient[0]))
        ratio = secant_log_step(before, after, rate=1.0, limit=math.inf).exp()
        with torch.no_grad():
            th -= 0.1 * (ratio - 1) * g
        losses.append(objective.loss_fn().item())
    assert all(b <= a + 1e-15 for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_with_dropout_and_batch_norm_nothing_moved_means_no_discrepancy():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, labels = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3

    def outputs():
        torch.manual_seed(5)
        return net(x)

    objective = ProximalObjective(lambda: F.cross_entropy(outputs(), labels), outputs, softmax_kl)
    objective.anchor()
    params = list(net.parameters())
    still = objective.gradient(params, [torch.zeros_like(p) for p in params], lam_f=1.0, lam_w=1.0)
    assert still.fsd.item() == pytest.approx(0.0, abs=1e-15)
    assert still.wsd.item() == 0.0
    with torch.no_grad():
        for p in params:
            p.add_(0.1)
    assert objective.gradient(params, params, lam_f=1.0, lam_w=1.0).fsd > 1e-6


def test_the_slopes_of_the_layers_add_up_to_the_slope_of_all():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, labels = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3
    objective = ProximalObjective(lambda: F.cross_entropy(net(x), labels), lambda: net(x[:4]), softmax_kl)
    objective.anchor()
    params = list(net.parameters())
    moved = [-0.3 * g for g in torch.autograd.grad(objective.loss_fn(), params)]
    start = [p.detach().clone() for p in params]

    def value(factor):
        with torch.no_grad():
            for p, a, d in zip(params, start, moved, strict=True):
                p.copy_(a + factor * d)
        return objective.gradient(params, [factor * d for d in moved], lam_f=0.5, lam_w=0.2)

    slope = ((value(math.exp(1e-5)).value - value(math.exp(-1e-5)).value) / 2e-5).item()
    parts = inner_products(value(1.0).gradient, moved)
    assert parts.shape == (4,)
    assert parts.sum().item() == pytest.approx(slope, rel=1e-7)


def test_gradients_are_left_alone_and_unused_parameters_get_zeros():
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    used.grad = torch.full((2,), 7.0)
    objective = ProximalObjective(lambda: used.square().sum(), None, squared_error)
    step = objective.gradient([used, unused], [torch.ones(2), torch.zeros(2)], lam_f=0.0, lam_w=0.5)
    assert used.grad.tolist() == [7.0, 7.0]
    assert unused.grad is None
    assert [v.tolist() for v in step.gradient] == [[2.5, 2.5], [0.0, 0.0]]
    assert not step.value.requires_grad


def test_gradients_that_share_memory_are_not_added_to_in_place():
    """Autograd hands out one tensor for two addends, and expanded ones for sums."""
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    objective = ProximalObjective(lambda: (a + b).square().sum(), None, squared_error, grad_scale=2.0)
    step = objective.gradient([a, b], [torch.ones(2), torch.full((2,), 3.0)], lam_f=0.0, lam_w=1.0)
    assert [v.tolist() for v in step.gradient] == [[5.0, 5.0], [7.0, 7.0]]
    objective = ProximalObjective(lambda: a.sum(), None, squared_error, grad_scale=2.0)
    step = objective.gradient([a], [torch.tensor([1.0, 2.0])], lam_f=0.0, lam_w=1.0)
    assert step.gradient[0].tolist() == [2.0, 3.0]


def test_outputs_are_evaluated_once_before_and_once_after_and_only_where_they_count():
    calls = []
    w = torch.ones(2, requires_grad=True)

    def outputs():
        calls.append(torch.is_grad_enabled())
        return w[None]

    objective = ProximalObjective(lambda: w.square().sum(), outputs, squared_error)
    objective.anchor()
    objective.gradient([w], [torch.ones(2)], lam_f=1.0, lam_w=0.0)
    assert calls == [False, True]
    objective.gradient([w], [torch.ones(2)], lam_f=0.0, lam_w=1.0)
    assert calls == [False, True]


def test_anchor_keeps_the_loss_at_the_start_unless_it_is_known_or_not_wanted():
    w = torch.tensor(2.0, requires_grad=True)
    objective = ProximalObjective(lambda: 3 * w, None, squared_error)
    objective.anchor(evaluate_loss=False)
    assert objective.loss_at_anchor is None
    objective.anchor()
    assert objective.loss_at_anchor.item() == 6.0
    known = ProximalObjective(lambda: 3 * w, None, squared_error, loss_at_anchor=torch.tensor(5.0))
    known.anchor()
    assert known.loss_at_anchor.item() == 5.0


def test_a_scale_of_the_backward_pass_is_taken_out_again():
    def gradient(dtype, scale):
        w = torch.full((3,), 1e-4, dtype=dtype, requires_grad=True)
        objective = ProximalObjective(lambda: 0.1 * w.square().sum(), None, squared_error, grad_scale=scale)
        return objective.gradient([w], [torch.ones(3)], lam_f=0.0, lam_w=0.0)

    exact = gradient(torch.float64, 1.0)
    torch.testing.assert_close(gradient(torch.float64, 2.0**14).gradient, exact.gradient, rtol=0, atol=0)
    assert gradient(torch.float64, 2.0**14).value == exact.value


def test_misuse_says_what_to_do():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="call anchor"):
        ProximalObjective(lambda: w.square().sum(), lambda: w, squared_error).gradient(
            [w], [w.detach()], lam_f=1.0, lam_w=0.0
        )
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar; got shape \(2,\)"):
        ProximalObjective(lambda: 2 * w, None, squared_error).gradient([w], [w.detach()], lam_f=0.0, lam_w=0.0)


def test_inner_products_are_taken_in_float32_or_wider():
    many = torch.full((4096,), 1 / 64, dtype=torch.bfloat16)
    assert inner_products([many], [many]).dtype == torch.float32
    assert inner_products([many], [many]).item() == pytest.approx(1.0, rel=1e-5)
    assert inner_products([many.double()], [many.double()]).dtype == torch.float64
    assert inner_products([], []).shape == (0,)
    with pytest.raises(ValueError, match="zip"):
        inner_products([many], [])


# -- meta-steps -------------------------------------------------------------------------------------------------------


def test_the_secant_step_is_exact_on_a_quadratic():
    step, moved, g = look_ahead(0.1)
    before, after = inner_products([g], [moved]), inner_products(step.gradient, [moved])
    best = 0.1 * secant_log_step(before, after, rate=1.0).exp().item()
    assert best == pytest.approx(BEST_RATE, rel=1e-14)
    assert secant_log_step(before, after).item() == pytest.approx(0.3 * math.log(BEST_RATE / 0.1), rel=1e-13)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (-1.0, 1.0, math.log(0.5)),  # the minimum lies half way
        (-1.0, -0.5, math.log(2)),  # ... and at twice the step
        (-1.0, -0.99, math.log(4)),  # far beyond: clipped
        (-1.0, 99.0, -math.log(4)),  # far before: clipped
        (-1.0, -1.0, math.log(4)),  # no curvature, falling
        (-1.0, -2.0, math.log(4)),  # negative curvature, falling
        (1.0, 2.0, -math.log(4)),  # no descent, rising
        (1.0, 0.5, -math.log(4)),  # no descent, still rising
        (0.0, 1.0, -math.log(4)),
        (0.0, 0.0, 0.0),  # nothing moved
    ],
)
def test_the_secant_step_in_every_case(before, after, expected):
    def step(rate):
        return secant_log_step(*(torch.tensor([v], dtype=torch.float64) for v in (before, after)), rate=rate).item()

    assert step(1.0) == pytest.approx(expected, rel=1e-12)
    assert step(0.25) == pytest.approx(expected / 4, rel=1e-12)


def test_the_rmsprop_step_by_hand():
    slopes, alpha, beta = [3.0, -1.0, 0.5, 40.0], 0.1, 0.9
    moment, v = torch.zeros(1, dtype=torch.float64), 0.0
    for k, h in enumerate(slopes, start=1):
        v = beta * v + (1 - beta) * h * h
        step, moment = rmsprop_log_step(torch.tensor([h], dtype=torch.float64), moment, k, alpha, beta)
        assert step.item() == pytest.approx(-alpha * h / math.sqrt(v / (1 - beta**k)), rel=1e-13)
        assert moment.item() == pytest.approx(v, rel=1e-13)


@pytest.mark.parametrize("slope", [-1e-12, 1.0, 1e12])
def test_the_first_rmsprop_step_is_the_meta_learning_rate_whatever_the_slope(slope):
    step, _ = rmsprop_log_step(torch.tensor([slope], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 1, 0.1)
    assert step.item() == pytest.approx(-math.copysign(0.1, slope), rel=1e-12)


def test_groups_take_their_own_steps():
    slope = torch.tensor([1.0, -100.0, 0.0], dtype=torch.float64)
    step, moment = rmsprop_log_step(slope, torch.zeros(3, dtype=torch.float64), 1, 0.1)
    torch.testing.assert_close(step, torch.tensor([-0.1, 0.1, 0.0], dtype=torch.float64))
    assert moment.shape == (3,)
    assert sgd_log_step(slope, 0.01).tolist() == [-0.01, 1.0, 0.0]


@pytest.mark.parametrize(
    ("fsd", "expected"),
    [
        (1e-3, 1.0),
        (2e-3, 2**0.1),
        (1e-1, math.exp(0.2)),
        (5e-4, 0.5**0.1),
        (1e-9, math.exp(-0.2)),
        (0.0, math.exp(-0.2)),
    ],
)
def test_the_trust_region_moves_its_weight_towards_the_budget(fsd, expected):
    assert trust_region_weight(1.0, fsd, 1e-3) == pytest.approx(expected, rel=1e-12)


def test_the_trust_region_keeps_its_weight_within_bounds():
    assert trust_region_weight(9.9e3, 1.0, 1e-3) == 1e4
    assert trust_region_weight(1.1e-4, 0.0, 1e-3) == 1e-4
