"""Small models of every kind that can be composed, and compositions with nonzero connections.

Other packages are imported only in the functions that build their models, because the processes of the distributed test need
none of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from lightning_align.models.palm import PaLM
from tests.toys import VOCABULARY, tiny_palm

SMALL = ConnectionConfig(heads=2, dim_head=8)


class TupleBlock(nn.Module):
    """A block that returns a tuple, as the blocks of older versions of transformers do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.block(x).cumsum(dim=1), None


class Tuples(nn.Module):
    """A causal model with blocks that return tuples. The blocks are attributes, so they must be named with `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.block1, self.block2 = TupleBlock(nn.Linear(12, 12)), TupleBlock(nn.Linear(12, 12))
        self.out = nn.Linear(12, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in (self.block1, self.block2):
            x, _ = block(x)
        out: Tensor = self.out(x)
        return out


def x_transformers() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    stack = Decoder(dim=16, depth=3, heads=2, attn_dim_head=32, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=stack)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


def gpt2(context: int = 32) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=context, bos_token_id=1, eos_token_id=2)
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "palm": lambda: tiny_palm(depth=3, seed=3),
    "llama": llama,
    "gpt2": gpt2,
    "x_transformers": x_transformers,
    "tuples": Tuples,
}
NAMED = {"tuples": "block*"}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return (out if isinstance(out, Tensor) else out.logits).detach()


def random_tokens(rows: int = 2, width: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(7))


def connect(model: CALM) -> CALM:
    """Set the connections to random values, because at initialization their output is 0."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.connections.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype) + (parameter.ndim == 1)
    return model


def palms(dtype: torch.dtype = torch.float64) -> tuple[PaLM, PaLM]:
    """Build an anchor and an augment that differ in width and depth."""
    return tiny_palm(depth=3, dim=24, dtype=dtype), tiny_palm(depth=4, dtype=dtype, seed=1)


def composed(dtype: torch.dtype = torch.float64, **options: Any) -> CALM:
    anchor, augment = palms(dtype)
    given = {name: options.pop(name) for name in list(options) if name in Augment.settings}
    given = given or {"num_connections": 2}
    return connect(CALM(anchor, Augment(augment, **given), **{"connection": SMALL, **options}))
