"""Bounds of mutual information: every outcome of a finite model summed over, identities, and what they refuse."""

import itertools
import math

import pytest
import torch

from lightning_ext.functional import (
    ais_lower,
    ais_upper,
    barber_agakov_lower,
    barber_agakov_upper,
    giwae_lower,
    giwae_upper,
    ibal_certified,
    ibal_forward,
    iwae_bound,
    linear_schedule,
    structured_infonce,
    structured_infonce_upper,
)

F64 = torch.float64
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64)  # rows x, columns z
Q = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5]], dtype=F64)
T = torch.tensor([[1.0, -0.5, 0.0], [0.0, 1.0, 0.5], [-1.0, 0.5, 1.0]], dtype=F64)
P_X, P_Z = JOINT.sum(1), JOINT.sum(0)
LIKELIHOOD = (JOINT / P_Z).log()
POSTERIOR = JOINT / P_X[:, None]
PRIOR = P_Z.expand(3, 3)
INFORMATION = (JOINT * (LIKELIHOOD - P_X.log()[:, None])).sum().item()
TABLE = {  # K: IWAE lower, upper; GIWAE lower, upper; InfoNCE; structured InfoNCE lower, upper
    1: (0.19596011, 0.28606924, 0.19596011, 0.28606924, 0.0, 0.0, 0.51608943),
    2: (0.21805084, 0.26135502, 0.19896954, 0.27986834, 0.10942229, 0.11656094, 0.38151986),
    3: (0.22522359, 0.25353818, 0.20018047, 0.27781004, 0.14811304, 0.15785583, 0.33114316),
    6: (0.23224941, 0.24610402, 0.20194666, 0.27440708, 0.18692709, 0.19915254, 0.28203651),
}


def outcomes(*densities):
    """Every x with every row of z, one from each density (x, z), and the probability of it all."""
    x, *z = (
        torch.tensor(column) for column in zip(*itertools.product(range(3), repeat=1 + len(densities)), strict=True)
    )
    probability = P_X[x]
    for density, drawn in zip(densities, z, strict=True):
        probability = probability * density[x, drawn]
    return x, torch.stack(z), probability


def expected(values, probability):
    return (values * probability).sum().item()


def log_weights(q):
    return LIKELIHOOD + P_Z.log() - q.log()


def upper_side(q, num):
    """The expected C, which needs its own z, apart from the K samples."""
    x, z, probability = outcomes(*[q] * num)
    scale = (POSTERIOR[x] * LIKELIHOOD[x]).sum(1)
    return x, z, probability, scale


@pytest.mark.parametrize("num", TABLE)
def test_the_enumerated_table(num):
    x, z, probability = outcomes(POSTERIOR, *[Q] * (num - 1))
    found = [expected(iwae_bound(LIKELIHOOD[x, z[0]], log_weights(Q)[x, z]), probability)]
    giwae = expected(giwae_lower(Q.log()[x, z[0]], P_Z.log()[z[0]], T[x, z]), probability)
    x, z, probability, scale = upper_side(Q, num)
    found += [expected(iwae_bound(scale, log_weights(Q)[x, z]), probability), giwae]
    found += [expected(giwae_upper(scale, log_weights(Q)[x, z], T[x, z]), probability)]
    x, z, probability = outcomes(POSTERIOR, *[PRIOR] * (num - 1))
    found += [expected(giwae_lower(P_Z.log()[z[0]], P_Z.log()[z[0]], T[x, z]), probability)]
    found += [expected(structured_infonce(LIKELIHOOD[x, z]), probability)]
    x, z, probability, scale = upper_side(PRIOR, num)
    found += [expected(structured_infonce_upper(scale, LIKELIHOOD[x, z]), probability)]
    assert found == pytest.approx(TABLE[num], abs=6e-9)
    assert pytest.approx(0.2391079865, abs=1e-10) == INFORMATION


def test_barber_agakov_is_off_by_the_divergence_of_the_proposal():
    x, [z], probability = outcomes(POSTERIOR)
    below = expected(barber_agakov_lower(Q.log()[x, z], P_Z.log()[z]), probability)
    assert INFORMATION - below == pytest.approx(expected((POSTERIOR / Q).log()[x, z], probability))
    x, [z], probability, scale = upper_side(Q, 1)
    above = expected(barber_agakov_upper(scale, log_weights(Q)[x, z]), probability)
    assert above - INFORMATION == pytest.approx(expected((Q / POSTERIOR).log()[x, z], probability))


@pytest.mark.parametrize(("base", "value"), [(Q, 0.20426609), (PRIOR, 0.22480243)])
def test_the_energy_based_bound_from_either_side(base, value):
    """With T = 1 there are no transitions: the forward weight is e^T of a base sample, the reverse one of the data."""
    x, [z], probability = outcomes(POSTERIOR)
    log_z = torch.logsumexp(base.log() + T, 1)
    exact = ibal_forward(base.log()[x, z], P_Z.log()[z], T[x, z], log_z[x][None])
    assert expected(exact, probability) == pytest.approx(value, abs=6e-9)
    one = ibal_certified(base.log()[x, z], P_Z.log()[z], T[x, z], T[x, z][None])
    torch.testing.assert_close(one, barber_agakov_lower(base.log()[x, z], P_Z.log()[z]))


def metropolis(log_p):
    """The kernel (z, z') that offers either other state."""
    accept = (log_p[None] - log_p[:, None]).exp().clamp(max=1.0) / 2
    accept.fill_diagonal_(0.0)
    return accept + torch.diag(1 - accept.sum(1))


def paths(x, steps, reverse):
    """All states that a chain may have when it is weighed, first to last in time, each with its probability."""
    betas = linear_schedule(steps)
    kernels = [metropolis(P_Z.log() + beta * LIKELIHOOD[x]) for beta in betas[1:]]
    found = []
    for row in itertools.product(range(3), repeat=steps):
        ordered = row if not reverse else row[::-1]
        probability = (POSTERIOR[x] if reverse else P_Z)[ordered[0]].item()
        moves = kernels[: steps - 1] if not reverse else kernels[: steps - 1][::-1]
        for kernel, (start, end) in zip(moves, itertools.pairwise(ordered), strict=True):
            probability *= kernel[start, end].item()
        weight = sum((betas[t + 1] - betas[t]).item() * LIKELIHOOD[x, z].item() for t, z in enumerate(row))
        found.append((row, probability, weight))
    return found


def pairs_of_chains(x, scheme, steps, side):
    """Log-weights (K = 2, outcomes) as the scheme takes them, and probabilities, given x."""
    forward, reverse = paths(x, steps, False), paths(x, steps, True)

    def continued(end):
        mass = sum(p for row, p, _ in reverse if row[-1] == end)
        return [(row, p / mass, w) for row, p, w in reverse if row[-1] == end]

    if scheme == "single":
        return [(w, w, p) for _, p, w in (forward if side == "upper" else reverse)]
    if scheme == "independent":
        first = forward if side == "upper" else reverse
        return [(a, b, p * r) for _, p, a in first for _, r, b in forward]
    if scheme == "independent_reverse":
        first = forward if side == "upper" else reverse
        return [(a, b, p * r) for _, p, a in first for _, r, b in reverse]
    first = forward if side == "upper" else reverse
    return [(a, b, p * r) for row, p, a in first for _, r, b in continued(row[-1])]


SCHEMES = {
    1: {"single": (0.516089, 0), "independent": (0.381520, 0.116561), "independent_reverse": (0.399528, 0.086133),
        "coupled_reverse": (0.516089, 0)},
    2: {"single": (0.364340, 0.117810), "independent": (0.304746, 0.176235),
        "independent_reverse": (0.305915, 0.172106), "coupled_reverse": (0.331170, 0.149924)},
    4: {"single": (0.300400, 0.179311), "independent": (0.270159, 0.208648),
        "independent_reverse": (0.271062, 0.207449), "coupled_reverse": (0.279144, 0.200155)},
}  # fmt: skip


@pytest.mark.parametrize("steps", SCHEMES)
@pytest.mark.parametrize("scheme", SCHEMES[1])
def test_every_scheme_of_two_chains_on_every_outcome(steps, scheme):
    totals = {"upper": 0.0, "lower": 0.0}
    for side, x in itertools.product(totals, range(3)):
        first, second, p = (
            torch.tensor(c, dtype=F64) for c in zip(*pairs_of_chains(x, scheme, steps, side), strict=True)
        )
        scale = (POSTERIOR[x] * LIKELIHOOD[x]).sum().expand(len(p))
        together, first, second = torch.stack([first, second]), first[None], second[None]
        if side == "upper":
            chains = (first, second) if "reverse" in scheme else (together,)
            values = ais_upper(scale, *chains, scheme=scheme)
        else:
            chains = (first, second) if scheme == "independent" else (together,)
            values = ais_lower(scale, *chains, scheme=scheme)
        totals[side] += P_X[x].item() * expected(values, p)
    assert (totals["upper"], totals["lower"]) == pytest.approx(SCHEMES[steps][scheme], abs=1e-6)


def test_critics_that_know_the_weights_give_the_weighted_bound():
    torch.manual_seed(0)
    scale, weights, log_q, log_p = (
        torch.randn(5, dtype=F64),
        torch.randn(7, 5, dtype=F64),
        *torch.randn(2, 5, dtype=F64),
    )
    per_x = 3 * torch.randn(5, dtype=F64)
    joint = weights[0] + log_q - log_p  # C of the joint sample, where it is consistent
    torch.testing.assert_close(
        giwae_lower(log_q, log_p, weights + per_x), iwae_bound(joint, weights), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(giwae_upper(scale, weights, weights), iwae_bound(scale, weights), rtol=0, atol=1e-12)
    for critic in (weights[:1], per_x.expand(7, 5)):
        torch.testing.assert_close(
            giwae_lower(log_q, log_p, critic), barber_agakov_lower(log_q, log_p), rtol=0, atol=1e-12
        )


def test_caps_and_orders_hold_for_every_data_point():
    generator = torch.Generator().manual_seed(0)
    weights = 4 * torch.randn(9, 200, generator=generator, dtype=F64)
    log_q, log_p = torch.randn(2, 200, generator=generator, dtype=F64)
    joint = weights[0] + log_q - log_p
    gain = iwae_bound(joint, weights) - barber_agakov_lower(log_q, log_p)
    assert gain.max() <= math.log(9)
    assert iwae_bound(weights[0], weights).max() <= math.log(9)
    order = torch.tensor([0, 3, 1, 8, 2, 4, 5, 6, 7])
    torch.testing.assert_close(iwae_bound(joint, weights[order]), iwae_bound(joint, weights), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_certified_is_below_the_information_for_any_critic(seed):
    """Two reverse chains over two temperatures, summed over: the bound must hold for critics however wild."""
    critic = 5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
    total = 0.0
    for x, z in itertools.product(range(3), repeat=2):
        kernel = metropolis(Q.log()[x] + 0.5 * critic[x])
        ends = torch.tensor(list(itertools.product(range(3), repeat=2))).T  # of the two chains
        p = kernel[z, ends[0]] * kernel[z, ends[1]]
        weights = 0.5 * critic[x, z] + 0.5 * critic[x, ends]
        ones = torch.ones(9, dtype=F64)
        values = ibal_certified(Q.log()[x, z] * ones, P_Z.log()[z] * ones, critic[x, z] * ones, weights)
        total += JOINT[x, z].item() * expected(values, p)
    assert total <= INFORMATION + 1e-12


def test_caps_survive_scores_of_ten_million_in_single_precision():
    scores = 1e7 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(1000)
    assert structured_infonce(scores).max() <= torch.tensor(math.log(8))
    assert giwae_lower(zeros, zeros, scores).max() <= torch.tensor(math.log(8))


def test_a_positive_that_is_excluded_is_minus_infinity_and_its_neighbours_keep_gradients():
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0], [-torch.inf, 0.0, 0.0]], requires_grad=True)
    for bound in (structured_infonce(scores), giwae_lower(torch.zeros(3), torch.zeros(3), scores)):
        assert bound.tolist() == [-torch.inf, -torch.inf, 0.0]
        (gradient,) = torch.autograd.grad(bound[2], scores)
        assert gradient.tolist() == [[0.0, 0.0, 0.5], [0.0, 0.0, -0.5]]


def test_a_sample_that_is_never_chosen_leaves_finite_gradients():
    weights = torch.tensor([[0.5], [1.0], [-torch.inf]], dtype=F64, requires_grad=True)
    critic = torch.tensor([[0.3], [0.1], [-torch.inf]], dtype=F64, requires_grad=True)
    value = giwae_upper(torch.zeros(1, dtype=F64), weights, critic)
    pair = giwae_upper(torch.zeros(1, dtype=F64), weights[:2], critic[:2])
    torch.testing.assert_close(value, pair + math.log(3 / 2))
    for ours, alone in zip(
        torch.autograd.grad(value, (weights, critic)), torch.autograd.grad(pair, (weights, critic)), strict=True
    ):
        torch.testing.assert_close(ours, alone)


def test_infinite_bounds_are_infinite():
    scale, nothing = torch.zeros(2), torch.full((3, 2), -torch.inf)
    assert iwae_bound(scale, nothing).tolist() == [torch.inf] * 2
    assert ais_upper(scale, nothing).tolist() == [torch.inf] * 2
    assert barber_agakov_upper(scale, nothing[0]).tolist() == [torch.inf] * 2
    assert giwae_upper(scale, nothing, torch.zeros(3, 2)).tolist() == [torch.inf] * 2
    never = torch.tensor([[0.0, 0.0], [-torch.inf, 0.0], [0.0, 0.0]])
    assert giwae_upper(scale, torch.where(never.isinf(), never, 0.0), never).isfinite().all()


def test_bounds_are_differentiable():
    torch.manual_seed(0)
    vector, table = torch.randn(4, dtype=F64, requires_grad=True), torch.randn(3, 4, dtype=F64, requires_grad=True)
    other = torch.randn(3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(iwae_bound, (vector, table))
    assert torch.autograd.gradcheck(lambda v, t: giwae_lower(v, 2 * v, t), (vector, table))
    assert torch.autograd.gradcheck(giwae_upper, (vector, table, other))


def test_shapes_that_would_broadcast_are_refused():
    vector, table = torch.zeros(3), torch.zeros(2, 3)
    for call in (
        lambda: iwae_bound(vector, torch.zeros(2, 1)),
        lambda: iwae_bound(vector, torch.zeros(0, 3)),
        lambda: iwae_bound(vector, vector),
        lambda: structured_infonce(vector),
        lambda: structured_infonce(torch.zeros(0, 3)),
        lambda: structured_infonce_upper(vector, torch.zeros(2, 1)),
        lambda: giwae_lower(vector, vector, torch.zeros(3, 2)),
        lambda: giwae_upper(vector, table, torch.zeros(1, 3)),
        lambda: ibal_certified(vector, vector, vector, torch.zeros(2, 4)),
        lambda: ibal_forward(vector, vector, vector, vector),
        lambda: ais_upper(vector, table.T),
        lambda: ais_lower(vector, vector),
    ):
        with pytest.raises(ValueError, match=r"K >= 1 samples of each of 3 data points, \(K, 3\); got"):
            call()
    for call in (
        lambda: barber_agakov_lower(vector, torch.zeros(1)),
        lambda: barber_agakov_upper(vector[:, None], vector),
        lambda: giwae_lower(vector, torch.zeros(()), table),
    ):
        with pytest.raises(ValueError, match=r"one number per data point, \(B,\), in each; got"):
            call()


def test_schemes_take_the_chains_they_are_made_of():
    vector, table = torch.zeros(3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="reverse has no part in the upper bound with scheme='independent'"):
        ais_upper(vector, table, table)
    with pytest.raises(ValueError, match="pass reverse"):
        ais_upper(vector, table, scheme="coupled_reverse")
    with pytest.raises(ValueError, match="pass forward"):
        ais_lower(vector, table, scheme="independent")
    with pytest.raises(ValueError, match="forward has no part"):
        ais_lower(vector, table, table)
    for call in (ais_upper, ais_lower):
        with pytest.raises(ValueError, match=r"scheme must be one of 'single'.*got 'both'"):
            call(vector, table, scheme="both")
