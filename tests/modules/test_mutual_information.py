"""Barber-Agakov bounds with trained proposals, and critics of all objectives, against closed forms."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

from lightning_ext.functional import (
    correlated_gaussian_information,
    infonce,
    jensen_shannon_objective,
    mine_objective,
    nwj_estimate,
)
from lightning_ext.modules import (
    BarberAgakovModule,
    CriticModule,
    GIWAEModule,
    MINEAISModule,
    measure_implicit_bound,
)
from lightning_ext.nn import GaussianDecoderModel, GaussianProposal, LinearGaussianModel, QuadraticCritic
from tests.modules.pairs import correlated, loader, on_two_ranks, trainer

ADAM = functools.partial(torch.optim.Adam, lr=0.03)


def model():
    """One latent, two numbers: 1.2 nats."""
    return LinearGaussianModel(torch.tensor([[1.0], [2.0]]), torch.tensor([0.5, -0.5]), 0.7)


def information():
    return 0.5 * math.log(1 + 5 / 0.49)


def posterior():
    """The model's, as a proposal: linear in x, of one variance."""
    weight, variance = torch.tensor([[1.0, 2.0]]), 1 / (1 + 5 / 0.49)
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.cat([variance / 0.49 * weight, torch.zeros(1, 2)]))
        network.bias.copy_(torch.tensor([variance / 0.49 * (-0.5 + 1.0), math.log(variance)]))
    return GaussianProposal(network, min_scale=0.0)


def simulated(num, seed=0):
    return model().simulate(num, torch.Generator().manual_seed(seed))


# -- Barber-Agakov -----------------------------------------------------------------------------------------------------


def test_the_exact_posterior_leaves_no_gap_on_either_side():
    x, z = simulated(500)
    module = BarberAgakovModule(posterior(), posterior(), model())
    found = trainer().test(module, loader(x, z), verbose=False)[0]
    assert abs(found["mutual_information/ba/gap"]) < 4 * found["mutual_information/ba/gap_stderr"] + 1e-5
    assert found["mutual_information/ba/gap_stderr"] < 1e-5  # pair by pair there is no gap at all
    truth, error = information(), found["mutual_information/ba/lower_stderr"]
    assert abs(found["mutual_information/ba/lower"] - truth) < 4 * error


def test_training_brings_both_sides_to_the_truth():
    torch.manual_seed(0)
    module = BarberAgakovModule(
        GaussianProposal(nn.Linear(2, 2)), GaussianProposal(nn.Linear(2, 2)), model(), optimizer=ADAM, seed=0
    )
    before = trainer().test(module, loader(*simulated(1000, 1)), verbose=False)[0]
    trainer(max_epochs=4).fit(module, loader(*simulated(10_000)))
    after = trainer().test(module, loader(*simulated(4000, 1)), verbose=False)[0]
    assert before["mutual_information/ba/gap"] > 1.0
    assert after["mutual_information/ba/gap"] < 0.02
    for side in ("lower", "upper"):
        assert abs(after[f"mutual_information/ba/{side}"] - information()) < 0.06


def test_the_loss_is_what_the_sides_lack_up_to_the_datas_part():
    x, z = simulated(50)
    torch.manual_seed(0)
    lower, upper = GaussianProposal(nn.Linear(2, 2)), GaussianProposal(nn.Linear(2, 2))
    module = BarberAgakovModule(lower, upper, model(), seed=3)
    module.set_address("train", 0)
    loss = module.loss(x, z)
    module.set_address("train", 0)
    module.measure(x, z)
    found = module.bound("ba").compute()
    likelihood = model().log_likelihood(x, z).mean()
    torch.testing.assert_close(loss.double(), found["upper"] - found["lower"] - likelihood, rtol=1e-5, atol=1e-5)


def test_one_proposal_for_both_sides_is_trained_for_both():
    x, z = simulated(50)
    one = GaussianProposal(nn.Linear(2, 2))

    def gradient(**sides):
        one.zero_grad()
        module = BarberAgakovModule(**sides, model=model(), seed=0)
        module.set_address("train", 0)
        module.loss(x, z).backward()
        return one.network.weight.grad.clone()

    torch.testing.assert_close(gradient(lower=one, upper=one), gradient(lower=one) + gradient(upper=one))


def test_the_model_is_a_frozen_copy_in_evaluation():
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    generative = GaussianDecoderModel(decoder, -1.0, latent_dim=1)
    module = BarberAgakovModule(upper=GaussianProposal(nn.Linear(2, 2)), model=generative)
    module.train()
    assert module.upper.training
    assert not any(part.training for part in module.model.modules())
    assert decoder.training
    assert all(p.requires_grad for p in decoder.parameters())
    trainer().fit(module, loader(*simulated(20)))
    assert all(p.grad is None for p in module.model.parameters())


def test_predict_gives_the_lower_term_of_each_pair_and_a_prior_may_be_another():
    x, z = simulated(6)
    prior = Independent(Normal(torch.tensor([1.0]), torch.tensor([2.0])), 1)
    module = BarberAgakovModule(posterior(), prior=prior)
    [found] = trainer().predict(module, loader(x, z))
    with torch.no_grad():
        torch.testing.assert_close(found, posterior()(x).log_prob(z) - prior.log_prob(z))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there must be a proposal"),
        ({"upper": nn.Linear(2, 2)}, "upper needs the model"),
        (
            {"lower": nn.Linear(2, 2), "model": model(), "prior": Normal(0.0, 1.0)},
            "prior must be None where there is a model",
        ),
        ({"lower": nn.Linear(2, 2), "prior": "normal"}, "prior must be a torch.distributions.Distribution.*got str"),
    ],
)
def test_sides_without_what_they_need_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BarberAgakovModule(**options)


class Flat(nn.Module):
    def forward(self, x):
        return Normal(x[:, :1], 1.0)


class Coins(nn.Module):
    def forward(self, x):
        return Independent(Bernoulli(logits=x[:, :1]), 1)


@pytest.mark.parametrize(
    ("module", "batch", "message"),
    [
        (BarberAgakovModule(nn.Linear(2, 2)), simulated(4), "must map x to a torch.distributions.*got Tensor"),
        (BarberAgakovModule(Flat()), simulated(4), r"batch \(4,\) and event.*got Normal with batch \(4, 1\) and event"),
        (BarberAgakovModule(upper=Coins(), model=model()), simulated(4), "Independent has no rsample"),
        (BarberAgakovModule(posterior()), simulated(4)[0], r"needs batches \(x, z\) of two tensors; got Tensor"),
        (BarberAgakovModule(posterior()), [torch.ones(2, 2), "z"], "got list of Tensor, str"),
        (
            BarberAgakovModule(posterior()),
            (torch.ones(4, 2), torch.ones(4)),
            r"one z \(B, d\) for each x.*got x \(4, 2\) and z \(4,\)",
        ),
        (BarberAgakovModule(posterior()), (torch.ones(4, 2), torch.ones(3, 1)), r"and z \(3, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(module, batch, message):
    with pytest.raises(ValueError, match=message):
        module.validation_step(batch, 0)


# -- critics -----------------------------------------------------------------------------------------------------------


def quadratic(seed=0):
    torch.manual_seed(seed)
    critic = QuadraticCritic(1, 1)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_(std=0.3)
    return critic


def off_diagonal(table):
    return torch.stack([table[i, j] for i in range(len(table)) for j in range(len(table)) if i != j])


OBJECTIVES = {
    "infonce": lambda table: infonce(table).mean(),
    "dv": lambda table: mine_objective(table.diagonal(), off_diagonal(table))[0],
    "nwj": lambda table: nwj_estimate(table.diagonal(), off_diagonal(table)),
    "js": lambda table: jensen_shannon_objective(table.diagonal(), off_diagonal(table)),
    "smile": lambda table: jensen_shannon_objective(table.diagonal(), off_diagonal(table)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_sees_all_other_pairs_of_the_batch(objective):
    x, z = correlated(7)
    module = CriticModule(quadratic(), objective)
    expected = -OBJECTIVES[objective](module.critic.matrix(x, z))
    loss = module.loss(x, z)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, module.critic.coupling), torch.autograd.grad(expected, module.critic.coupling)
    torch.testing.assert_close(*grads)


def test_fewer_negatives_are_the_neighbours():
    x, z = correlated(5)
    module = CriticModule(quadratic(), num_negatives=2)
    table = module.critic.matrix(x, z)
    joint, negatives = module.scores(x, z)
    torch.testing.assert_close(joint, table.diagonal())
    expected = torch.stack([torch.stack([table[i, (i + k) % 5] for i in range(5)]) for k in (1, 2)])
    torch.testing.assert_close(negatives, expected)


def test_mines_gradient_divides_by_its_average_over_batches():
    x, z = correlated(64)
    module = CriticModule(quadratic(), "mine", ema=0.9)
    tables = [module.critic.matrix(*(part[rows] for part in (x, z))) for rows in (slice(0, 32), slice(32, 64))]
    means = [off_diagonal(table).exp().mean() for table in tables]
    module.loss(x[:32], z[:32])
    gradient = torch.autograd.grad(module.loss(x[32:], z[32:]), module.critic.coupling)[0]
    average = (0.9 * means[0] + 0.1 * means[1]).detach()
    expected = -(tables[1].diagonal().mean() - means[1] / average)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, module.critic.coupling)[0])


def test_mines_average_is_in_the_checkpoint(tmp_path):
    pairs = loader(*correlated(300))
    module = CriticModule(quadratic(), "mine")
    runs = trainer()
    runs.fit(module, pairs)
    runs.save_checkpoint(tmp_path / "it.ckpt")
    again = CriticModule.load_from_checkpoint(tmp_path / "it.ckpt", critic=quadratic(1), objective="mine")
    assert again._log_average is not None
    torch.testing.assert_close(again._log_average, module._log_average)


@pytest.mark.parametrize(
    ("objective", "key", "least", "most"),
    [
        ("infonce", "infonce/lower", 0.72, 0.86),
        ("dv", "dv/estimate", 0.75, 0.92),
        ("mine", "dv/estimate", 0.75, 0.92),
        ("nwj", "nwj/lower", 0.75, 0.92),
        ("js", "nwj/lower", 0.70, 0.92),
        ("smile", "smile/estimate", 0.75, 0.95),
    ],
)
def test_a_trained_critic_comes_near_the_truth(objective, key, least, most):
    assert correlated_gaussian_information(1, 0.9) == pytest.approx(0.8304, abs=1e-4)
    torch.manual_seed(0)
    module = CriticModule(QuadraticCritic(1, 1), objective, optimizer=ADAM)
    trainer(max_epochs=2).fit(module, loader(*correlated(20_000)))
    found = trainer().test(module, loader(*correlated(2048, seed=1)), verbose=False)[0]
    assert least < found[f"mutual_information/{key}"] < most
    assert 0 < found[f"mutual_information/{key.split('/')[0]}/stderr"] < 0.1


def test_smile_clips_what_it_measures():
    x, z = correlated(200, 0.99)
    critic = quadratic()
    critic.coupling.data.fill_(20.0)
    values = [
        trainer().test(CriticModule(critic, "smile", clip=clip), loader(x, z), verbose=False)[0] for clip in (1.0, None)
    ]
    assert values[0]["mutual_information/smile/estimate"] > values[1]["mutual_information/smile/estimate"] + 1
    joint = critic(x, z).mean().item()
    assert abs(values[0]["mutual_information/smile/estimate"] - joint) <= 1 + 1e-4  # log E clip is within the clip


@pytest.mark.ddp
@pytest.mark.parametrize(("gather", "others"), [(True, 7), (False, 3)])
def test_under_ddp_each_x_meets_the_latents_of_its_rank_or_of_all(tmp_path, gather, others):
    class Counts(QuadraticCritic):
        seen = 0

        def score(self, embedded, z):
            self.seen = z.shape[0]
            return super().score(embedded, z)

    module = CriticModule(Counts(1, 1), gather_negatives=gather)
    pairs = loader(*correlated(16), batch_size=4)
    assert on_two_ranks(module, pairs, tmp_path, lambda m: m.critic.seen) == [others + 1] * 2


class _Watched(CriticModule):
    apart = 0.0

    def loss(self, x, z, batch=None):
        with torch.no_grad():
            self.apart = max(self.apart, float((self.scores(x, z)[0] - self.critic(x, z)).abs().max()))
        return super().loss(x, z, batch)


@pytest.mark.ddp
@pytest.mark.parametrize("negatives", [None, 3])
def test_under_ddp_the_joint_pairs_stay_ones_own(tmp_path, negatives):
    critic = quadratic()
    critic.coupling.data.fill_(1.0)
    module = _Watched(critic, num_negatives=negatives, gather_negatives=True)
    found = on_two_ranks(module, loader(*correlated(16), batch_size=4), tmp_path, lambda m: m.apart)
    assert max(found) < 1e-5


@pytest.mark.ddp
def test_under_ddp_mines_average_is_that_of_all_ranks(tmp_path):
    module = CriticModule(quadratic(), "mine")
    first, second = on_two_ranks(module, loader(*correlated(16), batch_size=4), tmp_path, lambda m: m._log_average)
    assert torch.equal(first, second)


def test_predict_gives_the_critic():
    x, z = correlated(6)
    module = CriticModule(quadratic())
    [found] = trainer().predict(module, loader(x, z))
    torch.testing.assert_close(found, module.critic(x, z).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "contrast"}, "objective must be one of infonce, dv, mine, nwj, js, smile; got 'contrast'"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, or None; got 0"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1; got 1.0"),
        ({"clip": 0.0}, "clip must be positive, or None; got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CriticModule(quadratic(), **options)


def test_a_batch_without_enough_others_is_refused():
    x, z = correlated(3)
    with pytest.raises(ValueError, match=r"meet at least 1 other z, and there are 0 in a batch of 1.*drop_last=True"):
        CriticModule(quadratic()).loss(x[:1], z[:1])
    with pytest.raises(ValueError, match="meet 3 other z, and there are 2"):
        CriticModule(quadratic(), num_negatives=3).loss(x, z)


def test_networks_that_are_no_critics_are_refused_at_once():
    x, z = correlated(4)
    plain = nn.Bilinear(1, 1, 1)
    for call in (
        lambda: CriticModule(plain),
        lambda: GIWAEModule(GaussianProposal(nn.Linear(1, 2)), plain),
        lambda: MINEAISModule(plain),
        lambda: measure_implicit_bound(plain, x, z),
    ):
        with pytest.raises(ValueError, match=r"critic must be a PairCritic; got Bilinear. Subclass it with score"):
            call()


@pytest.mark.parametrize(
    "make",
    [
        lambda: CriticModule(quadratic(), "nwj"),
        lambda: BarberAgakovModule(lower=GaussianProposal(nn.Linear(1, 2))),
        lambda: GIWAEModule(GaussianProposal(nn.Linear(1, 2)), quadratic(), num_samples=4, seed=0),
        lambda: MINEAISModule(quadratic(), num_steps=4, seed=0),
    ],
    ids=["critic", "barber_agakov", "giwae", "mine_ais"],
)
def test_what_is_measured_is_measured_in_full_precision(make):
    torch.manual_seed(0)
    module = make()
    pairs = loader(*correlated(64))
    found, told = zip(
        *(
            (t.test(module, pairs, verbose=False), t.predict(module, pairs))
            for t in (trainer(precision=precision) for precision in ("32-true", "bf16-mixed"))
        ),
        strict=True,
    )
    assert found[0] == found[1]
    torch.testing.assert_close(told[0], told[1], rtol=0.0, atol=0.0)
