"""What all VAEs share: terms of the loss, networks of any kind, checks of the input, optimizer, logging."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Trainer
from lightning_ext.functional.mrvae import bernoulli_distortion, gaussian_distortion, gaussian_kl
from lightning_ext.modules import BaseVAE, BetaVAE, RateDistortion
from lightning_ext.nn import LadderDecoder, LadderEncoder, MLPDecoder, MLPEncoder
from lightning_ext.testing import StatefulLoader, assert_resumes

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


def vae(encoder=None, decoder=None, input_shape=(6,), **kwargs):
    encoder, decoder = encoder or MLPEncoder([6], [5], 2), decoder or MLPDecoder(2, [5], [6])
    return BetaVAE(encoder, decoder, input_shape=input_shape, **kwargs)


def ladder(**kwargs):
    networks = LadderEncoder([6], 5), LadderDecoder(5, [2, 3], [6])
    return vae(*networks, objective="hierarchical", **kwargs)


def pixels(n=8):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(1))


# -- terms ------------------------------------------------------------------------------------------------------------

DISTORTIONS = {
    "bernoulli_logits": bernoulli_distortion,
    "gaussian": gaussian_distortion,
    "sse": lambda y, x: 2 * gaussian_distortion(y, x),
}


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_rate_and_distortion_of_each_sample(distortion):
    model, x = vae(distortion=distortion, seed=3).double(), pixels().double()
    model.set_address("train", 4)
    terms = model.rate_distortion(x)
    model.set_address("train", 4)
    mu, logvar = model.encoder(x)
    z = mu + (logvar / 2).exp() * model.noise(mu)
    torch.testing.assert_close(terms.rate, gaussian_kl(mu, logvar).sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.distortion, DISTORTIONS[distortion](model.decoder(z), x), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.mu, mu)
    assert (terms.weighted, terms.fixed) == (None, None)


def test_probabilities_instead_of_logits():
    decoder = nn.Sequential(MLPDecoder(2, [5], [6]), nn.Sigmoid())
    model, x = vae(decoder=decoder, distortion="bernoulli", seed=3), pixels()
    logits = vae(model.encoder, decoder[0], seed=3)
    torch.testing.assert_close(model.rate_distortion(x).distortion, logits.rate_distortion(x).distortion)
    torch.testing.assert_close(model(x), logits(x))


def test_a_distortion_of_your_own():
    model = vae(distortion=lambda y, x: (y - x).abs().sum(1))
    assert model.rate_distortion(pixels()).distortion.shape == (8,)


def test_loss_weights_the_rate_unless_told_otherwise():
    rate, distortion, other = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([5.0, 7.0])
    assert RateDistortion(rate, distortion).loss(0.5).tolist() == [10.5, 21.0]
    assert RateDistortion(rate, distortion).loss(torch.tensor([0.0, 2.0])).tolist() == [10.0, 24.0]
    assert RateDistortion(rate, distortion, weighted=other).loss(0.5).tolist() == [12.5, 23.5]
    assert RateDistortion(rate, distortion, weighted=other, fixed=rate).loss(2.0).tolist() == [11.0, 16.0]


def test_total_correlation_splits_the_monte_carlo_rate():
    model, x = vae(objective="tcvae", dataset_size=500, seed=3).double(), pixels().double()
    model.set_address("train", 0)
    terms = model.rate_distortion(x)
    model.set_address("train", 0)
    mu, logvar = model.encoder(x)
    z = mu + (logvar / 2).exp() * model.noise(mu)
    sampled = (Normal(mu, (logvar / 2).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
    torch.testing.assert_close(terms.loss(1.0), terms.distortion + sampled, rtol=1e-11, atol=1e-11)
    assert (terms.loss(3.0) - terms.loss(1.0) - 2 * terms.weighted).abs().max() < 1e-11
    torch.testing.assert_close(terms.rate, gaussian_kl(mu, logvar).sum(1))


def test_hierarchical_rate_is_the_sum_over_all_groups():
    model, x = ladder(seed=3), pixels()
    model.set_address("train", 0)
    terms = model.rate_distortion(x)
    model.set_address("train", 0)
    picture, groups = model.decoder(model.encoder(x), model.noise)
    torch.testing.assert_close(terms.rate, groups[0] + groups[1])
    torch.testing.assert_close(terms.distortion, bernoulli_distortion(picture, x))
    assert terms.mu is None
    assert model(x).shape == (8, 6)
    assert model.sample(3).shape == (3, 6)
    assert model.latent_dim is None


def test_reconstructions_and_samples_live_in_data_space():
    model, x = vae(), pixels()
    torch.testing.assert_close(model(x), torch.sigmoid(model.decoder(model.encoder(x)[0])))
    assert model.sample(5).shape == (5, 6)
    assert 0 < model.sample(5).min() < model.sample(5).max() < 1
    gaussian = vae(distortion="gaussian")
    torch.testing.assert_close(gaussian(x), gaussian.decoder(gaussian.encoder(x)[0]))


@pytest.mark.parametrize("batch", ["tensor", "tuple", "list"])
def test_batches_of_the_usual_kinds(batch):
    x, labels = pixels(), torch.zeros(8)
    kinds = {"tensor": x, "tuple": (x, labels), "list": [x, labels]}
    assert vae().get_input(kinds[batch]) is x


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 6)}, ("name", torch.zeros(2, 6)), [], None])
def test_other_batches_are_refused_by_the_method_to_override(batch):
    message = rf"a batch of type {type(batch).__name__} has no obvious data tensor: override get_input\(batch\)"
    with pytest.raises(TypeError, match=message):
        vae().get_input(batch)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_networks_are_tried_without_changing_them():
    encoder, decoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), MLPDecoder(2, [5], [6])
    encoder[1].eval()
    before, random_state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    model = vae(encoder, decoder)
    assert model.latent_dim == 2
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert [m.training for m in encoder] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("broken", ["encoder", "decoder"])
def test_networks_that_do_not_fit_are_named(broken):
    if broken == "encoder":
        with pytest.raises(ValueError, match=r"one tensor of shape \(2, 3\), which does not split into mu and logvar"):
            vae(nn.Linear(6, 3))
    else:
        with pytest.raises(ValueError, match=r"the decoder returned shape \(7,\) for input_shape=\(6,\)"):
            vae(decoder=MLPDecoder(2, [5], [7]))


def test_bad_arguments_are_named():
    for kwargs, message in (
        ({"distortion": "mse"}, "distortion must be one of bernoulli_logits, .* or a callable; got 'mse'"),
        ({"objective": "vaes"}, "objective must be 'vae', 'tcvae' or 'hierarchical'; got 'vaes'"),
        ({"objective": "tcvae"}, "objective='tcvae' needs dataset_size, .*; got None"),
        ({"objective": "tcvae", "dataset_size": 0}, "needs dataset_size, .*; got 0"),
        ({"lr": 0.0}, "lr must be positive; got 0.0"),
        ({"lr": math.nan}, "lr must be positive; got nan"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must be in \[0, 1\); got 1.0"),
        ({"warmup_fraction": -0.1}, r"warmup_fraction must be in \[0, 1\); got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            vae(**kwargs)


@pytest.mark.parametrize("distortion", ["bernoulli_logits", "bernoulli"])
@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_bernoulli_targets_outside_the_unit_interval_are_refused(distortion, value):
    x = pixels()
    x[3, 2] = value
    model = vae(distortion=distortion)
    with pytest.raises(ValueError, match=rf"distortion='{distortion}' needs data in \[0, 1\]; this batch spans"):
        model.rate_distortion(x)
    vae(distortion="gaussian").rate_distortion(x)


def test_a_distortion_that_averages_over_pixels_warns():
    with pytest.warns(UserWarning, match="distortion seems to average over pixels"):
        vae(MLPEncoder([16], [5], 2), MLPDecoder(2, [5], [16]), (16,), distortion=lambda y, x: (y - x).square().mean(1))


@pytest.mark.parametrize("distortion", [bernoulli_distortion, gaussian_distortion, "gaussian", "bernoulli_logits"])
def test_a_distortion_that_sums_does_not_warn(distortion):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vae(MLPEncoder([16], [5], 2), MLPDecoder(2, [5], [16]), (16,), distortion=distortion)


def test_a_distortion_reduced_over_the_batch_is_refused():
    model = vae(distortion=lambda y, x: (y - x).square().sum())
    with pytest.raises(ValueError, match=r"one number per sample, shape \(8,\); got \(\)"):
        model.rate_distortion(pixels())


def test_a_subclass_says_what_the_loss_is():
    model = BaseVAE(MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6]), [6])
    with pytest.raises(NotImplementedError, match=r"BaseVAE must implement loss\(terms\)"):
        model.loss(RateDistortion(torch.zeros(1), torch.zeros(1)))


# -- training ---------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    model = vae(lr=0.5, warmup_fraction=0.25)
    rates = []
    model.on_train_batch_start = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    trainer = Trainer(max_epochs=5, **QUIET)
    trainer.fit(model, DataLoader(pixels(8), 2))
    rises = [0.5 * (step + 1) / 6 for step in range(5)]
    falls = [0.25 * (1 + math.cos(math.pi * step / 15)) for step in range(15)]
    assert rates == pytest.approx(rises + falls, rel=1e-9)


def test_without_an_end_the_learning_rate_stays():
    model = vae(lr=0.5, warmup_fraction=0.25)
    trainer = Trainer(max_epochs=-1, max_steps=-1, **QUIET)
    trainer.should_stop = False
    rates = []

    def stop(*_):
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        trainer.should_stop = len(rates) >= 6

    model.on_train_batch_start = stop
    trainer.fit(model, DataLoader(pixels(8), 2))
    assert set(rates) == {0.5}


def test_a_run_that_is_resumed_for_longer_follows_the_longer_schedule(tmp_path):
    def rates(model, max_epochs, **kwargs):
        seen = []
        model.on_train_batch_start = lambda *_: seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        trainer = Trainer(max_epochs=max_epochs, **QUIET)
        trainer.fit(model, DataLoader(pixels(8), 4), **kwargs)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return seen

    whole = rates(vae(lr=0.5), 6)
    rates(vae(lr=0.5), 2)
    assert rates(vae(lr=0.5), 6, ckpt_path=tmp_path / "end.ckpt") == pytest.approx(whole[4:], rel=1e-9)
    assert whole[4] > 0.1


def test_scheduler_pickles():
    trainer = Trainer(max_epochs=1, **QUIET)
    model = vae()
    trainer.fit(model, DataLoader(pixels(), 4))
    schedule = pickle.loads(pickle.dumps(trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]))
    assert schedule(0) == trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0](0)


def test_logged_keys_and_values():
    model, data = vae(beta=0.3, seed=1), DataLoader(TensorDataset(pixels()), 4)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, data, data)
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "rate", "distortion")}
    assert set(trainer.callback_metrics) == expected
    metrics = trainer.validate(model, data, verbose=False)[0]
    assert metrics["val/loss"] == pytest.approx(metrics["val/distortion"] + 0.3 * metrics["val/rate"], rel=1e-5)
    by_hand = []
    with torch.no_grad():
        for index, (x,) in enumerate(data):
            model.set_address("val", index)
            by_hand.append(model.rate_distortion(x).rate)
    assert metrics["val/rate"] == pytest.approx(torch.cat(by_hand).mean().item(), rel=1e-5)
    assert set(trainer.test(model, data, verbose=False)[0]) == {"test/loss", "test/rate", "test/distortion"}


def test_predictions_are_reconstructions():
    model = vae()
    (prediction,) = Trainer(**QUIET).predict(model, DataLoader(TensorDataset(pixels()), 8))
    torch.testing.assert_close(prediction, model(pixels()))


@pytest.mark.parametrize(
    "build", [vae, ladder, lambda: vae(objective="tcvae", dataset_size=8)], ids=["vae", "ladder", "tc"]
)
@pytest.mark.parametrize(("checkpoint", "crash_at"), [("step", (1, 1)), ("epoch", (1, 0))])
def test_a_resumed_training_is_bit_equal(build, checkpoint, crash_at):
    data = TensorDataset(pixels(12))
    assert_resumes(build, lambda: StatefulLoader(data, 4), checkpoint=checkpoint, crash_at=crash_at)


def test_hyperparameters_rebuild_the_model(tmp_path):
    model = vae(beta=0.3, distortion="gaussian", lr=0.01, seed=4)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, DataLoader(pixels(), 4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    hyper = torch.load(tmp_path / "end.ckpt", weights_only=True)["hyper_parameters"]
    assert hyper["beta"] == 0.3
    assert not {"encoder", "decoder"} & set(hyper)
    loaded = BetaVAE.load_from_checkpoint(
        tmp_path / "end.ckpt", encoder=MLPEncoder([6], [5], 2), decoder=MLPDecoder(2, [5], [6])
    )
    assert (loaded.beta, loaded.distortion, loaded.lr) == (0.3, "gaussian", 0.01)
    assert torch.equal(loaded(pixels()), model(pixels()))


# -- shapes that would broadcast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rate", "distortion", "weighted", "fixed"])
def test_terms_are_one_number_per_sample(name):
    terms = {"rate": torch.zeros(3), "distortion": torch.zeros(3), name: torch.zeros(3, 1)}
    with pytest.raises(ValueError, match="one number per sample"):
        RateDistortion(**terms)


def test_a_spatial_latent_code_is_refused():
    encoder = torch.nn.Sequential(torch.nn.Unflatten(1, (6, 1, 1)), torch.nn.Conv2d(6, 4, 1))
    with pytest.raises(ValueError, match=r"must have shape \(B, k\); got \(2, 2, 1, 1\)"):
        BetaVAE(encoder, torch.nn.Flatten(), input_shape=[6])


def test_a_sigmoid_before_logits_is_noticed():
    decoder = torch.nn.Sequential(MLPDecoder(2, [5], [6]), torch.nn.Sigmoid())
    with pytest.warns(UserWarning, match="look like probabilities"):
        BetaVAE(MLPEncoder([6], [5], 2), decoder, input_shape=[6])


def test_a_mean_of_cross_entropies_is_noticed():
    def mean(y, x):
        return torch.nn.functional.binary_cross_entropy(y.clamp(0, 1), x, reduction="none").mean(1)

    with pytest.warns(UserWarning, match="average over pixels"):
        BetaVAE(MLPEncoder([16], [5], 2), MLPDecoder(2, [5], [16]), input_shape=[16], distortion=mean)


def test_a_seed_that_is_given_wins_over_the_checkpoint():
    model = BetaVAE(MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6]), input_shape=[6], seed=7)
    model.on_load_checkpoint({"lightning_ext_seed": 1})
    assert model.seed == 7
