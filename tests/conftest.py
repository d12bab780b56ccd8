import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

# Its lock is shared with forked processes. A test that kills one of them while it prints would wait for the lock forever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

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

# What takes seconds, beside a test that shows the same in another case. FULL_STUDIES=1 runs all, as CI does.
THOROUGH = (
    r"artifacts/test_damage.py::test_no_damaged_file_is_used\[(stored hidden states|rows for augments|connections)",
    r"calm/test_composition_cli.py::test_(two_families|a_composition_is_a_backbone)",
    r"calm/test_recompute.py::test_compiled_layers_are_computed_again\[whole",
    r"cli/test_auto.py::test_validate_takes_the_newest",
    r"cli/test_interrupts.py::test_other_commands_end.*\[SIGINT",
    r"cli/test_interrupts.py::test_a_stopped_run_goes_on_where_it_was\[(SIGINT-step|SIGTERM-validation)",
    r"cli/test_public_rows.py::test_a_public_data_set_is_trained_on_as_meant\[[A-Z]",
    r"cli/test_runs.py::test_a_(checkpoint_outlives|run_that_ends_between_two_checkpoints.*end0)",
    r"compatibility/test_kept.py::test_a_run_goes_on\[.*-(calm|retro|spin)",
    r"data/test_build.py::test_any_number_of_processes_writes_the_same_bytes\[(labelled later|ranked|bad rows|texts|prompts)-b",
    r"devices/test_steps.py::test_steps_on_a_device\[.*-bf16-(true|mixed)",
    r"export/test_card.py::test_the_code_runs_in_a_new_process\[whole",
    r"export/test_export.py::test_compiled_layers_train_and_leave",
    r"models/test_auto.py::test_importing_both_packages_is_enough\[lightning_align",
    r"models/test_families.py::test_(a_step_of_dpo|an_iteration_of_spin|an_export_is_read|rows_that_leave).*\[[a-k]",
    r"retrieval/test_many_users.py::test_(a_compaction_that_is_stopped|sigterm_ends)",
    r"runtime/test_memory.py::test_(a_fit_on_a_cpu|an_allocator_that_is_already_set)",
    r"runtime/test_namespaces.py::test_the_order_of_the_imports_does_not_matter\[lightning_align",
    r"spin/test_boundary.py::test_a_killed_run_resumes_over_a_boundary_with_other_kernels",
    r"spin/test_engines.py::test_transformers_serve",
    r"spin/test_loop.py::test_an_interrupted_run_resumes_bit_for_bit\[[2-8]",
    r"spin/test_spin_cli.py::test_the_configurations_train_and_resume\[(arithmetic|markov)",
    r"test_configs.py::test_ablations_train_from_the_two_checkpoints\[(?!encoder)",
    r"test_configs.py::test_bf16_products_lead_to_the_same_loss\[(?!sft/jsonl|dpo/jsonl|spin/jsonl|calm/key_value\]|retro/facts)",
    r"test_gpu_benchmarks.py::test_the_run_goes_on_after_failures",
    r"training/test_place.py::test_a_checkpoint_of_any_moment_resumes_exactly\[(spin|calm|retro)",
)

FULL = os.environ.get("FULL_STUDIES", "0") not in ("", "0")
"""Whether studies run at full length."""


def pytest_configure(config: pytest.Config) -> None:
    # One thread per worker, unless the caller says otherwise: several workers share the cores, and kernels round otherwise with
    # another number of threads, so that the number must not be that of the cores. Processes that tests start get the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    portable = [root / name for name in PORTABLE]
    missing = [str(path) for path in portable if not path.exists()]
    if missing:
        raise pytest.UsageError(f"PORTABLE of {__file__} names what is not there: {', '.join(missing)}")
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    thorough = {pattern: re.compile(f"/{pattern}") for pattern in THOROUGH}
    if not any("::" in argument for argument in config.args) and not config.option.keyword:
        names = [f"/{item.nodeid}" for item in items]
        for pattern, compiled in thorough.items():
            file = f"/{pattern.partition('::')[0]}::"
            if any(file in name for name in names) and not any(compiled.search(name) for name in names):
                raise pytest.UsageError(f"THOROUGH of {__file__} names what is not there: {pattern}")
    left_out = pytest.mark.skip(reason="takes seconds, and another case runs; FULL_STUDIES=1 runs it")
    for item in items:
        if any(item.path.is_relative_to(path) for path in portable):
            item.add_marker("portable")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if not FULL and any(compiled.search(f"/{item.nodeid}") for compiled in thorough.values()):
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
