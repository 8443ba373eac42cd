"""The LAFTR reproduction runs from end to end, every criterion can fail, and its parts compute what they say."""

import dataclasses
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import lightning_ext.reproduce as engine
from lightning_ext._resources import UserError, load_script
from lightning_ext.data import ContinualDataModule

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBERS = "R1a R1b R1c R1d R1e R2a R2b R2c R2d R2e R4a R4b R4c R4d R5a R5b R6a R6b R6c R6d R6e"


@pytest.fixture
def script(monkeypatch):
    """The reproduction, and the engine with it."""
    module = load_script(EXAMPLES / "laftr_reproduce.py", "claims")
    monkeypatch.setattr(engine, "load_script", lambda path, *required: module)
    return module


def shrink(script):
    """A budget of seconds."""
    tracking, continual, influence = (script._part(name) for name in ("tracking", "continual", "influence"))
    tracking.EPOCHS = tracking.MORE_EPOCHS = 1
    tracking.EVERY, tracking.SAMPLES = 1, 20
    for part in (tracking.training, continual.training):
        (x, t), (x_test, t_test) = part.digits()
        part.digits = lambda x=x, t=t, x_test=x_test, t_test=t_test: ((x[:200], t[:200]), (x_test[:50], t_test[:50]))
    for name, benchmark in continual.BENCHMARKS.items():
        continual.BENCHMARKS[name] = dataclasses.replace(benchmark, tasks=2, epochs=1, hidden=(6,))
    influence.MISLABELLED = influence.Plan((64, 6, 10), 80, 3, 0.1)
    influence.REMOVED = influence.Plan((10, 3, 1), 60, 3, 0.03)
    influence.REMOVALS, influence.PBRF_STEPS, influence.DRAWS = 4, 5, 40


def failed(claims):
    """The numbers of the claims that do not hold."""
    return [claim.claim.split()[0] for claim in claims if not claim.measure().passed]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_runs_and_writes_every_row(script, capfd):
    shrink(script)
    rows = engine.reproduce("laftr", seeds=(0,), output="out", examples=EXAMPLES)
    assert json.loads(Path("out/laftr.json").read_text())["rows"] == rows
    assert not [row["error"] for row in rows if "error" in row]
    assert " ".join(row["claim"].split()[0] for row in rows) == NUMBERS
    assert all(row["ours"] is not None and row["paper"] and row["criterion"] for row in rows)
    assert not {row["claim"].split()[0]: row["passed"] for row in rows}["R6a"]  # nothing is learned in two steps
    assert sorted(path.name for path in Path("out").glob("*.png")) == [
        f"laftr_{name}.png" for name in ("detection", "matrices", "memory", "removal", "tracking")
    ]
    for benchmark in ("five", "ten"):
        table = json.loads(Path(f"out/laftr_{benchmark}_tasks.json").read_text())
        assert [row["method"] for row in table] == script._part("continual").names(benchmark)
        assert {row["method"]: row["bytes"] for row in table}["fine-tuning"] == 0
    told = capfd.readouterr().err
    assert "R2, EWC, weight 100, seed 0, " in told  # progress without a terminal
    assert "R6, K-FAC, weight 100, seed 99, " in told
    assert "GPU available" not in told


def test_a_real_run_is_the_specified_one(script):
    tracking, continual, influence = (script._part(name) for name in ("tracking", "continual", "influence"))
    assert (tracking.EPOCHS, tracking.MORE_EPOCHS, tracking.SAMPLES, tracking.STORED) == (30, 6, 400, 20)
    five, ten = continual.BENCHMARKS.values()
    assert [(plan.tasks, plan.epochs, plan.hidden) for plan in (five, ten)] == [(5, 10, (64, 64)), (10, 3, (64, 64))]
    assert {method.name: method.weight for method in five.methods} == {
        "fine-tuning": 0,
        "L2 of weights": 0.01,
        "EWC": 100,
        "NTK, 40 stored": 10,
        "official formula": 0.1,
        "laftr-sample": 10,
        "laftr-sample by class": 10,
        "exact, 40 stored": 10,
        "laftr-moments": 0.1,
        "laftr-relu": 10,
        "laftr-relu by class": 10,
        "exact, all data": 10,
    }
    plan = dataclasses.astuple(influence.MISLABELLED)
    assert plan == ((64, 32, 10), 1000, 30, 0.1, 50)
    assert dataclasses.astuple(influence.REMOVED)[:3] == ((10, 12, 8, 1), 300, 100)
    assert (influence.DAMPING, influence.FLIPPED, influence.REMOVALS) == (1e-2, 0.1, 25)
    train, test = tracking.training.digits()
    assert (train[0].shape, test[0].shape) == ((1300, 64), (497, 64))
    x = torch.cat([train[0], test[0]])
    assert (x.mean().abs() < 1e-6, (x.std() - 1).abs() < 1e-6, x.std(0).min() == 0) == (True, True, True)


# -- R1 -------------------------------------------------------------------------------------------------------------


def test_tracking_criteria(script, monkeypatch):
    part = script._part("tracking")
    monkeypatch.setattr(script._part("figures"), "tracking", lambda *args: SimpleNamespace())
    good = {
        "laftr-moments by class": 0.1, "laftr-relu by class": 0.05, "K-FAC": 0.9, "EWC": 3.0, "laftr-moments": 0.5,
        "official formula": 1.0, "official by class": 0.2,
    }  # fmt: skip

    def run(*changes):
        runs = [good | change for change in changes]
        monkeypatch.setattr(part, "tracked", lambda seed: SimpleNamespace(log_ratio=runs[seed].get))
        return failed(script.tracking_claims(range(len(runs))))

    assert run({}) == []
    assert run({"laftr-moments by class": 0.19}, {}) == []  # means over the seeds
    assert run({"laftr-moments by class": 0.16}) == ["R1a"]
    assert run({"laftr-relu by class": 0.11}) == ["R1b"]
    assert run({"K-FAC": 0.14}) == ["R1c"]
    assert run({"EWC": 0.8}) == ["R1c"]
    assert run({"official formula": 0.5}) == ["R1d"]
    assert run({"official by class": 0.1}) == ["R1e"]


def test_a_track_is_judged_by_its_log_ratio(script):
    part = script._part("tracking")
    true = torch.tensor([1.0, 2.0, 4.0])
    track = part.Track(torch.arange(3), true, {"twice": 2 * true, "half": true / 2, "zero": 0 * true})
    assert track.log_ratio("twice") == pytest.approx(math.log(2))
    assert track.log_ratio("half") == pytest.approx(math.log(2))
    assert track.log_ratio("zero") == math.inf
    assert track.median_ratio("half") == 0.5
    assert track.pearson("twice") == pytest.approx(1.0)


def test_distances_are_those_to_the_first_task(script):
    """All data and the exact estimate agree where nothing is left out; frozen gates are LAFTR without drawn inputs."""
    shrink(script)
    part = script._part("tracking")
    part.ESTIMATORS = {"exact, stored": ("coreset", {"size": None})}
    track = part.tracked(0)
    assert torch.equal(track.estimates["exact, stored"], track.true)
    assert track.true[0] > 0
    assert track.log_ratio(part.FROZEN) < 0.5
    assert not torch.equal(track.estimates[part.FROZEN], track.true)
    assert track.steps.tolist() == list(range(part.EVERY, 1 + int(track.steps[-1]), part.EVERY))


# -- R2 and R6 ------------------------------------------------------------------------------------------------------


def with_accuracies(script, monkeypatch, **values):
    """Both benchmarks with made accuracies, the same on all seeds."""
    part = script._part("continual")
    run = dict.fromkeys((*part.names("five"), *part.names("ten")), 0.9)
    run |= {"fine-tuning": 0.4, "EWC": 0.5, "online EWC": 0.5, "K-FAC": 0.6, "NTK, 40 stored": 0.7} | values
    run |= {"official formula": values.get("official formula", 0.8)}
    made = SimpleNamespace(nbytes=100)
    monkeypatch.setattr(part, "accuracy", lambda benchmark, name, seeds: run[name])
    monkeypatch.setattr(part, "table", lambda *args: [])
    monkeypatch.setattr(part, "learned", lambda *args: made)
    monkeypatch.setattr(part, "one_task_bytes", lambda name: 100)
    draw = script._part("figures")
    monkeypatch.setattr(draw, "memory", lambda *args: None)
    monkeypatch.setattr(draw, "matrices", lambda *args: None)
    return made


def test_five_task_criteria(script, monkeypatch, tmp_path):
    def run(**values):
        with_accuracies(script, monkeypatch, **{name.replace("_", " "): value for name, value in values.items()})
        return failed(script.five_task_claims((0,), tmp_path))

    assert run() == []
    assert run(EWC=0.701) == ["R2a"]
    assert run(**{"laftr-sample": 0.69}) == ["R2a", "R2b"]
    assert run(**{"NTK, 40 stored": 0.81}) == ["R2b"]
    assert run(**{"exact, 40 stored": 0.93, "exact, all data": 0.94}) == ["R2c"]
    assert run(**{"laftr-relu by class": 0.87}) == ["R2c"]
    assert run(official_formula=0.86) == ["R2d"]
    assert run(**{"laftr-moments": 0.91}) == ["R2e"]


def test_ten_task_criteria(script, monkeypatch, tmp_path):
    def run(nbytes=100, **values):
        made = with_accuracies(script, monkeypatch, **values)
        made.nbytes = nbytes
        return failed(script.ten_task_claims((0,), tmp_path))

    assert run() == []
    assert run(**{"fine-tuning": 0.61}) == ["R6a"]
    assert run(EWC=0.71) == ["R6b"]
    assert run(**{"K-FAC": 0.86}) == ["R6b"]
    assert run(**{"exact, 40 stored": 0.93}) == ["R6c"]
    assert run(**{"the same, last": 0.84}) == ["R6d"]
    assert run(**{"the same, merge": 0.49}) == ["R6e"]
    assert run(nbytes=101) == ["R6e"]


def test_the_regularizer_changes_the_training_and_the_memory_is_counted(script):
    """Two tasks: the penalty holds the first one; bytes are the callback's, less weights where none are needed."""
    part = script._part("continual").training
    (x, t), test = part.digits()
    data = ContinualDataModule.permuted((x[:300], t[:300]), test, num_tasks=2, seed=0)
    size = 4 * (64 * 16 + 16 + 160 + 10)
    found = {}
    for method in (
        part.Method("nothing"),
        part.Method("exact", "coreset", 10.0, options={"size": 8}, keeps_reference=False),
        part.Method("all", "laftr", 10.0, options={"num_samples": 40}),
        part.Method("last", "laftr", 10.0, "last", {"num_samples": 40}),
        part.Method("merge", "laftr", 10.0, "merge", {"num_samples": 40}),
    ):
        torch.manual_seed(0)
        found[method.name] = part.learn(method, data, network(script), 6, 0, lr=5e-3)
    matrix = {name: run.values["cl/matrix"] for name, run in found.items()}
    assert all(torch.equal(each[0], matrix["nothing"][0]) for each in matrix.values())  # the first task has no past
    assert matrix["all"][1, 0] > matrix["nothing"][1, 0] + 0.1
    assert found["nothing"].nbytes == 0
    assert found["exact"].nbytes == 2 * 4 * 8 * (64 + 10)
    assert found["all"].nbytes - found["last"].nbytes == size
    assert found["last"].nbytes - size == 2 * (found["merge"].nbytes - size)


def network(script):
    """Small."""
    return script._part("continual").MLP([64, 16, 10])


def test_the_best_weight_is_chosen_on_another_seed(script, monkeypatch):
    part = script._part("continual")
    asked = []

    def learned(benchmark, name, seed, weight):
        asked.append((seed, weight))
        return SimpleNamespace(accuracy={10.0: 0.5, 100.0: 0.4}[weight])

    monkeypatch.setattr(part, "learned", learned)
    assert part.chosen_weight("ten", "K-FAC") == 10.0
    assert asked == [(part.TUNING_SEED, 10.0), (part.TUNING_SEED, 100.0)]
    assert part.TUNING_SEED not in (0, 1, 2)


# -- R4 and R5 ------------------------------------------------------------------------------------------------------


def test_detection_criteria(script, monkeypatch):
    part = script._part("influence")
    monkeypatch.setattr(script._part("figures"), "detection", lambda found: None)
    good = {"laftr-relu by class": (0.995, 0.88), "laftr-sample by class": (0.992, 0.87), part.LOSS: (0.9, 0.89)}

    def run(**changes):
        values = good | {part.EXACT: (1.0, 0.89)} | changes

        def found(seed):
            return SimpleNamespace(
                agreement=lambda name: values[name][0], recall=lambda name, share: values[name][1] + share
            )

        monkeypatch.setattr(part, "mislabelled", found)
        return failed(script.detection_claims((0,)))

    assert run() == []
    assert run(**{"laftr-relu by class": (0.98, 0.88)}) == ["R4a"]
    assert run(**{"laftr-sample by class": (0.98, 0.87)}) == ["R4b"]
    assert run(**{"laftr-sample by class": (0.99, 0.85)}) == ["R4c"]
    assert run(**{part.LOSS: (0.9, 0.80)}) == ["R4d"]


def test_removal_criteria(script, monkeypatch):
    part = script._part("influence")
    monkeypatch.setattr(script._part("figures"), "removal", lambda *args: None)

    def run(ours, diagonal):
        values = dict.fromkeys(part.PREDICTIONS, 0.5) | {"PBRF, laftr-relu": ours, part.DIAGONAL: diagonal}
        monkeypatch.setattr(part, "removed", lambda seed: SimpleNamespace(correlation=values.get))
        return failed(script.removal_claims((0,)))

    assert run(0.76, 0.4) == []
    assert run(0.74, 0.4) == ["R5a"]
    assert run(0.76, 0.8) == ["R5b"]


def test_scores_of_suspicion_are_compared_with_the_exact_ones(script):
    part = script._part("influence")
    wrong = torch.tensor([True, False, False, False, True, False, False, False, False, False])
    exact = torch.arange(10.0, 0.0, -1.0)
    found = part.Found({part.EXACT: exact, "reverse": -exact}, wrong)
    assert found.recall(part.EXACT, 0.1) == 0.5
    assert found.recall(part.EXACT, 0.5) == 1.0
    assert found.recall("reverse", 0.5) == 0.0
    assert found.agreement("reverse") == pytest.approx(-1.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_statistics_that_know_the_data_agree_with_the_exact_scores(script):
    """With many draws, self-influence from LAFTR nears the exact one, and flipped labels have large losses."""
    shrink(script)
    part = script._part("influence")
    part.MISLABELLED, part.DRAWS = part.Plan((64, 6, 10), 200, 10, 0.1), 400
    found = part.mislabelled(0)
    assert int(found.wrong.sum()) == 20
    assert found.agreement("laftr-relu by class") > 0.9
    assert found.recall(part.LOSS, 0.2) > 0.4


# -- figures --------------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers(script):
    draw, tracking = script._part("figures"), script._part("tracking")
    true = torch.tensor([1.0, 2.0])
    track = tracking.Track(torch.arange(2), true, dict.fromkeys(tracking.NAMES, 2 * true))
    part = SimpleNamespace(NAMES=tracking.NAMES, tracked=lambda seed: track)
    panels = draw.tracking(part, (0,)).axes
    assert panels[0].get_title("left") == "L2 of weights: 0.69"
    assert panels[0].lines[1].get_ydata().tolist() == [2.0, 4.0]

    rows = [{"method": "EWC", "accuracy": 0.6, "std": None, "bytes": 5000}]
    rows.append({"method": "fine-tuning", "accuracy": 0.5, "std": 0.1, "bytes": 0})
    (axes,) = draw.memory({"five": rows}).axes
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in "^X"]
    assert points == [(5.0, pytest.approx(0.4)), (draw.NOTHING, pytest.approx(0.5))]
    assert {text.get_text() for text in axes.texts} == {"EWC", "fine-tuning"}

    result = script._part("influence").Removed(torch.tensor([3.0, 1.0, 2.0]), {"a": torch.tensor([9.0, 7.0, 8.0])})
    panel = draw.removal([result], ["a"] * 6).axes[0]
    assert panel.collections[0].get_offsets().tolist() == [[3, 3], [1, 1], [2, 2]]
    assert panel.get_title("left") == "a: Spearman 1.00"


def test_no_name_lies_on_another_or_on_a_mark(script):
    """Eight methods of nearly the same error and bytes, as three variants of LAFTR are."""
    draw = script._part("figures")
    rows = [
        {
            "method": f"laftr-moments {i}",
            "accuracy": 0.9 + 0.003 * i,
            "std": 0.01 * (i % 3),
            "bytes": 220_000 + 9000 * i,
        }
        for i in range(8)
    ]
    rows.append({"method": "fine-tuning", "accuracy": 0.5, "std": None, "bytes": 0})
    figure = draw.memory({"five": rows})
    figure.draw_without_rendering()
    (axes,) = figure.axes

    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 9
    assert all(one.count_overlaps(boxes) == 1 for one in boxes), "itself alone"
    marks = [axes.transData.transform((draw._place(row), 1 - row["accuracy"])) for row in rows]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    frame = axes.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)


def test_every_method_has_a_family(script):
    draw, continual, tracking = (script._part(name) for name in ("figures", "continual", "tracking"))
    families = {name: draw.kind(name) for name in (*continual.names("five"), *continual.names("ten"), *tracking.NAMES)}
    assert {name for name, family in families.items() if family == "weights"} == {
        "L2 of weights",
        "EWC",
        "online EWC",
        "K-FAC",
    }
    assert {name for name, family in families.items() if family == "official"} == {
        "official formula",
        "official by class",
    }
    assert families["the same, merge"] == "laftr"
    assert draw.kind("influence, exact") == "stored"


# -- --full ---------------------------------------------------------------------------------------------------------


def write_mnist(folder):
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        pixels = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes([i % 10 for i in range(count)])
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)


def write_cifar(folder, home, names, label_bytes, classes, count):
    (folder / home).mkdir()
    draws = np.random.default_rng(0)
    for name in names:
        records = draws.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
        records[:, label_bytes - 1] = np.arange(count) % classes
        (folder / home / name).write_bytes(records.tobytes())


@pytest.fixture
def data(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    batches = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
    write_cifar(tmp_path, "cifar-10-batches-bin", batches, 1, 10, 10)
    write_cifar(tmp_path, "cifar-100-binary", ("train.bin", "test.bin"), 2, 100, 100)
    return tmp_path


def test_tasks_are_those_of_the_published_configurations(script, data):
    full = script._part("full")
    rows = {name: recipe.data(data, recipe.batch_size) for name, recipe in full.RECIPES.items()}
    assert {name: (row.num_tasks, row.heads(1), row.batch_size) for name, row in rows.items()} == {
        "Split MNIST": (5, slice(2, 4), 32),
        "Permuted MNIST": (10, None, 128),
        "Split CIFAR": (6, slice(10, 20), 512),
    }
    x, t = rows["Split MNIST"].train_sets[1].tensors
    assert (set(t.tolist()), x.shape[1:], float(x.min()) >= 0, float(x.max()) <= 1) == ({2, 3}, (784,), True, True)
    for place, part in enumerate(rows["Split CIFAR"].train_sets):
        x, t = part.tensors
        assert set(t.tolist()) == set(range(10 * place, 10 * place + 10))
        assert (x.shape[1:], float(x.max()) <= 1) == ((3, 32, 32), True)
    assert len(rows["Split CIFAR"].train_sets[0]) == 50
    assert full.convolutional()(torch.zeros(2, 3, 32, 32)).shape == (2, 60)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_large_experiments_run_on_a_cpu(script, data):
    full = script._part("full")

    def small():
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.ReLU(), torch.nn.Linear(4, 60)
        )

    for name, recipe in full.RECIPES.items():
        options = {**recipe.options, "num_samples": 4, "covariance": "diag"}
        network = small if name == "Split CIFAR" else lambda: full.MLP([784, 4, 10])
        full.RECIPES[name] = dataclasses.replace(recipe, epochs=(2, 1), network=network, options=options)
    claims = [claim for claim in script.claims(True, (0,), data, data) if claim.claim.startswith("F")]
    assert [claim.claim.split()[0] for claim in claims] == ["F1", "F2", "F3"]
    for claim in claims:
        outcome = claim.measure()
        assert "nan" not in outcome.ours
        assert not outcome.passed  # noise in, noise out


def test_training_on_a_task_leaves_other_heads_alone_and_keeps_the_optimizer(script, data, monkeypatch):
    full = script._part("full")
    made = []
    kept = full.Kept
    monkeypatch.setattr(full, "Kept", lambda lr: made.append(kept(lr)) or made[-1])
    recipe = dataclasses.replace(full.RECIPES["Split MNIST"], epochs=(1, 1), network=lambda: full.MLP([784, 3, 10]))
    steps = []
    step = full.Headed.training_step

    def watched(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        last = self.network[-1].weight if isinstance(self.network, torch.nn.Sequential) else list(self.parameters())[-2]
        (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
        steps.append(gradient.abs().sum(1).nonzero().flatten().tolist())
        return loss

    monkeypatch.setattr(full.Headed, "training_step", watched)
    full.learned(recipe, data, 0, regularized=False)
    assert all(set(rows) <= {2 * (i), 2 * i + 1} for i, rows in enumerate(steps))  # one batch for each task
    assert len(steps) == 5
    (state, *_) = made[0].optimizer.state.values()
    assert int(state["step"]) == 5


def test_large_criterion(script):
    full = script._part("full")
    assert full.holds([0.95, 0.93], [0.5, 0.5], 0.95)
    assert not full.holds([0.92, 0.92], [0.5, 0.5], 0.95)
    assert not full.holds([0.94, 0.94], [0.95, 0.95], 0.95)


def test_full_without_a_folder_is_one_sentence_before_anything_runs(script, tmp_path):
    with pytest.raises(UserError, match=r"--full needs --data DIR, a folder with the MNIST files"):
        engine.reproduce("laftr", full=True, output=tmp_path / "out", examples=EXAMPLES)
    assert not (tmp_path / "out" / "laftr.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "MNIST/raw/train-images-idx3-ubyte").unlink(), r"train-images-idx3-ubyte .* not found"),
        (lambda f: (f / "cifar-10-batches-bin/test_batch.bin").write_bytes(b"12"), r"test_batch.bin is damaged"),
        (lambda f: (f / "cifar-100-binary/train.bin").unlink(), r"CIFAR-100: train.bin not found"),
    ],
)
def test_data_that_are_missing_or_damaged_are_one_sentence_before_anything_runs(script, data, spoil, message):
    spoil(data)
    with pytest.raises(UserError, match=f"--full: .*{message}"):
        engine.reproduce("laftr", full=True, output=data / "out", data_dir=data, examples=EXAMPLES)
    assert not (data / "out" / "laftr.json").exists()
