"""Talking to a checkpoint and to an exported folder."""

import io
from pathlib import Path

import pytest

from lightning_align.cli import run
from lightning_align.console.chat import _encoded
from lightning_align.data.tokenizer import load_tokenizer
from tests.cli.runs import checkpoint, fit


def test_a_checkpoint_and_its_export_answer_alike(
    folder: Path, sft_rows: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(fit("sft", folder, sft_rows))
    run(["export", path, "--output", "exported"])
    fixed = ["--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]
    answers = []
    for model in (path, "exported"):
        capsys.readouterr()
        run(["chat", model, "--prompt", "3+1=", *fixed])
        answers.append(capsys.readouterr().out)
        monkeypatch.setattr("sys.stdin", io.StringIO("3+1=\n\n3+1=\n/exit\n4+1=\n"))
        run(["chat", model, *fixed])
        assert capsys.readouterr().out == answers[-1] * 2
    assert answers[0] == answers[1]
    assert len(answers[0]) > 1

    # With the built-in template the model sees the conversation, which `/new` ends.
    def conversation(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        run(["chat", path, *fixed, "--template", "on", "--system", "Add."])
        return capsys.readouterr().out

    first = conversation("3+1=")
    assert conversation("3+1=", "/new", "3+1=") == first * 2
    assert conversation("3+1=", "3+1=").startswith(first)

    with pytest.raises(SystemExit, match="`system` needs conversations"):
        run(["chat", path, "--prompt", "a", "--system", "b"])
    with pytest.raises(SystemExit, match=r"nowhere\.ckpt"):
        run(["chat", "nowhere.ckpt", "--prompt", "a"])


def test_a_long_conversation_loses_its_beginning() -> None:
    tokenizer = load_tokenizer("bytes")
    messages = [
        {"role": "user", "content": "first " * 20},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "last"},
    ]
    ids = _encoded({"messages": messages}, tokenizer, room=40)
    assert len(ids) <= 40
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids).endswith("<|user|>\nlast\n<|assistant|>\n")


def test_two_models_answer_one_after_the_other(
    folder: Path, sft_rows: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint(fit("sft", folder, sft_rows))
    second = checkpoint(fit("sft", folder, sft_rows, "--seed_everything", "5"))
    second = second if second != first else str(sorted(folder.rglob("*.ckpt"))[-1])
    fixed = ["--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]

    def said(*arguments: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("3+1=\n/new\n5+1=\n"))
        capsys.readouterr()
        run(["chat", *arguments, *fixed])
        return capsys.readouterr().out

    alone = [said(model, "--prompt", "3+1=") for model in (first, second)]
    expected = f"[{first}]\n{alone[0]}[{second}]\n{alone[1]}"
    assert said(first, second, "--prompt", "3+1=") == expected
    assert said(first, "--compare", second).startswith(expected)
    assert said(first, second, "--template", "on").count("[") >= 4
    with pytest.raises(SystemExit, match="2"):
        run(["chat", first, second, first])
    with pytest.raises(SystemExit, match=r"nowhere\.ckpt"):
        run(["chat", first, "nowhere.ckpt"])
