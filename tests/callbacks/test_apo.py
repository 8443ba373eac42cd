"""The learning-rate callback against numbers by hand; that it only looks; that it does not overshoot."""

import contextlib
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_ext._lightning import submodule
from lightning_ext.callbacks import APOLearningRate, HypergradientLR, _apo_lookahead, _apo_rates, _quiet
from lightning_ext.testing import StatefulLoader, assert_observer
from tests.callbacks import apo_toys as toys

BEST_RATE = 0.27538202564498365  # see tests/functional/test_apo.py
SLOPE = -0.6179172446425288

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


# -- exact numbers ----------------------------------------------------------------------------------------------------


def known_problem(eta, **kwargs):
    """One step of the known problem; the batch before it makes no step and serves as the other batch."""
    torch.manual_seed(1)
    xb, y, xp, th = (torch.randn(*shape, dtype=torch.float64) for shape in ((20, 4), (20,), (15, 4), (4,)))
    module = toys.Regression(lambda p: torch.optim.SGD(p, lr=eta), start=th.tolist())
    one = torch.tensor(1.0, dtype=torch.float64)
    batches = toys.as_they_are((xp, xp[:, 0], 0 * one), (xb, y, one))
    callback = APOLearningRate(lam_f=0.7, lam_w=0.3, **{**toys.EVERY_STEP, **toys.BESIDE, **kwargs})
    _, seen = toys.fit(module, batches, callback)
    return seen, xb.T @ (xb @ th - y) / 20, th


def test_the_known_slope_moves_the_learning_rate_and_the_step():
    seen, g, th = known_problem(0.1, meta_optimizer="sgd", meta_lr=0.5)
    rate = 0.1 * math.exp(-0.5 * SLOPE)
    assert seen.rates == [[0.1], [pytest.approx(rate, rel=1e-13)]]
    torch.testing.assert_close(seen.after[1][0], th - rate * g, rtol=1e-13, atol=0)
    assert seen.logged[1]["apo/meta_grad"] == pytest.approx(SLOPE, rel=1e-6)
    assert seen.logged[1]["apo/lr/0/0"] == pytest.approx(rate, rel=1e-6)


def test_at_the_best_learning_rate_it_stays():
    seen, g, th = known_problem(BEST_RATE, meta_optimizer="sgd", meta_lr=0.5)
    assert seen.rates[1][0] == pytest.approx(BEST_RATE, rel=1e-14)
    torch.testing.assert_close(seen.after[1][0], th - BEST_RATE * g, rtol=1e-13, atol=0)


@pytest.mark.parametrize("how", [{"meta_optimizer": "secant"}, {"warmup_steps": 5}])
def test_the_secant_step_aims_at_the_best_learning_rate(how):
    seen, _, _ = known_problem(0.1, **how)
    assert seen.rates[1][0] == pytest.approx(0.1 * (BEST_RATE / 0.1) ** 0.3, rel=1e-13)


def test_the_first_rmsprop_step_is_the_meta_learning_rate():
    assert known_problem(0.1, meta_lr=0.05)[0].rates[1][0] == pytest.approx(0.1 * math.exp(0.05), rel=1e-13)
    assert known_problem(1.0, meta_lr=0.05)[0].rates[1][0] == pytest.approx(math.exp(-0.05), rel=1e-13)


def test_after_leaves_the_step_that_was_made():
    seen, g, th = known_problem(0.1, meta_optimizer="sgd", meta_lr=0.5, apply="after")
    assert seen.rates[1][0] == pytest.approx(0.1 * math.exp(-0.5 * SLOPE), rel=1e-13)
    torch.testing.assert_close(seen.after[1][0], th - 0.1 * g, rtol=1e-13, atol=0)


def test_everything_it_logs():
    seen, g, th = known_problem(0.1, meta_optimizer="sgd", meta_lr=0.5, lr_bounds=(1e-8, 0.2))
    torch.manual_seed(1)
    xb, y, xp, _ = (torch.randn(*shape, dtype=torch.float64) for shape in ((20, 4), (20,), (15, 4), (4,)))
    moved = -0.1 * g
    loss = 0.5 * (xb @ (th + moved) - y).square().mean().item()
    fsd, wsd = 0.5 * (xp @ moved).square().mean().item(), 0.5 * (moved @ moved).item()
    expected = {"apo/lr/0/0": 0.1 * math.exp(-0.5 * SLOPE), "apo/loss_lookahead": loss, "apo/fsd": fsd, "apo/wsd": wsd,
                "apo/Q": loss + 0.7 * fsd + 0.3 * wsd, "apo/meta_grad": SLOPE, "apo/rejected": 0.0}  # fmt: skip
    assert seen.logged == [{}, pytest.approx(expected, rel=1e-6)]


# -- hypergradient descent --------------------------------------------------------------------------------------------


def descend_by_hand(batches, beta, momentum, groups):
    """Hypergradient descent: the learning rate of each group moves before its step, and once per step."""
    th = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    rates, moment, rows = [0.1] * len(groups), torch.zeros_like(th), []
    for t, (x, y) in enumerate(batches):
        g = x.T @ (x @ th - y) / len(x)
        if t:
            rates = [r + beta * (g[part] @ moment[part]).item() for r, part in zip(rates, groups, strict=True)]
        moment = momentum * moment + g
        for rate, part in zip(rates, groups, strict=True):
            th[part] -= rate * moment[part]
        rows.append(rates)
    return rows, th


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["preset", "callback"])
def test_hypergradient_descent_by_hand(momentum, kind):
    batches = toys.regression_batches(20)
    module = toys.Regression(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum))
    callback = HypergradientLR(meta_lr=1e-3)
    expected, weight = descend_by_hand(batches, 1e-3, momentum, [slice(0, 4)])
    if kind == "callback":  # the same in log space: a factor exp(beta eta <g, d>)
        callback = APOLearningRate(lam_f=0, lam_w=0, every_n_steps=1, meta_optimizer="sgd", meta_lr=1e-3,
                                   loss_batch="next", max_log_step=math.inf)  # fmt: skip
    _, seen = toys.fit(module, toys.as_they_are(*batches), callback)
    rates = torch.tensor(seen.rates, dtype=torch.float64)
    if kind == "preset":
        torch.testing.assert_close(rates, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(module.weight.data, weight, rtol=1e-11, atol=0)
    else:
        d = [(b[0] - a[0]) / r[0] for a, b, r in zip(seen.before, seen.after, seen.rates, strict=True)]
        for t in range(1, 20):
            change = -1e-3 * seen.rates[t - 1][0] * (seen.grads[t][0] @ d[t - 1]).item()
            assert (rates[t] / rates[t - 1]).log().item() == pytest.approx(change, rel=1e-8)
    assert (rates[1:] != rates[:-1]).all()


class TwoParts(toys.Regression):
    """The same regression with its weight in two parameters, one group each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(self.weight.data[:1]), nn.Parameter(self.weight.data[1:])
        del self.weight

    def forward(self, x):
        return (x @ torch.cat([self.first, self.second]))[:, None]

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [self.first]}, {"params": [self.second]}], lr=0.1, momentum=0.5)


def test_hypergradient_descent_by_hand_in_two_groups():
    batches = toys.regression_batches(20)
    module = TwoParts()
    _, seen = toys.fit(module, toys.as_they_are(*batches), HypergradientLR(meta_lr=1e-3))
    expected, weight = descend_by_hand(batches, 1e-3, 0.5, [slice(0, 1), slice(1, 4)])
    rates, expected = (torch.tensor(r, dtype=torch.float64) for r in (seen.rates, expected))
    torch.testing.assert_close(rates, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([module.first, module.second]).data, weight, rtol=1e-11, atol=0)
    assert seen.rates[-1][0] != seen.rates[-1][1]


def test_hypergradient_multiplicative_keeps_the_learning_rate_positive():
    module = toys.Regression(lambda p: torch.optim.SGD(p, lr=1.5))
    _, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(20)), HypergradientLR(1e-2, True))
    low = [min(rates) for rates in seen.rates]
    assert 0 < min(low) < 1.5
    module = toys.Regression(lambda p: torch.optim.SGD(p, lr=1.5))
    _, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(20)), HypergradientLR(10.0))
    assert min(min(rates) for rates in seen.rates) == 1e-8, "without, its bound holds it"


# -- it only looks ----------------------------------------------------------------------------------------------------


class Disturbed(toys.Classifier):
    """Everything that a second pass could disturb: BatchNorm, dropout, momentum, metrics, logging, other generators."""

    def __init__(self):
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), dropout=0.5, norm=True)
        self.accuracy, self.mean = MulticlassAccuracy(3), MeanMetric()

    def training_step(self, batch, batch_idx):
        x = batch[0] + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
        outputs = self(x)
        loss = F.cross_entropy(outputs, batch[1])
        self.accuracy(outputs, batch[1])
        self.mean.update(loss.detach())
        self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"train/loss": loss, "train/mean": self.mean}, on_step=False, on_epoch=True)
        return loss


LOOKS = {
    "default": {},
    "every tenth": {"warmup_steps": 0, "every_n_steps": 2},
    "layers": {"granularity": "layer"},
    "loader": {"fsd_batch": "loader", "fsd_fraction": 1.0},
    "auto": {"lam_f": "auto", "meta_optimizer": "secant"},
    "next": {"lam_f": 0.0, "loss_batch": "next", "every_n_steps": 1},
}


def assert_only_looks(options=None, **kwargs):
    assert_observer(
        lambda: APOLearningRate(meta_lr=0.0, **(options or {})),
        Disturbed,
        lambda: DataLoader(toys.rows(30), 6, shuffle=True),
        max_epochs=2,
        **kwargs,
    )


@pytest.mark.parametrize("options", LOOKS.values(), ids=list(LOOKS))
def test_with_a_meta_learning_rate_of_zero_training_is_the_same_to_the_last_bit(options):
    assert_only_looks(options)


@pytest.mark.parametrize(
    "kwargs", [{"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]
)
def test_the_same_with_accumulation_clipping_and_mixed_precision(kwargs):
    assert_only_looks(**kwargs)


@pytest.mark.parametrize(
    ("where", "name", "hole"),
    [
        (_apo_lookahead, "undisturbed", contextlib.nullcontext),
        (_apo_lookahead, "undisturbed", _quiet.quietly),  # buffers and metrics are not put back
        (submodule("utilities.seed"), "isolate_rng", contextlib.nullcontext),
    ],
    ids=["everything", "buffers", "random"],
)
def test_a_hole_in_the_guard_would_be_noticed(monkeypatch, where, name, hole):
    monkeypatch.setattr(where, name, hole)
    with pytest.raises(Exception, match=r"changes training|log"):
        assert_only_looks()


# -- invariants -------------------------------------------------------------------------------------------------------


def passes(module, **kwargs):
    """Per batch, whether gradients were on in each pass through the network."""
    seen = []
    handle = module.net.register_forward_hook(lambda *_: seen[-1].append(torch.is_grad_enabled()))

    class Counts(toys.Recorder):
        def on_train_batch_start(self, *args):
            seen.append([])

    options = {"every_n_steps": 3, "warmup_steps": 0, "divergence": "kl", **kwargs}
    toys.fit(module, toys.loader(42), Counts(), APOLearningRate(**options))
    handle.remove()
    return seen


def test_a_meta_step_costs_one_pass_without_and_two_with_gradients_and_k_is_kept():
    step, meta = [True], [True, False, True, True]
    assert passes(toys.Classifier()) == [step, step, step, meta, step, step, meta], "the first batch has no other"
    assert passes(toys.Classifier(), fsd_batch="loader") == [meta, step, step, meta, step, step, meta]
    assert passes(toys.Classifier(), lam_f=0.0) == [[True, True] if t % 3 == 0 else step for t in range(7)]
    assert passes(toys.Classifier(), warmup_steps=3) == [step, meta, meta, meta, step, step, meta]
    assert passes(toys.Classifier(), lam_f=0.0, loss_batch="next") == [step] * 7


def test_in_train_mode_with_dropout_and_batch_norm_nothing_moved_means_no_discrepancy():
    """The learning rate is as small as it can be: what is left of the discrepancy is not another dropout mask."""
    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=1e-6), dropout=0.5, norm=True)
    _, seen = toys.fit(module, toys.loader(60), APOLearningRate(lr_bounds=(1e-8, 1e-6), lam_w=0.0))
    found = [logged["apo/fsd"] for logged in seen.logged if "apo/fsd" in logged]
    assert len(found) == 9
    assert max(abs(f) for f in found) < 1e-6
    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.1), dropout=0.5, norm=True)
    _, seen = toys.fit(module, toys.loader(60), APOLearningRate(lam_w=0.0))
    assert min(logged["apo/fsd"] for logged in seen.logged if logged) > 1e-5


def test_learning_rates_stay_within_their_bounds():
    for start, bounds in ((0.01, (0.005, 0.011)), (0.01, (0.0095, 0.5))):
        module = toys.Classifier(lambda p, start=start: torch.optim.SGD(p, lr=start))
        callback = APOLearningRate(lam_f=0.1 if bounds[1] < 0.1 else 1e3, lr_bounds=bounds, meta_lr=0.5)
        _, seen = toys.fit(module, toys.loader(48), callback, max_epochs=3)
        rates = [r for rates in seen.rates for r in rates]
        assert all(bounds[0] <= r <= bounds[1] for r in rates)
        assert rates[-1] in bounds, "it came to rest at the bound"


def test_on_a_convex_quadratic_the_loss_falls_at_every_step():
    (batch,) = toys.regression_batches(1)
    module = toys.Regression(lambda p: torch.optim.SGD(p, lr=1e-3))
    callback = APOLearningRate(lam_f=3.0, meta_optimizer="secant", **{**toys.EVERY_STEP, **toys.BESIDE})
    _, seen = toys.fit(module, toys.as_they_are(*[batch] * 60), callback)
    assert all(b < a for a, b in itertools.pairwise(seen.losses))
    x, y = batch
    least = toys.loss_of(toys.Regression(start=torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()), batch)
    assert seen.losses[-1] - least.item() < 1e-3 * (seen.losses[0] - least.item())
    assert seen.rates[-1][0] > 0.05


def test_layer_slopes_are_parts_of_the_slope_of_all():
    def slopes(granularity):
        torch.manual_seed(0)
        callback = APOLearningRate(
            meta_optimizer="sgd", meta_lr=1e-3, granularity=granularity, **toys.EVERY_STEP, divergence="kl"
        )
        _, seen = toys.fit(toys.Classifier().double(), as_double(12), callback)
        names = [k for k in seen.logged[1] if k.startswith("apo/lr")]
        state = callback.state_dict()["optimizers"]["0"]
        logs = state["multiplier"].log() / -1e-3
        return names, logs, seen.logged[1]["apo/meta_grad"], seen.rates

    names, logs, total, _ = slopes("layer")
    assert names == ["apo/lr/0/net.0", "apo/lr/0/net.4"]
    assert logs.sum().item() == pytest.approx(total, rel=1e-6)
    assert logs[0] != logs[1]
    _, _, of_all, rates = slopes("global")
    assert of_all == pytest.approx(total, rel=1e-6)
    assert math.log(rates[1][0] / rates[0][0]) / -1e-3 == pytest.approx(total, rel=1e-6)


def as_double(n):
    x, labels = toys.rows(n).tensors
    return DataLoader(TensorDataset(x.double(), labels), 6)


# -- overshoot --------------------------------------------------------------------------------------------------------


class Digits(toys.Classifier):
    def __init__(self, rate):
        super().__init__(lambda p: torch.optim.SGD(p, lr=rate))
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32)[:1400], torch.tensor(labels)[:1400])
    return StatefulLoader(data, 100, seed=0)


def overshoot(rate, meta_lr, max_epochs=18, **kwargs):
    """First and largest jump of the log learning rate, and the largest loss in units of the first one."""
    module = Digits(rate)
    callback = APOLearningRate(lam_f=0.1, lam_w=1e-3, every_n_steps=10, warmup_steps=0, meta_lr=meta_lr, **kwargs)
    _, seen = toys.fit(module, digits(), callback, max_epochs=max_epochs, log_every_n_steps=50)
    logs = [math.log(rate), *(math.log(rates[0]) for rates in seen.rates)]
    jumps = [abs(b - a) for a, b in itertools.pairwise(logs)]
    return next(jump for jump in jumps if jump), max(jumps), max(seen.losses) / seen.losses[0]


@pytest.mark.parametrize(("rate", "meta_lr"), [(1e-6, 0.3), (1e-5, 0.3), (1e-4, 0.3), (1e-4, 0.1)])
def test_a_start_far_too_low_does_not_overshoot(rate, meta_lr):
    first, largest, loss = overshoot(rate, meta_lr)
    assert first == pytest.approx(meta_lr, rel=1e-9)
    assert largest <= math.log(2) + 1e-12
    assert loss <= 1.1


def test_without_the_clip_the_same_start_overshoots():
    assert overshoot(1e-4, 0.3, max_log_step=math.inf)[2] > 1.5


def test_without_the_bias_correction_the_same_start_overshoots(monkeypatch):
    whole = _apo_rates.rmsprop_log_step
    late = 10**6  # as if the second moment had long forgotten its start
    monkeypatch.setattr(_apo_rates, "rmsprop_log_step", lambda h, v, k, *rest: whole(h, v, late, *rest))
    first, _, loss = overshoot(1e-4, 0.1)
    assert first == pytest.approx(math.log(2))
    assert loss > 1.1
