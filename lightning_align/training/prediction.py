"""What ``predict_step`` returns for prompts."""

from collections.abc import Sequence
from typing import Any

from lightning_align.generation.sampler import Generation
from lightning_align.types import PromptBatch


def prediction_rows(batch: PromptBatch, results: Sequence[Sequence[Generation]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return one dictionary per prompt.

    Args:
        batch: The prompts, as token ids.
        results: The responses to each prompt.
        tokenizer: Decodes prompts and responses; None leaves them as token ids.

    Returns:
        For each prompt ``row``, ``prompt``, ``responses`` and ``finished``: whether each response ended by itself.
    """

    def text(ids: list[int]) -> str | list[int]:
        return ids if tokenizer is None else tokenizer.decode(ids)

    return [
        {
            "row": row,
            "prompt": text(prompt),
            "responses": [text(response.tokens) for response in responses],
            "finished": [response.finished for response in responses],
        }
        for row, prompt, responses in zip(batch["rows"].tolist(), batch["prompts"], results, strict=True)
    ]
