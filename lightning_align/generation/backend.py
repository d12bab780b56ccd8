"""Generation backends: the native sampler, and an engine in another process that reads and writes files."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_align.generation.ends import Ends
from lightning_align.generation.handoff import Served, write_served, write_settings
from lightning_align.generation.responses import IncompleteError, read_responses
from lightning_align.generation.sampler import Generation, GenerationConfig, generate, generate_parts
from lightning_align.models.language_model import vocabulary_size
from lightning_align.runtime.files import publish_text
from lightning_align.runtime.ranks import world


class GenerationBackend(Protocol):
    """An engine that generates responses. It receives the weights of a model before it generates.

    A backend may also have ``sync_model(served, *, iteration)``, which then replaces `sync_weights`. It gets a `Served`: the
    model with its weights, tokenizer, ends and settings. If it has a true ``streams``, its ``generate_parts`` is used instead
    of `generate`. See `lightning_align.generation.sampler.generate_parts`.
    """

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

    def __init__(self, *, continuous: bool = False) -> None:
        """Set how batches follow each other.

        Args:
            continuous: Whether the prompts of the next batch start as soon as a row has ended. This is faster. But which rows
                are decoded together then depends on where a run was stopped and on the number of processes. Logits are
                rounded differently, so a resumed run may rarely draw another token. Default is false: resumed runs are equal
                bit for bit.
        """
        self.streams = continuous

    def sync_weights(self, weights: Mapping[str, Tensor], *, iteration: int) -> None:
        """Do nothing, because `generate` uses the model itself."""

    def generate(self, model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any) -> Any:
        """Generate responses. See `lightning_align.generation.sampler.generate`."""
        return generate(model, prompts, config, **options)

    def generate_parts(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any
    ) -> Iterator[tuple[int, list[list[Generation]]]]:
        """Generate responses part by part. See `lightning_align.generation.sampler.generate_parts`."""
        return generate_parts(model, prompts, config, **options)


class FileBackend:
    """Another engine (vLLM, SGLang) that exchanges files with this process. See ``examples/vllm_generate.py``.

    For iteration t, the backend writes:

    - ``iteration_t/model/``: the model with its tokenizer. A model of transformers opens in the engine as it is.
    - ``iteration_t/generation.json``: the sampling settings under the names of vLLM (``sampling``), the end-of-sequence ids
      and stop texts (``ends``), and the iteration.
    - ``iteration_t/prompts-<hash>.jsonl``: rows of ``{"id", "prompt", "max_tokens", "num_samples"}``. The prompt is a list of
      token ids. This file is written last.

    The engine must then write ``iteration_t/responses-<hash>.jsonl``, with rows of
    ``{"id", "responses": [{"tokens", "reason"}]}``. The reason is ``eos``, ``stop`` or ``length``. The tokens may end with the
    end-of-sequence id. A response may also have ``"logprobs"``, with the log-prob of each token and of the end-of-sequence
    token. The log then shows how much the log-probs of the engine differ from ours (``engine_gap``). Each row is checked.

    If responses are missing, the backend waits for `wait_seconds` and then raises an error that names the file. Write the
    file and start the same run again to continue. Prompts that were asked before are not asked again.
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
        """Do nothing. `sync_model` replaces this method."""

    def sync_model(self, served: Served, *, iteration: int) -> None:
        """Write the model, unless it exists already.

        Raises:
            ValueError: If the existing folder has other weights. The responses in it would come from another model.
        """
        if world()[0] == 0:
            write_served(self.folder / f"iteration_{iteration}" / "model", served, iteration=iteration)

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
        """Write the settings and the prompts, and read the responses.

        Raises:
            ValueError: If the settings differ from those of the existing files, or if the responses are not written in time
                or do not match the prompts.
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
        folder = self.folder / f"iteration_{iteration}"
        asked, known = _asked(folder, requests)
        if world()[0] == 0:
            write_settings(folder / "generation.json", config, ends, iteration=iteration)
            if not asked.exists():
                publish_text(asked, "".join(json.dumps(request) + "\n" for request in requests))
        path = asked.with_name(asked.name.replace("prompts-", "responses-", 1))
        deadline = time.monotonic() + self.wait_seconds
        while True:
            late = time.monotonic() >= deadline
            if path.is_file():
                try:
                    return read_responses(path, requests, known, ends, vocabulary=vocabulary_size(model))
                except IncompleteError:
                    if late:
                        raise
            elif late:
                raise ValueError(
                    f"{path} does not exist yet. Generate it from {asked}, from the model in the same folder and with "
                    "generation.json (examples/vllm_generate.py does). Then start the same run again (with --ckpt_path if it "
                    "has a checkpoint)."
                )
            time.sleep(min(1.0, max(0.01, deadline - time.monotonic())))


def _asked(folder: Path, requests: list[dict[str, Any]]) -> tuple[Path, list[int]]:
    """Return the prompts file that asks these requests, and the ids of all of its prompts.

    It is an existing one that has all of them, because a run that was killed asks only for what it has not stored. Otherwise
    it is a new one, named by its content.
    """
    for path in sorted(folder.glob("prompts-*.jsonl")):
        content = path.read_bytes()
        if path.stem != f"prompts-{_short_hash(content)}":
            raise ValueError(
                f"{path} was changed after it was written: its name is the hash of other content. Remove it and the responses "
                "to it, and start the same run again."
            )
        rows = [json.loads(line) for line in content.splitlines()]
        known = {row["id"]: row for row in rows}
        if all(known.get(request["id"]) == request for request in requests):
            return path, list(known)
    text = "".join(json.dumps(request) + "\n" for request in requests)
    return folder / f"prompts-{_short_hash(text.encode())}.jsonl", [request["id"] for request in requests]


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
