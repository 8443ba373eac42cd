import copy
import pickle

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import Dataset, TensorDataset

from lightning_ext.data import EpochSampler, ResumableDataModule, ResumableLoader
from lightning_ext.testing import assert_resumes, ddp_trainer_kwargs


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler = EpochSampler(range(50), seed=3)
    first = list(sampler)
    torch.rand(7)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == list(range(50))
    assert list(EpochSampler(range(50), seed=4)) != first


def test_it_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    list(EpochSampler(range(50)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("used", [0, 1, 2, 3])
def test_it_goes_on_after_the_batches_that_were_used(num_workers, used):
    def build():
        data = torch.arange(12)
        return ResumableLoader(data, batch_size=4, sampler=EpochSampler(data), num_workers=num_workers)

    whole = [batch.tolist() for batch in build()]
    loader = build()
    iterator = iter(loader)
    for _ in range(used):
        next(iterator)
    resumed = build()
    resumed.load_state_dict(loader.state_dict())
    # A state at the end of an epoch begins the next one.
    assert [batch.tolist() for batch in resumed] == whole[used % 3 :]
    assert [batch.tolist() for batch in resumed] == whole


class Data(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0]


@pytest.mark.parametrize("crash_at", [(0, 2), (1, 0), (1, 2)])
def test_a_training_resumes_in_the_middle_of_an_epoch(crash_at):
    def data():
        dataset = Data(torch.arange(16 * 32.0).reshape(16, 32) / 512)
        return ResumableLoader(dataset, batch_size=4, sampler=EpochSampler(dataset))

    assert_resumes(BoringModel, data, max_epochs=2, crash_at=crash_at)


def test_two_processes_share_the_data(tmp_path):
    class Watch(BoringModel):
        def training_step(self, batch, batch_idx):
            path = tmp_path / f"rank{self.global_rank}.txt"
            with path.open("a") as file:
                file.write(" ".join(str(int(v)) for v in batch[:, 0]) + " ")
            return super().training_step(batch, batch_idx)

    dataset = Data(torch.arange(8.0)[:, None].repeat(1, 32))
    loader = ResumableLoader(dataset, batch_size=2, sampler=EpochSampler(dataset))
    Trainer(max_epochs=1, enable_checkpointing=False, limit_val_batches=0, **ddp_trainer_kwargs()).fit(Watch(), loader)
    seen = [[int(v) for v in (tmp_path / f"rank{rank}.txt").read_text().split()] for rank in (0, 1)]
    assert sorted(seen[0] + seen[1]) == list(range(8))
    assert len(seen[0]) == len(seen[1]) == 4


def test_another_number_of_batches_is_refused():
    state = ResumableLoader(torch.arange(12), batch_size=4).state_dict()
    with pytest.raises(ValueError, match="inside an epoch of 3 batches with a loader of 6"):
        ResumableLoader(torch.arange(12), batch_size=2).load_state_dict(state)


X, T = torch.arange(20.0).reshape(10, 2), torch.arange(10)


class PerSample(TensorDataset):
    """Its own indexing does not take lists."""

    def __getitem__(self, index):
        return self.tensors[0][index] + 1.0, int(self.tensors[1][index])


class Whole(Dataset):
    """Makes batches itself."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise AssertionError("asked for one sample")

    def __getitems__(self, indices):
        return X[indices] + 1.0, T[indices]


@pytest.mark.parametrize(
    ("dataset", "shift"),
    [(TensorDataset(X, T), 0.0), (PerSample(X, T), 1.0), (Whole(), 1.0)],
    ids=["tensors", "own indexing", "whole"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_any_dataset(dataset, shift, num_workers):
    module = ResumableDataModule(4, num_workers=num_workers, seed=0)
    batches = list(module.loader(dataset, shuffle=True))
    assert [len(t) for _, t in batches] == [4, 4, 2]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert sorted(labels.tolist()) == list(range(10))
    assert labels.tolist() != list(range(10))
    assert torch.equal(images, X[labels] + shift)


def test_tensors_are_indexed_once_per_batch(monkeypatch):
    asked = []
    get = TensorDataset.__getitem__

    def counted(self, index):
        asked.append(index)
        return get(self, index)

    monkeypatch.setattr(TensorDataset, "__getitem__", counted)
    list(ResumableDataModule(5, seed=0).loader(TensorDataset(X, T)))
    assert asked == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_loaders_of_one_dataset_read_one_object():
    module, first, second = ResumableDataModule(4), TensorDataset(X, T), TensorDataset(X)
    assert module.loader(first).dataset is module.loader(first, shuffle=True).dataset
    assert module.loader(first).dataset.tensors is first.tensors
    assert module.loader(second).dataset.tensors is second.tensors
    module, first = pickle.loads(pickle.dumps(copy.deepcopy((module, first))))
    assert module.loader(first).dataset is module.loader(first).dataset
    assert module.loader(first).dataset.tensors is first.tensors
