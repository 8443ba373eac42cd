"""The public test helpers pass what is right and fail what is wrong, by the message that a user will read."""

import os
import random
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch.utils.data import DataLoader

from lightning_ext import testing
from lightning_ext._lightning import Callback, LightningDataModule, Trainer
from tests.conformance import toys


def _sum_of_ranks(rank, offset):
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return {"rank": rank, "world": dist.get_world_size(), "total": total}


class TestRunDdp:
    @pytest.mark.ddp
    def test_returns_what_each_rank_returned_in_order(self):
        results = testing.run_ddp(_sum_of_ranks, 10)
        assert [r["rank"] for r in results] == [0, 1]
        assert all(r["world"] == 2 and r["total"] == 21 for r in results)

    @pytest.mark.ddp
    def test_three_ranks_and_a_closure(self):
        seen = [3, 5, 7]
        assert testing.run_ddp(lambda rank: seen[rank], world_size=3) == seen

    @pytest.mark.ddp
    def test_one_rank(self):
        assert testing.run_ddp(_sum_of_ranks, 1, world_size=1)[0]["total"] == 1

    @pytest.mark.ddp
    def test_an_exception_comes_back_with_rank_type_and_text(self):
        def boom(rank):
            if rank == 1:
                raise KeyError("the boiler is gone")
            dist.barrier()

        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1 raised KeyError.*the boiler is gone") as caught:
            testing.run_ddp(boom)
        assert "in boom" in str(caught.value), "the child's traceback is part of the message"
        assert time.monotonic() - start < 10

    @pytest.mark.ddp
    def test_a_collective_that_one_rank_never_joins_ends_in_time(self):
        def lopsided(rank):
            if rank == 0:
                dist.all_reduce(torch.ones(1))
            else:
                time.sleep(60)

        start = time.monotonic()
        with pytest.raises((RuntimeError, TimeoutError), match=r"rank 0 raised|still running"):
            testing.run_ddp(lopsided, timeout=2)
        assert time.monotonic() - start < 15

    @pytest.mark.ddp
    def test_a_rank_that_never_ends_is_ended(self):
        with pytest.raises(TimeoutError, match=r"rank \[1\] still running after 1 s"):
            testing.run_ddp(lambda rank: time.sleep(60 * rank), timeout=1)

    @pytest.mark.ddp
    def test_a_rank_that_dies_silently(self):
        with pytest.raises(RuntimeError, match=r"rank 1 died with exit code 7"):
            testing.run_ddp(lambda rank: os._exit(7) if rank else None)

    def test_threads_and_cuda_and_world_size_are_checked_before_forking(self, monkeypatch):
        with pytest.raises(ValueError, match="world_size must be at least 1; got 0"):
            testing.run_ddp(_sum_of_ranks, 1, world_size=0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        with pytest.raises(RuntimeError, match="torch runs 4 threads"):
            testing.run_ddp(_sum_of_ranks, 1)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match="CUDA is already initialised"):
            testing.run_ddp(_sum_of_ranks, 1)


class TestDdpTrainerKwargs:
    @pytest.mark.ddp
    def test_two_ranks_train_and_share_their_metrics(self):
        trainer = Trainer(**testing.ddp_trainer_kwargs(max_epochs=1, enable_checkpointing=False))
        net = toys.Net()
        before = net.net[0].weight.detach().clone()

        class CountsSteps(Callback):
            def on_train_end(self, trainer, pl_module):
                assert trainer.global_step == 2, "twelve rows, two ranks, batches of four"

            def on_train_epoch_end(self, trainer, pl_module):
                pl_module.log("world", float(torch.distributed.get_world_size()))

        trainer.callbacks.append(CountsSteps())
        trainer.fit(net, DataLoader(toys.rows(), batch_size=4), DataLoader(toys.rows(), batch_size=4))
        assert trainer.callback_metrics["world"] == 2
        assert trainer.callback_metrics["val/loss"].isfinite()
        assert not torch.equal(before, net.net[0].weight)

    def test_overrides_win_and_every_call_gives_a_fresh_strategy(self):
        first, second = testing.ddp_trainer_kwargs(devices=3, logger=True), testing.ddp_trainer_kwargs(timeout=7)
        assert (first["devices"], first["logger"]) == (3, True)
        assert first["strategy"] is not second["strategy"]
        assert second["strategy"]._timeout.total_seconds() == 7


class TestAssertObserver:
    @pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}])
    def test_an_observer_passes(self, kwargs):
        testing.assert_observer(toys.Norm, toys.NoisyNet, toys.loaders, **kwargs)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (toys.Backward, r"gradient of 'net\.0\.weight', at on_before_optimizer_step of epoch 0, step 0"),
            (toys.TakesGrad, r"gradient of 'net\.0\.weight', at on_train_batch_end"),
            (toys.DrawsTorch, r"global torch random state, at on_train_batch_end of epoch 0, step 1"),
            (toys.DrawsNumpy, r"global numpy random state, at on_validation_end of epoch 0"),
            (toys.DrawsPython, r"global python random state, at on_train_epoch_end of epoch 0"),
            (toys.FlipsMode, r"training mode of 'net\.3', at on_train_batch_start of epoch 0, step 0"),
            (toys.MovesBatchNorm, r"buffer 'net\.1\.running_mean', at on_train_batch_end of epoch 0, step 1"),
            (toys.LeavesHook, r"number of hooks on 'net\.0'.* \(1 against 2\)|\(0 against 1\)"),
            (toys.ScalesLoggedLoss, r"optimizer state, at on_train_epoch_end of epoch 0"),
        ],
    )
    def test_a_callback_that_disturbs_training_is_named(self, fault, message):
        with pytest.raises(AssertionError, match=message):
            testing.assert_observer(fault, toys.NoisyNet, toys.loaders)

    def test_a_callback_that_ends_training_early(self):
        class Stops(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.should_stop = True

        with pytest.raises(AssertionError, match=r"the number of hooks run|the course of training"):
            testing.assert_observer(Stops, toys.Net, toys.loaders)

    def test_a_callback_that_changes_a_logged_metric(self):
        class Overwrites(Callback):
            def on_train_end(self, trainer, pl_module):
                trainer._logger_connector._callback_metrics["val/loss"].add_(1)

        with pytest.raises(AssertionError, match=r"metric\['val/loss'\] \(largest absolute difference 1"):
            testing.assert_observer(Overwrites, toys.Net, toys.loaders)

    def test_no_training_at_all_is_not_a_pass(self):
        with pytest.raises(AssertionError, match="nothing was compared"):
            testing.assert_observer(toys.Norm, toys.Net, toys.loaders, max_epochs=0)

    def test_the_callers_random_states_are_left_alone(self):
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        testing.assert_observer(toys.Norm, toys.NoisyNet, toys.loaders, max_epochs=1)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002


class TestStatefulLoader:
    def test_every_epoch_is_another_permutation_and_depends_on_the_seed_alone(self):
        loader = testing.StatefulLoader(range(10), batch_size=3)
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            torch.rand(epoch + 5)
            epochs.append(torch.cat(list(loader)).tolist())
        assert [sorted(e) for e in epochs] == [list(range(10))] * 2
        assert epochs[0] != epochs[1]
        assert torch.cat(list(testing.StatefulLoader(range(10), batch_size=3))).tolist() == epochs[0]
        assert torch.cat(list(testing.StatefulLoader(range(10), 3, seed=1))).tolist() == epochs[1]
        assert torch.cat(list(testing.StatefulLoader(range(10), 3, shuffle=False))).tolist() == list(range(10))
        assert len(loader) == len(list(loader)) == 4

    def test_without_a_loaded_state_an_abandoned_epoch_starts_over(self):
        loader = testing.StatefulLoader(range(6), batch_size=2)
        next(iter(loader))
        assert len(list(loader)) == 3

    def test_a_state_of_a_finished_epoch_starts_the_next_one_whole(self):
        loader = testing.StatefulLoader(range(4), batch_size=2)
        list(loader)
        resumed = testing.StatefulLoader(range(4), batch_size=2)
        resumed.load_state_dict(loader.state_dict())
        assert len(list(resumed)) == 2

    def test_batch_size(self):
        with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
            testing.StatefulLoader(range(4), batch_size=0)


class TestAssertResumes:
    @pytest.mark.parametrize(
        ("checkpoint", "crash_at", "kwargs"),
        [
            ("step", (0, 1), {}),
            ("step", (1, 1), {}),
            ("step", (1, 2), {}),
            ("step", (1, 2), {"max_epochs": 3, "gradient_clip_val": 0.1}),
            ("epoch", (1, 0), {}),
            ("epoch", (1, 2), {"max_epochs": 3}),
        ],
    )
    def test_a_right_module_and_callback_resume(self, checkpoint, crash_at, kwargs):
        testing.assert_resumes(
            toys.Net,
            toys.loaders,
            lambda: [toys.Decay(), toys.Norm(), toys.Norm(2)],
            checkpoint=checkpoint,
            crash_at=crash_at,
            **kwargs,
        )

    def test_unsaved_state_is_caught(self):
        with pytest.raises(AssertionError, match=r"differs from .* in state_dict\['net\.0\.weight'\]"):
            testing.assert_resumes(toys.Net, toys.loaders, lambda: [toys.ForgetfulDecay()])

    def test_unsaved_callback_state_that_touches_no_weight_is_caught(self):
        class Forgetful(toys.Norm):
            def load_state_dict(self, state_dict):
                pass

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                self.largest += 1

        with pytest.raises(AssertionError, match=r"callbacks\[.*Forgetful.*'largest'\] \(6\.0 against"):
            testing.assert_resumes(toys.Net, toys.loaders, lambda: [Forgetful()])
        testing.assert_resumes(toys.Net, toys.loaders, lambda: [Forgetful()], compare=["state_dict", "global_step"])

    def test_the_global_random_state_is_not_carried_over(self):
        with pytest.raises(AssertionError, match="state_dict"):
            testing.assert_resumes(toys.NoisyNet, toys.loaders)

    def test_a_random_constant_that_is_not_saved_is_caught(self):
        class DrawsAtBirth(toys.Net):
            def __init__(self):
                super().__init__()
                self.scale = torch.rand(())

            def forward(self, x):
                return super().forward(x) * self.scale

        with pytest.raises(AssertionError, match="state_dict"):
            testing.assert_resumes(DrawsAtBirth, toys.loaders)

    def test_a_state_that_weights_only_loading_refuses(self):
        class Exotic(toys.Norm):
            def state_dict(self):
                return {"largest": np.random.default_rng(0)}

        with pytest.raises(Exception, match=r"(?i)weights.only"):
            testing.assert_resumes(toys.Net, toys.loaders, lambda: [Exotic()])

    def test_a_plain_loader_cannot_resume_within_an_epoch_but_at_its_end(self):
        def plain():
            return DataLoader(toys.rows(), batch_size=4)

        with pytest.raises(ValueError, match=r"DataLoader has no state_dict/load_state_dict"):
            testing.assert_resumes(toys.Net, plain)
        testing.assert_resumes(toys.Net, plain, checkpoint="epoch")

    def test_lightning_replays_a_plain_loader(self):
        """The fact behind the message above: without the guard the weights come out different."""

        class Unguarded(DataLoader):
            def state_dict(self):
                return {}

            def load_state_dict(self, state_dict):
                pass

        with pytest.raises(AssertionError, match="state_dict"):
            testing.assert_resumes(toys.Net, lambda: Unguarded(toys.rows(), batch_size=4))

    def test_a_loader_that_lightning_forgot_to_restore_is_explained(self):
        class AsksTooEarly(toys.Net):
            def configure_optimizers(self):
                assert self.trainer.estimated_stepping_batches == 6
                return super().configure_optimizers()

        with pytest.raises(AssertionError, match=r"never restored the training loader.*estimated_stepping_batches"):
            testing.assert_resumes(AsksTooEarly, toys.loaders)
        testing.assert_resumes(AsksTooEarly, toys.loaders, checkpoint="epoch")
        with pytest.raises(AssertionError) as caught:
            testing.assert_resumes(toys.NoisyNet, toys.loaders)
        assert "never restored" not in str(caught.value)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"crash_at": (5, 0)}, r"without reaching crash_at=\(5, 0\)"),
            ({"crash_at": (0, 0)}, r"nothing was saved before crash_at=\(0, 0\)"),
            ({"crash_at": (0, 2), "checkpoint": "epoch"}, r"nothing was saved before"),
        ],
    )
    def test_a_crash_that_proves_nothing(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            testing.assert_resumes(toys.Net, toys.loaders, **kwargs)


VALUES = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 8.0]), torch.tensor([6.0]), torch.tensor([0.5, 0.25])]
BATCHES = [(value,) for value in VALUES]


def mean_of_all(seen):
    joined = torch.cat([batch[0] for batch in seen])
    return {"mean": joined.mean(), "count": joined.numel()}


class TestCheckMetric:
    @pytest.mark.ddp
    def test_a_right_metric_passes(self):
        testing.check_metric(toys.Mean, BATCHES, mean_of_all)

    @pytest.mark.ddp
    def test_torchmetrics_own_with_list_states_tensor_and_mapping_batches(self):
        testing.check_metric(toys.Sorted, VALUES, lambda seen: torch.cat(seen).sort().values)
        testing.check_metric(torchmetrics.MeanMetric, [{"value": value} for value in VALUES])

    def test_a_reference_may_give_some_entries_only(self):
        testing.check_metric(toys.Mean, BATCHES, lambda seen: {"count": mean_of_all(seen)["count"]}, ddp=False)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (toys.UnreducedMean, r"while checking: forward"),
            (toys.MeanOfMeans, r"compute against the reference: result\['mean'\] is"),
            (toys.AttributeMean, r"forward on batch 1 against a fresh metric: result\['mean'\] is 3"),
            (toys.StrayTensor, r"tensor 'scale' stays behind"),
            (toys.OrderMean, r"reference|cut into halves|merge_state"),
            (toys.KeepsOldSums, r"use after reset: result\['count'\]|use after reset: result\['mean'\]"),
            (toys.SharesItsCopy, r"the original after its clone was updated"),
            (toys.ForgetsWhenPickled, r"pickle in the middle of the data"),
            (toys.IgnoresPartner, r"merge_state of two metrics, a part each"),
            (toys.SavesZeros, r"state_dict loaded into a fresh metric"),
            (toys.StaysSynced, r"two ranks, unequal shares, update after compute on rank 0"),
            (toys.DestructiveCompute, r"compute after forward on every batch: result\['mean'\]"),
        ],
    )
    def test_a_wrong_metric_is_named(self, fault, message):
        with pytest.raises((AssertionError, RuntimeError), match=message):
            testing.check_metric(fault, BATCHES, mean_of_all)

    @pytest.mark.ddp
    def test_ranks_that_are_not_reduced_are_caught_by_ranks_alone(self):
        with pytest.raises(AssertionError, match=r"two ranks, unequal shares, compute on rank 0: result\['mean'\]"):
            testing.check_metric(toys.UnsyncedMean, BATCHES, mean_of_all)
        testing.check_metric(toys.UnsyncedMean, BATCHES, mean_of_all, ddp=False)

    def test_batch_means_without_a_reference(self):
        with pytest.raises(AssertionError, match="batches cut into halves"):
            testing.check_metric(toys.MeanOfMeans, BATCHES, ddp=False)

    def test_merge_that_is_refused(self):
        with pytest.raises(RuntimeError, match="merge_state"):
            testing.check_metric(toys.RefusesMerge, BATCHES, ddp=False)

    def test_a_wrong_reference_and_wrong_shapes_are_named(self):
        with pytest.raises(AssertionError, match=r"result has keys \['count', 'mean'\], expected \['median'\]"):
            testing.check_metric(toys.Mean, BATCHES, lambda seen: {"median": 0.0}, ddp=False)
        with pytest.raises(AssertionError, match=r"result is a dict, expected a float"):
            testing.check_metric(toys.Mean, BATCHES, lambda seen: 0.0, ddp=False)

    def test_too_few_batches(self):
        with pytest.raises(ValueError, match="at least three batches"):
            testing.check_metric(toys.Mean, BATCHES[:2])


RECIPE = """
model:
  class_path: tests_of_assert_cli.Net
data:
  class_path: tests_of_assert_cli.Rows
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    module = types.ModuleType("tests_of_assert_cli")

    class Rows(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(toys.rows(), batch_size=4)

        val_dataloader = train_dataloader

    Rows.__module__ = module.__name__
    Rows.__qualname__ = "Rows"
    module.Net, module.Rows = toys.Net, Rows
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


class TestAssertCli:
    def test_a_recipe_trains_and_the_cli_object_comes_back(self, recipe):
        cli = testing.assert_cli(recipe)
        assert cli.trainer.global_step == 2
        assert isinstance(cli.model, toys.Net)

    def test_overrides_win_and_recipes_compose(self, recipe, tmp_path):
        extra = tmp_path / "extra.yaml"
        extra.write_text("model: {init_args: {dropout: 0.25}}")
        cli = testing.assert_cli([recipe, extra], "--trainer.limit_train_batches=1")
        assert (cli.trainer.global_step, cli.model.net[3].p) == (1, 0.25)

    def test_a_run_without_a_step_is_not_a_pass(self, recipe):
        with pytest.raises(AssertionError, match="made no optimiser step"):
            testing.assert_cli(recipe, "--trainer.limit_train_batches=0")

    def test_a_mistake_comes_back_in_words(self, recipe):
        with pytest.raises(AssertionError, match=r"exit code 2: .*no_such_argument"):
            testing.assert_cli(recipe, "--model.no_such_argument=1")
        with pytest.raises(AssertionError, match=r"no such recipe: nowhere\.yaml"):
            testing.assert_cli("nowhere.yaml")
