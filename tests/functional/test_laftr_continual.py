"""What the accuracy matrix says: the numbers worked out by hand, and NaN where nothing can be said."""

import math

import pytest
import torch

from lightning_ext.functional import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

NAN = math.nan
T17 = torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.95, 0.0], [0.6, 0.9, 0.97]], dtype=torch.float64)
ON_MATRIX = [average_accuracy, backward_transfer, forgetting, learning_accuracy]


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=1e-7, equal_nan=True)


def test_three_tasks_by_hand():
    close(average_accuracy(T17), (0.6 + 0.9 + 0.97) / 3)
    close(average_accuracy(T17).round(decimals=4), 0.8233)
    close(backward_transfer(T17), -0.175)
    close(forgetting(T17), 0.175)
    close(learning_accuracy(T17), 0.94)


def test_forward_transfer_is_measured_from_the_untrained_network():
    matrix = T17.clone()
    matrix[0, 1], matrix[1, 2] = 0.3, 0.5
    matrix[0, 2] = 0.9  # two tasks ahead: does not count
    close(forward_transfer(matrix, torch.tensor([0.7, 0.1, 0.2]).double()), ((0.3 - 0.1) + (0.5 - 0.2)) / 2)


def test_forgetting_counts_from_the_best_accuracy_and_not_from_the_first():
    rises = torch.tensor([[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.6, 0.8, 0.7]]).double()
    close(forgetting(rises), (0.3 + 0.0) / 2)
    close(backward_transfer(rises), 0.05)
    known_before = torch.tensor([[0.9, 0.8, 0.0], [0.9, 0.6, 0.0], [0.9, 0.6, 0.7]]).double()
    close(forgetting(known_before), 0.1)


def test_the_last_row_is_no_part_of_the_best():
    improved = torch.tensor([[0.5, 0.0], [0.9, 0.8]]).double()
    close(forgetting(improved), -0.4)


def test_what_was_not_measured_before_training_on_a_task_does_not_matter():
    matrix = T17.clone()
    matrix[torch.ones(3, 3).triu(1).bool()] = NAN
    for value in ON_MATRIX:
        close(value(matrix), value(T17).item())
    close(forward_transfer(matrix, torch.zeros(3)), NAN)


@pytest.mark.parametrize(
    ("missing", "undefined"),
    [
        ((2, 0), {average_accuracy, backward_transfer, forgetting}),
        ((2, 2), {average_accuracy, learning_accuracy}),
        ((1, 1), {learning_accuracy, backward_transfer, forgetting}),
        ((1, 0), {forgetting}),
    ],
)
def test_a_missing_entry_makes_nan_of_what_needs_it_alone(missing, undefined):
    matrix = T17.clone()
    matrix[missing] = NAN
    assert {value for value in ON_MATRIX if value(matrix).isnan()} == undefined


def test_after_one_task_nothing_can_be_transferred_or_forgotten():
    one = torch.tensor([[0.75]])
    close(average_accuracy(one), 0.75)
    close(learning_accuracy(one), 0.75)
    for value in (backward_transfer(one), forgetting(one), forward_transfer(one, torch.zeros(1))):
        assert value.shape == ()
        assert value.isnan()


def test_whole_numbers_are_no_reason_to_fail():
    close(average_accuracy(torch.tensor([[1, 0], [0, 1]])), 0.5)


@pytest.mark.parametrize("value", ON_MATRIX)
@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0)])
def test_a_matrix_of_another_shape_is_refused(value, shape):
    with pytest.raises(ValueError, match=r"accuracy must be \(T, T\).*got shape"):
        value(torch.zeros(shape))


def test_a_baseline_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"baseline must have shape \(3,\).*got \(2,\)"):
        forward_transfer(T17, torch.zeros(2))
