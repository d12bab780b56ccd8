"""Training and evaluation of RETRO: the log-likelihood of text, given the neighbors of the preceding chunk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.activations import Checkpointing
from lightning_align.models.building import Backbone
from lightning_align.models.checkpoint import read_checkpoint
from lightning_align.models.unpadded import unpadded_batch
from lightning_align.models.weights import load_weights, policy_state
from lightning_align.retrieval.search import Found
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.arms import RetrievalArms
from lightning_align.retro.batch import RetrievalBatch, without_last
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.model import RETRO, NeighborTokens
from lightning_align.runtime.lightning_internals import datamodule_of
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.targets import select_targets
from lightning_align.training.evaluation import log_values, metrics_of, parts_of
from lightning_align.training.module import AlignModule
from lightning_align.training.tensorboard import Charts

_MOST_DOCUMENTS = 2**32
FIT_ARMS = ("on", "off")
"""The arms of a validation within `fit`. Only `validate` and `test` use the others, which need one forward pass each."""


class RETROModule(AlignModule):
    """Trains a RETRO model, from scratch or on a frozen language model (RETRO-fitting).

    Each optimizer step uses the nearest k neighbors. By default k is drawn from 0 to `num_neighbors`, so that the trained model
    works with any number of neighbors, including none. With a frozen decoder k is at least 1, because no trainable parameter
    has an effect without neighbors.
    """

    default_lr = 3e-4
    charts: ClassVar[Charts] = {
        "bits per byte: with neighbors (on) below without (off)": ("val/on/bits_per_byte", "val/off/bits_per_byte"),
        "bits per byte that neighbors save, 95 % interval": ("val/off/gain", "val/off/gain_low", "val/off/gain_high"),
    }

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        init_from: str | None = None,
        retrofit_from: str | None = None,
        num_neighbors: int = 2,
        vary_neighbors: bool = True,
        by_k: Sequence[int] = (),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationConfig | None = None,
        activation_checkpointing: Checkpointing = False,
    ) -> None:
        """Set up the module. The policy is built later, in ``configure_model``.

        Args:
            backbone: A RETRO model: a module or a factory in code, `class_path` and `init_args` in YAML. Not needed with
                `init_from`.
            init_from: A checkpoint of a RETRO model to take the initial weights from.
            retrofit_from: A checkpoint of a language model to initialize the decoder from. Set `train_decoder: false` in the
                backbone to keep these weights fixed.
            num_neighbors: The number of neighbors per chunk: the maximum in training, and the number of the arm `on`.
            vary_neighbors: Whether to draw the number of neighbors for each optimizer step. If false, each step uses
                `num_neighbors`.
            by_k: Further numbers of neighbors that `validate` and `test` evaluate.
            optimizer: A factory that gets the parameter groups. Default is AdamW with learning rate 3e-4.
            lr_scheduler: A factory that gets the optimizer. The scheduler is stepped after every optimizer step.
            generation: How `predict` and the sample logger decode.
            activation_checkpointing: See `AlignModule`. It holds for the layers of the decoder and of the encoder.

        Raises:
            ValueError: If there is no model to build, or if a number of neighbors is less than 1.
        """
        super().__init__(
            backbone,
            init_from=init_from,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            generation=generation,
            activation_checkpointing=activation_checkpointing,
        )
        if retrofit_from is not None and (backbone is None or init_from is not None):
            raise ValueError(
                "RETROModule: `retrofit_from` initializes the decoder of `backbone`, so it needs `backbone` and excludes "
                "`init_from`, which initializes the whole model. Set `backbone` and remove `init_from`."
            )
        if num_neighbors < 1 or any(k < 1 for k in by_k):
            raise ValueError(
                f"RETROModule: `num_neighbors` and each entry of `by_k` must be at least 1, but got {num_neighbors} and "
                f"{list(by_k)}."
            )
        self.retrofit_from = retrofit_from
        self.num_neighbors, self.vary_neighbors, self.by_k = num_neighbors, vary_neighbors, tuple(by_k)
        self.arms: RetrievalArms | None = None

    # -- the model

    def build_policy(self) -> nn.Module:
        """Build the RETRO model, with the decoder's weights from ``retrofit_from`` if given."""
        policy = super().build_policy()
        if not isinstance(policy, RETRO):
            raise ValueError(
                f"RETROModule: `backbone` must be a RETRO, but got a {type(policy).__name__}. Use class_path: "
                "lightning_align.RETRO with your model as init_args.decoder."
            )
        if self.retrofit_from is not None:
            if Path(self.retrofit_from).is_file():
                state = policy_state(read_checkpoint(self.retrofit_from)["state_dict"])
                load_weights(policy.decoder, state, self.retrofit_from)
            else:
                # A checkpoint of this run contains all weights, so it can be loaded after the original file is gone.
                self.source.awaits_weights = True
        return policy

    def initial_weights(self) -> list[str]:
        """Return the checkpoints of the whole model and of the decoder, if given."""
        return [*super().initial_weights(), *([] if self.retrofit_from is None else [self.retrofit_from])]

    def check_weights_loaded(self) -> None:
        """Raise if the weights were never loaded."""
        if self.source.awaits_weights and self.retrofit_from is not None:
            read_checkpoint(self.retrofit_from)
        super().check_weights_loaded()

    @property
    def _retro(self) -> RETRO:
        return cast(RETRO, self.policy)

    def logprobs(
        self, batch: RetrievalBatch, neighbors: NeighborTokens | None, lengths: NDArray[np.int64] | None = None
    ) -> Tensor:
        """Compute the log-probability of each target, row by row.

        Args:
            batch: The windows. Their last token is only a target.
            neighbors: (B, U, J, R) neighbors of their chunks. None runs the decoder alone.
            lengths: (B, U, J) number of real tokens of each neighbor, if it is known on the host.

        Returns:
            (T,) float32 log-probabilities, in nats.
        """
        rows, before, targets = select_targets(batch)
        unpadded = unpadded_batch(self._retro, without_last(batch))
        if unpadded is None:
            hidden = self._retro.hidden(batch["tokens"][:, :-1], neighbors=neighbors)[rows, before]
        else:
            hidden = self._retro.unpadded_hidden(unpadded, neighbors=neighbors, lengths=lengths)
            hidden = hidden.index_select(0, unpadded.index(rows, before))
        return target_logprobs(hidden, self._retro.head, targets)

    # -- training

    def training_step(self, batch: RetrievalBatch, batch_idx: int) -> Tensor:
        """Compute the sum of -log p over the targets of the micro-batch.

        The gradient is divided by the number of targets in the optimizer batch later, see `AlignModule`.
        """
        self.begin_by_hand()
        neighbors = self._read(batch["neighbors"], self.num_neighbors)
        k = self._draw(neighbors.tokens.shape[2], batch_idx // self.trainer.accumulate_grad_batches)
        lengths = batch.get("neighbor_lengths")
        lengths = None if lengths is None else lengths[..., : max(k, 1)] * (k > 0)
        loss, count = -self.logprobs(batch, neighbors.first(k), lengths).sum(), batch["targets"].sum()
        self.count_tokens(batch)
        self.log_training({"loss": loss.detach() / count.clamp(min=1)}, progress_bar="loss", batch_size=len(batch["tokens"]))
        return self.weighted(loss, count)

    def _draw(self, most: int, step: int) -> int:
        """Draw the number of neighbors of an optimizer step.

        It is the same in all micro-batches of the step, on each rank, and after a resume.
        """
        if not self.vary_neighbors:
            return most
        least = 0 if any(parameter.requires_grad for parameter in self._retro.decoder.parameters()) else 1
        generator = torch.Generator().manual_seed(hash((self.trainer.global_step, step)))
        return int(torch.randint(least, most + 1, (), generator=generator))

    def _read(self, neighbors: NeighborTokens, count: int) -> NeighborTokens:
        if count > neighbors.tokens.shape[2]:
            raise ValueError(
                f"RETROModule: {count} neighbors per chunk are needed, but the batches have {neighbors.tokens.shape[2]}. Set "
                "`num_neighbors` (for training) or `eval_num_neighbors` (for evaluation) of the data module to at least "
                f"{count}."
            )
        return neighbors.first(count)

    # -- evaluation

    def _arms(self, batch: RetrievalBatch, names: Sequence[str]) -> Mapping[str, NeighborTokens | None]:
        neighbors, controls = batch["neighbors"], batch["controls"]
        arms: dict[str, NeighborTokens | None] = {}
        for name in names:
            if name == "off":
                arms[name] = None
            elif name in controls:
                arms[name] = self._read(controls[name], self.num_neighbors)
            else:
                arms[name] = self._read(
                    neighbors, int(name.removeprefix("k_")) if name.startswith("k_") else self.num_neighbors
                )
        return arms

    def on_validation_epoch_start(self) -> None:
        """Reset the arms."""
        fitting = self.trainer.state.fn == "fit"
        names = FIT_ARMS if fitting else (*FIT_ARMS, "random", "shuffled", *(f"k_{k}" for k in self.by_k))
        self.arms = RetrievalArms(names).to(self.device)

    def on_test_epoch_start(self) -> None:
        """Reset the arms."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: RetrievalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to each arm."""
        assert self.arms is not None
        nats = []
        for neighbors in self._arms(batch, self.arms.arms).values():
            dense = batch["targets"].new_zeros(batch["targets"].shape, dtype=torch.float32)
            nats.append(dense.masked_scatter(batch["targets"], -self.logprobs(batch, neighbors).float()))
        for arms in metrics_of(self.arms, self.trainer, dataloader_idx):
            arms.update(
                torch.stack(nats),
                batch["targets"],
                # Each loader numbers its documents from 0.
                batch["documents"] + dataloader_idx * _MOST_DOCUMENTS,
                batch["overlap"],
                batch["chunk_bytes"],
                self._retro.chunk_size,
            )

    def test_step(self, batch: RetrievalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to each arm."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the arms."""
        self._log_arms("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the arms."""
        self._log_arms("test")

    def _log_arms(self, stage: str) -> None:
        assert self.arms is not None
        for loader, arms in [(None, self.arms), *enumerate(parts_of(self.arms, self.trainer))]:
            values = arms.compute()
            if values:
                values["bits_per_byte"] = values["on/bits_per_byte"]
            counts = [name for name in values if name == "documents" or name.startswith("bytes_alpha_")]
            log_values(self, stage, values, loader=loader, progress_bar=("bits_per_byte",), counts=counts)
        self.arms = None

    # -- prediction

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Generate responses to prompts, with live retrieval.

        Args:
            batch: A `PromptBatch` with prompts of any lengths.
            batch_idx: Not used. A response depends on the number of its row, and not on the batch that the row is in.

        Returns:
            For each prompt ``row``, ``prompt``, ``responses``, ``finished`` and ``neighbors``. The last contains, for each
            response, the neighbors of each chunk that were used.
        """
        data: Any = datamodule_of(self.trainer)
        tokenizer, table, rows = data.tokenizer, data.database.chunks, batch["rows"].tolist()
        decoder = RetrievalDecoder(self._retro, data.retriever, num_neighbors=self.num_neighbors)
        results = generate(
            decoder,
            batch["prompts"],
            self.generation,
            ends=self.ends(),
            ids=rows,
        )
        return [
            {
                "row": row,
                "prompt": tokenizer.decode(prompt),
                "responses": [tokenizer.decode(r.tokens) for r in responses],
                "finished": [r.finished for r in responses],
                "neighbors": [self._used_neighbors(decoder.found, [*prompt, *r.tokens], tokenizer, table) for r in responses],
            }
            for row, prompt, responses in zip(rows, batch["prompts"], results, strict=True)
        ]

    def _used_neighbors(
        self, found: Mapping[tuple[int, ...], Found], row: Sequence[int], tokenizer: Any, table: ChunkTable
    ) -> list[dict[str, Any]]:
        """Format the neighbors that were used for each chunk of a row as text. A chunk at the very end of the row used none."""
        size, used = self._retro.chunk_size, []
        for start in range(0, len(row) - size + 1, size):
            chunk = tuple(row[start : start + size])
            if chunk not in found:  # it ends with the last token, which was never an input
                continue
            one = found[chunk]
            ids, masks = one.tokens.ids[0], one.tokens.mask[0]
            read = [
                {
                    "document": table.document_ids[int(table.document_of(one.ids[0, j]))],
                    "chunk": int(one.ids[0, j]),
                    "distance": float(one.distances[0, j]),
                    "text": tokenizer.decode(ids[j, :size][masks[j, :size]].tolist()),
                    "continuation": tokenizer.decode(ids[j, size:][masks[j, size:]].tolist()),
                }
                for j in one.mask[0].nonzero()[0]
            ]
            used.append({"chunk": tokenizer.decode(chunk), "read": read})
        return used
