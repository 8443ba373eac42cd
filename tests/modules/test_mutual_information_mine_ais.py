"""MINE-AIS: its gradient, its chains and its certificate, against closed forms."""

import functools
import math

import pytest
import torch
from torch import nn

from lightning_ext._lightning import MisconfigurationException, Trainer
from lightning_ext.data import IndexedDataset
from lightning_ext.modules import MINEAISModule, measure_implicit_bound
from lightning_ext.nn import ConcatenatedCritic, GaussianProposal, QuadraticCritic
from tests.modules.pairs import correlated, loader, on_two_ranks, trainer

A, B, C, RHO = 2.0, 1.0, 1.5, 0.9


def critic(a=A, b=B, c=C):
    found = QuadraticCritic(1, 1)
    with torch.no_grad():
        found.coupling.fill_(a)
        found.z_log_curvature.fill_(b).log_()
        found.x_log_curvature.fill_(c).log_()
    return found


def posterior_sample(x, generator):
    """Exact samples of what the critic makes of a standard normal prior."""
    return A * x / (1 + B) + torch.randn(x.shape, generator=generator, dtype=x.dtype) / (1 + B) ** 0.5


def test_with_exact_samples_the_gradient_is_that_of_the_implicit_bound():
    x, z = correlated(400_000, RHO, dtype=torch.float64)
    module = MINEAISModule(critic().double(), energy_l2=0.0)
    ends = posterior_sample(x, torch.Generator().manual_seed(5))
    module.sample = lambda x, z, start: (ends, torch.tensor(0.65))
    module.loss(x, z).backward()
    found = module.critic
    assert -found.coupling.grad.item() == pytest.approx(RHO - A / (1 + B), abs=0.01)
    of_curvature = B * (-0.5 + A**2 / (2 * (1 + B) ** 2) + 0.5 / (1 + B))
    assert -found.z_log_curvature.grad.item() == pytest.approx(of_curvature, abs=0.01)
    assert found.x_log_curvature.grad.abs().item() < 1e-9  # a function of x alone changes nothing
    assert found.offset.grad.abs().item() < 1e-9


def test_a_proposal_gets_the_gradient_of_its_part():
    x, z = correlated(1000)
    torch.manual_seed(0)
    proposal = GaussianProposal(nn.Linear(1, 2))
    module = MINEAISModule(critic(), proposal, energy_l2=0.0)
    ends = z.roll(1, 0)
    module.sample = lambda x, z, start: (ends, torch.tensor(0.65))
    module.loss(x, z).backward()
    expected = proposal(x).log_prob(ends).mean() - proposal(x).log_prob(z).mean()
    torch.testing.assert_close(
        proposal.network.weight.grad, torch.autograd.grad(expected, proposal.network.weight)[0], rtol=1e-3, atol=1e-4
    )


def test_the_level_of_the_critic_is_held_by_its_square():
    x, z = correlated(100)
    ends, losses = z.roll(1, 0), []
    for weight in (0.0, 0.5):
        module = MINEAISModule(critic(), energy_l2=weight)
        module.sample = lambda x, z, start: (ends, torch.tensor(0.65))
        losses.append(module.loss(x, z))
    squares = (module.critic(x, z).square() + module.critic(x, ends).square()).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * squares)


@pytest.mark.parametrize("start", ["data", "base"])
def test_chains_reach_the_critics_posterior(start):
    x, z = correlated(20_000, RHO)
    module = MINEAISModule(critic(), chain_init=start, num_transitions=20, step_size=0.3, seed=0)
    ends, accept = module.sample(x, z, z if start == "data" else None)
    standard = (ends - A * x / (1 + B)) * (1 + B) ** 0.5
    assert abs(standard.mean()) < 4 / math.sqrt(20_000)
    assert abs(standard.var() - 1) < 4 * math.sqrt(2 / 20_000)
    assert 0.5 < accept <= 1


def test_chains_start_where_they_are_told_to():
    x, z = correlated(50)
    starts = {"data": z, "base": None}
    for name, expected in starts.items():
        assert MINEAISModule(critic(), chain_init=name)._start(x, z, None) is expected
    module = MINEAISModule(critic(), num_transitions=1, num_leapfrog=1, step_size=1e-6, seed=0)
    torch.testing.assert_close(module.sample(x, z, z)[0], z, atol=1e-4, rtol=0)
    assert (module.sample(x, z)[0] - z).abs().mean() > 0.3


def test_the_step_size_follows_the_acceptance():
    x, z = correlated(200)
    for first in (0.3, 3.0):
        module = MINEAISModule(critic(), step_size=first, num_transitions=1, num_leapfrog=1, seed=0)
        for batch in range(150):
            module.set_address("train", batch)
            module.loss(x, z)
        assert abs(module.sample(x, z, z)[1] - 0.65) < 0.1
    assert "step_size" in module.state_dict()


def test_persistent_chains_go_on_where_they_ended(tmp_path):
    x, z = correlated(20)
    module = MINEAISModule(critic(), chain_init="persistent", num_transitions=1, seed=0)
    starts, sample = [], module.sample

    def watched(x, z, start):
        starts.append(start)
        return sample(x, z, start)

    module.sample = watched
    runs = trainer(max_epochs=2)
    runs.fit(module, loader(x, z, batch_size=8, wrap=IndexedDataset))
    assert torch.equal(torch.cat(starts[:3]), z)  # the first epoch begins at the data
    assert module.chains.shape == (20, 1)
    assert not torch.equal(torch.cat(starts[3:]), z)
    runs.save_checkpoint(tmp_path / "it.ckpt")
    again = MINEAISModule.load_from_checkpoint(tmp_path / "it.ckpt", critic=critic(), chain_init="persistent")
    assert torch.equal(again.chains, module.chains)
    with pytest.raises(ValueError, match=r"needs to know which pairs a batch holds; got list.*IndexedDataset"):
        trainer().fit(MINEAISModule(critic(), chain_init="persistent"), loader(x, z))


@pytest.mark.ddp
def test_ranks_keep_all_chains_and_one_step_size(tmp_path):
    module = MINEAISModule(critic(), chain_init="persistent", num_transitions=1, seed=0)
    pairs = loader(*correlated(24), batch_size=4, wrap=IndexedDataset)
    (chains, step), (others, other) = on_two_ranks(module, pairs, tmp_path, lambda m: (m.chains, m.step_size))
    assert chains.shape == (24, 1)
    assert chains.isfinite().all()
    assert torch.equal(chains, others)
    assert torch.equal(step, other)
    assert step != 0.1


@pytest.mark.parametrize("enabled", [True, False])
def test_chains_run_in_full_precision_whatever_the_trainers(enabled):
    module = MINEAISModule(ConcatenatedCritic(1, 1, [8]), seed=0)
    x, z = correlated(16)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        ends, accept = module.sample(x, z, z)
    module.set_address("train", 0)
    again, same = module.sample(x, z, z)
    assert torch.equal(ends, again)
    assert accept == same


def test_training_learns_more_than_the_logarithm_of_a_batch():
    truth, rho, batch = 4.1518, 0.9, 16
    torch.manual_seed(0)
    module = MINEAISModule(
        QuadraticCritic(5, 5), optimizer=functools.partial(torch.optim.Adam, lr=0.03), seed=0, num_leapfrog=5,
        num_chains=4, num_steps=60,
    )  # fmt: skip
    trainer(gradient_clip_val=10.0).fit(module, loader(*correlated(batch * 500, rho, 5), batch_size=batch))
    found = trainer().test(module, loader(*correlated(512, rho, 5, seed=1), batch_size=512), verbose=False)[0]
    lower, stderr = (found[f"mutual_information/ibal/{name}"] for name in ("lower", "stderr"))
    assert math.log(batch) + 0.8 < lower < truth + 4 * stderr
    assert abs(found["mutual_information/ibal_forward/estimate"] - lower) < 0.6


def test_the_test_measures_as_the_function_does_and_validation_only_if_asked():
    pairs = loader(*correlated(256), batch_size=256)
    short = {"num_chains": 4, "num_steps": 30, "num_leapfrog": 5}
    found = trainer().test(MINEAISModule(critic(), seed=0, **short), pairs, verbose=False)[0]
    by_hand = measure_implicit_bound(critic(), *correlated(256), seed=1, **short).values
    assert found["mutual_information/ibal/lower"] == pytest.approx(by_hand["lower"].item(), abs=0.05)
    assert found["mutual_information/ibal/stderr"] == pytest.approx(by_hand["lower_stderr"].item(), rel=0.1)
    assert found["mutual_information/ibal_forward/estimate"] == pytest.approx(by_hand["estimate"].item(), abs=0.05)
    cheap = trainer().validate(MINEAISModule(critic(), seed=0), pairs, verbose=False)[0]
    assert set(cheap) == {"mutual_information/mine_ais/energy_gap"}
    asked = trainer().validate(
        MINEAISModule(critic(), seed=0, measure_in_validation=True, **short), pairs, verbose=False
    )[0]
    assert {"mutual_information/ibal/lower", "mutual_information/ibal_forward/estimate"} <= set(asked)


def test_the_energy_gap_is_the_datas_less_the_chains():
    x, z = correlated(64)
    module = MINEAISModule(critic(), seed=0)
    module.set_address("val", 0)
    ends, _ = module.sample(x, z, z)
    energies = [(module.critic(x, point) - 0.5 * point.square().sum(-1)).mean() for point in (z, ends)]
    found = trainer().validate(module, loader(x, z), verbose=False)[0]["mutual_information/mine_ais/energy_gap"]
    assert found == pytest.approx((energies[0] - energies[1]).item(), rel=1e-4)


class Dropping(QuadraticCritic):
    def __init__(self):
        super().__init__(1, 1)
        self.drop = nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chain_init": "noise"}, "chain_init must be one of 'data', 'base', 'persistent'; got 'noise'"),
        ({"num_transitions": 0}, "num_transitions must be at least 1; got 0"),
        ({"num_leapfrog": 0}, "num_leapfrog must be an integer of at least 1; got 0"),
        ({"step_size": 0.0}, "step_size must be positive and energy_l2 at least 0; got 0.0"),
        ({"energy_l2": -1.0}, "energy_l2 at least 0; got 0.1 and -1.0"),
        ({"target_accept": 0.0}, "target_accept must be between 0 and 1"),
        ({"prior": 3}, "prior must be a torch.distributions.Distribution.*got int"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MINEAISModule(critic(), **options)


def test_what_changes_from_call_to_call_and_shards_are_refused():
    with pytest.raises(ValueError, match=r"critic.drop \(Dropout\) is in training mode"):
        trainer().fit(MINEAISModule(Dropping()), loader(*correlated(8)))
    module = MINEAISModule(critic())
    module.trainer = Trainer(accelerator="cpu", devices=1, logger=False)
    module.trainer._accelerator_connector.strategy = _fsdp()
    with pytest.raises(MisconfigurationException, match=r"MINEAISModule.*FSDP"):
        module.setup("fit")


def _fsdp():
    from lightning_ext._lightning import submodule

    strategy = submodule("strategies").FSDPStrategy()
    strategy.broadcast = lambda value: value
    return strategy
