"""Run the tests of learning and of exactness as other processors would: with other kernels, which round otherwise.

    python tests/portable.py                        # three instruction sets, each with one thread and with two
    python tests/portable.py --sample               # a minute of them, with the kernels that differ most
    python tests/portable.py -- -k demo             # what stands behind -- goes to pytest

PyTorch, oneDNN, MKL and faiss each choose kernels by the processor; each is told here to choose older ones.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAPS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",  # which MKL regards on processors of Intel alone
        "MKL_CBWR": "COMPATIBLE",  # and this on all
        "FAISS_OPT_LEVEL": "generic",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "FAISS_OPT_LEVEL": "avx2",
    },
    "native": {},
}
SAMPLE = (
    "calm/test_alignment.py",
    "dpo/test_identity.py",
    "dpo/test_objectives.py",
    "dpo/test_shared_prefix.py",
    "generation/test_filters.py",
    "generation/test_sampler.py",
    "generation/test_together.py",
    "models/test_lora.py",
    "models/test_palm.py",
    "retrieval/test_exact.py",
    "retrieval/test_lexical.py",
    "retro/test_arms.py",
    "retro/test_model.py",
    "scoring/test_logprobs.py",
    "scoring/test_losses.py",
    "scoring/test_products.py",
    "spin/test_parts.py",
    "spin/test_theory.py",
    "training/test_gradients.py",
    "training/test_metrics.py",
)
"""The files of the sample: numbers of every method, without the programs that other tests start."""


def run(isa: str, threads: int, more: list[str]) -> tuple[str, bool]:
    """Run one setting; return its row of the table and whether all passed."""
    every = {name for cap in CAPS.values() for name in cap}
    environment = {name: value for name, value in os.environ.items() if name not in every}
    workers = max(1, len(os.sched_getaffinity(0)) // threads)
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-m", "portable", "-p", "no:cacheprovider", *more]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        # Threads that wait must sleep: where other work has the cores, those that spin keep each other from what is left.
        env={**environment, **CAPS[isa], "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    closing = (done.stdout.strip().splitlines() or [""])[-1]
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", closing)}
    passed = done.returncode == 0 and found.get("passed", 0) > 0
    if not passed:
        print(done.stdout, flush=True)
    failed = str(found.get("failed", 0) + found.get("error", 0)) if found else f"exit {done.returncode}"
    row = f"{isa:<16}{threads:>8}{found.get('passed', 0):>8}{failed:>8}{time.perf_counter() - start:>9.0f}"
    return row, passed


def main() -> int:
    """Print a table of all settings; 1 if a test failed under any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="a minute of the tests, under one setting")
    parser.add_argument("more", nargs="*", help="arguments of pytest, behind --")
    options = parser.parse_args()
    settings = [("default", 1)] if options.sample else [(isa, threads) for threads in (1, 2) for isa in CAPS]
    chosen = [f"tests/{name}" for name in SAMPLE] if options.sample else []
    print("instruction set  threads  passed  failed  seconds", flush=True)
    all_passed = True
    for isa, threads in settings:
        row, passed = run(isa, threads, [*chosen, *options.more])
        all_passed &= passed
        print(row, flush=True)
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
