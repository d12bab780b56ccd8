"""The largest Llama that the device trains, with LoRA and with full weights.

The memory of two depths gives the depth that should fit. That depth is then trained, less depth if it does not fit.
"""

from typing import Any

import torch

from benchmarks.common import gpu, gpu_models
from lightning_align.models.lora import LoRAConfig, add_lora, train_only
from lightning_align.scoring.sums import response_logprobs
from lightning_align.training.loading import count_targets

# The layers of Llama 3 8B.
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SHARE = 0.93
"""Share of the memory that a depth may be predicted to take."""


def train(session: gpu.Session, way: str, depth: int, length: int) -> dict[str, Any]:
    """A few SFT steps of a row, with gradient checkpointing."""
    from lightning_align.models.pretrained import PretrainedLM

    torch.manual_seed(0)
    vocabulary = 64 if session.dry else gpu_models.VOCABULARY
    config = gpu_models.configuration("tiny", vocabulary, **(TINY if session.dry else SHAPE), num_hidden_layers=depth)
    # Full weights are float32 under autocast, as bf16-mixed has them. A frozen base model is in bfloat16.
    dtype = "bfloat16" if way == "LoRA" else "float32"
    session.free()
    with session.device:
        model = PretrainedLM(config=config, dtype=dtype, gradient_checkpointing=True).to(session.device).train()
        if way == "LoRA":
            add_lora(model, LoRAConfig(rank=16))
            train_only(model, "default")
    model.to(session.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=not session.dry)
    tokens = torch.randint(1, vocabulary, (1, length))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    targets = mask & (torch.arange(length) >= length // 2)
    batch = count_targets({"tokens": tokens, "mask": mask, "targets": targets})
    batch = {name: value.to(session.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def step() -> None:
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            loss = -response_logprobs(model, batch).sums.sum() / length
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = session.median(step, rounds=3, warmup=2)
    number = sum(parameter.numel() for parameter in model.parameters())
    return {"depth": depth, "weights, billions": number / 1e9, "peak memory, MiB": session.peak_mib(), "s per step": seconds}


def main() -> None:
    """Measure and print."""
    made = gpu.parser(__doc__)
    made.add_argument("--length", type=int, default=2048, help="tokens of the row")
    arguments = gpu.parse(made)
    session = gpu.Session(
        "largest",
        "The largest model",
        f"Llamas with layers of 8B, one row of {arguments.length} tokens, AdamW, gradient checkpointing. Full weights are in "
        "float32 under bf16-mixed; with LoRA of rank 16 the base model is in bfloat16.",
        arguments,
    )
    length = 16 if session.dry else arguments.length
    whole = 1e9 if session.dry else torch.cuda.get_device_properties(session.device).total_memory / 2**20
    for way, probes in (("LoRA", (8, 16)), ("full weights", (2, 6))):
        found: list[dict[str, Any]] = []
        for depth in (1, 2) if session.dry else probes:
            with session.part(f"{way}, {depth} layers", needs=60):
                found.append(train(session, way, depth, length))
                session.add("Models that train", {"weights trained": way, **found[-1]})
        if len(found) < 2:
            continue
        first, second = (float(row["peak memory, MiB"]) for row in found)
        steps = found[1]["depth"] - found[0]["depth"]
        per_layer = (second - first) / steps
        depth = 3 if session.dry else int(found[1]["depth"] + (SHARE * whole - second) / per_layer)
        session.note(f"{way}: MiB per layer", per_layer)
        for tried in dict.fromkeys((depth, int(depth * 0.93), int(depth * 0.85))):
            fits = False
            with session.part(f"{way}, {tried} layers", needs=90):
                try:
                    session.add("Models that train", {"weights trained": way, **train(session, way, tried, length)})
                    fits = True
                except torch.OutOfMemoryError:
                    session.add("Models that train", {"weights trained": way, "depth": tried, "s per step": "out of memory"})
            if fits:
                break
    session.finish()


if __name__ == "__main__":
    main()
