"""A streamed response is the response that `generate` gives, in pieces."""

import pytest
import torch

from lightning_align import GenerationConfig, PaLM, generate
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.generation.ends import Ends
from lightning_align.generation.stream import stream


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", [(), ("a",)], ids=["none", "stop"])
def test_the_pieces_are_the_response(temperature: float, stop: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    model, tokenizer = PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8), load_tokenizer("bytes")
    prompt = [1, *tokenizer.encode_batch(["3 + 4 ="])[0].ids]
    for number in range(4):
        config = GenerationConfig(max_new_tokens=24, temperature=temperature, stop=stop, seed=5)
        ends = Ends.of(tokenizer=tokenizer, model=model, config=config)
        ((whole,),) = generate(model, [prompt], config, ends=ends, ids=[number])
        pieces = list(stream(model, prompt, config, tokenizer=tokenizer, number=number))
        assert "".join(pieces) == tokenizer.decode(whole.tokens)
        assert len(pieces) > 1 or len(whole.tokens) < 8


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    model = PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8)
    with pytest.raises(ValueError, match="Shorten it"):
        list(stream(model, [], GenerationConfig(), tokenizer=load_tokenizer("bytes")))


def test_between_the_pieces_nothing_is_changed() -> None:
    """Neither the mode of the model and of autograd, nor later, when an iterator that was left early is collected."""
    model = PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8)
    pieces = stream(model, [1, 5], GenerationConfig(max_new_tokens=8, seed=5), tokenizer=load_tokenizer("bytes"))
    assert next(pieces) and model.training and torch.is_grad_enabled()
    with torch.no_grad():
        model.eval()
        del pieces
        assert not torch.is_grad_enabled() and not model.training
