"""The reproduction engine keeps every row whatever happens, and the benchmark helpers time in honest pairs."""

import json
from pathlib import Path

import pytest
import torch

from lightning_ext import benchmark
from lightning_ext._resources import UserError, load_script
from lightning_ext.benchmark import absent_row, environment, paired_ratio, timed_row, value_row, write_benchmark
from lightning_ext.cli import main
from lightning_ext.reproduce import reproduce, reproductions

CLAIMS = """
import json
from matplotlib.figure import Figure
from lightning_ext.reproduce import Claim, Outcome, over_seeds

def claims(full, seeds, output_dir):
    assert output_dir.is_dir()

    def drawn():
        figure = Figure()
        figure.add_subplot().plot([0, 1])
        return Outcome("exact", True, figures={"curve": figure})

    def pending():
        rows = json.loads((output_dir / "toy.json").read_text())["rows"]
        return Outcome(sum(row["passed"] is None for row in rows), True)

    def low():
        return over_seeds(float, seeds, lambda values: max(values) < 3)

    yield Claim("mean of the seeds", "Table 1: 2", "below 3 on every seed", low)
    yield Claim("too high", "9", "at least 9", lambda: Outcome(8.0, 8.0 >= 9))
    yield Claim("a picture", "Figure 2", "equal", drawn)
    yield Claim("criteria are on disk", "-", "two rows wait", pending)
    yield Claim("large", "-", "full", LAST)
"""


def write(folder, last="lambda: Outcome(1.0, full)", extra=""):
    text = CLAIMS.replace("LAST", last).replace("output_dir):", f"output_dir{extra}):")
    (folder / "toy_reproduce.py").write_text(text)


@pytest.fixture
def examples(tmp_path, monkeypatch):
    folder = tmp_path / "examples"
    folder.mkdir()
    write(folder)
    monkeypatch.setattr("lightning_ext.reproduce.examples_dir", lambda: folder)
    return folder


def stored(output="runs/reproduce"):
    return json.loads((Path(output) / "toy.json").read_text())


@pytest.mark.usefixtures("examples")
def test_a_failed_claim_is_a_result_and_stays(capsys):
    assert main(["reproduce", "toy"]) == 0
    content = stored()
    assert content["complete"]
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert [row["passed"] for row in content["rows"]] == [True, False, True, True, False]
    mean, _, picture, pending, _ = content["rows"]
    assert (mean["ours"], mean["spread"], mean["seeds"]) == (1.0, 1.0, [0, 1, 2])
    assert (mean["claim"], mean["paper"]) == ("mean of the seeds", "Table 1: 2")
    assert mean["criterion"] == "below 3 on every seed"
    assert picture["figures"] == ["toy_curve.png"]
    assert Path("runs/reproduce/toy_curve.png").stat().st_size > 1000
    assert pending["ours"] == 2
    assert all(row["seconds"] >= 0 for row in content["rows"])
    out = capsys.readouterr().out
    assert "1 ± 1" in out
    assert "3 of 5 claims reproduced" in out


@pytest.mark.usefixtures("examples")
def test_options_reach_the_claims():
    assert main(["reproduce", "toy", "--full", "--seeds", "2", "--output", "elsewhere"]) == 0
    rows = stored("elsewhere")["rows"]
    assert (rows[0]["ours"], rows[0]["spread"], rows[0]["seeds"]) == (2.0, None, [2])
    assert rows[4]["passed"] is True


def test_the_data_folder_reaches_claims_that_want_one(examples, tmp_path, capsys):
    assert main(["reproduce", "toy", "--data", str(tmp_path)]) == 2
    assert "toy_reproduce.py reads no data folder" in capsys.readouterr().err
    write(examples, last="lambda: Outcome(str(data_dir), True)", extra=", data_dir")
    assert main(["reproduce", "toy", "--data", str(tmp_path)]) == 0
    assert stored()["rows"][4]["ours"] == str(tmp_path)
    capsys.readouterr()
    assert main(["reproduce", "toy", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err == "lightning-ext: error: --data: there is no folder nowhere.\n"


def test_an_interruption_keeps_the_finished_rows(examples, capsys):
    write(examples, last="lambda: (_ for _ in ()).throw(KeyboardInterrupt)")
    assert main(["reproduce", "toy"]) == 130
    assert not stored()["complete"]
    assert [row["passed"] for row in stored()["rows"]] == [True, False, True, True, None]
    out, err = capsys.readouterr()
    assert "1 ± 1" in out
    assert "what was finished is kept" in err


def test_every_criterion_is_on_disk_before_the_first_measurement(examples):
    source = CLAIMS.replace("LAST", "None").replace("over_seeds(float", "over_seeds(interrupt")
    stop = "\n\ndef interrupt(seed):\n    raise KeyboardInterrupt\n"
    (examples / "toy_reproduce.py").write_text(source + stop)
    assert main(["reproduce", "toy"]) == 130
    rows = stored()["rows"]
    assert [row["criterion"] for row in rows] == [
        "below 3 on every seed",
        "at least 9",
        "equal",
        "two rows wait",
        "full",
    ]
    assert {row["passed"] for row in rows} == {None}


def test_a_measurement_that_crashes_is_a_failed_claim_and_exit_code_1(examples, capsys):
    write(examples, last="lambda: 1 / 0")
    assert main(["reproduce", "toy"]) == 1
    last = stored()["rows"][-1]
    assert (last["passed"], last["error"]) == (False, "ZeroDivisionError: division by zero")
    assert stored()["complete"]
    assert "Traceback" in capsys.readouterr().err


def test_wrong_use_is_one_line(examples, capsys):
    assert main(["reproduce", "toi"]) == 2
    error = "lightning-ext: error: unknown reproduction 'toi'. Did you mean 'toy'? Known: toy.\n"
    assert capsys.readouterr().err == error
    (examples / "toy_reproduce.py").write_text("def claims(full, seeds, output_dir): return []\n")
    assert main(["reproduce", "toy"]) == 2
    assert "toy_reproduce.py lists no claims." in capsys.readouterr().err
    with pytest.raises(UserError, match="--seeds needs at least one seed"):
        reproduce("toy", seeds=())


def test_pairs_alternate_and_flip():
    calls = []
    paired_ratio(lambda: calls.append("o"), lambda: calls.append("p"), repeats=4, warmup=1)
    assert "".join(calls) == "op" + "op" + "po" + "op" + "po"


def test_the_ratio_is_the_median_of_pairs_whatever_the_machine_does():
    """Ours takes half the peer's time while the machine grows slower tenfold: only pairing sees one half."""
    now, load = [0.0], [1.0]

    def work(seconds):
        def call():
            now[0] += seconds * load[0]
            load[0] *= 1.05

        return call

    timing = paired_ratio(work(1.0), work(2.0), repeats=25, clock=lambda: now[0])
    assert timing.ratio == pytest.approx(0.5, rel=0.06)
    assert timing.low <= timing.ratio <= timing.high
    assert timing.high - timing.low < 0.06
    assert timing.repeats == 25
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        paired_ratio(int, int, repeats=1)


def test_the_benchmark_file_has_the_agreed_form(capsys):
    ticks = iter(range(1000))
    timing = paired_ratio(lambda: next(ticks), int, repeats=3, clock=lambda: next(ticks))
    rows = [
        timed_row("step", timing, peer_name="pythae", peer_version="0.1.2", goal=1.0),
        value_row("auc", 0.9, 0.8, unit="1", peer_name="paper", peer_version=None, goal=1.0, higher_is_better=True),
        absent_row("epoch", peer_name="other", goal=1.0, why="other is not installed"),
    ]
    write_benchmark(rows, "results/toy.json")
    content = json.loads(Path("results/toy.json").read_text())
    assert set(content) == {"environment", "rows"}
    keys = {"name", "ours", "peer", "peer_name", "peer_version", "unit", "ratio", "spread", "goal", "met", "why"}
    assert all(set(row) == keys for row in content["rows"])
    step, auc, epoch = content["rows"]
    assert (step["ratio"], step["met"], step["spread"]) == (2.0, False, [2.0, 2.0])
    assert (auc["ratio"], auc["met"]) == (pytest.approx(1.125), True)
    assert (epoch["ratio"], epoch["met"], epoch["why"]) == (None, None, "other is not installed")
    assert "pythae 0.1.2" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="names that differ"):
        write_benchmark([rows[0], rows[0]], "results/toy.json")


def test_the_environment_says_what_ran(monkeypatch):
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]
    json.dumps(found, allow_nan=False)
    monkeypatch.setattr(benchmark, "_PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package" not in environment()["versions"]


def test_shipped_reproductions_can_be_listed_and_loaded():
    assert "mrvae" in reproductions()
    for path in reproductions().values():
        assert callable(load_script(path, "claims").claims)
