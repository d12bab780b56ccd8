"""The server backend, against a small server of the standard library that misbehaves on purpose."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.generation.ends import Ends
from lightning_align.generation.handoff import Served
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.generation.server import ServerBackend
from lightning_align.models.formats import merged_weights, read_model, whole_weights
from tests.toys import tiny_palm

EOS = 1
Answer = tuple[int, Any]
Reply = Callable[[str, dict[str, Any], int], Answer]
PROMPTS, IDS = [[30 + i, 40, 50] for i in range(6)], list(range(20, 26))


@contextmanager
def serving(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve `reply(path, body, number of the request)` on the loopback address. Yields the URL and the requests."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append({"path": self.path, **body})
                number = len(seen) - 1
            self._answer(*reply(self.path, body, number))

        def _answer(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has given up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def choice(tokens: list[int], finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"token_ids": tokens, "finish_reason": finish, **more}


def good(path: str, body: dict[str, Any], number: int) -> Answer:
    """Answer with the first id of the prompt."""
    return 200, {"choices": [choice([body["prompt"][0], EOS])] * body["n"], "usage": {"prompt_tokens": len(body["prompt"])}}


def backend(url: str, folder: Path, **options: Any) -> ServerBackend:
    return ServerBackend(
        url, folder=str(folder), **{"backoff": 0.01, "retries": 2, "timeout": 20.0, "wait_seconds": 0.0, **options}
    )


def ask(engine: ServerBackend, rows: slice = slice(None), ends: Ends | None = None, **settings: Any) -> list[list[Generation]]:
    config = GenerationConfig(**{"max_new_tokens": 4, "seed": 3, "temperature": 0.7, **settings})
    return engine.generate(
        tiny_palm(num_tokens=259),
        PROMPTS[rows],
        config,
        ends=ends or Ends.exactly(EOS, config=config),
        ids=IDS[rows],
        iteration=2,
        limits=[9] * len(PROMPTS[rows]),
    )


def test_requests_have_the_settings_and_answers_their_prompts(tmp_path: Path) -> None:
    with serving(good) as (url, seen):
        answers = ask(backend(url, tmp_path, model="m-{iteration}"), num_samples=2, top_p=0.9, min_p=0.1, top_k=7)
    assert [[(a.tokens, a.reason, a.end) for a in row] for row in answers] == [[([30 + i], "eos", EOS)] * 2 for i in range(6)]
    assert sorted(request["prompt"] for request in seen) == PROMPTS
    assert len({request["seed"] for request in seen}) == 6
    first = seen[0]
    assert (first["model"], first["temperature"], first["top_p"], first["min_p"], first["top_k"]) == ("m-2", 0.7, 0.9, 0.1, 7)
    assert (first["n"], first["max_tokens"], first["stop_token_ids"], first["path"]) == (2, 4, [EOS], "/v1/completions")


def test_many_requests_are_in_flight(tmp_path: Path) -> None:
    """The server answers the last five only when it has all of them."""
    together = threading.Barrier(5)

    def reply(path: str, body: dict[str, Any], number: int) -> Answer:
        if number:
            together.wait(30)
        return good(path, body, number)

    with serving(reply) as (url, _):
        assert len(ask(backend(url, tmp_path))) == 6


@pytest.mark.parametrize("failure", [(500, {"error": "busy"}), (429, {}), (503, {}), (200, b"{broken"), (200, [1])])
def test_failed_requests_are_sent_again(failure: Answer, tmp_path: Path) -> None:
    with serving(lambda path, body, number: failure if number in (0, 1) else good(path, body, number)) as (url, seen):
        assert ask(backend(url, tmp_path), slice(1))[0][0].tokens == [30]
    assert len(seen) == 3
    with serving(lambda *_: failure) as (url, seen), pytest.raises(ValueError, match=r"failed 3 times. The last time: "):
        ask(backend(url, tmp_path), slice(1))
    assert len(seen) == 3


def test_a_slow_answer_is_asked_for_again(tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any], number: int) -> Answer:
        if number == 0:
            time.sleep(3)
        return good(path, body, number)

    with serving(reply) as (url, seen):
        assert ask(backend(url, tmp_path, timeout=1.0), slice(1))[0][0].tokens == [30]
    assert len(seen) == 2
    with (
        serving(lambda *a: (time.sleep(1), good(*a))[1]) as (url, _),
        pytest.raises(ValueError, match=r"no answer within 0\.2 s"),
    ):
        ask(backend(url, tmp_path, timeout=0.2, retries=1), slice(1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "no such model"}), r"HTTP 404: .*no such model.*Check that the server has the model 'm'"),
        ((401, {"error": "wrong key"}), r"HTTP 401: .*wrong key"),
        ((400, {"error": "prompt is too long"}), r"HTTP 400: .*prompt is too long"),
        ((200, {"choices": []}), "prompt 20 has no `choices`"),
        (
            (200, {"choices": [choice([3], "tool_calls")]}),
            r"Prompt 20: `finish_reason` must be stop or length, but got 'tool_calls'",
        ),
        ((200, {"choices": [choice([3], None)]}), r"Prompt 20: `finish_reason` must be"),
        ((200, {"choices": [choice([3, 999])]}), "Prompt 20: `tokens` must be ids from 0 to 258, but got 999"),
        ((200, {"choices": [choice([3] * 5, "length")]}), "Prompt 20 has 5 tokens, with its end. Expected at most 4"),
        ((200, {"choices": [choice([3, EOS])], "usage": {"prompt_tokens": 4}}), "read prompt 20 as 4 tokens, but it has 3"),
        (
            (200, {"choices": [choice([3, EOS], logprobs={"token_logprobs": [-1.0]})]}),
            "Prompt 20: `logprobs` must have one value",
        ),
    ],
)
def test_a_wrong_answer_is_shown_and_not_asked_for_again(answer: Answer, message: str, tmp_path: Path) -> None:
    with serving(lambda *_: answer) as (url, seen), pytest.raises(ValueError, match=message):
        ask(backend(url, tmp_path, model="m", dialect="vllm"), slice(1))
    assert len(seen) == 1


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    with serving(good) as (url, _):
        pass
    with pytest.raises(ValueError, match=r"completions failed 3 times.*Check that the server runs"):
        ask(backend(url, tmp_path), slice(1))
    with pytest.raises(ValueError, match=r"does not answer after 0 seconds\. Start it"):
        backend(url, tmp_path).sync_model(served(), iteration=0)


def test_text_is_sent_where_ids_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")

    def reply(path: str, body: dict[str, Any], number: int) -> Answer:
        if not isinstance(body["prompt"], str):
            return 400, {"detail": "prompt must be a string."}
        texts = {"finish_reason": "stop", "text": body["prompt"][:1]}
        return 200, {"choices": [texts], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

    with serving(reply) as (url, seen):
        engine = backend(url, tmp_path)
        engine.sync_model(served(tokenizer), iteration=2)
        answers = ask(engine)
        assert [row[0].tokens for row in answers] == [[30 + i] for i in range(6)]
        # Two dialects with ids are refused once. A server that ignores `n` is asked once per sample.
        assert len(seen) == 8
        assert len(ask(engine, slice(1), num_samples=3)[0]) == 3 and len({request["seed"] for request in seen[8:]}) == 3
        assert ask(engine, slice(1), temperature=0)[0][0].reason == "eos"


def test_filters_that_a_server_lacks_are_refused(tmp_path: Path) -> None:
    with serving(good) as (url, seen), pytest.raises(ValueError, match="as openai does, which have no min_p"):
        ask(backend(url, tmp_path, dialect="openai"), min_p=0.1)
    assert not seen
    with serving(good) as (url, _), pytest.raises(ValueError, match="as vllm does, which have no no_repeat_ngram_size"):
        ask(backend(url, tmp_path, dialect="vllm"), no_repeat_ngram_size=2)
    with serving(good) as (url, _), pytest.raises(ValueError, match="must be null with a server, but got 'int8'"):
        ask(backend(url, tmp_path, dialect="vllm"), quantization="int8")


def served(tokenizer: Any = None) -> Served:
    model, config = tiny_palm(num_tokens=259), GenerationConfig()
    return Served(model, merged_weights(model, whole_weights(model)), tokenizer, Ends.exactly(EOS, config=config), config)


def test_the_server_is_told_to_load_each_model(tmp_path: Path) -> None:
    with serving(lambda *_: (200, b"loaded")) as (url, seen):
        backend(url, tmp_path, reload=f"{url}/load/{{iteration}}", reload_body={"where": "{folder}"}).sync_model(
            served(), iteration=3
        )
        folder = str(tmp_path / "iteration_3" / "model")
        assert [(request["path"], request["where"]) for request in seen] == [("/v1/load/3", folder)]
        note = tmp_path / "note"
        backend(url, tmp_path, reload=f"{sys.executable} -c \"open('{note}','w').write(r'{{folder}}')\"").sync_model(
            served(), iteration=3
        )
        assert note.read_text() == folder
        with pytest.raises(ValueError, match=r"`reload` of ServerBackend ended with status 3: .*\nno memory"):
            backend(url, tmp_path, reload=f"{sys.executable} -c \"print('no memory'); exit(3)\"").sync_model(
                served(), iteration=3
            )
        with pytest.raises(ValueError, match=r"`reload` of ServerBackend cannot be run \(.*no-such-command"):
            backend(url, tmp_path, reload="no-such-command {folder}").sync_model(served(), iteration=3)


def test_a_server_with_our_model_gives_our_logprobs(tmp_path: Path) -> None:
    """The server generates with the model that was handed over, greedily, so both sides must agree."""
    config = GenerationConfig(max_new_tokens=4, temperature=0)

    def reply(path: str, body: dict[str, Any], number: int) -> Answer:
        ((answer,),) = generate(read_model(body["model"]), [body["prompt"]], config, eos_id=EOS)
        ids = [*answer.tokens, *([] if answer.end is None else [answer.end])]
        told = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": answer.logprobs}
        finish = "stop" if answer.finished else "length"
        return 200, {"choices": [{"finish_reason": finish, "text": "?", "logprobs": told}]}

    with serving(reply) as (url, _):
        engine = backend(url, tmp_path)
        engine.sync_model(served(), iteration=2)
        answers = ask(engine, temperature=0)
    own = generate(tiny_palm(num_tokens=259), PROMPTS, config, eos_id=EOS)
    assert answers == own and len(answers[0][0].tokens) > 1
    for (one,), (two,) in zip(answers, own, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)


def test_the_arguments_are_checked(tmp_path: Path) -> None:
    for options, message in (
        ({"workers": 0}, "`workers` .* at least 1"),
        ({"dialect": "x"}, "`dialect` .* must be auto or one"),
    ):
        with pytest.raises(ValueError, match=message):
            backend("http://localhost:1/v1", tmp_path, **options)
