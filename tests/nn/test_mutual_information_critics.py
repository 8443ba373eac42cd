"""Critics against their definitions, pair by pair, and Gaussian proposals."""

import pytest
import torch
from torch import nn

from lightning_ext.nn import (
    MLP,
    ConcatenatedCritic,
    GaussianProposal,
    PairCritic,
    Proposal,
    QuadraticCritic,
    SeparableCritic,
)

B, D, LATENTS = 5, 3, 2

CRITICS = {
    "separable": lambda: SeparableCritic(MLP([D, 7, 4]), MLP([LATENTS, 7, 4])),
    "concatenated": lambda: ConcatenatedCritic(D, LATENTS, [7, 6]),
    "quadratic": lambda: QuadraticCritic(D, LATENTS),
}


@pytest.fixture(params=CRITICS)
def critic(request):
    torch.manual_seed(0)
    found = CRITICS[request.param]().double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter))
    return found


@pytest.fixture
def x():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def latents(*shape, seed=2):
    return torch.randn(*shape, LATENTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(critic, x, z):
    """T of one x (D,) and one z (d,)."""
    if isinstance(critic, SeparableCritic):
        return critic.x_net(x[None])[0] @ critic.z_net(z[None])[0]
    if isinstance(critic, QuadraticCritic):
        curved = (critic.z_log_curvature.exp() * z * z).sum() + (critic.x_log_curvature.exp() * x * x).sum()
        return x @ critic.coupling @ z - 0.5 * curved + critic.offset[0]
    first = nn.Linear(D + LATENTS, critic.x_part.out_features).double()
    first.weight.data = torch.cat([critic.x_part.weight, critic.z_part.weight], 1)
    first.bias.data = critic.x_part.bias
    return critic.rest(first(torch.cat([x, z])))[0]


def test_scores_are_those_of_single_pairs(critic, x):
    z = latents(2, 4, B)
    expected = torch.stack([by_hand(critic, x[b], z[i, k, b]) for i in range(2) for k in range(4) for b in range(B)])
    torch.testing.assert_close(critic(x, z), expected.view(2, 4, B))
    torch.testing.assert_close(critic(x, z[0, 0]), expected.view(2, 4, B)[0, 0])


@pytest.mark.parametrize("others", [1, B, 8])
def test_the_table_has_x_in_rows_and_z_in_columns(critic, x, others):
    z = latents(others)
    expected = torch.stack([torch.stack([by_hand(critic, row, column) for column in z]) for row in x])
    torch.testing.assert_close(critic.matrix(x, z), expected)


def test_one_pair_is_no_special_case(critic, x):
    z = latents(4, 1)
    torch.testing.assert_close(critic(x[:1], z), torch.stack([by_hand(critic, x[0], row[0]) for row in z])[:, None])
    assert critic.matrix(x[:1], z[0]).shape == (1, 1)


def test_latents_that_would_broadcast_are_refused(critic, x):
    with pytest.raises(ValueError, match=r"z must have shape \(..., 5, d\).*got \(4, 2\)"):
        critic(x, latents(4))
    with pytest.raises(ValueError, match=r"z must have shape \(C, d\); got \(3, 5, 2\)"):
        critic.matrix(x, latents(3, B))


def test_a_critic_of_ones_own_needs_a_score_and_its_shape_is_checked(x):
    class Distance(PairCritic):
        def score(self, embedded, z):
            return -(embedded[..., :LATENTS] - z).square().sum(-1)

    class Forgetful(PairCritic):
        def score(self, embedded, z):
            return -(embedded[..., :LATENTS] - z).square()

    z = latents(B)
    expected = -(x[:, None, :LATENTS] - z[None]).square().sum(-1)
    torch.testing.assert_close(Distance().matrix(x, z), expected)
    with pytest.raises(ValueError, match=r"Forgetful.score must give one number per pair, \(5,\); got \(5, 2\)"):
        Forgetful()(x, z)


def test_images_go_through_a_network_of_their_own():
    images = torch.rand(B, 1, 8, 8)
    convolutions = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.ReLU())
    critic = ConcatenatedCritic(27, LATENTS, [6], "tanh", convolutions)
    assert critic.matrix(images, torch.rand(4, LATENTS)).shape == (B, 4)
    assert ConcatenatedCritic(64, LATENTS)(images, torch.rand(B, LATENTS)).shape == (B,)


def test_the_split_layer_starts_as_a_whole_one():
    torch.manual_seed(3)
    critic = ConcatenatedCritic(D, LATENTS, [7])
    torch.manual_seed(3)
    whole = nn.Linear(D + LATENTS, 7)
    assert torch.equal(torch.cat([critic.x_part.weight, critic.z_part.weight], 1), whole.weight)
    assert torch.equal(critic.x_part.bias, whole.bias)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConcatenatedCritic(3, 2, []), "hidden must name a width"),
        (lambda: ConcatenatedCritic(3, 2, activation="sine"), "activation be one of 'relu', 'tanh', 'gelu'.*'sine'"),
        (lambda: GaussianProposal(nn.Linear(3, 4), -1.0), "min_scale must be at least 0; got -1.0"),
        (
            lambda: SeparableCritic(nn.Linear(3, 4), nn.Linear(2, 5))(torch.rand(1, 3), torch.rand(1, 2)),
            "equally many features; got 4 and 5",
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_proposal_is_the_encoders_gaussian_and_no_point(x):
    network = nn.Linear(D, 2 * LATENTS).double()
    network.weight.data.zero_()
    network.bias.data = torch.tensor([1.0, 2.0, 0.0, -100.0], dtype=torch.float64)
    found = GaussianProposal(network, min_scale=0.01)(x)
    assert found.batch_shape == (B,)
    assert found.event_shape == (LATENTS,)
    torch.testing.assert_close(found.mean, torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(B, 2))
    torch.testing.assert_close(found.stddev, torch.tensor([[1.01, 0.01]], dtype=torch.float64).expand(B, 2))


def test_chains_know_the_gradient_of_a_gaussian_proposal(x):
    found = GaussianProposal(nn.Linear(D, 2 * LATENTS).double())(x)
    density, z = Proposal.of(found).density, latents(7, B)
    torch.testing.assert_close(density(z), found.log_prob(z))
    leaf = z.requires_grad_()
    [expected] = torch.autograd.grad(found.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(density.gradient(z.detach()), expected)
    assert not density.gradient(z.detach()).requires_grad
