"""Supervised fine-tuning: the negative log-likelihood of responses, averaged over the tokens of the optimizer batch."""

from typing import ClassVar

from torch import Tensor

from lightning_align.models.building import Backbone
from lightning_align.scoring.sums import response_logprobs
from lightning_align.training.arguments import PolicyArguments, Unpack
from lightning_align.training.evaluation import log_metric, metrics_of
from lightning_align.training.metrics import TokenNLL
from lightning_align.training.module import AlignModule
from lightning_align.training.tensorboard import Charts
from lightning_align.types import TokenBatch


class SFTModule(AlignModule):
    """Fine-tunes a language model on responses."""

    default_lr = 3e-4
    charts: ClassVar[Charts] = {"bits per byte of validation": ("val/bits_per_byte",)}
    tensor_parallel = True

    def __init__(self, backbone: Backbone | None = None, **shared: Unpack[PolicyArguments]) -> None:
        """Describe the run. The policy is built in ``configure_model``.

        Args:
            backbone: The language model; see `AlignModule`. Not needed with `init_from`.
            **shared: `init_from`, `lora`, `optimizer`, `lr_scheduler`, `generation`, `dropout`, `router_aux_loss_coef` and
                `activation_checkpointing` of `AlignModule`.
        """
        super().__init__(backbone, **shared)
        self.val_nll, self.test_nll = TokenNLL(), TokenNLL()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the sum of -log p(response) over the micro-batch, and count its target tokens."""
        self.begin_by_hand()
        with self.router_loss.recorded(self.policy):
            logprobs = response_logprobs(self.policy, batch)
        loss, count = -logprobs.sums.sum(), logprobs.counts.sum()
        self.count_tokens(batch)
        values = {"loss": loss.detach() / count.clamp(min=1)}
        loss = self.router_loss.added(loss, count, values)
        self.log_training(values, progress_bar="loss", batch_size=len(logprobs.counts))
        return self.weighted(loss, count)

    def _evaluate(self, metric: TokenNLL, batch: TokenBatch, loader: int) -> None:
        logprobs = response_logprobs(self.policy, batch)
        for each in metrics_of(metric, self.trainer, loader):
            each.update(*logprobs, batch.get("num_bytes"))

    def validation_step(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to ``val/loss``, ``val/perplexity`` and ``val/bits_per_byte``."""
        self._evaluate(self.val_nll, batch, dataloader_idx)

    def test_step(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the same metrics under ``test/``."""
        self._evaluate(self.test_nll, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all rows."""
        log_metric(self, "val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all rows."""
        log_metric(self, "test", self.test_nll)
