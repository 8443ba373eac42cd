"""The curve that the callback measures, where it goes, and that measuring changes nothing; the KL schedules."""

import csv
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Callback, MisconfigurationException, Trainer, submodule
from lightning_ext.callbacks import KLSchedule, RateDistortionCallback
from lightning_ext.functional.mrvae import gaussian_kl
from lightning_ext.metrics import RateDistortionCurve
from lightning_ext.modules import BetaVAE, MultiRateMixin, MultiRateVAE, RateDistortion
from lightning_ext.nn import LadderDecoder, LadderEncoder, MLPDecoder, MLPEncoder
from lightning_ext.testing import StatefulLoader, assert_observer, assert_resumes, ddp_trainer_kwargs

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
KEYS = {"mrvae/auc", "mrvae/slope_error", "mrvae/best_elbo", "mrvae/beta_at_best_elbo", "mrvae/active_units"}
BETAS = [0.05, 0.3, 1.0, 2.0]

pytestmark = pytest.mark.filterwarnings("ignore:.*slope_error is NaN", "ignore:.*does not have many workers")


def multi_rate(cls=MultiRateVAE, **kwargs):
    """Gates away from the identity, so that rate and distortion depend on beta before any training."""
    pair = MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6])
    model = cls(*pair, input_shape=[6], **{"seed": 3, "lr": 0.01, **kwargs})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rate_gate" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if name == "encoder.mu.bias":
                parameter += 1.0
    return model


def beta_vae(**kwargs):
    return BetaVAE(MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6]), input_shape=[6], lr=0.01, **kwargs)


def pixels(n=10):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(1))


def loader(n=10, batch_size=4):
    return DataLoader(TensorDataset(pixels(n)), batch_size)


def fit(model, callback, **kwargs):
    trainer = Trainer(callbacks=[callback], **{**QUIET, "max_epochs": 1, **kwargs})
    trainer.fit(model, loader(), loader())
    return trainer


def by_hand(model, betas):
    """Mean rate and distortion at each beta, with the noise of each batch of the evaluation."""
    table = []
    for beta in betas:
        rates, distortions = [], []
        for index, (x,) in enumerate(loader()):
            model.set_address("val", index)
            with model.at(beta), torch.no_grad():
                terms = model.rate_distortion(x)
            rates.append(terms.rate)
            distortions.append(terms.distortion)
        table.append([torch.cat(rates).double().mean(), torch.cat(distortions).double().mean()])
    return torch.tensor(table, dtype=torch.float64).T


# -- the curve --------------------------------------------------------------------------------------------------------


def test_the_curve_holds_the_means_over_the_evaluation_data():
    model, callback = multi_rate(), RateDistortionCallback(betas=BETAS)
    trainer = fit(model, callback)
    rate, distortion = by_hand(model, BETAS)
    torch.testing.assert_close(callback.curve["rate"], rate, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(callback.curve["distortion"], distortion, rtol=1e-6, atol=1e-7)
    assert callback.curve["beta"].tolist() == BETAS
    assert callback.curve["count"].tolist() == [10] * 4
    assert rate.unique().numel() == 4
    metrics = trainer.callback_metrics
    elbo = -(rate + distortion)
    assert metrics["mrvae/best_elbo"].item() == pytest.approx(elbo.max().item(), rel=1e-5)
    assert metrics["mrvae/beta_at_best_elbo"].item() == pytest.approx(BETAS[int(elbo.argmax())])
    assert metrics["mrvae/active_units"] == callback.curve["active_units"][2], "at the beta nearest to 1"
    assert metrics["mrvae/auc"].item() == pytest.approx(callback.curve["auc"].item(), rel=1e-6)


def test_without_betas_it_measures_a_grid_over_the_range():
    model, callback = multi_rate(beta_range=(0.1, 10.0)), RateDistortionCallback(num_betas=3)
    fit(model, callback)
    assert callback.curve["beta"].tolist() == pytest.approx([0.1, 1.0, 10.0])


def test_exactly_the_documented_keys_are_logged():
    def logged(**kwargs):
        trainer = fit(multi_rate(), RateDistortionCallback(betas=BETAS, **kwargs))
        plain = fit(multi_rate(), Callback())
        return set(trainer.callback_metrics) - set(plain.callback_metrics)

    assert logged() == KEYS
    assert logged(reference_point=[50.0, 50.0]) == KEYS | {"mrvae/hypervolume"}


def test_the_rate_interval_is_that_of_the_area():
    whole, part = RateDistortionCallback(betas=BETAS), RateDistortionCallback(betas=BETAS)
    model = multi_rate(lr=0.05, distortion=lambda y, x: 50 * (y - x).square().sum(1))
    Trainer(max_epochs=60, **QUIET).fit(model, loader())  # to a curve that falls
    Trainer(callbacks=[whole], **QUIET).validate(model, loader(), verbose=False)
    rates = whole.curve["rate"]
    part.rate_interval = [0.9 * float(rates.min()) + 0.1 * float(rates.max()), float(rates.mean())]
    metrics = Trainer(callbacks=[part], **QUIET).validate(model, loader(), verbose=False)[0]
    expected = RateDistortionCurve(BETAS, rate_interval=part.rate_interval)
    for index in range(4):
        expected.update(index, rates[index : index + 1].float(), whole.curve["distortion"][index : index + 1].float())
    assert metrics["mrvae/auc"] == pytest.approx(expected.compute()["auc"].item(), rel=1e-5)
    assert metrics["mrvae/auc"] != pytest.approx(whole.curve["auc"].item(), rel=1e-4)


def test_a_module_without_posterior_means_has_no_active_units():
    ladder = LadderEncoder([6], 5), LadderDecoder(5, [2, 3], [6])
    model = MultiRateVAE(*ladder, input_shape=[6], objective="hierarchical", conditioning="none")
    trainer = Trainer(callbacks=[RateDistortionCallback(betas=BETAS)], **QUIET)
    metrics = trainer.validate(model, loader(), verbose=False)[0]
    assert "mrvae/auc" in metrics
    assert "mrvae/active_units" not in metrics


def test_validation_in_inference_mode_repeats_the_value_inside_fit():
    model, callback = multi_rate(), RateDistortionCallback(betas=BETAS)
    trainer = fit(model, callback, max_epochs=2)
    inside = {key: trainer.callback_metrics[key].item() for key in KEYS - {"mrvae/slope_error"}}
    outside = trainer.validate(model, loader(), verbose=False)[0]
    assert {key: outside[key] for key in inside} == inside
    tested = trainer.test(model, loader(), verbose=False)[0]
    assert {key: tested[key] for key in inside} == inside


def test_half_precision_training_is_measured():
    callback = RateDistortionCallback(betas=BETAS)
    fit(multi_rate(), callback, precision="bf16-mixed")
    assert callback.curve["rate"].isfinite().all()


class Legacy(MultiRateMixin):
    """Draws from the global generator, as most people's modules do."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6])
        self.make_multirate(self.encoder, self.decoder, [6])
        self.drawn = []

    def rate_distortion(self, batch):
        mu, logvar = self.encoder(batch[0])
        noise = torch.randn_like(mu)
        self.drawn.append(noise)
        error = self.decoder(mu + noise * (logvar / 2).exp()) - batch[0]
        return RateDistortion(gaussian_kl(mu, logvar).sum(1), error.square().sum(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_every_beta_sees_the_same_noise_and_the_global_generator_is_left_alone():
    def state_after(*callbacks):
        torch.manual_seed(5)
        model.drawn.clear()
        Trainer(callbacks=list(callbacks), **QUIET).validate(model, loader(8), verbose=False)
        return torch.get_rng_state()

    model = Legacy()
    model.validation_step = lambda *_: None
    plain = state_after()
    assert torch.equal(state_after(RateDistortionCallback(betas=BETAS)), plain)
    first, second = model.drawn[:4], model.drawn[4:]
    assert all(torch.equal(noise, first[0]) for noise in first)
    assert all(torch.equal(noise, second[0]) for noise in second)
    assert not torch.equal(first[0], second[0]), "batches differ"


# -- when -------------------------------------------------------------------------------------------------------------


def measured_epochs(folder):
    return sorted(path.name for path in (folder / "rate_distortion").glob("*.csv"))


def test_every_nth_epoch(tmp_path):
    fit(multi_rate(), RateDistortionCallback(betas=BETAS, every_n_epochs=2), max_epochs=5)
    assert measured_epochs(tmp_path) == ["val_epoch=1.csv", "val_epoch=3.csv"]


def test_an_evaluation_of_its_own_is_always_measured():
    callback = RateDistortionCallback(betas=BETAS, every_n_epochs=7)
    Trainer(callbacks=[callback], **QUIET).validate(multi_rate(), loader(), verbose=False)
    assert callback.curve is not None


def test_the_sanity_check_is_not_measured(tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            assert trainer.num_sanity_val_batches == [2]
            seen.append((callback.curve, len(measured_epochs(tmp_path)), set(trainer.callback_metrics)))

    seen, callback = [], RateDistortionCallback(betas=BETAS)
    trainer = Trainer(callbacks=[callback, Look()], max_epochs=1, num_sanity_val_steps=2, **QUIET)
    trainer.fit(multi_rate(), loader(), loader())
    assert seen == [(None, 0, set())]
    assert callback.curve["count"].tolist() == [10] * 4


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_the_file_holds_the_curve(tmp_path):
    callback = RateDistortionCallback(betas=BETAS)
    model = multi_rate()
    trainer = fit(model, callback, default_root_dir=tmp_path / "here")
    trainer.test(model, loader(), verbose=False)
    names = measured_epochs(tmp_path / "here")
    assert [name.split("_")[0] for name in names] == ["test", "val"]
    with (tmp_path / "here" / "rate_distortion" / names[0]).open() as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) == {"beta", "rate", "distortion", "elbo", "loss", "count", "active_units"}
    for name in table[0]:
        assert [float(row[name]) for row in table] == callback.curve[name].tolist()


@pytest.mark.parametrize("kwargs", [{"fast_dev_run": True}, {}])
def test_nothing_is_written_where_nothing_is_wanted(tmp_path, kwargs):
    fit(multi_rate(), RateDistortionCallback(betas=BETAS, save_csv=bool(kwargs)), **kwargs)
    assert not list(tmp_path.rglob("*"))


def test_the_picture_reaches_tensorboard(tmp_path):
    pytest.importorskip("matplotlib")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = submodule("loggers").TensorBoardLogger(tmp_path, name="run")
    callback = RateDistortionCallback(betas=BETAS, baselines={"beta-VAE": [[1.0, 4.0], [2.0, 3.0]]})
    fit(multi_rate(), callback, max_epochs=2, logger=logger)
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("mrvae/val_curve")
    assert [picture.step for picture in pictures] == [3, 6]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    assert "mrvae/auc" in events.Tags()["scalars"]
    assert (tmp_path / "run" / "version_0" / "rate_distortion" / "val_epoch=1.csv").is_file()
    from matplotlib import pyplot as plt

    assert not plt.get_fignums(), "figures are closed"


class Images(submodule("loggers").CSVLogger):
    """Takes images the way W&B's logger does."""

    def log_image(self, key, images, step=None):
        self.images = [*getattr(self, "images", []), (key, len(images), step)]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_logger_that_takes_images_gets_one(tmp_path, wanted):
    pytest.importorskip("matplotlib")
    logger = Images(tmp_path)
    fit(multi_rate(), RateDistortionCallback(betas=BETAS, log_figure=wanted), logger=logger)
    assert getattr(logger, "images", []) == ([("mrvae/val_curve", 1, 3)] if wanted else [])


# -- measuring changes nothing ----------------------------------------------------------------------------------------


def normed():
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4))
    return MultiRateVAE(encoder, MLPDecoder(2, [5], [6]), input_shape=[6], lr=0.01)


@pytest.mark.parametrize("module", [normed, Legacy])
def test_training_is_bit_identical_without_it(module):
    data = TensorDataset(pixels(12))
    assert_observer(
        lambda: RateDistortionCallback(betas=BETAS),
        module,
        lambda: (StatefulLoader(data, 4), DataLoader(data, 4)),
        log_every_n_steps=1,
    )


# -- state ------------------------------------------------------------------------------------------------------------


def test_the_curve_survives_a_checkpoint(tmp_path):
    callback = RateDistortionCallback(betas=BETAS, every_n_epochs=2)
    trainer = fit(multi_rate(), callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    torch.load(tmp_path / "end.ckpt", weights_only=True)
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(fresh.curve)

    fresh = RateDistortionCallback(betas=BETAS, every_n_epochs=2)
    again = Trainer(callbacks=[fresh, Look()], max_epochs=3, **QUIET)
    again.fit(multi_rate(), loader(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert seen[0].keys() == callback.curve.keys()
    assert all(
        torch.equal(
            seen[0][key],
            value,
        )
        or value.isnan().all()
        for key, value in callback.curve.items()
    )


def test_a_resumed_run_has_the_same_curve():
    data = TensorDataset(pixels(12))
    assert_resumes(
        multi_rate,
        lambda: (StatefulLoader(data, 4), DataLoader(data, 4)),
        lambda: [RateDistortionCallback(betas=BETAS)],
        checkpoint="epoch",
        crash_at=(1, 0),
    )


def test_two_callbacks_stand_side_by_side():
    first, second = RateDistortionCallback(betas=BETAS), RateDistortionCallback(num_betas=3)
    Trainer(callbacks=[first, second], **QUIET).validate(multi_rate(), loader(), verbose=False)
    assert (len(first.curve["beta"]), len(second.curve["beta"])) == (4, 3)


# -- processes --------------------------------------------------------------------------------------------------------


class Silent(MultiRateVAE):
    def noise(self, like):
        return torch.zeros_like(like)


@pytest.mark.ddp
def test_two_processes_measure_what_one_measures(tmp_path):
    def measured(folder, batch_size, **kwargs):
        torch.manual_seed(0)
        model, callback = multi_rate(cls=Silent), RateDistortionCallback(betas=BETAS, reference_point=[50.0, 50.0])
        trainer = Trainer(callbacks=[callback], default_root_dir=tmp_path / folder, **kwargs)
        metrics = trainer.validate(model, loader(16, batch_size), verbose=False)[0]
        with (tmp_path / folder / "rate_distortion" / "val_epoch=0.csv").open() as file:
            return metrics, [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    two, two_table = measured("two", 4, **ddp_trainer_kwargs())
    one, one_table = measured("one", 8, **QUIET)
    assert {row["count"] for row in two_table} == {16}
    for ours, expected in zip(two_table, one_table, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    for key in KEYS | {"mrvae/hypervolume"}:
        assert two[key] == pytest.approx(one[key], rel=1e-4, nan_ok=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_single_rate_module_is_refused():
    with pytest.raises(MisconfigurationException, match="needs a MultiRateVAE or a module with MultiRateMixin; got B"):
        fit(beta_vae(), RateDistortionCallback())


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_sharded_parameters_are_refused(name):
    strategies = submodule("strategies")
    trainer = types.SimpleNamespace(strategy=getattr(strategies, name)())
    with pytest.raises(MisconfigurationException, match=f"RateDistortionCallback does not work with {name}"):
        RateDistortionCallback().setup(trainer, multi_rate(), "fit")


def test_betas_outside_the_range_are_refused_before_training():
    callback = RateDistortionCallback(betas=[0.1, 20.0])
    with pytest.raises(ValueError, match=r"beta=20 is outside the trained range \[0.01, 10\]"):
        fit(multi_rate(), callback)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_betas must be at least 2, a curve needs two points; got 1"):
        RateDistortionCallback(num_betas=1)
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1; got 0"):
        RateDistortionCallback(every_n_epochs=0)


def test_betas_that_are_no_grid_are_refused_before_training():
    with pytest.raises(ValueError, match="ascending"):
        RateDistortionCallback(betas=[1.0, 0.1]).setup(types.SimpleNamespace(strategy=None), multi_rate(), "fit")
    for betas in ([], [0.5]):
        with pytest.raises(ValueError, match="a curve needs two points"):
            RateDistortionCallback(betas=betas)
    single = multi_rate(beta_range=(0.5, 0.5))
    with pytest.raises(MisconfigurationException, match="needs a range of beta"):
        RateDistortionCallback().setup(types.SimpleNamespace(strategy=None), single, "fit")


def test_a_module_that_logs_in_its_terms_keeps_its_own_values():
    class Logs(MultiRateVAE):
        def rate_distortion(self, batch):
            terms = super().rate_distortion(batch)
            self.log("my_rate", terms.rate.mean())
            return terms

    def run(*callbacks):
        torch.manual_seed(0)
        model = multi_rate(Logs)
        return Trainer(callbacks=list(callbacks), **QUIET).validate(model, loader(), verbose=False)[0]["my_rate"]

    assert run(RateDistortionCallback(betas=BETAS)) == run()


def test_an_unwritable_folder_costs_a_warning_not_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    callback = RateDistortionCallback(betas=BETAS, log_figure=False)
    options = {**QUIET, "default_root_dir": str(tmp_path / "file" / "below")}
    with pytest.warns(UserWarning, match="could not be written"):
        Trainer(callbacks=[callback], **options).validate(multi_rate(), loader(), verbose=False)
    assert callback.curve is not None


# -- KLSchedule -------------------------------------------------------------------------------------------------------


class Record(Callback):
    def __init__(self, attribute="beta"):
        self.attribute, self.epochs, self.steps, self.logged = attribute, [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(getattr(pl_module, self.attribute))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(getattr(pl_module, self.attribute))

    def on_train_end(self, trainer, pl_module):
        self.logged.append(trainer.callback_metrics.get("mrvae/kl_weight"))


SCHEDULES = {
    "constant": [1.0] * 20,
    "monotonic": [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6] + [1] * 14,
    "cyclical": [0, 0.4, 0.8, 1, 1] * 4,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_sets_the_weight_of_each_epoch(schedule):
    record = Record()
    trainer = Trainer(callbacks=[KLSchedule(schedule, target=0.5), record], max_epochs=20, **QUIET)
    trainer.fit(beta_vae(beta=7.0), DataLoader(TensorDataset(pixels(4)), 2))
    assert record.epochs == pytest.approx([0.5 * weight for weight in SCHEDULES[schedule]], abs=1e-8)
    assert record.steps[::2] == record.epochs, "constant within an epoch"
    assert trainer.callback_metrics["mrvae/kl_weight"].item() == pytest.approx(record.epochs[-1])


@pytest.mark.parametrize("limit", [{"max_epochs": 5}, {"max_steps": 10}])
def test_a_schedule_may_follow_steps(limit):
    record = Record()
    schedule = KLSchedule("monotonic", warmup_fraction=0.5, interval="step")
    trainer = Trainer(callbacks=[schedule, record], **limit, **QUIET)
    trainer.fit(beta_vae(), DataLoader(TensorDataset(pixels(4)), 2))
    assert record.steps == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1], abs=1e-8)


def test_the_loss_uses_the_scheduled_weight():
    losses = []
    model = beta_vae(distortion="gaussian")
    inner = model.loss
    model.loss = lambda terms: losses.append((model.beta, terms, inner(terms))) or losses[-1][2]
    Trainer(callbacks=[KLSchedule("cyclical", target=3.0)], max_epochs=4, **QUIET).fit(
        model, DataLoader(TensorDataset(pixels(4)), 4)
    )
    for beta, terms, loss in losses:
        torch.testing.assert_close(loss, (terms.distortion + beta * terms.rate).mean())


def test_hold_trains_at_one_beta_first():
    record = Record("fixed_beta")
    hold = KLSchedule("hold", target=0.05, attribute="fixed_beta", warmup_fraction=0.5)
    model = multi_rate()
    trainer = Trainer(callbacks=[hold, record], max_epochs=4, **QUIET)
    drawn = []
    inner = model.sample_betas
    model.sample_betas = lambda *args: drawn.append(inner(*args)) or drawn[-1]
    trainer.fit(model, DataLoader(TensorDataset(pixels(4)), 4))
    assert record.epochs == [0.05, 0.05, None, None]
    assert [len(betas.unique()) for betas in drawn] == [1, 1, 4, 4]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_scheduled_training_resumes(interval):
    data = TensorDataset(pixels(12))
    assert_resumes(
        beta_vae,
        lambda: StatefulLoader(data, 4),
        lambda: [KLSchedule("monotonic", warmup_fraction=1.0, interval=interval)],
        checkpoint="epoch",
        crash_at=(2, 0),
        max_epochs=3,
    )


def test_a_module_without_the_attribute_is_refused():
    with pytest.raises(MisconfigurationException, match=r"KLSchedule sets BetaVAE.kl_coeff, which does not exist"):
        fit(beta_vae(), KLSchedule(attribute="kl_coeff"))


@pytest.mark.parametrize(
    ("interval", "limit"), [("epoch", {"max_epochs": -1, "max_steps": 5}), ("step", {"max_epochs": -1})]
)
def test_a_training_without_an_end_is_refused(interval, limit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(callbacks=[KLSchedule(interval=interval)], **limit, **QUIET)
    with pytest.raises(MisconfigurationException, match="KLSchedule counts from the end of the training"):
        trainer.fit(beta_vae(), loader())


def test_bad_schedules_are_named():
    for kwargs, message in (
        ({"schedule": "linear"}, "schedule must be 'monotonic', 'cyclical', 'constant' or 'hold'; got 'linear'"),
        ({"interval": "batch"}, "interval must be 'epoch' or 'step'; got 'batch'"),
        ({"target": -1.0}, "target must be at least 0; got -1.0"),
        ({"warmup_fraction": 0.0}, r"warmup_fraction must be in \(0, 1\]; got 0.0"),
        ({"ramp_fraction": 1.5}, r"ramp_fraction must be in \(0, 1\]; got 1.5"),
        ({"num_cycles": 0}, "num_cycles must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            KLSchedule(**kwargs)


def test_two_schedules_of_two_attributes_stand_side_by_side():
    model = multi_rate()
    model.other = 0.0
    callbacks = [KLSchedule("constant", attribute="other"), KLSchedule("hold", target=0.05, attribute="fixed_beta")]
    seen = []
    watch = types.SimpleNamespace()
    watch.training_step, model.training_step = (
        model.training_step,
        lambda *a: (
            seen.append(model.fixed_beta),
            watch.training_step(*a),
        )[1],
    )
    Trainer(callbacks=callbacks, max_epochs=1, **QUIET).fit(model, loader())
    assert set(seen) == {0.05}
    assert (model.other, model.fixed_beta) == (1.0, None)  # a hold that the training did not outlast is over too


def test_epochs_are_counted_to_the_limit_that_comes_first():
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(pl_module.beta)

    watch = Watch()
    model = BetaVAE(MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6]), input_shape=[6], distortion="gaussian")
    batches = len(loader())
    schedule = KLSchedule("monotonic", warmup_fraction=0.5)
    options = {**QUIET, "max_epochs": 1000, "max_steps": 4 * batches}
    Trainer(callbacks=[schedule, watch], **options).fit(model, loader())
    assert watch.seen == [0.0, 0.5, 1.0, 1.0]


def test_a_beta_outside_the_range_is_not_trained():
    for target in (0.0, 100.0):
        schedule = KLSchedule("constant", target=target, attribute="fixed_beta")
        with pytest.raises(ValueError, match=r"fixed_beta=.* is outside the range"):
            Trainer(callbacks=[schedule], max_epochs=1, **QUIET).fit(multi_rate(), loader())
