"""Settings of the whole suite: the random seed, and how many cases Hypothesis tries.

``pytest --hypothesis-profile=nightly`` tries many more, new ones each time.
"""

import gc
import os

# One process a core runs tests, and sums of one thread are compared with those of another run:
# each process, and whatever it starts, has one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# So many seconds PyTorch waits for a process that prepares data to end, before it ends the process.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile("ci")


def pytest_collection_finish():
    """Python's garbage collector need not look through all that is imported, again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # extensions complain at the end of what is left


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
