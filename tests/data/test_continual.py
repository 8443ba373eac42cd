"""Tasks in a row: what each holds, which loaders belong to it, and that a resumed run goes on with its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ext._lightning import LightningModule, Trainer
from lightning_ext.data import ContinualDataModule, DigitsDataModule
from lightning_ext.testing import assert_cli, assert_resumes, run_ddp

IMAGES, LABELS = torch.arange(48.0).reshape(12, 2, 2), torch.arange(12) % 6
DATA, TEST = (IMAGES, LABELS), (IMAGES[:6] + 0.5, LABELS[:6])


def whole(loader):
    return tuple(torch.cat(part) for part in zip(*loader, strict=True))


def digits():
    source = DigitsDataModule(binarize=False)
    source.setup()
    (images, labels), (held_out, truth) = source.train_set.tensors, source.held_out_set.tensors
    mean, deviation = images.mean(), images.std()
    return ((images - mean) / deviation, labels), ((held_out - mean) / deviation, truth)


class TestPermuted:
    def test_task_0_is_the_data_and_the_others_are_their_own_permutations(self):
        data = ContinualDataModule.permuted(DATA, TEST, num_tasks=4)
        assert data.num_tasks == 4
        for task in range(4):
            order = torch.arange(4)
            if task:
                order = torch.randperm(4, generator=torch.Generator().manual_seed(task))
            for parts, (images, labels) in ((data.train_sets, DATA), (data.test_sets, TEST)):
                found = parts[task].tensors
                assert torch.equal(found[0].flatten(1), images.flatten(1)[:, order])
                assert found[0].shape == images.shape
                assert torch.equal(found[1], labels)

    def test_a_batch_and_a_sample_are_what_the_tensors_say(self):
        data = ContinualDataModule.permuted(DATA, TEST, num_tasks=3, batch_size=5)
        data.set_task(2)
        images, labels = data.test_sets[2].tensors
        assert not torch.equal(images, TEST[0])
        for found in (whole(data.test_dataloader()), whole(DataLoader(data.test_sets[2], batch_size=4))):
            assert torch.equal(found[0], images)
            assert torch.equal(found[1], labels)
        assert torch.equal(data.test_sets[2][3][0], images[3])

    def test_the_images_are_kept_once(self):
        data = ContinualDataModule.permuted(DATA, TEST, num_tasks=3)
        assert {part.images.data_ptr() for part in data.train_sets[1:]} == {IMAGES.data_ptr()}

    def test_digits(self):
        data, (train, test) = ContinualDataModule.permuted(), digits()
        assert data.num_tasks == 5
        assert torch.equal(data.train_sets[0].tensors[0], train[0])
        assert torch.equal(data.test_sets[0].tensors[1], test[1])
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        assert torch.equal(data.test_sets[3].tensors[0], test[0][:, order])


@pytest.mark.parametrize("build", [ContinualDataModule.split, ContinualDataModule.domain_split])
class TestSplits:
    @pytest.mark.parametrize(
        ("classes", "groups"), [(2, [[0, 1], [2, 3], [4, 5]]), (3, [[0, 1, 2], [3, 4, 5]]), ([[5, 0], [2, 3]], None)]
    )
    def test_each_task_has_its_classes_and_no_other(self, build, classes, groups):
        groups = groups or classes
        data = build(DATA, TEST, classes=classes)
        assert data.num_tasks == len(groups)
        for task, group in enumerate(groups):
            for parts, (images, labels) in ((data.train_sets, DATA), (data.test_sets, TEST)):
                mine = torch.tensor([label in group for label in labels.tolist()])
                found = parts[task].tensors
                assert torch.equal(found[0], images[mine])
                expected = labels[mine].tolist()
                if build == ContinualDataModule.domain_split:
                    expected = [group.index(label) for label in expected]
                assert found[1].tolist() == expected

    def test_digits_in_pairs(self, build):
        data, (train, test) = build(), digits()
        assert data.num_tasks == 5
        assert sum(len(part) for part in data.train_sets) == len(train[0])
        assert sum(len(part) for part in data.test_sets) == len(test[0])
        images, labels = data.train_sets[2].tensors
        pair = (train[1] == 4) | (train[1] == 5)
        assert torch.equal(images, train[0][pair])
        assert torch.equal(labels, train[1][pair] if build == ContinualDataModule.split else train[1][pair] % 2)


class TestHeads:
    def test_of_a_split_they_are_the_tasks_own_outputs(self):
        data = ContinualDataModule.split(DATA, TEST, classes=[[0, 1], [2, 3, 4]])
        assert [data.heads(0), data.heads(1)] == [slice(0, 2), slice(2, 5)]
        scattered = ContinualDataModule.split(DATA, TEST, classes=[[5, 0], [2, 4]])
        assert [scattered.heads(0), scattered.heads(1)] == [[5, 0], [2, 4]]

    def test_else_all_outputs_are_shared(self):
        assert ContinualDataModule.permuted(DATA, TEST, num_tasks=2).heads(1) is None
        assert ContinualDataModule.domain_split(DATA, TEST).heads(1) is None
        assert ContinualDataModule([(DATA, TEST)]).heads(0) is None
        assert ContinualDataModule([(DATA, TEST, slice(0, 3))]).heads(0) == slice(0, 3)


class TestLoaders:
    def test_they_are_those_of_the_current_task(self):
        data = ContinualDataModule.split(DATA, TEST, batch_size=3, seed=0)
        assert data.task == 0
        for task in (2, 0, 1):
            data.set_task(task)
            assert data.task == task
            images, labels = whole(data.train_dataloader())
            assert set(labels.tolist()) == {2 * task, 2 * task + 1}
            assert sorted(images.flatten().tolist()) == data.train_sets[task].tensors[0].flatten().tolist()
            for loader in (data.test_dataloader(), data.val_dataloader(), data.predict_dataloader()):
                assert torch.equal(whole(loader)[0], data.test_sets[task].tensors[0])

    def test_training_is_shuffled(self):
        data = ContinualDataModule([(DATA, TEST)], seed=0)
        loader = data.train_dataloader()
        first = whole(loader)[0]
        assert not torch.equal(first, IMAGES)
        loader.sampler.set_epoch(1)
        assert not torch.equal(whole(loader)[0], first)

    def test_of_any_task_and_of_all_that_were_seen(self):
        data = ContinualDataModule.split(DATA, TEST, task=1)
        assert torch.equal(whole(data.dataloader_of(2))[1], torch.tensor([4, 5]))
        assert [whole(loader)[1].tolist() for loader in data.seen_dataloaders()] == [[0, 1], [2, 3]]

    def test_tasks_may_be_datasets_of_any_kind(self):
        class Squares(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return torch.tensor([index**2]), index

        data = ContinualDataModule([(Squares(), TensorDataset(*TEST))], batch_size=4)
        assert sorted(whole(data.train_dataloader())[0].flatten().tolist()) == [0, 1, 4, 9]


class Linear(LightningModule):
    """Keeps the labels that it saw."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(4, 6), []

    def training_step(self, batch, batch_idx):
        self.seen.append(sorted(set(batch[1].tolist())))
        loss = F.cross_entropy(self.net(batch[0].flatten(1) / 48), batch[1])
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test/label", batch[1].float().mean(), add_dataloader_idx=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
         "accelerator": "cpu", "devices": 1, "max_epochs": 1}  # fmt: skip


class TestTraining:
    @pytest.mark.parametrize("one_trainer", [False, True])
    def test_each_fit_trains_on_the_current_task(self, one_trainer):
        data, model = ContinualDataModule.split(DATA, TEST, batch_size=4), Linear()
        trainer = Trainer(**QUIET)
        for task in range(3):
            data.set_task(task)
            trainer = trainer if one_trainer else Trainer(**QUIET)
            trainer.fit_loop.max_epochs = trainer.current_epoch + 1
            trainer.fit(model, data)
        assert model.seen == [[0, 1], [2, 3], [4, 5]]

    def test_all_seen_tasks_are_tested_by_one_call(self):
        data = ContinualDataModule.split(DATA, TEST, task=1)
        found = Trainer(**QUIET).test(Linear(), data.seen_dataloaders(), verbose=False)
        assert [list(each.values()) for each in found] == [[0.5], [2.5]]

    @pytest.mark.parametrize("crash_at", [(0, 1), (1, 0), (1, 1)])
    def test_a_resumed_run_goes_on_with_its_task(self, crash_at):
        def build():
            return ContinualDataModule.permuted(DATA, TEST, num_tasks=3, batch_size=5, task=2)

        assert_resumes(Linear, build, crash_at=crash_at)

    def test_the_checkpoint_knows_the_task(self, tmp_path):
        data, model = ContinualDataModule.split(DATA, TEST, batch_size=2, seed=5), Linear()
        data.set_task(2)
        trainer = Trainer(**{**QUIET, "max_steps": 1, "max_epochs": 2})
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "middle.ckpt")
        resumed, again = ContinualDataModule.split(DATA, TEST, batch_size=2), Linear()
        Trainer(**{**QUIET, "max_epochs": 2}).fit(again, resumed, ckpt_path=tmp_path / "middle.ckpt")
        assert (resumed.task, resumed.seed) == (2, 5)
        assert {label for labels in again.seen for label in labels} == {4, 5}

    def test_a_checkpoint_of_more_tasks_is_refused(self):
        state = ContinualDataModule.split(DATA, TEST, task=2).state_dict()
        with pytest.raises(ValueError, match="task must lie between 0 and 1; got 2"):
            ContinualDataModule.split(DATA, TEST, classes=3).load_state_dict(state)

    def test_two_ranks_build_the_same_tasks(self):
        def tensors(rank):
            torch.manual_seed(rank)
            return ContinualDataModule.permuted(DATA, TEST, num_tasks=3).train_sets[2].tensors[0]

        first, second = run_ddp(tensors, world_size=2)
        assert torch.equal(first, second)


MODEL = """
model:
  class_path: lightning_ext.modules.Classifier
  init_args:
    network: {class_path: lightning_ext.nn.MLP, init_args: {sizes: [64, 4, 10]}}
"""
DATA_PART = """
data:
  class_path: lightning_ext.data.ContinualDataModule.BUILDER
  init_args: {batch_size: 50, task: 1, OPTION}
"""


@pytest.mark.parametrize(
    ("builder", "option", "tasks"),
    [
        ("permuted", "num_tasks: 2", 2),
        ("split", "classes: 5", 2),
        ("split", "classes: [[0, 1], [7, 3]]", 2),
        ("domain_split", "data: digits", 5),
    ],
)
def test_on_the_command_line(builder, option, tasks, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MODEL + DATA_PART.replace("BUILDER", builder).replace("OPTION", option))
    data = assert_cli(recipe).datamodule
    assert type(data) is ContinualDataModule
    assert (data.task, data.num_tasks, data.batch_size) == (1, tasks, 50)


def test_without_a_file_for_the_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MODEL)
    named = "--data=lightning_ext.data.ContinualDataModule.permuted"
    data = assert_cli(recipe, named, "--data.num_tasks=3", "--data.task=2").datamodule
    assert (data.task, data.num_tasks) == (2, 3)


def test_numbers_are_hyperparameters_and_data_are_not():
    hyperparameters = dict(ContinualDataModule.split(DATA, TEST, batch_size=7).hparams)
    assert hyperparameters == {"batch_size": 7, "task": 0, "num_workers": 0, "seed": None}


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: ContinualDataModule([]), r"tasks must hold a pair \(train, test\) for each task; got \[\]"),
        (lambda: ContinualDataModule("digits"), "got 'digits'"),
        (lambda: ContinualDataModule([DATA[0]]), r"task 0 must be \(train, test\) or"),
        (lambda: ContinualDataModule([(DATA, TEST), (DATA,)]), r"task 1 must be \(train, test\) or"),
        (lambda: ContinualDataModule([DATA]), "train of task 0 must be a dataset with positions"),
        (lambda: ContinualDataModule([((IMAGES, LABELS[:3]), TEST)]), "train of task 0 .* equal length"),
        (lambda: ContinualDataModule([(DATA, (IMAGES[:0], LABELS[:0]))]), "test of task 0 .* at least one sample"),
        (lambda: ContinualDataModule([(DATA, iter([1]))]), "test of task 0 must be a dataset with positions"),
        (lambda: ContinualDataModule([(DATA, TEST)], task=1), "task must lie between 0 and 0; got 1"),
        (lambda: ContinualDataModule([(DATA, TEST)], task=-1), "task must lie between 0 and 0; got -1"),
        (lambda: ContinualDataModule([(DATA, TEST)], batch_size=0), "batch_size must be at least 1; got 0"),
        (lambda: ContinualDataModule.permuted(DATA), r"test must be \(images, labels\)"),
        (lambda: ContinualDataModule.permuted("mnist"), "data must be 'digits'.*got 'mnist'"),
        (lambda: ContinualDataModule.permuted("digits", TEST), "which brings its own test set"),
        (lambda: ContinualDataModule.permuted(DATA, TEST, num_tasks=0), "num_tasks must be at least 1; got 0"),
        (lambda: ContinualDataModule.permuted(DATA, (IMAGES.flatten(1), LABELS)), r"test must be images.*\(12, 4\)"),
        (lambda: ContinualDataModule.split((IMAGES, LABELS.float()), TEST), "data must be images.*float32"),
        (lambda: ContinualDataModule.split(DATA, TEST, classes=4), "classes must divide the 6 classes .*; got 4"),
        (lambda: ContinualDataModule.split(DATA, TEST, classes=0), "classes must divide"),
        (lambda: ContinualDataModule.split(DATA, TEST, classes=[[0, 1], [1, 2]]), "classes must be disjoint"),
        (lambda: ContinualDataModule.split(DATA, TEST, classes=[[0, 9]]), "classes must be disjoint lists of"),
        (lambda: ContinualDataModule.split(DATA, TEST, classes=[[0], []]), "none of them empty"),
        (lambda: ContinualDataModule.domain_split(DATA, TEST, classes=1), "two classes or more to tell apart"),
        (lambda: ContinualDataModule(iter([(DATA, TEST)])), "tasks must hold a pair"),
        (lambda: ContinualDataModule([(DATA, TEST, "ab")]), "heads of task 0 must be a slice.*got 'ab'"),
        (lambda: ContinualDataModule([(DATA, TEST, [0.5])]), r"heads of task 0 must be a slice.*got \[0.5\]"),
        (lambda: ContinualDataModule([(DATA, TEST)] * 3, task=1.5), "task must lie between 0 and 2; got 1.5"),
        (lambda: ContinualDataModule([(DATA, TEST)] * 3, task="1"), "task must lie between 0 and 2; got 1"),
        (lambda: ContinualDataModule([(DATA, TEST)], batch_size=1.5), "batch_size must be a whole number; got 1.5"),
        (lambda: ContinualDataModule.permuted(DATA, TEST, num_tasks=1.5), "num_tasks must be at least 1; got 1.5"),
        (
            lambda: ContinualDataModule.permuted((IMAGES.numpy(), LABELS.numpy()), TEST),
            "data must be a pair of tensors",
        ),
        (lambda: ContinualDataModule.permuted(TensorDataset(*DATA), TEST), "data must be a pair of tensors"),
        (lambda: ContinualDataModule.permuted((IMAGES[:0], LABELS[:0]), TEST), "data must hold at least one image"),
        (lambda: ContinualDataModule.split((IMAGES, LABELS > 2), TEST), "data must be images.*bool"),
        (
            lambda: ContinualDataModule.split(DATA, TEST, classes=[0, 1]),
            r"classes must be a whole number, or.*\[0, 1\]",
        ),
        (lambda: ContinualDataModule.split(DATA, TEST, classes=2.0), "classes must be a whole number, or.*2.0"),
        (lambda: ContinualDataModule.split((IMAGES, LABELS - 2), TEST), "labels must be at least 0"),
        (lambda: ContinualDataModule.split(DATA, (IMAGES, LABELS + 1)), r"test has images of \[6\], classes that no"),
        (lambda: ContinualDataModule.domain_split(DATA, (IMAGES, LABELS + 1)), r"test has images of \[6\]"),
    ],
)
def test_bad_input_is_named(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


def test_a_task_that_is_not_there():
    data = ContinualDataModule([(DATA, TEST)])
    for ask in (data.set_task, data.heads, data.dataloader_of):
        with pytest.raises(ValueError, match="task must lie between 0 and 0; got 1"):
            ask(1)
    assert data.task == 0


@pytest.mark.parametrize("build", ["permuted", "split", "domain_split"])
def test_the_seed_of_the_training_order_is_the_one_that_was_given(build):
    assert getattr(ContinualDataModule, build)(seed=7).seed == 7
