"""Per-sample gradients against a loop of backward passes, layer by layer, and where layers cannot explain them."""

import gc
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ext.functional import (
    EmbeddingRows,
    ExplicitRows,
    InfluenceObjective,
    LayerGradients,
    LayerRecorder,
    OuterProducts,
    ParameterView,
    SampleGradients,
    layer_gradients,
    per_sample_gradients,
)
from tests.functional import layer_toys

EXPLICIT = {
    "tied": ("first.weight",),
    "own-parameter": ("scale", "unused"),
    "attention": (
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    ),
    "recurrent": ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
    "frequency-scaled": ("0.weight",),
    "weight-norm": ("1.parametrizations.weight.original0", "1.parametrizations.weight.original1"),
}
FALLBACKS = {"interleaved": "inner.weight", "outside": "inner.weight"}


def loop(module, batch, view, objective, quantity="loss"):
    """One backward pass per sample."""
    rows = []
    for i in range(len(batch[0])):
        sample = (batch[0][i : i + 1], batch[1][i : i + 1])
        y = objective.outputs(module, sample)
        value = (objective.losses if quantity == "loss" else objective.measure)(y, sample[1]).sum()
        parameters = [module.get_parameter(name) for name in view.names]
        grads = torch.autograd.grad(value, parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.fixture(params=["usual", "tiny"])
def pieces(request, monkeypatch):
    """Pieces of one sample or row each, and tokens mapped however narrow the layer is."""
    if request.param == "tiny":
        for name in ("_CACHE_BYTES", "_MAPPED_BYTES", "_BLOCK_BYTES", "_NARROW"):
            monkeypatch.setattr(layer_gradients, name, 1)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("include", [None, "weight", "bias"])
@pytest.mark.parametrize("name", layer_toys.CASES)
class TestAgainstALoop:
    def test_gradients_products_and_norms(self, name, include):
        module, batch = layer_toys.build(name)
        if include == "bias" and not any("bias" in n for n, _ in module.named_parameters()):
            pytest.skip("no bias")
        view, objective = ParameterView(module, include), InfluenceObjective()
        sample_gradients = SampleGradients(module, objective, view)
        gradients = sample_gradients(batch)
        truth = loop(module, batch, view, objective)
        torch.testing.assert_close(gradients.explicit(), truth, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients.norms(), truth.norm(dim=1), rtol=1e-9, atol=1e-10)
        for count in (1, 4):
            rows = torch.randn(count, view.numel, dtype=torch.float64)
            torch.testing.assert_close(gradients.project(rows), rows @ truth.T, rtol=1e-9, atol=1e-12)
            weights = torch.randn(count, len(truth), dtype=torch.float64)
            torch.testing.assert_close(gradients.combine(weights), weights @ truth, rtol=1e-9, atol=1e-12)
        other = gradients[1:4]
        torch.testing.assert_close(gradients.dot(other), truth @ truth[1:4].T, rtol=1e-9, atol=1e-12)
        if name in FALLBACKS and include != "bias":
            assert FALLBACKS[name] in sample_gradients.fallback
            assert sample_gradients.uncovered == view.names
        elif include is None:
            assert sample_gradients.fallback is None
            assert sample_gradients.uncovered == EXPLICIT.get(name, ())


class Counted(nn.Module):
    """Counts its forward passes and remembers how many samples each had."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.net(x)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = func._schema.returns and func._schema.returns[0].alias_info is None
        if isinstance(out, torch.Tensor) and fresh:
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples(n=5):
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


class TestTheCheck:
    def test_one_sample_is_run_alone_when_shapes_are_new(self):
        module = Counted(mlp())
        gradients = SampleGradients(module, InfluenceObjective())
        for n in (5, 5, 1, 3, 5):
            gradients(samples(n))
        assert module.sizes == [5, 1, 5, 1, 1, 3, 1, 5]

    def test_the_number_of_samples_is_no_new_shape_unless_it_is_one_or_another_size_too(self):
        module = Counted(mlp())
        gradients = SampleGradients(module, InfluenceObjective())
        for n in (1, 11, 12, 3, 13):
            gradients(samples(n))
        assert module.sizes == [1, 1, 11, 1, 12, 3, 1, 13]

    def test_linear_layers_one_after_the_other_need_no_check(self, monkeypatch):
        calls = []
        outputs = InfluenceObjective.outputs
        monkeypatch.setattr(InfluenceObjective, "outputs", lambda *args: calls.append(args) or outputs(*args))
        chain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        SampleGradients(chain, InfluenceObjective())(samples())
        assert len(calls) == 1
        heard = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
        heard[1].register_full_backward_pre_hook(lambda module, gradients: None)
        others = [
            (heard, samples(), None),
            (nn.Sequential(chain, nn.BatchNorm1d(3)).double(), samples(), None),
            (chain, samples(), lambda module, batch: module(batch[0])),
            (chain, (torch.randn(5, 2, 4).double(), torch.zeros(5, 2).long()), None),
        ]
        for module, batch, forward in others:
            calls.clear()
            SampleGradients(module, InfluenceObjective(forward=forward))(batch)
            assert len(calls) == 2

    @pytest.mark.parametrize("where", ["hook", "forward"])
    def test_samples_that_meet_in_a_chain_are_seen(self, where):
        chain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        if where == "hook":
            chain[1].register_forward_hook(lambda module, args, out: out - out.mean(0))
        else:
            chain[1].forward = lambda x: x.tanh() - x.mean(0)
        with pytest.raises(ValueError, match="when it is alone than in its batch"):
            SampleGradients(chain, InfluenceObjective())(samples())

    @pytest.mark.parametrize("name", ["interleaved", "outside"])
    def test_a_fallback_is_for_good_and_right(self, name):
        module, batch = layer_toys.build(name)
        gradients = SampleGradients(module, InfluenceObjective())
        for _ in range(2):
            truth = loop(module, batch, gradients.view, InfluenceObjective())
            torch.testing.assert_close(gradients.explicit(batch), truth)
        assert "does not explain" in gradients.fallback

    def test_a_sample_whose_loss_has_no_gradient_does_not_hide_a_fault(self):
        # the last sample is the one that is run alone; saturated, its own gradient says nothing
        module, (x, _) = layer_toys.build("outside")
        objective = InfluenceObjective(loss=lambda y, t: y.square().sum(1) * t)
        gradients = SampleGradients(module, objective)
        gradients((x, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])))
        assert gradients.fallback

    def test_tokens_first_is_remembered_where_shapes_cannot_tell(self):
        module, (x, t) = layer_toys.build("time-first")
        gradients = SampleGradients(module, InfluenceObjective())
        for n in (5, 3):  # three samples of three tokens come second
            batch = (x[:n], t[:n])
            torch.testing.assert_close(
                gradients.explicit(batch), loop(module, batch, gradients.view, InfluenceObjective())
            )
        assert gradients.fallback is None

    def test_everything_explicit_on_demand(self):
        module, batch = layer_toys.build("mlp")
        gradients = SampleGradients(module, InfluenceObjective(), layerwise=False)
        assert isinstance(gradients(batch).blocks[0], ExplicitRows)
        assert gradients.uncovered == gradients.view.names
        torch.testing.assert_close(
            gradients.explicit(batch), SampleGradients(module, InfluenceObjective()).explicit(batch)
        )


class TestSurroundings:
    @pytest.mark.parametrize("layerwise", [True, False])
    @pytest.mark.parametrize("measurement", ["margin", "logit", lambda y, t: y.square().sum(1)])
    def test_measurements(self, measurement, layerwise):
        module, batch = mlp().eval(), samples()
        objective = InfluenceObjective(measurement=measurement)
        gradients = SampleGradients(module, objective, quantity="measurement", layerwise=layerwise)
        truth = loop(module, batch, gradients.view, objective, "measurement")
        torch.testing.assert_close(gradients.explicit(batch), truth)

    def test_dict_batches_and_own_forward(self):
        module, (x, t) = mlp().eval(), samples()
        objective = InfluenceObjective(forward=lambda module, batch: 2 * module(batch["x"]), target="label")
        gradients = SampleGradients(module, objective).explicit({"x": x, "label": t, "names": ["a"] * 5})
        plain = InfluenceObjective(forward=lambda module, batch: 2 * module(batch[0]))
        torch.testing.assert_close(gradients, loop(module, (x, t), ParameterView(module), plain))

    @pytest.mark.parametrize("name", ["mlp", "conv2d", "own-parameter", "interleaved", "attention"])
    def test_under_inference_mode_no_grad_and_autocast(self, name):
        module, batch = layer_toys.build(name)
        module.float()
        batch = (batch[0].float(), batch[1])
        expected = SampleGradients(module, InfluenceObjective()).explicit(batch)
        rows = torch.randn(2, expected.shape[1])
        for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                inside = tuple(part.clone() for part in batch)
                gradients = SampleGradients(module, InfluenceObjective())
                torch.testing.assert_close(gradients.explicit(inside), expected)
                scores, norms = gradients.project(inside, rows), gradients.norms(inside)
                dots = gradients(inside).dot(gradients(inside))
            torch.testing.assert_close(scores, rows @ expected.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norms, expected.norm(dim=1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dots, expected @ expected.T, rtol=1e-4, atol=1e-5)

    def test_the_network_is_left_as_it_was(self):
        module = mlp()
        module[0].eval()
        state = {name: value.clone() for name, value in module.state_dict().items()}
        gradients = SampleGradients(module, InfluenceObjective())
        gradients(samples())
        with pytest.raises(ValueError, match="targets"):
            gradients((samples()[0], "no targets"))
        assert [part.training for part in module.modules()] == [True, False, True, True, True, True]
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not any(layer._forward_hooks for layer in module.modules())

    def test_no_graph_outlives_a_call(self):
        gradients = SampleGradients(mlp(), InfluenceObjective())
        kept = gradients(samples())
        gc.collect()
        nodes = [thing for thing in gc.get_objects() if type(thing).__name__ == "GradientEdge"]
        assert not nodes
        assert not kept.explicit().requires_grad

    def test_a_compiled_network_runs_without_its_compiled_code(self):
        module, batch = mlp().eval(), samples()
        expected = SampleGradients(module, InfluenceObjective()).explicit(batch)
        torch._dynamo.reset()
        compiled = nn.Sequential(torch.compile(module, backend="eager"))
        compiled(batch[0])
        gradients = SampleGradients(compiled, InfluenceObjective())
        torch.testing.assert_close(gradients.explicit(batch), expected)
        assert not gradients.uncovered

    @pytest.mark.parametrize("name", ["mlp", "own-parameter", "conv2d"])
    @pytest.mark.parametrize("layerwise", [True, False])
    def test_sixteen_bit_networks_give_float32_gradients(self, name, layerwise):
        module, (x, t) = layer_toys.build(name)
        exact = SampleGradients(module.float(), InfluenceObjective()).explicit((x.float(), t))
        rough = SampleGradients(module.bfloat16(), InfluenceObjective(), layerwise=layerwise)
        batch = (x.bfloat16(), t)
        rows = torch.randn(3, rough.view.numel)
        assert rough.project(batch, rows).dtype == torch.float32
        assert (rough.explicit(batch) - exact).norm() < 0.03 * exact.norm()
        torch.testing.assert_close(rough.project(batch, rows), rows @ rough.explicit(batch).T, rtol=1e-3, atol=1e-4)

    def test_outputs_that_hang_on_no_parameter_have_no_gradient(self):
        module, batch = mlp().eval(), samples()
        objective = InfluenceObjective(forward=lambda module, batch: module(batch[0]).detach())
        assert not SampleGradients(module, objective).explicit(batch).any()

    def test_a_sample_that_is_not_finite_is_named(self):
        x, t = samples()
        x[3, 1] = torch.nan
        for layerwise in (True, False):
            gradients = SampleGradients(mlp(), InfluenceObjective(), layerwise=layerwise)
            with pytest.raises(ValueError, match=re.escape("gradients of samples [3] of the batch are not finite")):
                gradients((x, t))


class TestMemory:
    def test_explicit_gradients_come_in_pieces(self):
        module, batch = layer_toys.build("own-parameter")
        counted = Counted(module)
        whole = SampleGradients(counted, InfluenceObjective())
        pieces = SampleGradients(counted, InfluenceObjective(), memory_bytes=2 * 6 * 4)  # two samples' of six numbers
        assert [len(part) for part in pieces.parts(batch)] == [2, 2, 1]
        rows = torch.randn(3, whole.view.numel, dtype=torch.float64)
        torch.testing.assert_close(pieces.project(batch, rows), whole.project(batch, rows))
        torch.testing.assert_close(pieces.norms(batch), whole.norms(batch))
        torch.testing.assert_close(pieces.explicit(batch), whole.explicit(batch))

    @pytest.mark.parametrize("tokens", [1, 3, 40])
    def test_scores_need_no_row_of_parameters_per_sample(self, tokens):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), layer_toys.mean_tokens())
        batch = (torch.randn(64, tokens, 512), torch.zeros(64, dtype=torch.long))
        gradients = SampleGradients(module, InfluenceObjective())(batch)
        rows = torch.randn(3, gradients.size)
        with Largest() as largest:
            scores = gradients.project(rows)
            dots = gradients[:8].dot(gradients)
            gradients.norms()
            gradients.combine(torch.ones(2, 64))
        explicit = gradients.explicit()
        assert largest.numel * 4 <= 2**26
        assert largest.numel < explicit.numel() / 2
        torch.testing.assert_close(scores, rows @ explicit.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(dots, explicit[:8] @ explicit.T, rtol=1e-3, atol=1e-3)


class TestPerSampleGradients:
    def test_chunks_and_loops_agree(self):
        torch.manual_seed(0)
        batch = {"x": torch.randn(5, 3), "scale": torch.tensor(2.0)}
        parameters = {"w": torch.randn(3), "b": torch.randn(())}

        def function(p, sample):
            return (torch.tanh(sample["x"] @ p["w"] + p["b"]) * sample["scale"]).sum()

        expected = per_sample_gradients(function, parameters, batch)
        assert expected["w"].shape == (5, 3)
        assert expected["b"].shape == (5,)
        for options in ({"chunk_size": 2}, {"vectorize": False}, {"vectorize": True}):
            other = per_sample_gradients(function, parameters, batch, **options)
            for name, value in expected.items():
                torch.testing.assert_close(other[name], value)

    def test_every_sample_draws_its_own_noise(self):
        def function(p, x):
            return (p["w"] * x * torch.rand_like(x)).sum()

        gradients = per_sample_gradients(function, {"w": torch.ones(1)}, torch.ones(4, 1), vectorize=True)["w"]
        assert len(gradients.unique()) == 4

    def test_a_path_that_values_decide_is_looped_over_unless_vmap_is_asked_for(self):
        def function(p, x):
            return (p["w"] * x).sum() if x.sum() > 0 else (p["w"] * x).sum() ** 2

        parameters, x = {"w": torch.ones(1)}, torch.tensor([[2.0], [-3.0]])
        assert per_sample_gradients(function, parameters, x)["w"].tolist() == [[2.0], [18.0]]
        with pytest.raises(RuntimeError, match="vmap"):
            per_sample_gradients(function, parameters, x, vectorize=True)


class TestRecorder:
    @pytest.mark.parametrize("name", ["mlp", "conv2d", "tokens", "twice"])
    def test_many_cotangents_at_once_and_one_after_the_other(self, name):
        module, batch = layer_toys.build(name)
        with LayerRecorder(module, ParameterView(module)) as recorder:
            outputs = module(batch[0])
        cotangents = torch.randn(3, *outputs.shape, dtype=torch.float64)
        together = recorder.output_gradients(outputs, cotangents, vectorize=True)
        apart = recorder.output_gradients(outputs, cotangents, vectorize=False)
        for s in range(3):
            single = recorder.output_gradients(outputs, cotangents[s])
            for a, b, c in zip(together, apart, single, strict=True):
                torch.testing.assert_close(a[s], b[s])
                torch.testing.assert_close(a[s], c)

    def test_still_listening(self):
        module, batch = layer_toys.build("batchnorm1d")
        with LayerRecorder(module, ParameterView(module)) as recorder:
            outputs = module(batch[0])
            inside = recorder.backward(outputs, torch.ones_like(outputs)).explicit()
            again = recorder.backward(outputs, torch.ones_like(outputs)).explicit()
        assert torch.equal(inside, again)
        assert torch.equal(inside, recorder.backward(outputs, torch.ones_like(outputs)).explicit())

    def test_parameters_without_a_layer_are_asked_for(self):
        module, batch = layer_toys.build("own-parameter")
        view = ParameterView(module)
        with LayerRecorder(module, view) as recorder:
            outputs = module(batch[0])
        assert recorder.uncovered == ("scale", "unused")
        with pytest.raises(ValueError, match=re.escape("no recorded layer explains ['unused']")):
            recorder.backward(outputs, outputs.detach(), {"scale": torch.zeros(5, 4)})

    def test_a_layer_of_another_number_of_rows_is_named(self):
        module = nn.Sequential(nn.Linear(4, 3)).eval()
        with LayerRecorder(module, ParameterView(module)) as recorder:
            outputs = module(torch.randn(5, 4))[:3]
        with pytest.raises(ValueError, match="layer '0' works on 5 rows, not a multiple of the 3 samples"):
            recorder.backward(outputs, torch.ones(3, 3))


class TestErrors:
    def test_outputs_of_another_number_of_samples(self):
        objective = InfluenceObjective(forward=lambda module, batch: module(batch[0])[:2])
        with pytest.raises(ValueError, match=re.escape("a batch of 5 samples must give as many outputs; got (2, 3)")):
            SampleGradients(mlp(), objective)(samples())

    def test_arguments(self):
        module = mlp()
        with pytest.raises(ValueError, match=r"quantity must be .* got 'gain'"):
            SampleGradients(module, InfluenceObjective(), quantity="gain")
        with pytest.raises(ValueError, match="memory_bytes must be at least 1, got 0"):
            SampleGradients(module, InfluenceObjective(), memory_bytes=0)

    def test_shapes(self):
        rows = ExplicitRows((slice(0, 2),), (torch.ones(3, 2),))
        table = EmbeddingRows((slice(0, 2),), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, 1), 2)
        outer = OuterProducts((slice(0, 2),), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 1), bias=False)
        gradients = LayerGradients([rows], 2)
        with pytest.raises(ValueError, match="blocks cover 2 of 3 parameters"):
            LayerGradients([rows], 3)
        with pytest.raises(ValueError, match=re.escape("[3, 2] samples; they must agree")):
            LayerGradients([rows, ExplicitRows((slice(2, 4),), (torch.ones(2, 2),))], 4)
        with pytest.raises(ValueError, match=re.escape("rows must have shape (Q, 2), got (1, 3)")):
            gradients.project(torch.ones(1, 3))
        with pytest.raises(ValueError, match=re.escape("weights must have shape (R, 3), got (1, 2)")):
            gradients.combine(torch.ones(1, 2))
        with pytest.raises(ValueError, match="of the same parameters"):
            gradients.dot(LayerGradients([ExplicitRows((slice(0, 1), slice(1, 2)), (torch.ones(3, 1),) * 2)], 2))
        with pytest.raises(TypeError, match="outer products of the same layer, got ExplicitRows"):
            outer.dot(rows)
        with pytest.raises(TypeError, match="rows of the same table, got OuterProducts"):
            table.dot(outer)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("part", [Centred(), nn.BatchNorm2d(2, track_running_stats=False)])
def test_samples_that_meet_in_the_network_are_refused(part):
    torch.manual_seed(0)
    module = nn.Sequential(part, nn.Flatten(), nn.Linear(18, 3)).eval()
    batch = torch.randn(6, 2, 3, 3), torch.randint(0, 3, (6,))
    gradients = SampleGradients(module, InfluenceObjective())
    gradients(tuple(entry[:1] for entry in batch))  # alone, none meets another
    with pytest.raises(ValueError, match="lets samples meet"):
        gradients(batch)
