import pytest
import torch
from torch import nn

from lightning_ext.nn import MLP


def test_it_is_the_network_it_says():
    net = MLP([12, 5, 3], activation="tanh").double()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    first, last = net.layers[1], net.layers[3]
    torch.testing.assert_close(net(x), last(torch.tanh(first(x.flatten(1)))), rtol=0, atol=0)


def test_parts_stand_in_order():
    kinds = [type(layer) for layer in MLP([4, 5, 2], activation="gelu", batch_norm=True, dropout=0.1).layers]
    assert kinds == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Dropout, nn.Linear]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"sizes must name at least .* got \[4\]"):
        MLP([4])
    with pytest.raises(ValueError, match=r"activation must be one of .*; got 'swish'"):
        MLP([4, 2], activation="swish")
