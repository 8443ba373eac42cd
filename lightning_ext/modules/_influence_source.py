"""Where the curvature comes from: the scored data, or something else that stands for the data of training."""

import dataclasses

from torch import nn

from lightning_ext.functional import InfluenceObjective
from lightning_ext.modules._influence_data import Shard


@dataclasses.dataclass(frozen=True)
class CurvatureSource:
    """A network, what is asked of it and samples, whose curvature is inverted.

    Args:
        module: the network, which holds the parameters that are scored.
        objective: outputs, targets and loss on the samples.
        shard: this rank's samples.
        num_train: N, the samples of the training objective from which one is removed.
        semidefinite: whether a curvature of ``"hessian"`` has no negative eigenvalue.
        name: a plain value that differs when the curvature would; none for the scored data.
    """

    module: nn.Module
    objective: InfluenceObjective
    shard: Shard
    num_train: int
    semidefinite: bool = False
    name: str | None = None
