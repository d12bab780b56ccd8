"""Checking checkpoints for damage and for code, before torch opens them.

A checkpoint of torch is a zip file with a checksum of each part, which torch writes and does not compare. A sharded checkpoint
is a folder: each file of shards is a row of such zip files, and ``.metadata`` is a pickle that says where each shard is.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_align.runtime.checksums import check_once
from lightning_align.runtime.ranks import world

SHARDS_META = "meta.pt"
"""The file that Lightning writes next to the shards of a checkpoint. No other folder has it."""
_METADATA = ".metadata"
"""The file that torch writes when all ranks have written their shards."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""What a file begins with in the format before torch 1.6, which torch still writes when asked to."""
_PLACES = "torch.distributed.checkpoint."
_CLASSES = {
    f"{_PLACES}metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_PLACES}filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
}
"""What the pickle ``.metadata`` names, by module."""


def check_checkpoint(path: str | Path, *, opens: bool = True) -> None:
    """Compare a checkpoint with the checksums in it. Ranks share the files of a sharded one.

    Args:
        path: The checkpoint. Nothing is done for a path that is neither a local file nor a sharded checkpoint, such as a URL.
        opens: Whether a sharded checkpoint is to be opened, so that its shards are checked too.

    Raises:
        ValueError: If it is damaged or incomplete, or a sharded one has code in it.
    """
    path = Path(path)
    if (path / SHARDS_META).is_file():
        _check_sharded(path, opens=opens)
    elif path.is_file():
        _named(path, path, partial(_check_file, path))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: If it is missing or damaged. A changed value is noticed only by the checksums of its folder.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Copy or write its folder again.") from error


def check_zip(path: Path) -> None:
    """Compare the content of a zip file with the checksums in it.

    Raises:
        ValueError: If they differ.
    """
    with zipfile.ZipFile(path) as file:
        _test(file)
        _check_storages(file)


def check_values(state: Any, path: str | Path) -> None:
    """Check that the weights of a checkpoint are tensors with values.

    Args:
        state: The state dict.
        path: The path of the checkpoint, for the message.

    Raises:
        ValueError: If one is not.
    """
    wrong = "" if isinstance(state, Mapping) else f"its state_dict is of type {type(state).__name__}"
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(value, Tensor):
            wrong = "" if name.endswith("_extra_state") else f"{name} in it is of type {type(value).__name__}"
        elif value.is_meta or value.layout is not torch.strided:
            wrong = f"{name} in it has no values" if value.is_meta else f"{name} in it is sparse"
        if wrong:
            break
    if wrong:
        raise ValueError(f"checkpoint {path} cannot be read ({wrong}). Use an earlier checkpoint of the run.")


def _test(file: zipfile.ZipFile) -> None:
    damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} in it is wrong, so the file is damaged")


_SIZES = {
    **dict.fromkeys(("Untyped", "Bool", "Byte", "Char"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
"""The bytes of a value, by the name of torch's class of storages."""


class _Anything:
    """Stands for what a pickle makes or calls."""

    def __init__(self, *_: Any) -> None:
        """Take anything."""

    def __call__(self, *_: Any) -> "_Anything":
        """Do nothing."""
        return _Anything()

    def __setitem__(self, name: Any, value: Any) -> None:
        """Take an entry of a dictionary."""

    def __setstate__(self, state: Any) -> None:
        """Take a state."""

    def append(self, value: Any) -> None:
        """Take an item of a list."""

    extend = append


class _Storages(pickle.Unpickler):
    """Lists what a pickle of torch says of the sizes of its tensors, and makes nothing else."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that does nothing. That of a storage knows the size of its values."""
        return type(name, (_Anything,), {"size": _SIZES.get(name.removesuffix("Storage"))})

    def persistent_load(self, name: Any) -> Any:
        """Note the size of a storage."""
        _, kind, key, _, number = name
        if kind.size is not None:
            self.sizes[str(key)] = kind.size * number
        return _Anything()


def _check_storages(file: zipfile.ZipFile) -> None:
    """Check that each tensor has as many bytes as the pickle says. Mapped into memory, a shorter one is read with the next."""
    sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    for pickled in [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]:
        storages = _Storages(io.BytesIO(file.read(pickled)))
        storages.load()
        for key, size in storages.sizes.items():
            found = sizes.get(f"{pickled.removesuffix('.pkl')}/{key}")
            if found != size:
                raise ValueError(f"a tensor in it must have {size} bytes, and has {found or 'none'}")


def _named(path: Path, file: Path, check: Callable[[], None], *, always: bool = False) -> None:
    """Check a file of a checkpoint, once or always. The error names both."""
    try:
        check() if always else check_once(file, check, kind="checkpoint")
    except Exception as error:  # zipfile, pickle and torch raise many types here
        place = "" if file == path else f"{file.name}: "
        raise ValueError(
            f"checkpoint {path} cannot be read ({place}{reason_of(error)}). Use an earlier checkpoint of the run."
        ) from error


def reason_of(error: BaseException) -> str:
    """Return the type and the first sentence of an error of torch, zipfile, pickle or safetensors, in one line.

    The rest of torch's messages is long, and explains how to turn its checks off.
    """
    if found := re.search(r"(?:GLOBAL |Unsupported class )([\w.]+)", str(error)):
        return f"it names {found[1]}, and a checkpoint holds tensors and primitive types only"
    lines = str(error).strip().splitlines()
    first = lines[-1 if isinstance(error, CheckpointException) else 0].partition(". ")[0] if lines else "empty"
    return f"{type(error).__name__}: {first[:200]}"


def _check_sharded(folder: Path, *, opens: bool) -> None:
    if not (folder / _METADATA).is_file():
        raise ValueError(
            f"checkpoint {folder} is incomplete: some ranks have not written their shards. Use an earlier one of the run."
        )
    _named(folder, folder / SHARDS_META, partial(_check_file, folder / SHARDS_META))
    places: dict[str, set[tuple[int, int]]] = {}
    _named(folder, folder / _METADATA, partial(_read_places, folder, places), always=True)
    if opens:
        rank, ranks = world()
        for name in sorted(places)[rank::ranks]:
            _named(folder, folder / name, partial(_check_shards, folder / name, places[name]))


def _check_file(path: Path) -> None:
    if zipfile.is_zipfile(path):
        check_zip(path)
        return
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if start[8:9] == b"{":
        raise ValueError("it is a safetensors file, which holds weights only, for `init_from`")
    if start != _LEGACY:  # such a file has no checksums
        raise ValueError("it is no file of torch, or its end is missing")


class _Names(pickle.Unpickler):
    """Unpickles the classes of torch's metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class, or raise if it does not belong there."""
        if name not in _CLASSES.get(module, ()):
            raise ValueError(f"it names {module}.{name}, which no sharded checkpoint holds")
        return super().find_class(module, name)


def _read_places(folder: Path, places: dict[str, set[tuple[int, int]]]) -> None:
    """Read where the shards are: the start and the end of each in its file.

    It is checked that all are there, and that nothing but torch's own classes would be unpickled.
    """
    with (folder / _METADATA).open("rb") as file:
        metadata: Any = _Names(file).load()
    for info in metadata.storage_data.values():
        name = info.relative_path
        if Path(name).name != name:
            raise ValueError(f"it names the file {name}, which is not in the folder")
        places.setdefault(name, set()).add((info.offset, info.offset + info.length))
    for name, path in (metadata.planner_data or {}).items():
        if name != ".".join(map(str, path)):
            raise ValueError(f"it names one entry {name} and {'.'.join(map(str, path))}")
    for name, stored in metadata.state_dict_metadata.items():
        chunks = getattr(stored, "chunks", None)  # what is not a tensor has none
        if chunks is not None:
            found = {tuple(index.offset or ()) for index in metadata.storage_data if index.fqn == name}
            _check_chunks(name, tuple(stored.size), chunks, found)
    for name, parts in places.items():
        shards = folder / name
        if not shards.is_file() or shards.stat().st_size < max(end for _, end in parts):
            raise ValueError(f"{name} is {'too short' if shards.is_file() else 'missing'}")


def _check_chunks(name: str, size: tuple[int, ...], chunks: list[Any], found: set[tuple[int, ...]]) -> None:
    """Check that the parts of a tensor fill it, and that each of them is stored."""
    number = 0
    for chunk in chunks:
        ends = [start + width for start, width in zip(chunk.offsets, chunk.sizes, strict=True)]
        number += math.prod(chunk.sizes)
        if tuple(chunk.offsets) not in found or any(end > whole for end, whole in zip(ends, size, strict=True)):
            raise ValueError(f"a part of {name} is not stored, or is not in it")
    if number != math.prod(size):
        raise ValueError(f"{name} has {math.prod(size)} values, but its parts have {number}")


def _check_shards(path: Path, places: set[tuple[int, int]]) -> None:
    """Check the zip files of which a file of shards consists, from the last one to the first.

    Args:
        path: The file.
        places: The start and the end of each shard in it. A shard must be one of these files, and not a part of one.
    """
    found = set()
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        while end > 0:
            with zipfile.ZipFile(_Window(file, 0, end)) as part:
                _test(part)
                start = min(entry.header_offset for entry in part.infolist())
            if unsafe := get_unsafe_globals_in_checkpoint(cast(BinaryIO, _Window(file, start, end))):
                raise ValueError(f"it would run {', '.join(unsafe)} when it is opened")
            found.add((start, end))
            end = start
    if not places <= found:
        raise ValueError("the metadata names a part of it that is no file of torch")


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._end, self._at = file, start, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end - self._start}[whence]
        if base + offset < 0:
            raise OSError("negative position")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._end - self._start - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
