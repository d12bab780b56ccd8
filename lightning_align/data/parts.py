"""Finished parts of a store that is being built, so that a build can be killed at any time and continued.

A part is an Arrow file with encoded rows, and a JSON file that is written last. The parts are in a folder beside the store.
Which rows a part has does not depend on the number of processes or on earlier interruptions.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_align.data.jobs import Encoded
from lightning_align.data.ledger import Ledger
from lightning_align.runtime.checksums import file_hash, sealed, unsealed
from lightning_align.runtime.files import publish_text

_FORMAT = 1
"""The version of the parts. Increase it when blocks, parts or encoded rows change."""
ROWS_PER_PART = 50_000
BYTES_PER_PART = 1 << 27


@dataclass
class Progress:
    """What has been encoded of a source."""

    num_blocks: int
    num_rows: int
    """The number of rows that were read."""
    num_mapped: int
    """The number of rows of the forms."""
    ledger: Ledger

    def add(self, encoded: Encoded) -> pa.RecordBatch | None:
        """Count a block, and return its rows with their numbers in the source."""
        batch = encoded.batch
        if batch is not None and self.num_mapped:
            index = batch.schema.get_field_index("row")
            numbers = pa.array(batch["row"].to_numpy() + self.num_mapped)
            batch = batch.set_column(index, batch.schema.field(index), numbers)
        self.num_blocks += 1
        self.num_rows += encoded.num_read
        self.num_mapped += encoded.num_mapped
        self.ledger.add(encoded.ledger)
        return batch


class Parts:
    """The finished parts of a store, and the part that is being written.

    Only one process may use them. See `lightning_align.runtime.files.locked`.

    Args:
        folder: The folder of the parts.
        settings: What the parts depend on besides the name of the folder. Parts with other settings are removed.
        progress: The progress of an empty build. It becomes that of the finished parts.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
        self.folder = folder
        self.progress = progress
        self.is_complete = False
        """Whether the parts have all rows of the source."""
        self._settings = {"format": _FORMAT, **settings}
        self._files: list[Path] = []
        self._sink: Any = None
        self._writer: Any = None
        self._size = [0, 0]
        folder.mkdir(parents=True, exist_ok=True)
        while not self.is_complete and self._resume():
            pass
        kept = {name for file in self._files for name in (file.name, file.with_suffix(".json").name)}
        for file in folder.iterdir():
            if file.name not in kept:
                file.unlink()

    def _path(self) -> Path:
        return self.folder / f"{len(self._files):06}.arrow"

    def _resume(self) -> bool:
        """Add the next finished part, if there is one that is whole."""
        path = self._path()
        try:
            content = unsealed(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
            if content["settings"] != self._settings or content["sha256"] != file_hash(path):
                return False
            reached = Progress(**{**content["progress"], "ledger": Ledger.from_dict(content["progress"]["ledger"])})
            self.is_complete = bool(content["is_last"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.progress = reached
        self._files.append(path)
        return True

    def add(self, encoded: Encoded) -> None:
        """Write the rows of the next block. Finish the part if it is large enough."""
        batch = self.progress.add(encoded)
        if batch is not None:
            if self._writer is None:
                self._sink = pa.OSFile(str(self._path().with_suffix(".tmp")), "wb")
                self._writer = pa.ipc.new_file(self._sink, batch.schema)
            self._writer.write_batch(batch)
            self._size[1] += batch.nbytes
        self._size[0] += encoded.num_read
        if self._size[0] >= ROWS_PER_PART or self._size[1] >= BYTES_PER_PART:
            self.finish()

    def finish(self, *, is_last: bool = False) -> None:
        """Finish the part that is being written.

        Args:
            is_last: Whether the source has no more rows.
        """
        path = self._path()
        temporary = path.with_suffix(".tmp")
        self.close()
        if not temporary.exists():
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])):
                pass  # no row of the part is used
        digest = file_hash(temporary)
        os.replace(temporary, path)
        progress = {**vars(self.progress), "ledger": self.progress.ledger.to_dict()}
        content = {"settings": self._settings, "sha256": digest, "is_last": is_last, "progress": progress}
        publish_text(path.with_suffix(".json"), json.dumps(sealed(content), indent=2, ensure_ascii=False))
        self._files.append(path)
        self.is_complete = is_last
        self._size = [0, 0]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all finished parts, in order."""
        for path in self._files:
            # The file is not mapped, because mapped pages count as memory of the process.
            with pa.OSFile(str(path)) as source:
                reader = pa.ipc.open_file(source)
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)

    def close(self) -> None:
        """Close the part that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
