"""Demo tile of MR-VAE: one training run against four beta-VAEs with the same network and the same budget each."""

import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

from lightning_ext.callbacks import RateDistortionCallback
from lightning_ext.data import DigitsDataModule
from lightning_ext.demo import EpochBar, Picture, Table, Tile
from lightning_ext.metrics import RateDistortionCurve
from lightning_ext.modules import BaseVAE, BetaVAE, MultiRateVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder

TITLE = "MR-VAE: one training run, every beta"

EPOCHS = 300
BASELINE_BETAS = (0.03, 0.3, 1.0, 3.0)
SHOWN_BETAS = (0.01, 0.1, 0.5, 1.5, 5.0)


def _networks() -> tuple[MLPEncoder, MLPDecoder]:
    torch.manual_seed(0)
    return MLPEncoder([64], [128, 128], 8), MLPDecoder(8, [128, 128], [64])


def _train(model: BaseVAE, name: str, output_dir: Path, callbacks: list[Any]) -> float:
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        limit_val_batches=1.0 if callbacks else 0,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=[EpochBar(name), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(output_dir),
    )
    pl.seed_everything(0, verbose=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only lose by sharing them out
    try:
        start = time.perf_counter()
        trainer.fit(model, datamodule=DigitsDataModule())
        return time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _measure(model: BaseVAE, data: DigitsDataModule) -> tuple[float, float]:
    """Rate and distortion on the held-out images, with the noise that the callback's sweep uses."""
    model.eval()
    rates, distortions = [], []
    for index, batch in enumerate(data.val_dataloader()):
        model.set_address("val", index)
        terms = model.rate_distortion(batch)
        rates.append(terms.rate)
        distortions.append(terms.distortion)
    return float(torch.cat(rates).mean()), float(torch.cat(distortions).mean())


def _picture_curve(
    metric: RateDistortionCurve, curve: dict[str, Any], points: dict[float, tuple[float, float]]
) -> plt.Figure:
    baselines = {f"beta-VAE, beta = {beta:g}": point for beta, point in points.items()}
    figure, _ = metric.plot(curve, baselines=baselines)
    return figure


def _picture_images(model: MultiRateVAE, data: DigitsDataModule) -> plt.Figure:
    images = data.held_out_set.tensors[0][:8]
    figure, axes = plt.subplots(2 * len(SHOWN_BETAS) + 1, 1, figsize=(6.4, 7.6))
    rows = [("data", images)]
    with torch.no_grad():
        for beta in SHOWN_BETAS:
            model.set_address("test", 0)  # the same noise for the samples of every beta
            rows += [(f"{beta:g}", model.at_beta(beta)(images)), ("samples", model.at_beta(beta).sample(8))]
    for axis, (label, row) in zip(axes, rows, strict=True):
        strip = row.reshape(8, 8, 8).permute(1, 0, 2).reshape(8, 64)
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1, aspect="equal")
        axis.vlines(torch.arange(1, 8) * 8 - 0.5, -0.5, 7.5, color="white", lw=3)
        text = label if label in ("data", "samples") else rf"$\beta$ = {label}"
        axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, alpha=0.7 if label == "samples" else 1)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def tile(output_dir: Path) -> Tile:
    """Train, measure and draw."""
    data = DigitsDataModule()
    data.setup()
    model = MultiRateVAE(*_networks(), input_shape=[64], lr=5e-3, convert={"gate_heads": False})
    callback = RateDistortionCallback(num_betas=20, save_csv=False, log_figure=False)
    seconds = _train(model, "MR-VAE, all betas at once", output_dir, [callback])
    curve = callback.curve

    rows, points, baseline_seconds = [], {}, 0.0
    for beta in BASELINE_BETAS:
        baseline = BetaVAE(*_networks(), input_shape=[64], beta=beta, lr=3e-3)
        spent = _train(baseline, f"beta-VAE, beta = {beta:g}", output_dir, [])
        baseline_seconds += spent
        rate, distortion = points[beta] = _measure(baseline, data)
        with model.at(beta):
            ours = _measure(model, data)
        losses = ours[1] + beta * ours[0], distortion + beta * rate
        rows.append([f"{beta:g}", *ours, rate, distortion, *losses, spent])
    header = ["beta", "R, MR-VAE", "D, MR-VAE", "R, beta-VAE", "D, beta-VAE", "loss, MR-VAE", "loss, beta-VAE",
              "seconds, beta-VAE"]  # fmt: skip
    per_run = baseline_seconds / len(BASELINE_BETAS)
    worst = max(row[5] - row[6] for row in rows)
    return Tile(
        heading="One run draws the whole rate-distortion curve",
        summary=[
            f"A MultiRateVAE trained for {seconds:.0f} s on 1,400 binarised digits, its curve measured at 20 betas on "
            f"397 held-out ones. Four separate beta-VAEs with the same network and {EPOCHS} epochs each took "
            f"{baseline_seconds:.0f} s and give four points.",
            f"One MR-VAE run costs {seconds / per_run:.2f} beta-VAE runs. All rates and distortions are in nats per "
            f"image; the loss is D + beta R. At worst its loss is {worst:+.2f} nats from that of a beta-VAE.",
        ],
        tables=[Table(header, rows, f"held-out nats per image; MR-VAE took {seconds:.1f} s for all rows")],
        figures=[
            Picture(
                "Distortion against rate. The curve is one network; each mark is a network of its own.",
                _picture_curve(RateDistortionCurve(curve["beta"].tolist()), curve, points),
                "Rate-distortion curve of one MR-VAE, coloured by beta, with the four beta-VAEs as marks.",
            ),
            Picture(
                "Held-out digits, their reconstructions and samples from the prior at five betas of the same network.",
                _picture_images(model, data),
                "Reconstructions grow smoother and samples cleaner as beta grows from 0.01 to 5.",
            ),
        ],
        figures_of_merit={
            "mrvae_seconds": seconds,
            "beta_vae_seconds": baseline_seconds,
            "runs_cost_ratio": seconds / per_run,
            "auc": float(curve["auc"]),
            "largest_excess_loss": worst,
        },
    )
