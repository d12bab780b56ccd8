"""Files that are written whole or not at all."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError


def temporary_path(path: Path, suffix: str = "tmp") -> Path:
    """Return a name beside a path that no other process uses, also not one with the same process id on another node."""
    return path.with_name(f".{path.name[:100]}.{socket.gethostname()[:32]}.{os.getpid()}.{uuid4().hex[:16]}.{suffix}")


def not_written(path: str | Path, error: Exception) -> ValueError:
    """Return the error of a file that could not be written, as on a full disk."""
    reason = getattr(error, "strerror", None) or error
    return ValueError(f"{path}: cannot be written ({reason}): choose another path or free it")


def publish(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, then rename it. A reader never sees a partial file.

    Args:
        path: The file. Its folder is created.
        write: Writes the content to the path that it gets.

    Raises:
        ValueError: If the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # a file system that may only be read refuses it, also where there is no such file
            temporary.unlink()


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
        probe = temporary_path(path, "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}): choose another path or free it") from error


@contextmanager
def locked(path: str | Path, *, on_wait: Callable[[str], None]) -> Iterator[bool]:
    """Hold a lock on a path that no other process holds at the same time. The lock ends with the process.

    Args:
        path: The file of the lock. It is created, and removed at the end.
        on_wait: Is called once if another process holds the lock, before this one waits for it. It gets what the file says of
            that process: its host, its process id and since when.

    Yields:
        Whether there is a lock. Some file systems have none.

    Raises:
        ValueError: If the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield False
        return
    path = Path(path)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written ({error.strerror or error}): choose another path or free it"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait(path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else "")
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            yield False
            return
        # The process before may have removed the file meanwhile. A third one then locks another file of the same name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        os.close(handle)
    try:
        with suppress(OSError):  # a full disk does not weaken the lock
            os.truncate(handle, 0)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
