"""What is collected when a task ends: which samples, of which weights, and that nothing else notices."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_ext._lightning import Callback, LightningDataModule, MisconfigurationException, submodule
from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.data import ContinualDataModule
from lightning_ext.testing import StatefulLoader, assert_resumes, ddp_trainer_kwargs
from tests.callbacks.laftr_toys import Anchor, Net, flat, loader, seeded_net, table, train
from tests.conformance import toys

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*IterableDataset"
)


def seen(callback, task=-1):
    return callback._memory._held[task].seen.tolist()


def content(n, rows=None):
    x = table(n).tensors[0]
    x = x if rows is None else x[rows]
    return [len(x), pytest.approx(x.double().sum().item(), rel=1e-6)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(table(7))


class Batches(Dataset):
    """Items that are batches."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        x, t = table(8).tensors
        return x[4 * i : 4 * i + 4], t[4 * i : 4 * i + 4]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda: loader(11, shuffle=True, drop_last=True), content(11)),
        (lambda: loader(11, sampler=SubsetRandomSampler([7, 2, 4])), content(11, [2, 4, 7])),
        (lambda: loader(11, sampler=WeightedRandomSampler([1.0] * 11, 30)), content(11)),
        (lambda: DataLoader(Batches(), batch_size=None), content(8)),
        (lambda: DataLoader(Stream(), batch_size=3), content(7)),
        (lambda: StatefulLoader(table(11), 4), content(11)),
    ],
    ids=["drop-last", "subset", "weighted", "ready-made", "stream", "no-dataloader"],
)
def test_each_sample_is_seen_once(data, expected):
    callback = FunctionSpaceRegularizer(Anchor())
    train(seeded_net(), [callback], data())
    assert seen(callback) == expected


@pytest.mark.parametrize("data", [loader, lambda n: loader(n, sampler=SubsetRandomSampler(range(n)))])
def test_ranks_share_the_samples_without_padding(tmp_path, data):
    """11 samples on 2 ranks; the sampler of Lightning shows 12."""
    file = str(tmp_path / "kept" / "memory.pt")
    callback = FunctionSpaceRegularizer(Anchor(), memory_file=file)
    module = seeded_net()
    train(module, [callback], data(11), **ddp_trainer_kwargs(max_epochs=1))
    assert callback.tasks == [], "it was in the other processes"
    kept = torch.load(file, weights_only=True)["memory"]
    assert kept["tasks"] == [0]
    assert kept["estimators"][0]["_extra_state"]["kept"]["seen"].tolist() == content(11)
    torch.testing.assert_close(kept["estimators"][0]["_extra_state"]["kept"]["anchor"], flat(module))
    train(module, [callback], loader(12), **ddp_trainer_kwargs(max_epochs=1))
    assert torch.load(file, weights_only=True)["memory"]["tasks"] == [0, 1]
    train(module, [callback], loader(12))
    assert callback.tasks == [0, 1, 2], "taken up from the file in this process"


def test_processes_that_end_with_the_fit_are_named():
    with pytest.raises(Exception, match="Pass memory_file="):
        train(seeded_net(), [FunctionSpaceRegularizer(Anchor())], **ddp_trainer_kwargs(max_epochs=1))


class Leftover(Anchor):
    """Writes down in which state it finds and leaves the module."""

    def _fit(self, module, batches, reduce):
        self.modes = [m.training for m in module.modules()]
        torch.rand(1)
        super()._fit(module, batches, reduce)


def test_the_module_is_left_as_it_was():
    module = toys.Net(dropout=0.3)
    module.net[3].eval()
    module.log = module.log_dict = lambda *args, **kwargs: None
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    callback, random = FunctionSpaceRegularizer(Leftover()), torch.get_rng_state()
    callback.end_task(None, module, loader())
    assert not any(callback._memory._held[0].modes), "eval mode while the statistics are taken"
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Augments(Net):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, t = batch
        return (x + 100 if self.trainer.training else x), t


def test_hooks_that_augment_while_training_leave_the_statistics_alone():
    callback = FunctionSpaceRegularizer(Anchor())
    trainer = train(seeded_net(Augments), [callback], loader(12))
    assert seen(callback) == content(12)
    assert trainer.state.finished


def test_statistics_are_of_the_weights_that_every_callback_left():
    """Weight averaging swaps the weights in on_train_end, wherever it stands in the list."""
    swa = submodule("callbacks").StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    callback, module = FunctionSpaceRegularizer(Anchor()), seeded_net()
    train(module, [callback, swa], max_epochs=3)
    assert torch.equal(callback._memory._held[0].anchor, flat(module))
    assert torch.equal(flat(swa._average_model), flat(module))
    again = submodule("callbacks").StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    train(module, [callback, again], max_epochs=3)
    assert callback.tasks == [0, 1]


def test_beside_lightnings_own_callbacks(tmp_path):
    own = submodule("callbacks")
    lines = submodule("loggers").CSVLogger(tmp_path)
    stop = own.EarlyStopping("laftr/penalty", mode="max", patience=1, check_on_train_epoch_end=True)
    saver = own.ModelCheckpoint(tmp_path, monitor="laftr/penalty", save_top_k=1)
    callback = FunctionSpaceRegularizer(Anchor(), weight=1e3, log_every_n_steps=1)
    callback.end_task(None, seeded_net(seed=4), loader())
    module = seeded_net(toys.Net)
    module.net = seeded_net().net
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-4)
    trainer = train(
        module, [own.LearningRateMonitor(), stop, saver, callback], loader(), max_epochs=9, logger=lines,
        log_every_n_steps=1, enable_checkpointing=True,
    )  # fmt: skip
    assert trainer.current_epoch == 2, "the penalty falls from the first epoch on, and patience is one"
    assert callback.tasks == [0, 1], "stopped early is not interrupted"
    saved = torch.load(saver.best_model_path, weights_only=True)["callbacks"][callback.state_key]
    assert saved["memory"]["tasks"] == [0]


def test_no_statistics_by_hand_until_asked_for():
    callback, module = FunctionSpaceRegularizer(Anchor(), fit_at="manual"), seeded_net()
    trainer = train(module, [callback])
    assert callback.tasks == []
    assert callback.end_task(trainer, module) == 0
    assert callback.end_task(trainer, module, loader(5)) == 1
    assert (seen(callback, 0), seen(callback, 1)) == (content(12), content(5))
    with pytest.raises(ValueError, match="end_task needs a loader where there is no Trainer"):
        callback.end_task(None, module)


def test_fast_dev_run_reads_as_little_as_it_trains():
    callback = FunctionSpaceRegularizer(Anchor())
    train(seeded_net(), [callback], fast_dev_run=2)
    assert seen(callback) == content(12, slice(0, 8))


class Two(LightningDataModule):
    def train_dataloader(self):
        return [loader(), loader()]


class OfTwo(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)


def test_several_training_loaders_are_refused_before_the_training():
    module = seeded_net(OfTwo)
    before = flat(module)
    with pytest.raises(MisconfigurationException, match=r"the Trainer has 2\. Use fit_at='manual'"):
        train(module, [FunctionSpaceRegularizer(Anchor())], Two())
    assert torch.equal(flat(module), before)
    train(module, [FunctionSpaceRegularizer(Anchor(), fit_at="manual")], Two())


@pytest.mark.parametrize(
    ("kwargs", "data", "message"),
    [
        ({"inputs": "image"}, None, "has no entry 'image': say with inputs="),
        ({"heads": lambda task: slice(4, 8)}, None, "at least one of 3 outputs, and none beyond them; got slice"),
        ({"heads": lambda task: [7]}, None, r"at least one of 3 outputs, and none beyond them; got \[7\]"),
        ({}, TensorDataset(torch.rand(8, 6), torch.rand(8, 3)), "class_conditional=True needs a class number"),
    ],
)
def test_what_cannot_be_learned_is_said_before_the_training(kwargs, data, message):
    module = seeded_net()
    before = flat(module)
    step = module.training_step = lambda batch, batch_idx: pytest.fail("the training has begun")
    with pytest.raises(ValueError, match=message):
        train(module, [FunctionSpaceRegularizer("laftr", **kwargs)], data and DataLoader(data, batch_size=4))
    assert torch.equal(flat(module), before)
    assert module.training_step is step


def test_a_stream_is_not_tapped_before_the_training():
    class Tap(IterableDataset):
        begun = 0

        def __iter__(self):
            Tap.begun += 1
            return iter([table(1)[0]] * 8)

    callback = FunctionSpaceRegularizer(Anchor())
    train(seeded_net(), [callback], DataLoader(Tap(), batch_size=4))
    assert callback.tasks == [0]
    assert Tap.begun == 2, "once for the training, once for the statistics"


def test_weights_that_are_not_finite_are_no_reference():
    module = seeded_net()
    with torch.no_grad():
        module.net[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"net\.0\.bias is not finite, so task 0 has no reference"):
        FunctionSpaceRegularizer(Anchor()).end_task(None, module, loader())


def test_a_penalty_that_is_not_finite_is_said():
    callback = FunctionSpaceRegularizer(Anchor(), fit_at="manual")
    callback.end_task(None, seeded_net(seed=5), loader())

    class Diverges(Callback):
        def on_train_start(self, trainer, pl_module):
            nn.init.constant_(pl_module.net[0].weight, float("inf"))

    with pytest.warns(UserWarning, match="the penalty is nan at step 0"):
        train(seeded_net(), [callback, Diverges()], limit_train_batches=1)


def test_heads_of_tasks():
    chosen = []

    def heads(task):
        chosen.append(task)
        return slice(task, task + 1)

    callback = FunctionSpaceRegularizer(Anchor(), heads=heads)
    for task in (2, 1):
        callback.current_task = task
        train(seeded_net(), [callback])
    assert callback.tasks == [2, 1]
    assert [e.heads for e in callback._memory._held] == [slice(2, 3, None), slice(1, 2, None)]
    listed = FunctionSpaceRegularizer(Anchor(), heads=[[0], [1, 2]])
    listed.current_task = 2
    module = seeded_net()
    before = flat(module)
    with pytest.raises(ValueError, match="heads has 2 entries, and there is none for task 2"):
        train(module, [listed])
    assert torch.equal(flat(module), before), "said before the training"


def test_state_goes_through_a_checkpoint_and_back(tmp_path):
    callback = FunctionSpaceRegularizer(Anchor(2.0), heads=lambda task: [task])
    module = seeded_net()
    for _ in range(2):
        trainer = train(module, [callback])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh, other = FunctionSpaceRegularizer(Anchor(2.0)), seeded_net(seed=9)
    fresh.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][callback.state_key])
    assert fresh.tasks == [0, 1]
    assert fresh.penalty(other).item() == callback.penalty(other).item() > 0
    assert fresh.stats_bytes == callback.stats_bytes


@pytest.mark.parametrize(
    ("kept", "other"),
    [
        (("laftr", "all"), ("laftr", "merge")),
        (("laftr", "merge"), ("laftr", "all")),
        (("laftr", "all"), ("l2", "all")),
        (("laftr-moments", "all"), ("laftr-sample", "all")),
        ((Anchor(), "all"), ("laftr", "all")),
    ],
)
def test_a_memory_of_other_settings_is_refused(tmp_path, kept, other):
    """It would be read without a word: statistics of one task for both, or of another estimator."""
    file = str(tmp_path / "memory.pt")
    estimator, consolidate = kept
    callback = FunctionSpaceRegularizer(estimator, consolidate=consolidate, memory_file=file)
    for _ in range(2):
        callback.end_task(None, seeded_net(), loader())
    estimator, consolidate = other
    with pytest.raises(ValueError, match=r"memory_file=.*the memory of tasks \[0, 1\] was kept with .*, and here is"):
        train(seeded_net(), [FunctionSpaceRegularizer(estimator, consolidate=consolidate, memory_file=file)])


def test_a_file_that_holds_no_memory_is_named(tmp_path):
    file = tmp_path / "notes.pt"
    file.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"notes\.pt' holds no memory of such a callback"):
        train(seeded_net(), [FunctionSpaceRegularizer(Anchor(), memory_file=str(file))])


def continual(**kwargs):
    tasks = [[table(8, seed), table(4, seed + 10)] for seed in range(3)]
    return ContinualDataModule(tasks, batch_size=4, seed=0, **kwargs)


IN_ONE = {"max_epochs": 6, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}


def test_all_tasks_in_one_fit():
    callback, module = FunctionSpaceRegularizer(Anchor(), epochs_per_task=2, log_every_n_steps=1), seeded_net()
    train(module, [callback], continual(), **IN_ONE)
    assert callback.tasks == [0, 1, 2]
    for task in range(3):
        x = table(8, task).tensors[0]
        assert seen(callback, task) == [8, pytest.approx(x.double().sum().item(), rel=1e-6)]
    one, steps = seeded_net(), FunctionSpaceRegularizer(Anchor())
    for task in range(3):
        shown = continual()
        shown.set_task(task)
        orders = ResetEpochs(2 * task)
        train(one, [steps, orders], shown, max_epochs=2, limit_val_batches=0)
    assert torch.equal(flat(one), flat(module)), "as in a fit for each task, with an optimizer that has no state"


class ResetEpochs(Callback):
    """The orders that the epochs from ``first`` on have."""

    def __init__(self, first):
        self.first = first

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.train_dataloader.sampler.set_epoch(self.first + trainer.current_epoch)


def test_all_tasks_in_one_fit_resume_in_the_third():
    def resumes(**kwargs):
        assert_resumes(
            lambda: seeded_net(),
            continual,
            lambda: [FunctionSpaceRegularizer(Anchor(noise=0.1), epochs_per_task=2)],
            reload_dataloaders_every_n_epochs=1,
            limit_val_batches=0,
            max_epochs=6,
            **kwargs,
        )

    resumes(crash_at=(5, 1), checkpoint="epoch")
    resumes(crash_at=(4, 1))


def test_in_one_fit_needs_tasks_and_fresh_loaders():
    callback = FunctionSpaceRegularizer(Anchor(), epochs_per_task=2)
    with pytest.raises(MisconfigurationException, match=r"reload_dataloaders_every_n_epochs=1"):
        train(seeded_net(), [callback], continual(), max_epochs=6)
    with pytest.raises(MisconfigurationException, match="NoneType has no task"):
        train(seeded_net(), [callback], loader(), max_epochs=6)
    with pytest.raises(MisconfigurationException, match="epoch 0 belongs to task 0, and the data module is at 1"):
        train(seeded_net(), [callback], continual(task=1), **IN_ONE)
    with pytest.raises(ValueError, match="epochs_per_task must be a whole number, at least 1; got 0"):
        FunctionSpaceRegularizer(Anchor(), epochs_per_task=0)
