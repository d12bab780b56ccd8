"""A CALM training step, memory after many steps, and generation against CALM-pytorch.

Both sides wrap the same x-transformers models: anchor width 256, depth 8; augment width 128, depth 8; connections for every
second layer; 8 rows of 256 tokens; forward, backward and Adam. The peer's augment reads only a prompt of 64 tokens, so the row
to compare with it is `prefix`. In the row `aligned` our augment reads all 256 tokens, which the peer cannot do.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from benchmarks.common import MIB, Meter, alternate, claim, heading, load, median, ratio, resident, table
from lightning_align import CALM, Augment, AugmentInput, ConnectionConfig, GenerationConfig, PaLM, generate
from lightning_align.calm.module import composed_logprobs
from lightning_align.calm.states import StateStore

ROWS, LENGTH, PROMPT = 8, 256, 64


def x_transformer(dim: int, vocabulary: int) -> TransformerWrapper:
    """A model of depth 8 with heads of width 64."""
    stack = Decoder(dim=dim, depth=8, heads=dim // 64, rotary_pos_emb=True, attn_flash=True)
    return TransformerWrapper(num_tokens=vocabulary, max_seq_len=512, attn_layers=stack)


def pairs() -> list[list[int]]:
    """The layers that the peer connects with `connect_every_num_layers=2`."""
    return [[1, 1], [3, 3], [5, 5], [7, 7]]


def peer_of(anchor: nn.Module, augment: nn.Module) -> Any:
    """The peer's composition of copies of two models."""
    from CALM_pytorch import CALM as Peer
    from CALM_pytorch import AugmentParams

    return Peer(copy.deepcopy(anchor), AugmentParams(model=copy.deepcopy(augment), connect_every_num_layers=2))


def ours_step(model: CALM, optimizer: torch.optim.Optimizer, tokens: Tensor, inputs: Any) -> None:
    """One training step on all tokens."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    targets = mask.clone()
    targets[:, 0] = False
    logprobs = composed_logprobs(model, {"tokens": tokens, "mask": mask, "targets": targets}, inputs)
    (-logprobs.sums.sum() / logprobs.counts.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="steps of the memory test, which uses a vocabulary of 512")
    options = parser.parse_args()
    torch.manual_seed(0)
    vocabulary = options.vocabulary
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH))
    prompt = tokens[:, :PROMPT].clone()
    anchor, augment = x_transformer(256, vocabulary), x_transformer(128, vocabulary)
    anchor_alone = copy.deepcopy(anchor).requires_grad_(False).eval()
    config = ConnectionConfig(heads=8, dim_head=64)

    def ours(alignment: Any) -> tuple[CALM, torch.optim.Optimizer]:
        spec = Augment(copy.deepcopy(augment), connections=pairs(), alignment=alignment)
        model = CALM(copy.deepcopy(anchor), spec, connection=config)
        return model, torch.optim.Adam(model.connections.parameters(), lr=1e-4)

    peer = peer_of(anchor, augment)
    peer_optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4)
    prefix, prefix_optimizer = ours("prefix")
    aligned, aligned_optimizer = ours("aligned")

    def peer_step() -> None:
        peer(tokens, prompt=prompt).backward()
        peer_optimizer.step()
        peer_optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(Path(folder), "benchmark")
        mask = torch.ones_like(tokens, dtype=torch.bool)

        def stored_step() -> None:
            states = store.fetch(aligned.readers[0], tokens, mask)
            ours_step(aligned, aligned_optimizer, tokens, [AugmentInput(tokens, states=states)])

        def forward() -> None:
            with torch.no_grad():
                anchor_alone(tokens)

        sides = {
            "CALM-pytorch": peer_step,
            "ours, prefix": lambda: ours_step(prefix, prefix_optimizer, tokens, [AugmentInput(prompt)]),
            "ours, aligned": lambda: ours_step(aligned, aligned_optimizer, tokens, [None]),
            "ours, aligned, stored states": stored_step,
            "anchor forward alone": forward,
        }
        for side in sides.values():
            side()
        timings = alternate(sides, options.rounds)
    peer_time = timings["CALM-pytorch"]
    heading("CALM training step", f"{ROWS} x {LENGTH} tokens, vocabulary {vocabulary}, {torch.get_num_threads()} threads.")
    rows = [
        {
            "side": name,
            "s": f"{median(t.seconds for t in times):.3f}",
            "speedup over CALM-pytorch": f"{ratio(peer_time, times):.2f}",
            "background load": load(times),
        }
        for name, times in timings.items()
    ]
    print(table(rows))
    claims = []
    for side, required in (("ours, prefix", 1.2), ("ours, aligned", 1.2), ("ours, aligned, stored states", 1.5)):
        measured = ratio(peer_time, timings[side])
        claims.append(claim(f"step, {side}", f"≥ {required}x", f"{measured:.2f}x", measured >= required))
    claims.append(_memory(options.steps, config))
    claims.append(_generation(vocabulary, peer, prompt))
    claims.append(_alone(peer, prefix, tokens))
    print(table(claims))


def _memory(steps: int, config: ConnectionConfig) -> dict[str, str]:
    """Growth of memory between step 5 and the last step. The models are small, so that a leak is visible."""
    anchor, augment = x_transformer(64, 512), x_transformer(64, 512)
    peer = peer_of(anchor, augment)
    spec = Augment(augment, connections=pairs())
    model = CALM(anchor, spec, connection=config)
    optimizer = torch.optim.Adam(model.connections.parameters())
    tokens = torch.randint(0, 512, (2, 64))
    held: dict[str, list[int]] = {}
    sides: dict[str, Any] = {
        "ours": lambda: ours_step(model, optimizer, tokens, [None]),
        "peer": lambda: peer(tokens, prompt=tokens[:, :16]).backward(),
    }
    for name, step in sides.items():
        for number in range(steps):
            step()
            if number in (4, steps - 1):
                held.setdefault(name, []).append(resident())
    growth = {name: (after - before) / MIB for name, (before, after) in held.items()}
    return claim(
        f"memory after {steps} steps minus memory after 5",
        "no growth",
        f"{growth['ours']:.1f} MiB; CALM-pytorch {growth['peer']:.1f} MiB",
        growth["ours"] < 2,
    )


def _generation(vocabulary: int, peer: Any, prompt: Tensor) -> dict[str, str]:
    """8 prompts of 64 tokens to 256 tokens: PaLM models of the same size with a cache, and the peer, which has none."""
    sizes: dict[str, Any] = {"num_tokens": vocabulary, "depth": 8, "dim_head": 64}
    anchor, augment = PaLM(dim=256, heads=4, **sizes), PaLM(dim=128, heads=2, **sizes)
    model = CALM(anchor, Augment(augment, connections=pairs()))
    config = GenerationConfig(max_new_tokens=LENGTH - PROMPT, top_p=0.9)
    with Meter() as mine:
        generate(model, prompt.tolist(), config)
    with Meter() as theirs:
        peer.generate(prompt, LENGTH)
    count = ROWS * (LENGTH - PROMPT)
    times = theirs.seconds / mine.seconds
    return claim(
        "generation, 64 to 256 tokens",
        "≥ 20x",
        f"{times:.0f}x ({count / mine.seconds:.0f} and {count / theirs.seconds:.0f} tokens/s)",
        times >= 20,
    )


def _alone(peer: Any, model: CALM, tokens: Tensor) -> dict[str, str]:
    """Whether the anchor still works on its own."""
    model.anchor(tokens)
    try:
        peer.anchor_llm(tokens)
        theirs = "works"
    except Exception as error:
        theirs = f"{type(error).__name__}"
    return claim("the anchor alone, after wrapping", "works", f"works; CALM-pytorch: {theirs}", True)


if __name__ == "__main__":
    main()
