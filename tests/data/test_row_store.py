"""RowStore: nothing is lost when a writer dies, nothing mixes, nothing is read that was not written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_ext.data import RowStore


@pytest.fixture
def store(tmp_path):
    return RowStore(tmp_path / "rows", num_samples=5, dim=3, fingerprint={"model": 1})


def test_rows_come_back_in_the_order_asked_for(store):
    rows = torch.arange(9.0).reshape(3, 3)
    store.write(torch.tensor([4, 0, 2]), rows)
    assert torch.equal(store.read(torch.tensor([2, 4])), rows[[2, 0]])
    assert store.missing().tolist() == [1, 3]
    assert store.done.tolist() == [True, False, True, False, True]


def test_another_opening_sees_the_same_rows(store):
    store.write(torch.tensor([1]), torch.ones(1, 3))
    again = RowStore(store.folder)
    assert (again.num_samples, again.dim, again.fingerprint) == (5, 3, {"model": 1})
    assert torch.equal(again.read(torch.tensor([1])), torch.ones(1, 3))
    store.write(torch.tensor([3]), torch.full((1, 3), 2.0))
    assert again.done[3], "two openings of one table share it"


def test_scores_are_inner_products_whatever_the_chunk(store):
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    store.write(torch.arange(5), rows)
    queries = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    for chunk in (1, 2, 100):
        assert torch.allclose(store.scores(queries, chunk=chunk), queries @ rows.T)


def test_a_bfloat16_table_is_read_in_the_queries_precision(tmp_path):
    store = RowStore(tmp_path, num_samples=2, dim=2, dtype="bfloat16")
    store.write(torch.arange(2), torch.eye(2))
    assert store.scores(torch.ones(1, 2)).dtype == torch.float32
    assert (tmp_path / "rows.bin").stat().st_size == 8


def test_a_killed_writer_leaves_what_it_had_written(tmp_path):
    script = (
        "import torch, time\nfrom lightning_ext.data import RowStore\n"
        f"store = RowStore({str(tmp_path)!r}, num_samples=100, dim=4)\n"
        "for i in range(100):\n"
        "    store.write(torch.tensor([i]), torch.full((1, 4), float(i)))\n"
        "    print(i, flush=True)\n"
        "    time.sleep(0.02)\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
    for line in process.stdout:
        if line.strip() == "10":
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = RowStore(tmp_path)
    done = store.done.nonzero().flatten()
    assert 11 <= len(done) < 100
    assert torch.equal(store.read(done)[:, 0], done.float())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_samples": 6}, "num_samples: now 6, there 5"),
        ({"dim": 2}, "dim: now 2, there 3"),
        ({"fingerprint": {"model": 2}}, "model: now 2, there 1"),
        ({"fingerprint": {"model": 1, "damping": 0.1}}, "damping: now 0.1, there None"),
    ],
)
def test_a_table_of_something_else_is_refused(store, change, told):
    with pytest.raises(ValueError, match=told):
        RowStore(store.folder, **change)


def test_bad_input(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="give num_samples and dim"):
        RowStore(tmp_path / "nothing")
    with pytest.raises(ValueError, match="at least 1"):
        RowStore(tmp_path / "empty", num_samples=0, dim=1)
    with pytest.raises(ValueError, match="dtype must be one of 'float64', 'float32', 'bfloat16'"):
        RowStore(tmp_path / "half", num_samples=1, dim=1, dtype="int8")
    with pytest.raises(ValueError, match=r"rows must have shape \(1, 3\)"):
        store.write(torch.tensor([0]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 4\]; got 5 to 5"):
        store.write(torch.tensor([5]), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"Rows \[2\] are not in"):
        store.read(torch.tensor([2]))
    with pytest.raises(ValueError, match=r"queries must have shape \(Q, 3\)"):
        store.scores(torch.ones(1, 2))


def test_repr_says_how_much_is_there(store):
    store.write(torch.tensor([0]), torch.ones(1, 3))
    assert "1 of 5 rows of 3" in repr(store)


def test_all_rows_are_read_where_none_is_named(store):
    rows = torch.arange(15.0).reshape(5, 3)
    store.write(torch.arange(4), rows[:4])
    with pytest.raises(ValueError, match=r"Rows \[4\] are not in"):
        store.read()
    store.write(torch.tensor([4]), rows[4:])
    assert torch.equal(store.read(), rows)


def test_a_report_lies_beside_the_rows(store):
    assert store.report == {}
    store.write_report({"residual": 0.25, "converged": None})
    assert RowStore(store.folder).report == {"residual": 0.25, "converged": None}
    store.write_report({"solver": "cg"})
    assert store.report == {"solver": "cg"}
    (store.folder / "store.json").unlink()
    assert RowStore(store.folder, num_samples=2, dim=1).report == {}, "another table was made, and kept its report"
