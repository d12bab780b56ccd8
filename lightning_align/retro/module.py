"""Training and evaluation of RETRO: the log-likelihood of text, given the neighbours of the chunk before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_align.generation.sampler import generate
from lightning_align.models.building import Backbone
from lightning_align.models.checkpoint import read_checkpoint
from lightning_align.models.weights import load_weights, policy_state
from lightning_align.retrieval.search import Found
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.arms import RetrievalArms
from lightning_align.retro.batch import RetrievalBatch
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.model import RETRO, NeighborTokens
from lightning_align.runtime.lightning_internals import datamodule_of
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.targets import select_targets
from lightning_align.training.arguments import RunArguments, Unpack
from lightning_align.training.module import AlignModule

FIT_ARMS = ("on", "off")
"""What a validation within a fit compares; the other arms, each a pass of its own, are for `validate` and `test`."""


class RETROModule(AlignModule):
    """Trains a RETRO model, from scratch or on a frozen language model (RETRO-fitting).

    Each training step reads the nearest k of the batch's neighbours, with k drawn from 0 to all of them (from 1 with a frozen
    decoder, which has nothing to learn without), so that one model serves any number of neighbours, and none.
    """

    default_lr = 3e-4

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        init_from: str | None = None,
        retrofit_from: str | None = None,
        num_neighbors: int = 2,
        vary_neighbors: bool = True,
        by_k: Sequence[int] = (),
        **shared: Unpack[RunArguments],
    ) -> None:
        """Describe the run; the policy is built in ``configure_model``.

        Args:
            backbone: a RETRO: a module or a factory in code, `class_path` and `init_args` in YAML. May be left out with
                `init_from`, whose checkpoint says what it is of.
            init_from: checkpoint of a RETRO whose weights the policy begins with.
            retrofit_from: checkpoint of a language model whose weights the decoder begins with; give the backbone
                `train_decoder: false` to keep them.
            num_neighbors: neighbours of each chunk that are read: at most in training, and in the arm `on`.
            vary_neighbors: whether a training step draws how many it reads.
            by_k: further numbers of neighbours that `validate` and `test` report.
            **shared: `optimizer`, `lr_scheduler` and `generation` of `AlignModule`.

        Raises:
            ValueError: if there is no model to build, or a number of neighbours is below 1.
        """
        super().__init__(backbone, init_from=init_from, lora=None, **shared)
        if retrofit_from is not None and (backbone is None or init_from is not None):
            raise ValueError(
                "RETROModule: retrofit_from gives weights to the decoder of `backbone`: give that, and no `init_from`, which "
                "has weights for all of it"
            )
        if num_neighbors < 1 or any(k < 1 for k in by_k):
            raise ValueError(f"RETROModule: num_neighbors is {num_neighbors} and by_k {list(by_k)}; expected 1 or more each")
        self.retrofit_from = retrofit_from
        self.num_neighbors, self.vary_neighbors, self.by_k = num_neighbors, vary_neighbors, tuple(by_k)
        self.arms: RetrievalArms | None = None

    # -- the model

    def build_policy(self) -> nn.Module:
        """Build the RETRO model, with the decoder's weights from ``retrofit_from`` if given."""
        policy = super().build_policy()
        if not isinstance(policy, RETRO):
            raise ValueError(
                f"RETROModule: the backbone is a {type(policy).__name__}; expected a RETRO: class_path: lightning_align.RETRO "
                "with your model as init_args.decoder"
            )
        if self.retrofit_from is not None:
            if Path(self.retrofit_from).is_file():
                state = policy_state(read_checkpoint(self.retrofit_from)["state_dict"])
                load_weights(policy.decoder, state, self.retrofit_from)
            else:
                # A checkpoint of this run has all weights, and outlives the file that the run began from.
                self.source.awaits_weights = True
        return policy

    def check_weights_loaded(self) -> None:
        """Refuse to go on with the weights of no file at all."""
        if self.source.awaits_weights and self.retrofit_from is not None:
            read_checkpoint(self.retrofit_from)
        super().check_weights_loaded()

    @property
    def _retro(self) -> RETRO:
        return cast(RETRO, self.policy)

    def logprobs(self, batch: RetrievalBatch, neighbors: NeighborTokens | None) -> Tensor:
        """Log-probability of each target, row by row.

        Args:
            batch: windows whose last token is a target alone.
            neighbors: of their chunks; None for the decoder by itself.

        Returns:
            (T,) float32, in nats.
        """
        rows, before, targets = select_targets(batch)
        hidden = self._retro.hidden(batch["tokens"][:, :-1], neighbors=neighbors)
        return target_logprobs(hidden[rows, before], self._retro.head, targets)

    # -- training

    def training_step(self, batch: RetrievalBatch, batch_idx: int) -> Tensor:
        """Sum of -log p over the targets of the micro-batch, to be divided by those of the optimizer batch."""
        neighbors = self._read(batch["neighbors"], self.num_neighbors)
        k = self._draw(neighbors.tokens.shape[2], batch_idx // self.trainer.accumulate_grad_batches)
        loss, count = -self.logprobs(batch, neighbors.first(k)).sum(), batch["targets"].sum()
        self.count_tokens(batch)
        self.log_training({"loss": loss.detach() / count.clamp(min=1)}, progress_bar="loss", batch_size=len(batch["tokens"]))
        return self.weighted(loss, count)

    def _draw(self, most: int, step: int) -> int:
        """How many neighbours this optimizer step reads: the same in all its micro-batches, on every rank, after a resume."""
        if not self.vary_neighbors:
            return most
        least = 0 if any(parameter.requires_grad for parameter in self._retro.decoder.parameters()) else 1
        generator = torch.Generator().manual_seed(hash((self.trainer.global_step, step)))
        return int(torch.randint(least, most + 1, (), generator=generator))

    def _read(self, neighbors: NeighborTokens, count: int) -> NeighborTokens:
        if count > neighbors.tokens.shape[2]:
            raise ValueError(
                f"RETROModule: {count} neighbours of a chunk are to be read, and the batches have {neighbors.tokens.shape[2]}: "
                "give the data module num_neighbors (in evaluation eval_num_neighbors) as large"
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
        """Begin counting."""
        fitting = self.trainer.state.fn == "fit"
        names = FIT_ARMS if fitting else (*FIT_ARMS, "random", "shuffled", *(f"k_{k}" for k in self.by_k))
        self.arms = RetrievalArms(names).to(self.device)

    def on_test_epoch_start(self) -> None:
        """Begin counting."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: RetrievalBatch, batch_idx: int) -> None:
        """Add a batch to every arm."""
        assert self.arms is not None
        nats = []
        for neighbors in self._arms(batch, self.arms.arms).values():
            dense = batch["targets"].new_zeros(batch["targets"].shape, dtype=torch.float32)
            nats.append(dense.masked_scatter(batch["targets"], -self.logprobs(batch, neighbors).float()))
        self.arms.update(
            torch.stack(nats),
            batch["targets"],
            batch["documents"],
            batch["overlap"],
            batch["chunk_bytes"],
            self._retro.chunk_size,
        )

    def test_step(self, batch: RetrievalBatch, batch_idx: int) -> None:
        """The same under ``test/``."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the arms."""
        self._log_arms("val")

    def on_test_epoch_end(self) -> None:
        """Log the arms."""
        self._log_arms("test")

    def _log_arms(self, stage: str) -> None:
        assert self.arms is not None
        values, self.arms = self.arms.compute(), None
        if values:
            self.log(f"{stage}/bits_per_byte", values["on/bits_per_byte"], prog_bar=True, sync_dist=True)
        for name, value in values.items():
            # Equal on every rank already; sync_dist only tells Lightning so.
            self.log(f"{stage}/{name}", value, sync_dist=True)

    # -- prediction

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Continue prompts, with retrieval on the fly.

        Args:
            batch: a `PromptBatch`, prompts of any lengths.
            batch_idx: not used: a response depends on the number of its row, whatever batch it is in.

        Returns:
            For each prompt ``row``, ``prompt``, ``responses``, ``finished``, and ``neighbors``: for each response what was
            read, chunk by chunk.
        """
        data: Any = datamodule_of(self.trainer)
        tokenizer, table = data.tokenizer, data.database.chunks
        decoder = RetrievalDecoder(self._retro, data.retriever, num_neighbors=self.num_neighbors)
        results = generate(
            decoder,
            batch["prompts"],
            self.generation,
            eos_id=tokenizer.eos_id,
            ids=batch["rows"].tolist(),
            decode=tokenizer.decode,
        )
        return [
            {
                "row": int(row),
                "prompt": tokenizer.decode(prompt),
                "responses": [tokenizer.decode(r.tokens) for r in responses],
                "finished": [r.finished for r in responses],
                "neighbors": [self._used(decoder.found, [*prompt, *r.tokens], tokenizer, table) for r in responses],
            }
            for row, prompt, responses in zip(batch["rows"], batch["prompts"], results, strict=True)
        ]

    def _used(
        self, found: Mapping[tuple[int, ...], Found], row: Sequence[int], tokenizer: Any, table: ChunkTable
    ) -> list[dict[str, Any]]:
        """The neighbours of each chunk of a row that was complete before the row ended, as text."""
        size, used = self._retro.chunk_size, []
        for start in range(0, len(row) - size + 1, size):
            chunk = tuple(row[start : start + size])
            if chunk not in found:  # completed by the last token, which nothing was predicted from
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
