"""The callback beside trainings of its own library and of others: values, early stopping, resumption, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, pl
from lightning_ext.callbacks import MutualInformationCallback
from lightning_ext.modules import BetaVAE, measure_mutual_information
from lightning_ext.nn import GaussianDecoderModel, MLPDecoder, MLPEncoder, latent_model_from_vae

SMALL = {"num_points": 8, "num_samples": 20, "num_chains": 3, "num_steps": 5, "num_leapfrog": 2}
KEYS = {f"mutual_information/{bound}/{side}{end}" for bound in ("iwae", "ais") for side in ("lower", "upper", "gap")
        for end in ("", "_stderr")} | {f"mutual_information/ais/{name}" for name in
                                       ("accept", "divergent", "ess", "step_size")}  # fmt: skip


def vae(**options):
    torch.manual_seed(0)
    return BetaVAE(MLPEncoder([9], [8], 2), MLPDecoder(2, [8], [9]), input_shape=[9], lr=0.01, **options)


class Foreign(LightningModule):
    """A VAE that nobody here wrote, with dropout and batch normalisation in its decoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(9, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 9))
        self.log_var = nn.Parameter(torch.tensor(-1.0))

    def training_step(self, batch, batch_idx):
        mean, log_var = self.encoder(batch[0]).chunk(2, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return (self.decoder(z) - batch[0]).square().mean() + 0 * self.log_var

    def validation_step(self, batch, batch_idx):
        self.log("seen", float(len(batch[0])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    return DataLoader(TensorDataset((torch.rand(12, 9, generator=torch.Generator().manual_seed(1)) > 0.5).float()), 4)


def trainer(tmp_path, *callbacks, **options):
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, default_root_dir=tmp_path, callbacks=list(callbacks),
        **(defaults | options),
    )  # fmt: skip


def adapter(module):
    return GaussianDecoderModel(module.decoder, module.log_var, latent_dim=2)


def test_it_logs_what_is_measured_of_the_model_as_it_is(tmp_path):
    module, measure = vae(), MutualInformationCallback(**SMALL)
    runs = trainer(tmp_path, measure)
    runs.fit(module, loader(), loader())
    assert {key for key in runs.callback_metrics if key.startswith("mutual_information/")} == KEYS
    by_hand = measure_mutual_information(latent_model_from_vae(module.eval()), **SMALL).values
    for key, value in measure.result.items():
        assert value == pytest.approx(by_hand[key.removeprefix("mutual_information/")].item(), rel=1e-5), key
        assert runs.callback_metrics[key].item() == pytest.approx(value, rel=1e-5)


def test_a_module_nobody_here_wrote_is_measured_in_eval_mode_and_left_as_it_was(tmp_path):
    class Modes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            assert all(part.training for part in pl_module.modules())

    plain, watched = Foreign(), Foreign()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    for module, extra in ((plain, []), (watched, [MutualInformationCallback(adapter, **SMALL), Modes()])):
        pl.seed_everything(3)
        trainer(tmp_path, *extra).fit(module, loader(), loader())
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_early_stopping_and_checkpoints_can_go_by_it(tmp_path):
    stop = pl.callbacks.EarlyStopping("mutual_information/ais/lower", mode="max", patience=0, min_delta=100.0)
    runs = trainer(
        tmp_path, MutualInformationCallback(bounds=["ais"], **{**SMALL, "num_samples": 1}), stop, max_epochs=9
    )
    runs.fit(vae(), loader(), loader())
    assert runs.current_epoch == 2


def test_epochs_stages_and_sanity_checks(tmp_path):
    calls = []

    class Counting(MutualInformationCallback):
        def _measure(self, trainer, pl_module):
            calls.append(trainer.current_epoch)

    trainer(tmp_path, Counting(every_n_epochs=2, **SMALL), max_epochs=5, num_sanity_val_steps=1).fit(
        vae(), loader(), loader()
    )
    assert calls == [1, 3]
    calls.clear()
    runs = trainer(tmp_path, Counting(stage="test", **SMALL))
    runs.fit(vae(), loader(), loader())
    assert not calls
    runs.test(vae(), loader(), verbose=False)
    assert len(calls) == 1
    runs = trainer(tmp_path, Counting(every_n_epochs=7, **SMALL))
    runs.validate(vae(), loader(), verbose=False)
    assert len(calls) == 2


def test_the_result_is_in_the_checkpoint(tmp_path):
    measure = MutualInformationCallback(**SMALL)
    runs = trainer(tmp_path, measure)
    runs.fit(vae(), loader(), loader())
    runs.save_checkpoint(path := tmp_path / "last.ckpt")
    again = MutualInformationCallback(**SMALL)
    trainer(tmp_path, again, max_epochs=2).fit(vae(), loader(), loader(), ckpt_path=path, weights_only=True)
    assert again.result == measure.result


def test_the_same_model_measures_the_same_in_every_epoch(tmp_path):
    found = []

    class Noting(MutualInformationCallback):
        def on_validation_epoch_end(self, trainer, pl_module):
            super().on_validation_epoch_end(trainer, pl_module)
            found.append(copy.deepcopy(self.result))

    runs = trainer(tmp_path, Noting(**SMALL), num_sanity_val_steps=0)
    module = vae()
    module.lr = 0.0
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    module.on_train_start = lambda: None
    runs.fit(module, loader(), loader())
    assert len(found) == 2
    assert found[0] == found[1]


def test_a_figure_goes_to_loggers_that_take_one(tmp_path):
    pytest.importorskip("tensorboard")
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    seen = []
    logger.experiment.add_figure = lambda tag, figure, global_step: seen.append((tag, global_step))
    trainer(tmp_path, MutualInformationCallback(**SMALL), logger=logger, log_every_n_steps=1, max_epochs=1).fit(
        vae(), loader(), loader()
    )
    assert [tag for tag, _ in seen] == ["mutual_information/bounds"]


def test_modules_it_knows_nothing_of_are_refused_by_name(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"likelihood of Foreign: pass adapter=lambda module"):
        trainer(tmp_path, MutualInformationCallback(**SMALL)).fit(Foreign(), loader(), loader())
    with pytest.raises(MisconfigurationException, match="adapter must return a LatentModel; got Sequential"):
        trainer(tmp_path, MutualInformationCallback(lambda module: module.decoder, **SMALL)).fit(
            Foreign(), loader(), loader()
        )
    own = Foreign()
    own.latent_model = lambda: adapter(own)
    measure = MutualInformationCallback(**SMALL)
    trainer(tmp_path, measure).fit(own, loader(), loader())
    assert measure.result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1; got 0"),
        ({"stage": "fit"}, "stage must be 'validate' or 'test'; got 'fit'"),
        ({"adapter": "decoder"}, "adapter must be a function of the module; got str"),
        ({"bounds": ["giwae"]}, "bounds must be some of"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MutualInformationCallback(**options)


def test_a_fit_without_validation_is_told_of(tmp_path):
    with pytest.warns(UserWarning, match=r"measures when a validation ends, and this fit has none.*validation_step"):
        trainer(tmp_path, MutualInformationCallback(adapter, **SMALL), max_epochs=1).fit(Foreign(), loader())


def test_a_fit_in_which_nothing_was_measured_is_told_of(tmp_path):
    callback = MutualInformationCallback(adapter, **SMALL, every_n_epochs=2)
    with pytest.warns(UserWarning, match=r"measured nothing in this fit.*every_n_epochs=2"):
        trainer(tmp_path, callback, max_epochs=1).fit(Foreign(), loader(), loader())


def test_two_of_them_need_names(tmp_path):
    wide, narrow = (
        MutualInformationCallback(
            lambda module, v=v: GaussianDecoderModel(module.decoder, v, latent_dim=2), **SMALL, name=name
        )
        for v, name in ((0.0, "mutual_information"), (-4.0, "narrow"))
    )
    run = trainer(tmp_path, wide, narrow, max_epochs=1)
    run.fit(Foreign(), loader(), loader())
    assert run.callback_metrics["narrow/iwae/upper"] > run.callback_metrics["mutual_information/iwae/upper"]
    assert set(narrow.result) == {key.replace("mutual_information", "narrow") for key in wide.result}
    narrow.name = "mutual_information"
    narrow.options = copy.copy(narrow.options)
    narrow.seed = 1
    with pytest.warns(UserWarning, match=r"several .* log as 'mutual_information': .* their mean.*name="):
        trainer(tmp_path, wide, narrow, max_epochs=1).fit(Foreign(), loader(), loader())


def test_a_module_in_half_precision_is_measured_as_a_wide_copy(tmp_path):
    module, callback = Foreign(), MutualInformationCallback(adapter, **SMALL)
    trainer(tmp_path, callback, precision="bf16-true").validate(module, loader(), verbose=False)
    assert module.decoder[0].weight.dtype == torch.bfloat16
    model = adapter(copy.deepcopy(module).float().eval())
    expected = measure_mutual_information(model, **SMALL).values
    assert callback.result["mutual_information/ais/lower"] == float(expected["ais/lower"])
