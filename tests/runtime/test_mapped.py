import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_align.runtime.mapped import release_pages


def resident_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssFile:", "RssShmem:")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which pages are in memory")
def test_pages_of_a_folder_are_returned_and_can_be_read_again(tmp_path):
    size = 1 << 25
    for folder in ("database", "database-2"):
        (tmp_path / folder / "stage").mkdir(parents=True)
        np.save(tmp_path / folder / "stage" / "x.npy", np.arange(size // 8))
    mapped = [
        np.load(tmp_path / name / "stage" / "x.npy", mmap_mode=mode) for name, mode in (("database", "c"), ("database-2", "r"))
    ]
    before = resident_files()
    assert int(mapped[0].sum()) == int(mapped[1].sum())
    assert resident_files() > before + 1.9 * size
    assert not release_pages(tmp_path / "database", limit=1 << 40)
    assert release_pages(tmp_path / "database", limit=size // 2)
    assert before + 0.9 * size < resident_files() < before + 1.1 * size  # the other folder has a name that begins alike
    assert not release_pages(tmp_path / "database", limit=size // 2)  # nothing more could be returned
    assert int(mapped[0].sum()) == int(mapped[1].sum()) == (size // 8) * (size // 8 - 1) // 2
