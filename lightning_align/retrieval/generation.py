"""A generation of a database: its finished stages, and the head ``database.json`` that names them.

Every build, addition and deletion writes a new head. The folders of former generations stay on disk, so a former head can be
published again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_align.retrieval.database import HEAD, RetrievalDatabase
from lightning_align.retrieval.sealed import seal
from lightning_align.retrieval.stages import Stage, Team, open_stage, write_bytes


@dataclass(frozen=True)
class Parts:
    """The finished stages of a generation that a search needs."""

    chunks: Stage
    vectors: Stage | None = None
    index: Stage | None = None
    lexical: Stage | None = None


def open_parts(root: Path, head: Mapping[str, Any]) -> Parts:
    """Open the stages that a head names.

    Args:
        root: Folder of the database.
        head: The manifest of the database.

    Raises:
        ValueError: If a stage has no complete manifest.
    """
    stages = {name: open_stage(root / folder) for name, folder in head["stages"].items() if name != "neighbors"}
    return Parts(**stages)


def read_head(root: Path) -> dict[str, Any] | None:
    """Return the content of ``database.json``, or None if it is missing or damaged."""
    try:
        return RetrievalDatabase.open(root).manifest
    except ValueError:
        return None


def write_head(root: Path, head: Mapping[str, Any]) -> None:
    """Write ``database.json``, which makes a generation the current one. Nothing is written if it is so already."""
    if read_head(root) == head:
        return
    write_bytes(root / HEAD, seal(head))


def publish_head(root: Path, head: Mapping[str, Any], *, verify: bool) -> bool:
    """Make a former generation the current one again, if all stages that it names are intact. Call it on all ranks.

    Args:
        root: Folder of the database.
        head: The manifest of the former generation.
        verify: Whether to compare files with their hashes.

    Returns:
        Whether the head was published.
    """
    names = [*head["stages"].values(), *(name for stages in head["queries"].values() for name in stages.values())]
    team, done = Team(), False
    try:
        with team.together():
            if team.rank == 0:
                try:
                    done = all(open_stage(root / name).is_finished(verify=verify) for name in names)
                except ValueError:  # a stage has no manifest
                    done = False
                if done:
                    write_head(root, head)
        return team.share(done)
    finally:
        team.close()
