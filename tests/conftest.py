import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # One thread per worker, unless the caller says otherwise: several workers share the cores, and kernels round otherwise with
    # another number of threads, so that the number must not be that of the cores. Processes that tests start get the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch's global generator, so that a test is the same alone, in any order and in any worker."""
    torch.manual_seed(0)
    return 0
