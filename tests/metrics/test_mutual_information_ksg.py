"""The nearest-neighbour estimate against its definition, closed forms and its limits."""

import math

import numpy as np
import pytest
import torch

from lightning_ext.functional import correlated_gaussian_information
from lightning_ext.metrics import KSGEstimate
from lightning_ext.metrics import mutual_information_ksg as module
from tests.modules.pairs import correlated


def value(x, z, k=3):
    metric = KSGEstimate(k)
    metric.update(x, z)
    return metric.compute()["estimate"].item()


def by_definition(x, z, k):
    """Brute force over all pairs, in the largest coordinate."""
    apart = [(t[:, None] - t[None]).abs().amax(-1).double() for t in (x, z)]
    joint = torch.maximum(*apart)
    joint.fill_diagonal_(math.inf)
    radius = joint.kthvalue(k, 1).values
    psi = 0.0
    for distance in apart:
        distance.fill_diagonal_(math.inf)
        psi += torch.digamma((distance < radius[:, None]).sum(1).double() + 1).mean()
    n = torch.tensor(float(len(x)), dtype=torch.float64)
    return float(torch.digamma(torch.tensor(float(k), dtype=torch.float64)) + torch.digamma(n) - psi)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("dim", [1, 3])
def test_it_is_the_definition(dim, k):
    x, z = correlated(150, 0.7, dim)
    assert value(x, z, k) == pytest.approx(by_definition(x, z, k), abs=1e-6)


@pytest.mark.parametrize(("dim", "rho", "within"), [(1, 0.0, 0.04), (1, 0.5, 0.04), (1, 0.9, 0.05), (2, 0.8, 0.1)])
def test_it_is_near_the_truth_with_few_dimensions_and_nats(dim, rho, within):
    assert value(*correlated(4000, rho, dim)) == pytest.approx(correlated_gaussian_information(dim, rho), abs=within)


def test_it_is_far_too_low_with_more_as_the_docstring_says():
    assert 2.6 < value(*correlated(2000, 0.9, 5)) < 3.0 < correlated_gaussian_information(5, 0.9)


def test_invertible_maps_of_a_coordinate_hardly_matter_and_images_are_flattened():
    x, z = correlated(2000, 0.8)
    assert value(x, z) == pytest.approx(value(x.sinh(), z), abs=0.03)
    images = torch.rand(50, 1, 2, 3)
    assert value(images, images) == value(images.flatten(1), images.flatten(1))


def test_numpys_generator_stays_where_it_was():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    first = value(*correlated(50))
    assert np.random.random() == expected  # noqa: NPY002
    assert value(*correlated(50)) == first


def test_the_figure_shows_an_estimate():
    metric = KSGEstimate()
    metric.update(*correlated(50))
    figure, axes = metric.plot(truth=0.83)
    assert figure is axes.figure
    assert [text.get_text() for text in axes.get_yticklabels()] == ["KSGEstimate"]


def test_bad_input_is_named(monkeypatch):
    x, z = correlated(10)
    metric = KSGEstimate()
    with pytest.raises(ValueError, match="one z for each x, and a pair; got 10 x and 9 z"):
        metric.update(x, z[:9])
    with pytest.raises(ValueError, match="z has 10 numbers that are not finite"):
        metric.update(x, z * torch.nan)
    metric.update(x[:3], z[:3])
    with pytest.raises(RuntimeError, match="has seen 3 pairs; it needs more than k = 3"):
        metric.compute()
    with pytest.raises(ValueError, match=r"widths of before, \[1, 1\]; got \[2, 1\]"):
        metric.update(x.expand(10, 2), z)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        KSGEstimate(0)
    monkeypatch.setattr(module, "_NPEET", False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[ksg\]'"):
        KSGEstimate()
