"""``lightning-align eval``: tasks of the lm-eval harness on a checkpoint or an exported folder (extra ``eval``)."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from lightning_align.console.chat import device_of, load
from lightning_align.console.names import did_you_mean
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.language_model import context_length
from lightning_align.runtime.files import check_writable, publish_text
from lightning_align.scoring.texts import TextScorer

BOOTSTRAP = 1000
"""Samples for the standard errors of metrics without a formula. The harness takes 100,000, which can last minutes."""


def evaluate(
    model: str,
    *,
    tasks: str,
    output: str = "results.json",
    include: str | None = None,
    tokenizer: str | None = None,
    template: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Evaluate a model on tasks of the lm-eval harness. Prints a table and writes the results as JSON.

    Args:
        model: A checkpoint of a run, or an exported folder.
        tasks: The names of the tasks or groups, separated by commas.
        output: The JSON file for the results.
        include: A folder with tasks of your own, as YAML files of the harness.
        tokenizer: The tokenizer, as in the data module. Default is that of the checkpoint or the folder.
        template: Whether prompts are turns of a conversation, written with the chat template of the tokenizer.
        num_fewshot: The number of examples before each question. Default is what the task says.
        limit: Evaluate only the first questions of each task.
        batch_size: The number of texts that are computed together.
        max_length: The number of tokens that the model reads at most. Default is the context of the model.
        device: The device: cpu, cuda, mps, or auto for the first one there is.
        seed: The seed of the random numbers of sampled answers and of the examples.

    Raises:
        ValueError: If lm-eval is missing, a task does not exist or its data cannot be loaded, or the model cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("`eval` needs the lm-eval harness. Install it with: pip install 'lightning-align[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    if include is not None and not Path(include).is_dir():
        raise ValueError(f"`include` must be a folder with tasks, but there is no folder {include}.")
    check_writable(output)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=include, include_defaults=include is None)
    if include is not None and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include)  # reads thousands of files
    for name in names:
        if not manager.match_tasks([name]):
            near = did_you_mean(name, manager.all_tasks)
            raise ValueError(f"no task {name!r}{near or '.'} Tasks of your own are read from the folder that --include names.")
    policy, reader = load(model, tokenizer)
    policy = policy.to(device_of(device))
    adapter = harness_model(policy, reader, batch_size=batch_size, max_length=max_length, seed=seed)
    try:
        found: Any = simple_evaluate(
            adapter,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=template,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
            random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(f"The data of {tasks} cannot be loaded: {str(error).splitlines()[0]}") from error
    kept = {name: found[name] for name in ("results", "groups", "versions", "n-shot", "n-samples", "configs") if name in found}
    settings = {"model": model, "template": template, "limit": limit, "max_length": adapter.scorer.max_length, "seed": seed}
    publish_text(output, json.dumps({"settings": settings, **kept}, indent=2, default=str) + "\n")
    print(make_table(found))
    if adapter.scorer.truncated:
        print(f"{adapter.scorer.truncated} texts are longer than the context, and were scored without their beginning.")
    print(f"results: {output}")


def harness_model(
    policy: nn.Module, tokenizer: Tokenizer, *, batch_size: int = 8, max_length: int | None = None, seed: int = 0
) -> Any:
    """Make a language model of this package a model of the lm-eval harness, for ``lm_eval.simple_evaluate``.

    Args:
        policy: The language model.
        tokenizer: Its tokenizer.
        batch_size: The number of texts that are computed together.
        max_length: The number of tokens that the model reads at most. Default is the context of the model.
        seed: The seed of sampled answers.

    Returns:
        An ``lm_eval.api.model.LM``. Its ``scorer`` is the `TextScorer`.
    """
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]  # the package is optional, and has no types here
        def __init__(self) -> None:
            super().__init__()
            self.scorer = TextScorer(policy, tokenizer, batch_size=batch_size, max_length=max_length)

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(tokenizer, "name", type(tokenizer).__name__)).replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return "" if chat_template else None

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return rendered(tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            with _bar(len(requests), "Scoring", disable_tqdm) as bar:
                return self.scorer.loglikelihoods([request.args for request in requests], done=bar.update)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            with _bar(len(requests), "Scoring texts", disable_tqdm) as bar:
                return self.scorer.rolling([request.args[0] for request in requests], done=bar.update)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            with _bar(len(requests), "Generating", disable_tqdm) as bar:
                return answers(self.scorer, [request.args for request in requests], seed=seed, done=bar.update)

    return Adapter()


def answers(scorer: TextScorer, requests: Sequence[tuple[str, dict[str, Any]]], *, seed: int, done: Any) -> list[str]:
    """Generate the answers of a harness.

    Args:
        scorer: The model and its tokenizer.
        requests: Contexts, and the settings of the harness: `until`, `max_gen_toks`, `do_sample`, `temperature` and others.
        seed: The seed of sampled answers.
        done: Gets the number of answers of each step.

    Returns:
        The texts up to the first text of `until`, which is not part of them.
    """
    found: dict[int, str] = {}
    room = context_length(scorer.model)
    numbered = sorted(enumerate(requests), key=lambda item: (json.dumps(item[1][1], sort_keys=True, default=str), item[0]))
    for _, group in groupby(numbered, key=lambda item: json.dumps(item[1][1], sort_keys=True, default=str)):
        items = list(group)
        settings = dict(items[0][1][1])
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        length = int(settings.get("max_gen_toks", settings.get("max_new_tokens", 256)))
        sampled = bool(settings.get("do_sample", float(settings.get("temperature", 0) or 0) > 0))
        config = GenerationConfig(
            max_new_tokens=length if room is None else min(length, room - 1),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=settings.get("top_k"),
            seed=seed,
            batch_size=scorer.batch_size,
            stop=until,
        )
        ends = Ends.of(tokenizer=scorer.tokenizer, model=scorer.model, config=config)
        for first in range(0, len(items), scorer.batch_size):
            part = items[first : first + scorer.batch_size]
            prompts = [scorer.encode(context) or [scorer.prefix] for _, (context, _) in part]
            if room is not None:
                scorer.truncated += sum(len(prompt) > room - config.max_new_tokens for prompt in prompts)
                prompts = [prompt[-(room - config.max_new_tokens) :] for prompt in prompts]
            for (number, _), responses in zip(
                part, generate(scorer.model, prompts, config, ends=ends, ids=[number for number, _ in part]), strict=True
            ):
                found[number] = cut(scorer.tokenizer.decode(responses[0].tokens), until)
            done(len(part))
    return [found[number] for number in range(len(requests))]


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of some texts."""
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def rendered(tokenizer: Tokenizer, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
    """Write a conversation with the chat template of the tokenizer."""
    end = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    parts = tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
    return "".join(part.text + end * part.eos for part in parts)


def _bar(total: int, title: str, disabled: bool) -> Any:
    return tqdm(total=total, desc=title, disable=disabled or None)  # None: where standard error is no terminal
