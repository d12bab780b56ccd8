"""Checkpoints of PaLM-rlhf-pytorch 0.8.0 give the same logits here. Also shows defects of the original that PaLM lacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from palm_rlhf_pytorch import PaLM as Theirs
from torch import Tensor

from lightning_align.models.lora import use_lora
from lightning_align.models.palm_import import load_palm_rlhf

SIZES: dict[str, Any] = {"num_tokens": 23, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "ff_mult": 2, "lora_r": 3}


def theirs(**overrides: Any) -> Theirs:
    """Build the original model with random values for all weights, including gains and adapters."""
    model = Theirs(**SIZES, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def save(model: Theirs, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "palm.pt")
    return folder / "palm.pt"


def tokens_of() -> Tensor:
    return torch.randint(23, (3, 12))


@pytest.mark.parametrize("qk_rmsnorm", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"causal": False}, {"rotary_xpos_scale_base": 64}], ids=["", "encoder", "xpos"])
def test_the_logits_equal_the_original(overrides: dict[str, Any], qk_rmsnorm: bool, tmp_path: Path) -> None:
    model, tokens = theirs(qk_rmsnorm=qk_rmsnorm, **overrides), tokens_of()
    ours_name = {"causal": "causal", "rotary_xpos_scale_base": "xpos_scale_base"}
    loaded = load_palm_rlhf(save(model, tmp_path), **{ours_name[name]: v for name, v in overrides.items()})
    expected = model(tokens)
    assert float(expected.detach().std()) > 0.3
    torch.testing.assert_close(loaded(tokens), expected, rtol=0, atol=1e-5)
    # With the other convention, all gains are off by one and the logits differ.
    shifted = load_palm_rlhf(save(model, tmp_path), gain="plain")
    assert float((shifted(tokens) - expected).detach().abs().max()) > 0.1


@torch.no_grad()
def test_extra_embeddings_are_added_as_in_the_original(tmp_path: Path) -> None:
    model, tokens, extra = theirs(), tokens_of(), torch.randn(3, 12, 16)
    loaded = load_palm_rlhf(save(model, tmp_path))
    expected = model(tokens, extra_embed=extra)
    torch.testing.assert_close(loaded(tokens, extra_embed=extra), expected, rtol=1e-4, atol=1e-5)
    assert (expected - model(tokens)).abs().max() > 0.1
    # With a cache, and for documents in one row.
    cache = loaded.make_cache(3, 12)
    parts = [
        loaded(tokens[:, :5], cache=cache, extra_embed=extra[:, :5]),
        loaded(tokens[:, 5:], cache=cache, extra_embed=extra[:, 5:]),
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    documents = torch.arange(3).repeat_interleave(12)[None]
    packed = loaded(tokens.view(1, -1), documents=documents, extra_embed=extra.view(1, -1, 16))
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_older_checkpoints_store_the_gain_itself(tmp_path: Path) -> None:
    model, tokens = theirs(), tokens_of()
    state = {name: value + 1 if name.endswith("gamma") else value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "old.pt")
    loaded = load_palm_rlhf(tmp_path / "old.pt", gain="plain")
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gain", ["offset", "plain"])
def test_the_layout_is_told_from_the_values(gain: str, tmp_path: Path) -> None:
    model, tokens = theirs(), tokens_of()
    state = {n: v + 1 if n.endswith("gamma") and gain == "plain" else v for n, v in model.state_dict().items()}
    torch.save(state, tmp_path / "palm.pt")
    if gain == "plain":
        with pytest.warns(UserWarning, match=r"read as the gains themselves.*Pass gain='plain' to confirm"):
            loaded = load_palm_rlhf(tmp_path / "palm.pt")
    else:
        loaded = load_palm_rlhf(tmp_path / "palm.pt")
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [-0.6, 0.5, 1.7])
def test_gains_that_do_not_tell_are_an_error(shift: float, tmp_path: Path) -> None:
    state = {n: torch.full_like(v, shift) if n.endswith("gamma") else v for n, v in theirs().state_dict().items()}
    torch.save(state, tmp_path / "palm.pt")
    with pytest.raises(ValueError, match="which is neither near 0"):
        load_palm_rlhf(tmp_path / "palm.pt")
    load_palm_rlhf(tmp_path / "palm.pt", gain="plain")


def test_finetune_scopes_become_lora_scopes(tmp_path: Path) -> None:
    model, tokens = theirs(finetune_scopes=("actor", "reward")), tokens_of()
    loaded = load_palm_rlhf(save(model, tmp_path))
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=1e-5)
    for scope in ("actor", "reward"):
        use_lora(loaded, scope)
        expected = model(tokens, finetune_scope=scope)
        assert float((expected - model(tokens)).detach().abs().max()) > 0.1
        torch.testing.assert_close(loaded(tokens), expected, rtol=0, atol=1e-4)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt must be a checkpoint of PaLM-rlhf-pytorch"):
        load_palm_rlhf(tmp_path / "other.pt")


def test_unknown_gains_are_named(tmp_path: Path) -> None:
    path = save(theirs(), tmp_path)
    with pytest.raises(ValueError, match=r"`gain` must be 'auto', 'offset' .* but got 'minus'"):
        load_palm_rlhf(path, gain="minus")


def test_their_caches_do_not_survive_inference_mode() -> None:
    """The original registers rotations in ``forward``. Those of an inference-mode pass cannot be used in training."""
    model = theirs()
    with torch.inference_mode():
        model(tokens_of())
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(tokens_of()).sum().backward()


def test_their_residual_overwrites_tensors_that_hooks_stored() -> None:
    model = theirs()
    kept: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        model(tokens_of())
    assert kept[0] is kept[1]
