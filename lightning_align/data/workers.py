"""Worker processes that encode blocks.

A worker is a fresh interpreter that imports what it needs to encode, not PyTorch. It is no fork: the parent may have threads of
the tokenizers library or a GPU. It does not import the main script either, so scripts need no guard for it. A worker ends when
its parent does, even if the parent is killed.
"""

import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lightning_align.data.blocks import Block
from lightning_align.data.jobs import Encoded, Job

T = TypeVar("T")
_COMMAND = "from lightning_align.data.workers import serve; serve()"
_BLOCKS_PER_WORKER = 3
"""The number of blocks per worker that are read ahead. They and their results are held in memory."""


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerEndedError(ValueError):
    """A process ended before its work did."""


class _Worker:
    """A process that encodes one block at a time."""

    def __init__(self, job: bytes) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # There is a process per core, so none of them needs threads.
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self._replies = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        self._requests.send_bytes(job)

    def answer(self) -> Any:
        """Wait for the next reply.

        Raises:
            WorkerEndedError: If the process ended.
            Exception: What the process raised.
        """
        try:
            kind, content = pickle.loads(self._replies.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerEndedError(
                f"a process that tokenizes rows ended with exit status {self.process.wait()}, perhaps because memory ran out."
                " Run the same again, which continues where it stopped, with fewer `preparation_workers`."
            ) from error
        if kind == "error":
            raise content
        return content

    def encode(self, block: Block) -> Encoded:
        """Encode a block."""
        try:
            self._requests.send_bytes(pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL))
        except OSError:
            pass  # the process ended, which `answer` reports
        return Encoded.unpack(self.answer())

    def end(self) -> None:
        """End the process. A thread that waits for a reply gets an error."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Close the connections. No thread may wait for a reply."""
        self._requests.close()
        self._replies.close()


class Workers:
    """Processes that encode the blocks of a source. Close them at the end.

    Args:
        job: How to encode.
        num_workers: The number of processes.

    Raises:
        ValueError: If the job cannot be sent to other processes, for example because its tokenizer is of a class of the main
            script.
    """

    def __init__(self, job: Job, num_workers: int) -> None:
        self._workers: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenize")
        try:
            content = pickle.dumps(job)
            self._workers += [_Worker(content) for _ in range(num_workers)]
            for worker in self._workers:
                worker.answer()
                self._free.put(worker)
        except Exception as error:
            self.close()
            raise ValueError(f"the rows cannot be tokenized by other processes ({type(error).__name__}: {error})") from error

    def run(self, blocks: Iterator[tuple[T, Block]]) -> Iterator[tuple[T, Encoded]]:
        """Encode blocks and yield the results in the order of the blocks.

        Args:
            blocks: Blocks, each with something that is returned with its result.
        """
        waiting: deque[tuple[T, Future[Encoded]]] = deque()
        problem: Exception | None = None
        while True:
            while problem is None and len(waiting) < _BLOCKS_PER_WORKER * len(self._workers):
                try:
                    label, block = next(blocks)
                except StopIteration:
                    break
                except Exception as error:
                    # The error comes after the blocks that were read before it.
                    problem = error
                    break
                waiting.append((label, self._threads.submit(self._encode, block)))
            if not waiting:
                break
            label, future = waiting.popleft()
            yield label, future.result()
        if problem is not None:
            raise problem

    def _encode(self, block: Block) -> Encoded:
        worker = self._free.get()
        try:
            return worker.encode(block)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve() -> None:
    """Encode the blocks that come from the standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    requests = Connection(os.dup(0), writable=False)
    replies = Connection(os.dup(1), readable=False)
    # What libraries print must not be read as a reply.
    os.dup2(2, 1)
    # Rows and ids are no cycles. To look for some again and again takes long.
    gc.set_threshold(100_000, 50, 100)
    try:
        try:
            job = pickle.loads(requests.recv_bytes())
        except EOFError:
            raise
        except Exception as error:
            _reply(replies, "error", error)
            return
        _reply(replies, "ready", None)
        while True:
            block = pickle.loads(requests.recv_bytes())
            try:
                kind, content = "encoded", job.run(block).pack()
            except Exception as error:
                kind, content = "error", error
            _reply(replies, kind, content)
    except (EOFError, BrokenPipeError, ConnectionError):
        return  # the parent has closed its end, or ended


def _reply(replies: Connection, kind: str, content: Any) -> None:
    try:
        data = pickle.dumps((kind, content), protocol=pickle.HIGHEST_PROTOCOL)
        if kind == "error":
            pickle.loads(data)  # some errors cannot be created again
    except Exception:
        data = pickle.dumps((kind, RuntimeError(f"{type(content).__name__}: {content}")))
    replies.send_bytes(data)
