"""Which run the loss of a rank ends. The connections are tested with processes, in `tests/distributed/test_lost.py`."""

import pytest

from lightning_align.runtime.rank_link import Loss


@pytest.mark.parametrize(
    ("died", "run", "ends"),
    [
        (False, 3, True),  # it failed in this run
        (False, 2, False),  # it failed in an earlier one, which all ranks have left
        (True, 2, True),  # it completed the run before, and is gone
        (True, 3, False),  # it completed this run and ended a little earlier
    ],
)
def test_which_losses_end_the_third_run(died: bool, run: int, ends: bool) -> None:
    loss = Loss(rank=1, run=run, died=died, why="the disk is full")
    assert loss.ends(3) == ends
    assert str(loss) == f"Rank 1 {'died' if died else 'failed'}: the disk is full"
