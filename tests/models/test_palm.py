"""PaLM against properties that define it and against an independent slow block."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_align.models.palm import PaLM, PaLMBlock
from tests.toys import VOCABULARY, gap, tiny_palm, token_batch

VARIANTS = [{}, {"variant": "paper"}, {"qk_rmsnorm": True}, {"xpos": False}, {"tie_embeddings": False}]
IDS = ["palm_rlhf", "paper", "qk_rmsnorm", "rotary", "untied"]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def tokens_of(rows: int = 3, columns: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("overrides", VARIANTS, ids=IDS)
def test_no_position_sees_a_later_one(overrides: dict[str, object]) -> None:
    model, tokens = tiny_palm(dtype=torch.float64, **overrides), tokens_of()
    before = model(tokens)
    for place in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        after = model(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=0)
        # Later positions must see the change, or the first assertion would prove nothing.
        assert float((after[:, place:] - before[:, place:]).detach().abs().amax(dim=(0, 2)).min()) > 1e-9


def test_an_encoder_sees_both_ways() -> None:
    model, tokens = tiny_palm(dtype=torch.float64, causal=False), tokens_of()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    assert gap(model(changed)[:, 0], model(tokens)[:, 0]) > 1e-9
    assert model.xpos_scale_base is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("overrides", VARIANTS[:3], ids=IDS[:3])
def test_padding_changes_nothing(overrides: dict[str, object], side: str, causal: bool) -> None:
    model = tiny_palm(dtype=torch.float64, causal=causal, **overrides)
    rows = [tokens_of(1, length)[0] for length in (3, 7, 5)]
    tokens, mask = torch.full((3, 7), 11), torch.zeros(3, 7, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(7 - len(row), 7) if side == "left" else slice(0, len(row))
        tokens[index, place], mask[index, place] = row, True
    logits = model(tokens, mask=mask)
    for index, row in enumerate(rows):
        # Padding on the left moves the row. Its float32 rotations differ, but their differences are the same.
        precision = 1e-5 if side == "left" else 1e-12
        torch.testing.assert_close(logits[index, mask[index]], model(row[None])[0], rtol=0, atol=precision)
    assert bool(logits.isfinite().all())


def test_gradients_stay_finite_under_left_padding() -> None:
    model, tokens = tiny_palm(), tokens_of()
    mask = torch.arange(9)[None, :] >= torch.tensor([[0], [4], [8]])
    model(tokens, mask=mask)[mask].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_custom_mask_is_followed() -> None:
    """Two segments in one row behave as two rows, and a mask without the diagonal is not changed."""
    model, tokens = tiny_palm(dtype=torch.float64), tokens_of(1, 9)
    segment = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    mask = (segment[:, None] == segment[None, :])[None]
    together = model(tokens, mask=mask)
    torch.testing.assert_close(together[:, :4], model(tokens[:, :4]), **EXACT)
    torch.testing.assert_close(together[:, 4:], model(tokens[:, 4:]), rtol=0, atol=1e-5)  # at other positions
    # Position 1 may only see position 0, so its own key must not affect its output.
    only_first = torch.zeros(1, 2, 2, dtype=torch.bool)
    only_first[:, :, 0] = True
    block = model.blocks[0]
    seen: list[Tensor] = []
    handle = block.attn_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens[:, :2], mask=only_first)
    handle.remove()
    torch.testing.assert_close(seen[0][:, 0], seen[0][:, 1], **EXACT)


@pytest.mark.parametrize("overrides", VARIANTS[:4], ids=IDS[:4])
def test_only_relative_positions_matter(overrides: dict[str, object]) -> None:
    # The rotation itself is float32, so float64 weights agree to float32's precision of angle 2,000 * 1, about 2e-4.
    model, tokens = tiny_palm(**overrides), tokens_of()
    logits = model(tokens)
    for shift in (1, 64, 1024):
        torch.testing.assert_close(model(tokens, positions=torch.arange(9) + shift), logits, rtol=0, atol=5e-4)
    stretched = model(tokens, positions=torch.arange(9) * 3)
    assert gap(stretched, logits) > 1e-2


def test_xpos_decays_with_distance_and_plain_rotary_does_not() -> None:
    from lightning_align.models.palm import rotary, rotate

    q = k = torch.ones(1, 8)
    lengths = {}
    for base in (8.0, None):
        table = rotary(torch.tensor([0, 40]), 8, xpos_scale_base=base)
        far = rotate(q, table.q_cos[1], table.q_sin[1]) @ rotate(k, table.k_cos[:1], table.k_sin[:1]).T
        # With equal vectors the plain product is a sum of cosines of the distance, each scaled by s^(distance / base).
        angles = 40 * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
        scale = torch.ones(4) if base is None else ((torch.arange(0, 8, 2) + 3.2) / 11.2) ** (40 / base)
        torch.testing.assert_close(far.squeeze(), 2 * (angles.cos() * scale).sum(), rtol=1e-4, atol=1e-4)
        lengths[base] = scale
    assert float(lengths[8.0].max()) < float(lengths[None].min())


@pytest.mark.parametrize("overrides", VARIANTS, ids=IDS)
def test_the_cache_changes_nothing(overrides: dict[str, object]) -> None:
    model, tokens = tiny_palm(dtype=torch.float64, **overrides), tokens_of()
    full = model(tokens)
    for cuts in ([5, 1, 1, 1, 1], [1] * 9, [4, 3, 2], [9]):
        cache, parts, start = model.make_cache(3, 12), [], 0
        for size in cuts:
            parts.append(model(tokens[:, start : start + size], cache=cache))
            start += size
        assert cache.length == 9
        torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_the_cache_takes_ragged_rows_padded_on_the_left() -> None:
    model = tiny_palm()
    lengths = torch.tensor([3, 6, 1])
    rows = [tokens_of(1, int(length) + 4)[0] for length in lengths]
    starts = (6 - lengths)[:, None]
    exists = torch.arange(10) >= starts
    positions = (torch.arange(10) - starts).clamp(min=0)
    tokens = torch.zeros(3, 10, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, int(starts[index]) :] = row
    cache = model.make_cache(3, 10)
    parts = [model(tokens[:, :6], mask=exists[:, :6], positions=positions[:, :6], cache=cache)]
    for place in range(6, 10):
        column = slice(place, place + 1)
        step = model(tokens[:, column], mask=exists[:, : place + 1], positions=positions[:, column], cache=cache)
        parts.append(step)
    logits = torch.cat(parts, dim=1)
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, exists[index]], model(row[None])[0], rtol=0, atol=1e-5)


def test_a_full_cache_is_an_error() -> None:
    model = tiny_palm()
    with pytest.raises(ValueError, match="must have at least 9 columns, but has 4"):
        model(tokens_of(), cache=model.make_cache(3, 4))


@pytest.mark.parametrize("overrides", VARIANTS, ids=IDS)
def test_packing_changes_nothing(overrides: dict[str, object]) -> None:
    model, batch = tiny_palm(dtype=torch.float64, **overrides), token_batch([2, 3, 4], [5, 1, 3])
    hidden = model.hidden(batch["tokens"])[batch["mask"]]
    torch.testing.assert_close(model.packed_hidden(batch["tokens"], batch["mask"]), hidden, **EXACT)


def test_packing_needs_causality() -> None:
    model, batch = tiny_palm(causal=False), token_batch([2, 3], [5, 1])
    with pytest.raises(ValueError, match="needs `causal=True`"):
        model.packed_hidden(batch["tokens"], batch["mask"])


def test_the_qk_scale_reaches_attention() -> None:
    """With normalized queries and keys, weights can differ by e^16 at scale 8, and are nearly uniform at dim_head ** -0.5."""
    models = {scale: tiny_palm(qk_rmsnorm=True, qk_scale=scale) for scale in (8.0, 8**-0.5)}
    block = models[8.0].blocks[0]
    assert isinstance(block, PaLMBlock) and block.scale == 8.0
    logits = [model(tokens_of()) for model in models.values()]
    assert gap(logits[0], logits[1]) > 0.1


def test_initial_statistics() -> None:
    torch.manual_seed(1)
    sizes = {"num_tokens": 400, "dim": 256, "depth": 1, "heads": 4, "dim_head": 32}
    paper, ours = PaLM(**sizes, variant="paper"), PaLM(**sizes)
    assert float(paper.token_emb.weight.detach().std()) == pytest.approx(1.0, rel=0.02)
    assert float(ours.token_emb.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for name, fan_in in (("in_proj", 256), ("attn_out", 128), ("ff_out", 1024)):
        assert float(getattr(paper.blocks[0], name).weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.02)
        # Kaiming-uniform with a = sqrt(5) is U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
        assert float(getattr(ours.blocks[0], name).weight.detach().std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    # Unit embeddings times a normalized hidden state give logits of size 16. Scaled by 1/sqrt(dim), they have size 1.
    tokens = torch.randint(400, (4, 16))
    hidden = paper.norm(torch.randn(4, 16, 256)) @ paper.token_emb.weight.T
    assert float(hidden.detach().std()) == pytest.approx(16, rel=0.1)
    assert 0.7 < float(paper(tokens).detach().std()) < 1.5
    assert paper.xpos_scale_base is None and ours.xpos_scale_base == 512


@pytest.mark.parametrize("overrides", VARIANTS, ids=IDS)
def test_hidden_times_head_are_the_logits(overrides: dict[str, object]) -> None:
    model = tiny_palm(**overrides)
    logits = model.hidden(tokens_of()) @ model.head.weight.T
    torch.testing.assert_close(model(tokens_of()), logits, rtol=0, atol=1e-5)
    assert (model.head.weight is model.token_emb.weight) == (model.to_logits is None)
    assert sum("token_emb" in name or "to_logits" in name for name in model.state_dict()) == (
        1 if model.to_logits is None else 2
    )


@pytest.mark.parametrize("overrides", VARIANTS, ids=IDS)
def test_built_on_meta_it_is_the_same_model(overrides: dict[str, object]) -> None:
    sizes = {"num_tokens": 23, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
    normal = PaLM(**sizes, **overrides)
    torch.manual_seed(3)
    normal.reset_parameters()
    with torch.device("meta"):
        model = PaLM(**sizes, **overrides)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)  # a parameter that reset_parameters forgets must fail the test
    torch.manual_seed(3)
    model.reset_parameters()
    torch.testing.assert_close(model(tokens_of()), normal(tokens_of()), rtol=0, atol=0)


def test_training_after_inference_mode() -> None:
    model = tiny_palm()
    with torch.inference_mode():
        model(tokens_of())
    model(tokens_of()).sum().backward()
    assert model.token_emb.weight.grad is not None


def test_it_has_no_state_except_its_parameters() -> None:
    model = tiny_palm()
    model(tokens_of())
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_hooks_keep_what_they_saw() -> None:
    """A residual added in place would change the hidden state that a hook stored from the previous layer."""
    model = tiny_palm(depth=3)
    kept: list[Tensor] = []
    copies: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: (kept.append(out), copies.append(out.clone()), None)[2])
    with torch.no_grad():
        model(tokens_of())
    for index in range(3):
        torch.testing.assert_close(kept[index], copies[index], rtol=0, atol=0)
    assert gap(kept[0], kept[1]) > 0.1


def slow_block(block: PaLMBlock, x: Tensor, *, causal: bool, xpos_scale_base: float | None) -> Tensor:
    """Compute one layer in float64 with loops over rows, heads, queries and keys: y = x + Attention(LN(x)) + MLP(LN(x))."""
    weights = {name: p.detach().double() for name, p in block.named_parameters()}
    x = x.detach()
    rows, columns, _ = x.shape
    heads, width = block.heads, block.splits[1]
    y = x.clone()
    for b in range(rows):
        mean, var = x[b].mean(-1, keepdim=True), x[b].var(-1, keepdim=True, unbiased=False)
        n = (x[b] - mean) / (var + 1e-5).sqrt() * weights["norm.weight"]
        fused = n @ weights["in_proj.weight"].T
        q, k = fused[:, : heads * width].view(columns, heads, width), fused[:, heads * width : (heads + 1) * width]
        v = fused[:, (heads + 1) * width : (heads + 2) * width]
        up, gate = fused[:, (heads + 2) * width :].chunk(2, dim=-1)
        y[b] += (up * gate * torch.sigmoid(gate)) @ weights["ff_out.weight"].T
        if block.qk_rmsnorm:
            q = q / q.norm(dim=-1, keepdim=True) * weights["q_gain"]
            k = k / k.norm(dim=-1, keepdim=True) * weights["k_gain"]
        out = torch.zeros(columns, heads, width, dtype=torch.float64)
        for h in range(heads):
            for i in range(columns):
                scores = {}
                for j in range(i + 1 if causal else columns):
                    score = 0.0
                    # Each pair (d, d + width/2) is a complex number. Rotating query and key by their positions leaves the
                    # rotation by their distance.
                    for d in range(width // 2):
                        frequency = 10_000.0 ** (-2 * d / width)
                        zq = complex(q[i, h, d], q[i, h, d + width // 2])
                        zk = complex(k[j, d], k[j, d + width // 2])
                        turned = zq * zk.conjugate() * complex(math.cos((i - j) * frequency), math.sin((i - j) * frequency))
                        decay = 1.0
                        if xpos_scale_base is not None:
                            decay = ((2 * d + 0.4 * width) / (1.4 * width)) ** ((i - j) / xpos_scale_base)
                        score += turned.real * decay
                    scores[j] = block.scale * score
                top = max(scores.values())
                total = sum(math.exp(s - top) for s in scores.values())
                for j, s in scores.items():
                    out[i, h] += math.exp(s - top) / total * v[j]
        y[b] += out.flatten(1) @ weights["attn_out.weight"].T
    return y


@pytest.mark.parametrize("overrides", [{}, {"xpos_scale_base": 8.0}, {"xpos": False}, {"qk_rmsnorm": True}, {"causal": False}])
def test_a_block_follows_the_paper(overrides: dict[str, object]) -> None:
    model = tiny_palm(dtype=torch.float64, depth=1, **overrides)
    tokens = tokens_of(2, 5)
    block = model.blocks[0]
    assert isinstance(block, PaLMBlock)
    seen: list[Tensor] = []
    block.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    model(tokens)
    expected = slow_block(block, seen[0], causal=model.causal, xpos_scale_base=model.xpos_scale_base)
    # Rotations are float32 by design; everything else is float64 here.
    torch.testing.assert_close(seen[1], expected, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_palm(attn_dropout=0.5, ff_dropout=0.0)
    assert gap(model(tokens_of()), model(tokens_of())) > 0
    model.eval()
    torch.testing.assert_close(model(tokens_of()), model(tokens_of()), rtol=0, atol=0)


def test_bfloat16_keeps_positions_apart() -> None:
    model, tokens = tiny_palm(), tokens_of()
    positions = torch.arange(9) + 8192
    with torch.autocast("cpu", torch.bfloat16):
        near, far = model(tokens), model(tokens, positions=positions)
    # Rotations rounded to bfloat16 at 8,192 (spacing 32) would give all nine positions one angle.
    assert gap(near.float(), far.float()) < 0.1 * float(near.detach().float().abs().max())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dim_head": 7}, "`dim_head` must be even and at least 2 for rotary positions, but got 7"),
        ({"dim_head": 0}, "`dim_head` must .* but got 0"),
        ({"heads": 0}, "`heads` must be at least 1, but got 0"),
        ({"num_tokens": 0}, "`num_tokens` must be at least 1, but got 0"),
        ({"depth": -1}, "`depth` must be at least 1, but got -1"),
    ],
)
def test_impossible_sizes_are_named(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_palm(**overrides)


def test_it_can_be_built_again_from_its_arguments() -> None:
    model = tiny_palm(qk_rmsnorm=True, tie_embeddings=False)
    again = PaLM(**model.init_args)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(tokens_of()), model(tokens_of()), rtol=0, atol=0)
