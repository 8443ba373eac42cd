"""The multi-rate VAE: what is optimised, what a beta means, and that processes, crashes and precision do not matter."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ext._lightning import Callback, LightningDataModule, LightningModule, Trainer, submodule
from lightning_ext.functional import linear_vae_optimum
from lightning_ext.functional.mrvae import bernoulli_distortion, gaussian_kl
from lightning_ext.modules import BetaVAE, MultiRateMixin, MultiRateVAE, RateDistortion
from lightning_ext.nn import LadderDecoder, LadderEncoder, LogUniformBeta, MLPDecoder, MLPEncoder, RateFiLM, RateGate
from lightning_ext.testing import StatefulLoader, assert_resumes, ddp_trainer_kwargs

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
MEAN_BETA = 9.99 / math.log(1000)


def networks(extra=0):
    return MLPEncoder([6 + extra], [5], 2), MLPDecoder(2 + extra, [5], [6])


def multi_rate(pair=None, cls=MultiRateVAE, **kwargs):
    return cls(*(pair or networks()), input_shape=[6], **{"seed": 3, "lr": 0.01, **kwargs})


def ladder():
    return LadderEncoder([6], 5), LadderDecoder(5, [2, 3], [6])


def pixels(n=8):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(1))


def loader(n=8, batch_size=4):
    return DataLoader(TensorDataset(pixels(n)), batch_size)


def move_gates(model, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rate_gate" in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def fit(model, data=None, callbacks=(), **kwargs):
    trainer = Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 2, **kwargs})
    trainer.fit(model, data or loader())
    return trainer


class Steps(Callback):
    """Losses and gradients of every step."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(named)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


# -- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_a_range_of_one_point_and_frozen_gates_are_a_beta_vae(beta):
    """Equal to the last bit at every step: drawing a beta must not shift the noise."""
    pair = networks()
    twin = copy.deepcopy(pair)
    model = multi_rate(pair, beta_range=(beta, beta))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("rate_gate" not in name)
    ours, theirs = Steps(), Steps()
    fit(model, loader(16), [ours], max_epochs=3)
    plain = BetaVAE(*twin, input_shape=[6], beta=beta, seed=3, lr=0.01)
    fit(plain, loader(16), [theirs], max_epochs=3)
    assert len(ours.losses) == 12
    assert ours.losses == theirs.losses
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert ours.losses[0] != pytest.approx(ours.losses[-1], rel=1e-2)


@pytest.mark.parametrize("sampling", ["stratified", "sample", "batch"])
def test_identity_gates_give_the_gradient_of_the_mean_weighted_loss(sampling):
    """The gradient is that of mean_i(D_i + beta_i R_i) on the plain networks, at the betas drawn for the step."""
    pair = networks()
    plain = nn.ModuleDict(dict(zip(("encoder", "decoder"), copy.deepcopy(pair), strict=True)))
    model, steps, x = multi_rate(pair, beta_sampling=sampling), Steps(), pixels()
    fit(model, DataLoader(TensorDataset(x), 8), [steps], max_epochs=1)
    model = multi_rate(networks(), beta_sampling=sampling)  # the same seed, so the same betas and noise
    model.set_address("train", 0)
    betas = model.sample_betas(8, "train", 0)
    assert len(betas.unique()) == (1 if sampling == "batch" else 8)
    mu, logvar = plain.encoder(x)
    reconstruction = plain.decoder(mu + (logvar / 2).exp() * model.noise(mu))
    losses = bernoulli_distortion(reconstruction, x) + betas * gaussian_kl(mu, logvar).sum(1)
    losses.mean().backward()
    assert steps.losses[0] == pytest.approx(losses.mean().item(), rel=1e-6)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(steps.gradients[0][name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_in_expectation_the_gradient_is_that_at_the_mean_beta():
    model, x = multi_rate().double(), pixels().double()
    weights = [p for n, p in model.named_parameters() if "rate_gate" not in n]
    model.set_address("train", 0)
    with model.at(1.0):  # gates are at the identity: any beta gives these terms
        terms = model.rate_distortion(x)
    draws = torch.stack([model.beta_prior.sample(8, 0, step) for step in range(600)]).double()
    assert draws.mean().item() == pytest.approx(1.446200, abs=0.01)
    # The loss is linear in beta, so the gradient at the average draw is the average of the gradients.
    ours = torch.autograd.grad(terms.loss(draws.mean(0)).mean(), weights, retain_graph=True)
    expected = torch.autograd.grad((terms.distortion + MEAN_BETA * terms.rate).mean(), weights)
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=0.06 * float(reference.abs().max()))


def test_total_correlation_at_beta_one_is_the_monte_carlo_loss():
    model = move_gates(multi_rate(objective="tcvae", dataset_size=100, beta_sampling="batch").double())
    x = pixels().double()
    model.set_address("train", 0)
    with model.at(1.0):
        loss = model.rate_distortion(x).loss(1.0)
    model.set_address("train", 0)
    with model.at(1.0):
        mu, logvar = model.encode(x)
        z = mu + (logvar / 2).exp() * model.noise(mu)
        rate = (Normal(mu, (logvar / 2).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
        expected = bernoulli_distortion(model.decode(z), x) + rate
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


def test_total_correlation_of_mixed_betas_warns():
    with pytest.warns(UserWarning, match="whose samples sit at different betas: beta_sampling='batch'"):
        multi_rate(objective="tcvae", dataset_size=100)


def test_a_linear_model_never_beats_the_closed_form():
    """Trained on Gaussian data it comes near the optimum for every beta, and is never below it."""
    spectrum = torch.tensor([6, 3, 1.5, 0.8, 0.4, 0.2, 0.1, 0.05])
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    x = torch.randn(16_000, 8, generator=generator) * spectrum.sqrt() @ rotation
    convert = {"encoder_activation": "sqrt", "log_variance": "add", "gate_output": True}
    model = MultiRateVAE(
        MLPEncoder([8], [], 5), MLPDecoder(5, [], [8]), [8], distortion="gaussian", lr=0.05, seed=0, convert=convert
    )
    fit(model, DataLoader(TensorDataset(x), 64), max_epochs=1, max_steps=250)
    held_out = x[8000:]
    centred = (held_out - held_out.mean(0)).double()
    covariance = centred.T @ centred / len(centred)
    excess = []
    for beta in LogUniformBeta().grid(9):
        losses = []
        for draw in range(8):
            model.set_address("val", draw)
            with model.at(beta), torch.no_grad():
                losses.append(model.rate_distortion(held_out).loss(beta).double().mean())
        losses = torch.stack(losses)
        best = linear_vae_optimum(covariance, 5, beta)
        # The covariance of these very samples makes the bound exact; what is left is the noise of z.
        error = 4 * losses.std().item() / 8**0.5
        excess.append(losses.mean().item() - float(best.distortion + beta * best.rate))
        assert excess[-1] > -error
        assert error < 0.1
    assert sum(excess) / len(excess) < 0.35, excess


# -- betas ------------------------------------------------------------------------------------------------------------


def test_betas_follow_epoch_and_batch_and_evaluation_repeats_them():
    class Betas(MultiRateVAE):
        def sample_betas(self, num, stage, batch_idx):
            betas = super().sample_betas(num, stage, batch_idx)
            drawn.setdefault((stage, self.current_epoch, batch_idx), betas)
            return betas

    drawn = {}
    model, data = multi_rate(cls=Betas), loader()
    Trainer(max_epochs=2, num_sanity_val_steps=0, **QUIET).fit(model, data, data)
    training = [betas for (stage, *_), betas in drawn.items() if stage == "train"]
    assert len(training) == 4
    assert len(torch.stack(training).unique(dim=0)) == 4
    for batch in range(2):
        assert torch.equal(drawn["val", 0, batch], drawn["val", 1, batch])
    for betas in drawn.values():
        u = (LogUniformBeta().standardize(betas.double()) / math.sqrt(3) + 1) / 2
        assert (u * 4).floor().sort().values.tolist() == [0, 1, 2, 3]


def test_independent_and_single_betas():
    sample, batch = multi_rate(beta_sampling="sample"), multi_rate(beta_sampling="batch")
    assert len(sample.sample_betas(8, "train", 0).unique()) == 8
    assert len(batch.sample_betas(8, "train", 0).unique()) == 1
    assert batch.sample_betas(8, "train", 0)[0] != batch.sample_betas(8, "train", 1)[0]
    for model in (sample, batch):
        u = (LogUniformBeta().standardize(model.sample_betas(64, "val", 0).double()) / math.sqrt(3) + 1) / 2
        assert (u * 64).floor().sort().values.tolist() == list(range(64)), "an evaluation covers the whole range"


def test_a_fixed_beta_holds_for_training_only():
    model = multi_rate()
    model.fixed_beta = 0.05
    assert model.sample_betas(4, "train", 0).tolist() == pytest.approx([0.05] * 4)
    assert len(model.sample_betas(4, "val", 0).unique()) == 4


def test_loss_by_beta_is_logged_in_thirds():
    model = multi_rate()
    trainer = fit(model, loader(16, 8), max_epochs=1, log_every_n_steps=1)
    expected = {f"train/{name}" for name in ("loss", "rate", "distortion")}
    expected |= {f"train/loss_{name}_beta" for name in ("low", "mid", "high")}
    assert set(trainer.callback_metrics) == expected
    metrics = trainer.callback_metrics
    assert metrics["train/loss_low_beta"] < metrics["train/loss_high_beta"]
    assert set(trainer.validate(model, loader(), verbose=False)[0]) == {"val/loss", "val/rate", "val/distortion"}


# -- one model, every beta --------------------------------------------------------------------------------------------

CONDITIONINGS = ("gate", "film", "concat", "none")


def conditioned(conditioning, **kwargs):
    pair = networks(extra=1) if conditioning == "concat" else networks()
    return multi_rate(pair, conditioning=conditioning, **kwargs)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_each_conditioning_trains(conditioning):
    model = conditioned(conditioning)
    assert any(isinstance(m, RateGate) for m in model.modules()) == (conditioning == "gate")
    assert any(isinstance(m, RateFiLM) for m in model.modules()) == (conditioning == "film")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = Steps()
    fit(model, loader(32, 8), [steps], max_epochs=15)
    assert sum(steps.losses[-4:]) < sum(steps.losses[:4]) - 0.2
    if conditioning == "gate":
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    low, high = model.at_beta(0.01)(pixels()), model.at_beta(10.0)(pixels())
    assert torch.equal(low, high) == (conditioning == "none")
    assert low.shape == (8, 6)


@pytest.mark.parametrize("conditioning", ["gate", "film"])
def test_folded_networks_equal_the_model_at_its_beta(conditioning):
    model, x = move_gates(conditioned(conditioning).double()), pixels().double()
    for beta in (0.01, 0.7, 10.0):
        plain = model.fold(beta)
        mu, logvar = plain["encoder"](x)
        torch.testing.assert_close((mu, logvar), model.at_beta(beta).encode(x), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.sigmoid(plain["decoder"](mu)), model.at_beta(beta)(x), rtol=1e-11, atol=1e-12)
        base = dict(zip(("encoder", "decoder"), networks(), strict=True))
        assert set(plain.state_dict()) == set(nn.ModuleDict(base).state_dict())


@pytest.mark.parametrize("conditioning", ["concat", "none"])
def test_what_cannot_be_folded_says_what_to_use(conditioning):
    with pytest.raises(ValueError, match=rf"conditioning='{conditioning}' cannot be folded.*use at_beta\(0.5\)"):
        conditioned(conditioning).fold(0.5)


def test_concat_appends_t_to_images_and_latents():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 1, 3), nn.Linear(4, 4)

        def forward(self, x):
            self.seen = x
            return self.head(self.conv(x).flatten(1))

    encoder = Sees()
    decoder = nn.Sequential(nn.Identity(), nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    latents = []
    decoder[0].register_forward_hook(lambda module, inputs, output: latents.append(output))
    model = MultiRateVAE(encoder, decoder, [1, 4, 4], conditioning="concat")
    x = torch.rand(2, 1, 4, 4)
    with model.at(torch.tensor([0.01, 10.0])):
        model.encode(x)
        model.decode(torch.full((2, 2), 7.0))
    assert torch.equal(encoder.seen[:, :1], x)
    torch.testing.assert_close(latents[-1], torch.tensor([[7, 7, -math.sqrt(3)], [7, 7, math.sqrt(3)]]))
    torch.testing.assert_close(encoder.seen[0, 1], torch.full((4, 4), -math.sqrt(3)))
    torch.testing.assert_close(encoder.seen[1, 1], torch.full((4, 4), math.sqrt(3)))


def test_the_views_of_a_model_at_a_beta_agree():
    model, x = move_gates(multi_rate()), pixels()
    view = model.at_beta(0.3)
    with model.at(0.3):
        torch.testing.assert_close(view.encode(x), model.encode(x))
        torch.testing.assert_close(view.decode(torch.ones(3, 2)), model.decode(torch.ones(3, 2)))
    assert torch.equal(view(x), model(x, 0.3))
    assert torch.equal(view(x), torch.sigmoid(view.decode(view.encode(x)[0])))
    assert view.sample(4).shape == (4, 6)
    mixed = model(x, torch.full((8,), 0.3))
    torch.testing.assert_close(mixed, view(x))
    assert not torch.equal(model.at_beta(5.0)(x), view(x))


def test_several_decodings_of_each_sample():
    model, x = move_gates(multi_rate()), pixels(2)
    betas = torch.tensor([0.02, 4.0])
    with model.at(betas, num_samples=3):
        mu, _ = model.encode(x)
        often = model.decode(mu.repeat_interleave(3, 0))
    with model.at(betas):
        torch.testing.assert_close(often, model.decode(mu).repeat_interleave(3, 0))


def test_predictions_are_made_at_beta_one_or_the_nearest_end():
    assert multi_rate().predict_beta == 1.0
    assert multi_rate(beta_range=(2.0, 5.0)).predict_beta == 2.0
    assert multi_rate(beta_range=(0.1, 0.5)).predict_beta == 0.5
    model = move_gates(multi_rate())
    (prediction,) = Trainer(**QUIET).predict(model, loader(8, 8))
    torch.testing.assert_close(prediction, model(pixels(), 1.0))


def test_beta_for_a_rate_is_read_off_a_curve():
    curve = {"beta": torch.tensor([0.1, 1.0, 10.0]), "rate": torch.tensor([8.0, 4.0, 0.0])}
    assert multi_rate().beta_for_rate(4.0, curve) == pytest.approx(1.0, rel=1e-5)
    assert 0.1 < multi_rate().beta_for_rate(6.0, curve) < 1.0
    with pytest.raises(ValueError, match="9"):
        multi_rate().beta_for_rate(9.0, curve)


def test_copies_read_their_own_beta():
    model = move_gates(multi_rate())
    other = copy.deepcopy(model)
    assert torch.equal(other.at_beta(0.1)(pixels()), model.at_beta(0.1)(pixels()))
    with model.at(0.1), pytest.raises(RuntimeError, match="no beta is set"):
        other.encode(pixels())


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["vae", "tcvae", "hierarchical"])
def test_each_objective_trains_and_evaluates(objective):
    kwargs = {"tcvae": {"dataset_size": 32, "beta_sampling": "batch"}}.get(objective, {})
    pair = ladder() if objective == "hierarchical" else networks()
    model = multi_rate(pair, objective=objective, lr=0.03, **kwargs)

    def evaluated():
        return Trainer(**QUIET).validate(model, loader(32, 32), verbose=False)[0]["val/loss"]

    before = evaluated()
    fit(model, loader(32, 8), max_epochs=25)
    assert evaluated() < before - 0.1
    assert model.at_beta(0.1)(pixels()).shape == (8, 6)
    assert model.at_beta(0.1).sample(3).shape == (3, 6)


def test_hierarchical_gates_act_on_all_groups():
    model = move_gates(multi_rate(ladder(), objective="hierarchical"))
    x = pixels()
    rates = []
    for beta in (0.02, 5.0):
        model.set_address("val", 0)
        with model.at(beta):
            rates.append(torch.stack(model.decoder(model.encoder(x), model.noise)[1]))
    assert ((rates[0] - rates[1]).abs().amax(1) > 1e-3).all()


# -- processes --------------------------------------------------------------------------------------------------------


class Silent(MultiRateVAE):
    """Decodes the mean and steps by plain SGD, so that two processes can be compared with one."""

    def noise(self, like):
        return torch.zeros_like(like)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Interleaved(LightningDataModule):
    """Unshuffled: rank r of n takes rows r, r + n, ..., so the ranks' batches make up the batch of one process."""

    def __init__(self, rows, batch_size):
        super().__init__()
        self.rows, self.batch_size = TensorDataset(rows), batch_size

    def train_dataloader(self):
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        sampler = DistributedSampler(self.rows, ranks, rank, shuffle=False)
        return DataLoader(self.rows, self.batch_size // ranks, sampler=sampler)


class RanksAgree(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        assert torch.equal(*trainer.strategy.all_gather(weights)), "the ranks' weights differ"
        first = trainer.strategy.all_gather(batch[0])
        assert not torch.equal(*first), "both ranks saw the same samples"


@pytest.mark.ddp
@pytest.mark.parametrize("sampling", ["stratified", "batch"])
def test_two_processes_make_the_steps_of_one(sampling):
    def trained(**kwargs):
        torch.manual_seed(0)
        model = move_gates(multi_rate(cls=Silent, beta_sampling=sampling), 0.3)
        start = copy.deepcopy(model.state_dict())
        trainer = Trainer(
            **{"max_epochs": 3, "enable_checkpointing": False, "use_distributed_sampler": False, **kwargs}
        )
        trainer.fit(model, Interleaved(pixels(16), batch_size=8))
        return start, model.state_dict()

    _, both = trained(callbacks=[RanksAgree()], **ddp_trainer_kwargs())
    start, alone = trained(**QUIET)
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=1e-6, atol=1e-6)
    assert max((alone[name] - start[name]).abs().max() for name in alone) > 0.05


@pytest.mark.ddp
def test_ranks_agree_with_noise_and_independent_betas():
    model = multi_rate(beta_sampling="sample", seed=None)
    trainer = Trainer(max_epochs=2, callbacks=[RanksAgree()], enable_checkpointing=False, **ddp_trainer_kwargs())
    trainer.fit(model, loader(16, 4), loader(16, 4))
    assert trainer.callback_metrics["val/loss"].isfinite()


# -- crashes and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["stratified", "sample"])
@pytest.mark.parametrize(("checkpoint", "crash_at"), [("step", (1, 1)), ("epoch", (1, 0))])
def test_a_resumed_training_is_bit_equal(sampling, checkpoint, crash_at):
    data = TensorDataset(pixels(12))
    assert_resumes(
        lambda: multi_rate(beta_sampling=sampling, seed=None),
        lambda: (StatefulLoader(data, 4), DataLoader(data, 4)),
        checkpoint=checkpoint,
        crash_at=crash_at,
    )


def test_a_mixin_with_its_own_optimizer_resumes_in_the_middle_of_an_epoch():
    data = TensorDataset(pixels(12))
    assert_resumes(Own, lambda: StatefulLoader(data, 4), checkpoint="step", crash_at=(1, 1))


def test_a_checkpoint_of_another_range_names_both(tmp_path):
    model = multi_rate(beta_range=(0.1, 5.0))
    trainer = fit(model, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    wider = multi_rate(beta_range=(0.01, 10.0))
    with pytest.raises(RuntimeError, match=r"trained on beta in \[0.1, 5\] but this model has \[0.01, 10\]"):
        Trainer(max_epochs=2, **QUIET).fit(wider, loader(), ckpt_path=tmp_path / "end.ckpt")


def test_a_checkpoint_rebuilds_the_model(tmp_path):
    model = multi_rate(beta_range=[0.1, 5.0], convert={"layout": "public", "init": "paper"})
    trainer = fit(model, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    torch.load(tmp_path / "end.ckpt", weights_only=True)
    encoder, decoder = networks()
    loaded = MultiRateVAE.load_from_checkpoint(tmp_path / "end.ckpt", encoder=encoder, decoder=decoder)
    assert torch.equal(loaded.at_beta(0.3)(pixels()), model.at_beta(0.3)(pixels()))


def test_a_trained_ordinary_vae_becomes_multi_rate_unchanged():
    plain = BetaVAE(*networks(), input_shape=[6])
    fit(plain)
    model = multi_rate()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("rate_gate" in key or key == "beta_prior.range" for key in missing)
    for beta in (0.01, 10.0):
        assert torch.equal(model.at_beta(beta)(pixels()), plain(pixels()))


# -- precision --------------------------------------------------------------------------------------------------------


class Gates(Callback):
    """What the gates compute in, during training."""

    def __init__(self):
        self.dtypes = set()

    def on_train_start(self, trainer, pl_module):
        for module in pl_module.modules():
            if isinstance(module, RateGate):
                inner = module.coefficients
                module.coefficients = lambda t, inner=inner: self.seen(inner(t))

    def seen(self, coefficients):
        self.dtypes.add(coefficients[0].dtype)
        return coefficients


def half_with_scaler():
    plugin = submodule("plugins").MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    return {"plugins": [plugin]}


PRECISIONS = {
    "32-true": dict,
    "64-true": lambda: {"precision": "64-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": half_with_scaler,
}


@pytest.mark.parametrize("distortion", ["bernoulli_logits", "gaussian"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains(precision, distortion):
    model, steps, gates = multi_rate(distortion=distortion), Steps(), Gates()
    fit(model, loader(32, 8), [steps, gates], max_epochs=12, **PRECISIONS[precision]())
    assert all(math.isfinite(loss) for loss in steps.losses)
    assert sum(steps.losses[-4:]) < sum(steps.losses[:4])
    assert gates.dtypes == {torch.float64 if precision == "64-true" else torch.float32}


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_a_checkpoint_of_every_precision_resumes(precision, tmp_path):
    trainer = fit(multi_rate(beta_range=(0.03, 7.3)), max_epochs=1, **PRECISIONS[precision]())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = Trainer(max_epochs=2, **QUIET, **PRECISIONS[precision]())
    again.fit(multi_rate(beta_range=(0.03, 7.3)), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert again.global_step == 4


# -- a module of the user's own ---------------------------------------------------------------------------------------


class Own(MultiRateMixin):
    def __init__(self, **kwargs):
        super().__init__()
        self.encoder, self.decoder = networks()
        self.gated = self.make_multirate(self.encoder, self.decoder, input_shape=[6], **kwargs)

    def rate_distortion(self, batch):
        x = batch[0]
        mu, logvar = self.encoder(x)
        error = self.decoder(mu + self.noise(mu) * (logvar / 2).exp()) - x
        return RateDistortion(gaussian_kl(mu, logvar).sum(1), error.square().sum(1) / 2, mu)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_module_with_the_mixin_trains():
    model, steps = Own(), Steps()
    assert model.gated == ["encoder.body.1", "encoder.mu", "encoder.logvar", "decoder.net.0"]
    fit(model, loader(32, 8), [steps], max_epochs=10)
    assert sum(steps.losses[-4:]) < sum(steps.losses[:4])
    with model.at(0.3):
        assert model.rate_distortion((pixels(),)).rate.shape == (8,)


class Base(LightningModule):
    """A user's ordinary VAE, whose rate_distortion must not be shadowed by the mixin in front of it."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = networks()
        self.calls = 0

    def rate_distortion(self, batch):
        self.calls += 1
        mu, logvar = self.encoder(batch[0])
        return RateDistortion(gaussian_kl(mu, logvar).sum(1), (self.decoder(mu) - batch[0]).square().sum(1), mu)

    def training_step(self, batch, batch_idx):
        return self.rate_distortion(batch).loss(1.0).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_the_mixin_takes_the_terms_of_the_class_behind_it():
    class MultiRate(MultiRateMixin, Base):
        def __init__(self):
            super().__init__()
            self.make_multirate(self.encoder, self.decoder, [6], beta_range=(0.5, 0.5))

    torch.manual_seed(0)
    model, steps = MultiRate(), Steps()
    fit(model, callbacks=[steps], max_epochs=1)
    assert model.calls == 2
    torch.manual_seed(0)
    plain = Base()
    terms = plain.rate_distortion((pixels(4),))
    assert steps.losses[0] == pytest.approx(terms.loss(0.5).mean().item(), rel=1e-6)


def test_a_mixin_without_terms_is_refused_where_it_is_built():
    class Forgot(MultiRateMixin):
        def __init__(self):
            super().__init__()
            self.make_multirate(*networks(), input_shape=[6])

    with pytest.raises(TypeError, match=r"Forgot must implement rate_distortion\(batch\) and return RateDistortion"):
        Forgot()


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    for kwargs, message in (
        ({"beta_range": (0.0, 1.0)}, "0 < low <= high, both finite; got low=0.0, high=1.0"),
        ({"beta_range": (2.0, 1.0)}, "0 < low <= high, both finite; got low=2.0, high=1.0"),
        ({"beta_range": (0.1, math.nan)}, "0 < low <= high, both finite; got low=0.1, high=nan"),
        ({"beta_range": (0.1,)}, r"beta_range must be two numbers, smallest and largest beta; got \[0.1\]"),
        ({"beta_sampling": "epoch"}, "beta_sampling must be 'stratified', 'sample' or 'batch'; got 'epoch'"),
        ({"conditioning": "gates"}, "conditioning must be 'gate', 'film', 'concat' or 'none'; got 'gates'"),
        ({"objective": "tcvae"}, "objective='tcvae' needs dataset_size"),
        ({"convert": {"include": ["nothing"]}}, "no layer matched"),
        ({"pair": (nn.Linear(6, 3), networks()[1])}, r"shape \(2, 3\), which does not split into mu and logvar"),
        ({"pair": (networks()[0], MLPDecoder(2, [5], [7]))}, r"returned shape \(7,\) for input_shape=\(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_rate(**kwargs)


@pytest.mark.parametrize("beta", [0.009, 10.1])
def test_a_beta_outside_the_range_needs_leave(beta):
    model, x = multi_rate(), pixels()
    message = rf"beta={beta} is outside the trained range \[0.01, 10\]"
    for use in (lambda: model(x, beta), lambda: model.at_beta(beta)(x), lambda: model.fold(beta)):
        with pytest.raises(ValueError, match=message):
            use()
    assert model.at_beta(beta, extrapolate=True)(x).isfinite().all()


def test_a_beta_is_never_drawn_silently():
    model = multi_rate()
    with pytest.raises(RuntimeError, match="no beta is set: call the network inside"):
        model.encode(pixels())
    with pytest.raises(RuntimeError, match="no beta is set"):
        model.rate_distortion(pixels())
    with pytest.raises(TypeError, match="beta"):
        model(pixels())


def test_betas_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"beta has shape \(3,\) but the layer sees a batch of 8"):
        multi_rate()(pixels(), torch.tensor([0.1, 1.0, 5.0]))


def test_targets_outside_the_unit_interval_are_refused_in_training():
    data = DataLoader(TensorDataset(3 * pixels()), 4)
    with pytest.raises(ValueError, match=r"distortion='bernoulli_logits' needs data in \[0, 1\]; this batch spans"):
        fit(multi_rate(), data)


def test_a_batch_norm_after_a_gate_warns_only_with_one_beta_per_batch():
    def normed():
        encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
        return encoder, networks()[1]

    with pytest.warns(UserWarning, match="a BatchNorm follows the gates of 0: with one beta per batch"):
        multi_rate(normed(), beta_sampling="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = multi_rate(normed())
        multi_rate(normed(), beta_sampling="batch", convert={"layout": "public"})
    steps = Steps()
    fit(model, loader(32, 8), [steps], max_epochs=8)
    gradient = steps.gradients[-1]["encoder.0.rate_gate.weight"]
    assert (gradient.abs() > 1e-6).all(), "with one beta per sample a gate before a norm learns"


def test_what_does_not_take_betas_into_account_is_not_changed():
    model = multi_rate()
    random_state = torch.get_rng_state()
    model.at_beta(0.3)(pixels())
    model.sample_betas(4, "train", 0)
    model.at_beta(0.3).sample(3)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_batch_that_is_a_dictionary_still_gets_one_beta_per_sample():
    class Mine(MultiRateMixin):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = MLPEncoder([4], [5], 2), MLPDecoder(2, [5], [4])
            self.make_multirate(self.encoder, self.decoder, input_shape=[4])

        def rate_distortion(self, batch):
            mu, logvar = self.encoder(batch["x"])
            assert self.rate_context.t.shape == (8, 1)
            return RateDistortion((mu.square() + logvar.exp()).sum(1), (self.decoder(mu) - batch["x"]).square().sum(1))

    assert Mine().get_batch_size({"x": torch.zeros(8, 4), "y": torch.zeros(8)}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "none", "convert": {"layout": "public"}}, "has no effect with conditioning='none'"),
        ({"conditioning": "concat", "objective": "hierarchical"}, "no single latent to append beta to"),
    ],
)
def test_combinations_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiRateVAE(MLPEncoder([4], [5], 2), MLPDecoder(2, [5], [4]), input_shape=[4], **options)


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        (lambda r: RateDistortion(r.mean(), r.mean()), ValueError, r"shape \(B,\); got \(\)"),
        (lambda r: (r, r), TypeError, "must return a RateDistortion.*got tuple"),
    ],
)
def test_what_rate_distortion_returns_is_checked(terms, error, message):
    class Mine(MultiRateMixin):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = MLPEncoder([4], [5], 2), MLPDecoder(2, [5], [4])
            self.make_multirate(self.encoder, self.decoder, input_shape=[4])

        def rate_distortion(self, batch):
            return terms(self.encoder(batch)[0].sum(1))

    with pytest.raises(error, match=message):
        Mine().training_step(torch.zeros(3, 4), 0)


def test_a_module_that_was_not_made_multirate_is_told_so():
    class Mine(MultiRateMixin):
        pass

    with pytest.raises(RuntimeError, match="call make_multirate"):
        Mine().training_step(torch.zeros(3, 4), 0)
