"""Per-sample gradients against a loop of backward passes, layer by layer, and where layers cannot explain them."""

import pytest
import torch

from lightning_ext.functional import InfluenceObjective, ParameterView, SampleGradients
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
