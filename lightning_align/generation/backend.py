"""Generation backends: the native sampler, and engines in other processes that read prompts and weights from files."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.generation.answers import close_answer
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.models.weights import state_hash
from lightning_align.runtime.files import publish, publish_text
from lightning_align.runtime.ranks import world


class GenerationBackend(Protocol):
    """An engine that generates responses. It receives the weights of a model before it generates."""

    whole: bool
    """Whether one call of `generate` gets all prompts of an iteration. If false, each call gets one batch."""

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Load the weights that `generate` uses from now on. Called on every rank."""
        ...

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        ends: Ends,
        ids: Sequence[int],
        iteration: int,
        limits: Sequence[int],
    ) -> list[list[Generation]]:
        """Generate responses. See `lightning_align.generation.sampler.generate`."""
        ...


class NativeBackend:
    """The sampler of this package. It runs in this process."""

    whole = False

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Do nothing, because `generate` uses the model itself."""

    def generate(self, model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any) -> Any:
        """Generate responses. See `lightning_align.generation.sampler.generate`."""
        return generate(model, prompts, config, **options)


class FileBackend:
    """Another engine (vLLM, SGLang) that exchanges files with this process.

    For iteration t, the backend writes two files:

    - ``iteration_t/weights.safetensors`` holds the weights to generate with.
    - ``iteration_t/prompts-<hash>.jsonl`` holds rows of ``{"id", "prompt", "max_tokens", "num_samples"}``. The prompt is a
      list of token ids.

    The engine must then write ``iteration_t/responses-<hash>.jsonl``, with rows of
    ``{"id", "responses": [{"tokens", "reason"}]}``. The tokens may include the end-of-sequence token. The reason is ``eos``,
    ``stop`` or ``length``. `close_answer` brings them into the form of our own sampler. A response may also have
    ``"logprobs"``, with the log-prob of each token. The log then shows how much the log-probs of the engine differ from ours
    (``engine_gap``).

    If the responses are missing, the backend waits for `wait_seconds` and then raises an error that names the file. Write the
    file and start the same run again to continue.
    """

    whole = True

    def __init__(self, folder: str, *, wait_seconds: float = 0.0) -> None:
        """Set the folder and the waiting time.

        Args:
            folder: The folder of the exchanged files.
            wait_seconds: How many seconds to wait for the responses before an error is raised. Default is 0.
        """
        self.folder, self.wait_seconds = Path(folder), wait_seconds

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Write the weights, unless the file exists already.

        Raises:
            ValueError: If the existing file has other weights. The responses in its folder would come from another model.
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
                f"{path} has other weights ({found[:12]}) than iteration {iteration} of this run ({own[:12]}). The responses "
                f"in this folder come from another run. Give FileBackend another `folder`, or remove {path.parent}."
            )

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        ends: Ends,
        ids: Sequence[int],
        iteration: int,
        limits: Sequence[int],
    ) -> list[list[Generation]]:
        """Write the prompts and read the responses.

        Raises:
            ValueError: If the responses are not written in time, or do not match the prompts.
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
                    f"{path} does not exist yet. Generate it from {folder / f'prompts-{name}'} and from the weights in the "
                    "same folder. Then start the same run again (with --ckpt_path if it has a checkpoint)."
                )
            time.sleep(1.0)
        return _read_responses(path, requests, ends)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_responses(path: Path, requests: list[dict[str, Any]], ends: Ends) -> list[list[Generation]]:
    found: dict[int, list[Generation]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            answers = [
                close_answer(a["tokens"], a["reason"], ends, logprobs=a.get("logprobs", ()), end=a.get("end"))
                for a in row["responses"]
            ]
            found[int(row["id"])] = answers
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number} is not a valid row ({error}). Expected {{"id", "responses": [{{"tokens", "reason"}}]}}. The '
                "reason must be eos, stop or length."
            ) from error
    for request in requests:
        samples = found.get(request["id"], [])
        if len(samples) != request["num_samples"] or any(len(s.tokens) > request["max_tokens"] for s in samples):
            raise ValueError(
                f"{path} has {len(samples)} responses to prompt {request['id']}. Expected {request['num_samples']} responses "
                f"of at most {request['max_tokens']} tokens each."
            )
    return [found[request["id"]] for request in requests]
