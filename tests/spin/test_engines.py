"""An iteration of self-play through each engine: our sampler, vLLM's script on files, and servers on the loopback address."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import vllm_generate
from lightning_align.generation.backend import FileBackend, NativeBackend
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.generation.server import ServerBackend
from lightning_align.models.formats import read_model
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.spin.datamodule import SPINDataModule
from tests.data.chats import CHATML
from tests.data.helpers import chat_tokenizer
from tests.generation.test_server import serving
from tests.spin.runs import set_rows, start, write_rows

pytest.importorskip("transformers")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GREEDY = GenerationConfig(max_new_tokens=5, batch_size=4, temperature=0)


def play(folder: Path, backend: Any, tokenizer: str = "bytes") -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run an iteration. Returns the responses in the order of the rows, and the metrics."""
    torch.manual_seed(0)
    model = PretrainedLM(config={**LLAMA, "vocab_size": 259 if tokenizer == "bytes" else 261})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        if tokenizer != "bytes":
            # The ids of printable ASCII come first. Other bytes are no text, which a server without ids cannot hand back.
            model.model.lm_head.weight[94:] = 0
    loop = {"iterations": 1, "epochs": 1, "backend": backend}
    trainer, module, data = start(folder, loop=loop, backbone=model, generation=GREEDY)
    rows = write_rows(folder)
    data = SPINDataModule(rows, tokenizer=tokenizer, batch_size=4, max_length=40, cache_dir=str(folder / "cache"))
    trainer.fit(module, data)
    rows = sorted(set_rows(folder, 0), key=lambda row: row["row"])
    return [row["generated"][0] for row in rows], {name: float(value) for name, value in trainer.callback_metrics.items()}


def check_same(engine: tuple[Any, dict[str, float]], own: tuple[Any, dict[str, float]], *, logprobs: bool = True) -> None:
    """Both played the same tokens, and the log-probs of the engine are those that we compute."""
    assert [(a["tokens"], a["reason"]) for a in engine[0]] == [(a["tokens"], a["reason"]) for a in own[0]]
    assert len({tuple(answer["tokens"]) for answer in own[0]}) > 1
    if logprobs:
        assert engine[1]["spin/train/engine_gap"] < 1e-4
    assert own[1]["spin/train/engine_gap"] < 1e-4


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, float]]:
    return play(tmp_path_factory.mktemp("own"), None)


def test_prompts_of_the_next_batch_start_early(own: Any, tmp_path: Path) -> None:
    check_same(play(tmp_path, NativeBackend(continuous=True)), own)


class LLM:
    """The documented part of vLLM's ``LLM`` that the script uses, with our sampler inside."""

    def __init__(self, model: str) -> None:
        self.model = read_model(Path(model))

    def generate(self, prompts: list[dict[str, list[int]]], sampling_params: list[Any]) -> list[Any]:
        return [self._answer(p["prompt_token_ids"], params) for p, params in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: list[int], params: Any) -> Any:
        config = GenerationConfig(params.max_tokens, temperature=params.temperature, num_samples=params.n, seed=params.seed)
        (answers,) = generate(self.model, [prompt], config, eos_id=params.stop_token_ids)
        return types.SimpleNamespace(outputs=[self._completion(answer) for answer in answers])

    def _completion(self, answer: Any) -> Any:
        ids = [*answer.tokens, *([] if answer.end is None else [answer.end])]
        return types.SimpleNamespace(
            token_ids=ids,
            logprobs=[{t: types.SimpleNamespace(logprob=v)} for t, v in zip(ids, answer.logprobs, strict=True)],
            finish_reason="length" if answer.reason == "length" else "stop",
            stop_reason=answer.end,
        )


class SamplingParams:
    """Takes the documented arguments of vLLM's ``SamplingParams``, and no others."""

    def __init__(
        self,
        *,
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Any = None,
        stop_token_ids: list[int] | None = None,
        include_stop_str_in_output: bool = False,
        max_tokens: int = 16,
        logprobs: int | None = None,
    ) -> None:
        assert logprobs == 0 and include_stop_str_in_output
        vars(self).update(n=n, temperature=temperature, seed=seed, stop_token_ids=stop_token_ids, max_tokens=max_tokens)


def test_the_script_of_vllm_answers_the_files(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", fake)
    with pytest.raises(ValueError, match=r"vllm_generate\.py"):
        play(tmp_path, FileBackend(str(tmp_path / "engine")))
    folder = tmp_path / "engine" / "iteration_0"
    monkeypatch.setattr(sys, "argv", ["vllm_generate.py", str(folder)])
    vllm_generate.main()
    (answers,) = folder.glob("responses-*.jsonl")
    written = answers.stat().st_mtime_ns
    vllm_generate.main()  # nothing is generated twice
    assert answers.stat().st_mtime_ns == written and not list(folder.glob(".*"))
    check_same(play(tmp_path, FileBackend(str(tmp_path / "engine"))), own)


def test_the_script_of_vllm_reads_every_end() -> None:
    def told(finish: str, stop: Any, ids: list[int]) -> dict[str, Any]:
        completion = types.SimpleNamespace(token_ids=ids, logprobs=None, finish_reason=finish, stop_reason=stop)
        return vllm_generate.response(completion, [2, 3])

    assert told("stop", None, [5, 2]) == {"tokens": [5, 2], "reason": "eos"}
    assert told("stop", 3, [5, 3]) == {"tokens": [5, 3], "reason": "eos", "end": 3}
    assert told("stop", 3, [5]) == {"tokens": [5], "reason": "eos", "end": 3}
    assert told("stop", "\n", [5, 6]) == {"tokens": [5, 6], "reason": "stop"}
    assert told("length", None, [5, 6]) == {"tokens": [5, 6], "reason": "length"}
    assert told("abort", None, [5])["reason"] == "abort"  # which the answer file refuses


def test_the_script_of_vllm_refuses_settings_that_vllm_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"unsupported_by_vllm": {"typical_p": 0.9, "no_repeat_ngram_size": 0}}
    (tmp_path / "generation.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["vllm_generate.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="vLLM has no typical_p"):
        vllm_generate.main()


def test_a_server_with_ids_and_logprobs(own: Any, tmp_path: Path) -> None:
    lock = threading.Lock()

    def reply(path: str, body: dict[str, Any], number: int) -> tuple[int, Any]:
        config = GenerationConfig(body["max_tokens"], temperature=body["temperature"])
        with lock:
            ((answer,),) = generate(read_model(body["model"]), [body["prompt"]], config, eos_id=body["stop_token_ids"])
        ids = [*answer.tokens, *([] if answer.end is None else [answer.end])]
        finish = "stop" if answer.finished else "length"
        told = {"token_ids": ids, "finish_reason": finish, "logprobs": {"token_logprobs": answer.logprobs}}
        return 200, {"choices": [told], "usage": {"prompt_tokens": len(body["prompt"])}}

    with serving(reply) as (url, _):
        check_same(play(tmp_path, ServerBackend(url, folder=str(tmp_path / "engine"), workers=4)), own)


@contextmanager
def transformers_serve(log: Path) -> Iterator[str]:
    """Start `transformers serve` on the loopback address, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=output, stderr=output, env=environment)
        try:
            deadline = time.monotonic() + 400
            while time.monotonic() < deadline and process.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            else:
                raise AssertionError(f"transformers serve did not start:\n{log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


SERVING = all(importlib.util.find_spec(name) for name in ("openai", "fastapi", "uvicorn"))


@pytest.mark.skipif(not SERVING, reason="transformers serve needs openai, fastapi and uvicorn: pip install '.[dev]'")
def test_transformers_serve(tmp_path: Path) -> None:
    """A real server: it takes prompts as text, and gives neither ids nor log-probs. Its greedy responses must be ours."""
    chat_tokenizer(CHATML, tmp_path)
    tokenizer = str(tmp_path / "tokenizer")
    own, _ = play(tmp_path / "own", None, tokenizer=tokenizer)
    with transformers_serve(tmp_path / "server.log") as url:
        backend = ServerBackend(url, folder=str(tmp_path / "engine"), workers=4, timeout=300, backoff=0.1)
        answers, metrics = play(tmp_path, backend, tokenizer=tokenizer)
        lost = ServerBackend(url, folder=str(tmp_path / "engine"), model="/nowhere", retries=0, dialect="transformers")
        with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:\d+/v1/completions (answered|failed)"):
            play(tmp_path / "lost", lost, tokenizer=tokenizer)
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in own]
    assert len({answer["text"] for answer in own}) > 1
    assert "spin/train/engine_gap" not in metrics and metrics["meta/spin/train/generated"] == 10
