"""What one rank of a test of agreements does."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from lightning_align.runtime.team import Team
from lightning_align.training.callbacks import PredictionWriter


def refused(function: Any) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    team, rank = Team(), dist.get_rank()
    found: dict[str, Any] = {"gathered": team.gather({rank: [rank]}), "shared": team.share(f"of rank {rank}")}

    def fault_of_one_rank() -> None:
        with team.together():
            if rank == 0:
                raise ValueError("the disk is full")

    found["fault"] = refused(fault_of_one_rank)
    with team.together():
        found["goes on"] = True
    team.close()

    writer, trainer = PredictionWriter(folder / "rows.jsonl"), SimpleNamespace(is_global_zero=rank == 0)
    writer.rows = [{"row": row, "text": f"{row}\u2028{rank}"} for row in range(rank, 5, 2)]
    # Nothing of it may be gathered in the group of the training, which is NCCL's on GPUs.
    dist.all_gather_object = lambda values, value, group=None, real=dist.all_gather_object: (  # type: ignore[assignment]
        real(values, value, group=group) if group is not None else sys.exit("gathered in the group of the training")
    )
    writer.on_predict_end(trainer, None)  # type: ignore[arg-type]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
