"""Work outside of a training loop that ends at SIGTERM."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ends_at_sigterm(message: str) -> Iterator[None]:
    """End the process with status 143 when SIGTERM comes within a ``with`` block.

    During a run, Lightning notes the signal and looks at it between two training batches only. Work of hours before the first
    batch would not end. Clean-up code runs, as after an exception.

    Args:
        message: What to print: how to go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        print(f"lightning-align: stopped by SIGTERM. {message}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # A Trainer that ran within the block has restored what it found.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
