"""Bounds from densities as metrics: the enumerated table, standard errors, infinite values, and what they refuse.

Plain references, ranks, copies and merges are checked through the conformance registry.
"""

import math
import warnings

import pytest
import torch
from scipy import stats

from lightning_ext.metrics import AISBound, BarberAgakovBound, GIWAEBound, IBALEstimate, IWAEBound, StructuredInfoNCE
from lightning_ext.testing import run_ddp

F64 = torch.float64
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64)  # rows x, columns z
Q = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5]], dtype=F64)
CRITIC = torch.tensor([[1.0, -0.5, 0.0], [0.0, 1.0, 0.5], [-1.0, 0.5, 1.0]], dtype=F64)
PRIOR = JOINT.sum(0).expand(3, 3)
LIKELIHOOD, LOG_PRIOR = (JOINT / JOINT.sum(0)).log(), JOINT.sum(0).log()
WEIGHTS = LIKELIHOOD + LOG_PRIOR - Q.log()


def every_outcome(q, num, scale):
    """x, its own z, and num samples of q, each outcome as often as its probability times ``scale`` says."""
    shape = [3] * (2 + num)
    p = JOINT.reshape(3, 3, *[1] * num)
    for k in range(num):
        p = p * q.reshape(3, 1, *[1] * k, 3, *[1] * (num - k - 1))
    times = p.flatten() * scale
    assert torch.allclose(times, times.round(), atol=1e-6)
    cells = torch.repeat_interleave(torch.arange(times.numel()), times.round().long())
    x, z, *samples = torch.unravel_index(cells, shape)
    return x, z, torch.stack(samples)


def computed(metric, **arguments):
    metric.update(**arguments)
    return metric.compute()


@pytest.mark.parametrize(
    ("num", "iwae", "giwae"),
    [
        (1, (0.19596011, 0.28606924), (0.19596011, 0.28606924)),
        (2, (0.21805084, 0.26135502), (0.19896954, 0.27986834)),
        (3, (0.22522359, 0.25353818), (0.20018047, 0.27781004)),
    ],
)
def test_the_enumerated_table_with_a_proposal(num, iwae, giwae):
    x, z, samples = every_outcome(Q, num, 100 * 10**num)
    own = LIKELIHOOD[x, z]
    found = computed(
        IWAEBound("both", num_samples=num),
        log_likelihood=own,
        log_weights=WEIGHTS[x, samples],
        posterior_log_weight=WEIGHTS[x, z],
    )
    assert [found[side].item() for side in ("lower", "upper")] == pytest.approx(iwae, abs=6e-9)
    assert found["gap"].item() == pytest.approx(iwae[1] - iwae[0], abs=2e-8)
    found = computed(
        GIWAEBound("both"),
        log_q=Q.log()[x, z],
        log_prior=LOG_PRIOR[z],
        critic=CRITIC[x, samples],
        posterior_critic=CRITIC[x, z],
        log_likelihood=own,
        log_weights=WEIGHTS[x, samples],
    )
    assert [found[side].item() for side in ("lower", "upper")] == pytest.approx(giwae, abs=6e-9)
    if num == 1:
        found = computed(
            BarberAgakovBound("both"),
            log_q=Q.log()[x, z],
            log_prior=LOG_PRIOR[z],
            log_likelihood=own,
            log_weight=WEIGHTS[x, samples[0]],
        )
        assert [found[side].item() for side in ("lower", "upper")] == pytest.approx(iwae, abs=6e-9)


@pytest.mark.parametrize(("num", "values"), [(1, (0.0, 0.51608943)), (2, (0.11656094, 0.38151986))])
def test_the_enumerated_table_with_the_prior(num, values):
    x, z, samples = every_outcome(PRIOR, num, 100 * 100**num)
    metric = StructuredInfoNCE("both")
    found = computed(metric, scores=LIKELIHOOD[x, samples], log_likelihood=LIKELIHOOD[x, z])
    assert [found[side].item() for side in ("lower", "upper")] == pytest.approx(values, abs=6e-9)


def test_a_side_alone_takes_its_posterior_sample_from_the_first_row():
    x, z, samples = every_outcome(Q, 2, 10**4)
    own, rows = LIKELIHOOD[x, z], torch.stack([z, samples[1]])
    lower = computed(IWAEBound(), log_likelihood=own, log_weights=WEIGHTS[x, rows])
    assert lower["lower"].item() == pytest.approx(0.21805084, abs=6e-9)
    assert set(lower) == {"lower", "stderr", "count"}
    upper = computed(IWAEBound("upper"), log_likelihood=own, log_weights=WEIGHTS[x, samples])
    assert upper["upper"].item() == pytest.approx(0.26135502, abs=6e-9)
    giwae = computed(GIWAEBound(), log_q=Q.log()[x, z], log_prior=LOG_PRIOR[z], critic=CRITIC[x, rows])
    assert giwae["lower"].item() == pytest.approx(0.19896954, abs=6e-9)
    alone = computed(StructuredInfoNCE(), scores=LIKELIHOOD[x, rows])
    again = computed(StructuredInfoNCE(), scores=LIKELIHOOD[x, samples], log_likelihood=own)
    assert alone["lower"] == again["lower"]


def test_standard_errors_are_those_of_pairs_and_of_their_differences():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(4, 50, generator=generator, dtype=F64)
    value = computed(
        BarberAgakovBound("both", key_prefix="ba/"),
        log_q=draw[0],
        log_prior=draw[1],
        log_likelihood=draw[0] + 2,
        log_weight=draw[1] + 0.1 * draw[2],
    )
    lower, upper = draw[0] - draw[1], draw[0] + 2 - draw[1] - 0.1 * draw[2]
    expected = {"lower": lower, "upper": upper, "gap": upper - lower}
    for name, values in expected.items():
        assert value[f"ba/{name}"].item() == pytest.approx(values.mean().item())
        assert value[f"ba/{name}_stderr"].item() == pytest.approx(stats.sem(values))
    assert value["ba/gap_stderr"] < 0.2 * value["ba/lower_stderr"]  # what both sides share drops out
    assert value["ba/count"].item() == 50


def test_evidence_of_a_million_nats_keeps_its_digits():
    """Sums of squares in float32, or in float64 without a centre, would lose the deviations."""
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=F64)
    offset = 1e7
    metric = BarberAgakovBound().half()
    for piece in noise.split(100):
        metric.update(log_q=piece + offset, log_prior=torch.zeros(100, dtype=F64))
    value = metric.compute()
    assert value["lower"].item() - offset == pytest.approx(noise.mean().item(), abs=1e-7)
    assert value["stderr"].item() == pytest.approx(stats.sem(noise), rel=1e-6)


def test_caps_hold_for_every_pair():
    generator = torch.Generator().manual_seed(0)
    scores = 30 * torch.randn(8, 500, generator=generator, dtype=F64)
    for column in scores.T:
        assert computed(StructuredInfoNCE(), scores=column[:, None].expand(8, 2))["lower"] <= math.log(8) + 1e-12


class TestInfiniteBounds:
    def test_an_upper_bound_is_infinite_and_its_lower_one_stays(self):
        metric = IWAEBound("both")
        metric.update(torch.zeros(2), torch.tensor([[-torch.inf, 0.0]] * 3), torch.zeros(2))
        metric.update(torch.zeros(2), torch.zeros(3, 2), torch.zeros(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = {name: tensor.item() for name, tensor in metric.compute().items()}
        assert value["upper"] == value["gap"] == value["upper_stderr"] == value["gap_stderr"] == math.inf
        assert value["lower"] == pytest.approx(math.log(3) / 4)
        assert value["lower_stderr"] == pytest.approx(math.log(3) / 4)
        assert value["count"] == 4

    def test_a_lower_bound_is_minus_infinity_where_q_excludes_a_pair(self):
        value = computed(BarberAgakovBound(), log_q=torch.tensor([0.0, -torch.inf]), log_prior=torch.zeros(2))
        assert (value["lower"].item(), value["stderr"].item(), value["count"].item()) == (-math.inf, math.inf, 2)

    def test_copies_of_a_symbol_are_infinite_above_and_at_most_the_entropy_below(self):
        symbols = torch.randint(16, (9, 2000), generator=torch.Generator().manual_seed(0))
        scores = torch.where(symbols[1:] == symbols[0], 0.0, -torch.inf)
        value = computed(StructuredInfoNCE("both"), scores=scores, log_likelihood=torch.zeros(2000))
        assert value["upper"].item() == value["gap"].item() == math.inf
        assert abs(value["lower"].item() - 1.798397) < 4 * value["lower_stderr"].item()  # of K = 8, in closed form

    def test_infinity_of_another_rank_counts(self):
        def compute(rank):
            log_weights = torch.full((2, 3), -torch.inf)
            log_weights[:, 1:] = 0.0 if rank else -torch.inf
            metric = IWAEBound("upper")
            metric.update(torch.zeros(3), log_weights)
            return metric.compute()

        for value in run_ddp(compute):
            assert (value["upper"].item(), value["stderr"].item(), value["count"].item()) == (math.inf, math.inf, 6)


def test_one_pair_has_no_standard_error():
    metric = BarberAgakovBound()
    metric.update(torch.ones(1), torch.zeros(1))
    with pytest.warns(UserWarning, match="standard errors are NaN: they take two pairs"):
        value = metric.compute()
    assert value["lower"].item() == 1
    assert value["stderr"].isnan()


ONE, TWO = torch.zeros(3), torch.zeros(2, 3)
EXCLUDED = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0]])
REFUSED = [
    (lambda: BarberAgakovBound("under"), "side must be one of 'lower', 'upper', 'both'; got 'under'"),
    (lambda: IWAEBound(num_samples=0), "num_samples must be at least 1, or None for any; got 0"),
    (lambda: BarberAgakovBound().update(ONE), "update needs log_prior with side='lower'"),
    (lambda: BarberAgakovBound("upper").update(log_likelihood=ONE), "update needs log_weight with side='upper'"),
    (lambda: IWAEBound("both").update(ONE, TWO), "update needs posterior_log_weight with side='both'"),
    (lambda: StructuredInfoNCE("upper").update(TWO), "update needs log_likelihood with side='upper'"),
    (lambda: GIWAEBound().update(ONE, ONE), "update needs critic with side='lower'"),
    (lambda: IWAEBound().update(ONE, TWO.T), r"\(K, 3\); got log_weights \(3, 2\)"),
    (lambda: IWAEBound().update(ONE, ONE), r"\(K, 3\); got log_weights \(3,\)"),
    (lambda: StructuredInfoNCE().update(ONE), r"scores must be \(K, B\).*got \(3,\)"),
    (lambda: IWAEBound("both").update(ONE, TWO, ONE[:1]), r"posterior_log_weight \(B,\), of one B; got \(2, 3\) and"),
    (lambda: IWAEBound().update(ONE, torch.zeros(0, 3)), r"log_weights is empty, of shape \(0, 3\): .*K >= 1"),
    (lambda: IWAEBound().update(ONE[:0], TWO[:, :0]), r"log_likelihood is empty, of shape \(0,\): .*B >= 1"),
    (lambda: IWAEBound(num_samples=5).update(ONE, TWO), "num_samples=5 samples; got 2"),
    (lambda: IWAEBound().update(ONE, EXCLUDED), r"log_weights\[0\], the posterior sample's, is not finite for 1 of 3"),
    (lambda: IWAEBound("both").update(ONE, TWO, EXCLUDED[0]), "posterior_log_weight is not finite for 1 of 3 pairs"),
    (lambda: IWAEBound("upper").update(EXCLUDED[0], TWO), "log_likelihood is not finite for 1 of 3 pairs"),
    (lambda: StructuredInfoNCE().update(EXCLUDED), r"scores\[0\], the likelihood of the pair, is not finite for 1"),
    (lambda: StructuredInfoNCE("both").update(TWO, EXCLUDED[0]), "log_likelihood is not finite for 1 of 3 pairs"),
    (lambda: GIWAEBound().update(ONE, ONE, EXCLUDED), r"critic\[0\], at the pair's own z, is not finite for 1 of 3"),
    (lambda: BarberAgakovBound().update(ONE, EXCLUDED[0]), "log_prior is not finite for 1 of 3 pairs"),
    (lambda: BarberAgakovBound().update(ONE, ONE / 0), "log_prior has 3 NaN of 3 numbers"),
    (lambda: IWAEBound("upper").update(ONE, -EXCLUDED), "the upper value is -inf for 1 of 3 pairs"),
    (
        lambda: GIWAEBound("upper").update(critic=TWO - torch.inf, log_likelihood=ONE, log_weights=TWO),
        "critic is minus infinity at all samples of some pair",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("metric", [BarberAgakovBound, IWAEBound, StructuredInfoNCE, GIWAEBound, AISBound])
def test_nothing_can_be_computed_of_nothing(metric):
    with pytest.warns(UserWarning, match="before"), pytest.raises(RuntimeError, match="has seen no pair on any rank"):
        metric().compute()


def test_a_refused_batch_leaves_the_bound_as_it_was():
    metric = IWAEBound("both")
    metric.update(ONE, TWO, ONE)
    with pytest.raises(ValueError, match="posterior_log_weight"):
        metric.update(ONE, TWO, EXCLUDED[0])
    assert metric.compute()["count"].item() == 3


class TestPlot:
    def test_bounds_stand_where_they_are_with_their_errors(self):
        pytest.importorskip("matplotlib")
        metric = BarberAgakovBound("both", key_prefix="ba/")
        metric.update(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([4.0, 6.0]), torch.zeros(2))
        _, axes = metric.plot(label="q", truth=3.0)
        bars = {bar.get_label(): bar for bar in axes.containers}
        assert [float(bars[f"{side} bound"][0].get_xdata()[0]) for side in ("lower", "upper")] == [1.5, 5.0]
        ((left, _), (right, _)) = bars["upper bound"][2][0].get_segments()[0]
        assert (left, right) == pytest.approx((4.0, 6.0))
        assert [text.get_text() for text in axes.get_yticklabels()] == ["q"]
        assert [list(line.get_xdata()) for line in axes.lines if line.get_gid() == "truth"] == [[3.0, 3.0]]
        told = [text.get_text() for text in axes.get_legend().get_texts()]
        assert told == ["lower bound", "upper bound", "truth"]

    def test_another_bound_is_one_more_row(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        figure, given = plt.subplots()
        for n in (2, 3):
            metric = IBALEstimate("forward")
            metric.update(torch.zeros(n), torch.arange(float(n)), torch.zeros(2, n))
            assert metric.plot(ax=given, truth=0.5) == (figure, given)
        assert [text.get_text() for text in given.get_yticklabels()] == ["IBALEstimate"] * 2
        assert [float(bar[0].get_ydata()[0]) for bar in given.containers] == [0, 1]
        assert [text.get_text() for text in given.get_legend().get_texts()].count("estimate, no bound") == 1
        assert len([line for line in given.lines if line.get_gid() == "truth"]) == 1

    def test_an_infinite_bound_is_said_at_the_edge(self):
        pytest.importorskip("matplotlib")
        metric = IWAEBound("both")
        metric.update(torch.zeros(2), torch.tensor([[-torch.inf, 0.0]] * 3), torch.zeros(2))
        _, axes = metric.plot()
        assert [text.get_text() for text in axes.texts] == ["upper bound is +∞ →"]
        assert [bar.get_label() for bar in axes.containers] == ["lower bound"]

    def test_without_matplotlib_the_error_has_the_pip_line(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
        metric = BarberAgakovBound()
        metric.update(torch.ones(2), torch.zeros(2))
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[plot\]'"):
            metric.plot()
