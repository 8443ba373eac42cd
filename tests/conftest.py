"""Threads are pinned before torch is imported: forked two-process tests deadlock otherwise."""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Every test runs in its own folder with a fixed seed, so that nothing it writes or draws reaches the next."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
