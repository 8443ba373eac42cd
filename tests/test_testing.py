"""The public test helpers pass what is right and fail what is wrong, by the message that a user will read."""

import time

import pytest
import torch
import torch.distributed as dist

from lightning_ext import testing


def _sum_of_ranks(rank, offset):
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return {"rank": rank, "world": dist.get_world_size(), "total": total}


class TestRunDdp:
    @pytest.mark.ddp
    def test_returns_what_each_rank_returned_in_order(self):
        results = testing.run_ddp(_sum_of_ranks, 10)
        assert [r["rank"] for r in results] == [0, 1]
        assert all(r["world"] == 2 and r["total"] == 21 for r in results)

    @pytest.mark.ddp
    def test_three_ranks_and_a_closure(self):
        seen = [3, 5, 7]
        assert testing.run_ddp(lambda rank: seen[rank], world_size=3) == seen

    @pytest.mark.ddp
    def test_one_rank(self):
        assert testing.run_ddp(_sum_of_ranks, 1, world_size=1)[0]["total"] == 1

    @pytest.mark.ddp
    def test_an_exception_comes_back_with_rank_type_and_text(self):
        def boom(rank):
            if rank == 1:
                raise KeyError("the boiler is gone")
            dist.barrier()

        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1 raised KeyError.*the boiler is gone") as caught:
            testing.run_ddp(boom)
        assert "in boom" in str(caught.value), "the child's traceback is part of the message"
        assert time.monotonic() - start < 10

    @pytest.mark.ddp
    def test_a_collective_that_one_rank_never_joins_ends_in_time(self):
        def lopsided(rank):
            if rank == 0:
                dist.all_reduce(torch.ones(1))
            else:
                time.sleep(60)

        start = time.monotonic()
        with pytest.raises((RuntimeError, TimeoutError), match=r"rank 0 raised|still running"):
            testing.run_ddp(lopsided, timeout=2)
        assert time.monotonic() - start < 15

    @pytest.mark.ddp
    def test_a_rank_that_never_ends_is_ended(self):
        with pytest.raises(TimeoutError, match=r"rank \[1\] still running after 1 s"):
            testing.run_ddp(lambda rank: time.sleep(60 * rank), timeout=1)

    @pytest.mark.ddp
    def test_a_rank_that_dies_silently(self):
        import os

        with pytest.raises(RuntimeError, match=r"rank 1 died with exit code 7"):
            testing.run_ddp(lambda rank: os._exit(7) if rank else None)

    def test_threads_and_cuda_and_world_size_are_checked_before_forking(self, monkeypatch):
        with pytest.raises(ValueError, match="world_size must be at least 1; got 0"):
            testing.run_ddp(_sum_of_ranks, 1, world_size=0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        with pytest.raises(RuntimeError, match="torch runs 4 threads"):
            testing.run_ddp(_sum_of_ranks, 1)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match="CUDA is already initialised"):
            testing.run_ddp(_sum_of_ranks, 1)
