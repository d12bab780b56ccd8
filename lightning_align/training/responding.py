"""How a module generates responses, for `predict` and for callbacks."""

from collections.abc import Sequence
from typing import Any

from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.runtime.lightning_internals import datamodule_of, trainer_of
from lightning_align.training.by_hand import LoopByHand
from lightning_align.training.prediction import prediction_rows


class Responding(LoopByHand):
    """The part of `AlignModule` that generates responses with the policy."""

    generation: GenerationConfig

    def ends(self, config: GenerationConfig | None = None) -> Ends:
        """Return how responses end, and which ids exist: what the tokenizer of the data, the policy and the user say.

        Args:
            config: The generation settings. What they leave open, `generation` decides.
        """
        return Ends.of(tokenizer=self.data_tokenizer, model=self.policy, config=config, default=self.generation)

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        ends: Ends | None = None,
        ids: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """Generate responses to prompts with the policy, for `predict_step` and the callbacks.

        Subclasses override it if their policy needs more than the tokens of the prompts.

        Args:
            prompts: See `generate`.
            config: See `generate`.
            ends: How responses end. Default is `ends`.
            ids: See `generate`.
        """
        return generate(self.policy, prompts, config, ends=ends or self.ends(config), ids=ids)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Generate responses to prompts.

        Args:
            batch: A `PromptBatch`, prompts of any lengths.
            batch_idx: Not used. A response depends on the number of its row, not on the batch.

        Returns:
            See `prediction_rows`. Responses are text if the data module has a tokenizer, otherwise token ids.
        """
        batch = {**batch, "rows": batch["rows"].cpu()}
        results = self.continue_prompts(batch["prompts"], self.generation, ids=batch["rows"].tolist())
        return prediction_rows(batch, results, self.data_tokenizer)

    @property
    def data_tokenizer(self) -> Any:
        """The data module's tokenizer, or None."""
        return getattr(datamodule_of(trainer_of(self)), "tokenizer", None)
