"""The reproduction runs from end to end, and every criterion can fail."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_ext.reproduce as engine
from lightning_ext._resources import UserError, load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {"linear_steps": 5, "fresh_steps": 4, "digits_epochs": 1, "mnist_epochs": 1, "dsprites_epochs": 1}


@pytest.fixture
def script(monkeypatch):
    """The reproduction, and the engine with it, at a budget of seconds."""
    module = load_script(EXAMPLES / "mrvae_reproduce.py", "claims")
    module.BUDGET = dataclasses.replace(module.BUDGET, **TINY)
    monkeypatch.setattr(engine, "load_script", lambda path, *required: module)
    return module


def test_it_runs_and_writes_every_row(script, capfd):
    rows = engine.reproduce("mrvae", seeds=(0, 1), output="out", examples=EXAMPLES)
    assert json.loads(Path("out/mrvae.json").read_text())["rows"] == rows
    assert not [row["error"] for row in rows if "error" in row]
    numbers = "A1 A2 A3 A4 A5 B1 B2 B3 B4 B5 C1 C2 C3 D1 D2"
    assert " ".join(row["claim"].split()[0] for row in rows) == numbers
    assert all(row["ours"] is not None and row["passed"] is not None for row in rows)
    assert all(row["paper"] and row["criterion"] for row in rows)
    passed = {row["claim"].split()[0]: row["passed"] for row in rows}
    assert passed["A5"]  # needs no training
    assert passed["D2"]
    assert not passed["A2"]  # five steps are not enough
    assert sorted(path.name for path in Path("out").glob("*.png")) == [
        "mrvae_digits.png",
        "mrvae_fresh.png",
        "mrvae_linear.png",
    ]
    told = capfd.readouterr().err
    assert "B, fresh data: seed 1, separate β-VAEs at 5" in told  # progress without a terminal
    assert "GPU available" not in told
    assert "Warning" not in told


def test_the_budget_of_a_real_run_is_the_specified_one():
    budget = load_script(EXAMPLES / "mrvae_reproduce.py").Budget()
    assert dataclasses.astuple(budget) == (6000, 2500, 400, 8, 50)


@pytest.mark.parametrize(
    ("family", "good", "bad"),
    [
        ("ungated", [1.76, 1.8], [1.4, 1.8]),
        ("paper", [0.07, 0.3], [0.11, 0.3]),
        ("joint", [0.009, 0.07], [0.021, 0.07]),
        ("fixed", [0.001, 0.1], [0.0021, 0.1]),
    ],
)
def test_linear_criteria(script, family, good, bad):
    assert script.linear_holds(family, good)
    assert not script.linear_holds(family, bad)


def test_the_closed_forms_of_experiment_a():
    linear = load_script(EXAMPLES / "_mrvae_linear.py")
    betas, weights = linear.quadrature()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights @ linear.optimal_losses(betas, "paper")) == pytest.approx(2.77199, abs=1e-5)
    assert linear.formula_excess() < 1e-12
    one, two = linear.train("paper", [7], 3)[1], linear.train("paper", [3, 7], 3)[1]
    assert one[0] == pytest.approx(two[1], abs=1e-12)  # seeds that are trained side by side share nothing


class Made:
    """Made-up runs: losses at each beta are what one says."""

    def __init__(self, script, betas, gaps, slow=None, seconds=1.0):
        part, training = script._part("curves"), script._part("training")

        def run(gap, seconds=1.0, grid=()):
            points = {beta: training.Point(30.0 - 5.0 * beta**0.3, 20.0 + beta**0.5) for beta in grid}
            points |= {beta: training.Point(1.0, 10.0 + gap(beta)) for beta in betas}
            return training.Run(points, seconds, 1)

        seeds = (0, 1)
        self.result = part.Curves(
            betas,
            seeds,
            {kind: {s: run(gap, seconds, part.GRID) for s in seeds} for kind, gap in gaps.items()},
            {
                kind: {s: {b: run(lambda beta, gap=gap: gap) for b in betas} for s in seeds}
                for kind, gap in (("beta", 0.0), ("slow", slow))
                if gap is not None
            },
        )

    def outcomes(self, claims):
        """Whether each claim passes, by its number."""
        return {claim.claim.split()[0]: claim.measure().passed for claim in claims}


def fresh(script, monkeypatch, mr, none=lambda beta: 3.0, batch=lambda beta: 2.0):
    part = script._part("curves")
    made = Made(script, part.FRESH_BETAS, {"mr": mr, "batch": batch, "none": none})
    monkeypatch.setattr(part, "fresh", lambda seeds, steps: made.result)
    return made.outcomes(script.fresh_claims((0, 1)))


def test_fresh_data_criteria(script, monkeypatch):
    better = lambda beta: -0.1  # noqa: E731
    assert fresh(script, monkeypatch, better) == dict.fromkeys(["B1", "B2", "B4", "B5"], True) | {"B3": False}
    assert not fresh(script, monkeypatch, lambda beta: 1.36)["B1"]  # 0.453 of 3
    assert fresh(script, monkeypatch, lambda beta: 1.34)["B1"]
    assert not fresh(script, monkeypatch, lambda beta: 0.61 if beta == 5.0 else 0.0)["B2"]
    assert not fresh(script, monkeypatch, lambda beta: -0.61 if beta == 5.0 else 0.0)["B2"]
    assert fresh(script, monkeypatch, lambda beta: 0.59 if beta == 0.5 else 9.0 * (beta < 0.5))["B2"]
    assert not fresh(script, monkeypatch, better, batch=lambda beta: -0.2)["B4"]
    assert not fresh(script, monkeypatch, lambda beta: 0.01 if beta == 0.1 else -1.0)["B5"]


def test_monotone_means_strictly_and_both(script):
    point = script._part("training").Point
    assert script.is_monotone([point(3, 1), point(2, 2), point(1, 3)])
    assert not script.is_monotone([point(3, 1), point(3, 2)])
    assert not script.is_monotone([point(3, 1), point(2, 1)])
    assert not script.is_monotone([point(2, 1), point(3, 2)])
    assert script.wrong_way([point(3, 1), point(2, 2), point(4, 1.5), point(1, 3)]) == (2, 0.5)


def digits(script, monkeypatch, mr, slow=0.0, seconds=1.2):
    part = script._part("curves")
    made = Made(script, part.DIGITS_BETAS, {"mr": mr}, slow, seconds)
    monkeypatch.setattr(part, "digits", lambda seeds, epochs: made.result)
    return made.outcomes(script.digits_claims((0, 1)))


def test_digits_criteria(script, monkeypatch):
    found = digits(script, monkeypatch, lambda beta: -1.0 if beta <= 0.1 else 1.4)
    assert found == dict.fromkeys(["C1", "C2", "C3", "D1", "D2"], True)
    found = digits(script, monkeypatch, lambda beta: 0.1 if beta == 0.1 else 1.6 * (beta == 10.0) - 0.5)
    assert found == {"C1": False, "C2": True, "C3": False, "D1": True, "D2": True}
    found = digits(script, monkeypatch, lambda beta: -1.0 if beta <= 0.1 else 1.6, slow=-2.0, seconds=1.3)
    assert found == {"C1": True, "C2": False, "C3": False, "D1": False, "D2": True}


def test_parameter_growth(script):
    assert script.growth_holds(1_881_217, 1_884_289)
    assert not script.growth_holds(1_881_217, 1_884_290)
    assert script.parameter_growth().ours == "1,881,217 to 1,884,289"


# -- --full ---------------------------------------------------------------------------------------------------------


def write_data(folder):
    """Tiny files in the true formats."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 6)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    sizes = (1, 3, 6, 40, 32, 32)
    np.savez(
        folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        imgs=draw.integers(0, 2, (32, 64, 64), dtype=np.uint8),
        latents_classes=np.stack([draw.integers(0, size, 32) for size in sizes], axis=1),
    )


def test_the_large_experiments_run_on_a_cpu(script, tmp_path):
    write_data(tmp_path)
    claims = [c for c in script.claims(True, (0,), tmp_path, tmp_path) if c.claim.startswith("E")]
    assert [claim.claim.split()[0] for claim in claims] == ["E1", "E2", "E3", "E4", "E5"]
    outcomes = [claim.measure() for claim in claims]
    assert [outcome.passed for outcome in outcomes[:3]] == [False, False, False]
    assert all(0.0 <= outcome.ours <= 1.0 for outcome in outcomes[2:4])
    assert [list(outcome.figures) for outcome in outcomes] == [["mnist"], [], ["dsprites"], [], []]


def test_large_criteria(script, monkeypatch):
    full = script._part("full")
    training = full.training

    def outcomes(factor, shift):
        """E1 and E2 for a curve that is the README's times a factor, and baselines that lie a shift below theirs."""
        monkeypatch.setattr(full, "mnist_model", lambda seed, beta: beta)

        def train_and_test(beta, *args, **kwargs):
            if beta is None:
                points = {b: training.Point(factor * r, factor * d) for b, (r, d) in full.README.items()}
            else:
                rate, distortion = full.README_BASELINES[beta]
                points = {beta: training.Point(rate, distortion + shift)}
            return training.Run(points, 1.0, 1)

        monkeypatch.setattr(training, "train_and_test", train_and_test)
        data = type("Data", (), {"setup": lambda self: None, "train_dataloader": lambda self: [0]})()
        return [claim.measure().passed for claim in full.mnist_claims((0,), data, 1)]

    assert outcomes(1.0, 0.0) == [True, True]
    assert outcomes(1.051, 0.0)[0] is False
    assert outcomes(0.949, 0.0)[0] is False
    assert outcomes(1.0, 3.1)[1] is False
    gaps = [full.readme_loss(full.README, b) - full.readme_loss(full.README_BASELINES, b) for b in full.MNIST_BASELINES]
    assert gaps == pytest.approx([5.1, 3.1, 1.2, 5.2], abs=0.06)


def dsprites(script, monkeypatch, multi, single):
    full = script._part("full")
    monkeypatch.setattr(
        full, "dsprites_model", lambda seed, beta, size: torch.nn.Identity() if beta else torch.nn.ReLU()
    )
    monkeypatch.setattr(full.training, "fit", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        full, "mig", lambda model, data, beta: (multi if type(model) is torch.nn.ReLU else single)(beta)
    )
    data = type("Data", (), {"setup": lambda s: None, "train_dataloader": lambda s: [0], "train_set": [0]})()
    return [claim.measure().passed for claim in full.dsprites_claims((0, 1), data, 1)]


def test_disentanglement_criteria(script, monkeypatch):
    assert dsprites(script, monkeypatch, lambda b: 0.41, lambda b: 0.33) == [True, True, True]
    assert dsprites(script, monkeypatch, lambda b: 0.41 if b > 0.2 else 0.3, lambda b: 0.33) == [True, True, False]
    assert dsprites(script, monkeypatch, lambda b: 0.39 if b > 9 else 0.5, lambda b: 0.35) == [False, False, True]


def test_a_folder_without_the_data_is_one_sentence_before_anything_runs(script, tmp_path):
    with pytest.raises(UserError, match=r"--full: MNIST: train-images.* not found in .*Without --data the files are"):
        engine.reproduce("mrvae", full=True, output=tmp_path / "out", data_dir=tmp_path, examples=EXAMPLES)
    assert not (tmp_path / "out" / "mrvae.json").exists()


def test_offline_is_one_sentence_before_anything_runs(script, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_ext.data.mnist._MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(UserError, match=r"--full: train-images.* could not be downloaded .* Without a connection, put"):
        engine.reproduce("mrvae", full=True, output=tmp_path / "out", examples=EXAMPLES)


@pytest.mark.parametrize(("column", "expected"), [(0, 0.0), (1, 0.25)])
def test_the_gap_is_measured_on_four_factors_without_shape(script, column, expected):
    """A latent that holds the scale alone opens one gap of four; one that holds the shape opens none."""
    full = script._part("full")
    draw = torch.Generator().manual_seed(0)
    factors = torch.stack([torch.randint(size, (20_000,), generator=draw) for size in (3, 6, 40, 32, 32)], dim=1)

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def encode(self, x):
            mu = torch.zeros(len(x), full.DSPRITES_LATENTS)
            mu[:, 0] = x[:, column] - 2.0
            return mu, torch.full_like(mu, -20.0)

    data = type("Data", (), {"factor_sizes": (3, 6, 40, 32, 32), "test_dataloader": lambda s: [(factors, factors)]})()
    assert full.mig(Model(), data, 1.0) == pytest.approx(expected, abs=0.01)
