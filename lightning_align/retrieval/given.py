"""Neighbors that are given from outside instead of being searched for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_align.retrieval.search import Found, Retriever, check_search, collect
from lightning_align.retrieval.tables import Tokens

GIVEN = -1
"""The chunk number of a given neighbor, which is in no database."""


class GivenNeighbors:
    """A `Retriever` that returns given neighbors for known chunks, and asks another retriever for the others.

    Use it to generate with passages of your own, with the results of a search service, or with other neighbors than those of
    the database as a control. Without another retriever, other chunks have no neighbors.

    Args:
        retriever: The retriever for other chunks. Default is none.
        chunk_size: Tokens per chunk (m). Default is that of `retriever`.
        tokenizer_fingerprint: The fingerprint of the tokenizer of the ids. Default is that of `retriever`, or empty.

    Raises:
        ValueError: If neither `retriever` nor `chunk_size` is given, or they differ.
    """

    def __init__(
        self, retriever: Retriever | None = None, *, chunk_size: int | None = None, tokenizer_fingerprint: str | None = None
    ) -> None:
        own = None if retriever is None else retriever.chunk_size
        size = own if chunk_size is None else chunk_size
        if size is None or size < 1 or (own is not None and own != size):
            raise ValueError(
                f"`chunk_size` must be that of the model, and the same as that of `retriever`, but got {chunk_size} for"
                f" `chunk_size` and {own} for the retriever. Give one of them."
            )
        self.retriever, self.chunk_size = retriever, size
        fingerprint = "" if retriever is None else retriever.tokenizer_fingerprint
        self.tokenizer_fingerprint = fingerprint if tokenizer_fingerprint is None else tokenizer_fingerprint
        self._given: dict[tuple[int, ...], list[list[int]]] = {}

    def give(self, tokens: ArrayLike, neighbors: Sequence[Sequence[ArrayLike]]) -> None:
        """Give the neighbors of each full chunk of a prompt. They replace those that were given before for an equal chunk.

        Args:
            tokens: The token ids of the prompt, unpadded. Chunks are counted from its first token.
            neighbors: For each full chunk its neighbors, the nearest first: the token ids of a passage, at most 2m of them. m
                of them are read as the neighbor and the rest as its continuation.

        Raises:
            ValueError: If there are not as many lists as full chunks, or a neighbor is empty or too long.
        """
        run, size = np.asarray(tokens).tolist(), self.chunk_size
        chunks = [tuple(run[start : start + size]) for start in range(0, len(run) - size + 1, size)]
        if len(chunks) != len(neighbors):
            raise ValueError(
                f"`neighbors` must have a list for each of the {len(chunks)} full chunks of {size} tokens of the prompt, but "
                f"has {len(neighbors)}. A chunk without neighbors has an empty list."
            )
        given = [[np.asarray(one, dtype=np.int64).reshape(-1).tolist() for one in some] for some in neighbors]
        for number, some in enumerate(given):
            if wrong := [len(one) for one in some if not 1 <= len(one) <= 2 * size]:
                raise ValueError(
                    f"A neighbor must have from 1 to {2 * size} tokens (twice `chunk_size`), but one of chunk {number} has "
                    f"{wrong[0]}. Cut it, or leave it out."
                )
        self._given.update(zip(chunks, given, strict=True))

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`. Given neighbors have the number -1 and their place as the distance. `exclude` does not hide them.

        Raises:
            ValueError: If `k` is not positive, or `exclude` does not have an entry per query.
        """
        check_search(len(queries), k, exclude)
        given = [self._given.get(tuple(np.asarray(query).tolist())) for query in queries]
        results = ([(GIVEN, float(place), one) for place, one in enumerate((some or [])[:k])] for some in given)
        found = collect(results, (len(queries), k, 2 * self.chunk_size), pad_id=0)
        rest = [row for row, some in enumerate(given) if some is None]
        if self.retriever is not None and rest:
            excluded = None if exclude is None else [exclude[row] for row in rest]
            other = self.retriever.search([queries[row] for row in rest], k, excluded)
            wholes: list[NDArray[Any]] = [*found[:3], *found.tokens]
            parts: list[NDArray[Any]] = [*other[:3], *other.tokens]
            for whole, part in zip(wholes, parts, strict=True):
                whole[rest] = part
        return Found(found.ids, found.mask, found.distances, Tokens(*found.tokens))
