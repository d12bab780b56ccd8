"""The progress bar of a source that is being tokenized."""

import time

from tqdm.auto import tqdm


class ProgressBar:
    """A bar with the share of the source that was read, the rows, the rows per second and the time that is left.

    Args:
        name: The name of the source.
        unit: What ``total`` counts: ``rows``, or ``B`` for bytes.
        total: How many there are. Without it there is no time left.
    """

    def __init__(self, name: str, *, unit: str, total: int | None) -> None:
        self._is_bytes = unit == "B"
        self._bar = tqdm(
            total=total,
            desc=f"tokenizing {name}",
            unit="B" if self._is_bytes else " rows",
            unit_scale=self._is_bytes,
            leave=False,
            disable=None,  # only on a terminal
        )
        self._start = time.monotonic()
        self._skipped = 0

    def skip(self, reached: float, *, num_rows: int) -> None:
        """Begin at a part of the source whose rows are finished already. They do not count for the rate."""
        self._bar.initial = self._bar.n = round(reached)
        self._skipped = num_rows
        self._bar.refresh()

    def update(self, reached: float, *, num_rows: int) -> None:
        """Show how far the source was read.

        Args:
            reached: The bytes or rows of the source up to here.
            num_rows: The number of rows up to here.
        """
        if self._is_bytes:
            rate = (num_rows - self._skipped) / max(time.monotonic() - self._start, 1e-9)
            self._bar.set_postfix_str(f"{num_rows:,} rows, {rate:,.0f} rows/s", refresh=False)
        self._bar.update(round(reached) - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
