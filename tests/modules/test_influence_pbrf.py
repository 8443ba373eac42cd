"""Newton steps to the proximal Bregman response: the first is influence, the last is the closed form."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import MisconfigurationException, submodule
from lightning_ext.functional import GGNOperator, InfluenceObjective
from lightning_ext.modules import PBRFModule
from lightning_ext.modules._influence_end import advise_on_the_end
from lightning_ext.modules._influence_newton import Newton
from lightning_ext.testing import StatefulLoader, assert_resumes, ddp_trainer_kwargs
from tests.modules.test_influence_response import (
    HALF,
    LAMBDA,
    WD,
    exact_pbrf,
    fit,
    linear_problem,
    loader,
    net,
    samples,
)

FEW = [1, [2, 3]]  # of twelve samples: removing more takes a network far away


def newton(base=None, **kwargs):
    kwargs = {"remove": FEW, "damping": LAMBDA, "weight_decay": WD, "tolerance": 1e-4, **kwargs}
    return PBRFModule(net().double() if base is None else base, optimizer="newton", **kwargs)


def test_the_first_step_is_the_influence_functions_estimate():
    base = net().double().eval()
    module = newton(base, tolerance=None)
    fit(module, max_epochs=1)
    x, t = samples().tensors
    damped = GGNOperator(base, InfluenceObjective(), [(x.double(), t)], damping=LAMBDA + WD).dense()
    for found, group in zip(module.response(), ([1], [2, 3]), strict=True):
        loss = nn.functional.cross_entropy(base(x[group].double()), t[group], reduction="sum") / 12
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(base.parameters()))])
        torch.testing.assert_close(found, torch.linalg.solve(damped, gradient), rtol=5e-3, atol=1e-6)


def test_a_few_steps_reach_the_closed_form():
    base, data, _ = linear_problem()
    module = newton(base, objective=HALF, remove=[1, [0, 3, 4]], tolerance=1e-8)
    trainer = fit(module, loader(data), max_epochs=30)
    for found, group in zip(module.response(), ([1], [0, 3, 4]), strict=True):
        torch.testing.assert_close(found, exact_pbrf(base, data, group), rtol=1e-6, atol=1e-10)
    assert trainer.global_step < 15


def test_a_network_is_minimised_as_far_as_adam_would_and_farther():
    module = newton()
    trainer = fit(module, max_epochs=100)
    assert module.gradient_ratio.max() <= 1e-4
    assert trainer.global_step < 60
    slow = PBRFModule(net().double(), None, FEW, LAMBDA, WD, lr=0.02, tolerance=1e-3)
    fit(slow, max_epochs=4000)
    torch.testing.assert_close(module.response(), slow.response(), rtol=0.02, atol=2e-3)


def test_a_fit_cut_short_never_ends_at_a_step_that_led_uphill():
    start = newton(remove=[[1, 2, 3], [4, 5, 6, 7]], damping=1e-2, weight_decay=0.0, tolerance=None)
    fit(start, max_epochs=1)
    norms = start.newton.gradient.norm(dim=1)  # at the trained network: that of the removed samples
    for epochs in (3, 6, 9, 12):
        module = newton(remove=[[1, 2, 3], [4, 5, 6, 7]], damping=1e-2, weight_decay=0.0, tolerance=1e-12)
        with pytest.warns(UserWarning, match="above tolerance"):
            fit(module, max_epochs=epochs)
        gone = module.newton.gradient.norm(dim=1) / module.gradient_ratio  # what the last accepted point had
        assert (gone >= norms * (1 - 1e-6)).all(), f"a copy ended uphill after {epochs} epochs"


def test_a_step_that_leads_uphill_is_halved():
    """A metric that is ten times too long, on a parabola, a cone with a rounded tip, and from the top of a wave."""
    search = Newton(3, 1, torch.float64)
    search.solve = lambda rows: 10 * rows
    x, values = torch.full((3, 1), 3.0, dtype=torch.float64), []
    for _ in range(40):
        value = torch.stack([x[0, 0] ** 2 / 2, (1 + x[1, 0] ** 2).sqrt(), -x[2, 0].cos()])
        gradient = torch.stack([x[0], x[1] / (1 + x[1] ** 2).sqrt(), x[2].sin()])
        x = search.step(x, gradient, value, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
        values.append(search.value.clone())
    assert (torch.stack(values).diff(dim=0) <= 0).all()
    torch.testing.assert_close(search.point, torch.zeros_like(x), rtol=0.0, atol=1e-6)
    resting = search.step(
        torch.ones_like(x), torch.ones_like(x), torch.zeros(3), torch.zeros(3), torch.ones(3, dtype=torch.bool)
    )
    assert torch.equal(resting, torch.ones_like(x)), "a copy that is done went on"


def test_a_copy_whose_objective_has_no_minimum_is_held_near_the_trained_network():
    """A cubic that falls for ever, beside a parabola whose minimum lies within reach."""
    search = Newton(2, 1, torch.float64)
    search.solve = lambda rows: rows.clone()
    x = torch.zeros(2, 1, dtype=torch.float64)
    for _ in range(60):
        value = torch.stack([x[0, 0] ** 2 / 2 - x[0, 0] - x[0, 0] ** 3 / 3, (x[1, 0] - 3) ** 2 / 6])
        gradient = torch.stack([x[0] - 1 - x[0] ** 2, (x[1] - 3) / 3])
        x = search.step(x, gradient, value, torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert search.held.tolist() == [True, False]
    assert 1 < search.point[0] <= 10  # the first step was 1
    torch.testing.assert_close(search.point[1], x.new_tensor([3.0]), rtol=1e-6, atol=0.0)
    never = search.keeps(100 * torch.ones_like(x), 0 * x, torch.full((2,), -9e9), torch.zeros(2))
    assert not never.any(), "an end that nobody looked at is out of reach"
    with pytest.warns(UserWarning, match=r"Copies \[0\] were held at ten times the influence function's distance"):
        advise_on_the_end("PBRFModule", torch.tensor([2.0, 0.0]), 0.1, search)


def test_advice_on_the_end_fits_the_optimizer_and_names_the_copies():
    with pytest.warns(UserWarning, match=r"of 2 copies, \[0, 1\]: give more epochs\. Networks"):
        fit(newton(tolerance=1e-12), max_epochs=2)
    with pytest.warns(UserWarning, match=r"of 2 copies, \[0, 1\]: train longer, with another lr, or"):
        fit(PBRFModule(net().double(), None, FEW, LAMBDA, WD), max_epochs=2)


@pytest.mark.parametrize("outputs", [3, 70])
@pytest.mark.parametrize("optimizer", ["adam", "newton"])
def test_a_function_that_is_not_convex_is_refused(optimizer, outputs):
    torch.manual_seed(0)
    objective = InfluenceObjective(lambda y, t: torch.sin(3 * y).sum(1))
    data = TensorDataset(torch.randn(12, 4), torch.zeros(12, outputs))
    module = PBRFModule(nn.Linear(4, outputs), objective, [0, 1], optimizer=optimizer)
    with pytest.raises(ValueError, match="not convex in the outputs"):
        fit(module, loader(data), max_epochs=1)


def test_half_the_precision_goes_down_to_its_rounding_and_stays():
    module = newton(net(), tolerance=1e-9)
    with pytest.warns(UserWarning, match="above tolerance"):
        fit(module, max_epochs=60)
    assert module.gradient_ratio.max() < 2e-3
    wide = newton(tolerance=1e-5)
    fit(wide, max_epochs=100)
    torch.testing.assert_close(module.response().double(), wide.response(), rtol=1e-2, atol=1e-5)


def test_newton_resumes_to_the_bit():
    def data():
        return StatefulLoader(samples(), 12)

    def module():
        return newton(net(), dataset=samples(), tolerance=None)

    assert_resumes(module, data, max_epochs=5, crash_at=(2, 0), checkpoint="epoch")


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:.*above tolerance")
def test_newton_on_two_processes_is_newton_on_one(tmp_path):
    class Writes(submodule("callbacks").Callback):
        def on_fit_end(self, trainer, pl_module):
            torch.save(
                (pl_module.response(), trainer.global_step), f"rank{trainer.global_rank}of{trainer.world_size}.pt"
            )

    for world, kwargs in ((1, {}), (2, ddp_trainer_kwargs())):
        data = DataLoader(samples(), batch_size=12 // world, shuffle=False)
        fit(newton(tolerance=1e-5), data, callbacks=[Writes()], **{**kwargs, "max_epochs": 80})
    (one, steps), (first, also), (second, _) = (torch.load(f"rank{name}.pt") for name in ("0of1", "0of2", "1of2"))
    torch.testing.assert_close(first, one, rtol=1e-3, atol=1e-7)
    assert torch.equal(first, second)
    assert abs(steps - also) <= 2
    assert steps < 80


def test_newton_wants_the_whole_set_in_one_step():
    for data, kwargs in ((loader(batch_size=5), {}), (loader(), {"accumulate_grad_batches": 2})):
        with pytest.raises(MisconfigurationException, match="whole training set in one batch"):
            fit(newton(), data, **kwargs)
    with pytest.raises(MisconfigurationException, match="whole training set in one batch"):
        fit(newton(), loader(batch_size=5), limit_train_batches=1)


def test_a_convolutional_network_and_integer_inputs():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(2, 3))
    module = newton(conv.double())
    fit(module, max_epochs=60)
    assert module.gradient_ratio.max() <= 1e-4

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 3), nn.Linear(3, 7)

        def forward(self, x):
            return self.out(self.embed(x).cumsum(1).tanh())

    tokens = torch.randint(0, 7, (12, 5))
    module = newton(Words().double())
    fit(module, loader(TensorDataset(tokens, tokens.roll(-1, 1))), max_epochs=60)
    assert module.gradient_ratio.max() <= 1e-4
