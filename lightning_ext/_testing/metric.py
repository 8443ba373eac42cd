"""Does a metric agree with itself, with a reference and with other ranks? :func:`check_metric`."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_ext._testing.distributed import run_ddp

__all__ = ["check_metric"]


def check_metric(
    metric_factory: Callable[[], Metric],
    batches: Sequence[Any],
    reference: Callable[[Sequence[Any]], Any] | None = None,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    ddp: bool = True,
    empty_rank: bool = True,
    row_split: bool = True,
) -> None:
    """Assert that a metric gives one answer, however its data are cut, saved, moved or spread over ranks.

    Checked, each against one metric that was updated with all ``batches`` in order:

    - ``reference(batches)``, and ``reference([batch])`` for the value that ``forward`` returns on each batch;
    - a metric used through ``forward``, and one updated with each batch cut into two halves of rows;
    - ``reset`` and use again; ``compute`` twice; ``update`` after ``compute``;
    - ``clone``, ``copy.deepcopy`` and pickling in the middle of the data, the original untouched by its copy;
    - ``merge_state`` of two metrics that saw a part each, and of one that saw nothing;
    - ``state_dict`` after ``persistent(True)``, loaded with ``weights_only=True`` into a fresh metric;
    - moving: every tensor that the metric owns follows ``.to(device)`` (tried with the ``meta`` device);
    - one rank, two ranks with unequal numbers of batches, and two ranks of which one saw nothing.

    Args:
        metric_factory: builds the metric; every call must build the same one.
        batches: at least three; each a tuple of positional arguments, a mapping of keyword arguments, or one tensor,
            for ``metric.update``. Of unequal sizes, they also show a mean that forgets the batch sizes.
        reference: maps a sequence of batches to the right value; of a mapping it may give some entries only. Default
            none.
        atol: absolute tolerance, at least 0; default 1e-6. Sums over ranks run in another order.
        rtol: relative tolerance, at least 0; default 1e-5.
        ddp: run the checks that start processes; default True.
        empty_rank: also try a rank and a merge partner without any update; default True.
        row_split: also cut batches into halves along the first dimension; default True. Turn it off for a metric
            that is defined on whole batches.

    Raises:
        AssertionError: naming the check that failed and the entry of the result that differs.
        ValueError: for fewer than three batches.

    Note:
        Results may be tensors, numbers, or nested mappings and sequences of them; NaN equals NaN. About one second,
        most of it for the processes.

    >>> from torchmetrics import MeanMetric
    >>> batches = [(torch.tensor([1.0, 2.0]),), (torch.tensor([3.0, 4.0, 5.0]),), (torch.tensor([6.0]),)]
    >>> check_metric(MeanMetric, batches, lambda seen: torch.cat([batch[0] for batch in seen]).mean(), ddp=False)
    """
    if len(batches) < 3:
        raise ValueError(f"check_metric needs at least three batches, to share them unequally; got {len(batches)}.")
    check = _Checks(metric_factory, list(batches), atol, rtol)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*compute.*method of metric.*was called before.*update.*")
        for name, run in {
            "reference": (lambda: check.reference(reference)) if reference is not None else None,
            "forward": check.forward,
            "row_split": check.row_split if row_split else None,
            "reset and compute": check.reuse,
            "clone, deepcopy, pickle": check.copies,
            "merge_state": lambda: check.merge(empty_rank),
            "state_dict": check.state_dict,
            "moving": check.moves,
            "ranks": (lambda: check.ranks(empty_rank)) if ddp else None,
        }.items():
            try:
                if run is not None:
                    run()
            except Exception as error:
                error.add_note(f"check_metric, while checking: {name}")
                raise


class _Checks:
    def __init__(self, factory: Callable[[], Metric], batches: list[Any], atol: float, rtol: float) -> None:
        self.factory, self.batches, self.atol, self.rtol = factory, batches, atol, rtol
        self.whole = self.updated(batches).compute()

    def updated(self, batches: Sequence[Any], metric: Metric | None = None) -> Metric:
        metric = self.factory() if metric is None else metric
        for batch in batches:
            _call(metric.update, batch)
        return metric

    def same(self, name: str, ours: Any, expected: Any) -> None:
        gap = _gap(ours, expected, self.atol, self.rtol)
        if gap:
            raise AssertionError(f"check_metric, {name}: {gap}")

    def reference(self, reference: Callable[[Sequence[Any]], Any]) -> None:
        self.same("compute against the reference", *_shared(self.whole, reference(self.batches)))
        for index, batch in enumerate(self.batches):
            value = _call(self.factory().forward, batch)
            self.same(f"forward on batch {index} against the reference", *_shared(value, reference([batch])))

    def forward(self) -> None:
        metric = self.factory()
        for index, batch in enumerate(self.batches):
            value = _call(metric.forward, batch)
            self.same(f"forward on batch {index} against a fresh metric", value, self.updated([batch]).compute())
        self.same("compute after forward on every batch", metric.compute(), self.whole)

    def row_split(self) -> None:
        halves = [half for batch in self.batches for half in _halves(batch)]
        self.same("batches cut into halves", self.updated(halves).compute(), self.whole)

    def reuse(self) -> None:
        metric = self.updated(self.batches[:1])
        metric.compute()
        self.updated(self.batches[1:], metric)
        self.same("update after compute", metric.compute(), self.whole)
        self.same("compute a second time", metric.compute(), self.whole)
        metric.reset()
        self.same("use after reset", self.updated(self.batches, metric).compute(), self.whole)

    def copies(self) -> None:
        def pickled(metric: Metric) -> Metric:
            return pickle.loads(pickle.dumps(metric))  # type: ignore[no-any-return]

        duplicates: dict[str, Callable[[Metric], Metric]] = {"clone": Metric.clone, "deepcopy": copy.deepcopy}
        for name, duplicate in (duplicates | {"pickle": pickled}).items():
            original = self.updated(self.batches[:1])
            twin = self.updated(self.batches[1:], duplicate(original))
            self.same(f"{name} in the middle of the data", twin.compute(), self.whole)
            self.updated(self.batches[1:], original)
            self.same(f"the original after its {name} was updated", original.compute(), self.whole)

    def merge(self, empty: bool) -> None:
        parts = {"a part each": 1} | ({"a partner that saw nothing": len(self.batches)} if empty else {})
        for name, cut in parts.items():
            metric = self.updated(self.batches[:cut])
            metric.merge_state(self.updated(self.batches[cut:]))
            self.same(f"merge_state of two metrics, {name}", metric.compute(), self.whole)
        if empty:
            metric = self.factory()
            metric.merge_state(self.updated(self.batches))
            self.same("merge_state into a metric that saw nothing", metric.compute(), self.whole)

    def state_dict(self) -> None:
        metric = self.updated(self.batches)
        metric.persistent(True)
        fresh = self.factory()
        fresh.persistent(True)
        fresh.load_state_dict(_through_a_file(metric.state_dict()))
        self.same("state_dict loaded into a fresh metric", fresh.compute(), self.whole)

    def moves(self) -> None:
        metric = self.updated(self.batches)
        metric.to("meta")
        states = dict(metric.metric_state)
        owned = {k: v for k, v in vars(metric).items() if isinstance(v, Tensor) and not k.startswith("_")}
        buffers = dict(metric.named_buffers()) | dict(metric.named_parameters())
        for name, value in (states | owned | buffers).items():
            tensors: list[Tensor] = []
            apply_to_collection(value, Tensor, tensors.append)
            if any(tensor.device.type != "meta" for tensor in tensors):
                raise AssertionError(f"check_metric, moving: tensor {name!r} stays behind on .to(device).")

    def ranks(self, empty: bool) -> None:
        def compute(rank: int, world_size: int, shares: list[list[Any]]) -> tuple[Any, Any]:
            metric = self.updated(shares[rank])
            together = metric.compute()
            return together, self.updated(self.batches[:1], metric).compute()

        shares = {"one rank": [self.batches], "two ranks, unequal shares": [self.batches[:1], self.batches[1:]]}
        if empty:
            shares["two ranks, one without data"] = [self.batches, []]
        for name, share in shares.items():
            # Every rank adds the first batch once more after compute: its own sums must have come back unreduced.
            again = self.updated([*self.batches, *self.batches[:1] * len(share)]).compute()
            for rank, (value, later) in enumerate(run_ddp(compute, len(share), share, world_size=len(share))):
                self.same(f"{name}, compute on rank {rank}", value, self.whole)
                self.same(f"{name}, update after compute on rank {rank}", later, again)


def _call(method: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return method(**batch)
    return method(*batch) if isinstance(batch, tuple | list) else method(batch)


def _halves(batch: Any) -> list[Any]:
    rows: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: rows.append(len(t)) if t.ndim else None)
    size = max(rows, default=1)
    if size < 2:
        return [batch]
    cuts = slice(None, size // 2), slice(size // 2, None)
    return [
        apply_to_collection(batch, Tensor, lambda t, c=cut: t[c] if t.ndim and len(t) == size else t) for cut in cuts
    ]


def _shared(ours: Any, expected: Any) -> tuple[Any, Any]:
    if isinstance(ours, Mapping) and isinstance(expected, Mapping) and set(expected) < set(ours):
        return {key: ours[key] for key in expected}, expected
    return ours, expected


def _through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _gap(ours: Any, expected: Any, atol: float, rtol: float, name: str = "result") -> str | None:
    if isinstance(ours, Mapping) and isinstance(expected, Mapping):
        if set(ours) != set(expected):
            return f"{name} has keys {sorted(map(str, ours))}, expected {sorted(map(str, expected))}"
        pairs = [(f"{name}[{key!r}]", ours[key], expected[key]) for key in expected]
    elif isinstance(ours, list | tuple) and isinstance(expected, list | tuple) and len(ours) == len(expected):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, expected, strict=True))]
    elif type(ours) is not type(expected) and not all(isinstance(v, Tensor | int | float) for v in (ours, expected)):
        return f"{name} is a {type(ours).__name__}, expected a {type(expected).__name__}"
    else:
        a, b = torch.as_tensor(ours), torch.as_tensor(expected)
        if a.numel() == b.numel() == 1:  # torchmetrics drops the dimensions of a single number
            a, b = a.reshape(()), b.reshape(())
        if a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=rtol, equal_nan=True):
            return None
        return f"{name} is {ours}, expected {expected}"
    return next((gap for key, a, b in pairs if (gap := _gap(a, b, atol, rtol, key))), None)
