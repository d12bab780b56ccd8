"""Small models and batches that several tests share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.models.palm import PaLM
from lightning_align.types import PreferenceBatch, TokenBatch

VOCABULARY = 23


def tiny_palm(*, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PaLM:
    """A PaLM of a few thousand weights whose gains are not all 1 and whose logits are not all small."""
    sizes: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "ff_mult": 2}
    generator = torch.Generator().manual_seed(seed)
    model = PaLM(**{**sizes, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.4 * noise)
    return model.to(dtype)


def token_batch(prompts: list[int], responses: list[int], *, seed: int = 0, vocabulary: int = VOCABULARY) -> TokenBatch:
    """Random rows of given prompt and response lengths, padded on the right with id 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    width = max(lengths)
    tokens = torch.randint(1, vocabulary, (len(lengths), width), generator=generator)
    columns = torch.arange(width)[None, :]
    mask = columns < torch.tensor(lengths)[:, None]
    targets = mask & (columns >= torch.tensor(prompts)[:, None])
    return {"tokens": tokens * mask, "mask": mask, "targets": targets, "num_bytes": targets.sum(1) * 3}


def preference_batch(pairs: int, *, seed: int = 0) -> PreferenceBatch:
    """Pairs of random responses of unequal lengths to one prompt each."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, 5, (pairs,), generator=generator).tolist()
    chosen, rejected = torch.randint(1, 6, (2, pairs), generator=generator).tolist()
    sides = [token_batch(prompts, lengths, seed=seed + 1 + side) for side, lengths in enumerate((chosen, rejected))]
    for row, prompt in enumerate(prompts):
        sides[1]["tokens"][row, :prompt] = sides[0]["tokens"][row, :prompt]
    return {"chosen": sides[0], "rejected": sides[1]}


def rows_of(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    return {name: value[start:stop] for name, value in batch.items()}  # type: ignore[return-value,index]


def split(batch: Any, size: int) -> list[Any]:
    """Cut a batch of either kind into micro-batches."""
    if "chosen" in batch:
        parts = zip(split(batch["chosen"], size), split(batch["rejected"], size), strict=True)
        return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in parts]
    return [rows_of(batch, start, start + size) for start in range(0, len(batch["tokens"]), size)]


@torch.no_grad()
def slow_logprobs(model: nn.Module, batch: TokenBatch) -> tuple[list[float], list[int]]:
    """Sums and counts of response log-probs, one row and one token at a time, without padding, in float64."""
    sums, counts = [], []
    for tokens, mask, targets in zip(batch["tokens"], batch["mask"], batch["targets"], strict=True):
        length = int(mask.sum())
        out = model(tokens[None, :length])
        logits: Tensor = (out if isinstance(out, Tensor) else out.logits)[0].double()
        total, count = 0.0, 0
        for place in range(1, length):
            if targets[place]:
                total += float(logits[place - 1].log_softmax(0)[tokens[place]])
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


class Plain(nn.Module):
    """A module that maps tokens to logits and offers nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return float((a - b).detach().abs().max())


def save_llama(folder: str | Path, *, tied: bool = False) -> None:
    """Write a tiny Llama with random weights and a tokenizer of bytes, as transformers does."""
    import tokenizers
    import transformers

    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<pad>", "<bos>", "<eos>"]
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=specials, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    bytes_only.train_from_iterator([], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), specials, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=260, tie_word_embeddings=tied, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
