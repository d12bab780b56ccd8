import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

# Its lock is shared with forked processes. A test that kills one of them while it prints would wait for the lock forever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

took: defaultdict[str, float] = defaultdict(float)
"""Seconds of each test: set-up, call and tear-down."""

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
"""Whether all tests run, and studies at full length."""
SECONDS = Path(__file__).with_name("seconds.json")
"""About how long tests take, by file, where it is more than half a second. A run of all with --write-seconds writes it."""
SLOW, TOO_SLOW = 0.5, 2.0
"""Without FULL_STUDIES, tests of more than SLOW seconds are skipped, but the fastest case of a test runs up to TOO_SLOW."""


def pytest_configure(config: pytest.Config) -> None:
    # One thread per worker, unless the caller says otherwise: several workers share the cores, and kernels round otherwise with
    # another number of threads, so that the number must not be that of the cores. Processes that tests start get the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-seconds", action="store_true", help=f"with FULL_STUDIES, write how long tests took to {SECONDS}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    took[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("write_seconds") and FULL and not hasattr(session.config, "workerinput"):
        files: dict[str, dict[str, float]] = {}
        for name, seconds in sorted(took.items()):
            if seconds > SLOW:
                file, _, test = name.partition("::")
                files.setdefault(file, {})[test] = round(seconds, 1)
        SECONDS.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def slow_tests(items: list[pytest.Item]) -> set[str]:
    """The names of the tests that a run of a few minutes leaves out."""
    seconds = {
        f"{file}::{test}": value for file, tests in json.loads(SECONDS.read_text()).items() for test, value in tests.items()
    }
    functions: dict[str, list[str]] = {}
    for item in items:
        if not item.get_closest_marker("study"):  # those are smaller without FULL_STUDIES
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item.nodeid)
    slow: set[str] = set()
    for names in functions.values():
        late = [name for name in names if name in seconds]
        fastest = min(late, key=seconds.__getitem__, default="")
        keep = len(late) == len(names) and seconds[fastest] <= TOO_SLOW
        slow.update(name for name in late if not (keep and name == fastest))
    return slow


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    portable = [root / name for name in PORTABLE]
    missing = [str(path) for path in portable if not path.exists()]
    if missing:
        raise pytest.UsageError(f"PORTABLE of {__file__} names what is not there: {', '.join(missing)}")
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    is_whole = [Path(argument).resolve() for argument in config.args] == [root]  # who names tests or files wants these
    slow = slow_tests(items) if is_whole and not FULL and not config.option.keyword else set()
    left_out = pytest.mark.skip(reason="takes long; FULL_STUDIES=1 runs it, as CI does")
    for item in items:
        if any(item.path.is_relative_to(path) for path in portable):
            item.add_marker("portable")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if item.nodeid in slow:
            item.add_marker(left_out)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seeds torch's global generator, so that a test is the same alone, in any order and in any worker."""
    torch.manual_seed(0)
    yield 0
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32, "a test must leave the default dtype as it was"


@pytest.fixture
def full_studies() -> bool:
    """Whether a test marked `study` runs at full length, as it does in CI; otherwise it is the same test, smaller."""
    return FULL
