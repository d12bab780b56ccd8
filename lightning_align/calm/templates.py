"""Conversations as an augment's own chat template writes them, aligned with the anchor's rows turn by turn.

The rows of a source are encoded a second time, with the tokenizer and the template of the augment. What the assistant says is
the same in both rows, and the augment reads it as far as the anchor has written it. What comes before a turn of the assistant
(the messages of others, and the text of the template) is replaced by what the augment's template writes there. It is visible
from the last column before the turn, where the anchor knows all of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from lightning_align.calm.text import OwnTokenizer, Turn
from lightning_align.data.recipe import Recipe
from lightning_align.data.rows import Source, read_rows
from lightning_align.data.store import StoredRow, TokenStore, build_store, read_forms, store_path
from lightning_align.data.tokenizer import Tokenizer, all_ends

_MOST_READ = 1024
"""The number of rows that are read to find out whether a source has conversations."""


def has_conversations(source: Source, *, split: str, recipe: Recipe) -> bool:
    """Return whether one of the first rows of a source has messages, which a chat template writes."""
    fields = ("messages", "prompt", "response")
    rows = islice(read_forms(read_rows(source, split=split), recipe=recipe), _MOST_READ)
    return any(isinstance(row.fields.get(name), list) for row in rows for name in fields)


def own_store(
    source: Source, *, split: str, recipe: Recipe, tokenizer: Tokenizer, cache_dir: str, num_workers: int
) -> TokenStore:
    """Encode the rows of a source with the tokenizer and the chat template of an augment.

    Args:
        source: The source.
        split: The split of a hub dataset if its name does not include one.
        recipe: How the rows are encoded for the anchor. Here, no row is shortened, and bad rows are left out.
        tokenizer: The tokenizer of the augment.
        cache_dir: The folder of the stores.
        num_workers: See `build_store`.
    """
    recipe = replace(recipe, kind=f"{recipe.kind}-augment", max_length=1 << 30, on_bad_row="skip")
    options: Any = {"split": split, "recipe": recipe, "tokenizer": tokenizer}
    path = store_path(source, cache_dir=cache_dir, **options)
    store, _ = build_store(path, source=source, num_workers=num_workers, **options)
    return store


def turns_of_rows(store: TokenStore, other: TokenStore, own: OwnTokenizer) -> dict[int, list[Turn]]:
    """Align the rows of two stores of one source.

    Args:
        store: The rows of the anchor.
        other: The same rows for the augment. Some may be missing.
        own: The tokenizers of both.

    Returns:
        The turns of rows by their index in ``store``. An augment reads the anchor's text of the other rows.
    """
    places = _places(other)
    found: dict[int, list[Turn]] = {}
    for index in range(len(store)):
        row = store[index]
        place = places.get(row.row)
        turns = None if place is None else align_turns(row, other[place], own)
        if turns is not None:
            found[index] = turns
    return found


def align_turns(row: StoredRow, other: StoredRow, own: OwnTokenizer) -> list[Turn] | None:
    """Align a row with the same row for the augment, turn by turn.

    Args:
        row: The row of the anchor. Its end or the beginning of its prompt may be missing.
        other: The row of the augment.
        own: The tokenizers of both.

    Returns:
        The turns. None if the two rows do not say the same, or if no template has written them.
    """
    ids, theirs = row.sides[0].tokens.tolist(), other.sides[0].tokens.tolist()
    if _is_plain(ids[: row.num_prompt], theirs[: other.num_prompt], own):
        return None
    runs, other_runs = (_runs(one.sides[0].targets) for one in (row, other))
    if not runs or len(runs) > len(other_runs):
        return None
    ends = frozenset(all_ends(own.other)) | getattr(own.other, "special_ids", frozenset())
    turns: list[Turn] = []
    position = 0
    for (start, stop), (other_start, other_stop) in zip(runs, other_runs, strict=False):
        said = own.tokenizer.decode(ids[start:stop]).strip()
        says = own.other.decode(theirs[other_start:other_stop]).strip()
        if said != says and not (stop == len(ids) and says.startswith(said)):
            return None
        last = other_stop
        while last > other_start and theirs[last - 1] in ends:
            last -= 1
        turns.append(Turn(start, stop, theirs[position:other_start], theirs[last:other_stop]))
        position = other_stop
    return turns


class PromptTable:
    """What augments read instead of the text of prompts, by the prompts in the anchor's ids.

    It holds a hash of each prompt. They are read when the first is asked for.
    """

    def __init__(self) -> None:
        self._sources: list[tuple[TokenStore, list[TokenStore | None], Sequence[OwnTokenizer | None]]] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        self._places: list[list[dict[int, int] | None]] = []

    def add(self, store: TokenStore, others: list[TokenStore | None], own: Sequence[OwnTokenizer | None]) -> None:
        """Add the prompts of a source.

        Args:
            store: The rows of the anchor.
            others: The same rows for each augment. None for an augment that reads the anchor's text.
            own: The tokenizers of each augment.
        """
        if any(other is not None for other in others) and all(store.path != known.path for known, _, _ in self._sources):
            self._sources.append((store, others, own))

    def get(self, prompt: Sequence[int], index: int) -> list[int] | None:
        """Return what an augment reads instead of the text of a prompt. None if it reads the text.

        Args:
            prompt: The prompt in the anchor's ids.
            index: The index of the augment.
        """
        for number in range(len(self._places), len(self._sources)):
            store, others, _ = self._sources[number]
            self._places.append([None if other is None else _places(other) for other in others])
            for place in range(len(store)):
                row = store[place]
                self._rows.setdefault(_key(row.sides[0].tokens[: row.num_prompt]), (number, place))
        if (found := self._rows.get(_key(np.asarray(prompt, dtype=np.int32)))) is None:
            return None
        store, others, own = self._sources[found[0]]
        other, one, places = others[index], own[index], self._places[found[0]][index]
        same = None if places is None else places.get(store[found[1]].row)
        if other is None or one is None or same is None:
            return None
        row = other[same]
        theirs = row.sides[0].tokens[: row.num_prompt].tolist()
        return None if _is_plain(prompt, theirs, one) else theirs


def _is_plain(ids: Sequence[int], theirs: Sequence[int], own: OwnTokenizer) -> bool:
    """Return whether the augment's prompt is the text of the anchor's prompt, without a template of its own."""
    bos = [] if own.other.bos_id is None else [own.other.bos_id]
    return list(theirs) == [*bos, *own.other.encode_batch([own.tokenizer.decode(ids)])[0].ids]


def _places(store: TokenStore) -> dict[int, int]:
    return {row: place for place, row in enumerate(store.table["row"].to_pylist())}


def _runs(targets: Any) -> list[tuple[int, int]]:
    """Return the start and the stop of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], targets, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _key(ids: Any) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=12).digest()
