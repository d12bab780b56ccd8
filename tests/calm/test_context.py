"""Tests of augments whose context is shorter than the rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import CALMDataModule, CALMModule
from lightning_align.calm.alignment import Alignment
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment, AugmentInput
from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.generation.sampler import GenerationConfig, generate
from tests.calm.test_module import trainer
from tests.calm.toys import SMALL, connect
from tests.toys import gap, tiny_palm

BYTES = ByteTokenizer()
CONTEXT = 16


def short(context: int = CONTEXT, *, wrapped: bool = True) -> Any:
    """A GPT-2 of bytes with learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lightning_align.models.pretrained import PretrainedLM

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": context}
    config = GPT2Config(vocab_size=259, bos_token_id=1, eos_token_id=2, **sizes)
    return PretrainedLM(config=config.to_dict()) if wrapped else GPT2LMHeadModel(config)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ab c" * n, "response": " d ef" * 3}) + "\n" for n in (1, 2, 3)))
    return str(path)


def data(rows: str, tmp_path: Path, **options: Any) -> CALMDataModule:
    return CALMDataModule(rows, validation=rows, predict=rows, batch_size=2, cache_dir=str(tmp_path), **options)


def test_own_tokenizer_reads_as_much_as_fits(rows: str, tmp_path: Path) -> None:
    subject = CALMModule(
        tiny_palm(num_tokens=259),
        [Augment(short(), tokens="own", num_connections=1)],
        generation=GenerationConfig(max_new_tokens=20, temperature=0),
    )
    source = data(rows, tmp_path, augment_tokenizers=["bytes"])
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    message = "augment 0 .PretrainedLM. has a context of 16 tokens, but a row is longer. It reads the first 16 tokens"
    with pytest.warns(UserWarning, match=message):
        fit.fit(subject, source)
    with pytest.warns(UserWarning, match="has a context of 16 tokens"):
        fit.validate(subject, source)
    with pytest.warns(UserWarning, match="has a context of 16 tokens"):
        assert len([row for part in fit.predict(subject, source) or [] for row in part]) == 3


@pytest.mark.parametrize("cached", [True, False])
def test_generation_goes_on_behind_the_context(cached: bool) -> None:
    augment = short() if cached else short(wrapped=False)
    model = connect(CALM(tiny_palm(num_tokens=259), Augment(augment, tokens="own", num_connections=1), connection=SMALL))
    model.alignment = Alignment(BYTES, [BYTES])
    assert (model.make_cache is not None) == cached
    assert model.max_seq_len is None, "the anchor goes on"
    prompts = [[1, *b"abcdefgh"], [1, *b"ab", 2, *b"abcdefghijklmnopqrs"]]
    config = GenerationConfig(max_new_tokens=12, temperature=0)
    if cached:
        with pytest.warns(UserWarning, match="has a context of 16 tokens"):
            found = [one.tokens for (one,) in generate(model, prompts, config)]
    for index, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        for _ in range(12):
            (given,) = model.alignment.inputs(tokens, num_prompts=[len(prompt)])
            assert given is not None
            assert given.ends is not None
            assert given.columns is not None
            first, ends, columns = (part[:, :CONTEXT] for part in (given.tokens, given.ends, given.columns))
            cut = AugmentInput(first, None, ends, given.anchor_ends, columns=columns)
            with torch.no_grad():
                logits = model(tokens, inputs=[cut])
            if given.tokens.shape[1] > CONTEXT:
                with pytest.warns(UserWarning, match=r"augment 0 .* has a context of 16 tokens, but a row is longer"):
                    assert gap(model(tokens, inputs=[given]), logits) == 0
            tokens = torch.cat((tokens, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        if cached:
            assert found[index] == tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ({}, 29, "augment 0 .PretrainedLM. has a context of 16 tokens, but a row has 29. Set `max_length`"),
        ({"alignment": "prefix"}, 13, "context of 12 tokens, but a prompt, which it reads as a prefix, has 13"),
    ],
)
def test_rows_that_are_too_long_raise_before_the_first_step(
    spec: dict[str, Any], size: int, message: str, rows: str, tmp_path: Path
) -> None:
    augment = Augment(short(CONTEXT if not spec else 12), num_connections=1, **spec)
    subject = CALMModule(tiny_palm(num_tokens=259), [augment])
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0)
    for run in (fit.fit, fit.validate):
        with pytest.raises(ValueError, match=message):
            run(subject, data(rows, tmp_path))
    assert fit.global_step == 0


def test_long_rows_with_short_prompts_are_read_as_prefixes(rows: str, tmp_path: Path) -> None:
    subject = CALMModule(tiny_palm(num_tokens=259), [Augment(short(14), num_connections=1, alignment="prefix")])
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(subject, data(rows, tmp_path))


def test_batches_from_elsewhere_raise() -> None:
    anchor, tokens = tiny_palm(num_tokens=259), torch.randint(3, 259, (2, 20))
    model = CALM(anchor, Augment(short(), num_connections=1), connection=SMALL)
    with pytest.raises(ValueError, match=r"augment 0 .* has a context of 16 tokens, but a row has 20"):
        model(tokens)
    model.release()
    model = CALM(anchor, Augment(short(), alignment="prefix", num_connections=1), connection=SMALL)
    with pytest.raises(ValueError, match="context of 16 tokens, but the prefix has 20"):
        model(tokens, inputs=[AugmentInput(tokens)])
