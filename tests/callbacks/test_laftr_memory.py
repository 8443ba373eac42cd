"""What is kept of several tasks: merged, shared, moved."""

import warnings

import pytest
import torch

from lightning_ext.callbacks._laftr_memory import TaskMemory
from lightning_ext.nn import function_space_estimator as build
from tests.nn.laftr_toys import batches, moved, network


def memory(name, consolidate, tasks=(0, 1), **options):
    held = TaskMemory(build(name, **options), consolidate)
    for task in tasks:
        held.remember(task, network(task + 1), batches(n=40 + 10 * task), None, lambda tensor: tensor)
    return held


def distance(held, module, average):
    return held.distance(module, held.tasks, [0], average=average)[0].item()


def test_merged_online_ewc_is_the_sum_that_the_method_defines_averaged_or_not():
    held, module = memory("online-ewc", "merge"), moved(network())
    one = build("ewc").fit(network(1), batches(n=40)).fisher_diagonal
    two = build("ewc").fit(network(2), batches(n=50))
    change = torch.cat([p.flatten() for p in module.parameters()]) - torch.cat(
        [p.flatten() for p in network(2).parameters()]
    )
    expected = 0.5 * ((one + two.fisher_diagonal) * change.square()).sum().item()
    assert distance(held, module, average=True) == pytest.approx(expected, rel=1e-6)
    assert distance(held, module, average=False) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["laftr-mean", "ewc", "kfac"])
def test_the_sum_over_merged_tasks_is_their_number_times_the_mean(name):
    held, module = memory(name, "merge"), moved(network())
    assert distance(held, module, average=False) == pytest.approx(2 * distance(held, module, average=True))


def test_the_sum_over_consolidated_tasks_is_their_number_times_the_mean():
    held, module = memory("laftr", "last", tasks=(0, 1, 2)), moved(network())
    assert distance(held, module, average=False) == pytest.approx(3 * distance(held, module, average=True))


def test_a_merged_task_that_ends_again_is_told_of_and_adds_up():
    with pytest.warns(UserWarning, match="task 0 ends again.*samples of both times count"):
        held = memory("laftr", "merge", tasks=(0, 1, 0))
    assert held.tasks == [1, 0]
    assert held._held[0].statistics.state["count"].sum() == 40 + 50 + 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory("laftr", "last", tasks=(0, 1, 0)).tasks == [1, 0]


def test_weights_that_tasks_share_are_shared_on_another_device_too():
    held = memory("laftr", "last", tasks=(0, 1, 2))
    before = held.nbytes
    held.to(torch.device("meta"))
    references = [estimator._reference for estimator in held._held]
    assert all(reference is references[-1] for reference in references)
    assert held.nbytes == before
