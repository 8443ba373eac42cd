"""The distribution of beta, and the context from which gates read it."""

import copy
import math
import pickle

import pytest
import torch
from scipy import stats

from lightning_ext.nn import LogUniformBeta, RateContext

SQRT3 = math.sqrt(3)


def context(low=0.01, high=10.0):
    return RateContext(LogUniformBeta(low, high))


# -- LogUniformBeta ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_uniform_in_the_standardised_logarithm(stratified):
    prior = LogUniformBeta(0.01, 10.0)
    betas = torch.cat([prior.sample(4, 0, step, stratified=stratified) for step in range(2500)])
    assert betas.shape == (10_000,)
    assert betas.dtype == torch.float32
    assert betas.min() >= 0.01
    assert betas.max() <= 10.0
    t = prior.standardize(betas.double())
    assert stats.kstest(t.numpy(), "uniform", args=(-SQRT3, 2 * SQRT3)).pvalue > 1e-3
    assert t.mean().abs() < 3.5 / 10_000**0.5
    assert t.var().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("stratified", [True, False])
def test_an_address_gives_the_same_betas_and_another_gives_others(stratified):
    prior = LogUniformBeta()
    first = prior.sample(6, 1, 2, 3, stratified=stratified)
    assert torch.equal(prior.sample(6, 1, 2, 3, stratified=stratified), first)
    for other in ((2, 2, 3), (1, 3, 2)):
        assert not torch.equal(prior.sample(6, *other, stratified=stratified), first)
    assert not torch.equal(prior.sample(6, 1, 2, 3, stratified=stratified, rank=1, world_size=2), first)


def test_two_ranks_share_the_strata_of_their_global_batch():
    prior = LogUniformBeta(0.01, 10.0)
    whole = prior.sample(32, 1, 2, 3)
    ranks = [prior.sample(16, 1, 2, 3, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.stack(ranks, 1).flatten(), whole)
    u = (prior.standardize(whole.double()) / SQRT3 + 1) / 2
    assert (u * 32).floor().sort().values.tolist() == list(range(32))


def test_mean_beta():
    prior = LogUniformBeta(0.01, 10.0)
    assert prior.mean == pytest.approx(1.446200, abs=1e-6)
    assert prior.sample(4096, 0, 0).double().mean().item() == pytest.approx(1.446200, abs=2e-3)


def test_standardised_reference_points():
    prior = LogUniformBeta()
    t = prior.standardize(torch.tensor([0.01, 1.0, 10.0], dtype=torch.float64))
    assert t.tolist() == pytest.approx([-SQRT3, 0.5773502692, SQRT3], abs=1e-9)
    back = prior.unstandardize(torch.tensor([-SQRT3, 0.5773502692, SQRT3], dtype=torch.float64))
    assert back.tolist() == pytest.approx([0.01, 1.0, 10.0], rel=1e-9)


def test_grid_holds_both_ends():
    grid = LogUniformBeta(0.01, 10.0).grid(4)
    assert grid == pytest.approx([0.01, 0.1, 1.0, 10.0], rel=1e-12)
    assert (grid[0], grid[-1]) == (0.01, 10.0)


def test_a_range_of_one_point_always_gives_it():
    prior = LogUniformBeta(0.3, 0.3)
    assert prior.mean == 0.3
    assert prior.sample(5, 0).tolist() == pytest.approx([0.3] * 5, rel=1e-7)
    assert prior.standardize(torch.tensor([0.3])).item() == 0.0
    with RateContext(prior).at(0.3) as here:
        assert here.t.item() == 0.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_bad_range_is_named(low, high):
    with pytest.raises(ValueError, match=f"0 < low <= high, both finite; got low={low}, high={high}"):
        LogUniformBeta(low, high)


def test_a_checkpoint_of_another_range_names_both():
    saved = LogUniformBeta(0.1, 5.0).state_dict()
    with pytest.raises(RuntimeError, match=r"trained on beta in \[0.1, 5\] but this model has \[0.01, 10\]"):
        LogUniformBeta(0.01, 10.0).load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_of_the_same_range_loads_in_every_precision(dtype):
    saved = LogUniformBeta(0.01, 3.7).to(dtype).state_dict()
    LogUniformBeta(0.01, 3.7).load_state_dict(saved)


def test_a_half_precision_model_standardises_by_the_exact_range():
    prior = LogUniformBeta(0.01, 3.7).to(torch.bfloat16)
    ends = torch.tensor([0.01, 3.7], dtype=torch.float64)
    assert prior.standardize(ends).tolist() == pytest.approx([-SQRT3, SQRT3], abs=1e-12)


# -- RateContext ------------------------------------------------------------------------------------------------------


def test_without_a_beta_there_is_no_t():
    with pytest.raises(RuntimeError, match="no beta is set: call the network inside"):
        _ = context().t
    assert not context().is_set


def test_a_number_is_one_row_and_a_vector_one_row_per_sample():
    here = context()
    with here.at(1.0):
        assert here.is_set
        assert here.t.shape == (1, 1)
        assert here.t.item() == pytest.approx(0.57735027, abs=1e-7)
    with here.at(torch.tensor([0.01, 1.0, 10.0])):
        assert here.t.shape == (3, 1)
        assert here.t.dtype == torch.float32
        assert here.t.flatten().tolist() == pytest.approx([-SQRT3, 0.57735027, SQRT3], abs=1e-6)


def test_blocks_nest_and_end_even_after_an_error():
    here = context()

    def fail_inside():
        with here.at(2.0):
            raise KeyError("inside")

    with here.at(0.01):
        with here.at(10.0):
            assert here.t.item() == pytest.approx(SQRT3)
        assert here.t.item() == pytest.approx(-SQRT3)
        with pytest.raises(KeyError, match="inside"):
            fail_inside()
        assert here.t.item() == pytest.approx(-SQRT3)
    assert not here.is_set


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("extrapolate", [False, True])
def test_a_beta_that_is_no_weight_is_refused(beta, extrapolate):
    with pytest.raises(ValueError, match="beta must be positive and finite"), context().at(beta, 1, extrapolate):
        pass


@pytest.mark.parametrize(
    ("beta", "outside"), [(0.009, "0.009"), (11.0, "11"), (torch.tensor([1.0, 20.0]), "20"), (9e-7, "9e-07")]
)
def test_a_beta_outside_the_range_needs_leave(beta, outside):
    message = rf"beta={outside} is outside the trained range \[0.01, 10\].*extrapolate=True"
    with pytest.raises(ValueError, match=message), context().at(beta):
        pass
    with context().at(beta, extrapolate=True) as here:
        assert here.t.abs().max() > SQRT3


def test_the_ends_are_inside_in_float32_too():
    for beta in (0.01, 10.0, torch.tensor([0.01, 10.0])):
        with context().at(beta):
            pass


def test_beta_must_be_a_number_or_a_vector():
    with pytest.raises(ValueError, match=r"a number or have shape \(B,\); got shape \(2, 1\)"):
        context().at(torch.ones(2, 1)).__enter__()


def test_rows_fit_the_batch_that_a_layer_sees():
    here = context()
    values = torch.arange(6.0).view(3, 2)
    with here.at(torch.tensor([0.1, 1.0, 2.0]), num_samples=2):
        assert torch.equal(here.rows(values, 3), values)
        assert torch.equal(here.rows(values, 6), values.repeat_interleave(2, 0))
        assert torch.equal(here.rows(values[:1], 5), values[:1])
        for batch in (2, 9):
            with pytest.raises(ValueError, match=rf"beta has shape \(3,\) but the layer sees a batch of {batch}"):
                here.rows(values, batch)


def test_a_context_copies_and_pickles_with_its_range():
    for other in (copy.deepcopy(context(0.1, 2.0)), pickle.loads(pickle.dumps(context(0.1, 2.0)))):
        with other.at(2.0):
            assert other.t.item() == pytest.approx(SQRT3)
