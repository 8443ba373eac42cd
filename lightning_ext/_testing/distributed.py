"""Several processes on one CPU: :func:`run_ddp` for functions and metrics, :func:`ddp_trainer_kwargs` for Trainers."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_ext._lightning import submodule

__all__ = ["ddp_trainer_kwargs", "run_ddp"]


def ddp_trainer_kwargs(*, timeout: float = 30.0, **overrides: Any) -> dict[str, Any]:
    """Trainer arguments for two forked CPU processes, with a fresh strategy at each call.

    Args:
        timeout: seconds after which a collective that not every rank joins raises instead of hanging.
        **overrides: further Trainer arguments; they win over the ones chosen here.

    Returns:
        Keyword arguments for ``Trainer``. A strategy object serves one Trainer only: call again for the next one.

    Note:
        A run costs 0.5 to 1.2 seconds. After ``fit`` the parent process has the weights and ``callback_metrics``;
        attributes set on callbacks stay in the children. Pin torch to one thread before the first run, see
        :func:`run_ddp`.

    >>> ddp_trainer_kwargs(max_epochs=3)["strategy"] is ddp_trainer_kwargs()["strategy"]
    False
    """
    strategy = submodule("strategies").DDPStrategy(
        start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=timeout)
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {"accelerator": "cpu", "devices": 2, **quiet, "strategy": strategy, **overrides}


def run_ddp(fn: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 30.0) -> list[Any]:
    """Run ``fn(rank, *args)`` in ``world_size`` processes that share a gloo process group.

    The processes are forked, so ``fn`` may be a closure or a lambda and ``args`` need not be picklable; only what
    ``fn`` returns is pickled.

    Args:
        fn: called as ``fn(rank, *args)``; ``torch.distributed`` is initialised when it runs.
        *args: handed to ``fn`` unchanged.
        world_size: number of processes, at least 1; default 2.
        timeout: seconds for the whole run; default 30. A collective that a rank never joins, or a rank that never
            ends, stops the run: every process is ended.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        RuntimeError: if a rank raised (with its number, the original text and traceback) or died; if CUDA is already
            initialised or torch runs more than one thread, either of which can make a forked process hang.
        TimeoutError: if some rank was still running after ``timeout`` seconds.

    Note:
        About a third of a second for two ranks. Put ``os.environ["OMP_NUM_THREADS"] = "1"`` before the first import of
        torch, or call ``torch.set_num_threads(1)``.

    >>> import torch
    >>> torch.set_num_threads(1)
    >>> def total(rank: int, start: int) -> float:
    ...     value = torch.tensor(float(start + rank))
    ...     torch.distributed.all_reduce(value)
    ...     return value.item()
    >>> run_ddp(total, 10)
    [21.0, 21.0]
    """
    _check_can_fork(world_size)
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, timeout, folder, fn, args))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _join(ranks, folder, timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]


def _check_can_fork(world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1; got {world_size}.")
    if "fork" not in mp.get_all_start_methods():
        raise RuntimeError("run_ddp forks its processes, which this platform does not support.")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "CUDA is already initialised in this process, and a forked process cannot use it or hangs. Call run_ddp "
            "before the first CUDA call, or set CUDA_VISIBLE_DEVICES='' for the tests that run on a CPU."
        )
    if torch.get_num_threads() > 1:
        raise RuntimeError(
            f"torch runs {torch.get_num_threads()} threads in this process; a forked process can then hang. Set "
            "OMP_NUM_THREADS=1 before torch is imported, or call torch.set_num_threads(1)."
        )


def _rank_main(
    rank: int, world_size: int, timeout: float, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve stops gloo otherwise
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()  # a rank that is done at once must not leave while others still connect to it
        torch.save(fn(rank, *args), Path(folder, f"{rank}.part"))
        Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.result"))
        dist.destroy_process_group()
    except BaseException as error:
        text = f"rank {rank} raised {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
        Path(folder, f"{rank}.failing").write_text(text)
        Path(folder, f"{rank}.failing").rename(Path(folder, f"{rank}.error"))
        os._exit(1)


def _join(ranks: Sequence[Any], folder: str, timeout: float) -> None:
    # One second more than the collectives have, so that their own message, which says more, comes first.
    deadline = time.monotonic() + timeout + 1
    while alive := [rank for rank, process in enumerate(ranks) if process.is_alive()]:
        _raise_failure(ranks, folder)
        if time.monotonic() > deadline:
            raise TimeoutError(f"run_ddp: rank {alive} still running after {timeout:g} s; all ranks were ended.")
        connection.wait([ranks[rank].sentinel for rank in alive], timeout=0.1)
    _raise_failure(ranks, folder)


def _raise_failure(ranks: Sequence[Any], folder: str) -> None:
    # The first rank to fail is the cause; the others fail because it left their collective.
    errors = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RuntimeError(errors[0].read_text())
    for rank, process in enumerate(ranks):
        if process.exitcode not in (None, 0):
            raise RuntimeError(f"rank {rank} died with exit code {process.exitcode} and left no message.")
