"""Checks of every kind, of metrics and of plain ``nn.Module``s."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_ext._testing.bitwise import seeded
from lightning_ext.testing import check_metric
from tests.conformance.entry import Entry
from tests.conformance.suite import TRAINS, assert_finite, assert_same, check, state_of, total_of, weights


@check(*TRAINS, "metric", "nn")
def construct_and_repr(entry: Entry) -> None:
    component = entry.factory()
    assert type(component).__name__ in repr(component)
    assert type(component).__doc__, "a public class has a docstring"


@check(*TRAINS, "metric", "nn")
def pickle_and_deepcopy(entry: Entry) -> None:
    component = entry.factory()
    for twin in (pickle.loads(pickle.dumps(component)), copy.deepcopy(component)):
        assert twin is not component
        assert_same(state_of(component), state_of(twin), "the copy differs")


@check("metric")
@pytest.mark.ddp
def metric_laws(entry: Entry) -> None:
    check_metric(entry.factory, entry.batches(), entry.reference, **entry.metric_options)


@check("metric")
def two_metrics(entry: Entry) -> None:
    batches = entry.batches()

    def updated(metric: Any, chosen: list[Any]) -> Any:
        for batch in chosen:
            metric.update(**batch) if isinstance(batch, dict) else metric.update(*batch)
        return metric

    alone = updated(entry.factory(), batches).compute()
    pair = MetricCollection({"a": entry.factory(), "b": entry.another()}, compute_groups=False)
    updated(pair["a"], batches)
    updated(pair["b"], batches[:1])
    assert_same(alone, pair["a"].compute(), "a second metric changes the first")


@check("nn")
def forward_backward(entry: Entry) -> None:
    component = entry.factory()
    value = total_of(entry.call(component, entry.inputs()))
    assert math.isfinite(value.item())
    if any(p.requires_grad for p in component.parameters()):
        value.backward()
        missing = [name for name, p in component.named_parameters() if p.grad is None]
        assert not missing, f"no gradient reaches {missing}"
        assert_finite([p.grad for p in component.parameters()], "a gradient")


@check("nn")
def state_dict_round_trip(entry: Entry) -> None:
    component, buffer = entry.factory(), io.BytesIO()
    torch.save(component.state_dict(), buffer)
    buffer.seek(0)
    with seeded(1):
        fresh = entry.factory()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    with seeded(0):
        expected = entry.call(component.eval(), entry.inputs())
    with seeded(0):
        ours = entry.call(fresh.eval(), entry.inputs())
    assert_same(expected, ours, "a loaded module computes something else")


@check("nn")
def float64_and_bf16(entry: Entry) -> None:
    component = entry.factory()
    assert_finite(entry.call(component, entry.inputs()), "the output")
    with torch.autocast("cpu", torch.bfloat16):
        assert_finite(entry.call(component, entry.inputs()), "the bf16 output")
    wide = apply_to_collection(entry.inputs(), Tensor, lambda t: t.double() if t.is_floating_point() else t)
    assert_finite(entry.call(component.double(), wide), "the float64 output")


@check("nn")
def compiled(entry: Entry) -> None:
    component = entry.factory().eval()
    torch._dynamo.reset()
    with seeded(0):
        expected = entry.call(component, entry.inputs())
    with seeded(0):
        ours = entry.call(torch.compile(component, backend="eager"), entry.inputs())
    torch._dynamo.reset()
    assert_same(expected, ours, "the compiled module computes something else")


@check("nn")
def inference_mode(entry: Entry) -> None:
    component = entry.factory().eval()
    with seeded(0):
        expected = entry.call(component, entry.inputs())
    with torch.inference_mode(), seeded(0):
        ours = entry.call(component, entry.inputs())
    assert_same(expected, ours, "inference mode changes the output")


@check("nn")
def two_modules(entry: Entry) -> None:
    first, second = entry.factory(), entry.another()
    before = weights(second)
    total_of(entry.call(first, entry.inputs()))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert_same(before, weights(second), "two instances share a parameter")
