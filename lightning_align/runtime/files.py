"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def publish(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, then rename it. A reader never sees a partial file.

    Args:
        path: The file. Its folder is created.
        write: Writes the content to the path that it gets.

    Raises:
        ValueError: If the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}): choose another path or free it") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def publish_text(path: str | Path, text: str) -> None:
    """Publish a text in UTF-8; see `publish`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    publish(path, write)


def check_writable(path: str | Path) -> None:
    """Check that `publish` can write a file, without touching an existing one.

    Raises:
        ValueError: If the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}): choose another path or free it") from error
