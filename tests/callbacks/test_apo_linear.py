"""Which optimizers are rescaled, that rescaling is what they would have done themselves, and which are refused."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.callbacks import APOLearningRate
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1}),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
    "Muon": (getattr(torch.optim, "Muon", None), {"weight_decay": 0.1}),
}
KERNELS = {"for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FUSED = {"SGD", "SGD momentum", "SGD nesterov", "Adam", "AdamW", "Adagrad"}
CASES = [
    pytest.param(name, kernel, id=f"{name}-{kernel}")
    for name in OPTIMIZERS
    for kernel in KERNELS
    if (kernel != "fused" or name in FUSED) and (name != "Muon" or kernel == "for loop")
]


class Matrix(toys.Regression):
    """A weight matrix, because Muon takes nothing else."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.weight).tanh().sum(1, keepdim=True)


def replayed(build, start, seen):
    """The optimizer alone, with the gradients and the learning rates of the training."""
    weight = nn.Parameter(start.clone())
    optimizer = build([weight])
    for (grad,), (rate,) in zip(seen.grads, seen.rates, strict=True):
        weight.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_the_weights_are_those_of_the_optimizer_with_the_learning_rates_found(name, kernel):
    kind, options = OPTIMIZERS[name]
    if kind is None:
        pytest.skip("this torch has no Muon")
    options = {**options, "lr": 0.02, **(KERNELS[kernel] if name != "Muon" else {})}
    module = Matrix(lambda params: kind(params, **options))
    start = module.weight.detach().clone()
    callback = APOLearningRate(meta_lr=0.3, **{**toys.EVERY_STEP, **toys.BESIDE})
    _, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(8)), callback)
    rates = [rates[0] for rates in seen.rates]
    assert rates[0] == 0.02
    assert all(1e-3 < abs(math.log(b / a)) < math.log(2) + 1e-9 for a, b in itertools.pairwise(rates))
    expected = replayed(lambda params: kind(params, **options), start, seen)
    torch.testing.assert_close(module.weight.data, expected, rtol=1e-11, atol=1e-13)
    assert not torch.allclose(expected, start, rtol=1e-3)


def test_adafactor_beyond_its_own_ceiling():
    """It takes the smaller of lr and 1 / sqrt(step); there the step does not depend on lr."""
    module = Matrix(lambda params: torch.optim.Adafactor(params, lr=1.0))
    start = module.weight.detach().clone()
    callback = APOLearningRate(meta_lr=0.3, **{**toys.EVERY_STEP, **toys.BESIDE})
    _, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(8)), callback)
    expected = replayed(lambda params: torch.optim.Adafactor(params, lr=1.0), start, seen)
    torch.testing.assert_close(module.weight.data, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}], ids=["for loop", "fused"])
def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(options):
    rate = torch.tensor(0.02, dtype=torch.float64)
    module = Matrix(lambda params: torch.optim.Adam(params, lr=rate, **options))
    start = module.weight.detach().clone()
    callback = APOLearningRate(meta_lr=0.3, **{**toys.EVERY_STEP, **toys.BESIDE})
    trainer, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(8)), callback)
    assert trainer.optimizers[0].param_groups[0]["lr"] is rate
    assert rate.item() == seen.rates[-1][0] != 0.02
    expected = replayed(lambda params: torch.optim.Adam(params, lr=0.02, **options), start, seen)
    torch.testing.assert_close(module.weight.data, expected, rtol=1e-11, atol=1e-13)


# -- optimizers nobody here has heard of ------------------------------------------------------------------------------


class Sign(torch.optim.Optimizer):
    """Foreign and linear: the sign of the gradient."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.direction(p.grad, group["lr"]))
        return loss

    def direction(self, grad, lr):
        return grad.sign()


class Squared(Sign):
    """Foreign and not linear."""

    def direction(self, grad, lr):
        return lr * grad


class Mute(Sign):
    """Foreign, and never moves anything."""

    def direction(self, grad, lr):
        return 0 * grad


class Needy(Sign):
    """Foreign, and needs a closure."""

    def step(self, closure):
        return super().step(closure)


def owned_by(package, name):
    return type(name, (Sign,), {"__module__": f"{package}.inner"})


REFUSED = {
    "ASGD": (torch.optim.ASGD, "averaging"),
    "Rprop": (torch.optim.Rprop, "step size of its own"),
    "LBFGS": (torch.optim.LBFGS, "several times"),
    "SparseAdam": (torch.optim.SparseAdam, "dense gradients"),
    "AdamWScheduleFree": (owned_by("schedulefree", "AdamWScheduleFree"), "averaged weights"),
    "Prodigy": (owned_by("prodigyopt", "Prodigy"), "learning rate of its own"),
    "DAdaptAdam": (owned_by("dadaptation", "DAdaptAdam"), "learning rate of its own"),
    "Heir": (type("Heir", (torch.optim.Rprop,), {}), "step size of its own"),
    "Squared": (Squared, "half the learning rate did not give half the step"),
    "Mute": (Mute, "half the learning rate did not give half the step"),
    "Needy": (Needy, r"could not be tried out \(TypeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_be_rescaled_is_refused_by_name(name):
    kind, reason = REFUSED[name]
    module = toys.Regression(lambda params: kind(list(params), lr=0.01))
    with pytest.raises(MisconfigurationException, match=f"step of {name} cannot be rescaled: .*{reason}.*optimizers="):
        toys.fit(module, toys.as_they_are(*toys.regression_batches(2)), APOLearningRate())


def test_a_foreign_optimizer_that_is_linear_passes():
    module = toys.Regression(lambda params: Sign(list(params)))
    callback = APOLearningRate(meta_lr=0.3, **{**toys.EVERY_STEP, **toys.BESIDE})
    _, seen = toys.fit(module, toys.as_they_are(*toys.regression_batches(4)), callback)
    for rates, before, after, grads in zip(seen.rates, seen.before, seen.after, seen.grads, strict=True):
        torch.testing.assert_close(after[0], before[0] - rates[0] * grads[0].sign(), rtol=1e-12, atol=1e-14)
    assert len({rates[0] for rates in seen.rates}) == 4


def test_trying_a_foreign_optimizer_out_disturbs_nothing():
    module = toys.Regression(lambda params: Sign(list(params)))
    weight, callback = module.weight.detach().clone(), APOLearningRate()
    trainer, _ = toys.fit(module, toys.as_they_are(*toys.regression_batches(2)), callback, max_steps=0)
    state = torch.get_rng_state()
    callback.on_fit_start(trainer, module)
    assert torch.equal(module.weight, weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_that_is_not_chosen_may_be_of_any_kind():
    class Two(toys.Manual):
        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net[0].parameters(), lr=0.05),
                torch.optim.Rprop(self.net[4].parameters(), lr=0.01),
            ]

    callback = APOLearningRate(optimizers=[0], loss_fn=toys.cross_entropy, divergence="kl")
    _, seen = toys.fit(Two(), toys.loader(), callback)
    assert seen.rates[-1][0] != 0.05
    assert seen.rates[-1][1] == 0.01
    with pytest.raises(MisconfigurationException, match="Rprop"):
        toys.fit(Two(), toys.loader(), APOLearningRate(loss_fn=toys.cross_entropy))
