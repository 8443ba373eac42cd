"""Demo tile of influence functions: wrong labels found, and the training images behind single predictions."""

import functools
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.data import DigitsDataModule
from lightning_ext.demo import EpochBar, Picture, Table, Tile
from lightning_ext.metrics import InfluenceScores, MislabelDetection
from lightning_ext.modules import Classifier, InfluenceModule, PBRFModule
from lightning_ext.nn import MLP

TITLE = "Influence: which training images are behind a prediction"

NUM_TRAIN, FLIPPED, EPOCHS, NEWTON_STEPS = 500, 25, 30, 40
DAMPING = 0.01
SHOWN = 4  # helpful and harmful images per question
SELF_INFLUENCE, BREGMAN, TRAINING_LOSS = "self-influence", "PBRF", "training loss"


def _data() -> tuple[TensorDataset, TensorDataset, torch.Tensor]:
    """Digits with some labels changed to another class; the true labels of the training images."""
    digits = DigitsDataModule(binarize=False)
    digits.setup()
    images, labels = (tensor[:NUM_TRAIN] for tensor in digits.train_set.tensors)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(NUM_TRAIN, generator=generator)[:FLIPPED]
    given = labels.clone()
    given[wrong] = (labels[wrong] + torch.randint(1, 10, (FLIPPED,), generator=generator)) % 10
    return TensorDataset(images, given), TensorDataset(*digits.held_out_set.tensors), labels


def _trainer(name: str, epochs: int, output_dir: Path) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=[EpochBar(name)],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(output_dir),
    )


def _detection(suspicion: torch.Tensor, flipped: torch.Tensor) -> dict[str, torch.Tensor]:
    metric = MislabelDetection()
    metric.update(suspicion, flipped)
    return metric.compute()


def _image(axis: Any, pixels: torch.Tensor, title: str, colour: str = "") -> None:
    axis.imshow(pixels.view(8, 8), cmap="gray_r")
    axis.set_title(title, fontsize=9, fontweight="normal", **({"color": colour} if colour else {}))
    axis.set_axis_off()


def _suspects(images: torch.Tensor, given: torch.Tensor, true: torch.Tensor, order: torch.Tensor) -> plt.Figure:
    figure, axes = plt.subplots(4, 5, figsize=(6.4, 5.8))
    for axis, i in zip(axes.flat, order.tolist(), strict=False):
        wrong = given[i] != true[i]
        _image(axis, images[i], f"given {given[i]}" + (f", true {true[i]}" if wrong else ""), "C3" if wrong else "")
    return figure


def _behind(test: TensorDataset, questions: list[int], train: TensorDataset, scores: torch.Tensor) -> plt.Figure:
    columns = 1 + 2 * SHOWN
    figure, axes = plt.subplots(len(questions), columns, figsize=(8.4, 1.25 * len(questions) + 0.5))
    for row, (axis, question) in enumerate(zip(axes, questions, strict=True)):
        _image(axis[0], test.tensors[0][question], f"test: {test.tensors[1][question]}", "C0")
        order = scores[row].argsort(descending=True)
        for place, i in enumerate([*order[:SHOWN].tolist(), *order[-SHOWN:].flip(0).tolist()]):
            colour = "C2" if place < SHOWN else "C3"
            _image(axis[1 + place], train.tensors[0][i], f"{train.tensors[1][i]}: {scores[row, i]:+.3f}", colour)
    return figure


def _train(train: TensorDataset, output_dir: Path) -> Classifier:
    pl.seed_everything(0, verbose=False)
    model = Classifier(
        MLP([64, 16, 10], activation="tanh"), functools.partial(torch.optim.Adam, lr=0.01, weight_decay=1e-3)
    )
    trainer = _trainer("digits with wrong labels", EPOCHS, output_dir)
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
    return model


def tile(output_dir: Path) -> Tile:
    """Train once, ask, and compare."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only lose by sharing them out
    try:
        return _tile(output_dir)
    finally:
        torch.set_num_threads(threads)


def _tile(output_dir: Path) -> Tile:
    train, test, true = _data()
    images, given = train.tensors
    flipped = given != true
    model = _train(train, output_dir)
    loader = DataLoader(train, batch_size=100)
    with torch.no_grad():
        losses = F.cross_entropy(model(images), given, reduction="none")
        test_losses = F.cross_entropy(model(test.tensors[0]), test.tensors[1], reduction="none")
    questions = test_losses.topk(3).indices.tolist()

    start = time.perf_counter()
    influence = InfluenceModule(
        model, queries=[tuple(tensor[questions] for tensor in test.tensors)], damping=DAMPING, solver="block_cg"
    )
    scores = InfluenceScores.gather(_trainer("influence", 1, output_dir).predict(influence, loader))
    residual = influence.report["residual"]
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    own = influence.self_influence(loader)
    own_seconds = time.perf_counter() - start

    start = time.perf_counter()
    pbrf = PBRFModule(model, remove=list(range(NUM_TRAIN)), damping=DAMPING, optimizer="newton")
    whole = DataLoader(train, batch_size=NUM_TRAIN)
    _trainer(f"PBRF of {NUM_TRAIN} removals", NEWTON_STEPS, output_dir).fit(pbrf, whole)
    response = pbrf.measure(whole).diagonal()
    pbrf_seconds = time.perf_counter() - start

    found = {
        SELF_INFLUENCE: _detection(own, flipped),
        BREGMAN: _detection(response, flipped),
        TRAINING_LOSS: _detection(losses, flipped),
    }
    spent = {SELF_INFLUENCE: own_seconds, BREGMAN: pbrf_seconds, TRAINING_LOSS: 0.0}
    rows = [[name, float(value["auc"]), float(value["recall"]), spent[name]] for name, value in found.items()]
    suspects = own.topk(20).indices
    hits = int(flipped[suspects].sum())
    curves, _ = MislabelDetection().plot(found)
    return Tile(
        heading=f"{hits} of the 20 most suspicious labels are wrong",
        summary=[
            f"{FLIPPED} of {NUM_TRAIN} digits got a wrong label before training. Ranked by self-influence, {hits} of "
            f"the first 20 are among them.",
            f"For the three test images with the highest loss, {3 * NUM_TRAIN} scores took {seconds:.2f} s, solved to "
            f"a relative residual of {residual:.1e}. A positive score is the rise of the test loss, in nats, if the "
            "training image were removed.",
            "The training loss alone finds wrong labels as well as influence does here. What it cannot say is which "
            "predictions a label hurts.",
        ],
        tables=[
            Table(
                ["ranked by", "AUC", "found in the first 20 %", "seconds"],
                rows,
                "finding the wrong labels; seconds for all training images, on one core",
            )
        ],
        figures=[
            Picture(
                "The twenty most suspicious training images, with the label they were given and, in red, the true one.",
                _suspects(images, given, true, suspects),
                "Twenty small digits; most of them carry a label that is plainly wrong.",
            ),
            Picture(
                "Three test images that the network gets wrong, the four training images that help most (green) and "
                "that harm most (red), each with its label and its score.",
                _behind(test, questions, train, scores),
                "Helpful images show the test image's digit; harmful ones look like it and have another label.",
            ),
            Picture(
                "Share of the wrong labels found against the share of images inspected.",
                curves,
                "Self-influence, the Bregman response and the training loss find nearly all at once, far above chance.",
            ),
        ],
        figures_of_merit={
            "wrong_among_20": hits,
            "auc_self_influence": float(found[SELF_INFLUENCE]["auc"]),
            "auc_pbrf": float(found[BREGMAN]["auc"]),
            "auc_training_loss": float(found[TRAINING_LOSS]["auc"]),
            "residual": residual,
        },
    )
