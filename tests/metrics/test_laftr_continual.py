"""ContinualMetrics: counts of any shards make one matrix, its numbers, and what it says of holes and bad input."""

import itertools
import math
import warnings

import pytest
import torch

from lightning_ext.metrics import ContinualMetrics
from lightning_ext.testing import check_metric

T17 = [[0.9, 0.0, 0.0], [0.8, 0.95, 0.0], [0.6, 0.9, 0.97]]
KEYS = {"cl/avg_acc", "cl/bwt", "cl/forgetting", "cl/fwt", "cl/learning_acc", "cl/matrix"}


def predictions(accuracy):
    """A hundred predictions with their labels."""
    right = round(accuracy * 100)
    return torch.tensor([1] * right + [0] * (100 - right)), torch.ones(100, dtype=torch.long)


def filled(matrix, **kwargs):
    metric = ContinualMetrics(len(matrix), **kwargs)
    for seen, row in enumerate(matrix):
        for task, accuracy in enumerate(row):
            if accuracy is not None:
                metric.update(*predictions(accuracy), seen=seen, task=task)
    return metric


def test_three_tasks_by_hand():
    value = filled(T17).compute()
    assert set(value) == KEYS
    assert torch.equal(value["cl/matrix"], torch.tensor(T17, dtype=torch.float64))
    expected = {"avg_acc": (0.6 + 0.9 + 0.97) / 3, "bwt": -0.175, "forgetting": 0.175, "learning_acc": 0.94}
    for name, number in expected.items():
        assert value[f"cl/{name}"].item() == pytest.approx(number, abs=1e-12)
    assert value["cl/fwt"].isnan()


def entries():
    """Unequal batches of all entries of two tasks and of the untrained network."""
    generator = torch.Generator().manual_seed(0)
    places = [(-1, 0), (-1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    return [
        {
            "preds": torch.rand(5 + 4 * k, 3, generator=generator),
            "target": torch.randint(3, (5 + 4 * k,), generator=generator),
            "seen": seen,
            "task": task,
        }
        for k, (seen, task) in enumerate(places * 2)
    ]


def reference(seen_batches):
    right = {}
    for entry in seen_batches:
        hits = (entry["preds"].argmax(1) == entry["target"]).tolist()
        right.setdefault((entry["seen"], entry["task"]), []).extend(hits)
    mean = {place: sum(hits) / len(hits) for place, hits in right.items()}

    def at(t, i):
        return torch.tensor(mean.get((t, i), math.nan), dtype=torch.float64)

    value = {"cl/matrix": torch.stack([torch.stack([at(t, 0), at(t, 1)]) for t in (0, 1)])}
    if (1, 0) in mean or (1, 1) in mean:
        value["cl/avg_acc"] = (at(1, 0) + at(1, 1)) / 2
        value["cl/bwt"] = at(1, 0) - at(0, 0)
        value["cl/fwt"] = at(0, 1) - at(-1, 1)
    return value


@pytest.mark.filterwarnings("ignore:ContinualMetrics. no test of")
def test_every_way_of_cutting_saving_and_spreading_the_data():
    check_metric(lambda: ContinualMetrics(2), entries(), reference, atol=0, rtol=1e-12)


def test_while_tasks_are_still_to_come_those_so_far_count():
    three, two = filled([*T17[:2], [None] * 3]).compute(), filled([row[:2] for row in T17[:2]]).compute()
    for key in KEYS - {"cl/matrix"}:
        torch.testing.assert_close(three[key], two[key], equal_nan=True)
    assert three["cl/matrix"][2].isnan().all()


def test_one_task():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = filled([[0.75]]).compute()
    assert value["cl/avg_acc"] == value["cl/learning_acc"] == 0.75
    assert all(value[f"cl/{name}"].isnan() for name in ("bwt", "forgetting", "fwt"))


def test_forward_transfer_from_a_measured_or_a_given_baseline():
    matrix = [[0.9, 0.4], [0.8, 0.9]]
    given, measured = filled(matrix, baseline=[0.3, 0.15]), filled(matrix)
    measured.update(*predictions(0.3), seen=-1, task=0)
    measured.update(*predictions(0.15), seen=-1, task=1)
    for metric in (given, measured):
        assert metric.compute()["cl/fwt"].item() == pytest.approx(0.25, abs=1e-12)


def test_the_untrained_network_alone():
    metric = ContinualMetrics(2)
    metric.update(*predictions(0.5), seen=-1, task=1)
    value = metric.compute()
    assert set(value) == KEYS
    assert all(number.isnan().all() for number in value.values())


@pytest.mark.parametrize("heads", [slice(2, 4), [2, 3]])
def test_heads_take_the_largest_of_a_tasks_own_outputs(heads):
    scores = torch.tensor([[9.0, 0.0, 1.0, 2.0], [0.0, 9.0, 2.0, 1.0]])
    metric = ContinualMetrics(2)
    metric.update(scores, torch.tensor([3, 2]), seen=1, task=1, heads=heads)
    metric.update(scores, torch.tensor([3, 2]), seen=1, task=0)
    with pytest.warns(UserWarning, match="no test"):
        assert metric.compute()["cl/matrix"][1].tolist() == [0.0, 1.0]


def test_a_test_that_was_left_out_is_told():
    metric = filled([[0.9, None, None], [None, 0.9, None], [0.5, 0.8, 0.9]])
    with pytest.warns(UserWarning, match="no test of task 0 after task 1: what takes") as caught:
        value = metric.compute()
    assert len(caught) == 1
    assert value["cl/forgetting"].isnan()
    assert value["cl/bwt"].isfinite()
    with pytest.warns(UserWarning, match=r"task 1 after task 2 and 11 more: what takes"):
        filled([*[[None] * 6] * 5, [0.5] * 5 + [None]]).compute()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"seen": 3}, r"seen must be -1 \(untrained\) or lie between 0 and 2, got 3"),
        ({"seen": -2}, r"seen must be -1 .* got -2"),
        ({"task": 3}, "task must lie between 0 and 2, got 3"),
        ({"task": -1}, "task must lie between 0 and 2, got -1"),
        ({"preds": torch.rand(4)}, "must be whole labels"),
        ({"preds": torch.ones(4, dtype=torch.long), "heads": [0]}, "must be whole labels, without heads"),
        ({"preds": torch.rand(4, 1)}, r"of two classes or more; got \(4, 1\)"),
        ({"preds": torch.rand(4, 2, 3)}, r"of two classes or more; got \(4, 2, 3\)"),
        ({"preds": torch.full((4, 2), math.nan)}, "preds must not hold NaN"),
        ({"target": torch.tensor([0, 1, 2])}, r"target labels \(B,\); got \(4, 3\) and \(3,\)"),
        ({"target": torch.eye(4, 3).long()}, r"target labels \(B,\); got \(4, 3\) and \(4, 3\)"),
        ({"target": torch.full((4,), 0.5)}, "target must hold whole labels, got torch.float32"),
        ({"target": torch.tensor([0, 1, 2, 3])}, "at least 0 and below 3, the number of scores; got 0 to 3"),
        ({"target": torch.tensor([0, 1, 2, -100])}, "at least 0 .* got -100 to 2"),
        ({"target": [0, 1, 2, 0]}, "target must be a tensor"),
        ({"preds": torch.rand(4, 3).tolist()}, "preds must be a tensor"),
        ({"preds": torch.rand(4, 3).to(torch.complex64)}, "real numbers, got torch.complex64"),
        ({"seen": True}, "seen must be a whole number, got True"),
        ({"task": 0.5}, "task must be a whole number, got 0.5"),
        ({"heads": []}, "at least one of 3 outputs"),
        ({"heads": [7]}, r"heads must index 3 outputs; got \[7\]"),
        ({"heads": slice(5, 6)}, "at least one of 3 outputs; got slice"),
    ],
)
def test_bad_input_is_named_and_not_counted(arguments, complaint):
    metric = ContinualMetrics(3)
    good = {"preds": torch.rand(4, 3), "target": torch.zeros(4, dtype=torch.long), "seen": 0, "task": 0}
    with pytest.raises(ValueError, match=complaint):
        metric.update(**{**good, **arguments})
    assert metric.total.sum() == metric.correct.sum() == 0


@pytest.mark.parametrize("baseline", [[0.1], [0.1, 1.5], [0.1, math.nan]])
def test_a_baseline_is_an_accuracy_for_each_task(baseline):
    with pytest.raises(ValueError, match=r"baseline must hold 2 accuracies in \[0, 1\]"):
        ContinualMetrics(2, baseline=baseline)


def test_there_is_one_baseline_and_at_least_one_task():
    with pytest.raises(ValueError, match="seen=-1 measures the baseline, which was given"):
        ContinualMetrics(1, baseline=[0.1]).update(*predictions(0.5), seen=-1, task=0)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        ContinualMetrics(0)


def test_nothing_seen():
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(RuntimeError, match="has seen no example on any rank"),
    ):
        ContinualMetrics(2).compute()


class TestFigure:
    @pytest.fixture(autouse=True)
    def _close(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        yield
        plt.close("all")

    def test_every_measured_entry_has_its_number(self):
        matrix = [[0.9, None, None], [0.8, 0.95, None], [0.6, 0.9, 0.97]]
        _, axes = filled(matrix).plot(task_names=["0/1", "2/3", "4/5"])
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {(i, t): f"{x:.2f}" for t, row in enumerate(matrix) for i, x in enumerate(row) if x}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0/1", "2/3", "4/5"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("tested on task", "after training on task")
        assert axes.get_title() == "average 0.823, BWT -0.175, forgetting 0.175"
        image = axes.images[0]
        assert image.get_clim() == (0, 1)  # figures of two methods compare
        assert image.get_array().mask.tolist() == [[False, True, True], [False, False, True], [False, False, False]]

    def test_numbers_stand_out_from_their_cells(self):
        _, axes = filled([[0.0, 0.3], [0.5, 1.0]]).plot()
        image = axes.images[0]

        def luminance(colour):
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        from matplotlib.colors import to_rgb

        for text in axes.texts:
            column, row = text.get_position()
            cell = image.cmap(image.norm(image.get_array()[int(row), int(column)]))
            lighter, darker = sorted((luminance(to_rgb(text.get_color())), luminance(cell)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) > 4

    def test_one_task_and_axes_of_ones_own(self):
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots()
        metric = filled([[0.75]])
        assert metric.plot(ax=axes) == metric.plot(metric.compute(), ax=axes) == (figure, axes)
        assert axes.get_title() == "average 0.750"
        assert axes.texts[0].get_text() == "0.75"

    @pytest.mark.parametrize("names", [None, ["permuted digits", "rotated digits", "a long name of a task"]])
    def test_nothing_covers_anything_and_the_bar_is_as_tall_as_the_matrix(self, names):
        figure, axes = filled(T17).plot(task_names=names)
        figure.draw_without_rendering()
        bar = axes.child_axes[0]
        frame, beside = axes.get_window_extent(), bar.get_window_extent()
        assert (beside.y0, beside.y1) == pytest.approx((frame.y0, frame.y1), abs=1)
        ticks = axes.get_xticklabels()
        ends = sorted(tick.get_window_extent().x1 for tick in ticks)
        if names is None:
            assert all(
                tick.get_window_extent().count_overlaps([t.get_window_extent() for t in ticks]) == 1 for tick in ticks
            )
        else:
            assert all(tick.get_rotation() == 35 for tick in ticks)
            assert min(b - a for a, b in itertools.pairwise(ends)) > 0.9 * ticks[0].get_fontsize()
        title, whole = axes.title.get_window_extent(), figure.bbox
        assert whole.x0 <= title.x0
        assert title.x1 <= whole.x1
        assert title.y0 >= beside.y1, "above the bar and its numbers"

    def test_names_for_all_tasks(self):
        with pytest.raises(ValueError, match="task_names must name 3 tasks, got 1"):
            filled(T17).plot(task_names=["a"])

    def test_without_matplotlib_the_error_has_the_pip_line(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[plot\]'"):
            filled(T17).plot()
