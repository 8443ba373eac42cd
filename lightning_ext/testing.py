"""Tests for components, to be used from any test runner: nothing here imports pytest.

==========================  ===========================================================================================
:func:`run_ddp`             run a function in several processes that can talk to each other; never hangs
:func:`ddp_trainer_kwargs`  Trainer arguments for a two-process run on a CPU, in about a second
:func:`assert_observer`     training with and without a callback is the same to the last bit
:func:`assert_resumes`      a training that crashed and was resumed equals one that never stopped
:class:`StatefulLoader`     a loader that goes on in the middle of an epoch
:func:`check_metric`        a metric agrees with itself and a reference: split, merged, pickled, on one and two ranks
:func:`assert_cli`          a recipe trains from the command line
==========================  ===========================================================================================

Every helper raises :class:`AssertionError` (for a process that failed: :class:`RuntimeError`) with a message that names
the first thing that is wrong.
"""

from lightning_ext._testing.distributed import ddp_trainer_kwargs, run_ddp
from lightning_ext._testing.metric import check_metric
from lightning_ext._testing.observer import assert_observer
from lightning_ext._testing.recipe import assert_cli
from lightning_ext._testing.resumption import StatefulLoader, assert_resumes

__all__ = [
    "StatefulLoader",
    "assert_cli",
    "assert_observer",
    "assert_resumes",
    "check_metric",
    "ddp_trainer_kwargs",
    "run_ddp",
]
