"""Whether freed memory is kept, told from the pages that the system has to hand out again."""

import os
import subprocess
import sys

import pytest

from lightning_align.runtime.memory import CHOSEN

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")

PAGES = 16_384  # of 4 KiB: 64 MiB
CHILD = """
import ctypes, resource, sys
import torch
from lightning_align.runtime.memory import keep_freed_memory

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: where huge pages are always given, there are few to count
kept = sys.argv[1] == "keep" and keep_freed_memory()
if sys.argv[1] == "fit":
    import lightning as L
    from lightning_align import PaLM, SFTModule
    module = SFTModule(PaLM(num_tokens=8, dim=8, depth=1, heads=1, dim_head=2))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, max_steps=1,
        enable_progress_bar=False)
    rows = torch.ones(1, 4, dtype=torch.long)
    batch = {"tokens": rows, "mask": rows.bool(), "targets": torch.arange(4)[None] > 0}
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
for _ in range(30):  # the allocator takes some rounds to find that what is free fits
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def child(what: str, **chosen: str) -> tuple[bool, int]:
    """Whether it was done, and pages handed out, 4 KiB each, while 64 MiB were allocated and freed ten times."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN} | chosen
    command = [sys.executable, "-W", "ignore", "-c", CHILD, what]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    done, pages = output.split()[-2:]
    return done == "True", int(pages)


def test_freed_memory_serves_the_next_allocation() -> None:
    assert child("nothing")[1] > 5 * PAGES  # what it is good for
    done, pages = child("keep")
    assert done
    assert pages < PAGES


def test_a_fit_on_a_cpu_keeps_it() -> None:
    assert child("fit")[1] < PAGES


def test_an_allocator_that_is_already_set_is_left_alone() -> None:
    done, pages = child("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert not done
    assert pages > 5 * PAGES
