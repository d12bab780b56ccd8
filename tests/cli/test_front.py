"""The first minutes: shipped configurations by name, help at once, short errors, and where things are at the end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_align import __version__
from lightning_align.cli import run
from lightning_align.console.configs import main, nearest, resolve, shipped, summary
from lightning_align.console.pages import COMMANDS, page
from tests.cli.pages import COMMANDS as RENDERED
from tests.cli.runs import config

ROWS = '{"prompt": "a", "response": "b"}\n'


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2].splitlines()


def console(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lightning_align", *arguments], capture_output=True, text=True)


# -- configurations


def test_every_shipped_configuration_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "/" in line.partition(" ")[0])
    assert lines.keys() == shipped().keys()
    assert len(lines) > 30
    for name, path in shipped().items():
        assert summary(path).endswith((".", ":")) or name == "retro/folder", name
        assert not summary(path).startswith(("Use:", "seed"))


def test_names_become_paths_and_files_come_first(folder: Path) -> None:
    path = str(shipped()["dpo/jsonl"])
    for name in ("dpo/jsonl", "dpo/jsonl.yaml", "configs/dpo/jsonl.yaml", "./configs/dpo/jsonl.yaml"):
        assert resolve(["fit", "--config", name, "--x", name]) == ["fit", "--config", path, "--x", name]
        assert resolve(["fit", f"--config={name}", "-c", name]) == ["fit", f"--config={path}", "-c", path]
    assert resolve(["--config", "nowhere"]) == ["--config", "nowhere"]
    (folder / "dpo").mkdir()
    (folder / "dpo" / "jsonl").touch()
    assert resolve(["--config", "dpo/jsonl"]) == ["--config", "dpo/jsonl"]
    assert nearest("dpo/jsnl")[0] == "dpo/jsonl"


def test_a_copy_can_be_edited_and_nothing_is_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", "sft/jsonl"]) == 0
    assert Path("sft_jsonl.yaml").read_text() == shipped()["sft/jsonl"].read_text()
    Path("sft_jsonl.yaml").write_text("mine")
    assert main(["copy", "sft/jsonl"]) == 1
    assert Path("sft_jsonl.yaml").read_text() == "mine"
    assert main(["copy", "sft/jsonl", "there/mine.yaml"]) == 0
    assert main(["show", "sft/jsonl"]) == 0
    assert main(["copy", "sft/jsnl"]) == 1
    assert "did you mean 'sft/jsonl'" in capsys.readouterr().err
    assert main(["erase"]) == 2


def test_a_shipped_configuration_and_its_tokenizer_are_found_outside_a_checkout(folder: Path) -> None:
    from lightning_align.data.tokenizer import load_tokenizer

    with pytest.raises(SystemExit, match="0"):
        run(["fit", "--config", "retro/stdlib", "--config", "retro/folder", "--print_config"])
    assert load_tokenizer("configs/retro/python_bpe.json").vocab_size == 2048


# -- help


def test_the_pages_are_what_the_parser_says() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.cli.pages", "--check"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], "write the pages again: python -m tests.cli.pages"


def test_help_and_version_do_not_import_torch() -> None:
    calls = [["--help"], ["--version"], ["configs"], *([command, "--help"] for command in RENDERED[1:]), ["exprot"], []]
    code = (
        "import sys, contextlib\nfrom lightning_align.__main__ import main\n"
        f"for words in {calls}:\n    sys.argv = ['lightning-align', *words]\n"
        "    with contextlib.suppress(SystemExit): main()\n"
        "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"lightning-align {__version__}" in done.stdout
    assert all(command in done.stdout.splitlines()[0] for command in COMMANDS)
    error = done.stderr[done.stderr.index("error: ") :]
    assert "did you mean 'export'?" in error
    assert all(command in error for command in COMMANDS)


def test_a_page_of_other_releases_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_align.console.pages.version", lambda name: "9.9")
    assert page("fit") is None


def test_the_report_names_versions_and_devices() -> None:
    done = console("env")
    assert done.returncode == 0, done.stderr
    for expected in (f"lightning-align {__version__}", "Python 3.", "\ntorch 2", "\nCPU: ", "CUDA"):
        assert expected in done.stdout
    assert all(secret not in done.stdout for secret in ("TOKEN", "KEY", os.environ.get("HOME", "/root") + "/"))


# -- errors

MISTAKES = [
    (["--model.loss", "sigmiod"], "no loss 'sigmiod'; did you mean 'sigmoid'?"),
    (["--model.bta", "1"], "DPOModule has no argument 'bta'; did you mean 'beta'?"),
    (["--model.beta", "much"], "--model.beta must be a number, but got 'much'."),
    (["--model.lora.rnk", "3"], "LoRAConfig has no argument 'rnk'; did you mean 'rank'?"),
    (["--model.generation.temprature", "1"], "did you mean 'temperature'?"),
    (["--model.backbone.init_args.dept", "2"], "PaLM has no argument 'dept'; did you mean 'depth'?"),
    (["--model.backbone", "palm"], "no class 'palm' for --model.backbone; did you mean 'PaLM'?"),
    (["--model.optimizer", "AdamV"], "did you mean 'torch.optim.Adam'?"),
    (["--model.learning_rate", "1e-3"], "it is set with --model.optimizer AdamW --model.optimizer.lr VALUE."),
    (["--model", "my.package.Net"], "no class 'my.package.Net' for --model: there is no module 'my'"),
    (["--data", "DPODataModle"], "did you mean 'DPODataModule'?"),
    (["--data.truncation", "keep_strt"], "no truncation 'keep_strt'; did you mean 'keep_start'?"),
    (["--data.batchsize", "3"], "did you mean 'batch_size'?"),
    (["--trainer.max_stepz", "3"], "has no option '--trainer.max_stepz'; did you mean '--trainer.max_steps'?"),
    (["--trainer.precision", "bf17"], "no precision 'bf17'; did you mean 'bf16'?"),
    (["--trainer.max_steps", "many"], "--trainer.max_steps must be an integer, but got 'many'."),
    (["--trainer.callbacks+", "SampleLoger"], "did you mean 'SampleLogger'?"),
    (["extra"], "the argument 'extra' belongs to no option."),
    (["--config", "sft/jsnl"], "did you mean 'sft/jsonl'"),
    (["--config", "model/palm_small.yml"], "did you mean 'model/palm_small'"),
    (["--config", "broken.yaml"], "broken.yaml:2:7 is not valid YAML"),
    (["--config", "misspelt.yaml"], "'trainer.max_step'; did you mean 'trainer.max_steps'?"),
    (["--config", "foreign.yaml"], "'modell'; did you mean 'model'?"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), MISTAKES, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_a_typing_mistake_is_answered_in_three_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    (folder / "broken.yaml").write_text("model:\n  a: b: c\n")
    (folder / "misspelt.yaml").write_text("trainer:\n  max_step: 3\n")
    (folder / "foreign.yaml").write_text("modell:\n  class_path: DPOModule\n")
    base = ["fit", "--config", config("dpo", folder), "--data.train", "rows.jsonl"]
    lines = failure(capsys, *base, *arguments)
    assert len(lines) <= 3
    assert expected in lines[0]
    assert not re.search("Subtypes|NestedArg|NoneType|Namespace|<class", "\n".join(lines))


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit needs --model and --data" in failure(capsys, "fit")[0]
    assert "--model.loss needs a class" in failure(capsys, "fit", "--model.loss", "sigmoid")[0]
    assert "export needs checkpoint, output" in failure(capsys, "export")[0]
    assert "did you mean '--output'?" in failure(capsys, "export", "x", "--outptu", "y")[0]
    assert "--vocab_size must be an integer" in failure(capsys, "tokenizer", "a", "--vocab_size", "x")[0]
    assert "no command 'fitt'; did you mean 'fit'?" in failure(capsys, "--config", "sft/jsonl", "fitt")[0]


def test_errors_of_libraries_have_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rows.jsonl").write_text(ROWS)
    base = ["fit", "--config", config("sft", folder), "--data.train", "rows.jsonl", "--trainer.logger", "false"]
    for arguments, expected in (
        (["--trainer.accelerator", "tpu"], "TPU|XLA|torch_xla"),
        (["--trainer.strategy", "dpp"], "no strategy 'dpp'; did you mean 'ddp'"),
        (["--trainer.plugins", "SLURMEnvironment", "--trainer.devices", "many"], "devices"),
    ):
        with pytest.raises(SystemExit, match=expected) as stopped:
            run([*base, *arguments])
        assert len(str(stopped.value.code).splitlines()) <= 4


# -- a run


def test_the_bar_counts_the_run_and_the_end_says_where_things_are(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1=", "response": str(n)}) + "\n" for n in range(8)))
    path = config("sft", folder)
    arguments = ["--data.train", "rows.jsonl", "--trainer.max_steps", "4", "--trainer.max_epochs=-1"]
    done = console("fit", "--config", path, *arguments, "--trainer.enable_progress_bar", "true")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "/-2" not in said
    assert re.search(r"Step \(epoch 2\).* 4/4 \[", said)
    last = re.findall(r"^(checkpoint|log): (\S+)", said, re.MULTILINE)
    assert [kind for kind, _ in last] == ["checkpoint", "log"]
    assert last[0][1].endswith(".ckpt")
    assert all((folder / where).exists() for _, where in last)


def test_a_bar_of_rich_counts_the_run(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1=", "response": str(n)}) + "\n" for n in range(8)))
    bar = "[{class_path: RichProgressBar, init_args: {leave: false}}]"
    arguments = ["--data.train", "rows.jsonl", "--trainer.max_steps", "5", "--trainer.callbacks", bar]
    command = ["fit", "--config", config("sft", folder), *arguments, "--trainer.enable_progress_bar", "true"]
    # A terminal, or rich prints nothing.
    code = "import sys, pty; sys.exit(pty.spawn([sys.executable, '-m', 'lightning_align', *sys.argv[1:]]) >> 8)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout
    assert "/-2" not in done.stdout
    assert re.search(r"Step \(epoch 2\).*4/5.*", done.stdout) or re.search(r"Step \(epoch 3\).*5/5", done.stdout)


def test_what_a_stopped_run_says_begins_a_line(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1=", "response": str(n)}) + "\n" for n in range(8)))
    (folder / "stop.py").write_text(
        "import os, signal\nfrom lightning.pytorch.callbacks import Callback\nclass Stop(Callback):\n"
        "    def on_train_batch_end(self, *_):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    arguments = ["--data.train", "rows.jsonl", "--trainer.max_steps", "4", "--trainer.callbacks", "[{class_path: stop.Stop}]"]
    done = console("fit", "--config", config("sft", folder), *arguments, "--trainer.enable_progress_bar", "true")
    assert done.returncode == 130, done.stderr
    assert re.search("^stopped at step", done.stdout + done.stderr, re.MULTILINE)
