"""The code in a model card that loads what was exported. It runs in the folder of the export, as it is printed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_align.models.palm import PaLM
from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained import PretrainedLM

HERE = 'folder = "."  # this folder; from elsewhere, its path or its name on the Hugging Face hub'
CHAT = '[{"role": "user", "content": "Hello"}]'


class AdapterUse(NamedTuple):
    """What the code for adapters alone needs to know."""

    base: str | None
    """The folder or hub name that the adapters name as their base model, or None."""
    start: str | None = None
    """The checkpoint or folder that the run began with, which has the base model if ``base`` is None."""
    folder: str | Path = "."
    """The folder of the export. The paths of local models are relative to it."""


def is_local(name: str) -> bool:
    """Return whether a model's name is a path and not a name on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def usage(policy: nn.Module, *, tokenizer: Any = None, adapter: AdapterUse | None = None) -> list[str]:
    """Return the lines of a section that loads the model, with Markdown.

    Args:
        policy: The model that was trained.
        tokenizer: The tokenizer that is written beside it, if any.
        adapter: How to find the base model, if only adapters are written.
    """
    if adapter is not None:
        return _adapter(policy, adapter)
    if isinstance(policy, PretrainedLM):
        return _block(_of_transformers(policy, tokenizer))
    return _block(_of_this_package(policy, tokenizer))


def _block(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```"]


def _auto_class(policy: PretrainedLM) -> str:
    from transformers import AutoModelForCausalLM

    # A lazy mapping, which loads a class if asked for it.
    knows = type(policy.model.config) in AutoModelForCausalLM._model_mapping.keys()
    return "AutoModelForCausalLM" if knows else "AutoModelForImageTextToText"


def _of_transformers(policy: PretrainedLM, tokenizer: Any) -> list[str]:
    kind = _auto_class(policy)
    lines = [f"from transformers import {kind}{'' if tokenizer is None else ', AutoTokenizer'}", "", HERE]
    lines.append(f"model = {kind}.from_pretrained(folder)")
    if tokenizer is None:
        return lines
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    # A tokenizer of this package is always written with a chat template.
    if hasattr(tokenizer, "save") or getattr(tokenizer, "chat_template", None):
        options = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
        lines += [f"messages = {CHAT}", f"inputs = tokenizer.apply_chat_template(messages, {options})"]
    else:
        lines.append('inputs = tokenizer("Hello", return_tensors="pt")')
    return [
        *lines,
        'ids, mask = inputs["input_ids"], inputs["attention_mask"]',
        "output = model.generate(ids, attention_mask=mask, max_new_tokens=32)",
        "print(tokenizer.decode(output[0, ids.shape[1] :]))",
    ]


def _of_this_package(policy: nn.Module, tokenizer: Any) -> list[str]:
    read = ["from lightning_align.models.formats import read_model", "", HERE, "model = read_model(folder)"]
    if not isinstance(policy, PaLM) or not hasattr(tokenizer, "save"):
        return read
    return [
        "from lightning_align import GenerationConfig, generate",
        "from lightning_align.data.tokenizer import load_tokenizer",
        *read,
        "tokenizer = load_tokenizer(folder)",
        f"parts = tokenizer.render({CHAT}, add_generation_prompt=True)",
        'prompt = tokenizer.encode_batch(["".join(part.text for part in parts)])[0].ids',
        "ends = {tokenizer.eos_id, *getattr(tokenizer, 'end_ids', ())}",
        "((answer,),) = generate(model, [prompt], GenerationConfig(max_new_tokens=32), eos_id=sorted(ends))",
        "print(tokenizer.decode(answer.tokens))",
    ]


def _from_here(name: str, folder: str | Path) -> str:
    """Return a hub name unchanged, and the path of a local model relative to the folder of the export."""
    return Path(os.path.relpath(name, folder)).as_posix() if is_local(name) else name


def _adapter(policy: nn.Module, adapter: AdapterUse) -> list[str]:
    of_peft = isinstance(policy, PretrainedLM) and has_peft(policy.model)
    if isinstance(policy, PretrainedLM) and adapter.base is not None:
        kind = _auto_class(policy)
        lines = ["from peft import PeftModel", f"from transformers import {kind}", "", HERE]
        lines.append(f'base = {kind}.from_pretrained("{_from_here(adapter.base, adapter.folder)}")')
        if getattr(policy, "num_new_tokens", 0):
            lines.append(f"base.resize_token_embeddings({policy.num_tokens})  # the adapters have the rows of the new tokens")
        return _block([*lines, "model = PeftModel.from_pretrained(base, folder)"])
    if adapter.start is not None and not of_peft:
        return _block(
            [
                "from lightning_align.models.checkpoint import load_policy",
                "from lightning_align.models.formats import read_adapter",
                "",
                HERE,
                f'model = load_policy("{_from_here(adapter.start, adapter.folder)}")',
                "read_adapter(model, folder)",
            ]
        )
    if of_peft:
        read = "`PeftModel.from_pretrained(model, folder)` of PEFT adds them to it"
    else:
        read = "`lightning_align.models.formats.read_adapter(model, folder)` adds them to it"
    return [f"The adapters do not name their base model, because it is in no folder of its own. {read}."]
