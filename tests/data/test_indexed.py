"""A dataset that says which samples a batch holds."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_ext.data import DigitsDataModule, IndexedBatch, IndexedDataset

X, T = torch.arange(10.0)[:, None], torch.arange(10) % 3


def batches(dataset, **kwargs):
    return list(DataLoader(dataset, batch_size=4, **kwargs))


@pytest.mark.parametrize(
    "dataset", [TensorDataset(X, T), Subset(TensorDataset(X, T), range(10))], ids=["plain", "list"]
)
def test_each_sample_keeps_its_position(dataset):
    found = batches(IndexedDataset(dataset), shuffle=True)
    assert all(isinstance(batch, IndexedBatch) for batch in found)
    assert torch.cat([batch.indices for batch in found]).sort().values.tolist() == list(range(10))
    for index, (x, t) in found:
        assert torch.equal(x, X[index])
        assert torch.equal(t, T[index])


def test_a_dataset_that_makes_whole_batches_still_does():
    data = DigitsDataModule(batch_size=8)
    data.setup()
    whole = data.train_dataloader().dataset
    loader = DataLoader(IndexedDataset(whole), batch_size=8, shuffle=True, collate_fn=lambda batch: batch)
    index, (images, labels) = next(iter(loader))
    assert torch.equal(images, data.train_set.tensors[0][index])
    assert torch.equal(labels, data.train_set.tensors[1][index])


def test_a_data_modules_loader_collates_samples_with_positions():
    data = DigitsDataModule(batch_size=8, seed=0)
    data.setup()
    index, (images, labels) = next(iter(data.loader(IndexedDataset(data.train_set), shuffle=True)))
    assert torch.equal(images, data.train_set.tensors[0][index])
    assert torch.equal(labels, data.train_set.tensors[1][index])


def test_what_has_no_positions_is_refused():
    with pytest.raises(TypeError, match="positions and a length"):
        IndexedDataset(iter([1]))
