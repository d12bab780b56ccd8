"""How the logits of a model of transformers come from its hidden states."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_align.models.language_model import Head
from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained_loading import summary

TOLERANCE = 1e-3
"""The largest difference of recomputed logits that counts as equal, in standard deviations of the logits."""
SCALES, SOFTCAPS = (
    ("logit_scale", "logits_scaling", "lm_head_multiplier"),
    ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
)
"""The configuration fields that hold a factor or divisor of the logits, and those that hold their soft cap."""


@torch.no_grad()
def probe_head(lm: Any) -> tuple[float | None, float | None]:
    """Find the factor and the soft cap with which the output layer turns hidden states into the logits of the model.

    Both are found by computing a few logits, because configurations have many names for them.

    Args:
        lm: A `PretrainedLM`. A sharded one must be in the middle of a forward pass of its outermost module.

    Returns:
        The factor and the soft cap. The factor is None if the logits are computed in another way.

    Raises:
        ValueError: If the model has no linear output layer, or needs other inputs than tokens.
    """
    layer = lm.model.get_output_embeddings()
    if has_peft(lm.model) and not isinstance(layer, nn.Linear):
        return None, None  # the output layer has an adapter
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{type(lm.model).__name__} must be a causal language model with a linear output layer, but has none.")
    if layer.weight.is_meta:
        return 1.0, None
    tokens = torch.arange(min(8, layer.weight.shape[0]), device=layer.weight.device)[None]
    try:
        logits = lm.model(input_ids=tokens, use_cache=False).logits.float()
    except Exception as reason:  # models raise many types here
        raise ValueError(
            f"{type(lm.model).__name__} must be a causal language model that needs only tokens, but it fails without "
            f"other inputs, such as images ({summary(reason)}). Use a model of text."
        ) from reason
    linear = F.linear(lm.decoder(input_ids=tokens, use_cache=False).last_hidden_state, layer.weight, layer.bias).float()
    values = {key: float(value) for key, value in lm.config.to_dict().items() if key in (*SCALES, *SOFTCAPS) and value}
    scale = 1.0 if layer.bias is not None else float((logits * linear).sum() / linear.square().sum().clamp(min=1e-30))
    factors = [factor for key in SCALES if key in values for factor in (values[key], 1 / values[key])]
    # Use 1 or a value of the configuration, whichever is nearest to the measured scale. The measured scale is not exact.
    scale = min((1.0, *factors), key=lambda factor: abs(factor - scale))
    candidates: list[tuple[float, float | None]] = [
        (scale, None),
        *((1.0, values[key]) for key in SOFTCAPS if key in values),
    ]
    tolerance = TOLERANCE if logits.dtype is layer.weight.dtype else 30 * TOLERANCE
    for factor, softcap in candidates:
        recomputed = Head(layer.weight, layer.bias, softcap).capped(linear * factor)
        error = (logits - recomputed).abs().max() / logits.std().clamp(min=1e-6)
        if float(error) <= tolerance:
            return factor, softcap
    rank_zero_info(
        f"{type(lm.model).__name__}: the logits are not the output layer applied to the hidden states. They differ by "
        f"{float(error):.1e} of their standard deviation. Log-probs are computed from whole logits, which takes more "
        "memory and time."
    )
    return None, None
