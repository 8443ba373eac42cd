"""Metrics of critics: closed forms, invariants, errors that are honest, and one value on any number of ranks.

Plain references, copies and merges are checked through the conformance registry.
"""

import math
import statistics

import pytest
import torch

from lightning_ext.functional import copy_infonce, donsker_varadhan_estimate, quadratic_critic_values
from lightning_ext.metrics import DonskerVaradhanEstimate, IBALEstimate, InfoNCE, NWJEstimate
from lightning_ext.testing import run_ddp

F64 = torch.float64
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64)  # rows x, columns z
Q = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5]], dtype=F64)
CRITIC = torch.tensor([[1.0, -0.5, 0.0], [0.0, 1.0, 0.5], [-1.0, 0.5, 1.0]], dtype=F64)
PRIOR = JOINT.sum(0).expand(3, 3)


def computed(metric, *arguments):
    metric.update(*arguments)
    return {name: value.item() for name, value in metric.compute().items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(
    ("base", "ibal", "dv", "nwj"),
    [(Q, 0.20426609, 0.20389154, -0.09691954), (PRIOR, 0.22480243, 0.21939377, 0.08601068)],
    ids=["q", "prior"],
)
def test_the_finite_model(base, ibal, dv, nwj):
    """Every pair as often as its probability says, and all values of z beside it, weighted into the scores."""
    cells = torch.repeat_interleave(torch.arange(9), (100 * JOINT.flatten()).round().long())
    x, z = cells // 3, cells % 3
    marginal = (CRITIC + base.log()).T[:, x] + math.log(3)  # a mean over z of these is one under the base
    ba_term = (base / PRIOR).log()[x, z]
    assert computed(DonskerVaradhanEstimate(), CRITIC[x, z], marginal, ba_term)["estimate"] == pytest.approx(
        dv, abs=6e-9
    )
    assert computed(NWJEstimate(), CRITIC[x, z], marginal, ba_term)["lower"] == pytest.approx(nwj, abs=6e-9)
    assert computed(IBALEstimate("forward"), CRITIC[x, z], ba_term, marginal)["estimate"] == pytest.approx(
        ibal, abs=6e-9
    )
    shift = normal(3)[x]
    shifted = computed(IBALEstimate("forward"), CRITIC[x, z] + shift, ba_term, marginal + shift)["estimate"]
    assert shifted == pytest.approx(ibal, abs=6e-9)
    constant = computed(DonskerVaradhanEstimate(), CRITIC[x, z] + 7, marginal + 7, ba_term)["estimate"]
    assert constant == pytest.approx(dv, abs=6e-9)
    assert computed(DonskerVaradhanEstimate(), CRITIC[x, z] + shift, marginal + shift, ba_term)["estimate"] < dv - 1e-3


@pytest.mark.parametrize(("a", "b", "c"), [(0.9 / 0.19, 0.81 / 0.19, 4.263158), (2.0, 1.0, 1.5)])
def test_quadratic_critics_of_correlated_gaussians(a, b, c):
    rho, size = 0.9, 200_000
    x = normal(size)
    z = rho * x + math.sqrt(1 - rho**2) * normal(size, seed=1)
    other = normal(size, seed=2)

    def score(z):
        return a * x * z - b * z**2 / 2 - c * x**2 / 2

    exact = quadratic_critic_values(rho, a, b, c)
    dv = computed(DonskerVaradhanEstimate(), score(z), score(other))
    nwj = computed(NWJEstimate(), score(z), score(other))
    assert abs(dv["estimate"] - exact["donsker_varadhan"]) < 4 * dv["stderr"] < 0.2
    assert abs(nwj["lower"] - exact["nwj"]) < 4 * nwj["stderr"] < 0.2


@pytest.mark.parametrize(("symbols", "num", "value"), [(16, 2, 0.649825), (16, 8, 1.798397), (16, 64, 2.647556)])
def test_infonce_of_copied_symbols(symbols, num, value):
    symbol = torch.randint(symbols, (200, num), generator=torch.Generator().manual_seed(0))
    metric = InfoNCE()
    for row in symbol:
        metric.update(torch.where(row[:, None] == row, 0.0, -torch.inf))
    found = {name: tensor.item() for name, tensor in metric.compute().items()}
    assert copy_infonce(symbols, num) == pytest.approx(value, abs=1e-6)
    assert abs(found["lower"] - value) < 0.03
    assert found["lower"] <= math.log(num)
    assert found["count"] == 200 * num


def test_infonce_is_normalised_over_z():
    scores = normal(6, 6)
    found = computed(InfoNCE(), scores)["lower"]
    assert found == pytest.approx((scores.diagonal() - scores.exp().mean(1).log()).mean().item())
    assert computed(InfoNCE(), scores + normal(6, 1, seed=1))["lower"] == pytest.approx(found, abs=1e-12)
    assert computed(InfoNCE(), scores + normal(1, 6, seed=1))["lower"] != pytest.approx(found, abs=1e-3)
    slots = torch.stack([torch.cat([row[i : i + 1], row[:i], row[i + 1 :]]) for i, row in enumerate(scores)], 1)
    assert computed(InfoNCE("slots"), slots)["lower"] == pytest.approx(found, abs=1e-12)


def test_two_ranks_give_the_estimate_of_all_their_scores():
    joint, marginal = 2 * normal(10), 3 * normal(4, 10, seed=1) + torch.arange(10.0)
    shares = [slice(0, 7), slice(7, 10)]

    def compute(rank):
        return computed(DonskerVaradhanEstimate(), joint[shares[rank]], marginal[:, shares[rank]])

    together = computed(DonskerVaradhanEstimate(), joint, marginal)
    assert together["estimate"] == pytest.approx(donsker_varadhan_estimate(joint, marginal).item(), abs=1e-12)
    for value in run_ddp(compute):
        assert value == pytest.approx(together, abs=1e-12)
    alone = [computed(DonskerVaradhanEstimate(), joint[s], marginal[:, s])["estimate"] for s in shares]
    assert abs(statistics.fmean(alone) - together["estimate"]) > 0.1  # so that a mean of ranks would be seen


def test_scores_beyond_what_exp_holds():
    value = computed(DonskerVaradhanEstimate(), torch.full((3,), 5000.0), torch.full((2, 3), 4000.0))
    assert value["estimate"] == 1000
    assert value["stderr"] == pytest.approx(0, abs=1e-6)
    assert computed(NWJEstimate(), torch.zeros(3), torch.full((2, 3), 4000.0))["lower"] == -math.inf


def test_nothing_explained_is_infinite():
    value = computed(DonskerVaradhanEstimate(), torch.zeros(3), torch.full((2, 3), -torch.inf))
    assert (value["estimate"], value["stderr"]) == (math.inf, math.inf)
    metric = DonskerVaradhanEstimate()
    metric.update(torch.tensor([0.0, -torch.inf]), torch.full((2, 2), -torch.inf))
    with pytest.warns(UserWarning, match="'estimate' is NaN: its terms are infinite with both signs"):
        assert metric.compute()["estimate"].isnan()


@pytest.mark.parametrize("build", [DonskerVaradhanEstimate, NWJEstimate, lambda: InfoNCE("slots")])
def test_standard_errors_are_the_spread_over_repetitions(build):
    values, errors = [], []
    for seed in range(300):
        x, other = normal(200, seed=2 * seed), normal(200, seed=2 * seed + 1)
        z = 0.5 * x + math.sqrt(0.75) * normal(200, seed=10_000 + seed)
        joint, marginal = 0.2 * x * z, 0.2 * x * other
        metric = build()
        arguments = (torch.stack([joint, marginal]),) if isinstance(metric, InfoNCE) else (joint, marginal)
        value = computed(metric, *arguments)
        values.append(value.get("estimate", value.get("lower")))
        errors.append(value["stderr"])
    assert statistics.stdev(values) == pytest.approx(statistics.fmean(errors), rel=0.15)


def test_what_is_certified_ignores_shifts_of_the_critic():
    joint, ba_term, weights, shift = normal(9), normal(9, seed=1), normal(5, 9, seed=2), normal(9, seed=3)
    metric = IBALEstimate()
    found = computed(metric, joint, ba_term, weights)
    assert set(found) == {"lower", "stderr", "count"}
    again = computed(IBALEstimate(), joint + shift, ba_term, weights[[3, 1, 4, 0, 2]] + shift)
    assert again == pytest.approx(found, abs=1e-12)


ONE, TWO = torch.zeros(3), torch.zeros(2, 3)
REFUSED = [
    (lambda: InfoNCE("square"), "layout must be 'in_batch' or 'slots'; got 'square'"),
    (lambda: IBALEstimate("exact"), "mode must be 'certified' or 'forward'; got 'exact'"),
    (lambda: InfoNCE().update(TWO), r"scores must be \(B, B\).*got \(2, 3\)"),
    (lambda: InfoNCE("slots").update(ONE), r"scores must be \(K, B\).*got \(3,\)"),
    (lambda: InfoNCE().update(TWO[:0, :0]), r"scores is empty, of shape \(0, 0\)"),
    (lambda: InfoNCE().update(torch.full((2, 2), -torch.inf)), "scores of pairs is not finite for 2 of 2 pairs"),
    (lambda: InfoNCE("slots").update(TWO / 0), "scores has 6 NaN of 6 numbers"),
    (lambda: DonskerVaradhanEstimate().update(ONE, TWO.T), r"t_marginal must be \(M, B\).*got \(3, 2\) and \(3,\)"),
    (lambda: NWJEstimate().update(ONE, torch.zeros(4)), r"t_marginal must be \(M, B\).*got \(4,\) and \(3,\)"),
    (lambda: NWJEstimate().update(TWO, TWO), r"t_joint and ba_term must be \(B,\).*got \(2, 3\)"),
    (lambda: NWJEstimate().update(ONE, TWO, ONE[:1]), r"t_joint and ba_term must be \(B,\).*and \(1,\)"),
    (lambda: DonskerVaradhanEstimate().update(ONE, TWO + torch.inf), "t_marginal must be below infinity; got 6"),
    (lambda: DonskerVaradhanEstimate().update(ONE + torch.inf, TWO), "t_joint must be below infinity; got 3"),
    (lambda: DonskerVaradhanEstimate().update(ONE[:0], TWO[:, :0]), "t_joint is empty"),
    (lambda: IBALEstimate().update(ONE, ONE, TWO.T), r"\(K, 3\); got reverse_log_weights \(3, 2\)"),
    (lambda: IBALEstimate().update(ONE - torch.inf, ONE, TWO), "t_joint is not finite for 3 of 3 pairs"),
    (lambda: IBALEstimate().update(ONE, ONE, TWO + torch.inf), "log_weights of reverse chains is not finite for 6"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("metric", [InfoNCE, DonskerVaradhanEstimate, NWJEstimate, IBALEstimate])
def test_nothing_can_be_computed_of_nothing(metric):
    with pytest.warns(UserWarning, match="before"), pytest.raises(RuntimeError, match="has seen no pair on any rank"):
        metric().compute()


def test_plots_say_what_is_a_bound():
    pytest.importorskip("matplotlib")
    metric = DonskerVaradhanEstimate()
    metric.update(ONE, TWO)
    _, axes = metric.plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["estimate, no bound"]
    metric = NWJEstimate()
    metric.update(ONE, TWO)
    _, axes = metric.plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lower bound"]
