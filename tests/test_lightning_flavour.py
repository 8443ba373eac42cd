"""Which of the two Lightning packages is used, in every order of imports; each case runs in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = "Callback LightningModule LightningDataModule Trainer"
BOTH = ("pytorch_lightning", "lightning.pytorch")


def python(code: str, *options: str, path: str = str(ROOT), backend: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": path, "LIGHTNING_EXT_BACKEND": backend}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


@pytest.fixture
def stubs(tmp_path):
    """Write bare packages with Lightning's names, so that absence is real and a process costs nothing."""

    def write(flavours):
        for flavour in flavours:
            folder = tmp_path / "site" / flavour.replace(".", "/")
            (folder / "utilities").mkdir(parents=True)
            (folder / "__init__.py").write_text("".join(f"class {name}: pass\n" for name in NAMES.split()))
            (folder / "utilities" / "__init__.py").touch()
            (folder / "utilities" / "exceptions.py").write_text("class MisconfigurationException(Exception): pass\n")
        if "lightning.pytorch" in flavours:
            (tmp_path / "site" / "lightning" / "__init__.py").write_text("from lightning import pytorch\n")
        return os.pathsep.join([str(tmp_path / "site"), str(ROOT)])

    return write


def chosen(path: str, first: str = "", backend: str = "") -> subprocess.CompletedProcess:
    """Import ``first``, then ours, without site-packages; print the choice and where its names come from."""
    show = f"""
from lightning_ext import _lightning as ours
print(ours.BACKEND, *{{getattr(ours, name).__module__ for name in {NAMES.split()}}})
print(ours.MisconfigurationException.__module__)
"""
    return python(first + show, "-S", path=path, backend=backend)


@pytest.mark.parametrize(
    ("installed", "first", "backend", "expected"),
    [
        (BOTH, "", "", "pytorch_lightning"),
        (BOTH, "import pytorch_lightning", "", "pytorch_lightning"),
        (BOTH, "import lightning.pytorch", "", "lightning.pytorch"),
        (BOTH, "import lightning as L", "", "lightning.pytorch"),
        (BOTH, "import pytorch_lightning, lightning.pytorch", "", "pytorch_lightning"),
        (BOTH, "import lightning.pytorch, pytorch_lightning", "", "pytorch_lightning"),
        (BOTH, "", "pytorch_lightning", "pytorch_lightning"),
        (BOTH, "", "lightning.pytorch", "lightning.pytorch"),
        (BOTH, "import pytorch_lightning", "lightning.pytorch", "lightning.pytorch"),
        (BOTH, "import lightning.pytorch", "pytorch_lightning", "pytorch_lightning"),
        (BOTH[:1], "", "", "pytorch_lightning"),
        (BOTH[1:], "", "", "lightning.pytorch"),
        (BOTH[1:], "import lightning", "", "lightning.pytorch"),
    ],
)
def test_choice(stubs, installed, first, backend, expected):
    result = chosen(stubs(installed), first, backend)
    assert result.stdout.split() == [expected, expected, f"{expected}.utilities.exceptions"], result.stderr


@pytest.mark.parametrize(
    ("installed", "backend", "message"),
    [
        (
            BOTH,
            "lightning",
            "must be one of pytorch_lightning, lightning.pytorch; got 'lightning'",
        ),
        (BOTH[:1], "lightning.pytorch", "No module named 'lightning'"),
        ((), "", "lightning_ext needs Lightning: pip install pytorch-lightning"),
    ],
)
def test_refusal(stubs, installed, backend, message):
    result = chosen(stubs(installed), backend=backend)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


FIT = """
import torch
from lightning_ext._lightning import BACKEND, Callback
from lightning_ext._lightning import submodule

class Counts(Callback):
    batches = 0
    def on_train_batch_end(self, *args):
        self.batches += 1

BoringModel = submodule("demos.boring_classes").BoringModel
counts = Counts()
trainer = Trainer(
    max_steps=3, accelerator="cpu", callbacks=[counts], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
)
trainer.fit(BoringModel())
print(BACKEND, type(trainer).__module__.split(".trainer")[0], counts.batches)
"""


@pytest.mark.parametrize(
    ("trainer", "backend", "expected"),
    [
        ("from lightning.pytorch import Trainer", "", "lightning.pytorch"),
        ("from pytorch_lightning import Trainer", "", "pytorch_lightning"),
        (
            "import lightning_ext.callbacks\nfrom lightning.pytorch import Trainer",
            "lightning.pytorch",
            "lightning.pytorch",
        ),
    ],
    ids=["lightning first", "pytorch_lightning first", "ours first, told by the variable"],
)
def test_real_lightning_fits(tmp_path, trainer, backend, expected):
    result = python(trainer + FIT, backend=backend)
    assert result.stdout.split() == [expected, expected, "3"], result.stderr


def test_the_faq_prints_what_lightning_prints():
    """Ours first, then a ``lightning`` Trainer: the case that only the variable solves."""
    result = python(
        """
from lightning_ext._lightning import BACKEND, LightningModule, LightningDataModule, Callback
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel as Theirs
from pytorch_lightning.demos.boring_classes import BoringModel

class MultiRateVAE(LightningModule): ...
class KLSchedule(Callback): ...
class Data(LightningDataModule): ...

def attempt(run):
    try:
        run()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
attempt(lambda: Trainer(**quiet).fit(MultiRateVAE()))
attempt(lambda: Trainer(**quiet).fit(BoringModel()))
attempt(lambda: Trainer(**quiet).fit(Theirs(), datamodule=Data()))
attempt(lambda: Trainer(**quiet, callbacks=KLSchedule()))
"""
    )
    printed = [line for line in result.stdout.splitlines() if line.partition(":")[0].endswith("Error")]
    assert len(printed) == 4, result.stdout + result.stderr
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in faq] == []
