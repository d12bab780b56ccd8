import os
from pathlib import Path

import pytest
import torch

# Folders and files of tests of learning or exactness, where a processor's kernels matter. They get the mark `portable`.
PORTABLE = (
    "calm/test_alignment.py",
    "calm/test_distributed.py",
    "calm/test_model.py",
    "calm/test_module.py",
    "distributed",
    "dpo",
    "generation",
    "models",
    "parity",
    "references",
    "retrieval/test_exact.py",
    "retrieval/test_index.py",
    "retrieval/test_lexical.py",
    "retro/test_arms.py",
    "retro/test_decoding.py",
    "retro/test_model.py",
    "retro/test_module.py",
    "retro/test_strategies.py",
    "scoring",
    "spin/test_loop.py",
    "spin/test_parts.py",
    "spin/test_theory.py",
    "test_configs.py",
    "test_demo.py",
    "test_examples.py",
    "training/test_checkpoints.py",
    "training/test_gradients.py",
    "training/test_metrics.py",
    "training/test_module.py",
    "training/test_resume.py",
)

FULL = os.environ.get("FULL_STUDIES", "0") not in ("", "0")
"""Whether studies run at full length."""


def pytest_configure(config: pytest.Config) -> None:
    # One thread per worker, unless the caller says otherwise: several workers share the cores, and kernels round otherwise with
    # another number of threads, so that the number must not be that of the cores. Processes that tests start get the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    portable = [root / name for name in PORTABLE]
    missing = [str(path) for path in portable if not path.exists()]
    if missing:
        raise pytest.UsageError(f"PORTABLE of {__file__} names what is not there: {', '.join(missing)}")
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    for item in items:
        if any(item.path.is_relative_to(path) for path in portable):
            item.add_marker("portable")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch's global generator, so that a test is the same alone, in any order and in any worker."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def full_studies() -> bool:
    """Whether a test marked `study` runs at full length, as it does in CI; otherwise it is the same test, smaller."""
    return FULL
