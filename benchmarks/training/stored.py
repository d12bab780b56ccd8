"""Training steps that take the states of frozen parts from a store: the augment of CALM, the encoder of RETRO's neighbors.

Models are Llamas of the sizes of SmolLM2-135M with random weights. CALM composes two of them. RETRO is built around a frozen
one with an encoder that is not conditioned on the chunk: only then are the states of a neighbor the same in every row. The
paper trains this encoder. It is frozen here, which is what storing its states takes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.calm.step import ours_step
from lightning_align import CALM, Augment, AugmentInput, ConnectionConfig, PretrainedLM
from lightning_align.calm.states import StateStore
from lightning_align.retro.model import RETRO, NeighborTokens
from lightning_align.scoring.head import target_logprobs

SIZES = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
REQUIRED = 1.3


def calm_sides(sizes: dict[str, Any], rows: int, length: int, folder: str) -> dict[str, Callable[[], object]]:
    """A step of CALM with and without stored states, and what reading them takes."""
    last = sizes["num_hidden_layers"]
    spec = Augment(PretrainedLM(config=sizes), connections=[[last, 2], [last, 6], [last, 10]], alignment="aligned")
    model = CALM(PretrainedLM(config=sizes), spec, connection=ConnectionConfig(heads=8, dim_head=64))
    optimizer = torch.optim.Adam(model.connections.parameters(), lr=1e-4)
    tokens = torch.randint(5, sizes["vocab_size"], (rows, length))
    store, mask = StateStore(Path(folder), "benchmark"), torch.ones_like(tokens, dtype=torch.bool)

    def read() -> list[Tensor]:
        return store.fetch(model.readers[0], tokens, mask)

    return {
        "states read from the store, alone": read,
        "the augment computed": lambda: ours_step(model, optimizer, tokens, [AugmentInput(tokens)]),
        "its states stored": lambda: ours_step(model, optimizer, tokens, [AugmentInput(tokens, states=read())]),
    }


def retro_sides(sizes: dict[str, Any], rows: int, length: int) -> dict[str, Callable[[], object]]:
    """A step of RETRO-fitting with a trained encoder, with a frozen one, and with stored encodings."""
    model = RETRO(PretrainedLM(config=sizes), conditioned=False, train_decoder=False, heads=8, dim_head=64)
    chunks = length // model.chunk_size
    tokens = torch.randint(5, sizes["vocab_size"], (rows, length))
    shape = (rows, chunks, 2, 2 * model.chunk_size)
    neighbors = NeighborTokens(torch.randint(5, sizes["vocab_size"], shape), torch.ones(shape, dtype=torch.bool))
    with torch.no_grad():
        flat = NeighborTokens(neighbors.tokens.flatten(0, 1), neighbors.mask.flatten(0, 1))
        stored = model.encode(flat).unflatten(0, (rows, chunks))

    def step(trained: bool, encodings: Tensor | None = None) -> None:
        model.encoder.requires_grad_(trained)
        hidden = model.hidden(tokens, neighbors=neighbors, encodings=encodings)[:, :-1].flatten(0, 1)
        (-target_logprobs(hidden, model.head, tokens[:, 1:].flatten()).sum()).backward()
        model.zero_grad()

    return {
        "the encoder trained": lambda: step(True),
        "the encoder frozen": lambda: step(False),
        "its encodings stored": lambda: step(False, stored),
    }


def measured(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median CPU seconds of each side. The sides take turns; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            side()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row; RETRO's have twice as many")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        calm = measured(calm_sides(sizes, options.rows, options.length, folder), options.rounds)
    retro = measured(retro_sides(sizes, max(1, options.rows // 2), 2 * options.length), options.rounds)
    common.heading(
        "Training steps with stored states of frozen parts",
        f"Llamas of the sizes of SmolLM2-135M, {options.rows} rows of {options.length} tokens (CALM), or half as many of "
        f"twice the length with 2 neighbors per chunk (RETRO), {torch.get_num_threads()} thread(s). CPU seconds per step, "
        f"median of {options.rounds}.",
    )
    rows = [
        {"method": method, "side": side, "CPU s": f"{seconds:.3f}"}
        for method, found in (("CALM", calm), ("RETRO", retro))
        for side, seconds in found.items()
    ]
    print(common.table(rows))
    claims = [
        common.claim(f"step of {method}: {side} ÷ stored", f"≥ {REQUIRED}x", f"{ratio:.2f}x", ratio >= REQUIRED)
        for method, side, ratio in (
            ("CALM", "computed", calm["the augment computed"] / calm["its states stored"]),
            ("RETRO", "frozen encoder", retro["the encoder frozen"] / retro["its encodings stored"]),
            ("RETRO", "trained encoder", retro["the encoder trained"] / retro["its encodings stored"]),
        )
    ]
    print(common.table(claims))


if __name__ == "__main__":
    main()
