"""Stage 2: what a chunk is looked for by. Encoders turn chunks into vectors; near vectors should mean like contents."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from lightning_align.retrieval.stages import Stage, Team, write_rows
from lightning_align.retrieval.tables import ChunkTable, Floats

FORMAT = 1
"""Raise it when the same settings come to mean other bytes."""
BLOCK_CHUNKS = 2048
"""Chunks of a block: what is encoded together, and what a kill costs at most."""

IDLE = -1
"""The number of no block."""


class Encoder(Protocol):
    """What turns chunks into vectors of which the Euclidean distance is what counts.

    One that is an ``nn.Module`` is put on the Trainer's device.
    """

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the vectors depend on."""
        ...

    def encode(self, chunks: Sequence[ArrayLike]) -> Floats:
        """Vectors of chunks.

        Args:
            chunks: n runs of token ids, unpadded, of any lengths.

        Returns:
            (n, d) float32.
        """
        ...


class LMEncoder(nn.Module):
    """The mean over a chunk of a frozen language model's final hidden states.

    It needs no model besides the one at hand. Vectors are not normalised: distances then do not notice the offset that all
    hidden states of a model share, which angles do.
    """

    def __init__(self, model: nn.Module, *, fingerprint: str, batch_size: int = 64, borrowed: bool = False) -> None:
        """Take a model as it is, and leave its parameters alone.

        Args:
            model: gives ``hidden(tokens) -> (B, N, D)``, see `lightning_align.models.language_model`.
            fingerprint: of its weights.
            batch_size: chunks that go through it together.
            borrowed: whether the model belongs to somebody else, who keeps it on its device.

        Raises:
            ValueError: if the model gives no hidden states.
        """
        super().__init__()
        if not callable(getattr(model, "hidden", None)):
            raise ValueError(
                f"a {type(model).__name__} has no `hidden`, so it cannot encode chunks: give a checkpoint of a model that does "
                "(such as PaLM), the name of a sentence-transformers model, or bm25"
            )
        # In a tuple, a module is not registered, so nothing done to this one reaches it.
        self._borrowed, self.batch_size = (model,) if borrowed else (), batch_size
        if not borrowed:
            self.owned = model
        self.fingerprint = f"lm-mean:{fingerprint}"

    @property
    def model(self) -> nn.Module:
        """What encodes."""
        return self._borrowed[0] if self._borrowed else self.owned

    @torch.no_grad()
    def encode(self, chunks: Sequence[ArrayLike]) -> Floats:
        """See `Encoder`; chunks of one length go together, so that few positions are padding."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            runs = [torch.as_tensor(np.asarray(chunk, dtype=np.int64)) for chunk in chunks]
            order = sorted(range(len(runs)), key=lambda place: len(runs[place]))
            parts = [
                self._pool([runs[i] for i in order[j : j + self.batch_size]]) for j in range(0, len(order), self.batch_size)
            ]
            vectors = torch.empty(len(runs), parts[0].shape[1])
            vectors[order] = torch.cat(parts)
        finally:
            for module, training in modes.items():
                module.training = training
        return vectors.numpy()

    def _pool(self, runs: list[Tensor]) -> Tensor:
        device = next(self.model.parameters()).device
        tokens = nn.utils.rnn.pad_sequence(runs, batch_first=True).to(device)
        lengths = torch.tensor([len(run) for run in runs], device=device)
        mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        # A causal model needs no mask for padding on the right, and is faster without.
        padded = {} if getattr(self.model, "causal", True) or mask.all() else {"mask": mask}
        hidden: Tensor = self.model.hidden(tokens, **padded)  # type: ignore[operator]  # checked in the constructor
        return (hidden.float() * mask[..., None]).sum(1).div(lengths[:, None]).cpu()


class SentenceEncoder(nn.Module):
    """A model of the sentence-transformers library on the text of chunks."""

    def __init__(self, name: str, *, decode: Callable[[list[int]], str], batch_size: int = 64) -> None:
        """Load the model.

        Args:
            name: folder of the model, or its name on the hub.
            decode: text of token ids.
            batch_size: chunks that go through it together; the library sorts them by length first.

        Raises:
            ValueError: if sentence-transformers is not installed, or the model cannot be loaded.
        """
        super().__init__()
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"encoder {name!r} needs sentence-transformers: pip install 'lightning-align[hf]'. Without it: a checkpoint of "
                "your own language model, or bm25"
            ) from error
        try:
            self.model = SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as error:
            raise ValueError(f"encoder {name!r} cannot be loaded by sentence-transformers ({error})") from error
        self.decode, self.batch_size = decode, batch_size
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().float().contiguous().numpy().data)
        self.fingerprint = f"sentence:{Path(name).name}:{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, chunks: Sequence[ArrayLike]) -> Floats:
        """See `Encoder`."""
        texts = [self.decode(np.asarray(chunk).tolist()) for chunk in chunks]
        vectors = self.model.encode(
            texts, batch_size=self.batch_size, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        result: Floats = vectors.float().cpu().numpy()
        return result


class _Embedding(L.LightningModule):
    """Encodes blocks of chunks and writes them."""

    def __init__(self, encoder: Encoder, table: ChunkTable, stage: Stage, bar: Any) -> None:
        super().__init__()
        self.encoder, self.table, self.stage, self.bar = encoder, table, stage, bar

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
        vectors = self.encoder.encode([self.table.chunk(chunk) for chunk in chunks]).astype(np.float16)
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"{type(self.encoder).__name__} gives vectors that are not finite, or over 65,504: train it, or use another"
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
) -> Stage:
    """Encode all chunks, unless that is done already: (C, d) float16 in ``vectors.npy``.

    Args:
        root: folder of the database.
        chunks: finished stage.
        encoder: what encodes them.
        team: the ranks that share the work.
        verify: share of the blocks that are made twice and compared.
        trainer: makes the Trainer whose ``predict`` runs the encoder, on the devices of `team`.
        previous: vectors of a former generation, whose chunks are the first of these; they are taken over.

    Raises:
        ValueError: if the vectors are not finite, or the disk is full.
    """
    stage = Stage(root, "vectors", {"format": FORMAT, "chunks": chunks.key, "encoder": encoder.fingerprint})
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
    if team.tell(done):
        return stage
    table = ChunkTable(chunks.folder)
    num_blocks = -(-len(table) // BLOCK_CHUNKS)
    with team.together():
        mine = range(team.rank, num_blocks, team.size)
        old = _old_blocks(stage, previous)
        for number in mine:
            if number < len(old) and not stage.has_block(number):
                stage.write_block(number, {"vectors": old[number]})
        missing = [(number, False) for number in mine if not stage.has_block(number)]
        work = missing + [(number, True) for number in mine if stage.is_sampled(number, verify)]
        with tqdm(
            desc="vectors", unit=" blocks", total=len(work), disable=None if team.rank == 0 else True, leave=False
        ) as bar:
            # One item is one block, whole, so that no sampler of the Trainer deals them out again. A rank without work gets
            # an idle one, for a Trainer refuses a loader without any.
            loader: Any = DataLoader(work or [(IDLE, False)], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
            trainer().predict(_Embedding(encoder, table, stage, bar), loader, return_predictions=False)
    with team.together():
        if team.rank == 0:
            dim = stage.read_block(0)["vectors"].shape[1]
            parts = (stage.read_block(number)["vectors"] for number in range(num_blocks))
            write_rows(stage.folder / "vectors.npy", parts, dtype=np.float16, shape=(len(table), dim))
            stage.finish(
                table={"dim": dim, "encoder": encoder.fingerprint}, counts={"chunks": len(table)}, files=["vectors.npy"]
            )
    return stage


def _old_blocks(stage: Stage, previous: Stage | None) -> list[NDArray[np.float16]]:
    """Blocks that a former generation has whole; their chunks are the same, so encoding them again would give the same."""
    if previous is None or previous.inputs["encoder"] != stage.inputs["encoder"]:
        return []
    vectors = read_vectors(previous)
    return [vectors[number * BLOCK_CHUNKS :][:BLOCK_CHUNKS] for number in range(len(vectors) // BLOCK_CHUNKS)]


def read_vectors(stage: Stage) -> NDArray[np.float16]:
    """(C, d) the vectors of a finished stage, memory-mapped."""
    vectors: NDArray[np.float16] = np.load(stage.folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    return vectors
