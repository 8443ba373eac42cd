"""What stands between gradient and step is part of the look-ahead: momentum, clipping, accumulation, precision."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext._lightning import Callback, LightningDataModule, submodule
from lightning_ext.callbacks import APOLearningRate, HypergradientLR
from lightning_ext.data import DigitsDataModule
from lightning_ext.functional import ProximalObjective
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*step. returned .None")


# -- every meta-step by hand ------------------------------------------------------------------------------------------

BY_HAND = {"lam_f": 1.0, "meta_optimizer": "sgd", "meta_lr": 0.05, **toys.EVERY_STEP, **toys.BESIDE}


def assert_by_hand(seen, batches, accumulate=1, apply="before"):
    """Each change of the rate is the slope of the proximal objective on the batch of the step and on the one before."""
    changed = 0
    for t in range(2 * accumulate - 1, len(batches), accumulate):
        old, new = seen.rates[t - accumulate][0], seen.rates[t][0]
        moved = seen.after[t][0] - seen.before[t][0]
        if apply == "before":
            moved = moved * old / new
        h = toys.slope(batches[t], batches[t - accumulate], seen.before[t][0] + moved, moved)
        assert math.log(new / old) == pytest.approx(-0.05 * h, rel=1e-9, abs=1e-13)
        changed += new != old
    assert changed == len(batches) // accumulate - 1


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        ({}, {}),
        ({"momentum": 0.9, "weight_decay": 0.1}, {}),
        ({"momentum": 0.9, "nesterov": True, "fused": True}, {}),
        ({}, {"gradient_clip_val": 0.1}),
        ({"momentum": 0.9}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
        ({}, {"accumulate_grad_batches": 2}),
        ({"momentum": 0.5}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    ],
    ids=["plain", "momentum and decay", "nesterov fused", "norm", "value", "accumulation", "all"],
)
@pytest.mark.parametrize("apply", ["before", "after"])
def test_every_meta_step_by_hand(optimizer, kwargs, apply):
    batches = toys.regression_batches(12)
    module = toys.Regression(lambda p: torch.optim.SGD(p, **{"lr": 0.1, **optimizer}))
    _, seen = toys.fit(module, toys.as_they_are(*batches), APOLearningRate(apply=apply, **BY_HAND), **kwargs)
    assert_by_hand(seen, batches, kwargs.get("accumulate_grad_batches", 1), apply)


def test_manual_optimisation_by_hand():
    class ByHand(toys.Regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(toys.loss_of(self, batch))
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()

    batches, module = toys.regression_batches(8), ByHand()
    _, seen = toys.fit(module, toys.as_they_are(*batches), APOLearningRate(loss_fn=toys.loss_of, **BY_HAND))
    assert_by_hand(seen, batches)


def test_a_part_of_the_other_batch_are_its_first_rows():
    batches, module = toys.regression_batches(8), toys.Regression()
    _, seen = toys.fit(module, toys.as_they_are(*batches), APOLearningRate(**{**BY_HAND, "fsd_fraction": 0.3}))
    for t in range(1, 8):
        old, new = seen.rates[t - 1][0], seen.rates[t][0]
        moved = (seen.after[t][0] - seen.before[t][0]) * old / new
        other = (batches[t - 1][0][:4],)
        h = toys.slope(batches[t], other, seen.before[t][0] + moved, moved)
        assert math.log(new / old) == pytest.approx(-0.05 * h, rel=1e-9)


def test_a_part_of_the_own_batch_are_its_first_rows():
    batches, module = toys.regression_batches(8), toys.Regression()
    _, seen = toys.fit(module, toys.as_they_are(*batches), APOLearningRate(**{**BY_HAND, "loss_fraction": 0.3}))
    for t in range(1, 8):
        old, new = seen.rates[t - 1][0], seen.rates[t][0]
        moved = (seen.after[t][0] - seen.before[t][0]) * old / new
        part = tuple(tensor[:4] for tensor in batches[t])
        h = toys.slope(part, batches[t - 1], seen.before[t][0] + moved, moved)
        assert math.log(new / old) == pytest.approx(-0.05 * h, rel=1e-9)


def test_secant_meta_steps_take_the_loss_on_all_of_the_batch():
    def rates(**options):
        data, module = toys.as_they_are(*toys.regression_batches(8)), toys.Regression()
        callback = APOLearningRate(divergence="squared_error", every_n_steps=1, **options)
        return toys.fit(module, data, callback)[1].rates

    secant = {"warmup_steps": 0, "meta_optimizer": "secant"}
    assert rates(loss_fraction=0.3, **secant) == rates(**secant)
    warm, part = rates(warmup_steps=4), rates(warmup_steps=4, loss_fraction=0.3)
    assert part[:4] == warm[:4]
    assert part[-1] != warm[-1]


# -- blocks -----------------------------------------------------------------------------------------------------------


def two_groups(params):
    params = list(params)
    return torch.optim.SGD([{"params": params[:2], "lr": 0.05}, {"params": params[2:], "lr": 0.01}], momentum=0.5)


def test_one_factor_for_all_groups_or_one_for_each():
    for granularity in ("global", "group"):
        torch.manual_seed(0)
        callback = APOLearningRate(granularity=granularity, divergence="kl", **toys.EVERY_STEP)
        _, seen = toys.fit(toys.Classifier(two_groups), toys.loader(48), callback)
        ratios = [b / a for a, b in seen.rates]
        assert seen.rates[-1] != [0.05, 0.01]
        together = all(r == pytest.approx(0.2, rel=1e-12) for r in ratios)
        assert together == (granularity == "global")
        assert {"apo/lr/0/0", "apo/lr/0/1"} <= set(seen.logged[-1])


def test_layers_keep_their_factors_beside_the_groups():
    """Every step of a layer is the optimizer's step at the group's rate, times the layer's factor."""
    callback = APOLearningRate(granularity="layer", divergence="kl", every_n_steps=3, warmup_steps=0, meta_lr=0.4)
    factors = []

    class Looks(Callback):
        def on_train_batch_end(self, *args):
            factors.append(callback.state_dict()["optimizers"]["0"]["multiplier"].tolist())

    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.05)).double()
    x, labels = toys.rows(60).tensors
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.double(), labels), 6)
    _, seen = toys.fit(module, loader, callback, Looks())
    assert {rate for rates in seen.rates for rate in rates} == {0.05}
    assert len({tuple(f) for f in factors}) == 4
    for before, after, grads, factor in zip(seen.before, seen.after, seen.grads, factors, strict=True):
        for i, f in enumerate((factor[0], factor[0], factor[1], factor[1])):
            torch.testing.assert_close(after[i], before[i] - 0.05 * f * grads[i], rtol=1e-10, atol=1e-12)
    assert seen.logged[-1]["apo/lr/0/net.4"] == pytest.approx(0.05 * factors[-1][1], rel=1e-6)


def test_several_optimizers_under_manual_optimisation():
    class Two(toys.Manual):
        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net[0].parameters(), lr=0.05),
                torch.optim.AdamW(self.net[4].parameters(), lr=0.01),
            ]

    callback = APOLearningRate(loss_fn=toys.cross_entropy, divergence="kl")
    _, seen = toys.fit(Two(), toys.loader(48), callback)
    assert seen.rates[-1][0] != 0.05
    assert seen.rates[-1][1] != 0.01
    for name in ("lr/0/0", "Q", "fsd", "lr/1/0", "Q/1", "fsd/1", "rejected/1"):
        assert f"apo/{name}" in seen.logged[-1]
    assert set(callback.state_dict()["optimizers"]) == {"0", "1"}
    callback = APOLearningRate(loss_fn=toys.cross_entropy, divergence="kl", optimizers=[1])
    _, seen = toys.fit(Two(), toys.loader(48), callback)
    assert seen.rates[-1][0] == 0.05
    assert seen.rates[-1][1] != 0.01


# -- precision --------------------------------------------------------------------------------------------------------


def halves(scaler):
    return submodule("plugins.precision").MixedPrecision("16-mixed", "cpu", scaler=scaler)


class Overflows(toys.Classifier):
    """The gradient of one batch is infinite."""

    def __init__(self, *args, at=()):
        super().__init__(*args)
        self.at = at

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (math.inf if batch_idx in self.at else 1.0)


FUSED = {"for loop": {}, "fused": {"fused": True}}


@pytest.mark.parametrize("kernel", FUSED)
def test_float16_finds_the_slopes_of_float32_whatever_the_scale(kernel):
    def run(**kwargs):
        torch.manual_seed(0)
        module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.05, **FUSED[kernel]))
        callback = APOLearningRate(divergence="kl", every_n_steps=1, warmup_steps=4)
        return toys.fit(module, toys.loader(48), callback, **kwargs)[1]

    whole = run()
    for scale in (1.0, 1024.0):
        seen = run(plugins=[halves(torch.amp.GradScaler("cpu", init_scale=scale))])
        assert seen.logged[-1]["apo/rejected"] == 0
        for t in range(1, 8):
            assert seen.rates[t][0] == pytest.approx(whole.rates[t][0], rel=0.03)
            assert seen.logged[t]["apo/meta_grad"] == pytest.approx(whole.logged[t]["apo/meta_grad"], rel=0.05)


def test_a_loss_too_small_for_float16_is_looked_at_with_the_scale():
    class Tiny(toys.Classifier):
        def training_step(self, batch, batch_idx):
            return 1e-6 * super().training_step(batch, batch_idx)

    slopes = []
    for plugins in ([], [halves(torch.amp.GradScaler("cpu", init_scale=2.0**20))]):
        torch.manual_seed(0)
        module = Tiny(lambda p: torch.optim.SGD(p, lr=5e4))
        callback = APOLearningRate(lam_f=1e-6, lam_w=0.0, divergence="kl", lr_bounds=(1.0, 1e9), **toys.EVERY_STEP)
        _, seen = toys.fit(module, toys.loader(24), callback, plugins=plugins)
        slopes.append([logged["apo/meta_grad"] for logged in seen.logged[1:]])
    assert slopes[1] == pytest.approx(slopes[0], rel=0.03)


@pytest.mark.parametrize("kernel", FUSED)
@pytest.mark.parametrize("warmup_steps", [0, 50])
def test_a_step_that_the_scaler_skips_is_no_reason_to_adapt(kernel, warmup_steps):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    module = Overflows(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, **FUSED[kernel]), at=(3, 4))
    callback = APOLearningRate(divergence="kl", every_n_steps=1, warmup_steps=warmup_steps)
    _, seen = toys.fit(module, toys.loader(48), callback, plugins=[halves(scaler)])
    assert scaler.get_scale() == 64.0, "two steps were skipped"
    assert seen.rates[2] == seen.rates[3] == seen.rates[4] != seen.rates[5]
    assert seen.logged[-1]["apo/rejected"] == 0
    for t in (3, 4):
        assert all(torch.equal(a, b) for a, b in zip(seen.before[t], seen.after[t], strict=True))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_gradient_that_overflows_at_the_loss_scale_is_left_out_and_any_other_rejected(scaled, monkeypatch):
    gradient = ProximalObjective.gradient

    def overflowing(self, *args, **kwargs):
        step = gradient(self, *args, **kwargs)
        return dataclasses.replace(step, gradient=[v * torch.inf for v in step.gradient])

    monkeypatch.setattr(ProximalObjective, "gradient", overflowing)
    plugins = [halves(torch.amp.GradScaler("cpu", init_scale=256.0))] if scaled else []
    _, seen = toys.fit(toys.Classifier(), toys.loader(24), APOLearningRate(divergence="kl"), plugins=plugins)
    assert (seen.rates[-1][0] == 0.05) is scaled
    assert ("apo/rejected" in seen.logged[-1]) is not scaled


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    module = toys.Classifier()
    _, seen = toys.fit(module, toys.loader(48), APOLearningRate(), precision=precision, max_epochs=2)
    assert seen.rates[-1][0] != 0.05
    assert seen.logged[-1]["apo/rejected"] == 0
    assert seen.losses[-1] < seen.losses[0]
    assert {p.dtype for p in module.parameters()} == {
        {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    }


# -- rejection --------------------------------------------------------------------------------------------------------


class Cliff(toys.Regression):
    """The loss is not finite beyond a wall in weight space."""

    def __init__(self, optimizer, wall, beyond=math.nan):
        super().__init__(optimizer)
        self.wall, self.beyond = wall, beyond

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.beyond if self.weight.detach().abs().max() > self.wall else loss


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_a_look_ahead_that_is_not_finite_halves_step_and_rate(beyond):
    """Batches without the other batch: the first one makes no look-ahead, the second one leads over the wall."""
    batches = [(x, y - 20.0) for x, y in toys.regression_batches(3)]
    free = toys.Regression(lambda p: torch.optim.SGD(p, lr=0.3))
    _, plain = toys.fit(free, toys.as_they_are(*batches))
    largest = [step[0].abs().max() for step in plain.after]
    module = Cliff(lambda p: torch.optim.SGD(p, lr=0.3), wall=(largest[0] + largest[1]) / 2, beyond=beyond)
    assert largest[0] < largest[1]
    callback = APOLearningRate(**toys.EVERY_STEP, **toys.BESIDE)
    _, seen = toys.fit(module, toys.as_they_are(*batches[:2]), callback)
    assert [r[0] for r in seen.rates] == [0.3, 0.15]
    torch.testing.assert_close(seen.after[1][0], (plain.before[1][0] + plain.after[1][0]) / 2, rtol=1e-13, atol=0)
    assert seen.logged[1]["apo/rejected"] == 1
    assert "apo/fsd" not in seen.logged[1]
    state = callback.state_dict()["optimizers"]["0"]
    assert (state["rejections"], state["meta_count"], state["second_moment"].item()) == (1, 0, 0.0)


def test_the_rate_is_not_halved_below_its_bound():
    module = Cliff(lambda p: torch.optim.SGD(p, lr=0.3), wall=0.0)
    callback = APOLearningRate(lr_bounds=(0.2, 1.0), lam_f=0.0, **toys.EVERY_STEP)
    _, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(1)), callback)
    assert seen.rates == [[0.2]]


class Poison(toys.Classifier):
    """The loss of one batch is finite and its gradient is not."""

    def __init__(self, optimizer, at):
        super().__init__(optimizer)
        self.at = at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net[0].weight.sum() * 0.0).sqrt() if batch_idx == self.at else loss


@pytest.mark.parametrize("kind", [lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), torch.optim.Adam])
def test_a_gradient_that_is_not_finite_is_taken_back_with_what_it_left_in_the_optimizer(kind):
    module = Poison(kind, at=4)
    callback = APOLearningRate(divergence="kl", every_n_steps=1, warmup_steps=0)
    trainer, seen = toys.fit(module, toys.loader(48), callback)
    assert all(torch.equal(a, b) for a, b in zip(seen.before[4], seen.after[4], strict=True))
    assert seen.rates[4][0] == pytest.approx(seen.rates[3][0] / 2)
    assert seen.logged[-1]["apo/rejected"] == 1
    assert all(p.isfinite().all() for step in seen.after for p in step)
    state = trainer.optimizers[0].state
    assert all(v.isfinite().all() for s in state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert not torch.equal(seen.after[5][0], seen.after[4][0]), "training goes on"


def test_weights_that_broke_between_two_meta_steps_stop_training_with_a_reason():
    module = Poison(lambda p: torch.optim.SGD(p, lr=0.05), at=2)
    with pytest.raises(
        RuntimeError, match=r"not finite any more .* step 5; its learning rate is .*raise lam_f .*lower every_n_steps"
    ):
        toys.fit(module, toys.loader(60), APOLearningRate(divergence="kl", every_n_steps=5, warmup_steps=0))


# -- the other batch, the divergence, the weights of the terms --------------------------------------------------------


def test_the_trust_radius_sets_the_change_per_step():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1000, 6, generator=generator), torch.randint(0, 3, (1000,), generator=generator)
    loader, found = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*noise), 100), []
    for radius in (1e-3, 1e-2):
        torch.manual_seed(0)
        callback = APOLearningRate(lam_f="auto", trust_radius=radius, every_n_steps=2, warmup_steps=0)
        module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.05))
        _, seen = toys.fit(module, loader, callback, max_epochs=20)
        ratios = [logged["apo/fsd"] / logged["apo/loss_lookahead"] for logged in seen.logged[100:]]
        found.append(torch.tensor(ratios).median().item() / radius)
        assert seen.logged[-1]["apo/lam_f"] == pytest.approx(callback.state_dict()["optimizers"]["0"]["lam_f"])
    assert all(1 / 3 < f < 3 for f in found), found


def shown(**kwargs):
    """The inputs of the other batch in each look-ahead."""
    seen = []

    def output_fn(module, batch):
        if not torch.is_grad_enabled():
            seen.append(batch[0].clone())
        return module(batch[0])

    callback = APOLearningRate(output_fn=output_fn, divergence="kl", **toys.EVERY_STEP, **kwargs)
    toys.fit(toys.Classifier(), toys.loader(), callback)
    return seen


def test_where_the_other_batch_comes_from():
    data = toys.rows().tensors[0]
    previous = shown(fsd_batch="previous", fsd_fraction=0.5)
    assert [torch.equal(x, data[6 * t : 6 * t + 3]) for t, x in enumerate(previous)] == [True] * 3
    drawn = shown(fsd_batch="loader", fsd_fraction=0.5)
    assert [x.shape for x in drawn] == [(3, 6)] * 4
    assert all(any(torch.equal(row, known) for known in data) for x in drawn for row in x)
    assert len({float(x.sum()) for x in drawn}) == 4
    again, other_seed = shown(fsd_batch="loader", fsd_fraction=0.5), shown(fsd_batch="loader", fsd_fraction=0.5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn, other_seed, strict=True))
    foreign = toys.loader(12, 4, seed=9)
    own = shown(fsd_batch=foreign, fsd_fraction=1.0)
    assert [x.shape for x in own] == [(4, 6)] * 4
    assert all(any(torch.equal(row, known) for known in foreign.dataset.tensors[0]) for x in own for row in x)


def test_drawn_batches_go_through_the_hooks_of_the_data_module():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return toys.loader()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 100.0, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    seen = []

    def output_fn(module, batch):
        seen.append(batch[0].mean().item())
        return module(batch[0])

    callback = APOLearningRate(output_fn=output_fn, divergence="kl", fsd_batch="loader", **toys.EVERY_STEP)
    toys.fit(toys.Classifier(), Data(), callback)
    assert len(seen) == 8
    assert all(150 < mean < 250 for mean in seen)


def test_a_loss_in_a_dict_or_of_one_element_or_left_out_for_a_batch():
    class InDict(toys.Classifier):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "extra": batch[0]}

    class OneElement(toys.Classifier):
        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1]).reshape(1)

    class Skips(toys.Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    rates = []
    for kind in (toys.Classifier, InDict, OneElement):
        torch.manual_seed(0)
        rates.append(toys.fit(kind(), toys.loader(), APOLearningRate())[1].rates)
    assert rates[0] == rates[1] == rates[2]
    _, seen = toys.fit(Skips(), toys.loader(), APOLearningRate())
    assert seen.rates[1] == seen.rates[2] != seen.rates[3]


def test_frozen_and_unused_parameters_take_no_part():
    class Partly(toys.Classifier):
        def __init__(self):
            super().__init__()
            self.net[0].weight.requires_grad_(False)
            self.spare = nn.Linear(3, 3)

    module = Partly()
    before = module.net[0].weight.clone(), module.spare.weight.clone()
    for granularity in ("group", "layer"):
        _, seen = toys.fit(module, toys.loader(), APOLearningRate(granularity=granularity))
        assert seen.logged[-1]["apo/lr/0/" + ("0" if granularity == "group" else "net.4")] != 0.05
    assert torch.equal(before[0], module.net[0].weight)
    assert torch.equal(before[1], module.spare.weight)
    assert seen.logged[-1]["apo/lr/0/spare"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "callback", [APOLearningRate(every_n_steps=2), HypergradientLR()], ids=["apo", "hypergradient"]
)
def test_nothing_is_left_on_the_optimizer_or_the_module(callback):
    module = toys.Classifier()
    trainer, _ = toys.fit(module, toys.loader(), callback)
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not {"log", "log_dict"} & set(vars(module))


def logged_weights(rows, callback, **trainer):
    _, seen = toys.fit(toys.Classifier(), toys.loader(2 * rows, rows), callback, **trainer)
    return [logged.get("apo/lam_f") for logged in seen.logged if "apo/Q" in logged]


@pytest.mark.parametrize("lam_f", [None, "auto"])
def test_fewer_than_a_hundred_examples_make_it_more_cautious(lam_f):
    def callback():
        return APOLearningRate(lam_f=lam_f, **toys.EVERY_STEP)

    assert logged_weights(8, callback()) == [pytest.approx(0.3 * 12.5**2)]
    assert logged_weights(50, callback()) == [pytest.approx(1.2)]
    if lam_f is None:
        assert logged_weights(100, callback()) == [pytest.approx(0.3)]
    assert logged_weights(8, APOLearningRate(lam_f=0.3, **toys.EVERY_STEP)) == [None]
    (accumulated,) = logged_weights(25, callback(), accumulate_grad_batches=2, max_epochs=2)
    assert accumulated == pytest.approx(1.2), "the gradient is that of 50"


def test_batches_of_eight_are_not_the_end():
    """With ``lam_f=0.3`` the loss on all digits ends above 1.8."""
    data = DigitsDataModule(batch_size=8, binarize=False)
    data.setup()
    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    torch.manual_seed(0)
    module.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    toys.fit(module, data.train_dataloader(), APOLearningRate(), max_epochs=5)
    x, y = data.train_set.tensors
    assert torch.nn.functional.cross_entropy(module(x), y) < 0.6
