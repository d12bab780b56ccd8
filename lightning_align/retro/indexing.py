"""Retrieval databases from what users write: paths, names of tokenizers, checkpoints, encoders."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_align.data.documents import DocumentSource, DocumentTokenizer, load_documents
from lightning_align.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.language_model import vocabulary_size
from lightning_align.models.weights import weights_hash
from lightning_align.retrieval.build import Builder, Kind, Tools, make_retriever
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, LMEncoder, SentenceEncoder
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.search import Retriever

WEIGHTS = (".ckpt", ".pt", ".safetensors")
"""How files end that hold a language model."""
BM25 = "bm25"


def build_database(
    folder: str | Path,
    documents: str | DocumentSource,
    *,
    encoder: str | Encoder,
    queries: Mapping[str, str | DocumentSource] | None = None,
    tokenizer: str | Tokenizer = "bytes",
    chunk_size: int = 64,
    k: int = 8,
    rerank: bool = False,
    index: IndexConfig | None = None,
    hide_copies: bool = True,
    verify: float = 0.01,
    trainer: Callable[[], L.Trainer] | None = None,
) -> RetrievalDatabase:
    """Build a retrieval database, or what is missing of it.

    It may be killed at any moment and goes on where it was; equal inputs give equal bytes, on any number of ranks. Documents
    that were deleted stay so, whatever is built in the same folder; those that were added do while the documents, the tokenizer
    and the size of chunks are the same, and have to be added again otherwise.

    Args:
        folder: of the database.
        documents: what can be retrieved: a folder of text files, a file of rows with a field ``text``, or a source.
        encoder: what chunks are found by: a checkpoint of a language model (.ckpt, .pt, .safetensors), the name of a
            sentence-transformers model, bm25, or an encoder.
        queries: documents that are not in the database and whose neighbors are wanted, such as ``{"validation": ...}``.
        tokenizer: as of the data modules.
        chunk_size: tokens a chunk.
        k: neighbors of each chunk.
        rerank: whether BM25 has the last word on what the encoder finds.
        index: how vectors are indexed.
        hide_copies: whether the documents of `queries` may not find near-duplicates of themselves; false shows what a leak
            fakes. Documents of the database never do.
        verify: share of the blocks of each stage that are made twice and compared.
        trainer: makes the Trainer that runs the encoder; by default one on this machine's best device.

    Raises:
        ValueError: if anything that was given cannot be used; what is finished by then is kept.
    """
    tools = make_tools(
        encoder,
        tokenizer=tokenizer,
        k=k,
        rerank=rerank,
        index=index or IndexConfig(),
        hide_copies=hide_copies,
        verify=verify,
        trainer=trainer,
    )
    sources = {name: load_documents(source) for name, source in (queries or {}).items()}
    # Loaders draw from torch's generator; what is trained afterwards must not depend on whether the database was there.
    with isolate_rng(include_cuda=False), Builder(Path(folder), tools) as builder:
        return builder.build(load_documents(documents), sources, chunk_size=chunk_size)


def add_documents(folder: str | Path, documents: str | DocumentSource, *, encoder: Encoder | None = None) -> RetrievalDatabase:
    """Add documents to a database: only they are encoded, and nothing is trained again.

    Args:
        folder: of the database.
        documents: as of `build_database`, with names that the database does not have.
        encoder: where the database was built with an object, an equal one.

    Raises:
        ValueError: if a name is there already, or the encoder is not the database's.
    """
    with isolate_rng(include_cuda=False), Builder(Path(folder), _tools_of(folder, encoder)) as builder:
        return builder.add(load_documents(documents))


def delete_documents(folder: str | Path, names: Sequence[str], *, encoder: Encoder | None = None) -> RetrievalDatabase:
    """Delete documents from a database: nothing finds them any more.

    Args:
        folder: of the database.
        names: their ids.
        encoder: where the database was built with an object, an equal one.

    Raises:
        ValueError: if there is no such document, or the encoder is not the database's.
    """
    with isolate_rng(include_cuda=False), Builder(Path(folder), _tools_of(folder, encoder)) as builder:
        return builder.delete(names)


def open_retriever(folder: str | Path, *, encoder: Encoder | None = None) -> Retriever:
    """Live retrieval from a finished database, for the main process.

    Args:
        folder: of the database.
        encoder: where the database was built with an object, an equal one; else it is loaded again.

    Raises:
        ValueError: if there is no finished database, or the encoder is another than it was built with.
    """
    return make_retriever(Path(folder), _tools_of(folder, encoder))


def make_tools(
    encoder: str | Encoder,
    *,
    tokenizer: str | Tokenizer,
    k: int,
    rerank: bool,
    index: IndexConfig,
    hide_copies: bool,
    verify: float,
    trainer: Callable[[], L.Trainer] | None = None,
) -> Tools:
    """What a database is built with; see `build_database` for the arguments."""
    if not 0 <= verify <= 1:
        raise ValueError(f"verify is {verify}, expected a share from 0 to 1")
    if rerank and encoder == BM25:
        raise ValueError("rerank needs an encoder whose finds BM25 ranks again; bm25 alone is a retriever already")
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    kind: Kind = "bm25" if encoder == BM25 else "hybrid" if rerank else "dense"
    return Tools(
        kind=kind,
        tokenizer=DocumentTokenizer(loaded),
        decode=loaded.decode,
        encoder=_load_encoder(encoder, loaded) if isinstance(encoder, str) else encoder,
        made_with={
            "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
            "encoder": encoder if isinstance(encoder, str) else None,
            "k": k,
            "index": dataclasses.asdict(index),
            "hide_copies": hide_copies,
        },
        trainer=trainer or local_trainer,
        k=k,
        index=index,
        verify=verify,
        hide_copies=hide_copies,
    )


def local_trainer() -> L.Trainer:
    """A Trainer that does nothing but predict, on one device of this machine."""
    return quiet_trainer(devices=1)


def quiet_trainer(**arguments: Any) -> L.Trainer:
    """A Trainer that does nothing but predict.

    Args:
        **arguments: of the Trainer: its devices, its precision.
    """
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = messages.level
    messages.setLevel(logging.WARNING)  # which devices there are, the Trainer of the run has said already
    try:
        return L.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **arguments,
        )
    finally:
        messages.setLevel(level)


def _load_encoder(name: str, tokenizer: Tokenizer) -> Encoder | None:
    if name == BM25:
        return None
    if not name.endswith(WEIGHTS):
        return SentenceEncoder(name, decode=tokenizer.decode)
    model = load_policy(name).requires_grad_(False).eval()
    if (size := vocabulary_size(model)) is not None:
        check_vocabulary(tokenizer, num_tokens=size)
    return LMEncoder(model, fingerprint=weights_hash(model))


def _tools_of(folder: str | Path, encoder: Encoder | None) -> Tools:
    """The tools that a database says it was built with."""
    head = RetrievalDatabase.open(folder).manifest
    made_with = head["made_with"]
    for what in ("tokenizer", *(() if head["retriever"] == "bm25" or encoder is not None else ("encoder",))):
        if made_with[what] is None:
            raise ValueError(f"{folder} was built with {what} as an object, which cannot be found again: give an equal {what}")
    return make_tools(
        encoder or made_with["encoder"],
        tokenizer=made_with["tokenizer"],
        k=made_with["k"],
        rerank=head["retriever"] == "hybrid",
        index=IndexConfig(**made_with["index"]),
        hide_copies=made_with["hide_copies"],
        verify=0.01,
    )
