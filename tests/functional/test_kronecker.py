"""K-FAC and EK-FAC against the dense Gauss-Newton matrix, its blocks, its trace, and curvlinops."""

import math

import pytest
import torch
from torch import nn

from lightning_ext.functional import (
    InfluenceObjective,
    KroneckerStatistics,
    ParameterView,
    SampleGradients,
    kronecker_curvature,
    seeded_generator,
)
from tests.functional import layer_toys

FACTORED = [name for name in layer_toys.CASES if name not in ("interleaved", "outside", "recurrent")]


def dense_ggn(module, objective, batch, view):
    """(1/N) sum of J^T H J, from the Jacobian and the Hessian of each sample's outputs."""
    x, t = batch
    values = view.values()
    total = torch.zeros(view.numel, view.numel, dtype=torch.float64)
    for i in range(len(x)):
        sample = (x[i : i + 1], t[i : i + 1])
        function = objective.function(module, view, sample)
        jacobian = torch.func.jacrev(function)(values)
        y = function(values).detach()
        rows = torch.cat([jacobian[name].reshape(y.numel(), -1) for name in view.names], dim=1)
        hessian = torch.autograd.functional.hessian(lambda y, t=sample[1]: objective.losses(y, t).sum(), y)
        total += rows.T @ hessian.reshape(y.numel(), y.numel()) @ rows
    return total / len(x)


def blocks_of(curvature, matrix):
    """For each group of each layer: its eigenvectors as columns, its eigenvalues, and its part of a (D, D) matrix."""
    places = torch.arange(curvature.size, dtype=torch.float64)[None]
    for block in curvature.blocks:
        for g, index in enumerate(block.layer.gather(places)[0].long()):
            part = matrix[index.flatten()][:, index.flatten()]
            yield torch.kron(block.outputs[g], block.inputs[g]), block.eigenvalues[g].flatten(), part


def dense(curvature, **kwargs):
    return curvature(torch.eye(curvature.size, dtype=torch.float64), **kwargs)


class TestExactCases:
    @pytest.mark.parametrize("corrected", [False, True])
    def test_one_linear_layer_with_half_squared_error_is_exact(self, corrected):
        # Spec test 9: G = A (x) I, whatever the parameters are.
        torch.manual_seed(0)
        module, x = nn.Linear(4, 3).double().eval(), torch.randn(7, 4, dtype=torch.float64)
        objective, view = InfluenceObjective("half_squared_error"), ParameterView(module)
        batches = [(x[:2], torch.zeros(2, 3)), (x[2:], torch.zeros(5, 3))]
        curvature = kronecker_curvature(module, objective, batches, corrected=corrected)
        a = torch.cat([x, torch.ones(7, 1, dtype=torch.float64)], dim=1)
        A, S = a.T @ a / 7, torch.eye(3, dtype=torch.float64)
        weight = torch.kron(S, A[:4, :4])
        torch.testing.assert_close(dense(curvature)[:12, :12], weight, rtol=0, atol=1e-14)
        truth = dense_ggn(module, objective, (x, torch.zeros(7, 3)), view)
        torch.testing.assert_close(dense(curvature), truth, rtol=0, atol=1e-14)
        rows = torch.randn(5, 15, dtype=torch.float64)
        solved = torch.linalg.solve(truth + 0.3 * torch.eye(15, dtype=torch.float64), rows.T).T
        torch.testing.assert_close(curvature.solve(rows, 0.3), solved, rtol=1e-12, atol=1e-13)

    def test_squared_error_per_token_is_exact_for_one_layer(self):
        # every output hangs on one token, so that factors averaged over tokens lose nothing
        torch.manual_seed(0)
        module, x = nn.Linear(4, 2).double().eval(), torch.randn(6, 3, 4, dtype=torch.float64)
        batch, objective = (x, torch.zeros(6, 3, 2)), InfluenceObjective("half_squared_error")
        curvature = kronecker_curvature(module, objective, [batch])
        truth = dense_ggn(module, objective, batch, ParameterView(module))
        torch.testing.assert_close(dense(curvature), truth, rtol=0, atol=1e-13)


@pytest.mark.parametrize("include", [None, "weight", "bias"])
@pytest.mark.parametrize("name", FACTORED)
def test_eigenvalues_trace_and_diagonal_against_the_dense_matrix(name, include):
    module, batch = layer_toys.build(name)
    if include == "bias" and not any("bias" in n for n, _ in module.named_parameters()):
        pytest.skip("no bias")
    objective, view = InfluenceObjective(), ParameterView(module, include)
    halves = [(batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])]  # of unequal sizes
    kfac = kronecker_curvature(module, objective, halves, view, corrected=False)
    ekfac = kronecker_curvature(module, objective, halves, view)
    truth = dense_ggn(module, objective, batch, view)
    assert ekfac.size == view.numel
    assert ekfac.eigenvalues().sum().item() == pytest.approx(truth.trace().item(), rel=1e-11)
    for (U, corrected, exact), (_, plain, _) in zip(blocks_of(ekfac, truth), blocks_of(kfac, truth), strict=True):
        torch.testing.assert_close(corrected, (U.T @ exact @ U).diagonal(), rtol=1e-9, atol=1e-12)
        distances = [((U * values) @ U.T - exact).norm() for values in (corrected, plain)]
        assert distances[0] <= distances[1] * (1 + 1e-9) + 1e-12
    for part, values in zip(ekfac.places, ekfac.diagonal, strict=True):
        torch.testing.assert_close(values, truth.diagonal()[part], rtol=1e-9, atol=1e-13)
    rows = torch.randn(3, view.numel, dtype=torch.float64)
    torch.testing.assert_close(ekfac(ekfac.solve(rows, 0.2), 0.2), rows, rtol=1e-9, atol=1e-11)


def test_spec_digits_network_trace_of_kfac_is_off_where_ekfac_is_not():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    batch = (torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,)))
    truth = dense_ggn(module, InfluenceObjective(), batch, ParameterView(module)).trace().item()
    traces = [
        kronecker_curvature(module, InfluenceObjective(), [batch], corrected=corrected).eigenvalues().sum().item()
        for corrected in (False, True)
    ]
    assert abs(traces[0] / truth - 1) > 1e-2
    assert abs(traces[1] / truth - 1) < 1e-12


def test_convolution_factors_by_their_definition():
    # KFC: patches averaged over positions, output gradients summed over positions
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0), groups=2).double()
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    x, t = torch.randn(5, 2, 5, 3, dtype=torch.float64), torch.randint(0, 2, (5,))
    objective = InfluenceObjective()
    statistics = KroneckerStatistics(nn.Sequential(conv, head), objective)
    sums = statistics.factors((x, t))
    patches = nn.functional.unfold(x, (3, 2), stride=2, padding=(1, 0))  # (N, C * kernel, positions)
    s = conv(x).detach().requires_grad_()
    columns = objective.loss.hessian_sqrt(head(s).detach(), t)
    for group in range(2):
        a = patches[:, group * 6 : group * 6 + 6]
        a = torch.cat([a, torch.ones(5, 1, a.shape[2], dtype=a.dtype)], dim=1)
        A = torch.einsum("nmt,nkt->mk", a, a) / a.shape[2]
        torch.testing.assert_close(sums["0.A"][group], A)
        S = torch.zeros(2, 2, dtype=torch.float64)
        for column in columns:
            (g,) = torch.autograd.grad(head(s), s, column)
            g = g[:, group * 2 : group * 2 + 2].flatten(2)
            S += torch.einsum("npt,nqt->pq", g, g)
        torch.testing.assert_close(sums["0.S"][group], S)


@pytest.mark.parametrize("corrected", [False, True])
def test_against_curvlinops(corrected):
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    module = module.double().eval()
    data = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (7, 4)]
    kind = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    theirs = kind(
        module,
        nn.CrossEntropyLoss(),
        list(module.parameters()),
        data,
        fisher_type="type-2",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    ours = kronecker_curvature(module, InfluenceObjective(), data, corrected=corrected)
    matrix = theirs @ torch.eye(ours.size, dtype=torch.float64)
    torch.testing.assert_close(dense(ours), matrix, rtol=1e-9, atol=1e-12)


class Small:
    """One small network for the options and errors."""

    def __init__(self):
        torch.manual_seed(1)
        self.module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double().eval()
        self.batch = (torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,)))
        self.objective, self.view = InfluenceObjective(), ParameterView(self.module)

    def fit(self, **kwargs):
        return kronecker_curvature(self.module, self.objective, [self.batch], self.view, **kwargs)


@pytest.fixture
def small():
    return Small()


class TestOptions:
    def test_relative_damping_is_per_layer(self, small):
        curvature = small.fit()
        rows = torch.randn(2, curvature.size, dtype=torch.float64)
        solved = curvature.solve(rows, 0.01, relative=0.1)
        for block in curvature.blocks:
            alone = curvature.solve(rows, 0.01 + 0.1 * block.eigenvalues.mean().item())
            torch.testing.assert_close(block.layer.gather(solved), block.layer.gather(alone), rtol=1e-12, atol=1e-12)

    def test_factored_damping_damps_both_factors(self, small):
        curvature = small.fit(corrected=False)
        rows = torch.randn(1, curvature.size, dtype=torch.float64)
        block = curvature.blocks[0]
        A, S = ((q * v.unsqueeze(1)) @ q.mT for q, v in zip((block.inputs, block.outputs), block.factors, strict=True))
        A, S = (m[0] + 0.2 * torch.eye(len(m[0]), dtype=torch.float64) for m in (A, S))
        expected = torch.linalg.inv(S) @ block.layer.gather(rows)[0, 0] @ torch.linalg.inv(A)
        solved = block.layer.gather(curvature.solve(rows, 0.04, factored=True))[0, 0]
        torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-11)
        with pytest.raises(ValueError, match="factored=True is for K-FAC"):
            small.fit().solve(rows, 0.04, factored=True)

    def test_sampled_labels_converge_to_the_exact_fisher(self, small):
        exact, generator = small.fit(corrected=False), seeded_generator(0)
        sampled = kronecker_curvature(
            small.module, small.objective, [small.batch] * 200, small.view, fisher="mc", corrected=False,
            generator=generator,
        )  # fmt: skip
        for ours, truth in zip(sampled.blocks, exact.blocks, strict=True):
            scale = truth.factors[1].max().item()
            torch.testing.assert_close(ours.factors[1], truth.factors[1], rtol=0, atol=0.1 * scale)
        again = kronecker_curvature(
            small.module, small.objective, [small.batch] * 200, small.view, fisher="mc", corrected=False,
            generator=seeded_generator(0),
        )  # fmt: skip
        assert torch.equal(sampled.eigenvalues(), again.eigenvalues())

    def test_empirical_is_made_of_the_loss_gradients(self, small):
        rows = SampleGradients(small.module, small.objective, small.view).explicit(small.batch)
        curvature = small.fit(fisher="empirical")
        assert curvature.eigenvalues().sum().item() == pytest.approx(rows.square().sum().item() / 30, rel=1e-10)
        assert curvature.eigenvalues().sum().item() != pytest.approx(small.fit().eigenvalues().sum().item(), rel=1e-2)

    def test_layers_beyond_max_width_have_the_exact_diagonal(self, small):
        narrow = small.fit(max_width=5)  # the last layer has 6 inputs, its bias included
        assert [block.layer.name for block in narrow.blocks] == ["0"]
        truth = dense_ggn(small.module, small.objective, small.batch, small.view).diagonal()
        for part, values in zip(narrow.places, narrow.diagonal, strict=True):
            torch.testing.assert_close(values, truth[part], rtol=1e-10, atol=1e-14)

    def test_ranks_add_their_sums(self, small):
        calls = []

        def reduce(tensor):  # two ranks with the same data
            calls.append(tensor.shape)
            return 2 * tensor

        torch.testing.assert_close(small.fit(reduce=reduce).eigenvalues(), small.fit().eigenvalues())
        assert len(calls) == 2 + 2 * 2 + 1 + 2

    def test_float32_agrees_with_float64(self, small):
        rows = torch.randn(4, small.view.numel, dtype=torch.float64)
        wide = small.fit().solve(rows, 0.01)
        small.module.float()
        small.batch = (small.batch[0].float(), small.batch[1])
        small.view = ParameterView(small.module)
        narrow = small.fit()
        assert narrow.eigenvalues().dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            solved = small.fit().solve(rows.float(), 0.01)
        torch.testing.assert_close(solved.double(), wide, rtol=1e-3, atol=1e-3)

    def test_sixteen_bit_networks_are_fitted_in_float32(self, small):
        small.module.float()
        small.batch, small.view = (small.batch[0].float(), small.batch[1]), ParameterView(small.module)
        exact, rows = small.fit(), torch.randn(2, 53)
        small.module.bfloat16()
        small.batch, small.view = (small.batch[0].bfloat16(), small.batch[1]), ParameterView(small.module)
        rough = small.fit()
        assert rough.eigenvalues().dtype == torch.float32
        assert rough.solve(rows.bfloat16(), 0.1).dtype == torch.float32
        torch.testing.assert_close(rough.eigenvalues().sum(), exact.eigenvalues().sum(), rtol=0.03, atol=0)
        torch.testing.assert_close(rough.solve(rows, 0.1), exact.solve(rows, 0.1), rtol=0.1, atol=0.5)

    def test_explicit_gradients_of_the_diagonal_come_in_pieces(self):
        module, batch = layer_toys.build("own-parameter")
        whole = KroneckerStatistics(module, InfluenceObjective())
        pieces = KroneckerStatistics(module, InfluenceObjective())
        pieces.gradients.memory_bytes = 2 * 6 * 4  # two samples' of six numbers
        assert [part for _, part in pieces.gradients.split(batch)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
        torch.testing.assert_close(pieces.factors(batch)["diagonal"], whole.factors(batch)["diagonal"])


class TestErrors:
    def test_singular_without_damping(self, small):
        rows = torch.ones(1, small.view.numel, dtype=torch.float64)
        with pytest.raises(ValueError, match="pass damping > 0"):
            small.fit().solve(rows)  # softmax outputs leave a direction flat

    def test_arguments(self, small):
        rows = torch.ones(1, small.view.numel, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"at least 0, got -1.0"):
            small.fit().solve(rows, -1.0)
        with pytest.raises(ValueError, match=r"rows must have shape \(R, 53\), got \(1, 52\)"):
            small.fit().solve(rows[:, 1:], 1.0)
        with pytest.raises(ValueError, match="not an iterator"):
            kronecker_curvature(small.module, small.objective, iter([small.batch]))
        with pytest.raises(ValueError, match=r"fisher must be .* got 'typ'"):
            KroneckerStatistics(small.module, small.objective, fisher="typ")
        with pytest.raises(ValueError, match="have seen no sample"):
            kronecker_curvature(small.module, small.objective, [])

    def test_nan_names_the_statistic(self, small):
        small.batch[0][3] = math.nan
        with pytest.raises(ValueError, match=r"'.*' is not finite"):
            small.fit()

    @pytest.mark.parametrize("name", ["interleaved", "outside"])
    def test_a_layer_that_does_not_explain_its_gradients_is_named(self, name):
        module, batch = layer_toys.build(name)
        with pytest.raises(ValueError, match=r"'inner.weight' does not explain .*include="):
            kronecker_curvature(module, InfluenceObjective(), [batch])

    def test_a_weight_used_without_its_layer_is_named(self):
        class ByHand(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x):
                return self.head(torch.tanh(x @ self.inner.weight))

        with pytest.raises(ValueError, match=r"'inner.weight' is used, but its layer is not called"):
            kronecker_curvature(ByHand(), InfluenceObjective(), [(torch.randn(3, 4), torch.arange(3))])

    def test_a_layer_without_use_has_no_curvature(self, small):
        small.module.register_module("spare", nn.Linear(2, 2).double())
        small.module.forward = lambda x: small.module[3](small.module[:3](x))
        curvature = kronecker_curvature(small.module, small.objective, [small.batch])
        assert curvature.blocks[-1].layer.name == "spare"
        assert not curvature.blocks[-1].eigenvalues.any()
