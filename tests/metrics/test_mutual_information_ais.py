"""Annealed bounds as metrics: sampled chains against the enumerated table, schemes, and bounds side by side."""

import math

import pytest
import torch

from lightning_ext.functional import AnnealingPath, ais_forward, ais_reverse, linear_schedule
from lightning_ext.metrics import AISBound, MutualInformationSandwich, StructuredInfoNCE, mutual_information_sandwich
from lightning_ext.testing import run_ddp

F64 = torch.float64
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64)  # rows x, columns z
PRIOR, POSTERIOR = JOINT.sum(0), JOINT / JOINT.sum(1, keepdim=True)
LIKELIHOOD = (JOINT / PRIOR).log()
TABLE = {  # T: scheme: upper, lower; K = 2
    1: {
        "single": (0.516089, 0.0),
        "independent": (0.381520, 0.116561),
        "independent_reverse": (0.399528, 0.086133),
        "coupled_reverse": (0.516089, 0.0),
    },
    4: {
        "single": (0.300400, 0.179311),
        "independent": (0.270159, 0.208648),
        "independent_reverse": (0.271062, 0.207449),
        "coupled_reverse": (0.279144, 0.200155),
    },
}


class Chains:
    """Metropolis chains of a finite model, in the library's own annealing."""

    def __init__(self, num_steps, size=60_000, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        cell = torch.multinomial(JOINT.flatten(), size, replacement=True, generator=self.generator)
        self.x, self.z = cell // 3, cell % 3
        self.betas = linear_schedule(num_steps)
        self.log_likelihood = LIKELIHOOD[self.x, self.z]
        self.path = AnnealingPath(lambda z: PRIOR.log()[z[..., 0]], lambda z: LIKELIHOOD[self.x, z[..., 0]])

    def kernel(self, state, t, beta):
        """Offer either other state."""
        step = torch.randint(1, 3, state.position.shape, generator=self.generator)
        offer = self.path.evaluate((state.position + step) % 3, gradient=False)
        ratio = offer.log_prob(beta) - state.log_prob(beta)
        uniform = torch.rand(ratio.shape, generator=self.generator, dtype=F64)
        return offer.where(uniform.log() < ratio, state), None

    def drawn(self, probability, num):
        rows = torch.multinomial(probability, num, replacement=True, generator=self.generator)
        return rows.T[..., None]

    def forward(self, num):
        start = self.drawn(PRIOR.expand(len(self.x), 3), num)
        return ais_forward(self.path, start, self.betas, self.kernel)

    def reverse(self, start):
        return ais_reverse(self.path, start, self.betas, self.kernel).log_weights

    def coupled(self, num):
        return self.reverse(self.z.expand(num, -1)[..., None])

    def independent(self, num):
        others = self.drawn(POSTERIOR[self.x], num - 1)
        return self.reverse(torch.cat([self.z[None, :, None], others]))


def found(metric, *arguments):
    metric.update(*arguments)
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("num_steps", TABLE)
@pytest.mark.parametrize("scheme", TABLE[1])
def test_sampled_chains_meet_the_enumerated_table(num_steps, scheme):
    chains = Chains(num_steps)
    forward = chains.forward(2)
    back = chains.independent(2) if scheme == "independent_reverse" else chains.coupled(2)
    ends = chains.reverse(forward.state.position[:1].expand(2, -1, -1))
    upper = found(
        AISBound("upper", scheme),
        chains.log_likelihood,
        forward.log_weights,
        ends if scheme == "coupled_reverse" else back,
    )
    lower = found(AISBound("lower", scheme), chains.log_likelihood, forward.log_weights, back)
    for side, value, expected in zip(("upper", "lower"), (upper, lower), TABLE[num_steps][scheme], strict=True):
        assert abs(value[side] - expected) <= 4 * value["stderr"] + 1e-6
        assert value["stderr"] < 0.006


def test_a_single_step_is_structured_infonce():
    chains = Chains(1, size=100)
    forward = chains.forward(5)
    samples = LIKELIHOOD[chains.x, forward.state.position[..., 0]]
    annealed = found(
        AISBound("both", ("independent", "independent")),
        chains.log_likelihood,
        forward.log_weights,
        chains.coupled(1),
    )
    assert annealed == pytest.approx(found(StructuredInfoNCE("both"), samples, chains.log_likelihood), abs=1e-12)


def test_both_sides_are_the_sides_alone():
    chains = Chains(3, size=50)
    weights = (chains.forward(6).log_weights, chains.coupled(6))
    both = found(AISBound(), chains.log_likelihood, *weights)
    upper = found(AISBound("upper"), chains.log_likelihood, weights[0])
    lower = found(AISBound("lower"), chains.log_likelihood, None, weights[1])
    assert both["upper"] == upper["upper"]
    assert both["upper_stderr"] == upper["stderr"]
    assert both["lower"] == lower["lower"]
    assert both["lower_stderr"] == lower["stderr"]
    assert both["gap"] == pytest.approx(both["upper"] - both["lower"], abs=1e-12)
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    assert found(AISBound(), chains.log_likelihood, *(w[order] for w in weights)) == pytest.approx(both, abs=1e-12)


@pytest.mark.parametrize("scheme", TABLE[1])
def test_with_one_chain_each_scheme_is_the_single_one(scheme):
    generator = torch.Generator().manual_seed(0)
    log_likelihood = torch.randn(9, generator=generator, dtype=F64)
    forward, reverse = torch.randn(2, 1, 9, generator=generator, dtype=F64)
    for side in ("upper", "lower"):
        expected = found(AISBound(side, "single"), log_likelihood, forward, reverse)
        assert found(AISBound(side, scheme), log_likelihood, forward, reverse) == pytest.approx(expected, abs=1e-12)


ONE, TWO = torch.zeros(3), torch.zeros(2, 3)
LOST = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
REFUSED = [
    (lambda: AISBound("both", "best"), "scheme must be one of 'single'.* or two of them; got 'best'"),
    (lambda: AISBound("both", ["single"]), r"scheme must be one scheme or \(upper, lower\); got \['single'\]"),
    (lambda: AISBound("both", "coupled_reverse"), "build an AISBound for each side"),
    (lambda: AISBound().update(ONE, TWO), r"the lower bound with scheme='coupled_reverse' needs reverse chains"),
    (lambda: AISBound().update(ONE, reverse=TWO), "the upper bound with scheme='independent' needs forward chains"),
    (
        lambda: AISBound("lower", "independent").update(ONE, reverse=TWO),
        "the lower bound with scheme='independent' needs forward chains",
    ),
    (lambda: AISBound().update(ONE, TWO.T, TWO), r"\(K, 3\); got forward \(3, 2\)"),
    (lambda: AISBound().update(ONE, TWO, TWO[:, :1]), r"\(K, 3\); got reverse \(2, 1\)"),
    (lambda: AISBound().update(ONE, TWO[:0], TWO), "forward is empty"),
    (lambda: AISBound().update(ONE, TWO, LOST), "log weights of reverse chains is not finite for 1"),
    (lambda: AISBound().update(LOST[0], TWO, TWO), "log_likelihood is not finite for 1 of 3 pairs"),
    (lambda: mutual_information_sandwich([]), r"bounds must be some of 'ais'.*each once; got \[\]"),
    (lambda: mutual_information_sandwich(["ais", "ais"]), "each once; got"),
    (lambda: mutual_information_sandwich(["ksg"]), r"bounds must be some of .*; got \['ksg'\]"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


EVERY = ("ais", "barber_agakov", "giwae", "iwae", "structured_infonce")


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = ("log_likelihood", "log_q", "log_prior", "log_weight", "posterior_log_weight", "posterior_critic")
    tables = ("log_weights", "critic", "scores", "forward", "reverse")
    return {name: torch.randn(size, generator=generator, dtype=F64) for name in vectors} | {
        name: torch.randn(4, size, generator=generator, dtype=F64) for name in tables
    }


def side_by_side(**kwargs):
    return mutual_information_sandwich(EVERY, prefix="mutual_information/", **kwargs)


class TestSandwich:
    def test_keys_are_those_that_are_logged(self):
        sandwich = side_by_side()
        sandwich.update(**batch(5))
        value = sandwich.compute()
        for bound in EVERY:
            for name in ("lower", "upper", "gap", "lower_stderr", "upper_stderr", "gap_stderr", "count"):
                assert value.pop(f"mutual_information/{bound}/{name}").ndim == 0
        assert not value
        alone = mutual_information_sandwich("ais")
        alone.update(**batch(5))
        assert "ais/gap" in alone.compute()

    def test_each_bound_is_that_of_its_metric(self):
        sandwich, own = side_by_side(), AISBound()
        for seed in range(3):
            drawn = batch(5, seed)
            step = sandwich(**drawn)
            assert step["mutual_information/ais/count"].item() == 5
            own.update(drawn["log_likelihood"], drawn["forward"], drawn["reverse"])
        for name, value in own.compute().items():
            assert sandwich.compute()[f"mutual_information/ais/{name}"] == value

    def test_bounds_of_equal_states_stay_apart(self):
        """What torchmetrics would group after one batch is one another only by chance."""
        sandwich = mutual_information_sandwich(["ais", "structured_infonce"])
        ones = torch.ones(2, 3)
        sandwich.update(log_likelihood=torch.ones(3), forward=ones, reverse=ones, scores=ones)
        sandwich.update(log_likelihood=torch.ones(3), forward=0 * ones, reverse=0 * ones, scores=ones)
        value = sandwich.compute()
        assert value["ais/upper"].item() == pytest.approx(0.5)
        assert value["structured_infonce/upper"].item() == 0

    def test_two_ranks_are_one(self):
        def compute(rank):
            sandwich = side_by_side()
            sandwich.update(**batch(3 + rank, rank))
            return {name: value.item() for name, value in sandwich.compute().items()}

        whole = side_by_side()
        for rank in range(2):
            whole.update(**batch(3 + rank, rank))
        expected = {name: value.item() for name, value in whole.compute().items()}
        for value in run_ddp(compute):
            assert value == pytest.approx(expected, abs=1e-12)

    def test_the_figure_has_a_row_for_each_bound(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        sandwich = side_by_side()
        sandwich.update(**batch(30))
        _, axes = sandwich.plot(truth=math.log(2))
        assert [text.get_text() for text in axes.get_yticklabels()] == [
            "AIS",
            "Barber-Agakov",
            "GIWAE",
            "IWAE",
            "S-InfoNCE",
        ]
        value = sandwich.compute()
        marks = [number for x, y in (bar[0].get_xydata()[0] for bar in axes.containers) for number in (x, round(y))]
        expected = [
            number
            for place, bound in enumerate(EVERY)
            for side in ("lower", "upper")
            for number in (value[f"mutual_information/{bound}/{side}"].item(), place)
        ]
        assert marks == pytest.approx(expected)
        assert [list(line.get_xdata()) for line in axes.lines if line.get_gid() == "truth"] == [[math.log(2)] * 2]
        given = plt.subplots()
        assert sandwich.plot(value, ax=given[1]) == given
        assert isinstance(sandwich.clone(), MutualInformationSandwich)
