"""Closed forms of mutual information, against each other and to the digits that are known."""

import math

import pytest
import torch

from lightning_ext.functional import (
    copy_infonce,
    correlated_gaussian_information,
    finite_joint_information,
    linear_gaussian_annealing_bounds,
    linear_gaussian_information,
    linear_schedule,
    quadratic_critic_values,
    sigmoid_schedule,
)


def seeded_weight():
    return 0.5 * torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_seeded_linear_model():
    weight = seeded_weight()
    assert linear_gaussian_information(weight, 0.3).item() == pytest.approx(6.006779, abs=5e-7)
    covariance = weight @ weight.T + 0.09 * torch.eye(10, dtype=torch.float64)
    direct = 0.5 * (torch.logdet(covariance) - 10 * math.log(0.09))
    torch.testing.assert_close(linear_gaussian_information(weight, 0.3), direct)


@pytest.mark.parametrize(
    ("betas", "upper", "lower"),
    [
        (linear_schedule(10), 14.7497, 3.4655), (linear_schedule(100), 6.6433, 5.5149),
        (linear_schedule(1000), 6.0640, 5.9511), (sigmoid_schedule(10), 9.2016, 4.0616),
        (sigmoid_schedule(100), 6.2586, 5.7672), (sigmoid_schedule(100, 8.0), 6.3589, 5.6770),
    ],
)  # fmt: skip
def test_perfect_transitions_of_the_seeded_model(betas, upper, lower):
    found = [value.item() for value in linear_gaussian_annealing_bounds(seeded_weight(), 0.3, betas)]
    assert found == pytest.approx([upper, lower], abs=6e-5)


@pytest.mark.parametrize(
    ("steps", "upper", "lower"), [(4, 2.751338, 0.501338), (10, 1.699132, 0.799132), (100, 1.197374, 1.107374)]
)
def test_one_dimension(steps, upper, lower):
    weight = torch.tensor([[3.0]])
    found = [value.item() for value in linear_gaussian_annealing_bounds(weight, 1.0, linear_schedule(steps))]
    assert found == pytest.approx([upper, lower], abs=6e-7)
    assert (found[0] - found[1]) * steps == pytest.approx(9.0)
    assert linear_gaussian_information(weight, 1.0).item() == pytest.approx(1.151293, abs=5e-7)
    ends = [value.item() for value in linear_gaussian_annealing_bounds(weight, 1.0, [0.0, 1.0])]
    assert ends == pytest.approx([9.0, 0.0], abs=1e-12)


@pytest.mark.parametrize(("dim", "rho", "value"), [(5, 0.9, 4.151828), (20, 0.5, 2.876821), (10, 0.99, 19.585178)])
def test_correlated_gaussians(dim, rho, value):
    assert correlated_gaussian_information(dim, rho) == pytest.approx(value, abs=6e-7)


def test_finite_joints():
    joint = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=torch.float64)
    assert finite_joint_information(joint).item() == pytest.approx(0.2391079865, abs=1e-10)
    assert finite_joint_information(torch.full((4, 5), 0.05)).item() == pytest.approx(0.0, abs=1e-7)
    assert finite_joint_information(torch.eye(16) / 16).item() == pytest.approx(math.log(16))


def test_copies():
    found = [copy_infonce(16, 2), copy_infonce(16, 8), copy_infonce(16, 1024), copy_infonce(256, 64)]
    assert found == pytest.approx([0.649825, 1.798397, 2.765244, 3.996490], abs=6e-7)
    assert copy_infonce(16, 1) == 0.0


def test_quadratic_critics():
    best = {"rho": 0.9, "a": 0.9 / 0.19, "b": 1 / 0.19 - 1}
    matched = quadratic_critic_values(**best, c=4.263158)
    assert list(matched.values()) == pytest.approx([0.8303656, 0.8303656, 0.5641101], abs=6e-7)
    shifted = quadratic_critic_values(**best, c=6.263158)
    assert list(shifted.values()) == pytest.approx([0.8303656, 0.3796717, -0.2516614], abs=6e-7)
    assert matched["ibal"] == pytest.approx(correlated_gaussian_information(1, 0.9))
    assert quadratic_critic_values(0.9, 2.0, 1.0, 0.9)["donsker_varadhan"] == -math.inf
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    critic = lambda x, z: 0.5 * x * z - 0.1 * z.square() - 0.2 * x.square()  # noqa: E731
    joint, marginal = critic(x, 0.6 * x + 0.8 * e), critic(x, e)
    values = quadratic_critic_values(0.6, 0.5, 0.2, 0.4)
    assert (joint.mean() - marginal.exp().mean().log()).item() == pytest.approx(values["donsker_varadhan"], abs=0.005)
    assert (joint.mean() + 1 - marginal.exp().mean()).item() == pytest.approx(values["nwj"], abs=0.005)


def test_what_has_no_information_is_refused():
    for call, message in (
        (lambda: linear_gaussian_information(torch.ones(3), 1.0), r"weight must be \(D, d\)"),
        (lambda: linear_gaussian_information(torch.ones(3, 1), 0.0), "sigma positive"),
        (lambda: linear_gaussian_annealing_bounds(torch.ones(3, 1), 1.0, [0.0, 0.5]), "T \\+ 1 points from 0 to 1"),
        (lambda: correlated_gaussian_information(2, 1.0), "rho between -1 and 1"),
        (lambda: correlated_gaussian_information(0, 0.5), "dim must be at least 1"),
        (lambda: finite_joint_information(torch.ones(2, 2)), "sum to 1"),
        (lambda: finite_joint_information(torch.tensor([[1.5, -0.5]])), "probabilities"),
        (lambda: copy_infonce(0, 1), "at least 1"),
        (lambda: quadratic_critic_values(0.5, 1.0, -1.0, 0.0), "b above -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
