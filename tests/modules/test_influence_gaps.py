"""The five gaps: they telescope, vanish where the mathematics says so, and come out as the paper found them."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.functional import GGNOperator, InfluenceObjective
from lightning_ext.modules import InfluenceGapAnalyzer, InfluenceGaps

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
STAGES = ("cold", "warm", "proximal", "pbrf", "linear", "estimate")
GAPS = ("warm-start", "proximity", "non-convergence", "linearization", "solver")


def problem(n=120, width=6, epochs=40):
    """Two Gaussian clouds per class, and a small network that was trained on them for a while."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(n) % 3
    x = torch.randn(3, 4, generator=generator)[t] + 0.7 * torch.randn(n, 4, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(net(x), t).backward()
        optimizer.step()
    queries = [(x[:7] + 0.1, t[:7]), (x[7:12] - 0.1, t[7:12])]
    return net, TensorDataset(x, t), queries


def analyze(base, data, queries, **kwargs):
    settings = {"damping": 0.05, "weight_decay": 1e-3, "epochs": 10, "batch_size": 20, "depth": 200, **kwargs}
    settings.setdefault("remove", [0, 5, [3, 9], 17])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning.pytorch")
        return InfluenceGapAnalyzer(base, trainer=QUIET, **settings).run(data, queries)


@pytest.fixture(scope="module")
def found():
    return problem(), analyze(*problem())


def test_the_gaps_telescope_in_parameters_and_outputs(found):
    (net, _, queries), gaps = found
    assert isinstance(gaps, InfluenceGaps)
    assert tuple(gaps.steps) == STAGES
    assert tuple(gaps.output_gaps) == tuple(gaps.parameter_gaps) == GAPS
    outputs = {}
    for name, steps in gaps.steps.items():
        copies = []
        for step in steps:
            moved = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
            start = nn.utils.parameters_to_vector(net.parameters()).detach().double()
            nn.utils.vector_to_parameters(start + step, moved.parameters())
            copies.append(moved(torch.cat([x for x, _ in queries]).double()).detach())
        outputs[name] = torch.stack(copies)
    for (gap, value), first, second in zip(gaps.output_gaps.items(), STAGES, STAGES[1:], strict=False):
        expected = (outputs[first] - outputs[second]).square().sum(2).mean(1).sqrt()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gaps.parameter_gaps[gap], (gaps.steps[first] - gaps.steps[second]).norm(dim=1))
    assert [row["gap"] for row in gaps.rows()] == list(GAPS)
    assert gaps.rows()[1]["outputs"] == pytest.approx(gaps.output_gaps["proximity"].mean().item())


def test_the_linear_stage_is_the_exact_solve_and_influence_its_first_order_effect(found):
    (net, data, queries), gaps = found
    net = net.double()
    x, t = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data.tensors)
    damped = GGNOperator(net.eval(), InfluenceObjective(), [(x, t)], damping=0.051).dense()
    parameters = list(net.parameters())

    def gradient(x, t):
        loss = F.cross_entropy(net(x), t, reduction="sum")
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    q, u = (torch.cat(column) for column in zip(*queries, strict=True))
    slopes = torch.stack([gradient(q[i, None].double(), u[i, None]) for i in range(12)])
    for g, group in enumerate(([0], [5], [3, 9], [17])):
        expected = torch.linalg.solve(damped, gradient(x[group], t[group]) / 120)
        torch.testing.assert_close(gaps.steps["linear"][g], expected, rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(gaps.influence[g], slopes @ expected, rtol=1e-6, atol=1e-10)
    net.float()
    assert gaps.solved["linear"].residual.max() <= 1e-8
    assert gaps.gradient_ratio.max() <= 1e-4


def test_the_bregman_response_is_what_influence_predicts(found):
    _, gaps = found
    assert gaps.correlations["pbrf"]["pearson"] > 0.95
    assert gaps.correlations["pbrf"]["pearson"] > gaps.correlations["cold"]["pearson"]
    assert gaps.ratio() > 10
    centred = [v - v.mean(0) for v in (gaps.influence, gaps.measured["warm"])]
    expected = F.cosine_similarity(*centred, dim=0).mean().item()
    assert gaps.correlations["warm"]["pearson"] == pytest.approx(expected, rel=1e-6)
    assert gaps.measured["warm"].shape == (4, 12)


def test_a_convex_problem_at_its_optimum_has_no_gap_but_the_proximity():
    """Retraining to the end, at an optimum, with a quadratic loss: three gaps close."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator).double()
    t = x @ torch.tensor([[1.0], [-2.0]]).double() + torch.randn(20, 1, generator=generator).double()
    base = nn.Linear(2, 1, bias=False).double()
    base.weight.data = torch.linalg.lstsq(x, t).solution.mT
    gaps = analyze(
        base, TensorDataset(x, t), [(x, t)], objective=InfluenceObjective("half_squared_error"), remove=[0, 7],
        damping=0.1, weight_decay=0.0, epochs=200, batch_size=20, lr=0.3, momentum=0.5,
    )  # fmt: skip
    size = gaps.steps["linear"].norm(dim=1)
    for name in ("warm-start", "non-convergence"):
        assert (gaps.parameter_gaps[name] < 1e-4 * size).all(), name
    assert (gaps.parameter_gaps["proximity"] > 1e-2 * size).all()
    h = (x[[0, 7]] @ torch.linalg.inv(x.mT @ x / 20 + 0.1 * torch.eye(2)) * x[[0, 7]]).sum(1) / 20
    expected = size * h / (1 - h)  # exact leave-one-out is larger than influence by 1 / (1 - h)
    torch.testing.assert_close(gaps.parameter_gaps["linearization"], expected, rtol=1e-3, atol=1e-9)


def test_gaps_follow_the_damping_and_an_estimator_of_ones_own():
    net, data, queries = problem()
    weak, strong = (
        analyze(net, data, queries, damping=damping, epochs=5, estimator=lambda rows: rows / 2)
        for damping in (1e-2, 1.0)
    )
    assert weak.rows()[3]["outputs"] > 5 * strong.rows()[3]["outputs"]
    assert weak.rows()[1]["outputs"] < strong.rows()[1]["outputs"]
    assert torch.equal(weak.steps["estimate"], strong.steps["estimate"])
    assert set(weak.solved) == {"linear"}


def test_the_retrainings_see_one_order():
    """With a damping next to nothing, warm and proximal retraining take the same steps."""
    net, data, queries = problem()
    gaps = analyze(net, data, queries, damping=1e-12, weight_decay=0.1, epochs=3, depth=5)
    assert gaps.parameter_gaps["proximity"].max() < 1e-6 * gaps.steps["warm"].norm()


def test_plot_draws_bars_and_three_scatters(found):
    plt = pytest.importorskip("matplotlib.pyplot")
    gaps = found[1]
    figure, axes = gaps.plot()
    bars = [patch.get_width() for patch in axes[0].patches]
    assert bars == pytest.approx([row["outputs"] for row in gaps.rows()])
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(GAPS)
    for ax, name in zip(axes[1:], ("cold", "warm", "pbrf"), strict=True):
        line = ax.get_lines()[1]
        assert len(line.get_xdata()) == 48
        assert f"{gaps.correlations[name]['pearson']:.2f}" in ax.get_title()
        centred = gaps.measured[name] - gaps.measured[name].mean(0)
        torch.testing.assert_close(torch.tensor(line.get_ydata()).double(), centred.flatten().double())
    plt.close(figure)
    figure, given = plt.subplots(1, 4)
    assert gaps.plot(given)[0] is figure
    with pytest.raises(ValueError, match="4 axes"):
        gaps.plot(given[:2])
    plt.close(figure)


def test_a_response_that_diverged_does_not_flatten_the_others(found):
    plt = pytest.importorskip("matplotlib.pyplot")
    gaps = found[1]
    _, whole = gaps.plot()
    diverged = dataclasses.replace(gaps, measured={**gaps.measured, "pbrf": 1e25 * gaps.measured["pbrf"]})
    _, axes = diverged.plot()
    for ax, before in zip(axes[1:3], whole[1:3], strict=True):
        assert ax.get_lines()[1].get_ydata() == pytest.approx(before.get_lines()[1].get_ydata())
        assert ax.get_ylim()[1] <= before.get_ylim()[1] * 1.5
    drawn = axes[3].get_lines()[1].get_ydata()
    assert "48 far out, at the edge" in axes[3].get_title()
    assert np.abs(drawn).max() <= axes[3].get_ylim()[1]
    plt.close("all")


def test_queries_without_a_correlation_are_left_out_and_counted():
    net, data, queries = problem()
    with pytest.warns(UserWarning, match="12 of 12 queries do not change"):
        gaps = analyze(net, data, queries, remove=[3], epochs=1, depth=5)
    assert gaps.correlations["pbrf"]["pearson"] != gaps.correlations["pbrf"]["pearson"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"remove": []}, "at least one sample"),
        ({"epochs": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"estimator": "ekfac"}, "estimator must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfluenceGapAnalyzer(nn.Linear(2, 2), **{"remove": [0], **arguments})


def wrong(x, t):
    return x, torch.where(torch.arange(len(t)) == 4, 3, t)


SLIPS = {
    "a loader": (lambda data, queries: (DataLoader(data), queries), "got DataLoader: pass loader.dataset"),
    "a stream": (lambda data, queries: (iter(data), queries), "dataset must be a data set with positions"),
    "queries without batches": (lambda data, queries: (data, data), r"gives samples.*DataLoader\(queries"),
    "one query": (lambda data, queries: (data, queries[0]), r"queries=\[batch\]"),
    "a class": (
        lambda data, queries: (TensorDataset(*wrong(*data[:])), queries),
        r"samples \[4\] are \[3\]",
    ),
    "a query's class": (lambda data, queries: (data, [wrong(*batch) for batch in queries]), r"samples \[4\] are \[3\]"),
    "few samples": (lambda data, queries: (TensorDataset(*data[:15]), queries), r"samples 0 to 14; got \[17\]"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_what_does_not_fit_is_found_before_anything_is_trained(name, monkeypatch):
    monkeypatch.setattr(InfluenceGapAnalyzer, "_fit", lambda *args: pytest.fail("trained"))
    change, message = SLIPS[name]
    base, data, queries = problem(epochs=0)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        analyze(base, *change(data, queries))


def test_a_loader_gives_the_same_as_a_list():
    net, data, queries = problem()
    loader = DataLoader(TensorDataset(*(torch.cat(column) for column in zip(*queries, strict=True))), batch_size=4)
    one, two = (analyze(net, data, chosen, epochs=1, depth=5) for chosen in (queries, loader))
    torch.testing.assert_close(one.measured["pbrf"], two.measured["pbrf"])
