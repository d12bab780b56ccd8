"""Stage 2: encoders convert chunks to vectors. Chunks of similar content should have vectors that are close to each other."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_align.retrieval.identity import identity
from lightning_align.retrieval.stages import Stage, Team, write_rows
from lightning_align.retrieval.tables import ChunkTable, Floats, Ints
from lightning_align.runtime.modes import evaluating

FORMAT = 2
"""Version of the file format. Increase it when the same settings lead to other bytes."""
BLOCK_CHUNKS = 2048
"""Chunks per block. A block is encoded at once. A killed build loses only the blocks in progress."""

IDLE = -1
"""Block number of a work item without work."""


SAMPLED = 1024
"""Chunks that are tokenized to learn how many an encoder truncates."""
COMPARED = 8
"""Chunks that are encoded again before the vectors of an earlier run are used."""
TOLERANCE = 0.05
"""The largest relative difference of vectors of one encoder on two kinds of processors. bf16 accounts for 0.02."""


class Truncation(NamedTuple):
    """How much of some chunks an encoder does not read."""

    limit: int
    """The number of its tokens that the encoder reads."""
    num_cut: int
    """The number of chunks that are longer."""
    longest: int
    """The tokens of the longest chunk."""
    share: float
    """The fraction of all tokens that are not read."""


class Encoder(Protocol):
    """Converts chunks to vectors, which are compared by Euclidean distance.

    If an encoder is an ``nn.Module``, the Trainer moves it to its device. An encoder that does not read long chunks to their
    end should have a method ``truncation(chunks) -> Truncation``, which is found by name.
    """

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the vectors depend on. A few chunks are encoded again to check that it is."""
        ...

    def encode(self, chunks: Sequence[ArrayLike]) -> Floats:
        """Encode chunks.

        Args:
            chunks: n sequences of token ids, unpadded, of any lengths.

        Returns:
            (n, d) float32.
        """
        ...


class LMEncoder(nn.Module):
    """Encoder that averages the final hidden states of a frozen language model over a chunk.

    It needs no separate embedding model. Vectors are not normalized. All hidden states of a model share an offset, which
    changes the angles between vectors but not their distances.
    """

    def __init__(self, model: nn.Module, *, fingerprint: str = "", batch_size: int = 64, borrowed: bool = False) -> None:
        """Create the encoder. It does not change the parameters of the model.

        Args:
            model: A model with a method ``hidden(tokens) -> (B, N, D)``, see `lightning_align.models.language_model`.
            fingerprint: Hash of its weights, by which databases of release 0.1.0 know it.
            batch_size: Chunks per forward pass.
            borrowed: Whether the model belongs to another module. If so, the Trainer that runs the encoder does not move it.

        Raises:
            ValueError: If the model has no method ``hidden``.
        """
        super().__init__()
        if not callable(getattr(model, "hidden", None)):
            raise ValueError(
                f"`model` must have a method `hidden` to encode chunks, but got a {type(model).__name__}. Use a checkpoint of "
                "a model that has it (such as PaLM), the name of a sentence-transformers model, or bm25."
            )
        # A module in a tuple is not registered, so `to`, `eval` and the like do not reach it.
        self._borrowed, self.batch_size = (model,) if borrowed else (), batch_size
        if not borrowed:
            self.owned = model
        self.former_fingerprints = (f"lm-mean:{fingerprint}",)

    @property
    def fingerprint(self) -> str:
        """See `Encoder`. It is computed at each access, because a policy goes on training."""
        return f"lm-mean-2:{identity(self.model)}"

    @property
    def model(self) -> nn.Module:
        """The language model."""
        return self._borrowed[0] if self._borrowed else self.owned

    def encode(self, chunks: Sequence[ArrayLike]) -> Floats:
        """See `Encoder`. Chunks of similar length are batched together, to have little padding."""
        with evaluating(self.model):
            runs = [torch.as_tensor(np.asarray(chunk, dtype=np.int64)) for chunk in chunks]
            order = sorted(range(len(runs)), key=lambda place: len(runs[place]))
            parts = [
                self._pool([runs[i] for i in order[j : j + self.batch_size]]) for j in range(0, len(order), self.batch_size)
            ]
            vectors = torch.empty(len(runs), parts[0].shape[1], dtype=torch.float32)  # not the default dtype of bf16-true
            vectors[order] = torch.cat(parts)
        return vectors.numpy()

    def _pool(self, runs: list[Tensor]) -> Tensor:
        device = next(self.model.parameters()).device
        tokens = nn.utils.rnn.pad_sequence(runs, batch_first=True).to(device)
        lengths = torch.tensor([len(run) for run in runs], device=device)
        mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        # A causal model needs no mask for padding on the right, and is faster without it.
        padded = {} if getattr(self.model, "causal", True) or mask.all() else {"mask": mask}
        hidden: Tensor = self.model.hidden(tokens, **padded)  # type: ignore[operator]  # checked in the constructor
        return (hidden.float() * mask[..., None]).sum(1).div(lengths[:, None]).cpu()


class SentenceEncoder(nn.Module):
    """Encoder that applies a sentence-transformers model to the text of chunks."""

    def __init__(self, name: str, *, decode: Callable[[list[int]], str], batch_size: int = 64) -> None:
        """Load the model.

        Args:
            name: Folder of the model, or its name on the Hugging Face Hub.
            decode: Converts token ids to text.
            batch_size: Chunks per forward pass. The library sorts chunks by length first.

        Raises:
            ValueError: If sentence-transformers is not installed, or the model cannot be loaded.
        """
        super().__init__()
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"Encoder {name!r} needs sentence-transformers. Run pip install 'lightning-align[hf]', or use a checkpoint of "
                "your own language model, or bm25."
            ) from error
        try:
            self.model = SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Encoder {name!r} cannot be loaded by sentence-transformers ({error}). Use another model or bm25."
            ) from error
        self.decode, self.batch_size = decode, batch_size
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().float().contiguous().numpy().data)
        self.former_fingerprints = (f"sentence:{Path(name).name}:{digest.hexdigest()[:16]}",)

    @property
    def fingerprint(self) -> str:
        """See `Encoder`. It has pooling, maximum length, prompts, normalization and tokenizer of the model."""
        return f"sentence-2:{identity(self.model)}"

    def truncation(self, chunks: Sequence[ArrayLike]) -> Truncation | None:
        """Count the tokens of chunks that the model does not read. None if that is not known."""
        limit, tokenizer = self.model.max_seq_length, getattr(self.model, "tokenizer", None)
        if limit is None or not callable(tokenizer):
            return None
        texts = [self.decode(np.asarray(chunk).tolist()) for chunk in chunks]
        lengths = np.array([len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]])
        lost = np.maximum(lengths - limit, 0)
        return Truncation(int(limit), int((lost > 0).sum()), int(lengths.max()), float(lost.sum() / lengths.sum()))

    @torch.no_grad()
    def encode(self, chunks: Sequence[ArrayLike]) -> Floats:
        """See `Encoder`."""
        texts = [self.decode(np.asarray(chunk).tolist()) for chunk in chunks]
        vectors = self.model.encode(
            texts, batch_size=self.batch_size, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        result: Floats = vectors.float().cpu().numpy()
        return result


class _Embedder(L.LightningModule):
    """Encodes blocks of chunks and writes them, as the prediction of a Trainer."""

    def __init__(self, encoder: Encoder, table: ChunkTable, stage: Stage, bar: Any, precision: str) -> None:
        super().__init__()
        self.encoder, self.table, self.stage, self.bar, self.precision = encoder, table, stage, bar, precision

    def predict_step(self, batch: tuple[int, bool]) -> int:
        number, check = batch
        if number == IDLE:
            return number
        arrays = {"vectors": self._vectors(number)}
        if check:
            self.stage.check_block(number, arrays)
        else:
            self.stage.write_block(number, arrays)
        self.bar.update()
        return number

    def _vectors(self, number: int) -> NDArray[np.float16]:
        chunks = range(number * BLOCK_CHUNKS, min((number + 1) * BLOCK_CHUNKS, len(self.table)))
        with in_precision(self.encoder, self.precision):
            vectors = self.encoder.encode([self.table.chunk(chunk) for chunk in chunks]).astype(np.float16)
        if vectors.ndim != 2 or len(vectors) != len(chunks):
            raise ValueError(
                f"`encode` of {type(self.encoder).__name__} must return a vector per chunk, ({len(chunks)}, d), but returned"
                f" the shape {vectors.shape}."
            )
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"Vectors must be finite and fit into float16 (at most 65,504), but those of {type(self.encoder).__name__} do "
                "not. Train the encoder further, or use another."
            )
        return vectors


def build_vectors(
    root: Path,
    chunks: Stage,
    encoder: Encoder,
    *,
    team: Team,
    verify: float,
    trainer: Callable[[], L.Trainer],
    previous: Stage | None = None,
    key: str | None = None,
    precision: str | None = None,
) -> Stage:
    """Encode all chunks to ``vectors.npy``, (C, d) float16, unless the finished stage exists.

    Args:
        root: Folder of the database.
        chunks: The finished chunk stage.
        encoder: Encodes the chunks.
        team: The ranks that share the work.
        verify: Fraction of the blocks that are computed twice and compared.
        trainer: Creates the Trainer that runs the encoder with ``predict``, on the devices of `team`.
        previous: Vectors of a former generation. Its chunks must be the first chunks of this stage. Its vectors are reused.
        key: The fingerprint of the encoder as it was loaded. A Trainer can convert its weights. Default is to ask the encoder.
        precision: The precision to encode in. Default is that of `previous`, or of the Trainer.

    Raises:
        ValueError: If the vectors are not finite, those of an earlier run are not of this encoder, or the disk is full.
    """
    key = encoder.fingerprint if key is None else key
    if precision is None and previous is not None and previous.inputs["encoder"] == key:
        precision = _precision_of(previous)
    run = None if precision else trainer()
    # Vectors are compared with each other, so all of a stage are encoded alike, and stages of other precisions have other keys.
    precision = precision or str(run and run.precision)
    stage = Stage(root, "vectors", {"format": FORMAT, "chunks": chunks.key, "encoder": key, "precision": precision})
    table = ChunkTable(chunks.folder)
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
        if team.rank == 0:
            _warn_of_truncation(encoder, table)
        if done and verify:
            _check_encoder(stage, encoder, table, precision)
    if team.share(done):
        return stage
    num_blocks = -(-len(table) // BLOCK_CHUNKS)
    with team.together():
        own_blocks = range(team.rank, num_blocks, team.size)
        old = _old_blocks(stage, previous)
        for number in own_blocks:
            if number < len(old) and not stage.has_block(number):
                stage.write_block(number, {"vectors": old[number]})
        missing = [(number, False) for number in own_blocks if not stage.has_block(number)]
        work = missing + [(number, True) for number in own_blocks if stage.is_sampled(number, verify)]
        with tqdm(
            desc="vectors", unit=" blocks", total=len(work), disable=None if team.rank == 0 else True, leave=False
        ) as bar:
            # Each rank's loader has the blocks of this rank only, an item per block, so the Trainer must not shard it again. A
            # rank without work gets an idle item, because the Trainer rejects an empty loader.
            loader: Any = DataLoader(work or [(IDLE, False)], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
            (run or trainer()).predict(_Embedder(encoder, table, stage, bar, precision), loader, return_predictions=False)
    with team.together():
        if team.rank == 0:
            dim = stage.read_block(0)["vectors"].shape[1]
            parts = (stage.read_block(number)["vectors"] for number in range(num_blocks))
            write_rows(stage.folder / "vectors.npy", parts, dtype=np.float16, shape=(len(table), dim))
            stage.finish(
                table={"dim": dim, "encoder": key, "precision": precision},
                counts={"chunks": len(table)},
                files=["vectors.npy"],
            )
    return stage


def _warn_of_truncation(encoder: Encoder, table: ChunkTable) -> None:
    measure: Callable[[list[Ints]], Truncation | None] | None = getattr(encoder, "truncation", None)
    if measure is None:
        return
    numbers = np.unique(np.linspace(0, len(table) - 1, min(SAMPLED, len(table))).astype(np.int64)).tolist()
    found = measure([table.chunk(number) for number in numbers])
    if found is None or not found.num_cut:
        return
    warnings.warn(
        f"The encoder reads at most {found.limit} of its tokens, but {found.num_cut} of {len(numbers)} sampled chunks are"
        f" longer, at most {found.longest} tokens: {found.share:.0%} of the text is truncated and cannot be found. Use a"
        f" `chunk_size` of at most {table.chunk_size * found.limit // found.longest} instead of {table.chunk_size}, an encoder"
        " that reads longer texts, or bm25.",
        stacklevel=3,
    )


def _check_encoder(stage: Stage, encoder: Encoder, table: ChunkTable, precision: str) -> None:
    """Compare some vectors of a finished stage with those that the encoder computes now.

    Raises:
        ValueError: If they differ by more than the precision of processors.
    """
    numbers = np.unique(np.linspace(0, len(table) - 1, min(COMPARED, len(table))).astype(np.int64))
    kept = read_vectors(stage)[numbers].astype(np.float32)
    with in_precision(encoder, precision):
        now = encoder.encode([table.chunk(number) for number in numbers.tolist()])
    scale = float(np.linalg.norm(kept)) or 1.0
    difference = float(np.linalg.norm(kept - now)) / scale if now.shape == kept.shape else np.inf
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The `fingerprint` of {type(encoder).__name__} must change with everything that its vectors depend on, but it is"
            f" that of {stage.folder}, whose vectors differ by {difference:.0%} from those that it computes now. Add what was"
            " changed to the fingerprint, or delete this folder and build again."
        )


def _precision_of(stage: Stage | None) -> str | None:
    """Return the precision in which the vectors of a finished stage were encoded. None for those of earlier versions."""
    return None if stage is None else stage.setting("precision", str, default="") or None


def _old_blocks(stage: Stage, previous: Stage | None) -> list[NDArray[np.float16]]:
    """Return the complete blocks of vectors of a former generation, which has the same chunks in these blocks."""
    if previous is None or any(previous.inputs.get(name) != stage.inputs[name] for name in ("encoder", "precision")):
        return []
    vectors = read_vectors(previous)
    return [vectors[number * BLOCK_CHUNKS :][:BLOCK_CHUNKS] for number in range(len(vectors) // BLOCK_CHUNKS)]


def read_vectors(stage: Stage) -> NDArray[np.float16]:
    """Open the vectors (C, d) of a finished stage, memory-mapped."""
    vectors: NDArray[np.float16] = np.load(stage.folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    return vectors


@contextmanager
def in_precision(encoder: Encoder, precision: str | None) -> Iterator[None]:
    """Run an encoder in the precision of a Trainer within a ``with`` block, for queries that are compared with its vectors.

    Args:
        encoder: The encoder. Its weights are converted to 16 bits for a ``true`` precision, unless it is a policy that trains.
        precision: The precision, as the Trainer names it. None changes nothing.
    """
    if precision is None:
        yield
        return
    bits, _, kind = precision.partition("-")
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(bits)
    weight = next(encoder.model.parameters(), None) if isinstance(encoder, (LMEncoder, SentenceEncoder)) else None
    if weight is None and isinstance(encoder, nn.Module):
        weight = next(encoder.parameters(), None)
    if dtype is not None and kind == "true" and isinstance(encoder, nn.Module):
        encoder.to(dtype)  # a borrowed model is not reached
    mixed = dtype is not None and kind == "mixed"
    device = "cpu" if weight is None else weight.device.type
    with torch.autocast(device, dtype=dtype if mixed else None, enabled=mixed):
        yield
