"""Fitted estimators of function-space distance, and a network that has moved since."""

import torch

from lightning_ext import nn
from lightning_ext._testing.bitwise import seeded

NAMES = {
    "LAFTREstimator": "laftr",
    "CoresetEstimator": "coreset",
    "FullDataEstimator": "full",
    "NTKEstimator": "ntk",
    "EWCEstimator": "ewc",
    "KFACEstimator": "kfac",
    "L2Estimator": "l2",
}


def network(moved=0.0):
    with seeded(0):
        module = nn.MLP([4, 5, 3])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(moved * torch.randn_like(parameter))
    return module


def fitted(name):
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(2)
    ]
    return nn.function_space_estimator(name, **({"size": 5} if name == "coreset" else {})).fit(network(), batches)


def distance(estimator, inputs):
    estimator.reseed(0)
    return estimator.distance(*inputs)
