"""The stages in their order, the head that says which results belong together, and documents that come and go."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import numpy as np

from lightning_align.retrieval.chunks import ChunkTokenizer, DocumentSource, append_chunks, build_chunks
from lightning_align.retrieval.database import HEAD, RetrievalDatabase
from lightning_align.retrieval.dense import DenseQueries, DenseSearcher
from lightning_align.retrieval.encoders import Encoder, build_vectors, read_vectors
from lightning_align.retrieval.index import IndexConfig, append_index, build_index, open_index
from lightning_align.retrieval.lexical import Decode, HybridSearcher, LexicalSearcher, build_lexical
from lightning_align.retrieval.neighbors import Searcher, build_neighbors, group_of_chunks
from lightning_align.retrieval.search import DatabaseRetriever
from lightning_align.retrieval.stages import Stage, Team, open_stage, write_bytes
from lightning_align.retrieval.tables import ChunkTable, Ints

Kind = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a database is built and searched with."""

    kind: Kind
    tokenizer: ChunkTokenizer
    decode: Decode
    """Text of token ids."""
    encoder: Encoder | None
    """None for BM25 alone."""
    made_with: Mapping[str, Any]
    """How to make tokenizer and encoder again; goes into the head."""
    trainer: Callable[[], L.Trainer]
    """Makes the Trainer that runs the encoder."""
    k: int
    index: IndexConfig
    verify: float
    hide_copies: bool = True
    """Whether held-out documents may not find near-duplicates of themselves; those of the database never do."""


@dataclass(frozen=True)
class Parts:
    """The finished stages of a generation that a search needs."""

    chunks: Stage
    vectors: Stage | None = None
    index: Stage | None = None
    lexical: Stage | None = None


class Builder:
    """Builds a database, or what is missing of it; made and used on all ranks together.

    Args:
        root: folder of the database.
        tools: what to build it with.
    """

    def __init__(self, root: Path, tools: Tools) -> None:
        self.root, self.tools, self.team = root, tools, Team()
        self._shared: dict[str, Any] = {"team": self.team, "verify": tools.verify}
        self._seen: set[Path] = set()
        """Folders of stages that were found whole, so that none is compared with its hashes twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.team.close()

    # -- what users want done

    def build(self, source: DocumentSource, queries: Mapping[str, DocumentSource], *, chunk_size: int) -> RetrievalDatabase:
        """Build the database of some documents. Documents that were added to or deleted from it since stay so.

        Where they, their chunk size or their tokenizer are others than before, what was deleted is left out by its name, and
        what was added has to be added again, which is said.

        Args:
            source: the documents that can be neighbors.
            queries: further documents whose neighbors are wanted, each source by a name.
            chunk_size: tokens a chunk (m).

        Raises:
            ValueError: if anything that the user gave cannot be used; what is finished by then is kept.
        """
        base = self._chunks(source, chunk_size)
        head = self._head()
        lost = head is not None and self._whole(self.root / head["stages"]["chunks"]) is None
        if head is None or head["base"] != base.folder.name or lost:
            deleted = [] if head is None else self._carried(head, base)
            head = {"base": base.folder.name, "generation": 0, "deleted": deleted, "stages": {"chunks": base.folder.name}}
        # Vectors of the same chunks are found by their key, and compared with their hashes, where they are made.
        previous = self._previous(head, "index")
        parts = self._parts(previous.chunks, previous=previous)
        sets = {
            name: build_chunks(self.root, documents, self.tools.tokenizer, chunk_size=chunk_size, **self._shared)
            for name, documents in queries.items()
        }
        return self._finish(head, parts, sets)

    def add(self, source: DocumentSource) -> RetrievalDatabase:
        """Add documents: only they are encoded, and nothing is trained again.

        Args:
            source: documents with names that the database does not have, or whose bearers were deleted from it.

        Raises:
            ValueError: if a name is there already.
        """
        head = self._existing_head()
        previous = self._previous(head, "vectors", "index")
        before = ChunkTable(previous.chunks.folder)
        added = self._chunks(source, before.chunk_size)
        chunks = append_chunks(self.root, previous.chunks, added, deleted=head["deleted"], team=self.team)
        return self._finish(
            {**head, "generation": head["generation"] + 1}, self._parts(chunks, previous=previous), self._query_stages(head)
        )

    def delete(self, names: Sequence[str]) -> RetrievalDatabase:
        """Delete documents: from now on nothing finds them.

        Args:
            names: their ids.

        Raises:
            ValueError: if there is no such document, or none would be left.
        """
        head = self._existing_head()
        previous = self._previous(head, "index")
        table = ChunkTable(previous.chunks.folder)
        gone = set(head["deleted"])
        there = {name: number for number, name in enumerate(table.document_ids) if number not in gone}
        if missing := [name for name in names if name not in there]:
            raise ValueError(f"the database {self.root} has no document {missing[0]!r}: see document_ids for those that it has")
        gone |= {there[name] for name in names}
        if len(gone) == table.num_documents:
            raise ValueError(f"deleting {len(names)} documents would leave none: delete the folder {self.root} instead")
        return self._finish(
            {**head, "generation": head["generation"] + 1, "deleted": sorted(gone)},
            self._parts(previous.chunks, previous=previous),
            self._query_stages(head),
        )

    # -- stages

    def _chunks(self, source: DocumentSource, chunk_size: int) -> Stage:
        """Chunks that can be neighbors."""
        chunks = build_chunks(self.root, source, self.tools.tokenizer, chunk_size=chunk_size, byte_counts=False, **self._shared)
        self._seen.add(chunks.folder)
        return chunks

    def _parts(self, chunks: Stage, *, previous: Parts) -> Parts:
        """Everything that searching some chunks needs; what a former generation has of it is used again."""
        tools = self.tools
        vectors = index = lexical = None
        if tools.encoder is not None:
            vectors = self._vectors(chunks, previous=previous.vectors)
            if previous.index is not None and previous.index.inputs["vectors"] == vectors.key:
                index = previous.index
            elif previous.index is not None and previous.vectors is not None:
                same_encoder = previous.vectors.inputs["encoder"] == vectors.inputs["encoder"]
                if same_encoder and chunks.inputs.get("base") == previous.chunks.key:
                    index = append_index(self.root, previous.index, previous.vectors, vectors, **self._shared)
            index = index or build_index(self.root, vectors, tools.index, **self._shared)
        if tools.kind != "dense":
            lexical = build_lexical(self.root, chunks, tools.decode, **self._shared)
        return Parts(chunks, vectors, index, lexical)

    def _vectors(self, chunks: Stage, *, previous: Stage | None = None) -> Stage:
        assert self.tools.encoder is not None
        return build_vectors(
            self.root, chunks, self.tools.encoder, trainer=self.tools.trainer, previous=previous, **self._shared
        )

    def _finish(self, head: Mapping[str, Any], parts: Parts, sets: Mapping[str, Stage]) -> RetrievalDatabase:
        """Find all neighbors, then publish the head."""
        tools, deleted = self.tools, np.array(head["deleted"], dtype=np.int64)
        inputs = {"kind": tools.kind} | {
            name: stage.key for name, stage in (("index", parts.index), ("lexical", parts.lexical)) if stage is not None
        }

        def neighbors(chunks: Stage, vectors: Stage | None, *, hide_copies: bool | None = None) -> str:
            searcher = make_searcher(parts, deleted, tools.kind, tools.decode, query_vectors=vectors)
            stage = build_neighbors(
                self.root,
                chunks,
                parts.chunks,
                searcher,
                inputs=inputs,
                deleted=deleted,
                k=tools.k,
                hide_copies=hide_copies,
                **self._shared,
            )
            return stage.folder.name

        stages = {name: stage.folder.name for name, stage in vars(parts).items() if stage is not None}
        stages["neighbors"] = neighbors(parts.chunks, parts.vectors)
        queries = {}
        for name, chunks in sets.items():
            vectors = None if tools.encoder is None else self._vectors(chunks)
            queries[name] = {
                "chunks": chunks.folder.name,
                "neighbors": neighbors(chunks, vectors, hide_copies=tools.hide_copies),
            }
        content = {
            "base": head["base"],
            "generation": head["generation"],
            "retriever": tools.kind,
            "made_with": dict(tools.made_with),
            "encoder": None if tools.encoder is None else tools.encoder.fingerprint,
            "deleted": deleted.tolist(),
            "stages": stages,
            "queries": queries,
        }
        with self.team.together():
            if self.team.rank == 0:
                _write_head(self.root, content)
        return RetrievalDatabase(self.root, content)

    # -- the head

    def _head(self) -> dict[str, Any] | None:
        return RetrievalDatabase.open(self.root).manifest if (self.root / HEAD).exists() else None

    def _existing_head(self) -> dict[str, Any]:
        head = RetrievalDatabase.open(self.root).manifest
        check_encoder(head, self.tools)
        return head

    def _carried(self, head: Mapping[str, Any], base: Stage) -> list[int]:
        """The documents of new chunks that were deleted from the generation whose place they take; says what is lost of it.

        Args:
            head: of that generation.
            base: the new chunks.

        Returns:
            Their numbers.

        Raises:
            ValueError: if it can no longer be told what was deleted, or nothing else is left.
        """
        before = {name: self._whole(self.root / name) for name in (head["stages"]["chunks"], head["base"])}
        current, first = before[head["stages"]["chunks"]], before[head["base"]]
        # The chunks that were built come first in all that were added to them, so that numbers of documents agree.
        names = ChunkTable(stage.folder).document_ids if (stage := current or first) else []
        known = [number for number in head["deleted"] if number < len(names)]
        if head["deleted"] and not known:
            raise ValueError(
                f"{len(head['deleted'])} documents were deleted from {self.root}, and their names are gone with its chunks: "
                f"delete {self.root / HEAD} to build it with all documents, and delete them again"
            )
        gone = {names[number] for number in known}
        deleted = [number for number, name in enumerate(ChunkTable(base.folder).document_ids) if name in gone]
        if len(deleted) == ChunkTable(base.folder).num_documents:
            raise ValueError(
                f"all {len(deleted)} documents were deleted from {self.root} before: expected others besides; delete "
                f"{self.root / HEAD} to have them back"
            )
        said = []
        if deleted:
            example = ChunkTable(base.folder).document_ids[deleted[0]]
            said.append(
                f"{len(deleted)} documents that were deleted from it stay so, such as {example!r} (delete {HEAD} before to "
                "have them back)"
            )
        if head["stages"]["chunks"] != head["base"]:
            said.append("what was added to it is not in it any more: add it again")
        if said and self.team.rank == 0:
            warnings.warn(f"{self.root} is built anew: {'; '.join(said)}", stacklevel=3)
        return deleted

    def _previous(self, head: Mapping[str, Any], *names: Literal["vectors", "index"]) -> Parts:
        """The chunks of a generation and those of its further stages that are asked for and whole; others are made again.

        Raises:
            ValueError: if the chunks are not whole.
        """
        folders = {name: self.root / folder for name, folder in head["stages"].items() if name in ("chunks", *names)}
        stages = {name: self._whole(folder) for name, folder in folders.items()}
        chunks = stages.pop("chunks")
        if chunks is None:
            raise ValueError(f"the chunks {folders['chunks']} are damaged or gone: build the database again")
        return Parts(chunks, **stages)

    def _whole(self, folder: Path) -> Stage | None:
        """A stage of a former generation; None where it is gone or damaged, which is announced."""
        whole = folder in self._seen
        with self.team.together():
            if self.team.rank == 0 and not whole:
                try:
                    whole = open_stage(folder).is_finished(verify=self.tools.verify > 0)
                except ValueError:  # it has no manifest
                    whole = False
        if not self.team.tell(whole):
            return None
        self._seen.add(folder)
        return open_stage(folder)

    def _query_stages(self, head: Mapping[str, Any]) -> dict[str, Stage]:
        return {name: open_stage(self.root / stages["chunks"]) for name, stages in head["queries"].items()}


def publish_head(root: Path, head: Mapping[str, Any], *, verify: bool) -> bool:
    """Make a former generation the current one again, if all that it names is there and whole; on all ranks together.

    Args:
        root: folder of the database.
        head: what its manifest was.
        verify: whether to compare files with their hashes.

    Returns:
        Whether it was.
    """
    names = [*head["stages"].values(), *(name for stages in head["queries"].values() for name in stages.values())]
    team, done = Team(), False
    try:
        with team.together():
            if team.rank == 0:
                try:
                    done = all(open_stage(root / name).is_finished(verify=verify) for name in names)
                except ValueError:  # one has no manifest
                    done = False
                if done:
                    _write_head(root, head)
        return team.tell(done)
    finally:
        team.close()


def _write_head(root: Path, head: Mapping[str, Any]) -> None:
    write_bytes(root / HEAD, (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode())


def open_parts(root: Path, head: Mapping[str, Any]) -> Parts:
    """The stages that a head names."""
    stages = {name: open_stage(root / folder) for name, folder in head["stages"].items() if name != "neighbors"}
    return Parts(**stages)


def check_encoder(head: Mapping[str, Any], tools: Tools) -> None:
    """Refuse to ask a database by another encoder than its own.

    Raises:
        ValueError: if they differ.
    """
    fingerprint = None if tools.encoder is None else tools.encoder.fingerprint
    if head["encoder"] != fingerprint:
        raise ValueError(
            f"the database was built with the encoder {head['encoder']}, this one is {fingerprint}: their vectors cannot be "
            "compared; use the encoder that it was built with, or build it again with this one"
        )


def make_searcher(parts: Parts, deleted: Ints, kind: Kind, decode: Decode, *, query_vectors: Stage | None = None) -> Searcher:
    """What searches the stages of a generation.

    Args:
        parts: the stages.
        deleted: numbers of documents that nobody may find.
        kind: of search.
        decode: text of token ids.
        query_vectors: of the chunks that will be looked for, if they have been encoded.
    """
    groups = group_of_chunks(ChunkTable(parts.chunks.folder), deleted)
    lexical = None if parts.lexical is None else LexicalSearcher(parts.lexical, groups, decode)
    if parts.index is None:
        assert lexical is not None
        return lexical
    manifest = parts.index.manifest()
    assert manifest is not None
    vectors = None if query_vectors is None else read_vectors(query_vectors)
    dense = DenseSearcher(open_index(parts.index), groups, effort=manifest["table"]["effort"], vectors=vectors)
    return dense if lexical is None or kind == "dense" else HybridSearcher(dense, lexical)


def make_retriever(root: Path, tools: Tools) -> DatabaseRetriever:
    """Live retrieval from a finished database.

    Args:
        root: its folder.
        tools: those it was built with.

    Raises:
        ValueError: if there is no finished database, or the encoder is another.
    """
    head = RetrievalDatabase.open(root).manifest
    check_encoder(head, tools)
    parts, deleted = open_parts(root, head), np.array(head["deleted"], dtype=np.int64)
    kind: Kind = head["retriever"]
    searcher = make_searcher(parts, deleted, kind, tools.decode)
    dense = None if tools.encoder is None else DenseQueries(tools.encoder)

    def queries(runs: Sequence[Any]) -> Any:
        if isinstance(searcher, HybridSearcher):
            assert dense is not None
            return dense(runs), searcher.lexical.terms(runs)
        return searcher.terms(runs) if isinstance(searcher, LexicalSearcher) else dense(runs)  # type: ignore[misc]  # one is there

    return DatabaseRetriever(ChunkTable(parts.chunks.folder), searcher, queries, deleted=deleted)
