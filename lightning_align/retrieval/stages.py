"""How a stage is written so that it can be killed at any moment: blocks, a manifest, ranks that share the work.

A stage owns the folder ``<name>-<key>``, whose key is the hash of everything that its bytes depend on. A block is one file that
carries the hash of its content in its name, so a single rename publishes both. The last thing that a stage writes is its
manifest; what has none is not finished, and its blocks are where the next run goes on. Nothing in a finished folder tells when,
where or by how many processes it was made: equal inputs give equal bytes.
"""

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from lightning_align.runtime.files import publish
from lightning_align.runtime.ranks import world

Arrays = Mapping[str, NDArray[Any]]
MANIFEST = "manifest.json"


class Team:
    """The ranks that share the work. Made on all of them together; outside of a process group a team of one."""

    def __init__(self) -> None:
        self.rank, self.size = world()
        # A group of its own: stages take hours on one rank, and the timeout of the training's group is half of one.
        self._group = None if self.size == 1 else dist.new_group(backend="gloo", timeout=timedelta(days=30))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for each other at the end of a block of work; an error of one rank is raised on all of them.

        Raises:
            ValueError: on the ranks that did not fail themselves, if another one did.
        """
        try:
            yield
        except BaseException as error:
            if self.size > 1 and isinstance(error, Exception):
                self._gather(f"{type(error).__name__}: {error}")
            raise
        if self.size > 1:
            for rank, problem in enumerate(self._gather("")):
                if problem:
                    raise ValueError(f"rank {rank} could not do its part ({problem})")

    def tell(self, flag: bool) -> bool:
        """What rank 0 says, on every rank."""
        return flag if self.size == 1 else self._gather(str(flag))[0] == "True"

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _gather(self, word: str) -> list[str]:
        words = [""] * self.size
        dist.all_gather_object(words, word, group=self._group)
        return words


@dataclass(frozen=True)
class Stage:
    """A step of the build and the folder of its result."""

    root: Path
    name: str
    inputs: Mapping[str, Any]
    """Settings, and keys or hashes of what it reads: equal inputs, equal bytes. JSON."""

    @cached_property
    def key(self) -> str:
        """Hash of the inputs."""
        return digest({"stage": self.name, **self.inputs})[:16]

    @property
    def folder(self) -> Path:
        """Where the result stands."""
        return self.root / f"{self.name}-{self.key}"

    # -- finished or not

    def manifest(self, *, verify: bool = False) -> dict[str, Any] | None:
        """What the stage wrote, or None where it has not come to its end; a damaged result is announced and taken away.

        Args:
            verify: whether to read all files and compare their hashes, not only their sizes.
        """
        path = self.folder / MANIFEST
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            files: dict[str, Any] = content["files"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            self._discard(f"its manifest cannot be read ({error})")
            return None
        for name, written in files.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != written["bytes"]:
                self._discard(f"{name} is missing or has not the {written['bytes']} bytes that were written")
                return None
            if verify and file_hash(file) != written["sha256"]:
                self._discard(f"the content of {name} is not what was written")
                return None
        return content

    def is_finished(self, *, verify: bool = False) -> bool:
        """Whether there is nothing left to do, for the rank that would do it: see `manifest`."""
        if self.manifest(verify=verify) is None:
            return False
        self.tidy()  # a process killed right after the manifest left its blocks
        return True

    def _discard(self, problem: str) -> None:
        """Say what is damaged, and make the stage an unfinished one."""
        warnings.warn(f"{self.folder} is damaged and will be made again: {problem}", stacklevel=4)
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def finish(self, *, table: Mapping[str, Any], counts: Mapping[str, Any], files: Iterable[str]) -> None:
        """Write the manifest, which makes the result a whole one, and take the blocks away.

        Args:
            table: what readers need, see `ChunkTable`.
            counts: what was counted on the way.
            files: names of the files of the result, which stand in the folder.
        """
        paths = {name: self.folder / name for name in sorted(files)}
        content = {
            "stage": self.name,
            "inputs": dict(self.inputs),
            "blocks": self._block_hashes(),
            "files": {n: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for n, p in paths.items()},
            "counts": dict(counts),
            "table": dict(table),
        }
        write_bytes(self.folder / MANIFEST, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        self.tidy()

    def tidy(self) -> None:
        """Take away what a finished stage no longer needs; a killed process may have left it."""
        shutil.rmtree(self._blocks, ignore_errors=True)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    # -- blocks

    @property
    def _blocks(self) -> Path:
        return self.folder / "blocks"

    def _shelf(self, number: int) -> Path:
        # A folder of half a million files would be read from end to end for each of them.
        return self._blocks / f"{number // 1000:06d}"

    def has_block(self, number: int) -> bool:
        """Whether a block is there and is what was written; a damaged one is announced and taken away."""
        return self._find(number) is not None

    def read_block(self, number: int) -> dict[str, NDArray[Any]]:
        """The arrays of a block.

        Raises:
            ValueError: if it is not there any more, or was damaged since.
        """
        found = self._find(number)
        if found is None:
            raise ValueError(f"{self.folder}: block {number} is missing: run the build again, it makes what is missing")
        with np.load(found, allow_pickle=False) as arrays:
            return dict(arrays)

    def write_block(self, number: int, arrays: Arrays) -> None:
        """Publish a block, whole or not at all."""
        content = _pack(arrays)
        write_bytes(self._shelf(number) / f"{number:08d}-{hashlib.sha256(content).hexdigest()}.npz", content)

    def check_block(self, number: int, arrays: Arrays) -> None:
        """Compare a block with its recomputation.

        Raises:
            ValueError: if they differ.
        """
        found = self._find(number)
        if found is None or _hash_in_name(found) != hashlib.sha256(_pack(arrays)).hexdigest():
            raise ValueError(
                f"{self.folder}: recomputing block {number} gives other bytes than it holds, so it cannot be reproduced "
                "here (other hardware or library versions than began it, or a source that changes as it is read): delete the "
                "folder and build again, or switch the check off with verify=0"
            )

    def is_sampled(self, number: int, share: float) -> bool:
        """Whether a block is one of those to recompute: the first, and a share of the others that its key decides on."""
        draw = int(digest([self.key, number])[:8], 16) / 16**8
        return share > 0 and (number == 0 or draw < share)

    def _find(self, number: int) -> Path | None:
        for path in self._shelf(number).glob(f"{number:08d}-*.npz"):
            if file_hash(path) == _hash_in_name(path):
                return path
            warnings.warn(f"{path} is damaged (its content is not what was written) and will be made again", stacklevel=3)
            path.unlink()
        return None

    def _block_hashes(self) -> list[str]:
        return [_hash_in_name(path) for path in sorted(self._blocks.rglob("*.npz"))]


def open_stage(folder: Path) -> Stage:
    """The stage whose finished result stands in a folder.

    Raises:
        ValueError: if there is none.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Stage(folder.parent, content["stage"], content["inputs"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} has no whole manifest ({error}): build the database again, what is there is kept"
        ) from error


def digest(content: Any) -> str:
    """SHA-256 of the canonical JSON of something."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Publish a file that survives a power cut as well as a kill: see `publish`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    publish(path, write)


def write_rows(path: Path, parts: Iterable[NDArray[Any]], *, dtype: Any, shape: tuple[int, ...]) -> None:
    """Publish an array file that is written part by part, so that it may be larger than the memory.

    Args:
        path: ends in .npy.
        parts: arrays that, one after the other along the first dimension, are the whole.
        dtype: of the whole.
        shape: of the whole.

    Raises:
        ValueError: if the file cannot be written.
    """

    def write(temporary: Path) -> None:
        written = 0
        with temporary.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                content = np.ascontiguousarray(part, dtype=dtype)
                file.write(content.data.cast("B") if content.size else b"")
                written += content.size
            file.flush()
            os.fsync(file.fileno())
        assert written == math.prod(shape), f"{path}: {written} values for the shape {shape}"

    publish(path, write)


def _pack(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _hash_in_name(path: Path) -> str:
    return path.stem.partition("-")[2]
