"""Two ranks resume exactly from a checkpoint of any moment, and a signal to one of them stops both with a checkpoint."""

from pathlib import Path

import pytest

from tests.distributed.harness import launch

pytestmark = pytest.mark.distributed


def test_two_ranks_resume_and_stop_together(tmp_path: Path) -> None:
    """The script asserts; see its `main`."""
    launch(Path(__file__).parent / "resume.py", str(tmp_path))
