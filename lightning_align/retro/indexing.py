"""Functions that build, edit and open a retrieval database from user input: paths, tokenizer names and encoder names."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_align.data.documents import DocumentSource, DocumentTokenizer, load_documents
from lightning_align.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.language_model import vocabulary_size
from lightning_align.models.weights import weights_hash
from lightning_align.retrieval.build import Builder, Kind, Tools, make_retriever
from lightning_align.retrieval.database import HEAD, RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, LMEncoder, SentenceEncoder
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.search import Retriever
from lightning_align.retrieval.words import WordsConfig
from lightning_align.retro.own_tokenizer import database_tokenizer, keep_tokenizer

WEIGHTS = (".ckpt", ".pt", ".safetensors")
"""The file suffixes of language model checkpoints."""
BM25 = "bm25"
"""The encoder name that selects BM25."""


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
    words: WordsConfig | None = None,
    hide_copies: bool = True,
    verify: float = 0.01,
    max_chunks: int | None = None,
    rebuild: bool = False,
    precision: str | None = None,
    trainer: Callable[[], L.Trainer] | None = None,
) -> RetrievalDatabase:
    """Build a retrieval database, or its missing stages.

    The build can be stopped at any time and resumed. Equal inputs give equal bytes on any number of ranks. Deleted documents
    stay deleted in later builds in the same folder. Added documents stay as long as the documents, the tokenizer and the chunk
    size are the same. Otherwise, add them again.

    Args:
        folder: The folder of the database.
        documents: The documents that can be retrieved: a folder of text files, a file of rows with a field ``text``, or a
            source.
        encoder: The encoder that retrieves the neighbors: a checkpoint of a language model (.ckpt, .pt, .safetensors), the name
            of a sentence-transformers model, bm25, or an encoder object.
        queries: Further documents that are not in the database but need neighbors, by name, such as ``{"validation": ...}``.
        tokenizer: The tokenizer, in the same form as in the data modules.
        chunk_size: The number of tokens per chunk.
        k: The number of neighbors per chunk.
        rerank: Whether BM25 reranks the neighbors that the encoder finds.
        index: How the vectors are indexed. Default is `IndexConfig()`.
        words: How BM25 finds the terms of a text: language, stop words, stemming, scripts without spaces. Default is
            `WordsConfig()`, for any language.
        hide_copies: Whether near-duplicates of a document of `queries` are excluded from its neighbors. False shows the effect
            of a leak. For documents of the database they are always excluded.
        verify: The share of the blocks of each stage that are computed twice and compared.
        max_chunks: The most chunks that `documents` may have. With more, the build ends before anything is encoded. Default is
            any number.
        rebuild: Whether vectors, index and neighbors are made again, also if they are finished. The database cannot be opened
            until the build is finished. Chunks are not made again, because they are found by the hash of their text.
        precision: The precision of the encoder, as the Trainer names it, such as bf16-true, which is faster on processors with
            AMX. The database keeps it: queries and added documents are encoded in it. Default is 32-true.
        trainer: A function that makes the Trainer that runs the encoder. Default is a Trainer on one device of this machine.

    Returns:
        The finished database.

    Raises:
        ValueError: If an argument is invalid. Stages that were finished before the error are kept.
    """
    if precision is not None and trainer is not None:
        raise ValueError(
            f"`precision` must be that of the Trainer if `trainer` is given, but got {precision!r}. Pass it to the Trainer that"
            " the function makes."
        )
    tools = make_tools(
        encoder,
        tokenizer=tokenizer,
        k=k,
        rerank=rerank,
        index=index or IndexConfig(),
        words=words or WordsConfig(),
        hide_copies=hide_copies,
        verify=verify,
        trainer=trainer or partial(quiet_trainer, devices=1, precision=precision),
    )
    _check_count("chunk_size", chunk_size)
    if "" in (queries or {}):
        raise ValueError("`queries` must have a name for each set, such as validation, but one has an empty name.")
    sources = {name: load_documents(source) for name, source in (queries or {}).items()}
    # Data loaders draw from the global generator of torch. Later training must not depend on whether the database existed.
    with isolate_rng(include_cuda=False), Builder(Path(folder), tools) as builder:
        return builder.build(load_documents(documents), sources, chunk_size=chunk_size, max_chunks=max_chunks, rebuild=rebuild)


def add_documents(
    folder: str | Path,
    documents: str | DocumentSource,
    *,
    encoder: str | Encoder | None = None,
    tokenizer: str | Tokenizer | None = None,
) -> RetrievalDatabase:
    """Add documents to a database. Only the new documents are encoded, and the index is not trained again.

    Args:
        folder: The folder of the database.
        documents: The documents, in the same form as in `build_database`. Their names must not be in the database.
        encoder: The encoder of the build, or where it is now. Default is to load it by the name that the build was given.
        tokenizer: The tokenizer of the build. Default is the copy that the database holds.

    Returns:
        The database with the new documents.

    Raises:
        ValueError: If a name is already in the database, or if the encoder is not that of the database.
    """
    with isolate_rng(include_cuda=False), Builder(Path(folder), _tools_of(folder, encoder, tokenizer)) as builder:
        return builder.add(load_documents(documents))


def delete_documents(
    folder: str | Path,
    names: Sequence[str],
    *,
    encoder: str | Encoder | None = None,
    tokenizer: str | Tokenizer | None = None,
    compact_above: float = 0.5,
) -> RetrievalDatabase:
    """Delete documents from a database. They are not retrieved from then on.

    Their text stays on disk until `compact_database` removes it.

    Args:
        folder: The folder of the database.
        names: The ids of the documents.
        encoder: The encoder of the build, or where it is now. Default is to load it by the name that the build was given.
        tokenizer: The tokenizer of the build. Default is the copy that the database holds.
        compact_above: The share of deleted chunks above which the database is compacted at once; see `compact_database`.

    Returns:
        The database without the documents.

    Raises:
        ValueError: If there is no such document, or if the encoder is not that of the database.
    """
    if isinstance(names, str):
        raise ValueError(f"`names` must be a list of names of documents, but got {names!r}. Write [{names!r}].")
    if not 0 <= compact_above <= 1:
        raise ValueError(f"`compact_above` must be a share of chunks from 0 to 1, but got {compact_above}. 1 never compacts.")
    with isolate_rng(include_cuda=False), Builder(Path(folder), _tools_of(folder, encoder, tokenizer)) as builder:
        database = builder.delete(names)
        sizes = np.diff(database.chunks.chunk_offsets)
        share = sizes[database.manifest["deleted"]].sum() / sizes.sum()
        return builder.compact() if share > compact_above else database


def compact_database(
    folder: str | Path, *, encoder: str | Encoder | None = None, tokenizer: str | Tokenizer | None = None
) -> RetrievalDatabase:
    """Remove the text of deleted documents, and all former generations, from the disk.

    The kept documents get a new index and new neighbors. Their vectors are copied, not computed again. The call can be stopped
    at any time and repeated. Open databases and retrievers of the former generation must be opened again. Later builds of the
    same documents leave the deleted ones out.

    Args:
        folder: The folder of the database.
        encoder: See `open_retriever`.
        tokenizer: See `open_retriever`.

    Returns:
        The database.

    Raises:
        ValueError: If there is no finished database, or the encoder or the tokenizer is not that of the database.
    """
    with isolate_rng(include_cuda=False), Builder(Path(folder), _tools_of(folder, encoder, tokenizer)) as builder:
        return builder.compact()


def open_retriever(
    folder: str | Path,
    *,
    encoder: str | Encoder | None = None,
    tokenizer: str | Tokenizer | None = None,
    device: torch.device | None = None,
) -> Retriever:
    """Open a finished database for live retrieval, in the main process.

    Args:
        folder: The folder of the database.
        encoder: The encoder of the build, or where it is now. Default is to load it by the name that the build was given.
        tokenizer: The tokenizer of the build. Default is the copy that the database holds.
        device: The device to encode queries and to compare vectors on, in the precision of the stored vectors. Default is to
            encode where the encoder is, and to compare on the CPU.

    Returns:
        The retriever.

    Raises:
        ValueError: If there is no finished database, or if the encoder is not that of the database.
    """
    tools = _tools_of(folder, encoder, tokenizer)
    if device is not None and isinstance(tools.encoder, nn.Module):
        tools.encoder.to(device)  # a borrowed model stays where it is
    return make_retriever(Path(folder), tools, device=device)


def make_tools(
    encoder: str | Encoder,
    *,
    tokenizer: str | Tokenizer,
    k: int,
    rerank: bool,
    index: IndexConfig,
    words: WordsConfig,
    hide_copies: bool,
    verify: float,
    trainer: Callable[[], L.Trainer] | None = None,
) -> Tools:
    """Collect the tools to build a database. See `build_database` for the arguments."""
    if not 0 <= verify <= 1:
        raise ValueError(f"`verify` must be a share from 0 to 1, but got {verify}.")
    _check_count("k", k)
    if isinstance(encoder, str) and encoder != BM25 and encoder.strip().lower() in ("", BM25):
        raise ValueError(
            f"`encoder` must be {BM25}, a checkpoint or the name of a sentence-transformers model, but got {encoder!r}."
        )
    if not isinstance(encoder, str) and not hasattr(encoder, "fingerprint"):
        raise ValueError(
            f"`encoder` must have a `fingerprint`, which changes with everything that its vectors depend on, but"
            f" {type(encoder).__name__} has none."
        )
    if rerank and encoder == BM25:
        raise ValueError(
            "`rerank` needs an `encoder` other than bm25, because BM25 cannot rerank its own results. Set `rerank` to false."
        )
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    kind: Kind = "bm25" if encoder == BM25 else "hybrid" if rerank else "dense"
    return Tools(
        kind=kind,
        tokenizer=DocumentTokenizer(loaded),
        decode=loaded.decode,
        keep_tokenizer=partial(keep_tokenizer, tokenizer=loaded),
        encoder=_load_encoder(encoder, loaded) if isinstance(encoder, str) else encoder,
        made_with={
            "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
            "encoder": encoder if isinstance(encoder, str) else None,
            "k": k,
            "index": dataclasses.asdict(index),
            "words": dataclasses.asdict(words),
            "hide_copies": hide_copies,
        },
        trainer=trainer or local_trainer,
        k=k,
        index=index,
        words=words,
        verify=verify,
        hide_copies=hide_copies,
    )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, but got {value!r}.")


def local_trainer() -> L.Trainer:
    """Make a Trainer that only predicts, on one device of this machine."""
    return quiet_trainer(devices=1)


def quiet_trainer(**arguments: Any) -> L.Trainer:
    """Make a Trainer that only predicts.

    Args:
        **arguments: Further arguments of the Trainer, such as its devices and its precision.
    """
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = messages.level
    messages.setLevel(logging.WARNING)  # the Trainer of the run has already reported the devices
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


def _tools_of(folder: str | Path, encoder: str | Encoder | None = None, tokenizer: str | Tokenizer | None = None) -> Tools:
    """Collect the tools that a database was built with, according to its manifest."""
    database = RetrievalDatabase.open(folder)
    head = database.manifest
    made_with = head["made_with"]
    if encoder is None and head["retriever"] != "bm25" and made_with["encoder"] is None:
        raise ValueError(
            f"{folder} was built with an object as the encoder, which cannot be loaded again. Pass an equal one as `encoder`."
        )
    try:
        index = IndexConfig(**made_with["index"])
        words = WordsConfig(**made_with.get("words", {}))  # not in databases of release 0.1.0
        _check_count("k", made_with["k"])
    except (TypeError, ValueError) as error:  # an unknown setting, or a value that cannot be
        raise ValueError(
            f"{Path(folder) / HEAD} has settings that this version does not know ({error}). Use the version that built it, or "
            "build it again."
        ) from error
    tools = make_tools(
        encoder or made_with["encoder"],
        tokenizer=database_tokenizer(database, tokenizer),
        k=made_with["k"],
        rerank=head["retriever"] == "hybrid",
        index=index,
        words=words,
        hide_copies=bool(made_with.get("hide_copies", True)),
        verify=0.01,
    )
    # A generation that follows is made with the same settings, wherever its tokenizer and its encoder are now.
    return dataclasses.replace(tools, made_with=made_with)
