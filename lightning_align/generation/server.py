"""A generation backend for any server with the completions interface of OpenAI: vLLM, SGLang, llama.cpp, transformers serve."""

import json
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.generation.completions import DIALECTS, Dialect, read_choice, request_body
from lightning_align.generation.ends import Ends
from lightning_align.generation.handoff import Served, request_seed, write_served
from lightning_align.generation.http import Client, HTTPStatusError
from lightning_align.generation.sampler import Generation, GenerationConfig
from lightning_align.models.language_model import vocabulary_size
from lightning_align.runtime.ranks import world


class ServerBackend:
    """A server with the completions interface of OpenAI (``/v1/completions``).

    Each iteration writes its model to ``<folder>/iteration_<t>/model``, as `FileBackend` does, and `reload` makes the server
    load it. Many requests are in flight. Failed requests are sent again. Prompts are sent as token ids if the server takes
    them (vLLM, SGLang), or else as text that the server must read as the same number of tokens. If the server gives log-probs,
    the log shows how much they differ from ours (``engine_gap``).
    """

    whole, streams = False, True

    def __init__(
        self,
        url: str,
        *,
        folder: str,
        model: str = "{folder}",
        reload: str | None = None,
        reload_body: Mapping[str, Any] | None = None,
        dialect: Literal["auto", "vllm", "openai", "transformers"] = "auto",
        api_key: str | None = None,
        workers: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 1.0,
        wait_seconds: float = 300.0,
    ) -> None:
        """Set the server and the hand-off.

        Args:
            url: The base URL of the server, such as `http://localhost:8000/v1`.
            folder: The folder of the models. The server must see it under the same path.
            model: The name of the model in requests. `{folder}` is the model folder of the iteration, and `{iteration}` its
                number. Default is `{folder}`, which `transformers serve` loads on demand.
            reload: What makes the server load the model: a URL for a POST request, or a command. Both may contain `{folder}`
                and `{iteration}`. The run goes on when the command has ended and the server answers. Default is nothing.
            reload_body: The JSON of the POST request of `reload`. Texts in it may contain `{folder}` and `{iteration}`. Default
                is `{"model": "{folder}"}`.
            dialect: How to ask for ids and filters: `vllm` (ids as prompt, with its further arguments), `openai` (ids as
                prompt, only arguments of OpenAI) or `transformers` (text as prompt). Default is `auto`: the first that the
                server takes.
            api_key: The key of the server. Default is none.
            workers: The number of requests in flight. Default is 32.
            timeout: The seconds until a request has failed. Default is 600.
            retries: How many times a failed request is sent again. Default is 5.
            backoff: The seconds before the first retry. Each further one waits twice as long. Default is 1.
            wait_seconds: How many seconds to wait until the server answers, at the start of an iteration. Default is 300.

        Raises:
            ValueError: If a number is out of range.
        """
        for name, value, least in (("workers", workers, 1), ("retries", retries, 0), ("timeout", timeout, 1e-3)):
            if value < least:
                raise ValueError(f"`{name}` of ServerBackend must be at least {least:g}, but got {value}.")
        if dialect != "auto" and dialect not in DIALECTS:
            raise ValueError(f"`dialect` of ServerBackend must be auto or one of {', '.join(DIALECTS)}, but got {dialect!r}.")
        self.folder, self.model, self.reload, self.reload_body = Path(folder), model, reload, reload_body
        self.workers, self.wait_seconds = workers, wait_seconds
        self._client = Client(url, api_key=api_key, timeout=timeout, retries=retries, backoff=backoff)
        self._dialect: Dialect | None = None if dialect == "auto" else DIALECTS[dialect]
        self._tokenizer: Any = None

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Do nothing. `sync_model` replaces this method."""

    def sync_model(self, served: Served, *, iteration: int) -> None:
        """Write the model, make the server load it, and wait until the server answers.

        Raises:
            ValueError: If the folder has other weights, if `reload` fails, or if the server does not answer.
        """
        self._tokenizer = served.tokenizer
        if world()[0] != 0:
            return
        folder = self.folder.resolve() / f"iteration_{iteration}" / "model"
        write_served(folder, served, iteration=iteration)
        self._wait()
        if self.reload is None:
            return
        names = {"folder": str(folder), "iteration": str(iteration)}
        target = _fill(self.reload, names)
        if "://" in target.split(maxsplit=1)[0]:
            self._client.send(
                target, json.dumps(_fill(self.reload_body or {"model": "{folder}"}, names)).encode(), any_answer=True
            )
        else:
            command = [_fill(word, names) for word in shlex.split(self.reload)]
            try:
                ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            except OSError as error:
                raise ValueError(
                    f"`reload` of ServerBackend cannot be run ({error}): {shlex.join(command)}. Give a command that this "
                    "machine has, or a URL."
                ) from error
            if ran.returncode:
                raise ValueError(
                    f"`reload` of ServerBackend ended with status {ran.returncode}: {shlex.join(command)}\n{ran.stdout[-1000:]}"
                )
        self._wait()

    def generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any
    ) -> list[list[Generation]]:
        """Generate responses. See `generate_parts`."""
        ((_, answers),) = self.generate_parts(model, prompts, config, parts=[range(len(prompts))], **options)
        return answers

    def generate_parts(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        parts: Sequence[Sequence[int]],
        ends: Ends,
        ids: Sequence[int],
        iteration: int,
        limits: Sequence[int],
    ) -> Iterator[tuple[int, list[list[Generation]]]]:
        """Generate responses, and yield them part by part. See `lightning_align.generation.sampler.generate_parts`.

        Raises:
            ValueError: If the server cannot be reached, refuses a request, or gives a wrong answer.
        """
        folder = self.folder.resolve() / f"iteration_{iteration}" / "model"
        name = _fill(self.model, {"folder": str(folder), "iteration": str(iteration)})
        size = vocabulary_size(model)

        def ask(index: int) -> list[Generation]:
            seed = request_seed(config.seed, iteration, ids[index])
            limit = min(config.max_new_tokens, limits[index])
            return self._ask(name, ids[index], prompts[index], config, ends, seed=seed, limit=limit, vocabulary=size)

        order = [index for part in parts for index in part]
        with ThreadPoolExecutor(self.workers, thread_name_prefix="server-backend") as pool:
            # The first request finds the dialect. After that, all are in flight.
            first = {index: _done(ask(index)) for index in order[:1]}
            futures = first | {index: pool.submit(ask, index) for index in order[1:]}
            try:
                for number, part in enumerate(parts):
                    yield number, [futures[index].result() for index in part]
            finally:
                for future in futures.values():
                    future.cancel()

    def _ask(
        self,
        name: str,
        number: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        ends: Ends,
        *,
        seed: int,
        limit: int,
        vocabulary: int | None,
    ) -> list[Generation]:
        if limit < 1:
            return [Generation([], False) for _ in range(config.num_samples)]
        dialects = [self._dialect] if self._dialect is not None else list(DIALECTS.values())
        answers: list[Generation] = []
        while len(answers) < config.num_samples:
            wanted = config.num_samples - len(answers)
            for dialect in dialects:
                body = request_body(
                    dialect,
                    name,
                    prompt,
                    config,
                    ends,
                    tokenizer=self._tokenizer,
                    seed=seed + len(answers),
                    limit=limit,
                    n=wanted,
                )
                try:
                    reply = self._client.post("/completions", body)
                    break
                except HTTPStatusError as error:
                    if error.status == 404:
                        raise ValueError(
                            f"{error}. Check that the server has the model {name!r}, and `url`, `model` and `reload` of "
                            "ServerBackend."
                        ) from error
                    if error.status not in (400, 422) or dialect is dialects[-1]:
                        raise
            if self._dialect is None:
                self._dialect, dialects = dialect, [dialect]
                rank_zero_info(f"The server at {self._client.url} takes requests as {dialect.name} does.")
            choices = reply.get("choices")
            if not isinstance(choices, list) or not choices:
                raise ValueError(f"The server's answer to prompt {number} has no `choices`, but is {json.dumps(reply)[:200]}.")
            read = reply.get("usage", {}).get("prompt_tokens")
            if read is not None and read != len(prompt):
                raise ValueError(
                    f"The server read prompt {number} as {read} tokens, but it has {len(prompt)}. The server's tokenizer is "
                    "another one or adds a token. Use a server that takes token ids (`dialect: vllm`)."
                )
            # A server that ignores `n` gives one choice at a time.
            answers += [
                read_choice(f"Prompt {number}", choice, reply, limit, ends, tokenizer=self._tokenizer, vocabulary=vocabulary)
                for choice in choices[:wanted]
            ]
        return answers

    def _wait(self) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + self.wait_seconds
        while True:
            try:
                self._client.send("/models", attempts=1)
                return
            except ValueError as error:
                if isinstance(error, HTTPStatusError) and error.status != 503:
                    return  # it answers, though it has no list of models
                if time.monotonic() >= deadline:
                    raise ValueError(
                        f"The server does not answer after {self.wait_seconds:g} seconds. Start it, or correct `url` of "
                        f"ServerBackend. {error}"
                    ) from error
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _done(value: list[Generation]) -> "Future[list[Generation]]":
    future: Future[list[Generation]] = Future()
    future.set_result(value)
    return future


def _fill(template: Any, names: Mapping[str, str]) -> Any:
    """Replace ``{folder}`` and ``{iteration}`` in the texts of a JSON value. Other braces stay."""
    if isinstance(template, str):
        for name, value in names.items():
            template = template.replace("{" + name + "}", value)
        return template
    if isinstance(template, Mapping):
        return {key: _fill(value, names) for key, value in template.items()}
    return [_fill(value, names) for value in template] if isinstance(template, (list, tuple)) else template
