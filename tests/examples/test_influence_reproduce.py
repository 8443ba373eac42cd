"""The influence reproduction runs from end to end, every criterion can fail, and its parts compute what they say."""

import dataclasses
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lightning_ext.reproduce as engine
from lightning_ext._resources import UserError, load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBERS = "E1a E1b E1c E2a E2b E2c E3a E3b E3c E3d E3e E3f E3g E4a E4b E4c E4d E5a E5b E7a E7b E7c E7d E8"


@pytest.fixture
def script(monkeypatch):
    """The reproduction, and the engine with it."""
    module = load_script(EXAMPLES / "influence_reproduce.py", "claims")
    monkeypatch.setattr(engine, "load_script", lambda path, *required: module)
    return module


def shrink(script):
    """A budget of seconds."""
    factors, detection, subsets = (script._part(name) for name in ("factors", "detection", "subsets"))
    for part in (script._part("gaps"), factors.gaps, subsets.gaps):
        for name, task in part.BASES.items():
            part.BASES[name] = dataclasses.replace(task, num_train=60, num_test=20, hidden=(4,), epochs=2)
        part.REMOVALS, part.PBRF_STEPS = 3, 5
    factors.SWEEP = dataclasses.replace(factors.SWEEP, num_train=60, num_test=20, hidden=(4,), epochs=2)
    factors.REMOVALS, factors.SIZES = 2, (1, 5)
    factors.FACTORS = {
        "epochs": {1: {"epochs": 1}, 3: {"epochs": 3}},
        "damping": {1e-2: {}, 1.0: {}},
        "weight decay": {0.0: {"weight_decay": 0.0}, 1e-3: {}},
        "width": {2: {"hidden": (2,)}, 4: {}},
        "samples removed": {1: {}, 5: {}},
    }
    detection.PBRF_STEPS = 3
    detection.TASK = dataclasses.replace(detection.TASK, num_train=60, hidden=(4,), epochs=4)
    subsets.SHARES, subsets.RETRAININGS, subsets.SUBSETS, subsets.INITIALISATIONS = (0.1, 0.3), 2, 6, 1


def outcomes(claims):
    """Whether each claim passes, by its number."""
    return {claim.claim.split()[0]: claim.measure().passed for claim in claims}


def failed(claims):
    """The numbers of the claims that do not hold."""
    return [number for number, passed in outcomes(claims).items() if not passed]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_runs_and_writes_every_row(script, capfd):
    shrink(script)
    rows = engine.reproduce("influence", seeds=(0,), output="out", examples=EXAMPLES)
    assert json.loads(Path("out/influence.json").read_text())["rows"] == rows
    assert not [row["error"] for row in rows if "error" in row]
    assert " ".join(row["claim"].split()[0] for row in rows) == NUMBERS
    assert all(row["ours"] is not None and row["passed"] is not None for row in rows)
    assert all(row["paper"] and row["criterion"] for row in rows)
    passed = {row["claim"].split()[0]: row["passed"] for row in rows}
    assert passed["E5b"]  # is at full size
    assert not passed["E3a"]  # two epochs make no trend
    assert sorted(path.name for path in Path("out").glob("*.png")) == [
        f"influence_{name}.png" for name in ("detection", "factors", "gaps", "scatter", "subsets")
    ]
    told = capfd.readouterr().err
    assert "E1, digits, seed 0, " in told  # progress without a terminal
    assert "GPU available" not in told


def test_a_real_run_is_the_specified_one(script):
    gaps, factors, subsets = (script._part(name) for name in ("gaps", "factors", "subsets"))
    assert dataclasses.astuple(gaps.BASES["digits"]) == ("digits", 400, 200, (32,), 50, 0.1, 1e-3, 50, 0.0)
    assert dataclasses.astuple(gaps.BASES["diabetes"]) == ("diabetes", 300, 142, (32, 32), 100, 0.03, 1e-3, 50, 0.0)
    assert (gaps.DAMPING, gaps.REMOVALS) == (1e-2, 20)
    assert dataclasses.astuple(factors.SWEEP) == ("digits", 300, 200, (16,), 40, 0.1, 1e-3, 50, 0.0)
    assert factors.REMOVALS == 10
    assert {name: list(values) for name, values in factors.FACTORS.items()} == {
        "epochs": [5, 20, 80, 320],
        "damping": [1e-3, 1e-2, 1e-1, 1.0],
        "weight decay": [0.0, 1e-4, 1e-3, 1e-2],
        "width": [4, 16, 64],
        "samples removed": [1, 5, 25, 75],
    }
    task = script._part("detection").TASK
    assert (task.num_train, task.hidden, task.epochs, task.flipped) == (300, (16,), 15, 0.1)
    assert (subsets.RETRAININGS, subsets.SUBSETS, subsets.INITIALISATIONS) == (5, 50, 2)


# -- E1 to E3 -------------------------------------------------------------------------------------------------------


def found_gaps(ratio, pbrf, warm=0.7, cold=0.5):
    """What the analyzer found, as far as the claims and the figures look."""
    effects = torch.tensor([[1.0], [2.0], [4.0]])
    pearson = {"pbrf": pbrf, "warm": warm, "cold": cold}
    return SimpleNamespace(
        ratio=lambda: ratio,
        correlations={name: {"pearson": value} for name, value in pearson.items()},
        output_gaps=dict.fromkeys(
            ("warm-start", "proximity", "non-convergence", "linearization", "solver"), torch.ones(3)
        ),
        influence=effects,
        measured=dict.fromkeys(pearson, 2 * effects),
    )


def decomposition_with(script, monkeypatch, digits, diabetes):
    """``{base: one result per seed}`` in place of the experiment."""
    runs = {"digits": digits, "diabetes": diabetes}
    monkeypatch.setattr(script._part("gaps"), "on_base", lambda name, seed: runs[name][seed])
    return failed(script.decomposition_claims(range(len(digits))))


def test_decomposition_criteria(script, monkeypatch):
    def run(digits, diabetes):
        return decomposition_with(script, monkeypatch, digits, diabetes)

    good, fair = found_gaps(30.0, 0.96), found_gaps(10.0, 0.81, cold=0.39)
    assert run([good] * 2, [fair] * 2) == []
    assert run([good, found_gaps(29.9, 0.96)], [fair] * 2) == ["E1a"]  # on every seed
    assert run([good] * 2, [fair, found_gaps(9.9, 0.81, cold=0.39)]) == ["E2a"]
    assert run([found_gaps(30.0, 0.95), found_gaps(30.0, 0.949)], [fair] * 2) == ["E1b"]  # the mean
    assert run([found_gaps(30.0, 0.94), found_gaps(30.0, 0.97)], [fair] * 2) == []
    assert run([found_gaps(30.0, 0.96, warm=0.861)] * 2, [fair] * 2) == ["E1c"]
    assert run([found_gaps(30.0, 0.96, cold=0.81)] * 2, [fair] * 2) == ["E1c"]
    assert run([good] * 2, [found_gaps(10.0, 0.79, cold=0.39)] * 2) == ["E2b"]
    assert run([good] * 2, [found_gaps(10.0, 0.81, cold=0.41)] * 2) == ["E2c"]


def test_factor_criteria(script, monkeypatch):
    part = script._part("factors")
    monkeypatch.setattr(script, "_part", lambda name: part if name == "factors" else SimpleNamespace(factors=print))
    falls, grows = [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]
    right = {f"{gap} {factor}": falls if direction == "falls" else grows for gap, direction, factor in script.TRENDS}

    def run(**changed):
        monkeypatch.setattr(part, "curve", lambda factor, gap, seeds: {**right, **changed}[f"{gap} {factor}"])
        return failed(script.factor_claims((0,)))

    assert run() == []
    for letter, (gap, direction, factor) in zip("abcdefg", script.TRENDS, strict=True):
        flat = [1.0, 2.0, 2.0, 4.0] if direction == "grows" else [4.0, 2.0, 2.0, 1.0]
        assert run(**{f"{gap} {factor}": flat}) == [f"E3{letter}"]


def test_a_point_of_a_sweep_is_trained_once_with_all_sizes_of_groups(script, monkeypatch):
    part, calls = script._part("factors"), []

    def decomposed(task, seed, groups, damping):
        calls.append((task, damping, [len(group) for group in groups]))
        return SimpleNamespace(output_gaps={"solver": torch.arange(float(len(groups)))})

    monkeypatch.setattr(part.gaps, "decomposed", decomposed)
    monkeypatch.setattr(part.training, "trained", lambda task, seed: made(part.training, task))
    shared = [part.at(*where, 0)["solver"] for where in (("damping", 1e-2), ("weight decay", 1e-3), ("width", 16))]
    assert shared == [4.5] * 3  # the mean over the first ten groups
    assert [part.at("samples removed", size, 0)["solver"] for size in part.SIZES] == [4.5, 14.5, 24.5, 34.5]
    assert calls == [(part.SWEEP, 1e-2, [1] * 10 + [5] * 10 + [25] * 10 + [75] * 10)]
    part.at("damping", 1.0, 0)
    part.at("epochs", 320, 0)
    assert [(task.epochs, damping, sizes) for task, damping, sizes in calls[1:]] == [
        (40, 1.0, [1] * 10),
        (320, 1e-2, [1] * 10),
    ]


def made(training, task, seed=0):
    """An untrained network with its data."""
    train, test, wrong = training.split(task, seed)
    torch.manual_seed(seed)
    network = training.perceptron((train.tensors[0].shape[1], *task.hidden, 10 if task.data == "digits" else 1))
    return training.Trained(task, seed, network.eval(), train, test, wrong)


# -- data and training ----------------------------------------------------------------------------------------------


def test_data_are_split_without_overlap_and_labels_flipped_as_said(script):
    training = script._part("training")
    task = training.Task(flipped=0.1)
    train, test, wrong = training.split(task, 3)
    everything, _ = training.read("digits")
    together = torch.cat([train.tensors[0], test.tensors[0]])
    assert (len(train), len(test), int(wrong.sum())) == (400, 200, 40)
    places = torch.cdist(together, everything).argmin(1)
    assert torch.equal(everything[places], together)
    assert len(places.unique()) == 600
    plain = training.split(dataclasses.replace(task, flipped=0.0), 3)[0]
    assert torch.equal(plain.tensors[0], train.tensors[0])
    assert torch.equal(plain.tensors[1] != train.tensors[1], wrong)
    assert not torch.equal(training.split(task, 4)[0].tensors[0], train.tensors[0])


def test_diabetes_is_standardised_by_its_training_part(script):
    training = script._part("training")
    train, test, _ = training.split(script._part("gaps").BASES["diabetes"], 0)
    for values in train.tensors:
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0), torch.ones(values.shape[1]))
    assert test.tensors[0].mean(0).abs().max() > 1e-3


def test_a_trained_network_is_kept_and_starts_from_its_seed(script):
    training = script._part("training")
    task = training.Task(num_train=60, num_test=5, hidden=(4,), epochs=3)
    state = torch.random.get_rng_state()
    base = training.trained(task, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert training.trained(task, 0) is base
    assert not base.network.training
    start = made(training, task).network[0].weight
    assert not torch.equal(base.network[0].weight, start)
    assert (base.network[0].weight - start).norm() < start.norm()  # the same draw, trained on
    assert len({i for (i,) in base.removals(20)}) == 20
    assert [len(set(group)) for group in base.removals(3, 25)] == [25] * 3


# -- E4 and E5 ------------------------------------------------------------------------------------------------------


def test_detection_criteria(script, monkeypatch):
    part = script._part("detection")

    def run(influence=0.98, pbrf=0.97, agreement=0.99, random=0.5):
        good = dict.fromkeys(part.NAMES, 0.97) | {"random": 0.5}
        fine = SimpleNamespace(auc=good.get, agreement=0.99)
        worse = good | {"self-influence": influence, "PBRF": pbrf, "random": random}
        runs = [fine, SimpleNamespace(auc=worse.get, agreement=agreement), fine]  # one seed is enough to fail
        monkeypatch.setattr(part, "found", runs.__getitem__)
        monkeypatch.setattr(script, "_part", lambda n: part if n == "detection" else SimpleNamespace(detection=print))
        return failed(script.detection_claims((0, 1, 2)))

    assert run() == []
    assert run(influence=0.949, pbrf=0.95) == ["E4a"]
    assert run(influence=0.95, pbrf=0.949) == ["E4a"]
    assert run(influence=1.0, pbrf=0.96) == ["E4b"]
    assert run(pbrf=1.0, influence=0.96) == ["E4b"]
    assert run(agreement=0.979) == ["E4c"]
    assert run(random=0.34) == ["E4d"]
    assert run(random=0.66) == ["E4d"]


def test_every_score_of_suspicion_is_what_its_name_says(script, monkeypatch):
    part = script._part("detection")
    task = dataclasses.replace(part.TASK, num_train=30, num_test=5, hidden=(3,), epochs=4)
    monkeypatch.setattr(part, "TASK", task)
    monkeypatch.setattr(part, "DAMPING", 0.3)  # one of thirty samples is much to remove
    base, found = part.training.trained(task, 0), part.found(0)
    x, t = base.train.tensors
    losses = torch.nn.functional.cross_entropy(base.network(x), t, reduction="none")
    torch.testing.assert_close(found.scores["training loss"], losses)
    gradients = torch.autograd.grad(losses[7], tuple(base.network.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(found.scores["gradient norm"][7], norm)
    assert found.agreement > 0.95
    assert (found.scores["PBRF"] > 0).all()  # a sample's own loss rises without it
    wrong, right = losses[base.is_flipped], losses[~base.is_flipped]
    assert found.auc("training loss") == pytest.approx(float((wrong[:, None] > right).float().mean()))


def test_logistic_regression_is_solved_exactly_with_and_without_a_sample(script):
    part = script._part("logistic")
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=draws, dtype=torch.float64)
    t = (torch.rand(30, generator=draws, dtype=torch.float64) < 0.5).double()
    kept = torch.ones(2, 30, dtype=torch.float64)
    kept[1, 4] = 0
    theta = part.newton(x, t, kept, 0.01)
    for weights, row in zip(theta, kept, strict=True):
        gradient = (row * (torch.sigmoid(x @ weights) - t)) @ x / 30 + 0.01 * weights
        assert gradient.abs().max() < 1e-14
    assert (theta[0] - theta[1]).abs().max() > 1e-3


def test_logistic_criteria(script, monkeypatch):
    part = script._part("logistic")

    def run(*pairs):
        monkeypatch.setattr(part, "correlations", lambda seed: pairs[seed])
        return failed(script.logistic_claims(range(len(pairs))))

    assert run((0.96, 0.985), (0.98, 0.995)) == []  # means over the seeds
    assert run((0.95, 0.99), (0.98, 0.99)) == ["E5a"]
    assert run((0.97, 0.98), (0.97, 0.99)) == ["E5b"]


def test_rescaling_brings_influence_nearer_to_leaving_one_out(script):
    plain, rescaled = script._part("logistic").correlations(0)
    assert 0.9 < plain < rescaled


# -- E7 and E8 ------------------------------------------------------------------------------------------------------


def made_removal(part, rise):
    """Rises of the test loss: ``rise(ranking, share)`` around which two retrainings lie 0.02 apart."""
    spread = torch.tensor([-0.01, 0.01])
    cells = {(ranking, share): rise(ranking, share) + spread for ranking in part.RANKINGS for share in part.SHARES}
    cells.update({("random", share): torch.full((2,), rise("random", share)) for share in part.SHARES})
    return part.Removed(cells)


def test_removal_criteria(script, monkeypatch):
    part = script._part("subsets")

    def run(**rise):
        def at(ranking, share):
            return rise.get(ranking, 0.1) if share == 0.1 else 1.0 * (ranking != "random")

        monkeypatch.setattr(part, "removed", lambda name, seed: made_removal(part, at))
        return failed(script.removal_claims((0, 1)))

    assert run(random=0.0) == []
    assert run(random=0.1) == ["E7a", "E7b", "E7c", "E7d"]
    error = (4e-4 / 3) ** 0.5 / 2  # four values 0.01 from their mean
    assert run(random=0.1 - 2.01 * error) == []
    assert run(random=0.1 - 1.99 * error) == ["E7a", "E7b", "E7c", "E7d"]


def test_what_is_removed_are_the_largest_scores(script):
    keep = script._part("subsets").without_top(torch.tensor([0.3, -5.0, 2.0, 1.0, 0.0]), 0.4)
    assert keep.tolist() == [True, True, False, False, True]


def test_training_on_a_part_starts_as_training_on_all(script):
    """Without a sample that weighs nothing nothing changes; without another one it does."""
    part = script._part("subsets")
    task = dataclasses.replace(part.gaps.BASES["digits"], num_train=20, num_test=4, hidden=(3,), epochs=2)
    base = part.training.trained(task, 0)
    keep = torch.ones(3, 20, dtype=torch.bool)
    keep[1, 5] = False
    losses = part.retrained_on(base, task.objective, keep, [7, 7, 8])
    same = part.retrained_on(base, task.objective, keep[:1], [7])
    torch.testing.assert_close(losses[:1], same)
    assert (losses[1] - losses[0]).abs().max() > 1e-5
    assert (losses[2] - losses[0]).abs().max() > (losses[1] - losses[0]).abs().max()


def test_datamodelling_criterion(script, monkeypatch):
    part = script._part("subsets")
    monkeypatch.setattr(part, "removed", lambda name, seed: None)
    real = script._part
    monkeypatch.setattr(script, "_part", lambda n: SimpleNamespace(subsets=print) if n == "figures" else real(n))

    def run(*scores):
        runs = [dict.fromkeys(part.SOLVERS, 0.2) | {"influence": ours, "gradient dot": dot} for ours, dot in scores]
        monkeypatch.setattr(part, "datamodeling", runs.__getitem__)
        return failed(script.datamodeling_claims(range(len(runs))))

    assert run((0.5, 0.3), (0.31, 0.3)) == []
    assert run((0.5, 0.3), (0.29, 0.3)) == ["E8"]
    assert run((0.5, -0.01), (0.5, 0.3)) == ["E8"]


# -- figures --------------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers(script):
    draw, found = script._part("figures"), found_gaps(30.0, 0.96)
    (axes,) = draw.gaps({"digits": [found]}).axes
    assert [patch.get_height() for patch in axes.patches] == [1.0] * 5
    panels = draw.scatter({"digits": [found]}).axes
    assert ["r = 0.50" in panels[0].get_title("left"), "r = 0.96" in panels[2].get_title("left")] == [True, True]
    points = panels[1].collections[0].get_offsets().tolist()
    assert np.allclose(points, [[-4000 / 3, -8000 / 3], [-1000 / 3, -2000 / 3], [5000 / 3, 10000 / 3]])


def test_the_detection_figure_turns_recall_into_precision(script):
    part, draw = script._part("detection"), script._part("figures")
    wrong = torch.tensor([True, False, True, False, False, False, False, False, False, False])
    scores = dict.fromkeys(part.NAMES, torch.arange(10.0, 0.0, -1.0))
    found = part.Found(scores, {name: part.detected(score, wrong) for name, score in scores.items()})
    _, right = draw.detection([found]).axes
    recall, precision = right.lines[0].get_data()
    assert precision[np.argmin(abs(recall - 0.5))] == pytest.approx(1.0, abs=0.05)
    assert precision[np.argmax(recall >= 1.0)] == pytest.approx(2 / 3, abs=0.05)


# -- --full ---------------------------------------------------------------------------------------------------------


def write_table(path, inputs, targets, rows=40):
    draws = np.random.default_rng(0)
    names = ",".join(f"X{i}" for i in range(inputs + targets))
    lines = [",".join(f"{value:.2f}" for value in draws.normal(size=inputs + targets)) for _ in range(rows)]
    path.write_text("\n".join([names, *lines, ""]), encoding="utf-8")


def write_mnist(folder):
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for part, count in (("train", 50), ("t10k", 10)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        pixels = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(draws.integers(0, 10, count, dtype=np.uint8).tolist())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)


def write_cifar(folder):
    home = folder / "cifar-10-batches-bin"
    home.mkdir()
    draws = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = draws.integers(0, 256, (8, 1 + 3072), dtype=np.uint8)
        records[:, 0] %= 10
        (home / name).write_bytes(records.tobytes())


@pytest.fixture
def data(tmp_path):
    write_table(tmp_path / "concrete.csv", 8, 1)
    write_table(tmp_path / "energy.csv", 8, 2)
    write_mnist(tmp_path / "MNIST" / "raw")
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    write_cifar(tmp_path)
    return tmp_path


def test_tables_are_read_as_uci_publishes_them(script, data):
    full = script._part("full")
    (data / "concrete.csv").write_text("\ufeffa,b,c,d,e,f,g,h,strength\n1,2,3,4,5,6,7,8,9.5\n\n", encoding="utf-8")
    x, t = full.read_uci("concrete", data)
    assert (x.tolist(), t.tolist()) == ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], [[9.5]])
    x, t = full.read_uci("energy", data)
    assert (x.shape, t.shape) == ((40, 8), (40, 1))  # the heating load, not the cooling load


def test_all_images_are_read_and_standardised_by_the_training_part(script, data):
    full = script._part("full")
    shapes = {name: tuple(recipe.read(data)[0].shape) for name, recipe in full.RECIPES.items()}
    assert shapes == {
        "Concrete": (40, 8),
        "Energy": (40, 8),
        "MNIST": (60, 784),
        "FashionMNIST": (60, 784),
        "CIFAR-10": (48, 3, 32, 32),
    }
    x, t = full.read_cifar10(data)
    parts = full.split(x, t, 0)
    assert [len(part) for part in parts] == [33, 10, 5]
    inputs = torch.stack([parts[0][i][0] for i in range(33)])
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(3))
    assert torch.equal(parts[2].mean, parts[0].mean)
    rows = {tuple(row.flatten().tolist()) for part in parts for row in part.x}
    assert len(rows) == 48


def test_a_column_that_never_changes_stays_finite(script):
    full = script._part("full")
    x = torch.cat([torch.randn(20, 1), torch.ones(20, 1)], 1)
    train, *_ = full.split(x, torch.randn(20, 1), 0)
    assert train.__getitems__(list(range(14)))[0].isfinite().all()


def test_the_networks_are_those_of_the_recipe(script):
    full = script._part("full")

    def size(network):
        return sum(parameter.numel() for parameter in network.parameters())

    assert size(full.resnet20((3, 32, 32))) == 269_722
    assert full.resnet20((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    block = full.Block(3, 5).eval()
    for parameter in block.body.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(block(x)[:, :3], x[:, :, ::2, ::2])  # what passes by, on every other pixel
    assert not block(x)[:, 3:].any()
    assert size(full.regressor((8,))) == 8 * 128 + 128 + 128 * 128 + 128 + 128 + 1
    assert size(full.classifier((784,))) == 784 * 256 + 256 + 256 * 256 + 256 + 2560 + 10
    assert isinstance(full.classifier((784,))[1], torch.nn.ReLU)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_large_experiments_run_on_a_cpu(script, data, monkeypatch):
    full = script._part("full")
    for name, value in {"REMOVALS": 4, "QUERIES": 3, "PBRF_STEPS": 2, "RATES": (1e-3,), "DECAYS": (1e-3,)}.items():
        monkeypatch.setattr(full, name, value)

    def small(shape):
        block = full.Block(4, 8)
        parts = (torch.nn.Conv2d(3, 4, 3), block, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        return torch.nn.Sequential(*parts, torch.nn.Linear(8, 10))

    for name, recipe in full.RECIPES.items():
        network = small if name == "CIFAR-10" else recipe.network
        full.RECIPES[name] = dataclasses.replace(recipe, network=network, epochs=1)
    claims = [claim for claim in script.claims(True, (0,), data, data) if claim.claim.startswith("F")]
    assert [claim.claim.split()[0] for claim in claims] == ["F1", "F2", "F3", "F4", "F5"]
    for claim in claims:
        outcome = claim.measure()
        assert outcome.ours.count(",") == 2
        assert "nan" not in outcome.ours
        assert outcome.spread == "lr 0.001, weight decay 0.001"


def test_the_setting_with_the_least_validation_loss_is_taken(script, data, monkeypatch):
    full = script._part("full")
    monkeypatch.setattr(full, "mean_loss", lambda network, *rest: abs(network.lr - 0.03) + network.decay)
    monkeypatch.setattr(full, "train", lambda recipe, data, shape, lr, decay, seed: SimpleNamespace(lr=lr, decay=decay))
    monkeypatch.setattr(full, "bregman", lambda *args: SimpleNamespace(measure=lambda queries: torch.rand(500, 10)))
    monkeypatch.setattr(full, "influence", lambda *args: torch.rand(10, 28))
    monkeypatch.setattr(full, "REMOVALS", 28)
    monkeypatch.setattr(full, "correlation", lambda predicted, actual: 0.5)
    found = full.agreement(full.RECIPES["Concrete"], *full.read_uci("concrete", data), 0)
    assert (found.lr, found.weight_decay) == (0.03, 1e-5)


def test_a_network_that_broke_down_is_not_chosen(script):
    full = script._part("full")
    network = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(network.weight, math.nan)
    assert full.mean_loss(network, full.Standardised(torch.randn(5, 2), torch.randn(5, 1)), "mse") == math.inf


def test_large_criterion(script):
    full = script._part("full")
    assert full.holds({"EK-FAC": 0.5, "LiSSA": 0.4, "gradient dot": 0.3})
    assert not full.holds({"EK-FAC": 0.5, "LiSSA": 0.3, "gradient dot": 0.3})
    assert not full.holds({"EK-FAC": 0.2, "LiSSA": 0.4, "gradient dot": 0.3})


def test_full_without_a_folder_is_one_sentence_before_anything_runs(script, tmp_path):
    with pytest.raises(UserError, match=r"--full needs --data DIR, a folder with concrete.csv"):
        engine.reproduce("influence", full=True, output=tmp_path / "out", examples=EXAMPLES)
    assert not (tmp_path / "out" / "influence.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "energy.csv").unlink(),
            r"energy.csv not found: save https://archive.ics.uci.edu/.*/242/data.csv",
        ),
        (lambda f: (f / "concrete.csv").write_text("a,b\n1,2\n"), r"concrete.csv must have 9 columns"),
        (lambda f: (f / "concrete.csv").write_text("a\nPK\x03\n"), r"concrete.csv is not a table of numbers"),
        (lambda f: (f / "FashionMNIST/raw/train-images-idx3-ubyte").unlink(), r"train-images-idx3-ubyte .* not found"),
        (lambda f: (f / "cifar-10-batches-bin/test_batch.bin").write_bytes(b"12"), r"test_batch.bin is damaged"),
    ],
)
def test_data_that_are_missing_or_damaged_are_one_sentence_before_anything_runs(script, data, spoil, message):
    spoil(data)
    with pytest.raises(UserError, match=f"--full: .*{message}"):
        engine.reproduce("influence", full=True, output=data / "out", data_dir=data, examples=EXAMPLES)
    assert not (data / "out" / "influence.json").exists()
