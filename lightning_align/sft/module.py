"""Supervised fine-tuning. The loss is the mean negative log-likelihood per response token over the optimizer batch."""

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.building import Backbone
from lightning_align.models.lora import LoRAConfig
from lightning_align.scoring.sums import response_logprobs
from lightning_align.training.metrics import TokenNLL
from lightning_align.training.module import AlignModule
from lightning_align.types import TokenBatch


class SFTModule(AlignModule):
    """Fine-tunes a language model on responses."""

    default_lr = 3e-4

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        init_from: str | None = None,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        """Describe the run; the policy is built in ``configure_model``.

        Args:
            backbone: the language model: a module or a factory in code, `class_path` and `init_args` in YAML. May be left out
                with `init_from`, whose checkpoint says what it is of.
            init_from: checkpoint (.ckpt of this package, .pt or .safetensors state dict) whose weights the policy begins with.
            lora: train only adapters, on a frozen base.
            optimizer: factory over parameters; by default AdamW at 3e-4.
            lr_scheduler: factory over the optimizer; stepped every optimizer step.
            generation: how `predict` and the sample logger decode.
        """
        super().__init__(
            backbone,
            init_from=init_from,
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            generation=generation,
        )
        self.val_nll, self.test_nll = TokenNLL(), TokenNLL()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Compute the sum of -log p(response) over the micro-batch.

        The gradient is divided by the number of response tokens in the optimizer batch later, see `AlignModule`.
        """
        logprobs = response_logprobs(self.policy, batch)
        loss, count = -logprobs.sums.sum(), logprobs.counts.sum()
        self.count_tokens(batch)
        values = {"loss": loss.detach() / count.clamp(min=1)}
        self.log_training(values, progress_bar="loss", batch_size=len(logprobs.counts))
        return self.weighted(loss, count)

    def _evaluate(self, metric: TokenNLL, batch: TokenBatch) -> None:
        metric.update(*response_logprobs(self.policy, batch), batch.get("num_bytes"))

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Add a batch to ``val/loss``, ``val/perplexity`` and ``val/bits_per_byte``."""
        self._evaluate(self.val_nll, batch)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Add a batch to ``test/loss``, ``test/perplexity`` and ``test/bits_per_byte``."""
        self._evaluate(self.test_nll, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics of the epoch."""
        self._log_nll("val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics of the epoch."""
        self._log_nll("test", self.test_nll)

    def _log_nll(self, stage: str, metric: TokenNLL) -> None:
        values: dict[str, Any] = metric.compute()
        metric.reset()
        for name, value in values.items():
            # The value is already the same on each rank. sync_dist tells Lightning so.
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=True)
