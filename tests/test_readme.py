"""Runs the commands and examples of the README and of the pages in `docs/`, in order in one folder, as a reader would.

The ``lightning-align`` commands in ``bash`` blocks run for real, with an appended configuration that makes them small. Commands
that need several devices or a launcher are only parsed. ``python`` blocks run one after the other in one namespace. ``yaml``
blocks are parsed. ``make`` targets and paths must exist. ``sh`` blocks do not run.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_align
from lightning_align.cli import run
from tests.cli.test_eval import CHOICE
from tests.toys import save_llama

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *re.findall(r"^ +- (\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)]
"""The README, and the pages in the order of the site."""
TEXTS = {page: (ROOT / ("" if page == "README.md" else "docs") / page).read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(TEXTS.values())
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(TEXT)
LAUNCHERS = ("torchrun", "srun")
BACKBONE = {"num_tokens": 300, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def facts(role: str) -> dict[str, object]:
    return {"class_path": "Facts", "init_args": {"role": role, "num_facts": 24, "num_held_out": 8, "num_notes": 8}}


def small(words: list[str]) -> dict[str, object]:
    """Return the configuration that makes a command small without changing what it does."""
    config = " ".join(words)
    model: dict[str, object] = {"lr_scheduler": {"init_args": {"total_steps": 4, "warmup_steps": 1}}}
    model["generation"] = {"max_new_tokens": 4}
    data: dict[str, object] = {}
    trainer: dict[str, object] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    callbacks: list[dict[str, object]] = []
    if " spin/" in config:
        model.pop("lr_scheduler")  # the configuration has no schedule
        callbacks.append({"class_path": "SelfPlayGeneration", "init_args": {"iterations": 2, "epochs": 1}})
    if " calm/" in config:
        rows = {name: {"init_args": {"num_rows": 16}} for name in ("train", "validation")}
        data |= {**rows, "batch_size": 4, "eval_batch_size": 16}
        if "calm/key_value" not in words:
            model["backbone"] = {"init_args": {"dim": 16, "dim_head": 8}}
    if " retro/" in config:
        model["backbone"] = {"init_args": {"decoder": {"init_args": {"dim": 16, "dim_head": 8}}, "dim_head": 8}}
        data |= {"batch_size": 8, "eval_batch_size": 8}
        queries = {"train": facts("train"), "validation": facts("validation")}
        sources = {"documents": facts("database"), "queries": queries}
        size = 16 if "facts" in config else 32
        settings = {"database": ".cache/retro/facts", "encoder": "bm25", "chunk_size": size, "k": 2, **sources}
        callbacks += [{"class_path": "RetrievalIndexing", "init_args": settings}, {"class_path": "NeighborPanel"}]
    if words[0] == "fit":
        keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
        callbacks.append(keep)
        if " retro/" not in config and " calm/" not in config:
            callbacks.insert(0, {"class_path": "SampleLogger", "init_args": {"max_new_tokens": 4}})
        trainer |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
        if " spin/" in config:
            trainer |= {"max_steps": -1, "val_check_interval": 1.0}
        if "huggingface" in config:
            callbacks.append({"class_path": "ExportModel"})
    if callbacks or " calm/" in config:
        trainer["callbacks"] = callbacks
    if "palm_small" in config:
        model["backbone"] = {"init_args": BACKBONE}
    return {"trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}


def launch(words: list[str]) -> None:
    """Run a command of the README, or only parse it if it needs more devices than a test has."""
    elsewhere = words[0] in LAUNCHERS or any(word.startswith("trainer/") for word in words)
    words = words[words.index("lightning_align" if words[0] == "torchrun" else "lightning-align") + 1 :]
    if elsewhere:
        with pytest.raises(SystemExit, match="0"):
            run([*words, "--print_config"])
    elif words[0] == "tokenizer":
        run([*words, "--vocab_size", "300"])
    elif words[0] in ("export", "chat"):
        run(words)
    else:
        Path("small.yaml").write_text(yaml.safe_dump(small(words)))
        run([*words, "--config", "small.yaml"])


def write_rows(path: str, rows: list[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader of the README, outside of a checkout: the reader's own rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    sums = [{"prompt": f"{i} + 2 =", "response": f" {i + 2}"} for i in range(40)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": " 0"} for row in sums]
    for name, rows in {"train": sums, "valid": sums[:8], "pairs": pairs, "pairs_valid": pairs[:8]}.items():
        write_rows(f"{name}.jsonl", rows)
    write_rows("prompts.jsonl", [{"prompt": "1 + 2 ="}, {"prompt": "2 + 2 ="}])
    save_llama("my-model")
    for folder, number in (("texts/train", 6), ("texts/held_out", 2), ("docs", 30)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(number):
            text = f"{folder} {i}: " + "it was read, and then it was written down again. " * (3 + i)
            (tmp_path / folder / f"{i}.md").write_text(text)
    return tmp_path


def test_a_reader_can_follow_it_from_top_to_bottom(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    names: dict[str, object] = {}
    for page, language, block in ((page, *found) for page, text in TEXTS.items() for found in FENCED.findall(text)):
        if page == "tour.md" and not Path("earlier").exists():
            Path("runs").rename("earlier")  # the tour begins in an empty folder
        if language == "bash":
            for words in commands(block):
                if words[0] == "lightning-align" or words[0] in LAUNCHERS:
                    launch(words)
                    ran += 1
        elif language == "python":
            exec(compile(block, "docs", "exec"), names)
            ran += 1
    assert ran >= 12, "the test does not find the code blocks"
    assert len((reader / "answers.jsonl").read_text().splitlines()) == 2

    logged: set[str] = set()
    for folder in {path.parent for runs in ("runs", "earlier") for path in reader.glob(f"{runs}/*/*/events.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()
        logged |= {*tags["scalars"], *tags["histograms"], *(tag.removesuffix("/text_summary") for tag in tags["tensors"])}
    promised = set(re.findall(r"`((?:train|val)/[\w/]+)`", TEXT))
    assert len(promised) > 10
    assert promised <= logged


def test_blocks_of_yaml_are_configurations(reader: Path) -> None:
    blocks = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
    assert len(blocks) > 5
    for block in blocks:
        if "task" in block:  # of the evaluation harness
            own = yaml.safe_load(CHOICE)
            changed = {"task", "dataset_kwargs"}
            assert {**block, **{key: None for key in changed}} == {**own, **{key: None for key in changed}}
            continue
        Path("block.yaml").write_text(yaml.safe_dump(block))
        with pytest.raises(SystemExit, match="0"):
            run(["fit", "--config", "dpo/jsonl", "--config", "block.yaml", "--print_config"])


def test_other_commands_name_what_there_is() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)", "\n".join(re.findall(r"`[^`\n]+`|^make .*$", TEXT, re.MULTILINE))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    project = (ROOT / "pyproject.toml").read_text()
    installs = re.findall(r"^pip install .*$", TEXT, re.MULTILINE)
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    for extras in re.findall(r"\.\[([a-z,]+)\]", TEXT):
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(",")), extras


def test_paths_that_are_named_exist() -> None:
    for path in set(
        re.findall(r"\b(?:benchmarks|configs|examples|lightning_align|notebooks|tests)/[\w./]+|(?<![/\w])[A-Z]+\.md\b", TEXT)
    ):
        assert (ROOT / path).exists(), path
    (tree,) = (block for language, block in BLOCKS if block.startswith("lightning_align/\n"))
    folders: list[str] = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        assert (ROOT / "".join(folders)).exists(), line
    listed = {line.split()[0].rpartition("/")[2] for line in tree.splitlines()}
    modules = {path.name for path in (ROOT / "lightning_align").glob("*.py")} - {"__main__.py"}
    assert modules <= listed


def test_the_readme_is_short_and_needs_no_checkout() -> None:
    readme = TEXTS["README.md"]
    assert len(readme.encode()) <= 8192
    assert not re.search(r"\]\((?!https?://)", readme), "a relative link breaks on an index of packages"


def test_every_page_is_in_the_site_and_its_links_lead_somewhere() -> None:
    folder = ROOT / "docs"
    assert {path.name for path in folder.glob("*.md")} - {"index.md"} == set(PAGES) - {"README.md"}
    for page in folder.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# ")
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
            name, _, anchor = link.partition("#")
            target = folder / name if name else page
            assert target.is_file(), (page.name, link)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    named = re.findall(r"^::: lightning_align\.([\w.]+)$", pages, re.MULTILINE)
    bases = {"training.module.AlignModule", "training.datamodule.AlignDataModule"}
    assert set(named) == {f"{home}.{name}" for name, home in lightning_align._HOME.items()} | bases
    assert len(named) == len(set(named))
