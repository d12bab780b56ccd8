"""The chat templates of many models, as the package trl ships them: what is trained is what the template writes for it."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lightning_align.data.tokenizer import all_ends
from tests.data.helpers import chat_tokenizer, encode, spell

pytest.importorskip("transformers", reason="needs the extra hf")
SPEC = find_spec("trl")
TEMPLATES = sorted(Path(SPEC.origin).parent.glob("chat_templates/*.jinja")) if SPEC and SPEC.origin else []
MARK = re.compile(
    r"<[|\uff5c][^<>\s'\"{}]{1,40}[|\uff5c]>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]|<\|?turn\|?>|<end_of_utterance>"
    r"|<start_of_turn>|<\|\w+>|<\w+\|>|</?think>"
)
USER, HELLO, MORE, SURE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Sure."},
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "W",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": "sunny", "tool_call_id": "abcdefghi"},
    SURE,
]


def test_trl_ships_templates():
    if SPEC is None:
        pytest.skip("needs the package trl")
    assert len(TEMPLATES) > 20
    assert {"qwen3", "phi3", "gptoss", "deepseek_r1_distill"} <= {template.stem for template in TEMPLATES}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    loaded: dict[Path, Any] = {}

    def load(template: Path) -> Any:
        if template not in loaded:
            text = template.read_text(encoding="utf-8")
            marks = sorted(set(MARK.findall(text)))
            folder = tmp_path_factory.mktemp(template.stem)
            tokenizer = chat_tokenizer(text, folder, eos="<eos>", marks=marks)
            turn = tokenizer.render([USER, HELLO], add_generation_prompt=False)
            tail = "".join(segment.text for segment in turn).rpartition("Hello!")[2]
            ends = [mark for mark in MARK.findall(tail) if mark in marks]
            if "<eos>" not in tail and ends:  # the last mark of an answer is the end token
                tokenizer = chat_tokenizer(text, folder, eos=ends[-1], marks=marks)
            loaded[template] = tokenizer
        return loaded[template]

    return load


def _apply(tokenizer: Any, messages: list[dict[str, Any]], *, generate: bool) -> str:
    return str(tokenizer._apply(messages, generate))


@pytest.mark.filterwarnings("ignore:the chat template of .* does not (begin|end)")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("history", [[USER], [USER, HELLO, MORE]], ids=["one turn", "two turns"])
def test_the_last_turn_is_trained_behind_what_is_written_at_generation(template, history, load):
    tokenizer = load(template)
    (single,), notes = encode({"messages": [*history, SURE]}, tokenizer=tokenizer, max_length=10**5)
    (pair,), _ = encode({"prompt": history, "chosen": [SURE], "rejected": [HELLO]}, tokenizer=tokenizer, max_length=10**5)
    assert pair.sides[0] == single.sides[0]
    assert [t for t in pair.sides[1].tokens[: pair.num_prompt]] == single.sides[0].tokens[: single.num_prompt]
    text, trained = spell(tokenizer, single)
    given = text.removesuffix(trained)
    assert "Sure." in trained and "Hello!" not in trained
    # Phi 3 writes <|end|> behind each turn, and the end-of-sequence token behind the conversation. The first ends an answer.
    end = tokenizer.decode([all_ends(tokenizer)[-1]], skip_special=False)
    assert trained.endswith(end) and trained.count(end) == 1
    assert ("phi3" in template.stem) == (end != tokenizer.markers[0])
    assert single.sides[0].tokens.count(tokenizer.eos_id) <= text.count(tokenizer.markers[0])
    # What is trained ends what the template renders, but for what it writes behind the end token.
    whole = _apply(tokenizer, [*history, SURE], generate=False)
    prompt = _apply(tokenizer, history, generate=True)
    assert whole.startswith(given) and whole.startswith((given + trained).removesuffix(tokenizer.markers[0]))
    if whole.startswith(prompt):
        assert given == prompt and not notes.notes
        (alone,), _ = encode({"prompt": history}, tokenizer=tokenizer, prompts_only=True, max_length=10**5)
        assert alone.sides[0].tokens == single.sides[0].tokens[: single.num_prompt]
    else:
        assert prompt.startswith(given) and notes.notes == {"generation_prompt_differs": 1}
        assert "think" in prompt[len(given.rstrip()) - 8 :]


def _outcome(template: Path, load: Any, row: dict[str, Any], **options: Any) -> tuple[str, str] | str:
    tokenizer = load(template)
    rows, ledger = encode(row, tokenizer=tokenizer, on_bad_row="skip", max_length=10**5, **options)
    return spell(tokenizer, rows[0]) if rows else ledger.examples["chat_template"][0]


@pytest.mark.filterwarnings("ignore:the chat template of .* does not (begin|end)")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_all_turns_are_trained_as_written_or_refused_with_advice(template, load):
    outcome = _outcome(template, load, {"messages": [USER, HELLO, MORE, SURE]}, mask_turns="assistant_only")
    if isinstance(outcome, str):
        assert "`mask_turns` 'last_turn'" in outcome
        assert template.stem in {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"}
    else:
        assert "Hello!" in outcome[1] and "Sure." in outcome[1]
        assert "Hi" not in outcome[1] and "More?" not in outcome[1]


@pytest.mark.filterwarnings("ignore:the chat template of .* does not (begin|end)")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_calls_of_tools_are_written_or_refused(template, load):
    outcome = _outcome(template, load, {"messages": CALLED, "tools": [TOOL]})
    if isinstance(outcome, str):
        assert "the messages" in outcome or "does not write the call of the tool 'get_weather'" in outcome
    else:
        text, trained = outcome
        assert "Rome" in text and "sunny" in text and "Sure." in trained and "Rome" not in trained


def test_a_call_is_trained_in_some_templates(load):
    called = {"messages": CALLED[:2], "tools": [TOOL]}
    trained = [outcome for template in TEMPLATES if isinstance(outcome := _outcome(template, load, called), tuple)]
    assert all("get_weather" in response and "Rome" in response for _, response in trained)
    assert len(trained) > len(TEMPLATES) / 3 or not TEMPLATES
