"""Who generates: the native sampler, or an engine outside of this process that reads prompts and weights from files."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.generation.sampler import FinishReason, Generation, GenerationConfig, generate
from lightning_align.models.weights import state_hash
from lightning_align.runtime.files import publish, publish_text
from lightning_align.runtime.ranks import world


class GenerationBackend(Protocol):
    """Generates responses of a model, whose weights it is told of first."""

    whole: bool
    """Whether it wants all prompts of an iteration in one call, rather than a batch at a time."""

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Take the weights that generate from now on; on every rank."""
        ...

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        eos_id: int,
        ids: Sequence[int],
        iteration: int,
        limits: Sequence[int],
        decode: Callable[[list[int]], str],
    ) -> list[list[Generation]]:
        """See `lightning_align.generation.sampler.generate`."""
        ...


class NativeBackend:
    """The sampler of this package, in this process."""

    whole = False

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Nothing to do: it generates from the model itself."""

    def generate(self, model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any) -> Any:
        """See `lightning_align.generation.sampler.generate`."""
        return generate(model, prompts, config, **options)


class FileBackend:
    """Another engine (vLLM, SGLang), handed its work in files.

    For iteration t it writes ``iteration_t/weights.safetensors`` and ``iteration_t/prompts-<hash>.jsonl``, rows of
    ``{"id", "prompt", "max_tokens", "num_samples"}`` with the prompt as token ids, and reads
    ``iteration_t/responses-<hash>.jsonl``, rows of ``{"id", "responses": [{"tokens", "reason"}]}`` with ids without the
    end-of-sequence token and a reason of ``eos``, ``stop`` or ``length``; with ``"logprobs"`` too, of each token and of the
    end-of-sequence token, the log shows how far the engine's numbers are from ours. Where that file is not there yet it waits
    for it as long as it was told to, and then stops with its name; the same run, started again, goes on.
    """

    whole = True

    def __init__(self, folder: str, *, wait_seconds: float = 0.0) -> None:
        """Choose the place.

        Args:
            folder: of the files.
            wait_seconds: how long to wait for responses before stopping.
        """
        self.folder, self.wait_seconds = Path(folder), wait_seconds

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Write the weights, or find that they are there.

        Raises:
            ValueError: if others are there: the responses beside them would be another model's.
        """
        if world()[0] != 0:
            return
        path, own = self.folder / f"iteration_{iteration}" / "weights.safetensors", state_hash(dict(weights))
        if not path.exists():
            publish(path, lambda temporary: save_file(dict(weights), temporary, metadata={"sha256": own}))
            return
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("sha256", "")
        if found != own:
            raise ValueError(
                f"{path}: has other weights ({found[:12]}) than iteration {iteration} of this run ({own[:12]}), so what was "
                f"generated beside it is of another run: give FileBackend another `folder`, or remove {path.parent}"
            )

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        eos_id: int,
        ids: Sequence[int],
        iteration: int,
        limits: Sequence[int],
        decode: Callable[[list[int]], str],
    ) -> list[list[Generation]]:
        """Write the prompts and read the responses.

        Raises:
            ValueError: if the responses are not there in time, or do not answer the prompts.
        """
        requests = [
            {
                "id": number,
                "prompt": list(prompt),
                "max_tokens": min(config.max_new_tokens, limit),
                "num_samples": config.num_samples,
            }
            for number, prompt, limit in zip(ids, prompts, limits, strict=True)
        ]
        text = "".join(json.dumps(request) + "\n" for request in requests)
        name = f"{_digest(text)}.jsonl"
        folder = self.folder / f"iteration_{iteration}"
        if world()[0] == 0 and not (folder / f"prompts-{name}").exists():
            publish_text(folder / f"prompts-{name}", text)
        path = folder / f"responses-{name}"
        deadline = time.monotonic() + self.wait_seconds
        while not path.is_file():
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{path}: is not there yet. Generate it from {folder / f'prompts-{name}'} and the weights beside it, then "
                    "start the same run again (with --ckpt_path, if it has a checkpoint)"
                )
            time.sleep(1.0)
        return _read_responses(path, requests, eos_id)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_responses(path: Path, requests: list[dict[str, Any]], eos_id: int) -> list[list[Generation]]:
    found: dict[int, list[Generation]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            answers = [
                Generation(
                    [int(token) for token in answer["tokens"]],
                    answer["reason"] != "length",
                    [float(value) for value in answer.get("logprobs", ())],
                    cast(FinishReason, answer["reason"]),
                )
                for answer in row["responses"]
            ]
            if any(answer.reason not in ("eos", "stop", "length") or eos_id in answer.tokens for answer in answers):
                raise ValueError
            found[int(row["id"])] = answers
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: is not a row {{"id", "responses": [{{"tokens", "reason"}}]}} with a reason of eos, stop or '
                "length, and tokens without the end-of-sequence id"
            ) from error
    for request in requests:
        samples = found.get(request["id"], [])
        if len(samples) != request["num_samples"] or any(len(s.tokens) > request["max_tokens"] for s in samples):
            raise ValueError(
                f"{path}: has {len(samples)} responses to prompt {request['id']}; expected {request['num_samples']}, of at "
                f"most {request['max_tokens']} tokens each"
            )
    return [found[request["id"]] for request in requests]
