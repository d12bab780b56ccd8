"""What one rank measures of its memory: a policy that is built for sharding, and the values of its weights."""

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.runtime.lightning_internals import trainer_of
from lightning_align.sft.module import SFTModule
from tests.distributed.train import SGD, STRATEGIES, full

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES = {"small": (64, 32, 2), "medium": (1024, 224, 32)}
"""The vocabulary, the width and the number of layers."""


def palm(size: str) -> PaLM:
    vocabulary, dim, depth = SIZES[size]
    return PaLM(num_tokens=vocabulary, dim=dim, depth=depth, heads=4, dim_head=dim // 4, ff_mult=4)


def llama_config(size: str) -> dict[str, Any]:
    vocabulary, dim, depth = SIZES[size]
    return {**LLAMA, "vocab_size": vocabulary, "hidden_size": dim, "intermediate_size": 5 * dim, "num_hidden_layers": depth}


def modules(size: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """The modules of a size, by case. Each has a backbone that is built in `configure_model`."""
    config = llama_config(size)
    llama = folder / f"llama-{size}"
    base = str(folder / f"base-{size}.pt")
    return {
        "palm": lambda: SFTModule(lambda: palm(size), optimizer=SGD),
        "lora": lambda: DPOModule(lambda: palm(size), init_from=base, lora=LoRAConfig(rank=2), optimizer=SGD),
        "reference": lambda: DPOModule(lambda: palm(size), optimizer=SGD),
        "moving": lambda: DPOModule(lambda: palm(size), reference="moving", optimizer=SGD),
        "config": lambda: SFTModule(lambda: PretrainedLM(config=dict(config)), optimizer=SGD),
        "folder": lambda: SFTModule(lambda: PretrainedLM(str(llama)), optimizer=SGD),
        "tied": lambda: SFTModule(lambda: PretrainedLM(config={**config, "tie_word_embeddings": True}), optimizer=SGD),
        "pretrained": lambda: DPOModule(lambda: PretrainedLM(str(llama)), optimizer=SGD),
    }


def prepare(size: str, folder: Path) -> None:
    """Write the weights that the modules start from."""
    torch.manual_seed(1)
    torch.save(palm(size).state_dict(), folder / f"base-{size}.pt")
    torch.manual_seed(2)
    PretrainedLM(config=llama_config(size)).model.bfloat16().save_pretrained(folder / f"llama-{size}", max_shard_size="40MB")


def anonymous() -> int:
    """The bytes of memory of this process that are not the cache of a file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@contextlib.contextmanager
def peak(result: dict[str, int]) -> Iterator[None]:
    """Record the most memory above that at the start of the block."""
    start, stop = anonymous(), threading.Event()
    result["peak"] = 0

    def watch() -> None:
        while not stop.is_set():
            result["peak"] = max(result["peak"], anonymous() - start)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def built(case: str, size: str, folder: Path, strategy: Any, devices: int) -> tuple[Any, dict[str, int], Tensor]:
    """Build the policy of a case as a Trainer does; the module, the peak, and the state of the generator after it."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module, measured = modules(size, folder)[case](), {}
    original = module.configure_model
    states = []

    def configure() -> None:
        L.seed_everything(5, verbose=False)
        with peak(measured):
            original()
        states.append(torch.get_rng_state())

    module.configure_model = configure
    trainer.validate(module, [], verbose=False)
    assert trainer_of(module) is not None
    return module, measured, states[0]


def main(small: list[str], medium: list[str], folder: Path) -> None:
    """Build cases of both sizes. The memory of modules and caches is not the model's, so what is measured comes second."""
    # Every block of 64 KiB and more is mapped by itself and unmapped when it is freed, so that what is measured is in use. The
    # variable keeps the package from choosing otherwise.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    assert ctypes.CDLL(None).mallopt(-3, 2**16) == 1
    results: dict[str, Any] = {}
    for size, case in [*(("small", case) for case in small), *(("medium", case) for case in medium)]:
        module, measured, state = built(case, size, folder, STRATEGIES["fsdp2"]("dpo"), 2)
        held = sum(p.to_local().nbytes for p in module.policy.parameters())  # type: ignore[attr-defined]
        result = results[f"{size} {case}"] = {"peak": measured["peak"], "held": held, "rng": state}
        if size == "small":
            result["state"] = full(module.policy)
            if case in ("reference", "pretrained"):
                result["reference"], result["hash"] = full(module.reference.model), module.initial_policy.weights
            if case == "moving":
                result["reference"] = full(module.reference_average)
        del module
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2].split(","), Path(sys.argv[3]))
