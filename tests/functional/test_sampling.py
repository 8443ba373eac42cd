"""Transitions leave the density as it is, are reversible, spare gradients, and survive numbers that are none."""

import pytest
import torch
from torch import nn

from lightning_ext.functional import AnnealingPath, DiagonalGaussian, hmc_transition


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quartic(z):
    """Not a Gaussian, and no two dimensions alike."""
    scales = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    return -(scales * z.square() + 0.1 * z.pow(4)).sum(-1) + z.prod(-1).sin()


def path(dtype=torch.float64):
    return AnnealingPath(DiagonalGaussian(torch.zeros(3, dtype=dtype), 1.0), quartic)


@pytest.mark.parametrize(
    ("mean", "scale"),
    [
        (0.0, 2.0),
        (torch.arange(3.0), torch.rand(3) + 0.1),
        (torch.randn(5, 3), torch.rand(5, 3) + 0.1),
        (0.5, torch.rand(5, 1) + 1),
    ],
)
def test_the_gaussian_is_torchs_own_with_its_gradient(mean, scale):
    density, z = DiagonalGaussian(mean, scale), torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    mean, scale = (torch.as_tensor(x, dtype=torch.float64).expand(5, 3) for x in (mean, scale))
    expected = torch.distributions.Normal(mean, scale).log_prob(z).sum(-1)
    torch.testing.assert_close(density(z), expected, rtol=1e-6, atol=1e-6)
    [gradient] = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(density.gradient(z.detach()), gradient, rtol=1e-6, atol=1e-6)


def test_a_state_has_every_temperature():
    z = torch.randn(4, 3, dtype=torch.float64)
    state = path().evaluate(z)
    for beta in (0.0, 0.3, 1.0):
        leaf = z.clone().requires_grad_()
        expected = path().base(leaf) + beta * quartic(leaf)
        torch.testing.assert_close(state.log_prob(beta), expected.detach())
        torch.testing.assert_close(state.gradient(beta), torch.autograd.grad(expected.sum(), leaf)[0])
        torch.testing.assert_close(path().gradient(z, beta), state.gradient(beta))


def test_the_density_is_left_as_it_is():
    """Chains that begin in the density stay in it, with large steps of which many are refused."""
    start = torch.randn(40_000, 1, generator=seeded(), dtype=torch.float64) / 3  # N(0, 1/9): -z^2/2 - 4 z^2
    gaussian = AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: -4 * z.square().sum(-1))
    state, generator = gaussian.evaluate(start), seeded(1)
    for _ in range(5):
        state, info = hmc_transition(gaussian, state, 1.0, 0.62, 3, generator)
    assert 0.2 < info.accept_prob.mean() < 0.9
    assert state.position.mean().item() == pytest.approx(0.0, abs=0.01)
    assert (9 * state.position.square()).mean().item() == pytest.approx(1.0, abs=0.03)
    assert (81 * state.position.pow(4)).mean().item() == pytest.approx(3.0, abs=0.25)
    assert info.accept_prob.mean().item() == pytest.approx(info.accepted.double().mean().item(), abs=0.01)


def test_chains_reach_the_density_from_elsewhere():
    state, generator = path().evaluate(torch.full((20_000, 3), 2.0, dtype=torch.float64)), seeded()
    for _ in range(20):
        state, _ = hmc_transition(path(), state, 0.7, 0.1, 5, generator)
    mean = state.gradient(0.7).mean(0)  # of the score under its own density: 0
    assert mean.abs().max() < 0.06
    virial = (state.gradient(0.7) * state.position).mean(0)  # Stein's identity: -1 each
    torch.testing.assert_close(virial, -torch.ones(3, dtype=torch.float64), rtol=0, atol=0.06)


def test_the_energy_error_falls_with_the_square_of_the_step():
    state, errors = path().evaluate(torch.randn(500, 3, generator=seeded(), dtype=torch.float64)), []
    for step in (0.04, 0.02, 0.01):
        _, info = hmc_transition(path(), state, 1.0, step, int(0.4 / step), seeded(3))
        errors.append((1 - info.accept_prob).mean().item())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.1)


def test_the_same_draws_lead_back(monkeypatch):
    """Run on from where a trajectory ended, with its momentum turned round."""
    first, momenta = path().evaluate(torch.randn(7, 3, generator=seeded(), dtype=torch.float64)), []
    seen = AnnealingPath.gradient

    def watched(self, z, beta):
        momenta.append(z)
        return seen(self, z, beta)

    monkeypatch.setattr(AnnealingPath, "gradient", watched)
    draw = torch.randn(7, 3, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: draw.clone())
    monkeypatch.setattr(torch, "rand", lambda shape, **k: torch.zeros(shape, dtype=torch.float64))
    there, _ = hmc_transition(path(), first, 1.0, 0.1, 6)
    step = (there.position - momenta[-1]) / 0.1  # the momentum half a step before the end
    turned = -(step + 0.05 * there.gradient(1.0))
    monkeypatch.setattr(torch, "randn", lambda *a, **k: turned.clone())
    back, _ = hmc_transition(path(), there, 1.0, 0.1, 6)
    torch.testing.assert_close(back.position, first.position, rtol=1e-10, atol=1e-10)


def test_a_transition_calls_the_network_once_per_leapfrog_step():
    calls = []

    def energy(z):
        calls.append(1)
        return quartic(z)

    counted = AnnealingPath(DiagonalGaussian(0.0, 1.0), energy)
    state = counted.evaluate(torch.randn(5, 3))
    calls.clear()
    for _ in range(3):
        state, _ = hmc_transition(counted, state, 0.5, 0.1, 7)
    assert len(calls) == 3 * 7


def test_what_is_no_number_far_out_poisons_nothing():
    def energy(z):
        value = -0.01 * z.square().sum(-1)
        return torch.where(z.abs().amax(-1) > 2, torch.nan, value)

    cut = AnnealingPath(DiagonalGaussian(0.0, 10.0), energy)
    state, generator, divergent = cut.evaluate(torch.randn(400, 2, generator=seeded()).clamp(-1, 1)), seeded(), 0
    for _ in range(20):
        state, info = hmc_transition(cut, state, 1.0, 1.0, 3, generator)
        divergent += int(info.divergent.sum())
        assert not (info.accepted & info.divergent).any()
    assert divergent > 100
    assert all(part.isfinite().all() for part in state)
    assert state.position.abs().max() <= 2


def test_it_runs_in_inference_mode_and_leaves_parameters_without_gradients():
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 3)
    own = AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: net(z).squeeze(-1))
    outside, _ = hmc_transition(own, own.evaluate(x), 1.0, 0.2, 3, seeded())
    with torch.inference_mode():
        inside, _ = hmc_transition(own, own.evaluate(x + 0), 1.0, 0.2, 3, seeded())
    assert torch.equal(inside.position, outside.position)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not outside.position.requires_grad


def test_steps_may_differ_between_chains():
    state = path().evaluate(torch.randn(4, 3, dtype=torch.float64))
    steps = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    together, _ = hmc_transition(path(), state, 1.0, steps, 4, seeded())
    for i, step in enumerate(steps.tolist()):
        alone, _ = hmc_transition(path(), state, 1.0, step, 4, seeded())
        assert torch.equal(alone.position[i], together.position[i])


def test_what_does_not_fit_is_refused():
    state = path().evaluate(torch.randn(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="num_leapfrog must be at least 1; got 0"):
        hmc_transition(path(), state, 1.0, 0.1, 0)
    with pytest.raises(ValueError, match=r"one number per point, \(4,\); got \(\)"):
        AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: z.sum()).evaluate(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="must depend on z by autograd: is it detached"):
        AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: z.detach().sum(-1)).evaluate(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="no gradients"):
        path().evaluate(torch.zeros(4, 3), gradient=False).gradient(1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        DiagonalGaussian(0.0, 0.0)
