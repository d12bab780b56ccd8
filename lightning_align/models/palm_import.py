"""Converting checkpoints of PaLM-rlhf-pytorch."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_align.models.checkpoint import read_checkpoint
from lightning_align.models.lora import LoRAConfig, add_lora
from lightning_align.models.palm import PaLM, PaLMBlock


def load_palm_rlhf(path: str | Path, *, gain: str = "auto", **overrides: Any) -> PaLM:
    """Build a `PaLM` with the weights of a PaLM-rlhf-pytorch checkpoint. Its logits equal those of the original model.

    All sizes are inferred from the weights. Fine-tuning scopes become LoRA scopes of the same names. They are inactive until
    `use_lora` activates them.

    Args:
        path: A file written by ``torch.save(palm.state_dict(), path)``.
        gain: How layer norms are stored: `offset` for gain - 1 (version 0.8.0), `plain` for the gain itself (older versions).
            No file says which. `auto` compares their mean with 0 and 1, near which gains begin and mostly stay, and warns if it
            takes `plain`.
        overrides: Further arguments of `PaLM`, such as `causal` or `xpos_scale_base`, which the weights do not show.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        ValueError: If the file is not such a checkpoint, `gain` has another value, or the mean does not tell.
    """
    state: dict[str, Tensor] = read_checkpoint(path)["state_dict"]
    if "token_emb.weight" not in state or "layers.0.fn.fused_attn_ff_proj.weight" not in state:
        raise ValueError(
            f"{path} must be a checkpoint of PaLM-rlhf-pytorch, but has no token_emb.weight or no "
            f"layers.0.fn.fused_attn_ff_proj.weight among its {len(state)} entries."
        )
    if gain not in ("auto", "offset", "plain"):
        raise ValueError(f"`gain` must be 'auto', 'offset' (version 0.8.0) or 'plain' (older versions), but got {gain!r}.")
    if gain == "auto":
        gain = _stored_gain(state, path)
    inner = state["layers.0.fn.attn_out.weight"].shape[1]
    # The rows of the fused projection are the queries, one key head, one value head and both halves of the feed-forward layer.
    fused, feed_forward = state["layers.0.fn.fused_attn_ff_proj.weight"].shape[0], state["layers.0.fn.ff_out.2.weight"].shape[1]
    heads = inner * 2 // (fused - inner - 2 * feed_forward)
    num_tokens, dim = state["token_emb.weight"].shape
    qk_rmsnorm = "layers.0.fn.q_scale" in state
    model = PaLM(
        **{
            "num_tokens": num_tokens,
            "dim": dim,
            "depth": len({name.split(".")[1] for name in state if name.startswith("layers.")}),
            "heads": heads,
            "dim_head": inner // heads,
            "ff_mult": state["layers.0.fn.ff_out.2.weight"].shape[1] // dim,
            "variant": "palm_rlhf",
            "qk_rmsnorm": qk_rmsnorm,
            # PaLM-rlhf-pytorch does not pass its qk_scale on to the attention, which always scales by dim_head ** -0.5.
            "qk_scale": (inner // heads) ** -0.5 if qk_rmsnorm else 8.0,
            "tie_embeddings": True,
            **overrides,
        }
    )
    offset = 1.0 if gain == "offset" else 0.0
    converted = {"token_emb.weight": state["token_emb.weight"], "norm.weight": state["norm.gamma"] + offset}
    names = {
        "fused_attn_ff_proj.weight": "in_proj.weight",
        "attn_out.weight": "attn_out.weight",
        "ff_out.2.weight": "ff_out.weight",
        "q_scale": "q_gain",
        "k_scale": "k_gain",
    }
    for layer in range(len(model.blocks)):
        converted[f"blocks.{layer}.norm.weight"] = state[f"layers.{layer}.fn.norm.gamma"] + offset
        for source, target in names.items():
            if f"layers.{layer}.fn.{source}" in state:
                converted[f"blocks.{layer}.{target}"] = state[f"layers.{layer}.fn.{source}"]
    model.load_state_dict(converted)
    for scope in sorted({name.split(".")[1] for name in state if name.startswith("finetune_modules.")}):
        _add_scope(model, scope, state)
    return model.eval()


def _stored_gain(state: dict[str, Tensor], path: str | Path) -> str:
    """Tell from the values how layer norms are stored."""
    mean = float(torch.cat([value.flatten().float() for name, value in state.items() if name.endswith("norm.gamma")]).mean())
    if abs(mean) < 0.4:
        return "offset"
    if abs(mean - 1) < 0.4:
        warnings.warn(
            f"{path}: the layer norms have a mean of {mean:.2f}, so they are read as the gains themselves, as older versions "
            "of PaLM-rlhf-pytorch store them. Pass gain='plain' to confirm this, or gain='offset' if they are gain - 1.",
            stacklevel=3,
        )
        return "plain"
    raise ValueError(
        f"{path}: the layer norms have a mean of {mean:.2f}, which is neither near 0 (gain - 1, version 0.8.0) nor near 1 (the "
        "gain itself, older versions). Pass the `gain` of the version that wrote the file, 'offset' or 'plain'."
    )


def _add_scope(model: PaLM, scope: str, state: dict[str, Tensor]) -> None:
    """Add a fine-tuning scope as a LoRA scope.

    The original has separate adapters for queries, keys and values. They equal one adapter of three times the rank on the fused
    projection, in which A has the three A side by side and B is block-diagonal.
    """
    rank = state[f"finetune_modules.{scope}.0.0.A"].shape[1]
    add_lora(model, LoRAConfig(scope=scope, rank=3 * rank, alpha=3 * rank, targets=["in_proj"]), active=False)
    add_lora(model, LoRAConfig(scope=scope, rank=rank, alpha=rank, targets=["attn_out"]), active=False)
    adapters = {}
    for layer, block in enumerate(model.blocks):
        part = f"finetune_modules.{scope}.{layer}"
        assert isinstance(block, PaLMBlock)
        splits = block.splits
        up = torch.zeros(3 * rank, sum(splits))
        start = 0
        for index, width in enumerate(splits[:3]):
            up[index * rank : (index + 1) * rank, start : start + width] = state[f"{part}.{index}.B"]
            start += width
        adapters[f"blocks.{layer}.in_proj.lora.{scope}.A"] = torch.cat([state[f"{part}.{i}.A"] for i in range(3)], dim=1)
        adapters[f"blocks.{layer}.in_proj.lora.{scope}.B"] = up
        adapters[f"blocks.{layer}.attn_out.lora.{scope}.A"] = state[f"{part}.3.A"]
        adapters[f"blocks.{layer}.attn_out.lora.{scope}.B"] = state[f"{part}.3.B"]
    unexpected = model.load_state_dict(adapters, strict=False).unexpected_keys
    assert not unexpected, unexpected
