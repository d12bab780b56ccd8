"""Reading of neighbors with copies of the decoder's own attention, against the attention of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align import RETRO, RETROModule
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.checkpoint import load_policy
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.model import NeighborTokens
from lightning_align.retro.reuse import GATE_SCALE
from tests.retro import conftest
from tests.retro.test_decoding import PROMPTS, recomputed
from tests.retro.test_module import SGD, data, trainer
from tests.retro.toys import FAMILIES, SIZE, ToyRetriever, decoder_of, reusing, tokens_and_neighbors
from tests.toys import gap, tiny_palm

pytest.importorskip("transformers", reason="needs transformers")


@torch.no_grad()
def slow_hidden(model: RETRO, tokens: Tensor, neighbors: NeighborTokens) -> Tensor:
    """The final hidden states of a row, token by token, with the attention modules of transformers."""
    language: Any = model.decoder
    inner, size = language.model.model, model.chunk_size
    states = {}
    for chunk in range(neighbors.tokens.shape[1]):
        for number in range(neighbors.tokens.shape[2]):
            kept = neighbors.tokens[0, chunk, number][neighbors.mask[0, chunk, number]]
            if len(kept):
                states[chunk, number] = inner(input_ids=kept[None], output_hidden_states=True).hidden_states

    def read(index: int, x: Tensor) -> Tensor:
        layer, gate = model.blocks[model.cross_layers[index] - 1], GATE_SCALE * model.cross[index].gate  # type: ignore[union-attr, operator]
        attention: Any = layer.self_attn
        out = torch.zeros_like(x)
        for place in range(size - 1, x.shape[1]):
            chunk = (place + 1) // size - 1
            depth = model.cross_layers[index] - 1
            found = [states[chunk, number][depth][0] for number in range(2) if (chunk, number) in states]
            if not found:
                continue
            row = torch.cat([*found, x[0, place : place + 1]])
            where = torch.cat([*(torch.arange(len(each)) for each in found), torch.tensor([size - 1 + (place + 1) % size])])
            hidden = torch.zeros(len(row), dtype=torch.bool)
            hidden[-1] = True  # the query does not see itself
            mask = torch.zeros(1, 1, len(row), len(row), dtype=x.dtype).masked_fill(hidden, float("-inf"))
            heads: list[Tensor] = []
            handle = attention.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0][0, -1]))  # noqa: B023
            attention(
                hidden_states=layer.input_layernorm(row[None]),  # type: ignore[operator]
                position_embeddings=inner.rotary_emb(row[None], where[None]),
                attention_mask=mask,
            )
            handle.remove()
            gated = (heads[0].view(4, -1) * gate[:, None]).flatten()
            out[0, place] = gated @ attention.o_proj.weight.T
        return out

    with model.reading(read):
        return model.decoder.hidden(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_attention_of_the_layer_computes(family: str) -> None:
    model = reusing(decoder_of(family, attn_implementation="eager"))
    tokens, neighbors = tokens_and_neighbors(1, 3 * SIZE + 2)
    got = model.hidden(tokens, neighbors=neighbors)
    assert gap(got, slow_hidden(model, tokens, neighbors)) < 1e-10
    assert gap(got, model.hidden(tokens)) > 1e-2


def test_it_starts_without_effect_and_every_copy_learns() -> None:
    model = reusing(decoder_of("qwen3"), gate=None)
    tokens, neighbors = tokens_and_neighbors(2, 3 * SIZE)
    assert torch.equal(model.hidden(tokens, neighbors=neighbors), model.hidden(tokens))
    model.hidden(tokens, neighbors=neighbors).square().sum().backward()
    assert all(cross.gate.grad.abs().min() > 0 for cross in model.cross)  # type: ignore[union-attr, operator]
    model = reusing(decoder_of("qwen3"))
    model.hidden(tokens, neighbors=neighbors).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("cross.") for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_by_default_the_last_third_of_the_layers_reads() -> None:
    model = reusing(decoder_of("llama", num_hidden_layers=7), cross_layers=None)
    assert model.cross_layers == (5, 6, 7) and len(model.cross) == 3


def test_neighbors_are_encoded_alone_without_their_padding_and_without_the_layers_above() -> None:
    model = reusing(decoder_of("llama"), cross_layers=[1, 2])
    tokens, neighbors = tokens_and_neighbors(1, 2 * SIZE)
    seen: list[int] = []
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: seen.append(1))
    flat = NeighborTokens(neighbors.tokens[0], neighbors.mask[0])
    encodings = model.encode(flat)
    handle.remove()
    assert not seen
    language: Any = model.decoder
    for place in (0, 1):
        for number in (0, 1):
            kept = flat.tokens[place, number][flat.mask[place, number]]
            if len(kept):
                wanted = language.model.model(input_ids=kept[None], output_hidden_states=True).hidden_states
                assert gap(encodings[place, number, : len(kept)], torch.cat(wanted[:2], dim=-1)[0]) < 1e-12
    stored = model.hidden(tokens, neighbors=neighbors, encodings=encodings[None])
    assert gap(stored, model.hidden(tokens, neighbors=neighbors)) < 1e-12


def test_generation_equals_full_recomputation() -> None:
    model = reusing(decoder_of("qwen2"))
    decoder = RetrievalDecoder(model, ToyRetriever(), num_neighbors=2)
    results = generate(decoder, PROMPTS, GenerationConfig(max_new_tokens=3 * SIZE, temperature=0.0), eos_id=99)
    for prompt, (result,) in zip(PROMPTS, results, strict=True):
        row = list(prompt)
        for _ in range(3 * SIZE):
            row.append(int(recomputed(model, row, 2)[-1].argmax()))
        assert result.tokens == row[len(prompt) :]


def test_a_checkpoint_holds_what_was_learned(database: RetrievalDatabase, tmp_path: Path) -> None:
    fitted = RETROModule(
        RETRO(
            decoder_of("llama", vocab_size=259).train(),
            chunk_size=conftest.SIZE,
            cross_layers=[2],
            train_decoder=False,
            reuse_decoder=True,
        ),
        optimizer=SGD,
    )
    fitted.configure_model()
    before = {name: value.clone() for name, value in fitted.policy.state_dict().items()}
    run = trainer(tmp_path)
    run.fit(fitted, data(database))
    after = fitted.policy.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "cross.0.gate" in moved and all(name.startswith("cross.") for name in moved)
    run.save_checkpoint(tmp_path / "kept.ckpt")
    loaded: Any = load_policy(tmp_path / "kept.ckpt")
    batch = next(iter(data(database).val_dataloader()))
    given = batch["tokens"], batch["neighbors"].first(2)
    with torch.no_grad():
        wanted = fitted.policy.eval().hidden(given[0], neighbors=given[1])  # type: ignore[operator]
        assert torch.equal(loaded.eval().hidden(given[0], neighbors=given[1]), wanted)
        assert not torch.equal(fitted.policy.hidden(given[0]), wanted)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {"n_embd": 24, "n_layer": 3, "n_head": 4}, "whose layers have no q_proj, k_proj, v_proj, o_proj, input"),
        ("olmo2", {}, "whose layers have no input_layernorm"),
        ("opt", {"word_embed_proj_dim": 24, "ffn_dim": 32}, "whose layers have no o_proj, input_layernorm"),
        ("gemma2", {"attn_logit_softcapping": 0.05}, "a copy differs from it by"),
    ],
)
def test_attention_that_cannot_be_copied_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"`reuse_decoder` cannot copy the attention of .*{message}.*Use reuse_decoder=False"):
        reusing(decoder_of(family, **options))


def test_a_decoder_in_16_bits_is_copied() -> None:
    decoder = decoder_of("llama").to(torch.bfloat16)
    model = RETRO(decoder, chunk_size=SIZE, train_decoder=False, reuse_decoder=True)
    tokens, neighbors = tokens_and_neighbors(1, 2 * SIZE)
    assert model.hidden(tokens, neighbors=neighbors).dtype is torch.bfloat16
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.cross.parameters())


def test_other_decoders_and_a_decoder_that_trains_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot copy the attention of PaLM"):
        RETRO(tiny_palm(depth=3), train_decoder=False, reuse_decoder=True)
    with pytest.raises(ValueError, match="`reuse_decoder` needs `train_decoder: false`, but got true"):
        RETRO(decoder_of("llama"), reuse_decoder=True)
    with pytest.raises(ValueError, match="start from the decoder"):
        reusing(decoder_of("llama")).reset_parameters()
