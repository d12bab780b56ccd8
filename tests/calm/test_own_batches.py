"""Tests of augments with their own tokenizers in training and generation: sources of batches, stored states, and models."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_align import CALMDataModule, CALMModule
from lightning_align.calm.alignment import Alignment
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from lightning_align.data.mixture import SourcePart
from lightning_align.data.tokenizer import ByteTokenizer, load_tokenizer
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.pretrained import PretrainedLM
from tests.calm.test_module import SGD, trainer
from tests.calm.toys import SMALL, connect
from tests.data.test_text_reader import make
from tests.toys import Plain, gap, largest_difference, state_of, tiny_palm

BYTES = ByteTokenizer()
ANIMALS = ("cat", "dog", "hippopotamus")


@pytest.fixture
def words(tmp_path: Path) -> str:
    make("byte level", tmp_path)
    return f"{tmp_path / 'byte level.json'}?bos=<s>&eos=</s>"


def write(path: Path, sounds: str) -> str:
    rows = [{"prompt": f"The {name} sat", "response": f" on the {sounds}."} for name in ANIMALS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def module(words: str, **options: Any) -> CALMModule:
    size = load_tokenizer(words).vocab_size
    augment = options.pop("augment", None) or tiny_palm(num_tokens=size, seed=1)
    options = {"connection": SMALL, "optimizer": SGD, **options}
    return CALMModule(tiny_palm(num_tokens=259), [Augment(augment, tokens="own", num_connections=1)], **options)


def texts(batch: Any, other: Any) -> list[tuple[str, str]]:
    """The texts of the rows of a batch, and what the augment reads of them."""
    (given,) = batch["augments"]
    pairs = []
    for tokens, mask, own, own_mask in zip(batch["tokens"], batch["mask"], given.tokens, given.mask, strict=True):
        pairs.append((BYTES.decode(tokens[mask].tolist()), other.decode(own[own_mask].tolist())))
    return pairs


@pytest.mark.parametrize("workers", [0, 1])
def test_parts_of_a_mixture(words: str, workers: int, tmp_path: Path) -> None:
    parts = [
        SourcePart(write(tmp_path / f"{name}.jsonl", name), weight=weight) for name, weight in (("mat", 1.0), ("roof", 2.0))
    ]
    data = CALMDataModule(parts, augment_tokenizers=[words], cache_dir=str(tmp_path), batch_size=2, num_workers=workers)
    data.prepare_data()
    data.setup("fit")
    pairs = [pair for batch in data.train_dataloader() for pair in texts(batch, load_tokenizer(words))]
    assert len(pairs) >= 4
    assert all(text == read for text, read in pairs)
    assert {text.split()[-1] for text, _ in pairs} == {"mat.", "roof."}


def test_packed_texts(words: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"The {name} sat on the mat. " * 3}) + "\n" for name in ANIMALS))
    data = CALMDataModule(str(path), augment_tokenizers=[words], cache_dir=str(tmp_path), max_length=40, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    pairs = [pair for batch in data.train_dataloader() for pair in texts(batch, load_tokenizer(words))]
    assert len(pairs) > 3
    assert all(text == read for text, read in pairs)


def without_inputs(batches: Any) -> list[Any]:
    return [{name: value for name, value in batch.items() if name != "augments"} for batch in batches]


def test_batches_without_inputs_train_the_same(words: str, tmp_path: Path) -> None:
    """The module makes the inputs that a loader has not made."""
    data = CALMDataModule(
        write(tmp_path / "rows.jsonl", "mat"), augment_tokenizers=[words], cache_dir=str(tmp_path), batch_size=2
    )
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    states = []
    for source in (batches, without_inputs(batches)):
        torch.manual_seed(0)
        subject = module(words)
        subject.configure_model()
        subject.policy.alignment = Alignment(BYTES, [load_tokenizer(words)])
        connect(subject.policy)
        loader: Any = DataLoader(source, batch_size=None)
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(subject, loader, loader)
        states.append(state_of(subject.policy.connections))
    assert largest_difference(*states) == 0
    with pytest.raises(ValueError, match=r"`inputs\[0\]` must be an AugmentInput with `ends`"):
        loader = DataLoader(without_inputs(batches), batch_size=None)  # type: ignore[arg-type]
        trainer(tmp_path, enable_checkpointing=False).fit(module(words), loader, loader)


def test_a_composition_scores_tokens_alone(words: str) -> None:
    """Losses that call a policy on tokens get the same as with inputs."""
    augment = tiny_palm(num_tokens=load_tokenizer(words).vocab_size, seed=1)
    model = connect(CALM(tiny_palm(num_tokens=259), Augment(augment, tokens="own", num_connections=1), connection=SMALL))
    tokens = torch.tensor([BYTES.encode_batch(["The cat sat on the mat"])[0].ids])
    with pytest.raises(ValueError, match="Pass its tokens and the characters"):
        model(tokens)
    model.alignment = Alignment(BYTES, [load_tokenizer(words)])
    assert gap(model(tokens), model(tokens, inputs=model.alignment.inputs(tokens))) == 0
    assert gap(model(tokens), model.anchor(tokens)) > 0
    assert copy.deepcopy(model).alignment is model.alignment


def test_stored_states_train_the_same(words: str, tmp_path: Path) -> None:
    states = []
    for folder in (None, str(tmp_path / "states")):
        data = CALMDataModule(
            write(tmp_path / "rows.jsonl", "mat"), augment_tokenizers=[words], cache_dir=str(tmp_path), batch_size=2
        )
        subject = module(words, store_states=folder)
        subject.configure_model()
        torch.manual_seed(0)
        connect(subject.policy)
        trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(subject, data)
        states.append(state_of(subject.policy.connections))
    assert largest_difference(*states) < 1e-5


def llama(size: int, **options: Any) -> PretrainedLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": size, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return PretrainedLM(config={**config, **sizes, **options})


def gpt2(size: int) -> PretrainedLM:
    return PretrainedLM(config={"model_type": "gpt2", "vocab_size": size, "n_embd": 16, "n_layer": 2, "n_head": 2})


def windowed(size: int) -> PretrainedLM:
    return llama(size, model_type="mistral", sliding_window=4)


MODELS = {"llama": (llama, True), "gpt2": (gpt2, True), "sliding window": (windowed, False), "plain": (None, False)}


@pytest.mark.parametrize("kind", MODELS)
def test_models_decode_as_they_read(kind: str, words: str, tmp_path: Path) -> None:
    """Rows of a batch that are decoded together get the tokens of one pass, whether the model has a usable cache or not."""
    make_model, has_cache = MODELS[kind]
    other = load_tokenizer(words)
    torch.manual_seed(0)
    augment: Any = make_model(other.vocab_size) if make_model else Plain(tiny_palm(num_tokens=other.vocab_size, seed=1))
    layers = None if make_model else "model.blocks.*"
    model = CALM(tiny_palm(num_tokens=259), Augment(augment, tokens="own", num_connections=1, layers=layers), connection=SMALL)
    connect(model)
    model.alignment = Alignment(BYTES, [other])
    assert (model.make_cache is not None) == has_cache
    subject = CALMModule(tiny_palm(num_tokens=259), [Augment(augment)])
    subject.policy = model
    prompts = [BYTES.encode_batch([text])[0].ids for text in ("The cat", "The dog sat on the m", "é 🙂")]
    config = GenerationConfig(max_new_tokens=10, temperature=0)
    found = [one.tokens for (one,) in subject.continue_prompts(prompts, config)]
    for prompt, got in zip(prompts, found, strict=True):
        tokens: Tensor = torch.tensor([prompt])
        for _ in range(10):
            with torch.no_grad():
                logits = model(tokens, inputs=model.alignment.inputs(tokens, num_prompts=[len(prompt)]))
            tokens = torch.cat((tokens, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        assert got == tokens[0, len(prompt) :].tolist()


def test_each_token_is_read_at_most_a_few_times(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns that the augment reads grow linearly with the generated tokens."""
    other = load_tokenizer(words)
    augment = tiny_palm(num_tokens=other.vocab_size, seed=1)
    model = connect(CALM(tiny_palm(num_tokens=259), Augment(augment, tokens="own", num_connections=1), connection=SMALL))
    model.alignment = Alignment(BYTES, [other])
    read = 0
    original = model.readers[0].read

    def count(tokens: Tensor, *rest: Any) -> Any:
        nonlocal read
        read += tokens.numel()
        return original(tokens, *rest)

    monkeypatch.setattr(model.readers[0], "read", count)
    prompts = [BYTES.encode_batch([text])[0].ids for text in ("The cat", "The dog sat on the m")]
    generate(model, prompts, GenerationConfig(max_new_tokens=300, temperature=1.0), eos_id=None)
    assert 100 < read < 6 * 2 * 300
