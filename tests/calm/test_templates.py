"""Tests of conversations that an augment reads as the chat template of its own tokenizer writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import CALMDataModule, CALMModule
from lightning_align.calm.spec import Augment, AugmentInput
from lightning_align.calm.text import OwnTokenizer
from lightning_align.data.tokenizer import Tokenizer, load_tokenizer
from lightning_align.generation.sampler import GenerationConfig
from tests.calm.test_module import trainer
from tests.calm.toys import SMALL, connect
from tests.data.chats import PLAIN, answer, system, user
from tests.data.helpers import chat_tokenizer
from tests.toys import gap, tiny_palm

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>"
    "{% elif m.role == 'system' %}<<{{ m.content }}>> {% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
CHAT = [system("Be brief."), user("Größe of a cat?"), answer("46 cm, um den Dreh"), user("And a dog?"), answer("It varies.")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of tokenizers by their templates."""
    made = {}
    for name, template in (("chatml", PLAIN), ("inst", INST)):
        folder = tmp_path_factory.mktemp(name)
        chat_tokenizer(template, folder)
        made[name] = str(folder / "tokenizer")
    return {**made, "bytes": "bytes"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def batch_of(tmp_path: Path, anchor: str, augment: str, *rows: dict[str, Any], **options: Any) -> tuple[Any, AugmentInput]:
    """The first batch, and what the augment gets of it."""
    path = write(tmp_path / "rows.jsonl", *rows)
    data = CALMDataModule(
        path, tokenizer=anchor, augment_tokenizers=[augment], batch_size=8, cache_dir=str(tmp_path / "cache"), **options
    )
    data.prepare_data()
    data.setup("fit")
    batch: Any = next(iter(data.train_dataloader()))
    (given,) = batch["augments"]
    return batch, given


def seen(given: AugmentInput, tokenizer: Tokenizer, column: int, row: int = 0) -> str:
    """The text that the augment has read for a column, with special tokens."""
    assert given.mask is not None
    assert given.columns is not None
    visible = given.mask[row] & (given.columns[row] <= column)
    return tokenizer.decode(given.tokens[row][visible].tolist(), skip_special=False)


@pytest.mark.parametrize("anchor", ["bytes", "chatml"])
def test_augment_reads_its_own_template(anchor: str, folders: dict[str, str], tmp_path: Path) -> None:
    batch, given = batch_of(tmp_path, folders[anchor], folders["inst"], {"messages": CHAT[:3]})
    other = load_tokenizer(folders["inst"])
    start = int(batch["targets"].int().argmax())
    prompt = "<bos><<Be brief.>> [INST] Größe of a cat? [/INST]"
    assert seen(given, other, start - 2) == ""
    assert seen(given, other, start - 1) == prompt
    width = batch["tokens"].shape[1]
    last = int(batch["targets"].nonzero()[-1, 1])
    assert seen(given, other, width - 1) == f"{prompt}46 cm, um den Dreh<|im_end|>"
    assert "<|im_end|>" not in seen(given, other, last - 1)
    # The augment has never read more of the answer than the anchor.
    mine = load_tokenizer(folders[anchor])
    for column in range(start, last):
        written = mine.decode(batch["tokens"][0, start : column + 1].tolist()).strip()
        assert written.startswith(seen(given, other, column).removeprefix(prompt).strip()) or "\ufffd" in written


def test_turns_are_aligned_one_by_one(folders: dict[str, str], tmp_path: Path) -> None:
    batch, given = batch_of(tmp_path, folders["chatml"], folders["inst"], {"messages": CHAT}, mask_turns="assistant_only")
    other, targets = load_tokenizer(folders["inst"]), batch["targets"][0].int().diff()
    starts = (targets == 1).nonzero()[:, 0] + 1
    stops = (targets == -1).nonzero()[:, 0] + 1
    first, second = (int(start) for start in starts)
    begin = "<bos><<Be brief.>> [INST] Größe of a cat? [/INST]"
    assert seen(given, other, first - 1) == begin
    assert seen(given, other, int(stops[0]) - 1) == f"{begin}46 cm, um den Dreh<|im_end|>"
    assert seen(given, other, second - 2) == f"{begin}46 cm, um den Dreh<|im_end|>"
    assert seen(given, other, second - 1) == f"{begin}46 cm, um den Dreh<|im_end|>[INST] And a dog? [/INST]"
    assert seen(given, other, 10**6) == f"{begin}46 cm, um den Dreh<|im_end|>[INST] And a dog? [/INST]It varies.<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ({"messages": CHAT[:3]}, {"augment_chat_templates": False}),
        ({"messages": CHAT[:3]}, {"mask_turns": "all"}),
        ({"prompt": "Größe of a cat?", "response": " 46"}, {}),
    ],
    ids=["off", "all is trained", "texts"],
)
def test_augment_reads_the_text_of_the_anchor(
    rows: dict[str, Any], options: dict[str, Any], folders: dict[str, str], tmp_path: Path
) -> None:
    batch, given = batch_of(tmp_path, folders["chatml"], folders["inst"], rows, **options)
    other, mine = load_tokenizer(folders["inst"]), load_tokenizer(folders["chatml"])
    text = mine.decode(batch["tokens"][0].tolist())
    assert seen(given, other, 10**6).replace("<|im_end|>", "") == text


def test_mixed_and_shortened_rows(folders: dict[str, str], tmp_path: Path) -> None:
    """A conversation, a text, and a conversation whose answer is cut."""
    rows = [
        {"messages": CHAT[:3]},
        {"prompt": "one two", "response": " three"},
        {"messages": [user("q"), answer("a word " * 20)]},
    ]
    with pytest.warns(UserWarning, match="1 of 3 rows lost the end of their response"):
        batch, given = batch_of(tmp_path, folders["chatml"], folders["inst"], *rows, max_length=100)
    other = load_tokenizer(folders["inst"])
    texts = {int(row): seen(given, other, 10**6, place) for place, row in enumerate(batch["rows"])}
    assert texts[0].startswith("<bos><<Be brief.>> [INST]")
    assert texts[1] == "one two three<|im_end|>"
    assert texts[2].startswith("<bos>[INST] q [/INST]a word a word")
    assert not texts[2].endswith("<|im_end|>")


def test_later_answers_change_nothing_before(folders: dict[str, str], tmp_path: Path) -> None:
    anchor, other = load_tokenizer(folders["chatml"]), load_tokenizer(folders["inst"])
    models = (
        tiny_palm(num_tokens=anchor.vocab_size, dtype=torch.float64),
        tiny_palm(num_tokens=other.vocab_size, dtype=torch.float64, seed=1),
    )
    subject = CALMModule(models[0], [Augment(models[1], tokens="own", num_connections=2)], connection=SMALL)
    subject.configure_model()
    connect(subject.policy)
    outputs = []
    for name, last in (("a", "It varies."), ("b", "It is long, newly so.")):
        (tmp_path / name).mkdir()
        rows = {"messages": [*CHAT[:4], answer(last)]}
        batch, _ = batch_of(tmp_path / name, folders["chatml"], folders["inst"], rows, mask_turns="assistant_only")
        outputs.append((batch["tokens"], subject.policy(batch["tokens"], inputs=batch["augments"])))
    (first, want), (second, got) = outputs
    width = min(first.shape[1], second.shape[1])
    same = int((first[0, :width] == second[0, :width]).int().argmin())
    assert same > 40
    assert gap(want[:, :same], got[:, :same]) < 1e-9


def test_predictions_follow_the_template(folders: dict[str, str], tmp_path: Path) -> None:
    """Decoding with the cache, without it, and the forward pass of a training row see the same prompt."""
    path = write(tmp_path / "rows.jsonl", {"messages": CHAT[:3]}, {"messages": [user("q"), answer("a")]})
    data = CALMDataModule(
        path, validation=path, predict=path, tokenizer=folders["chatml"], augment_tokenizers=[folders["inst"]],
        cache_dir=str(tmp_path), batch_size=1,
    )  # fmt: skip
    size = load_tokenizer(folders["chatml"]).vocab_size
    models = tiny_palm(num_tokens=size), tiny_palm(num_tokens=size, seed=1)
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    subject = CALMModule(models[0], [Augment(models[1], tokens="own", num_connections=2)], connection=SMALL, generation=config)
    subject.configure_model()
    connect(subject.policy)
    rows = [row for part in trainer(tmp_path).predict(subject, data) or [] for row in part]
    assert subject.policy.make_cache is not None
    data.setup("fit")
    for batch in data.val_dataloader():
        start = int(batch["targets"][0].int().argmax())
        ids = batch["tokens"][0, :start].tolist()
        with torch.no_grad():
            logits = subject.policy(batch["tokens"], inputs=batch["augments"])
            plain = subject.policy.anchor(batch["tokens"])
        assert gap(logits[:, start - 1], plain[:, start - 1]) > 0
        best = int(logits[0, start - 1].argmax())
        ((found,),) = subject.continue_prompts([ids], config)
        tokens = found.tokens + [found.end] * (found.end is not None)
        assert tokens[0] == best
        assert data.tokenizer.decode(found.tokens) in [row["responses"][0] for row in rows]
        subject.policy.readers[0].reads_with_holes = False
        ((slow,),) = subject.continue_prompts([ids], config)
        subject.policy.readers[0].reads_with_holes = None
        assert slow.tokens == found.tokens


def test_rows_are_converted_once(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = batch_of(tmp_path, folders["chatml"], folders["inst"], {"messages": CHAT[:3]})[1]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(OwnTokenizer, "read", fail)
    again = batch_of(tmp_path, folders["chatml"], folders["inst"], {"messages": CHAT[:3]})[1]
    assert torch.equal(first.tokens, again.tokens)
    with pytest.raises(AssertionError, match="converted again"):
        batch_of(tmp_path, folders["chatml"], "bytes", {"messages": CHAT[:3]})


def test_damaged_files_are_made_again(folders: dict[str, str], tmp_path: Path) -> None:
    first = batch_of(tmp_path, folders["chatml"], folders["inst"], {"messages": CHAT[:3]})[1]
    (path,) = (tmp_path / "cache").glob("calm-augments-*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged and will be made again"):
        again = batch_of(tmp_path, folders["chatml"], folders["inst"], {"messages": CHAT[:3]})[1]
    assert torch.equal(first.tokens, again.tokens)
