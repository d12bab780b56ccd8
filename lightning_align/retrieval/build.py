"""Builds a database stage by stage, adds documents to it and deletes documents from it."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from lightning_align.retrieval.access import is_read_only, one_build
from lightning_align.retrieval.chunks import DocumentSource, append_chunks, build_chunks, check_count
from lightning_align.retrieval.compaction import forget_stages, keep_documents, keep_vectors, remove_unused
from lightning_align.retrieval.database import HEAD, RetrievalDatabase
from lightning_align.retrieval.device_search import search_device
from lightning_align.retrieval.encoders import build_vectors
from lightning_align.retrieval.generation import Parts, open_parts, publish_head, read_head, write_head
from lightning_align.retrieval.index import append_index, build_index
from lightning_align.retrieval.lexical import build_lexical
from lightning_align.retrieval.neighbors import build_neighbors, check_k, warn_of_chunks_alone
from lightning_align.retrieval.searchers import make_retriever, make_searcher
from lightning_align.retrieval.sources import stamps, stamps_apart, warn_of_changes
from lightning_align.retrieval.stages import Stage, Team, open_stage
from lightning_align.retrieval.tables import ChunkTable, Neighbors
from lightning_align.retrieval.tools import Kind, Tools, check_encoder
from lightning_align.runtime.stopping import ends_at_sigterm

__all__ = [
    "Builder",
    "Kind",
    "Parts",
    "Tools",
    "check_encoder",
    "make_retriever",
    "make_searcher",
    "open_parts",
    "publish_head",
]


class Builder:
    """Builds a database, or the stages of it that are missing. Create it and call it on all ranks together.

    Args:
        root: Folder of the database.
        tools: What to build it with.
    """

    def __init__(self, root: Path, tools: Tools) -> None:
        self.root, self.tools, self.team = root, tools, Team()
        self._shared: dict[str, Any] = {"team": self.team, "verify": tools.verify}
        self._encoder_key = tools.encoder_key
        self._precision: str | None = None
        """The precision of all vectors. None if there are none yet, and no encoder is needed."""
        self._held = ExitStack()
        self._verified: set[Path] = set()
        """Folders of stages that were found intact. No stage is compared with its hashes twice."""

    def __enter__(self) -> Self:
        """Wait until no other process builds the database."""
        with ExitStack() as held:  # released at once if the lock cannot be had
            held.enter_context(ends_at_sigterm(f"Repeat the command to go on: {self.root} keeps all finished blocks."))
            held.callback(self.team.close)
            with self.team.together():
                held.enter_context(one_build(self.root, self.team))
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    # -- public operations

    def build(
        self,
        source: DocumentSource,
        queries: Mapping[str, DocumentSource],
        *,
        chunk_size: int,
        max_chunks: int | None = None,
        rebuild: bool = False,
    ) -> RetrievalDatabase:
        """Build the database of the given documents, and keep earlier additions and deletions.

        If the documents, the chunk size or the tokenizer changed since the last build, deletions are kept by document name.
        Added documents are lost in this case and must be added again. A warning says so.

        Args:
            source: The documents that can be neighbors.
            queries: Further documents to find neighbors for: a source per name, such as ``validation``.
            chunk_size: Tokens per chunk (m).
            max_chunks: See `build_database`.
            rebuild: See `build_database`.

        Raises:
            ValueError: If an argument cannot be used. Stages that are finished by then are kept.
        """
        before = stamps_apart({"": source, **queries}, self.root)
        if self.tools.encoder is not None:
            self._precision = str(self.tools.trainer().precision)
        head = self._head()
        lost = head is not None and self._intact_stage(self.root / head["stages"]["chunks"]) is None
        # A compacted database has no use for the chunks that it was built from, which contain deleted documents.
        kept = head["base"] if head is not None and head.get("compacted") and not lost else None
        base = self._chunks(source, chunk_size, kept=kept)
        if max_chunks is not None and base.folder.name != kept:
            check_count(base, max_chunks)
        with self.team.together():
            if rebuild and self.team.rank == 0:
                forget_stages(self.root)
        if head is None or head["base"] != base.folder.name or lost:
            deleted = [] if head is None else self._carry_deletions(head, base)
            head = {"base": base.folder.name, "generation": 0, "deleted": deleted, "stages": {"chunks": base.folder.name}}
        # Vectors are not listed here: vectors of the same chunks have the same key, so `build_vectors` finds and verifies them.
        same = head.get("made_with", {}).get("index") == self.tools.made_with.get("index")
        previous = self._previous(head, "index") if same else self._previous(head)
        parts = self._parts(previous.chunks, previous=previous)
        sets = {
            name: build_chunks(self.root, documents, self.tools.tokenizer, chunk_size=chunk_size, **self._shared)
            for name, documents in queries.items()
        }
        built = self._finish(head, parts, sets)
        for name, each in {"": source, **queries}.items():
            warn_of_changes(before[name], each, self.root, self.team)
        return built

    def add(self, source: DocumentSource) -> RetrievalDatabase:
        """Add documents. Only the new documents are encoded, and the index is not trained again.

        Args:
            source: The documents to add. Their names must be new to the database, or names of deleted documents.

        Raises:
            ValueError: If the database already has a document with one of the names.
        """
        head = self._existing_head()
        previous = self._previous(head, "vectors", "index")
        before = ChunkTable(previous.chunks.folder)
        stamped = stamps(source)
        added = self._chunks(source, before.chunk_size)
        warn_of_changes(stamped, source, self.root, self.team)
        chunks = append_chunks(self.root, previous.chunks, added, deleted=head["deleted"], team=self.team)
        names = set(ChunkTable(added.folder).document_ids)
        removed = [name for name in head.get("removed", ()) if name not in names]
        return self._finish(
            {**head, "generation": head["generation"] + 1, "removed": removed},
            self._parts(chunks, previous=previous),
            self._query_stages(head),
        )

    def delete(self, names: Sequence[str]) -> RetrievalDatabase:
        """Delete documents. No search finds them from now on.

        Args:
            names: Names of the documents.

        Raises:
            ValueError: If the database has no such document, or no document would be left.
        """
        head = self._existing_head()
        previous = self._previous(head, "index")
        table = ChunkTable(previous.chunks.folder)
        deleted = set(head["deleted"])
        number_of = {name: number for number, name in enumerate(table.document_ids) if number not in deleted}
        if missing := [name for name in names if name not in number_of]:
            raise ValueError(
                f"`names` must name documents of the database {self.root}, but it has no document {missing[0]!r}. "
                "Its `chunks.document_ids` lists the documents."
            )
        deleted |= {number_of[name] for name in names}
        if len(deleted) == table.num_documents:
            raise ValueError(
                f"`names` must leave at least one document, but deleting {len(names)} documents would leave none. "
                f"To remove the database, delete the folder {self.root}."
            )
        return self._finish(
            {**head, "generation": head["generation"] + 1, "deleted": sorted(deleted)},
            self._parts(previous.chunks, previous=previous),
            self._query_stages(head),
        )

    def compact(self) -> RetrievalDatabase:
        """Remove the text of deleted documents and the stages of former generations from disk.

        The kept documents are copied to new stages, which are published before the former ones are removed. So it can be
        stopped at any time. Nothing is encoded again. A former generation cannot be restored afterwards.

        Raises:
            ValueError: If there is no finished database, or the disk is full.
        """
        head = self._existing_head()
        current, deleted = RetrievalDatabase(self.root, head), set(head["deleted"])
        previous = self._previous(head, "vectors", "index")
        if deleted:
            names = ChunkTable(previous.chunks.folder).document_ids
            removed = sorted({*head.get("removed", ()), *(names[number] for number in deleted)})
            chunks = keep_documents(self.root, previous.chunks, deleted=deleted, team=self.team)
            if previous.vectors is not None:
                keep_vectors(self.root, previous.vectors, chunks, all_chunks=previous.chunks, deleted=deleted, team=self.team)
            head = {**head, "generation": head["generation"] + 1, "deleted": [], "compacted": True, "removed": removed}
            current = self._finish(head, self._parts(chunks, previous=Parts(chunks)), self._query_stages(head))
        with self.team.together():
            if self.team.rank == 0:
                if not current.manifest.get("compacted"):
                    current = RetrievalDatabase(self.root, {**current.manifest, "compacted": True})
                    write_head(self.root, current.manifest)
                remove_unused(self.root, current.manifest)
        return RetrievalDatabase.open(self.root)

    # -- stages

    def _chunks(self, source: DocumentSource, chunk_size: int, *, kept: str | None = None) -> Stage:
        """Build the chunks that can be neighbors."""
        chunks = build_chunks(
            self.root,
            source,
            self.tools.tokenizer,
            chunk_size=chunk_size,
            byte_counts=False,
            kept=kept,
            **self._shared,
        )
        if chunks.folder.name != kept:
            self._verified.add(chunks.folder)
        return chunks

    def _parts(self, chunks: Stage, *, previous: Parts) -> Parts:
        """Build all stages that a search over the chunks needs. Stages of the previous generation are reused where they fit."""
        tools = self.tools
        check_k(tools.k, ChunkTable(chunks.folder))  # before hours of encoding
        vectors = index = lexical = None
        if tools.encoder is not None:
            vectors = self._vectors(chunks, previous=previous.vectors)
            if previous.index is not None and previous.index.inputs["vectors"] == vectors.key:
                index = previous.index
            elif previous.index is not None and previous.vectors is not None:
                alike = all(previous.vectors.inputs.get(n) == vectors.inputs[n] for n in ("encoder", "precision"))
                if alike and chunks.inputs.get("base") == previous.chunks.key:
                    index = append_index(self.root, previous.index, previous.vectors, vectors, **self._shared)
            index = index or build_index(self.root, vectors, tools.index, **self._shared)
        if tools.kind != "dense":
            lexical = build_lexical(self.root, chunks, tools.decode, words=tools.words, **self._shared)
        return Parts(chunks, vectors, index, lexical)

    def _vectors(self, chunks: Stage, *, previous: Stage | None = None) -> Stage:
        assert self.tools.encoder is not None
        return build_vectors(
            self.root,
            chunks,
            self.tools.encoder,
            trainer=self.tools.trainer,
            previous=previous,
            key=self._encoder_key,
            precision=self._precision,
            **self._shared,
        )

    def _finish(self, head: Mapping[str, Any], parts: Parts, sets: Mapping[str, Stage]) -> RetrievalDatabase:
        """Find all neighbors, then publish the head."""
        tools, deleted = self.tools, np.array(head["deleted"], dtype=np.int64)
        inputs = {"kind": tools.kind} | {
            name: stage.key for name, stage in (("index", parts.index), ("lexical", parts.lexical)) if stage is not None
        }
        device = None if tools.encoder is None else search_device(tools.trainer, self.team)
        table = ChunkTable(parts.chunks.folder)

        def neighbors(chunks: Stage, vectors: Stage | None, *, what: str = "database", hide_copies: bool | None = None) -> str:
            searcher = make_searcher(parts, deleted, tools.kind, tools.decode, query_vectors=vectors, device=device)
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
            # With query sets, the database's own documents may have no use for neighbors. Who trains on them asks again.
            if self.team.rank == 0 and not (sets and hide_copies is None):
                own = ChunkTable(chunks.folder)
                warn_of_chunks_alone(Neighbors(stage.folder), own, table, tools.kind, what=f"{self.root}, {what}")
            return stage.folder.name

        stages = {name: stage.folder.name for name, stage in vars(parts).items() if stage is not None}
        stages["neighbors"], queries = neighbors(parts.chunks, parts.vectors), {}
        for name, chunks in sets.items():
            vectors = None if tools.encoder is None else self._vectors(chunks)
            found = neighbors(chunks, vectors, what=f"query set {name}", hide_copies=tools.hide_copies)
            queries[name] = {"chunks": chunks.folder.name, "neighbors": found}
        content = {
            "base": head["base"],
            "generation": head["generation"],
            "retriever": tools.kind,
            "made_with": dict(tools.made_with),
            "encoder": self._encoder_key,
            "deleted": deleted.tolist(),
            "stages": stages,
            "queries": queries,
        }
        content |= {name: head[name] for name in ("compacted", "removed") if head.get(name)}
        with self.team.together():
            if self.team.rank == 0:
                if tools.keep_tokenizer is not None and (own := tools.keep_tokenizer(self.root)) is not None:
                    content["tokenizer"] = own
                now = read_head(self.root)
                if now is not None and is_read_only(self.root) and all(content.get(name) == now[name] for name in now):
                    content = now  # of an earlier version, which lists less
                write_head(self.root, content)
        return RetrievalDatabase(self.root, self.team.share(content))

    # -- the head

    def _head(self) -> dict[str, Any] | None:
        return RetrievalDatabase.open(self.root).manifest if (self.root / HEAD).exists() else None

    def _existing_head(self) -> dict[str, Any]:
        head = RetrievalDatabase.open(self.root).manifest
        check_encoder(head, self.tools)
        if "vectors" in head["stages"]:  # vectors of later additions are compared with those of the build
            with suppress(ValueError):  # damaged vectors are made again
                self._precision = (
                    open_stage(self.root / head["stages"]["vectors"]).setting("precision", str, default="") or None
                )
        return head

    def _carry_deletions(self, head: Mapping[str, Any], base: Stage) -> list[int]:
        """Find the deleted documents of the previous generation among new chunks, and warn about what the rebuild changes.

        Args:
            head: The head of the previous generation.
            base: The new chunks, which replace it.

        Returns:
            The numbers of the deleted documents in the new chunks.

        Raises:
            ValueError: If the names of the deleted documents are lost, or no other document is left.
        """
        before = {name: self._intact_stage(self.root / name) for name in (head["stages"]["chunks"], head["base"])}
        current, first = before[head["stages"]["chunks"]], before[head["base"]]
        # Added chunks come after the chunks of the build, so the document numbers of both stages agree.
        names = ChunkTable(stage.folder).document_ids if (stage := current or first) else []
        known = [number for number in head["deleted"] if number < len(names)]
        if head["deleted"] and not known:
            raise ValueError(
                f"{len(head['deleted'])} documents were deleted from {self.root}, but their names were lost with its chunks. "
                f"Delete {self.root / HEAD} to build the database with all documents, then delete the documents again."
            )
        deleted_names = {*(names[number] for number in known), *head.get("removed", ())}
        deleted = [number for number, name in enumerate(ChunkTable(base.folder).document_ids) if name in deleted_names]
        if len(deleted) == ChunkTable(base.folder).num_documents:
            raise ValueError(
                f"`source` must have a document that was not deleted from {self.root} before, but all {len(deleted)} documents "
                f"were. Delete {self.root / HEAD} to restore them."
            )
        changes = []
        if deleted:
            example = ChunkTable(base.folder).document_ids[deleted[0]]
            changes.append(
                f"{len(deleted)} documents that were deleted from it stay deleted, such as {example!r} (to restore them, "
                f"delete {HEAD} before the build)."
            )
        if head["stages"]["chunks"] != head["base"]:
            changes.append("Documents that were added to it are no longer in it. Add them again.")
        if changes and self.team.rank == 0:
            warnings.warn(f"{self.root} is rebuilt from scratch. {' '.join(changes)}", stacklevel=3)
        return deleted

    def _previous(self, head: Mapping[str, Any], *names: Literal["vectors", "index"]) -> Parts:
        """Open the chunks of a generation, and those of the named stages that are intact. The others will be rebuilt.

        Raises:
            ValueError: If the chunks are damaged or missing.
        """
        folders = {name: self.root / folder for name, folder in head["stages"].items() if name in ("chunks", *names)}
        stages = {name: self._intact_stage(folder) for name, folder in folders.items()}
        chunks = stages.pop("chunks")
        if chunks is None:
            raise ValueError(f"The chunks {folders['chunks']} are damaged or missing. Build the database again.")
        return Parts(chunks, **stages)

    def _intact_stage(self, folder: Path) -> Stage | None:
        """Open a stage of a former generation. Return None if it is missing, or damaged, which is warned about."""
        intact = folder in self._verified
        with self.team.together():
            if self.team.rank == 0 and not intact:
                try:
                    intact = open_stage(folder).is_finished(verify=self.tools.verify > 0)
                except ValueError:  # it has no manifest
                    intact = False
        if not self.team.share(intact):
            return None
        self._verified.add(folder)
        return open_stage(folder)

    def _query_stages(self, head: Mapping[str, Any]) -> dict[str, Stage]:
        return {name: open_stage(self.root / stages["chunks"]) for name, stages in head["queries"].items()}
