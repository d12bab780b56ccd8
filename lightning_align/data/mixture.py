"""Mixtures of sources: their rows as one dataset, and a sampler that draws from each source by its weight."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_align.data.batching import LengthGroupedSampler
from lightning_align.data.mapping import RowMapping
from lightning_align.data.rows import RowTask, Source, source_name
from lightning_align.data.shapes import RankedPairs, Shape
from lightning_align.data.store import TokenStore

MixtureStop = Literal["first_exhausted", "all_exhausted"]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class SourcePart:
    """A part of a mixture: a source with its weight and its own mapping.

    Args:
        source: A file, folder, pattern, hub dataset, list of these, or task.
        weight: The share of the rows of an epoch, relative to the other weights. Give all parts of a mixture a weight, or
            none. Without weights, an epoch has every row once. Only training uses it.
        columns: The column of each field. Default is that of the data module, as for the next three.
        roles: The role of each name in messages.
        shape: The shape of the rows.
        ranked_pairs: The pairs of a row of ranked answers.
    """

    # For the order of the types see `AlignDataModule`.
    source: str | list[str] | RowTask | Path
    weight: float | None = None
    columns: dict[str, str] | None = None
    roles: dict[str, str] | None = None
    shape: Shape | None = None
    ranked_pairs: RankedPairs | None = None

    @property
    def rows(self) -> Source:
        """The source, as `read_rows` takes it."""
        return str(self.source) if isinstance(self.source, Path) else self.source

    @property
    def name(self) -> str:
        """The name of the source, for messages."""
        return source_name(self.rows)

    def mapping(self, default: RowMapping) -> RowMapping:
        """Return how to convert the rows of the part, with the settings of ``default`` where it has none."""
        own = {name: getattr(self, name) for name in ("columns", "roles", "shape", "ranked_pairs")}
        return replace(default, **{name: value for name, value in own.items() if value is not None})


def parts_of(source: Source | Path | Sequence[SourcePart]) -> list[SourcePart]:
    """Return the parts of a source. A source that is no mixture is one part.

    Raises:
        ValueError: If only some parts have a weight, or a weight is not positive.
    """
    if isinstance(source, str | Path | RowTask):
        return [SourcePart(source)]
    parts = [part for part in source if isinstance(part, SourcePart)]
    if not parts:
        return [SourcePart([str(path) for path in source])]
    for part in parts:
        # Not in the part itself: the command line would take its error for one of another type of source.
        if part.weight is not None and not (part.weight > 0 and math.isfinite(part.weight)):
            raise ValueError(
                f"`weight` of {part.name} must be a positive number, but got {part.weight}. To leave the source out, remove it"
                " from the mixture."
            )
    if len(parts) < len(source) or len({part.weight is None for part in parts}) > 1:
        raise ValueError(
            "the parts of a mixture must all be objects with a `source`, and all or none must have a `weight`. They are: "
            + ", ".join(f"{p.name} (weight {p.weight})" if isinstance(p, SourcePart) else str(p) for p in source)
        )
    return parts


def named_sources(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return sources by stage, with one entry ``stage/name`` for each of several named sources of a stage.

    Args:
        given: A source, a dictionary of sources, or None for each stage.

    Raises:
        ValueError: If a dictionary is empty, has a bad name, or is a part of a mixture outside of a list.
    """
    sources: dict[str, Any] = {}
    for stage, source in given.items():
        if not isinstance(source, Mapping):
            sources |= {} if source is None else {stage: source}
            continue
        if "source" in source or "class_path" in source or not source:
            raise ValueError(
                f"`{stage}` must be a source, or several sources by name, but got {dict(source)}. A mixture is a list: "
                f"[{{source: a.jsonl, weight: 2}}, {{source: b.jsonl, weight: 1}}]."
            )
        for name, each in source.items():
            if not name or "/" in str(name):
                raise ValueError(f"the names of the sources in `{stage}` must be words without a slash, but got {name!r}.")
            sources[f"{stage}/{name}"] = each
    return sources


def describe(source: Source | Path | Sequence[SourcePart]) -> str:
    """Return the names of the parts of a source."""
    return ", ".join(part.name for part in parts_of(source))


class MixedStore(TokenStore):
    """The rows of several stores as one dataset, one store after the other.

    The number of a row is its number in its own source plus the numbers of the sources before it, so that it is unique.

    Args:
        stores: The stores of the parts.
        names: The names of the parts, for messages.

    Raises:
        ValueError: If some of the stores have pairs and others have single responses.
    """

    def __init__(self, stores: Sequence[TokenStore], names: Sequence[str]) -> None:
        # No such file exists. The name identifies the rows, as that of a store does.
        content = " ".join(Path(store.path).stem for store in stores)
        name = f"mixture-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow"
        super().__init__(str(Path(stores[0].path).with_name(name)))
        self.stores = list(stores)
        self.sizes = [len(store) for store in stores]
        kinds = {name: "pairs" if store.num_sides == 2 else "no pairs" for name, store in zip(names, stores, strict=True)}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"pairs and other rows cannot be mixed: {', '.join(f'{n} has {k}' for n, k in kinds.items())}.")
        self.starts = [0]
        """The number of the first row of each part."""
        for store in stores:
            self.starts.append(self.starts[-1] + pc.max(store.table["row"]).as_py() + 1)

    @property
    def table(self) -> pa.Table:
        """The memory-mapped files, one after the other."""
        if self._table is None:
            tables = []
            for start, store in zip(self.starts, self.stores, strict=False):
                table = store.table
                column = table.column_names.index("row")
                tables.append(table.set_column(column, "row", pc.add(table["row"], pa.scalar(start, pa.int64()))))
            self._table = pa.concat_tables(tables)
        return self._table


class MixtureSampler(LengthGroupedSampler):
    """A sampler that draws the rows of each epoch from several parts, in proportion to their weights.

    Each part is an endless sequence of its rows: all of them in a random order, then all of them in another random order, and
    so on. An epoch takes the next rows of each part. No row of a part is therefore repeated before all others were drawn. The
    rows depend on the seed and the epoch alone, so a resumed run draws the same.

    Args:
        lengths: The length of each row, of shape (rows,). None does not group rows by length.
        sizes: The number of rows of each part, in the order of the rows.
        weights: The weight of each part.
        stop: When an epoch ends. ``first_exhausted``: when all rows of one part were drawn, of others only some.
            ``all_exhausted``: when all rows of every part were drawn, of others some more than once.
        batch_size: The number of rows per batch and rank.
        seed: The seed of the order.
        members: The numbers of the rows of each part. Default is one part after the other.
        replicas: The arguments ``num_replicas`` and ``rank``.

    Raises:
        ValueError: See `LengthGroupedSampler`.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any] | None,
        *,
        sizes: Sequence[int],
        weights: Sequence[float],
        stop: MixtureStop,
        batch_size: int,
        seed: int = 0,
        members: Sequence[Indices] | None = None,
        **replicas: Any,
    ) -> None:
        self.sizes, self.stop = list(sizes), stop
        ends = np.cumsum(self.sizes)
        self.members = (
            [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)] if members is None else members
        )
        self.quotas = mixture_quotas(sizes, weights, stop)
        super().__init__(lengths, num_rows=sum(self.quotas), batch_size=batch_size, seed=seed, **replicas)

    @cached_property
    def order(self) -> str:
        """A hash of the lengths, the sizes of the parts and the rows that an epoch takes of them."""
        lengths = super().order
        return hashlib.sha256(f"{lengths} {self.sizes} {self.quotas}".encode()).hexdigest()[:16]

    def _epoch_rows(self, random: np.random.Generator) -> Indices:
        drawn = []
        for part, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            position, end = self.epoch * quota, (self.epoch + 1) * quota
            while position < end:
                turn, skipped = divmod(position, size)
                order = np.random.default_rng([self.seed, part, turn]).permutation(size)
                taken = order[skipped : skipped + end - position]
                drawn.append(self.members[part][taken])
                position += len(taken)
        return random.permutation(np.concatenate(drawn))


def mixture_quotas(sizes: Sequence[int], weights: Sequence[float], stop: MixtureStop) -> list[int]:
    """Count the rows that an epoch takes of each part.

    With sizes n and shares p of the weights, an epoch has min(n / p) rows for ``first_exhausted`` and max(n / p) for
    ``all_exhausted``, of which each part gives its share.

    Args:
        sizes: The number of rows of each part.
        weights: The weight of each part.
        stop: When an epoch ends.
    """
    total = math.fsum(weights)
    epochs = [size * total / weight for size, weight in zip(sizes, weights, strict=True)]
    if stop == "first_exhausted":
        num_rows = min(epochs)
        return [min(size, max(1, round(num_rows * w / total))) for size, w in zip(sizes, weights, strict=True)]
    num_rows = max(epochs)
    return [max(size, round(num_rows * w / total)) for size, w in zip(sizes, weights, strict=True)]
