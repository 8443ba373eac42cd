"""The mutual-information reproduction runs, every criterion can fail, and its parts compute what they say."""

import dataclasses
import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_ext.reproduce as engine
from lightning_ext._resources import UserError, load_script
from lightning_ext.functional import linear_gaussian_annealing_bounds, sigmoid_schedule
from lightning_ext.nn import QuadraticCritic

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBERS = "M1a M1b M1c M1d M2 M3a M3b M4a M4b M4c M4d M5a M5b M6 M7a M7b M7c M8a M8b"


@pytest.fixture
def script(monkeypatch):
    """The reproduction, and the engine with it."""
    module = load_script(EXAMPLES / "mutual_information_reproduce.py", "claims")
    monkeypatch.setattr(engine, "load_script", lambda path, *required: module)
    return module


def shrink(script):
    """A budget of seconds."""
    sandwich, critics = script._part("sandwich"), script._part("critics")
    for part in (sandwich, critics):
        part.training.EPOCHS = part.training.BETA_EPOCHS = 1
    sandwich.PAIRS, sandwich.CHAINS, sandwich.LEAPFROG, sandwich.RATE_PAIRS = 4, 2, 2, 4
    sandwich.STEPS, sandwich.SAMPLES, sandwich.BETAS = (2, 3, 4), (1, 2, 3), (0.01, 1.0)
    sandwich.LINEAR_STEPS, sandwich.LINEAR_PAIRS = (2, 3, 4), 4
    sandwich.HIGH_STEPS, sandwich.HIGH_PAIRS, sandwich.HIGH_CHAINS = (2, 3), 4, 2
    critics.TRAINED, critics.HELD_OUT, critics.CHAINS, critics.STEPS = 2, 8, 2, 3
    critics.GIWAE_SAMPLES, critics.GIWAE_STEPS = 3, 2
    critics.NATS, critics.SCAN_STEPS, critics.SCAN_PAIRS, critics.SCAN_SAMPLES = (1, 20), 2, 4, 5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_runs_and_writes_every_row(script, capfd):
    shrink(script)
    rows = engine.reproduce("mutual_information", seeds=(0,), output="out", examples=EXAMPLES)
    assert json.loads(Path("out/mutual_information.json").read_text())["rows"] == rows
    assert not [row["error"] for row in rows if "error" in row]
    assert " ".join(row["claim"].split()[0] for row in rows) == NUMBERS
    assert all(row["ours"] is not None and row["paper"] and row["criterion"] for row in rows)
    assert not {row["claim"].split()[0]: row["passed"] for row in rows}["M4a"]  # nothing is learned in two steps
    assert sorted(path.name for path in Path("out").glob("*.png")) == [
        f"mutual_information_{name}.png" for name in ("compute", "rates", "scan")
    ]
    told = capfd.readouterr().err
    assert "M4, MINE-DV, lr 0.02, seed 0, " in told  # progress without a terminal
    assert "GPU available" not in told


def test_a_real_run_is_the_specified_one(script):
    sandwich, critics = script._part("sandwich"), script._part("critics")
    assert (sandwich.PAIRS, sandwich.CHAINS, sandwich.LEAPFROG) == (64, 8, 10)
    assert (sandwich.STEPS, sandwich.SAMPLES) == ((50, 200, 1000), (1, 1000, 100_000))
    assert (sandwich.LINEAR_STEPS, sandwich.LINEAR_PAIRS) == ((10, 50, 200), 500)
    assert (sandwich.HIGH_STEPS, sandwich.HIGH_PAIRS, sandwich.HIGH_CHAINS) == ((100, 400), 100, 16)
    assert (critics.DIM, critics.RHO, critics.BATCH, critics.TRAINED) == (5, 0.98, 128, 2000)
    assert (critics.CHAINS, critics.STEPS, critics.LEARNING_RATES) == (8, 300, (0.1, 0.02))
    assert sandwich.training.EPOCHS == 150
    assert sandwich.information(sandwich.seeded_model()) == pytest.approx(6.006779, abs=1e-6)
    assert sandwich.information(sandwich.precise_model()) == pytest.approx(81.87, abs=0.01)


def verdicts(claims):
    return {claim.claim.split()[0]: claim.measure().passed for claim in claims}


def bounds(script, lower, upper, seconds=1.0):
    return script._part("sandwich").Bounds(lower, upper, seconds)


@pytest.mark.parametrize(
    ("annealed", "weighted", "expected"),
    [
        ({50: (8, 12), 200: (9, 9.9), 1000: (9.4, 9.6)}, {1: (0, 99), 1000: (6.9, 20), 100_000: (8, 12)}, "tttt"),
        ({50: (8, 12), 200: (9, 10.1), 1000: (9.4, 9.6)}, {1: (0, 99), 1000: (6.9, 20), 100_000: (8, 12)}, "fttt"),
        ({50: (8, 12), 200: (9, 9.9), 1000: (9.4, 9.6)}, {1: (0, 99), 1000: (6.9, 20), 100_000: (9, 10)}, "tftt"),
        ({50: (8, 12), 200: (9, 9.9), 1000: (8.9, 9.6)}, {1: (0, 99), 1000: (7.0, 20), 100_000: (8, 12)}, "ttff"),
    ],
)
def test_the_criteria_of_the_vae(script, monkeypatch, annealed, weighted, expected):
    part = script._part("sandwich")
    monkeypatch.setattr(part, "annealed", lambda seed, steps: bounds(script, *annealed[steps]))
    monkeypatch.setattr(part, "weighted", lambda seed, samples, start="prior": bounds(script, *weighted[samples]))
    found = verdicts(script.vae_claims((0,)))
    assert "".join("t" if found[f"M1{letter}"] else "f" for letter in "abcd") == expected


@pytest.mark.parametrize(
    ("below", "above", "schemes", "expected"),
    [
        ((-2, -1, -0.1), (2, 1, 0.1), (1, 2, 3), [True, True, True]),
        ((-1, -2, -0.1), (2, 1, 0.1), (2, 1, 3), [False, False, False]),
        ((-2, -1, 0.1), (2, 1, 0.1), (1, 3, 2), [False, False, False]),
        ((-2, -1, -0.1), (1, 2, 0.1), (1, 2, 3), [False, True, True]),
        ((-2, -1, -0.1), (2, 1, -0.1), (1, 2, 3), [False, True, True]),
    ],
)
def test_the_criteria_of_linear_models(script, monkeypatch, below, above, schemes, expected):
    part = script._part("sandwich")

    def evidence(kind, steps, seed):
        if kind == "precise":
            return {
                name: (value, 0.1) for name, value in zip(("coupled", "independent", "single"), schemes, strict=True)
            }
        place = part.LINEAR_STEPS.index(steps)
        return {"independent below": (below[place], 0.1), "coupled": (above[place], 0.1)}

    monkeypatch.setattr(part, "evidence", evidence)
    assert list(verdicts(script.linear_claims((0,))).values()) == expected


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, ""),
        ({"energy": 7.2}, "M4a"),
        ({"MINE-F": 5.6}, "M4b"),
        ({"DV, all pairs of a batch": 7.9}, "M4c"),
        ({"certified": 4.0}, "M4d M5a"),
        ({"forward": 6.6}, "M5b"),
        ({"ba": 2.0}, "M6"),
        ({"difference": 1e-3}, "M6"),
    ],
)
def test_the_criteria_of_critics(script, monkeypatch, change, failing):
    part = script._part("critics")
    values = {"InfoNCE": 4.5, "MINE-DV": 4.0, "MINE-F": 5.0, "DV, all pairs of a batch": 6.5, "energy": 7.8}
    values |= {"certified": 6.3, "forward": 6.4, "ba": 0.6, "difference": 1e-7, **change}
    energy = part.Learned(values["energy"], values["energy"], values["energy"], values["energy"])
    monkeypatch.setattr(part, "mine_ais", lambda seed: energy)
    monkeypatch.setattr(
        part, "baseline",
        lambda name, rate, seed: part.Learned(values[name], 6.35, values["certified"], values["forward"]),
    )  # fmt: skip
    ordered = part.Ordered(values["ba"], 1.9, 1.95, 1.95, 1.97, values["difference"])
    monkeypatch.setattr(part, "giwae", lambda seed: ordered)
    found = verdicts(script.critic_claims((0,)))
    assert " ".join(name for name, passed in found.items() if not passed) == failing


def test_the_criteria_of_rates_and_of_the_scan(script, monkeypatch):
    sandwich, critics = script._part("sandwich"), script._part("critics")

    def rates(upper, data_rate, middle):
        return lambda seed: [
            sandwich.AtBeta(beta, bounds(script, m - 0.1, m + 0.1), 1.0, upper, data_rate)
            for beta, m in zip(sandwich.BETAS, middle, strict=True)
        ]

    for upper, data_rate, middle, expected in (
        (9.0, 9.0, (5, 4, 3, 2, 1), [True, True, True]),
        (4.0, 9.0, (5, 4, 3, 2, 1), [False, True, True]),
        (9.0, 4.0, (5, 4, 3, 2, 1), [True, False, True]),
        (9.0, 9.0, (4, 5, 3, 2, 1), [True, True, False]),
    ):
        monkeypatch.setattr(sandwich, "rates", rates(upper, data_rate, middle))
        assert list(verdicts(script.rate_claims((0,))).values()) == expected
    truths = critics.NATS
    for shift, capped, expected in ((0.0, 4.8, [True, True]), (9.0, 4.8, [False, True]), (0.0, 4.9, [True, False])):
        found = {
            "AIS": [(t - 0.1 + shift, t + 0.1 + shift) for t in truths],
            "IWAE, K = 10,000": [(min(t, 9.2), 2 * t) for t in truths],
            "InfoNCE": [(capped, None)] * len(truths),
        }
        monkeypatch.setattr(critics, "scan", lambda seed, found=found: found)
        assert list(verdicts(script.scan_claims((0,))).values()) == expected


def test_linear_estimates_lie_beyond_those_of_perfect_transitions(script):
    part = script._part("sandwich")
    model = part.seeded_model()
    _, lower = linear_gaussian_annealing_bounds(model.weight, model.sigma, sigmoid_schedule(50))
    found = part.evidence("seeded", 50, 0)
    assert found["single"][0] + 4 * found["single"][1] > part.information(model) - float(lower) > 0
    assert found["coupled"][0] < found["single"][0]
    assert found["independent below"][0] < 0
    x, _ = model.simulate(5)
    expected = torch.distributions.MultivariateNormal(
        model.bias, model.weight @ model.weight.mT + 0.09 * torch.eye(10, dtype=torch.float64)
    )
    torch.testing.assert_close(part.log_evidence(model, x), expected.log_prob(x))


def test_the_closed_form_of_a_critic_is_the_integral(script):
    part = script._part("critics")
    torch.manual_seed(0)
    critic = QuadraticCritic(2, 1).double()
    for parameter in critic.parameters():
        parameter.data.normal_(std=0.5)
    x, z = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        density = critic.matrix(x, grid) - 0.5 * grid[:, 0].square() - 0.5 * math.log(2 * math.pi)
        log_normaliser = torch.logsumexp(density, 1) + math.log(24 / 20_000)
        expected = (critic(x, z) - log_normaliser).mean()
    assert part.implicit_bound(critic, x, z) == pytest.approx(float(expected), abs=1e-6)


def test_the_error_of_the_scan_is_that_of_simulated_pairs(script):
    part = script._part("critics")
    rho = math.sqrt(-math.expm1(-2 * 5 / part.SCAN_DIM))
    z, noise = torch.randn(2, 20_000, part.SCAN_DIM, generator=torch.Generator().manual_seed(0))
    x = rho * z + math.sqrt(1 - rho**2) * noise
    pointwise = 0.5 * (x.square() - (x - rho * z).square() / (1 - rho**2)).sum(1)
    assert part.scan_error(5) == pytest.approx(float(pointwise.std()) / math.sqrt(part.SCAN_PAIRS), rel=0.03)


# -- the full run ------------------------------------------------------------------------------------------------------


def write_mnist(folder, num=40):
    generator = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pixels = generator.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, num, 28, 28)
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + pixels.tobytes())
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">BBBBI", 0, 0, 8, 1, num) + bytes(num))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_full_run_reads_mnist_and_measures_vaes_and_gans(script, tmp_path, monkeypatch):
    full = script._part("full")
    write_mnist(tmp_path)
    for name, value in {"WIDTH": 6, "PAIRS": 4, "BATCH": 8, "VAE_EPOCHS": 1, "GAN_EPOCHS": 1, "SAMPLES": (1, 3),
                        "LONG_STEPS": 3, "SHORT_STEPS": 2, "LONG_CHAINS": 2, "LONG_LEAPFROG": 2}.items():  # fmt: skip
        monkeypatch.setattr(full, name, value)
    monkeypatch.setattr(full, "SHORT", {2: (2, 2), 10: (2, 2), 100: (2, 2)})
    data = full._data
    monkeypatch.setattr(full, "_data", lambda folder, seed: smaller(data(folder, seed)))
    claims = [claim for claim in script.claims(True, (0,), tmp_path, tmp_path) if claim.claim.startswith("F")]
    assert len(claims) == 6
    for claim in (claims[0], claims[4]):
        outcome = claim.measure()
        assert outcome.ours.count("[") == 4
        assert "AIS, long" in outcome.ours
    with pytest.raises(UserError, match="--full needs --data DIR"):
        list(script.claims(True, (0,), tmp_path))


def smaller(data):
    data.num_val = 8
    return data


def test_the_full_configuration_is_the_official_one(script):
    full = script._part("full")
    assert full.chains("VAE", 10)["long"] == full.Chains(48, 30_000, 20, 10.0)
    assert full.chains("GAN", 100)["short"] == full.Chains(1000, 500, 30, 3.0)
    assert next(part for part in full.generator(10) if hasattr(part, "out_features")).out_features == 1024
    assert dataclasses.asdict(full.chains("VAE", 2)["short"])["delta"] == 7.0
