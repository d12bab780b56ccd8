"""A frozen language model that sees: CALM with a vision model as augment, on pictures of colored shapes made here.

python examples/vision_prefix.py

A language model learns to answer "color? " and "shape? " with some color or shape, and a small vision transformer learns to
tell pictures apart. Both are then frozen. The vision model encodes a picture once, every position of the language model attends
to all of its patches, and only the connections are trained.

With 300 steps each, under a minute of processor time, half of the colors and 60 % of the shapes of new pictures are right.
Guessing gives 25 % and 33 %.
"""

from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align import Augment, AugmentInput, CALMModule, ConnectionConfig, GenerationConfig, PaLM, SFTModule, generate

COLORS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.2, 1.0), "yellow": (0.9, 0.9, 0.1)}
SHAPES = ("square", "disc", "cross")
SIZE, PATCH = 16, 4
END = 2


def encode(text: str) -> list[int]:
    """Return the ids of a text: its bytes plus 3, as in the built-in tokenizer of bytes."""
    return [byte + 3 for byte in text.encode()]


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw shapes of random color, place and size on a noisy background.

    Args:
        count: The number of pictures.
        seed: The seed of the random numbers.

    Returns:
        Pictures (count, 3, 16, 16), the indices of their colors, and the indices of their shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(len(COLORS), (count,), generator=generator)
    shapes = torch.randint(len(SHAPES), (count,), generator=generator)
    radius = torch.randint(3, 6, (count, 1, 1), generator=generator)
    center = torch.randint(5, SIZE - 5, (2, count, 1, 1), generator=generator)
    grid = torch.arange(SIZE)
    y, x = (grid[None, :, None] - center[0]).abs(), (grid[None, None, :] - center[1]).abs()
    square = (y <= radius) & (x <= radius)
    drawn = torch.stack([square, y**2 + x**2 <= radius**2, square & ((y <= 1) | (x <= 1))])
    inside = drawn[shapes, torch.arange(count)][:, None]
    paint = torch.tensor(list(COLORS.values()))[colors][:, :, None, None]
    noise = 0.15 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return torch.where(inside, paint, 0.0) + noise, colors, shapes


def batch_of(count: int, seed: int) -> dict[str, Any]:
    """Return pictures with one question each: token rows, and the pictures as the input of the only augment."""
    images, colors, shapes = pictures(count, seed)
    asked = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [list(COLORS)[color] if ask else SHAPES[shape] for color, shape, ask in zip(colors, shapes, asked, strict=True)]
    prompts = [encode("color? " if ask else "shape? ") for ask in asked]
    rows = [[*prompt, *encode(name), END] for prompt, name in zip(prompts, names, strict=True)]
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets = (tokens > 0) & (torch.arange(width) >= len(prompts[0]))
    return {"tokens": tokens, "mask": tokens > 0, "targets": targets, "augments": [AugmentInput(images)]}


class VisionTransformer(nn.Module):
    """A vision transformer over patches of 4 x 4 pixels."""

    def __init__(self, dim: int = 48, depth: int = 3) -> None:
        """Set up the model.

        Args:
            dim: The width.
            depth: The number of layers.
        """
        super().__init__()
        self.patches = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, dim))
        layer = {"dim_feedforward": 2 * dim, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(dim, 4, **layer) for _ in range(depth))  # type: ignore[arg-type]
        self.to_color, self.to_shape = nn.Linear(dim, len(COLORS)), nn.Linear(dim, len(SHAPES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of color and shape of pictures (B, 3, 16, 16)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.to_color(x.mean(dim=1)), self.to_shape(x.mean(dim=1))


def trainer(steps: int) -> L.Trainer:
    """Return a Trainer without files."""
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(max_steps=steps, max_epochs=1, accelerator="cpu", logger=False, **quiet)


def batches(steps: int, seed: int) -> DataLoader[Any]:
    """Return a loader of new pictures."""
    return DataLoader([batch_of(64, 1_000_000 * seed + step) for step in range(steps)], batch_size=None)  # type: ignore[arg-type]


def language_model(steps: int) -> PaLM:
    """Train a language model on the questions and answers. Without the pictures it can only guess."""
    model = PaLM(num_tokens=259, dim=64, depth=4, heads=2, dim_head=32)
    trainer(steps).fit(SFTModule(model), batches(steps, seed=1))
    return model


def vision_model(steps: int) -> VisionTransformer:
    """Train a vision model to tell colors and shapes."""
    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        images, colors, shapes = pictures(64, seed=2_000_000 + step)
        color, shape = model(images)
        (F.cross_entropy(color, colors) + F.cross_entropy(shape, shapes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def compose(anchor: nn.Module, vision: nn.Module) -> CALMModule:
    """Connect three layers of the vision model with the language model."""
    augment = Augment(vision, alignment="prefix", input_shape=[3, SIZE, SIZE], num_connections=3)
    connection = ConnectionConfig(heads=4, dim_head=16)
    return CALMModule(anchor, [augment], connection=connection, optimizer=partial(torch.optim.AdamW, lr=4e-3))


@torch.no_grad()
def answers(model: Any, image: Tensor) -> tuple[str, str]:
    """Ask a composition for the color and the shape in a picture (3, 16, 16)."""
    config = GenerationConfig(max_new_tokens=8, temperature=0)
    with model.given([AugmentInput(image[None])]):
        color, shape = generate(model, [encode("color? "), encode("shape? ")], config, eos_id=END)
    first, second = (bytes(max(0, token - 3) for token in found[0].tokens).decode(errors="replace") for found in (color, shape))
    return first, second


def main(steps: int = 300, held_out: int = 100) -> dict[str, float]:
    """Train the three parts and return the share of right answers to pictures that were not seen in training."""
    L.seed_everything(0, verbose=False)
    anchor, vision = language_model(steps // 2), vision_model(steps)
    module = compose(anchor, vision)
    trainer(steps).fit(module, batches(steps, seed=3))
    images, colors, shapes = pictures(held_out, seed=4_000_000)
    found = [answers(module.policy, image) for image in images]
    right = [(list(COLORS)[c] == a, SHAPES[s] == b) for (a, b), c, s in zip(found, colors, shapes, strict=True)]
    return {name: sum(values) / held_out for name, values in zip(("color", "shape"), zip(*right, strict=True), strict=True)}


if __name__ == "__main__":
    print(main())
