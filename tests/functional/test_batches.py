"""Batches of any nesting: sizes, samples out of them, several joined, autograd through them."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest
import torch
from torch import nn

from lightning_ext.functional import batch_size, concatenate, differentiable, map_tensors, select, select_traced

Pair = namedtuple("Pair", "x y")


def nested():
    return {
        "x": torch.arange(8.0).reshape(4, 2),
        "y": [torch.arange(4), (torch.arange(4) * 10, "fixed")],
        "name": ["a", "b", "c", "d"],
        "shape": (2, 3),
        "scale": torch.tensor(0.5),
        "nothing": None,
    }


def test_the_size_is_the_first_dimension_of_all_tensors():
    assert batch_size(torch.zeros(3, 2)) == 3
    assert batch_size(nested()) == 4
    assert batch_size((torch.zeros(0, 2),)) == 0


@pytest.mark.parametrize("index", [[3, 1], torch.tensor([3, 1]), torch.tensor([3, 1], dtype=torch.int32), (-1, 1)])
def test_select_takes_samples_in_order_and_keeps_what_is_not_per_sample(index):
    chosen = select(nested(), index)
    assert torch.equal(chosen["x"], torch.tensor([[6.0, 7.0], [2.0, 3.0]]))
    assert torch.equal(chosen["y"][0], torch.tensor([3, 1]))
    assert torch.equal(chosen["y"][1][0], torch.tensor([30, 10]))
    assert chosen["y"][1][1] == "fixed"
    assert chosen["name"] == ["d", "b"]
    assert chosen["shape"] == (2, 3)
    assert chosen["scale"] == 0.5
    assert chosen["nothing"] is None


def test_select_by_mask_and_of_nothing():
    assert select(nested(), torch.tensor([True, False, False, True]))["name"] == ["a", "d"]
    assert len(select(torch.zeros(3, 2), [])) == 0


@pytest.mark.parametrize(
    "kind",
    [dict, OrderedDict, UserDict, lambda d: defaultdict(list, d)],
    ids=["dict", "OrderedDict", "UserDict", "defaultdict"],
)
def test_mappings_keep_their_class(kind):
    batch = kind({"x": torch.zeros(2, 1), "y": torch.zeros(2)})
    for result in (select(batch, [0]), concatenate([batch, batch]), map_tensors(torch.clone, batch)):
        assert type(result) is type(batch)
        assert list(result) == ["x", "y"]
    assert len(batch["x"]) == 2


def test_named_tuples_tuples_and_lists_keep_their_class():
    for batch in (Pair(torch.zeros(2), torch.ones(2)), (torch.zeros(2), 1), [torch.zeros(2), 1]):
        assert type(select(batch, [1])) is type(batch)
    assert select(Pair(torch.zeros(2), torch.ones(2)), [1]).y == 1


def test_concatenate_undoes_select():
    batch = nested()
    joined = concatenate([select(batch, [0]), select(batch, [1, 2, 3])])
    assert torch.equal(joined["x"], batch["x"])
    assert torch.equal(joined["y"][1][0], batch["y"][1][0])
    assert {key: joined[key] for key in ("name", "shape", "scale", "nothing")} == {
        key: batch[key] for key in ("name", "shape", "scale", "nothing")
    }


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: batch_size({"a": 1, "b": ["x"]}), ValueError, "no tensor"),
        (lambda: batch_size(torch.tensor(1.0)), ValueError, "no tensor"),
        (
            lambda: batch_size((torch.zeros(3), {"m": torch.zeros(2)})),
            ValueError,
            r"\[0\]: 3, batch\[1\]\['m'\]: 2",
        ),
        (lambda: select(torch.zeros(3), [3]), IndexError, r"3 samples; got \[3\]"),
        (lambda: select(torch.zeros(3), [-4]), IndexError, "-4"),
        (lambda: concatenate([]), ValueError, "empty"),
        (lambda: concatenate([(torch.zeros(2),), [torch.zeros(2), torch.zeros(2)]]), ValueError, "alike"),
        (
            lambda: concatenate([(torch.zeros(2), "a"), (torch.zeros(2), "b")]),
            ValueError,
            r"\[1\] is not per sample",
        ),
        (lambda: concatenate([torch.zeros(2, 3), torch.zeros(2, 4)]), ValueError, r"\(2, 3\), \(2, 4\).*Pad"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_autograd_works_inside_differentiable(around):
    layer = nn.Linear(2, 1)
    with around():
        batch = {"x": torch.ones(3, 2) * 2, "name": "a"}
        with differentiable(batch) as plain:
            assert not plain["x"].is_inference()
            (gradient,) = torch.autograd.grad(layer(plain["x"]).square().sum(), layer.weight, create_graph=True)
            torch.autograd.grad(gradient.sum(), layer.weight)
        assert plain["name"] == "a"
        assert torch.is_inference_mode_enabled() is (around is torch.inference_mode)
        assert not torch.is_grad_enabled()
    ordinary = torch.ones(2)
    with differentiable(ordinary) as plain:
        assert plain is ordinary


def test_under_vmap_samples_are_chosen_and_lists_per_sample_refuse_to_be_read():
    batch = {"x": torch.tensor([5.0, 6.0, 7.0]), "unit": torch.tensor(2.0), "name": ["a", "b", "c"], "note": "plain"}

    def chosen(index):
        sample = select_traced(batch, index)
        assert sample["note"] == "plain"
        return sample["x"] * sample["unit"]

    index = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(torch.func.vmap(chosen)(index), batch["x"][index] * 2)
    for read in (list, len, lambda names: names[0], lambda names: "a" in names):
        with pytest.raises(ValueError, match=r"a list with one entry per sample.*into a tensor"):
            read(select_traced(batch, torch.tensor([0]))["name"])
