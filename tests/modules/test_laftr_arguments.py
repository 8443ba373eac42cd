"""LAFTRInfluence looks at its estimator when it is built."""

import pytest
from torch import nn

from lightning_ext.modules import LAFTRInfluence
from lightning_ext.nn import function_space_estimator


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("laftr", "estimator must be a fitted FunctionSpaceEstimator; got 'laftr'"),
        (function_space_estimator("laftr"), "LAFTREstimator keeps no statistics yet"),
    ],
)
def test_an_estimator_that_cannot_serve_is_refused_at_once(estimator, message):
    with pytest.raises(ValueError, match=message):
        LAFTRInfluence(nn.Linear(2, 2), estimator)
