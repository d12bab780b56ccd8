"""What one rank of a test of tensor parallelism does: train SFT and DPO with split models, and write what came of it."""

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.sft.module import SFTModule
from lightning_align.spin.module import SPINModule
from tests.distributed import train
from tests.distributed.train import DPO_BATCH, LIMIT, SFT_BATCH, checkpoint_of, run
from tests.toys import VOCABULARY, tiny_palm

COPIES = 2
"""How many ranks hold the parts of one model."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3")
"""Biases, norms of queries and keys, tied embeddings, soft caps, fused projections."""
CASES = ("sft_palm", "dpo_palm", "sft_llama", "dpo_qwen3")
REFUSED = {
    "heads": (lambda: SFTModule(tiny_palm(heads=3)), "tensor_parallel_size must divide `heads`"),
    "key_value_heads": (lambda: SFTModule(family("llama", num_key_value_heads=1)), "`num_key_value_heads`"),
    "no_plan": (lambda: SFTModule(PretrainedLM(config=GPT2)), "GPT2LMHeadModel, because transformers has no"),
    "lora": (lambda: SFTModule(tiny_palm(), lora=LoRAConfig(rank=2)), "PaLM with LoRA or PEFT adapters"),
    "peft": (lambda: SFTModule(family("llama", adapter={"r": 2})), "LlamaForCausalLM with LoRA or PEFT adapters"),
    "spin": (lambda: SPINModule(tiny_palm()), "tensor_parallel_size must be 1 for SPINModule"),
}
GPT2 = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def family(name: str, *, adapter: Any = None, **sizes: Any) -> PretrainedLM:
    torch.manual_seed(0)
    return PretrainedLM(config={**SIZES, "model_type": name, **sizes}, adapter=adapter)


def build(case: str, folder: Path) -> Any:
    method, _, name = case.partition("_")
    if name == "palm":
        backbone: Any = tiny_palm(qk_rmsnorm=method == "dpo", tie_embeddings=method == "sft")
    else:
        backbone = family(name, tie_word_embeddings=name != "llama")
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    if method == "sft":
        return SFTModule(backbone, optimizer=optimizer), SFT_BATCH
    return DPOModule(backbone, sft_weight=0.3, optimizer=optimizer), DPO_BATCH


def strategy(case: str, *, whole: bool = False) -> Any:
    return ModelParallelStrategy(
        data_parallel_size=torch_ranks() // COPIES,
        tensor_parallel_size=COPIES,
        save_distributed_checkpoint=not whole and case.endswith("palm"),
        process_group_backend="gloo",
        timeout=LIMIT,
    )


def torch_ranks() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


def refusal(make: Any) -> str:
    from tests.distributed.train import L

    module = make()
    trainer = L.Trainer(
        accelerator="cpu", devices=torch_ranks(), strategy=strategy(""), logger=False, enable_checkpointing=False, max_steps=1
    )
    try:
        trainer.fit(module, torch.utils.data.DataLoader([SFT_BATCH], batch_size=None))  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    warnings.filterwarnings("error", message=".*sync_dist")
    train.build = build
    ranks = torch_ranks()
    results: dict[str, Any] = {}
    for case in CASES if ranks == 2 else CASES[1:3]:
        results[case] = run(case, strategy, ranks, folder, copies=COPIES)
        results[f"{case} resumed"] = run(case, strategy, ranks, folder, copies=COPIES, resumed=True)
        results[f"{case} opened"] = run(case, strategy, ranks, folder, copies=COPIES, opened=checkpoint_of(case, folder, 1))
    if ranks == 2:
        results["refused"] = {name: refusal(make) for name, (make, _) in REFUSED.items()}
        results["families"] = {name: split_logits(name) for name in FAMILIES}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def split_logits(name: str) -> tuple[Any, Any]:
    """Logits and gradients of a split model, as one process has them."""
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_align.models.tensor_parallel import split_model

    model = split_model(family(name), init_device_mesh("cpu", (COPIES,), mesh_dim_names=("tensor_parallel",)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return loss_and_gradients(model)


def loss_and_gradients(model: Any) -> tuple[Any, Any]:
    model.eval()
    logits = model(torch.arange(12).view(2, 6) % VOCABULARY)
    logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for name, gradient in gradients.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
