"""The reproduction of APO runs from end to end, and every criterion can fail."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_ext.reproduce as engine
from lightning_ext._resources import UserError, load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "digits_epochs": 1,
    "regression_steps": 20,
    "autoencoder_steps": 20,
    "half_steps": 3,
    "lightning_epochs": 1,
    "cifar_epochs": 1,
    "mnist_epochs": 1,
}
NUMBERS = "A1 A2 A3 A4 A5 A6 A7 A8 A9 B1 B2 B3 B4 B5 C1 C2 C3 C4 C5 C6 D1 D2 D3 D4 E1 E2 E3"


@pytest.fixture
def script(monkeypatch):
    """The reproduction, and the engine with it, at a budget of seconds."""
    module = load_script(EXAMPLES / "apo_reproduce.py", "claims")
    module.BUDGET = dataclasses.replace(module.BUDGET, **TINY)
    monkeypatch.setattr(engine, "load_script", lambda path, *required: module)
    return module


def outcomes(claims):
    """Whether each claim passes, by its number."""
    return {claim.claim.split()[0]: claim.measure().passed for claim in claims}


def test_it_runs_and_writes_every_row(script, capfd):
    rates = script._part("rates")
    for base, starts in rates.INITIAL_RATES.items():
        rates.INITIAL_RATES[base] = starts[-3:]
    rows = engine.reproduce("apo", seeds=(0,), output="out", examples=EXAMPLES)
    assert json.loads(Path("out/apo.json").read_text())["rows"] == rows
    assert not [row["error"] for row in rows if "error" in row]
    assert " ".join(row["claim"].split()[0] for row in rows) == NUMBERS
    assert all(row["ours"] is not None and row["passed"] is not None for row in rows)
    assert all(row["paper"] and row["criterion"] for row in rows)
    passed = {row["claim"].split()[0]: row["passed"] for row in rows}
    assert passed["D4"]  # needs no training
    assert not passed["B1"]  # ten steps are not enough
    assert sorted(path.name for path in Path("out").glob("*.png")) == [
        "apo_autoencoder.png",
        "apo_lightning.png",
        "apo_rates.png",
        "apo_regression.png",
        "apo_sensitivity.png",
    ]
    told = capfd.readouterr().err
    assert "A, SGD, momentum 0.9: apo, " in told  # progress without a terminal
    assert "GPU available" not in told
    assert "arning" not in told


def test_the_budget_of_a_real_run_is_the_specified_one():
    budget = load_script(EXAMPLES / "apo_reproduce.py").Budget()
    assert dataclasses.astuple(budget) == (30, 2000, 1500, 600, 15, 200, 100)


def test_every_base_has_ten_starts():
    rates = load_script(EXAMPLES / "_apo_rates.py")
    assert [len(rates.INITIAL_RATES[base]) for base in ("SGD", "SGDm", "Adam")] == [10, 10, 10]


# -- A and E --------------------------------------------------------------------------------------------------------


def made_sweep(script, base, apo, fixed=None, cosine=0.1, auto=None):
    """A sweep whose losses are what one says: functions of the initial rate; the best fixed rate is 0.1, with 0.1."""
    rates = script._part("rates")
    fixed = fixed or (lambda rate: 0.1 if rate == 0.1 else 2.1)
    functions = {"fixed": fixed, "apo": apo, "auto": auto or apo, "cosine": lambda rate: cosine}
    starts = (1e-5, 1e-4, 1e-2, 0.1, 1.0, 3.0)
    return rates.Sweep(
        base,
        {
            kind: {rate: [rates.RateRun(function(rate), (rate, rate))] * 3 for rate in starts}
            for kind, function in functions.items()
        },
    )


def rates_with(script, monkeypatch, **more):
    monkeypatch.setattr(script._part("rates"), "sweep", lambda base, *args, **kwargs: made_sweep(script, base, **more))
    return outcomes(script.rate_claims((0, 1, 2)))


def test_rate_criteria(script, monkeypatch):
    every = [f"A{i}" for i in range(1, 10)]
    assert rates_with(script, monkeypatch, apo=lambda rate: 0.1) == dict.fromkeys(every, True)
    # far from the best fixed rate nothing is asked
    found = rates_with(script, monkeypatch, apo=lambda rate: 0.1 if 1e-4 <= rate <= 1.0 else math.inf)
    assert found == dict.fromkeys(every, True)
    # SGD has to reach the best rate itself, the others half as much again
    found = rates_with(script, monkeypatch, apo=lambda rate: 0.159 if rate == 1e-4 else 0.15)
    assert [name for name, held in found.items() if not held] == ["A1", "A7"]
    found = rates_with(script, monkeypatch, apo=lambda rate: 0.161 if rate == 1e-4 else 0.16)
    assert [name for name, held in found.items() if not held] == ["A1", "A2", "A3", "A7", "A9"]
    found = rates_with(script, monkeypatch, apo=lambda rate: 0.079 if rate == 1.0 else 0.1)
    assert [name for name, held in found.items() if not held] == ["A4", "A5", "A6", "A8"]
    found = rates_with(script, monkeypatch, apo=lambda rate: 0.081 if rate == 1.0 else 0.1)
    assert found == dict.fromkeys(every, True)
    found = rates_with(script, monkeypatch, apo=lambda rate: 0.1, auto=lambda rate: math.inf)
    assert [name for name, held in found.items() if not held] == ["A7", "A8"]
    assert not rates_with(script, monkeypatch, apo=lambda rate: 0.1, cosine=0.059)["A9"]


def test_a_fixed_rate_that_breaks_down_counts_as_guessing(script):
    sweep = made_sweep(script, "SGD", lambda rate: math.inf, lambda rate: 0.1 if rate == 0.1 else math.inf)
    assert sweep.loss("fixed", 1.0) == pytest.approx(math.log(10))
    assert sweep.loss("apo", 1.0) == math.inf


def lightning_with(script, monkeypatch, apo, fixed):
    monkeypatch.setattr(
        script._part("rates"), "sweep", lambda base, *args, **kwargs: made_sweep_adamw(script, apo, fixed)
    )
    return outcomes(script.lightning_claims((0,)))


def made_sweep_adamw(script, apo, fixed):
    rates = script._part("rates")
    runs = {
        kind: {rate: [rates.RateRun(function(rate), (rate,))] for rate in rates.INITIAL_RATES["AdamW"]}
        for kind, function in (("fixed", fixed), ("apo", apo))
    }
    return rates.Sweep("AdamW", runs)


def test_lightning_criteria(script, monkeypatch):
    def fixed(rate):
        return 0.1 if rate == 1e-2 else 0.5

    assert lightning_with(script, monkeypatch, lambda rate: 0.1, fixed) == {"E1": True, "E2": True, "E3": True}
    found = lightning_with(script, monkeypatch, lambda rate: 0.5 if rate == 1e-3 else 0.1, fixed)
    assert found == {"E1": False, "E2": True, "E3": False}
    found = lightning_with(script, monkeypatch, lambda rate: 0.77 if rate == 0.1 else 0.1, fixed)
    assert found == {"E1": True, "E2": False, "E3": False}


def test_training_that_breaks_down_is_a_loss_without_end_and_a_mistake_is_not_hidden(script, monkeypatch):
    rates = script._part("rates")
    progress = rates.training.Progress("test")

    def fails(message):
        def fit(*args):
            raise RuntimeError(message)

        monkeypatch.setattr(rates.training, "fit", fit)
        return rates.train("SGD", "apo", 0.1, 0, 1, False, progress).loss

    assert fails("the weights were not finite any more: training broke down between two meta-steps") == math.inf
    with pytest.raises(RuntimeError, match="shapes"):
        fails("shapes cannot be multiplied")


# -- B, C and D -----------------------------------------------------------------------------------------------------


def comparison(script, **losses):
    """A comparison whose methods end at these losses; all of them are at 1 until the last step but one."""
    part = script._part("precondition")

    def curve(loss):
        return part.Curve((0, 10, 20), (1.0, loss, loss), (0.0, 1.0, 2.0))

    return part.Comparison(
        {name.replace("__", "-P ").replace("_", "-"): {"one": [curve(v)]} for name, v in losses.items()}
    )


REGRESSION = {
    "SGD": 1e-3,
    "Adam": 2e-6,
    "Gauss_Newton": 5e-9,
    "APO__kron": 1e-9,
    "APO__ekfac": 1e-9,
    "APO__additive": 1e-6,
}


def test_regression_criteria(script, monkeypatch):
    part = script._part("precondition")

    def found(**changes):
        made = comparison(script, **{**REGRESSION, **changes})
        monkeypatch.setattr(part, "ill_conditioned", lambda kappa, seeds, steps: made)
        held = outcomes(script.regression_claims((0,)))
        return [name for name, passed in held.items() if not passed]

    assert found() == []
    assert found(APO__kron=1.1e-8) == ["B1", "B2", "B5"]
    assert found(APO__kron=6e-9) == ["B5"]
    assert found(Adam=9e-7) == ["B1", "B2", "B4"]
    assert found(APO__ekfac=1.1e-8) == ["B3"]
    assert found(APO__additive=2.1e-6) == ["B4"]
    assert found(APO__kron=math.nan) == ["B1", "B2", "B5"]


def test_autoencoder_criteria(script, monkeypatch):
    part = script._part("precondition")

    def found(k1, k10, soap=None, small=0.0, whole=0.0):
        runs = comparison(script, SGDm=0.40, Adam=0.30, **({"SOAP": soap} if soap else {})).runs

        def made(one, ten):
            ours = comparison(script, one=one, ten=ten).runs
            return part.Comparison({**runs, "APO-P, K = 1": ours["one"], "APO-P, K = 10": ours["ten"]})

        others = {100: made(small, k10), None: made(whole, k10)}
        monkeypatch.setattr(part, "autoencoders", lambda seeds, steps: made(k1, k10))
        monkeypatch.setattr(part, "other_batches", lambda size, seeds, steps: others[size])
        claims = list(script.autoencoder_claims((0,)))
        assert all(("not run" in claim.measure().ours) == (soap is None) for claim in claims[-3:])
        return [name for name, passed in outcomes(claims).items() if not passed]

    assert found(0.27, 0.32, soap=0.28) == []
    assert found(0.27, 0.32) == ["C4", "C5", "C6"]
    assert found(0.27, 0.34, soap=0.28) == ["C1"]
    assert found(0.27, 0.45, soap=0.28) == ["C1", "C3"]
    assert found(0.29, 0.32, soap=0.28) == ["C4"]
    assert found(0.34, 0.32, soap=0.28) == ["C2", "C4"]
    assert found(0.27, 0.32, soap=0.28, small=0.29) == ["C5"]
    assert found(0.27, 0.32, soap=0.28, whole=0.29) == ["C6"]


def test_half_precision_criteria(script, monkeypatch):
    part = script._part("precondition")

    def found(half, full, accuracy=(0.95, 0.96)):
        def run(structure, weights, preconditioner, seeds, steps):
            narrow = preconditioner == "bfloat16"
            losses = half if narrow else full
            return part.Precision(losses if isinstance(losses, tuple) else (losses,), (accuracy[not narrow],))

        monkeypatch.setattr(part, "precision_run", run)
        return [name for name, passed in outcomes(script.half_claims((0,))).items() if not passed]

    assert found(0.129, 0.1) == []
    assert found(0.131, 0.1) == ["D1", "D2"]
    assert found(math.inf, math.inf) == ["D1", "D2"]
    assert found((0.1, 0.1, math.inf), 0.1) == ["D1", "D2"]
    assert found(0.1, 0.1, accuracy=(0.949, 0.96)) == ["D3"]
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: matrix)
    assert found(0.1, 0.1) == ["D4"]


def test_the_oracle_makes_the_gauss_newton_step(script):
    """On the layer next to the outputs the problem is linear, so one step without damping solves it exactly."""
    part = script._part("precondition")
    problem = part.regression(0, 10.0)
    problem.model[0].weight.requires_grad_(False)
    oracle = part.GaussNewton(problem, damping=0.0)
    oracle.params = {"1.weight": problem.model[1].weight}
    x, _ = next(problem.batches)
    problem.loss(x).backward()
    oracle.step()
    problem.model.zero_grad()
    problem.loss(x).backward()
    assert float(problem.model[1].weight.grad.abs().max()) < 1e-9


def test_a_run_that_breaks_down_ends_and_counts_as_infinite(script):
    part = script._part("precondition")
    made = part.rates(torch.optim.SGD, 1e6)["lr 1e+06"]
    curve = part.minimise(part.autoencoder(0), made, 40, 10, lambda: None)
    assert curve.at(40) == math.inf
    assert curve.steps[-1] < 40
    assert curve.at(0) < 10


def test_a_run_that_breaks_down_is_drawn_as_far_as_it_went(script):
    part, figures = script._part("precondition"), script._part("figures")
    whole = part.Curve((0, 10, 20), (1.0, 0.5, 0.3), (0.0, 1.0, 2.0))
    broken = part.Curve((0, 10), (1.0, math.inf), (0.0, 1.0))
    most = part.Comparison({"Adam": {"one": [broken, broken, whole]}})
    (axes, _) = figures.autoencoder(most).axes
    line, cross = axes.lines
    assert line.get_ydata().tolist() == [1.0, math.inf, math.inf]
    assert (cross.get_xdata()[0], cross.get_ydata()[0], cross.get_marker()) == (0, 1.0, "x")
    one = part.Comparison({"Adam": {"one": [broken, whole, whole]}})
    for axes in figures.autoencoder(one).axes:
        (line,) = axes.lines
        assert line.get_ydata().tolist() == [1.0, 0.5, 0.3]
    assert line.get_xdata().tolist() == [0.0, 1.0, 2.0]


def test_the_condition_number_is_the_one_asked_for(script):
    problem = script._part("precondition").regression(0, 1e3)
    x, other = next(problem.batches)
    assert other.shape == (200, 6)
    outputs = problem.model(x).detach().requires_grad_()
    problem.model.forward = lambda inputs: outputs
    (slope,) = torch.autograd.grad(problem.loss(x), outputs)
    target = outputs.detach() - 1000 * slope  # the loss is half the squared distance to it, averaged over 1000
    values = torch.linalg.svdvals(torch.linalg.lstsq(x, target).solution)
    assert values.tolist() == pytest.approx(torch.logspace(1, -2, 6).tolist())


def test_soap_is_compared_where_its_package_is_installed(script, monkeypatch):
    part = script._part("precondition")
    assert part.SOAP_PACKAGE == "pytorch_optimizer"
    monkeypatch.setattr(part, "SOAP_PACKAGE", "no_such_package")
    assert part.soap(0.01) == {}
    monkeypatch.setattr(part, "SOAP_PACKAGE", "torch.optim")
    monkeypatch.setattr(torch.optim, "SOAP", torch.optim.Adam, raising=False)
    ((name, settings),) = part.soap(0.01).items()
    assert name == "SOAP"
    assert isinstance(settings["lr 0.01"](part.autoencoder(0)), torch.optim.Adam)


# -- --full ---------------------------------------------------------------------------------------------------------


def write_cifar(folder, layout, count):
    """Tiny files in the true format: pixel (channel, row, column) of image i is i + channel + row + 2 column."""
    home = folder / layout.folder
    home.mkdir()
    grid = np.indices((3, 32, 32)).sum(0) + np.arange(32)
    for name in (*layout.train, layout.test):
        records = [
            bytes([7] * (layout.label_bytes - 1) + [i % layout.classes]) + (grid + i).astype(np.uint8).tobytes()
            for i in range(count)
        ]
        (home / name).write_bytes(b"".join(records))


def write_mnist(folder):
    for part, count in (("train", 50), ("t10k", 6)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count))


@pytest.fixture
def data(script, tmp_path):
    full = script._part("full")
    write_cifar(tmp_path, full.CIFAR10, 12)
    write_cifar(tmp_path, full.CIFAR100, 60)
    write_mnist(tmp_path)
    return tmp_path


def test_cifar_is_read_in_its_published_format(script, data):
    full = script._part("full")
    ten, hundred = full.read_cifar(data, full.CIFAR10), full.read_cifar(data, full.CIFAR100)
    assert ten.train[0].shape == (60, 3, 32, 32)
    assert ten.test[0].shape == (12, 3, 32, 32)
    assert int(ten.test[0][11, 2, 30, 1]) == 11 + 2 + 30 + 2 * 1
    assert ten.test[1].tolist() == [*range(10), 0, 1]
    assert hundred.train[1].tolist() == list(range(60))  # the fine labels, not the coarse ones


def test_augmented_images_are_shifted_and_mirrored_and_test_images_are_not(script, data):
    full = script._part("full")
    images = full.read_cifar(data, full.CIFAR10)
    plain = full.Augmented(*images.train, images.train[0], augment=False).__getitems__([3])[0]
    pixels = images.train[0].float() / 255
    mean, std = (found.view(3, 1, 1) for found in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    torch.testing.assert_close(plain[0] * std + mean, pixels[3])
    moving = full.Augmented(*images.train, images.train[0], augment=True)
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    allowed = [padded[:, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    allowed += [window.flip(3) for window in allowed]
    torch.manual_seed(0)
    found = {
        next(i for i, window in enumerate(allowed) if torch.equal(window, x[None]))
        for x in moving.__getitems__([3] * 300)[0]
    }
    assert min(found) < 81 <= max(found)
    assert len(found) > 100


def test_the_resnet_is_the_usual_one(script):
    full = script._part("full")
    assert sum(p.numel() for p in full.resnet18(10).parameters()) == 11_173_962
    assert full.resnet18(100, width=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_the_large_experiments_run_on_a_cpu(script, data, monkeypatch):
    full = script._part("full")
    monkeypatch.setattr(full, "NETWORK", lambda classes: full.resnet18(classes, width=2))
    monkeypatch.setattr(full, "FIXED_RATES", (0.1,))
    claims = [c for c in script.claims(True, (0,), data, data) if c.claim.startswith("F")]
    assert [claim.claim.split()[0] for claim in claims] == ["F1", "F2", "F3", "F4", "F5", "F6"]
    found = [claim.measure() for claim in claims]
    assert [list(outcome.figures) for outcome in found] == [[], [], [], [], ["mnist"], []]
    assert all(outcome.ours.count("/") == 1 for outcome in found)


def test_large_criteria(script, monkeypatch):
    full = script._part("full")
    means = {"fixed": {0.1: 90.0, 1.0: 80.0}, "decay": {0.1: 93.0}, "apo": {0.1: 92.0, 1e-3: 92.5}}
    assert full.holds(means, "fixed")
    assert full.holds(means, "decay")
    means["apo"][1e-3] = 90.0
    assert not full.holds(means, "fixed")
    means["apo"][1e-3] = 91.9
    assert not full.holds(means, "decay")

    def mnist(ours, at_equal_time):
        part = script._part("full").precondition
        curves = {
            "Adam": part.Curve((0, 1), (9.0, 1.0), (0.0, 1.0)),
            "APO-P, K = 10": part.Curve((0, 1, 1), (9.0, at_equal_time, ours), (0.0, 1.0, 2.0)),
        }
        made = part.Comparison({name: {"one": [curve]} for name, curve in curves.items()})
        monkeypatch.setattr(part, "compare", lambda *args: made)
        return [passed for _, passed in sorted(outcomes(full.mnist_claims(torch.zeros(1000, 784), (0,), 1)).items())]

    assert mnist(1.09, 0.9) == [True, True]
    assert mnist(1.11, 0.9) == [False, True]
    assert mnist(0.5, 1.01) == [True, False]


def test_full_without_a_folder_is_one_sentence_before_anything_runs(script, tmp_path):
    with pytest.raises(UserError, match=r"--full needs --data DIR, a folder with cifar-10-batches-bin"):
        engine.reproduce("apo", full=True, output=tmp_path / "out", examples=EXAMPLES)
    assert not (tmp_path / "out" / "apo.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "cifar-10-batches-bin" / "data_batch_4.bin").unlink(),
            r"data_batch_4.bin not found in .*binary",
        ),
        (lambda f: (f / "cifar-100-binary" / "test.bin").write_bytes(b"12"), r"test.bin is damaged: 2 bytes are not"),
        (
            lambda f: (f / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072)),
            r"holds the label 10: it is not CIFAR-10",
        ),
        (lambda f: (f / "train-images-idx3-ubyte").unlink(), r"MNIST: train-images-idx3-ubyte .* not found"),
    ],
)
def test_data_that_are_missing_or_damaged_are_one_sentence_before_anything_runs(script, data, spoil, message):
    spoil(data)
    with pytest.raises(UserError, match=f"--full: .*{message}"):
        engine.reproduce("apo", full=True, output=data / "out", data_dir=data, examples=EXAMPLES)
    assert not (data / "out" / "apo.json").exists()
