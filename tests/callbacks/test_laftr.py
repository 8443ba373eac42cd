"""The penalty against gradients by hand, in every way that Lightning makes a step; when it is there and when not."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from lightning_ext._lightning import Callback, MisconfigurationException, submodule
from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.testing import assert_observer, assert_resumes, ddp_trainer_kwargs
from tests.callbacks.laftr_toys import Anchor, Net, flat, loader, seeded_net, train
from tests.conformance import toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging")

WEIGHT, SCALE = 0.7, 3.0


def remembering(*seeds, estimator=None, **kwargs):
    """A callback with one past task per seed, whose reference is a network of that seed."""
    callback = FunctionSpaceRegularizer(estimator or Anchor(SCALE), **{"weight": WEIGHT, **kwargs})
    for seed in seeds:
        callback.end_task(None, seeded_net(seed=seed), loader(seed=seed))
    return callback


class Returns(Net):
    """The loss in a dict, with company."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "n": len(batch[0])}


def by_hand(module, batch, references):
    loss = F.cross_entropy(module(batch[0]), batch[1])
    grad = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))])
    pull = sum(SCALE * (flat(module) - reference) for reference in references) / max(1, len(references))
    return grad, WEIGHT * pull


def scaler_plugin():
    return submodule("plugins.precision").MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0)
    )


@pytest.mark.parametrize("references", [[5], [5, 6, 7]])
@pytest.mark.parametrize(
    ("kwargs", "tolerance"),
    [
        ({}, 1e-6),
        ({"accumulate_grad_batches": 3}, 1e-6),
        ({"gradient_clip_val": 0.5}, 1e-6),
        ({"precision": "bf16-mixed"}, 2e-3),
        ({"plugins": "scaler"}, 1e-3),
        ({"ddp": True}, 1e-6),
        ({"ddp": True, "accumulate_grad_batches": 2}, 1e-6),
        ({"cls": Returns}, 1e-6),
    ],
    ids=["plain", "accumulation", "clipping", "bf16", "fp16-scaler", "ddp", "ddp-accumulation", "dict"],
)
def test_one_step_adds_the_gradient_of_the_penalty_once(kwargs, tolerance, references):
    kwargs = dict(kwargs)
    module = seeded_net(kwargs.pop("cls", Net))
    before = flat(module)
    whole = next(iter(loader(batch_size=12)))
    grad, pull = by_hand(module, whole, [flat(seeded_net(seed=s)) for s in references])
    clip = kwargs.get("gradient_clip_val")
    expected = grad + pull
    if clip:
        assert expected.norm() > clip
        expected = expected * clip / expected.norm()
    if kwargs.get("plugins"):
        kwargs["plugins"] = [scaler_plugin()]
    ranks, steps = (2, ddp_trainer_kwargs) if kwargs.pop("ddp", False) else (1, dict)
    size = 12 // kwargs.get("accumulate_grad_batches", 1) // ranks
    torch.manual_seed(0)
    train(module, [remembering(*references, fit_at="manual")], loader(batch_size=size), **steps(**kwargs))
    made = (before - flat(module)) / Net.lr
    torch.testing.assert_close(made, expected, rtol=0, atol=tolerance * float(expected.abs().max()) + 1e-6)
    assert float(pull.abs().max()) > 20 * tolerance, "the penalty would not be seen"


def test_sum_over_tasks_and_the_task_being_learned():
    module = seeded_net()
    callback = remembering(5, 6, average_over_tasks=False)
    distances = [SCALE / 2 * float((flat(module) - flat(seeded_net(seed=s))).square().sum()) for s in (5, 6)]
    assert callback.penalty(module).item() == pytest.approx(WEIGHT * sum(distances), rel=1e-5)
    callback.current_task = 0  # continued: its own reference would hold it back
    assert callback.penalty(module).item() == pytest.approx(WEIGHT * distances[1], rel=1e-5)
    callback.end_task(None, module, loader())
    assert callback.tasks == [1, 0], "a task that ends again replaces what was stored"
    callback.current_task = None
    assert callback.penalty(module).item() == pytest.approx(WEIGHT * distances[1], rel=1e-5)


def test_no_past_no_trace():
    """With nothing to remember, and after the fit: the training and the module are as without the callback."""
    assert_observer(
        lambda: FunctionSpaceRegularizer(Anchor()), lambda: toys.Net(dropout=0.3), toys.loaders, max_epochs=2
    )


def test_weight_zero_watches():
    assert_observer(lambda: remembering(5, weight=0.0, log_every_n_steps=1), Net, loader)
    trainer = train(seeded_net(), [remembering(5, weight=0.0)])
    assert trainer.callback_metrics["laftr/penalty"] > 0
    assert trainer.callback_metrics["laftr/weighted"] == 0


class Spy(Callback):
    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(self.look(pl_module))


def wrapped(module):
    return "training_step" in vars(module)


def test_training_step_is_wrapped_only_while_there_is_a_past_and_a_fit():
    callback, spy, module = FunctionSpaceRegularizer(Anchor()), Spy(wrapped), seeded_net()
    train(module, [callback, spy])
    assert spy.seen == [False] * 3
    assert callback.tasks == [0]
    train(module, [callback, spy])
    assert spy.seen[3:] == [True] * 3
    assert callback.tasks == [0, 1]
    assert not wrapped(module)


def test_two_callbacks_at_once_and_a_step_of_the_module_itself():
    module, other = seeded_net(), seeded_net()
    own = other.training_step
    other.training_step = own
    before, calls = flat(module), [remembering(5), remembering(6, fit_at="manual")]
    for each in (module, other):
        train(each, calls, loader(batch_size=12))
    grad, _ = by_hand(seeded_net(), next(iter(loader(batch_size=12))), [])
    pulls = [by_hand(seeded_net(), next(iter(loader())), [flat(seeded_net(seed=s))])[1] for s in (5, 6)]
    torch.testing.assert_close((before - flat(module)) / Net.lr, grad + sum(pulls), rtol=1e-4, atol=1e-5)
    assert not wrapped(module)
    assert vars(other)["training_step"] == own


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_interrupted_fit_restores_the_step_and_leaves_no_statistics(error):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert wrapped(pl_module)
            raise error

    module, callbacks = seeded_net(), [remembering(5), remembering(6, fit_at="manual")]
    with pytest.raises((RuntimeError, SystemExit)):
        train(module, [*callbacks, Fails()])
    assert not wrapped(module)
    assert callbacks[0].tasks == [0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_during_the_fit_is_a_module_without_penalty(copied):
    module, spy = seeded_net(), Spy(copied)
    train(module, [remembering(5), spy], limit_train_batches=1)
    twin, batch = spy.seen[0], next(iter(loader()))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert float(twin.training_step(batch, 0)) == pytest.approx(float(torch.tensor(3.0).log()))
    assert float(module.training_step(batch, 0)) != pytest.approx(float(torch.tensor(3.0).log()))
    twin.zero_grad()
    train(twin, [], limit_train_batches=1)


class Skips(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx else None


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")
def test_a_step_that_returns_none_is_skipped():
    estimator = Anchor(SCALE)
    callback = remembering(5, estimator=estimator)
    train(seeded_net(Skips), [callback])
    assert callback._draws == 2, "batch 0 of three has no loss to add to"


def test_logged_every_n_steps_to_loggers_and_callback_metrics(tmp_path):
    lines = []

    class Logger(submodule("loggers").CSVLogger):
        def log_metrics(self, metrics, step=None):
            lines.append((step, metrics))

    callback = remembering(5, 6, log_every_n_steps=2)
    module = seeded_net()
    distances = [SCALE / 2 * float((flat(module) - flat(seeded_net(seed=s))).square().sum()) for s in (5, 6)]
    trainer = train(module, [callback], loader(20), logger=Logger(tmp_path), log_every_n_steps=100)
    lines = [(step, found) for step, found in lines if "laftr/penalty" in found]
    assert [step for step, _ in lines] == [0, 2, 4]
    first = lines[0][1]
    assert first["laftr/task_0"] == pytest.approx(distances[0], rel=1e-5)
    assert first["laftr/task_1"] == pytest.approx(distances[1], rel=1e-5)
    assert first["laftr/penalty"] == pytest.approx(sum(distances) / 2, rel=1e-5)
    assert first["laftr/weighted"] == pytest.approx(WEIGHT * sum(distances) / 2, rel=1e-5)
    assert first["laftr/stats_bytes"] == 2 * (2 * flat(module).nbytes + 16), "reference, anchor and sums"
    assert set(first) <= set(trainer.callback_metrics)


class Manual(Net):
    automatic_optimization = False
    callback = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.callback is not None:
            loss = loss + self.callback.penalty(self)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def test_manual_optimisation_is_refused_with_what_to_do_and_that_works():
    with pytest.raises(MisconfigurationException, match=r"add_to_loss=False.*callback.penalty\(pl_module\)"):
        train(seeded_net(Manual), [remembering(5)])
    module = seeded_net(Manual)
    module.callback = remembering(5, add_to_loss=False)
    before, batches = flat(module), loader(batch_size=12)
    grad, pull = by_hand(module, next(iter(batches)), [flat(seeded_net(seed=5))])
    trainer = train(module, [module.callback], batches)
    torch.testing.assert_close((before - flat(module)) / Net.lr, grad + pull, rtol=1e-4, atol=1e-5)
    assert trainer.callback_metrics["laftr/penalty"] > 0
    assert module.callback.tasks == [0, 1]


def test_resumed_in_the_middle_of_task_three_is_uninterrupted():
    """Draws included: the estimator's noise moves every step."""

    def callbacks():
        return [remembering(5, 6, estimator=Anchor(SCALE, noise=0.1))]

    assert_resumes(lambda: seeded_net(toys.Plain), toys.loaders, callbacks, crash_at=(1, 1))
    assert_resumes(lambda: seeded_net(toys.Plain), toys.loaders, callbacks, crash_at=(1, 1), checkpoint="epoch")


def test_draws_move_on_from_step_to_step_and_are_the_same_in_a_second_run():
    def weights(seed):
        module = seeded_net()
        train(module, [remembering(5, estimator=Anchor(0.0, noise=0.1), seed=seed)], loader(4), max_epochs=2)
        return flat(module)

    def steps(seed):
        callback = remembering(5, estimator=Anchor(0.0, noise=0.1), seed=seed)
        return [callback.penalty(seeded_net()).item() for _ in range(3)]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert len(set(steps(0))) == 3


def test_ranks_draw_differently_and_take_the_same_step():
    module = seeded_net()
    before = flat(module)
    callback = remembering(5, estimator=Anchor(SCALE, noise=0.5), fit_at="manual")
    train(module, [callback], loader(12, batch_size=6), **ddp_trainer_kwargs(max_epochs=1))
    grad, pull = by_hand(seeded_net(), next(iter(loader(batch_size=12))), [flat(seeded_net(seed=5))])
    noise = ((before - flat(module)) / Net.lr - grad - pull) / WEIGHT
    estimator = callback._memory._held[0]
    draws = []
    for rank in (0, 1):
        estimator.reseed(0, rank, 0, 0)
        draws.append(0.5 * estimator.draw())
    assert not torch.equal(*draws)
    torch.testing.assert_close(noise, (draws[0] + draws[1]) / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -1.0}, "weight must be finite and at least 0; got -1.0"),
        ({"weight": float("nan")}, "weight must be finite"),
        ({"fit_at": "never"}, "fit_at must be 'fit_end' or 'manual'; got 'never'"),
        ({"consolidate": "first"}, "consolidate must be 'all', 'last' or 'merge'; got 'first'"),
        ({"log_every_n_steps": 0}, "log_every_n_steps must be a whole number, at least 1; got 0"),
        ({"estimator": 3}, "estimator must be a name or a FunctionSpaceEstimator; got 3"),
        ({"inputs": "image"}, "inputs: say this to the estimator"),
        ({"estimator_options": {"scale": 2.0}}, "scale: say this to the estimator"),
        ({"diagnostics_loader": iter([])}, "pass a loader, no iterator"),
        ({"heads": 3}, "heads must be a function of the task or a list"),
        ({"heads": "ab"}, "heads must be a function of the task or a list"),
        ({"weight": "10"}, "weight must be finite and at least 0; got '10'"),
        ({"weight": None}, "weight must be finite and at least 0; got None"),
        ({"weight": True}, "weight must be finite and at least 0; got True"),
        ({"log_every_n_steps": 1.5}, "log_every_n_steps must be a whole number, at least 1; got 1.5"),
        ({"epochs_per_task": 2.5}, "epochs_per_task must be a whole number, at least 1; got 2.5"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"add_to_loss": "no"}, "add_to_loss must be True or False; got 'no'"),
        ({"average_over_tasks": None}, "average_over_tasks must be True or False; got None"),
        ({"forward": 3}, "forward must be a function of the module and its inputs; got 3"),
        ({"inputs": 0.5}, "inputs must be a key of a batch or a function of it; got 0.5"),
        ({"target": [1]}, r"target must be a key of a batch or a function of it; got \[1\]"),
        ({"memory_file": 3}, "memory_file must be a path; got 3"),
        ({"estimator_options": 3}, "estimator_options must be a dict of arguments; got 3"),
        ({"diagnostics_loader": 3}, "diagnostics_loader must be a loader, or a function task -> loader; got 3"),
        ({"diagnostics_loader": [loader(), loader()]}, "holds several loaders: pass a function"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FunctionSpaceRegularizer(**{"estimator": Anchor(), **kwargs})


def test_a_fitted_estimator_is_refused():
    fitted = Anchor().fit(seeded_net(), loader())
    with pytest.raises(ValueError, match="must not be fitted yet"):
        FunctionSpaceRegularizer(fitted)
