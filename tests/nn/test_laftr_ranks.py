"""Fits over ranks: every estimator agrees with a single process, and a rank without data stops no other one."""

import pytest
import torch
import torch.distributed as dist

from lightning_ext.nn import CoresetEstimator
from lightning_ext.nn import function_space_estimator as build
from lightning_ext.testing import run_ddp
from tests.nn.laftr_toys import NAMES, batches, fitted, moved, network

QUADRATIC = ("ewc", "online-ewc", "kfac", "l2")  # their sums have known shapes before there are data
STORED = "coreset"  # a few examples, chosen from all


def total(tensor):
    dist.all_reduce(tensor)
    return tensor


def over_ranks(shares):
    """For each rank the distances, states and errors of all estimators, fitted to its share."""

    def of_rank(rank):
        found = {}
        for name in NAMES:
            estimator = build(name)
            try:
                estimator.fit(network(), shares[rank], heads=[0, 2], reduce=total)
            except ValueError as error:
                found[name] = str(error), estimator.fitted
            else:
                found[name] = estimator.distance(moved(network())).detach(), estimator.get_extra_state()["kept"]
        return found

    return run_ddp(of_rank)


def test_shares_of_any_size_give_what_one_process_gives():
    data = batches(10)
    first, second = over_ranks([data[:2], data[2:]])
    for name in NAMES:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        if name == STORED:
            assert len(first[name][1]["x"]) == 40
        else:
            alone = fitted(name, data=data, heads=[0, 2]).distance(moved(network())).detach()
            torch.testing.assert_close(first[name][0], alone, rtol=1e-9, atol=1e-13)


def test_a_rank_without_data_is_told_on_every_rank():
    data = batches()
    first, second = over_ranks([data, []])
    for name in NAMES:
        if name in QUADRATIC:
            alone = fitted(name, data=data, heads=[0, 2]).distance(moved(network())).detach()
            torch.testing.assert_close([first[name][0], second[name][0]], [alone, alone], rtol=1e-10, atol=1e-14)
        else:
            said = "1 of 2 ranks have no batch: each needs a share of the data."
            assert first[name] == second[name] == (said, False)


def test_no_data_at_all():
    for found in over_ranks([[], []]):
        for name in NAMES:
            if name == "l2":
                assert found[name][0] > 0
            else:
                assert found[name] == ("batches holds no batch: give a loader, or a list of batches.", False)


def test_a_process_group_that_is_not_to_be_used_plays_no_part():
    def of_rank(rank):
        estimators = [CoresetEstimator(7).fit(network(), batches()[rank:]), build("ewc", fisher="mc")]
        return [each.fit(network(), batches()[rank:]).distance(moved(network())).item() for each in estimators]

    found = run_ddp(of_rank)
    for rank in (0, 1):
        alone = [fitted("coreset", data=batches()[rank:], size=7), fitted("ewc", data=batches()[rank:], fisher="mc")]
        expected = [estimator.distance(moved(network())).item() for estimator in alone]
        assert found[rank] == pytest.approx(expected, rel=1e-12)
