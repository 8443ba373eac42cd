"""TracIn's self-influence against squared gradients written out."""

import pytest
import torch
from torch import nn

from lightning_ext.functional import InfluenceObjective, ParameterView, SampleGradients, tracin_self_influence


@pytest.mark.parametrize("rates", [{"": 0.3}, {"weight": 0.5, "bias": 0.1}, {"0": 0.2, "3": 0.0}])
def test_squared_gradients_are_weighted_parameter_by_parameter(rates):
    network = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    view = ParameterView(network)
    batch = torch.randint(5, (7, 3)), torch.randint(3, (7,))
    weights = view.flatten(
        {
            name: torch.full(shape, next((rate for part, rate in rates.items() if part in name), 0.7)).double()
            for name, shape in zip(view.names, view.shapes, strict=True)
        }
    )
    gradients = SampleGradients(network, InfluenceObjective(), view)
    assert gradients.fallback is None
    ours = tracin_self_influence(gradients(batch), weights)
    torch.testing.assert_close(ours, (gradients.explicit(batch).square() * weights).sum(1), rtol=1e-12, atol=0)


def test_rates_of_another_size_are_refused():
    network = nn.Linear(2, 1)
    gradients = SampleGradients(network, InfluenceObjective("mse"))((torch.ones(2, 2), torch.ones(2, 1)))
    with pytest.raises(ValueError, match=r"rates must have shape \(3,\), got \(2,\)"):
        tracin_self_influence(gradients, torch.ones(2))
