"""Stages that can be killed at any time and resumed: blocks, a manifest, ranks that share the work.

A stage writes to the folder ``<name>-<key>``. The key is the hash of everything that the bytes of the stage depend on. A block
is a file that has the hash of its content in its name, so a single rename publishes the content and the hash. The manifest is
written last. A stage without a manifest is not finished, and the next run resumes after its existing blocks. A finished folder
does not depend on when, where or by how many processes it was written: equal inputs give equal bytes.
"""

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.sealed import FILE_NAME, read_sealed, seal, value_of
from lightning_align.runtime.files import publish
from lightning_align.runtime.mapped import release_pages
from lightning_align.runtime.team import Team as Team

Arrays = Mapping[str, NDArray[Any]]
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """A step of the build and the folder of its result."""

    root: Path
    name: str
    inputs: Mapping[str, Any]
    """Settings, and keys or hashes of what the stage reads. Equal inputs give equal bytes. JSON."""

    @cached_property
    def key(self) -> str:
        """Hash of the inputs."""
        return digest({"stage": self.name, **self.inputs})[:16]

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return self.root / f"{self.name}-{self.key}"

    # -- finished or not

    def manifest(self, *, verify: bool = False) -> dict[str, Any] | None:
        """Read the manifest, and check that all files are there. Return None if the stage is not finished.

        If a file is damaged or missing, warn and delete the manifest, so that the stage counts as not finished.

        Args:
            verify: Whether to read all files and compare their hashes. By default only their sizes are compared.
        """
        try:
            content = read_manifest(self.folder)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._discard(f"Its manifest cannot be read ({error}).")
            return None
        for name, written in content["files"].items():
            if problem := problem_of(self.folder / name, written, verify=verify):
                self._discard(f"{name} {problem}.")
                return None
        return content

    def setting(self, name: str, kind: type | tuple[type, ...], *, default: Any = None) -> Any:
        """Return a setting that the finished stage wrote for its readers.

        Args:
            name: The name of the setting.
            kind: Its type, or types.
            default: What to return if there is no such setting. None if there must be one.

        Raises:
            ValueError: If the stage is not finished, or the setting is missing or of another type.
        """
        try:
            table = read_manifest(self.folder)["table"]
            return default if default is not None and name not in table else value_of(table, name, kind)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder / MANIFEST} cannot be used: {error}. Build the database again.") from error

    def is_finished(self, *, verify: bool = False) -> bool:
        """Whether the stage is finished, see `manifest`. If it is, delete leftover blocks, so call it on one rank only."""
        if self.manifest(verify=verify) is None:
            return False
        self.tidy()  # a process killed right after the manifest left its blocks
        return True

    def _discard(self, problem: str) -> None:
        """Warn about the damage, and mark the stage as not finished.

        Raises:
            ValueError: If the folder may not be written to.
        """
        warnings.warn(f"{self.folder} is damaged and will be rebuilt. {problem}", stacklevel=4)
        try:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.folder} is damaged, and cannot be rebuilt because it may not be written to ({error.strerror}). "
                f"{problem} Build the database again as a user who may write to it."
            ) from error

    def finish(self, *, table: Mapping[str, Any], counts: Mapping[str, Any], files: Iterable[str]) -> None:
        """Write the manifest, which marks the stage as finished, then delete the blocks.

        Args:
            table: Settings that readers of the result need, see `ChunkTable`.
            counts: Counts of the rows that the stage handled, for information.
            files: Names of the files of the result. They are in the folder already.
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
        write_bytes(self.folder / MANIFEST, seal(content))
        self.tidy()

    def tidy(self) -> None:
        """Delete the blocks and temporary files, which a finished stage no longer needs and a killed process may have left."""
        shutil.rmtree(self._blocks, ignore_errors=True)
        for leftover in self.folder.glob(".*.tmp"):
            with suppress(OSError):  # in a folder that may only be read
                leftover.unlink(missing_ok=True)

    # -- blocks

    @property
    def _blocks(self) -> Path:
        return self.folder / "blocks"

    def _block_folder(self, number: int) -> Path:
        # Each lookup lists the folder, so a folder has at most 1000 blocks.
        return self._blocks / f"{number // 1000:06d}"

    def has_block(self, number: int) -> bool:
        """Whether a block exists and is intact. A damaged block is deleted, with a warning."""
        return self._find(number) is not None

    def read_block(self, number: int) -> dict[str, NDArray[Any]]:
        """Read the arrays of a block.

        Raises:
            ValueError: If the block is missing or damaged.
        """
        found = self._find(number)
        if found is None:
            raise ValueError(f"{self.folder}: block {number} is missing. Run the build again. It computes the missing blocks.")
        with np.load(found, allow_pickle=False) as arrays:
            return dict(arrays)

    def write_block(self, number: int, arrays: Arrays) -> None:
        """Write a block. It appears complete or not at all. What was read from other stages need not stay in memory."""
        release_pages(self.root)
        content = _pack(arrays)
        write_bytes(self._block_folder(number) / f"{number:08d}-{hashlib.sha256(content).hexdigest()}.npz", content)

    def drop_block(self, number: int) -> None:
        """Delete a block, so that the next run computes it again."""
        for path in self._block_folder(number).glob(f"{number:08d}-*.npz"):
            path.unlink()

    def check_block(self, number: int, arrays: Arrays) -> None:
        """Compare a block with its recomputation.

        Raises:
            ValueError: If they differ.
        """
        found = self._find(number)
        if found is None or _hash_in_name(found) != hashlib.sha256(_pack(arrays)).hexdigest():
            raise ValueError(
                f"{self.folder}: recomputing block {number} gives other bytes. Likely causes are other hardware or library "
                "versions than at the start of the build, or a source that changes while it is read. Delete the folder and "
                "build again, or turn the check off with verify=0."
            )

    def is_sampled(self, number: int, share: float) -> bool:
        """Whether to recompute a block: the first block, and a pseudo-random fraction `share` of the others."""
        draw = int(digest([self.key, number])[:8], 16) / 16**8
        return share > 0 and (number == 0 or draw < share)

    def _find(self, number: int) -> Path | None:
        for path in self._block_folder(number).glob(f"{number:08d}-*.npz"):
            if file_hash(path) == _hash_in_name(path):
                return path
            warnings.warn(f"{path} is damaged (its content does not match its hash) and will be rebuilt.", stacklevel=3)
            path.unlink()
        return None

    def _block_hashes(self) -> list[str]:
        return [_hash_in_name(path) for path in sorted(self._blocks.rglob("*.npz"))]


def open_stage(folder: Path) -> Stage:
    """Open the finished stage of a folder.

    Raises:
        ValueError: If the folder has no complete manifest.
    """
    try:
        content = read_manifest(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no complete manifest ({error}). Build the database again. Finished stages are kept."
        ) from error
    return Stage(folder.parent, content["stage"], content["inputs"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a stage, and check its shape.

    Args:
        folder: Folder of the stage.

    Raises:
        OSError: If the manifest cannot be read.
        ValueError: If it is damaged, is that of another stage, or names files outside of the folder. The message does not name
            the folder.
    """
    content = read_sealed(folder / MANIFEST, ("stage", "inputs", "blocks", "files", "counts", "table"))
    name, inputs = value_of(content, "stage", str), value_of(content, "inputs", dict)
    if folder.name != f"{name}-{digest({'stage': name, **inputs})[:16]}":
        raise ValueError("it is that of another stage")
    files = value_of(content, "files", dict)
    for file in files:
        if not FILE_NAME.fullmatch(file):
            raise ValueError(f"it names {file!r:.60}, which is not a file of this folder")
        written = value_of(files, file, dict)
        value_of(written, "bytes", int), value_of(written, "sha256", str)
    value_of(content, "table", dict)
    return content


_intact: set[tuple[str, str, int, int, int]] = set()
"""The files that this process has found intact, so that none is read twice for it: path, hash, inode, size and time."""


def problem_of(file: Path, written: Mapping[str, Any], *, verify: bool) -> str | None:
    """Return what is wrong with a file of a stage, or None.

    Args:
        file: The file.
        written: What the manifest says of it.
        verify: Whether to read it and compare its hash. Otherwise only its size is compared.
    """
    found = file.stat() if file.is_file() else None
    if found is None or found.st_size != written["bytes"]:
        return f"is missing or does not have {written['bytes']} bytes"
    known = (str(file.absolute()), written["sha256"], found.st_ino, found.st_size, found.st_mtime_ns)
    if verify and known not in _intact:
        if file_hash(file) != written["sha256"]:
            return "does not match its hash"
        _intact.add(known)
    return None


def digest(content: Any) -> str:
    """Compute the SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that survives a kill and a power cut, see `publish`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    publish(path, write)


def write_rows(path: Path, parts: Iterable[NDArray[Any]], *, dtype: Any, shape: tuple[int, ...]) -> None:
    """Write an array file part by part, so that the array can be larger than the memory.

    Args:
        path: Path of the file. It ends in .npy.
        parts: Arrays that are concatenated along the first dimension.
        dtype: Type of the whole array.
        shape: Shape of the whole array.

    Raises:
        ValueError: If the file cannot be written.
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
                del part, content  # not in memory together with the next
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
