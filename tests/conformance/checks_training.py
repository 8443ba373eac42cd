"""Checks of whatever trains, in one process."""

import copy
import pickle
from typing import Any

import pytest
import torch

from lightning_ext._lightning import Callback, LightningDataModule, submodule
from lightning_ext._testing.bitwise import first_difference, fit, seeded
from lightning_ext.testing import assert_cli, assert_observer, assert_resumes
from tests.conformance.entry import RECIPES, Entry, new_trainer
from tests.conformance.suite import TRAINS, assert_finite, assert_same, check, state_of, train, weights


@check("callback-observer", "callback-method")
def copies_after_training(entry: Entry) -> None:
    trainer = train(entry)
    component = trainer.callbacks[0]
    for twin in (pickle.loads(pickle.dumps(component)), copy.deepcopy(component)):
        assert_same(component.state_dict(), twin.state_dict(), "the copy of a used callback differs")


@check(*TRAINS)
def fit_validate_test_predict(entry: Entry) -> None:
    module, data = entry.new_module(), entry.new_data()
    trainer = train(entry, module, data)
    source = {"datamodule": data} if isinstance(data, LightningDataModule) else {"dataloaders": data[1]}
    assert trainer.validate(module, **source, verbose=False)[0], "validate logged nothing"
    assert trainer.test(module, **source, verbose=False)[0], "test logged nothing"
    predictions = trainer.predict(module, **source)
    assert predictions
    assert_finite(predictions, "a prediction")


@check(*TRAINS)
def fast_dev_run(entry: Entry) -> None:
    assert train(entry, fast_dev_run=True).global_step == 1


@check(*TRAINS)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def overfit_batches(entry: Entry) -> None:
    assert train(entry, overfit_batches=1, max_epochs=3).global_step == 3


@check(*TRAINS)
def second_fit(entry: Entry) -> None:
    module = entry.new_module()
    trainer = train(entry, module)
    steps, before = trainer.global_step, weights(module)
    trainer.fit_loop.max_epochs = 2
    fit(trainer, module, entry.new_data())
    assert trainer.global_step == 2 * steps
    assert first_difference(before, weights(module)) is not None, "the second fit changed nothing"
    again = new_trainer(trainer.callbacks[:1] if entry.is_callback else [])
    fit(again, module, entry.new_data())
    assert again.global_step == steps, "the component does not work in a second Trainer"


@check(*TRAINS)
def accumulate_grad_batches(entry: Entry) -> None:
    assert train(entry, accumulate_grad_batches=2).global_step == 2, "three batches in twos are two steps"


@check(*TRAINS)
def gradient_clipping(entry: Entry) -> None:
    norms: list[float] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            grads = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            norms.append(torch.stack(grads).norm().item())

    train(entry, gradient_clip_val=1e-3, callbacks=[Looks()])
    assert norms
    assert max(norms) <= 1e-3 * (1 + 1e-4), f"gradients were not clipped: {norms}"
    train(entry, gradient_clip_val=1e-3, gradient_clip_algorithm="value")


@check(*TRAINS)
def bf16_mixed(entry: Entry) -> None:
    module = entry.new_module()
    train(entry, module, precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@check(*TRAINS)
def fp16_with_a_scaler(entry: Entry) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    used: list[float] = []
    scale = scaler.scale
    scaler.scale = lambda loss: (used.append(scaler.get_scale()), scale(loss))[1]  # type: ignore[method-assign]
    plugin = submodule("plugins.precision").MixedPrecision("16-mixed", "cpu", scaler=scaler)
    train(entry, plugins=[plugin])
    assert used, "the loss was not scaled"


@check(*TRAINS)
def manual_optimisation(entry: Entry) -> None:
    """The user's own loop around the module's ``training_step``."""
    module = entry.new_module()

    class Manual(type(module)):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    Manual.__name__ = type(module).__name__
    module._automatic_optimization = False
    module.__class__ = Manual
    assert train(entry, module).global_step == 3


@check(*TRAINS)
def validate_in_inference_mode(entry: Entry) -> None:
    """One process, where Lightning's default is inference mode; the same numbers as without."""
    module = entry.new_module()

    def logged(inference_mode: bool) -> Any:
        seen: list[bool] = []

        class Looks(Callback):
            def on_validation_batch_start(self, *args: Any) -> None:
                seen.append(torch.is_inference_mode_enabled())

        data = entry.new_data()
        source = {"datamodule": data} if isinstance(data, LightningDataModule) else {"dataloaders": data[1]}
        trainer = new_trainer([*entry.new_callbacks(), Looks()], inference_mode=inference_mode)
        with seeded(0):
            result = trainer.validate(module, **source, verbose=False)
        assert set(seen) == {inference_mode}
        assert result[0], "validate logged nothing"
        return result

    assert_same(logged(True), logged(False), "inference mode changes what validate logs")


@check(*TRAINS)
def compiled_inner_network(entry: Entry) -> None:
    plain, compiled = entry.new_module(), entry.new_module()
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    for name in entry.networks:
        setattr(compiled, name, torch.compile(getattr(compiled, name), backend="eager"))
    expected, ours = train(entry, plain), train(entry, compiled)
    torch._dynamo.reset()
    for key, value in expected.callback_metrics.items():
        torch.testing.assert_close(ours.callback_metrics[key], value, rtol=1e-4, atol=1e-5, msg=f"{key} differs")
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, msg=f"parameter {name} differs")


@check(*TRAINS)
def weights_only_load(entry: Entry) -> None:
    module = entry.new_module()
    trainer = train(entry, module)
    trainer.save_checkpoint("end.ckpt")
    checkpoint = torch.load("end.ckpt", weights_only=True)
    fresh = entry.new_module()
    fresh.load_state_dict(checkpoint["state_dict"])
    assert_same(weights(module), weights(fresh), "a weight is lost in the checkpoint")
    for callback in trainer.callbacks[: int(entry.is_callback)]:
        twin = entry.factory()
        assert callback.state_key == twin.state_key, "state_key is not the same for equal arguments"
        twin.load_state_dict(checkpoint["callbacks"].get(callback.state_key, {}))
        assert_same(callback.state_dict(), twin.state_dict(), "the callback's state is lost in the checkpoint")


def resumes(entry: Entry, **kwargs: Any) -> None:
    assert_resumes(entry.new_module, entry.new_data, entry.new_callbacks, limit_val_batches=2, **kwargs)


@check(*TRAINS)
def resumes_from_the_end_of_an_epoch(entry: Entry) -> None:
    resumes(entry, checkpoint="epoch", crash_at=(1, 1), limit_train_batches=3)


@check(*TRAINS)
def resumes_from_the_middle_of_an_epoch(entry: Entry) -> None:
    resumes(entry, crash_at=(0, 2), limit_train_batches=3)
    resumes(entry, crash_at=(1, 1), limit_train_batches=3)


@check(*TRAINS)
def two_instances(entry: Entry) -> None:
    if entry.is_callback:
        trainer = train(entry, callbacks=[entry.another()])
        keys = [callback.state_key for callback in trainer.callbacks[:2] if callback.state_dict()]
        assert len(keys) == len(set(keys)), f"two instances share the state_key {keys[:1]}"
        return
    first, second = entry.factory(), entry.another()
    if entry.kind == "module":
        before = state_of(second), weights(second)
        train(entry, first)
        assert_same(before, (state_of(second), weights(second)), "training one module changes another")
        train(entry, second)
    else:
        train(entry, data=first)
        train(entry, data=second)


@check(*TRAINS)
@pytest.mark.filterwarnings("ignore")
def cli_recipe(entry: Entry) -> None:
    assert entry.recipe, "name the recipe, or say in skip why there is none"
    cli = assert_cli(RECIPES / f"{entry.recipe}.yaml")
    parts = [cli.model, cli.datamodule, *cli.trainer.callbacks]
    assert any(type(part).__name__ in entry.names for part in parts), f"the recipe does not use {entry.names}"


@check("callback-observer")
def leaves_training_alone(entry: Entry) -> None:
    grid: list[dict[str, Any]] = [
        {"limit_train_batches": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed", "max_epochs": 1},
        {"overfit_batches": 1},
    ]
    for kwargs in grid:
        assert_observer(entry.factory, entry.module, entry.new_data, **kwargs)
