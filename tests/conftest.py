"""The order of the tests, the threads that they run on, and what one must not leave to the next."""

import os

# Before torch is imported. Beside a busy process, threads that wait for one another at every small operation
# take up to forty times as long as one; what depends on their number has its own test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests that fork come first: a process whose autograd has threads cannot be forked."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """The command line flushes them to zero in the whole process; numbers are compared with them."""
    torch.set_flush_denormal(False)
