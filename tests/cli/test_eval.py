"""Tasks of the lm-eval harness that read local files."""

import functools
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli import run
from lightning_align.console.chat import load
from lightning_align.console.evaluate import answers, cut, harness_model, rendered
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.scoring.texts import TextScorer
from tests.cli.runs import checkpoint, fit, write_rows
from tests.toys import tiny_palm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the harness and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ANSWER = """
task: own_answer
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXT = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture
def tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists all installed packages, in seconds
    rows: Any = [{"question": f"{n}+1=", "choices": [str(n + 1), str(n + 2)], "answer": 0} for n in range(6)]
    path = write_rows(folder / "questions.jsonl", rows)
    (folder / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("text", TEXT)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("ROWS", path))
    return folder / "tasks"


def test_a_checkpoint_and_its_export_have_the_same_results(
    folder: Path, sft_rows: str, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    path = checkpoint(fit("sft", folder, sft_rows))
    run(["export", path, "--output", "exported"])
    given = ["--tasks", "own_choice,own_answer,own_text", "--include", str(tasks), "--device", "cpu"]
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the harness imports
        for model, size in ((path, "8"), ("exported", "1")):
            run(["eval", model, *given, "--output", "out/results.json", "--batch_size", size])
            results.append(json.loads(Path("out/results.json").read_text()))
    said = capsys.readouterr().out
    assert "own_choice" in said and "results: out/results.json" in said
    first, second = (result["results"] for result in results)
    for task, metric in (("own_choice", "acc,none"), ("own_answer", "exact_match,none"), ("own_text", "bits_per_byte,none")):
        assert first[task][metric] == pytest.approx(second[task][metric], abs=1e-5)
    # The accuracy is that of the scores.
    policy, reader = load(path, None)
    pairs = [(f"{n}+1=", f" {n + extra}") for n in range(6) for extra in (1, 2)]
    scores = [score for score, _ in TextScorer(policy, reader).loglikelihoods(pairs)]
    right = [scores[2 * n] > scores[2 * n + 1] for n in range(6)]
    assert first["own_choice"]["acc,none"] == pytest.approx(sum(right) / 6)
    assert results[0]["settings"]["model"] == path

    # The tasks of the harness are thousands of files.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    for arguments, expected in (
        (["--tasks", "own_choise", "--include", str(tasks)], "no task 'own_choise'; did you mean 'own_choice'?"),
        (["--tasks", "own_choice", "--include", "nowhere"], "there is no folder nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(["eval", path, *arguments])
        assert expected in str(stopped.value.code).splitlines()[0]
        assert len(str(stopped.value.code).splitlines()) <= 3


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "lm_eval" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr("lightning_align.console.evaluate.find_spec", missing)
    with pytest.raises(SystemExit, match=r"pip install 'lightning-align\[eval\]'"):
        run(["eval", "model", "--tasks", "x"])


def test_answers_are_greedy_and_end_before_the_stop_text() -> None:
    model, tokenizer = tiny_palm(num_tokens=259), load_tokenizer("bytes")
    greedy: dict[str, Any] = {"until": [], "max_gen_toks": 6, "do_sample": False}
    requests = [(text, greedy) for text in ("3+1=", "a", "longer than the others")]
    requests.insert(1, ("b", {**greedy, "max_gen_toks": 2}))
    counts: list[int] = []
    found = answers(TextScorer(model, tokenizer, batch_size=2), requests, seed=0, done=counts.append)
    assert sum(counts) == 4
    for (text, settings), answer in zip(requests, found, strict=True):
        config = GenerationConfig(max_new_tokens=settings["max_gen_toks"], temperature=0)
        ends = Ends.of(tokenizer=tokenizer, model=model, config=config)
        ((alone,),) = generate(model, [TextScorer(model, tokenizer).encode(text)], config, ends=ends)
        assert answer == tokenizer.decode(alone.tokens)
    stop = found[0][2:4]
    (stopped,) = answers(TextScorer(model, tokenizer), [("3+1=", {**greedy, "until": [stop]})], seed=0, done=counts.append)
    assert stopped == found[0].partition(stop)[0]
    assert cut("one two", ["two", "ne"]) == "o" and cut("one", []) == "one"


def test_the_adapter_is_a_model_of_the_harness() -> None:
    model_of_harness = pytest.importorskip("lm_eval.api.model", reason="the extra `eval` is not installed").LM
    tokenizer = load_tokenizer("bytes")
    adapter = harness_model(tiny_palm(num_tokens=259), tokenizer, max_length=16)
    assert isinstance(adapter, model_of_harness) and adapter.scorer.max_length == 16
    history = [{"role": "user", "content": "hello"}]
    prompt = adapter.apply_chat_template(history)
    assert prompt == rendered(tokenizer, history, add_generation_prompt=True) and "hello" in prompt
