"""Two ranks resume exactly from a checkpoint of any moment, and a signal to one of them stops both with a checkpoint."""

from pathlib import Path

import pytest

from tests.distributed.harness import launch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_and_stop_together(strategy: str, tmp_path: Path) -> None:
    """The script asserts; see its `main`. Under FSDP2 a checkpoint is a folder of shards, and no signal is sent."""
    launch(Path(__file__).parent / "resume.py", str(tmp_path), strategy)
