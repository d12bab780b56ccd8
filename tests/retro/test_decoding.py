"""Tests of generation with retrieval, compared with full recomputation of each token."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.language_model import context_length
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.retrieval.given import GivenNeighbors
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.model import RETRO, NeighborTokens
from tests.retro.toys import SIZE, ToyRetriever, tiny_retro
from tests.toys import gap

PROMPTS = [[3], [4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [5, 6, 7, 8, 9, 10, 11, 12, 13], [2, 2, 2]]
CONDITIONED = pytest.mark.parametrize("conditioned", [True, False])


def neighbors_of(row: list[int], k: int) -> NeighborTokens:
    """Find the neighbors (1, U, J, R) of each full chunk of a row."""
    chunks = [row[start : start + SIZE] for start in range(0, len(row) - SIZE + 1, SIZE)]
    found = ToyRetriever().search(chunks, k)
    return NeighborTokens(torch.from_numpy(found.tokens.ids)[None], torch.from_numpy(found.tokens.mask)[None])


@torch.no_grad()
def recomputed(model: RETRO, row: list[int], k: int) -> Tensor:
    """Compute the logits of a row in one pass, with the neighbors of its full chunks."""
    logits: Tensor = model(torch.tensor([row]), neighbors=neighbors_of(row, k) if len(row) >= SIZE else None)[0]
    return logits


@CONDITIONED
def test_greedy_tokens_equal_full_recomputation(conditioned: bool) -> None:
    model = tiny_retro(conditioned=conditioned, dtype=torch.float64)
    steps = 3 * SIZE + 1
    decoder = RetrievalDecoder(model, ToyRetriever(), num_neighbors=3)
    results = generate(decoder, PROMPTS, GenerationConfig(max_new_tokens=steps, temperature=0.0))
    for prompt, (result,) in zip(PROMPTS, results, strict=True):
        row = list(prompt)
        for _ in range(steps):
            row.append(int(recomputed(model, row, 3)[-1].argmax()))
        assert result.tokens == row[len(prompt) :]


@CONDITIONED
def test_cached_logits_equal_teacher_forcing(conditioned: bool) -> None:
    """Decode prompts of different lengths in one batch, token by token. Each logit equals that of one pass over the row."""
    model = tiny_retro(conditioned=conditioned, dtype=torch.float64)
    steps = 3 * SIZE
    torch.manual_seed(4)
    forced = torch.randint(1, 23, (len(PROMPTS), steps))
    rows = [prompt + more.tolist() for prompt, more in zip(PROMPTS, forced, strict=True)]
    decoder = RetrievalDecoder(model, ToyRetriever(), num_neighbors=2)
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    starts = torch.tensor([[width - len(p)] for p in PROMPTS])
    columns = torch.arange(width + steps)
    cache = decoder.make_cache(len(PROMPTS), width + steps)
    start, stop = 0, width
    with torch.no_grad():
        for step in range(steps):
            positions = (columns - starts).clamp(min=0)[:, start:stop]
            hidden = decoder.hidden(tokens, mask=(columns >= starts)[:, :stop], positions=positions, cache=cache)
            logits = hidden @ model.head.weight.T
            for index, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
                want = recomputed(model, row[: len(prompt) + step], 2)
                new = min(len(prompt), stop - start)
                assert gap(logits[index, -new:], want[-new:]) < 1e-12
            tokens, start, stop = forced[:, step : step + 1], stop, stop + 1


def test_one_forward_pass_per_token_and_one_search_per_chunk() -> None:
    model = tiny_retro()
    retriever = ToyRetriever()
    lengths: list[int] = []
    handle = model.decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))  # type: ignore[union-attr, index]
    decoder = RetrievalDecoder(model, retriever, num_neighbors=2)
    (result,) = generate(decoder, [PROMPTS[4]], GenerationConfig(max_new_tokens=2 * SIZE + 1, temperature=0.0))
    handle.remove()
    assert lengths == [9] + [1] * (2 * SIZE)
    row = PROMPTS[4] + result[0].tokens
    fed = len(row) - 1  # the last token is never an input
    assert retriever.queries == [row[i : i + SIZE] for i in range(0, fed - SIZE + 1, SIZE)]


def test_samples_of_a_prompt_share_the_cached_search() -> None:
    retriever = ToyRetriever()
    decoder = RetrievalDecoder(tiny_retro(), retriever, num_neighbors=2)
    generate(decoder, [PROMPTS[3]], GenerationConfig(max_new_tokens=1, num_samples=5))
    assert retriever.queries == [PROMPTS[3][:SIZE], PROMPTS[3][SIZE:]]
    assert set(decoder.found) == {tuple(PROMPTS[3][:SIZE]), tuple(PROMPTS[3][SIZE:])}


def test_generation_without_a_retriever_equals_the_decoder() -> None:
    model = tiny_retro()
    config = GenerationConfig(max_new_tokens=6, temperature=0.0)
    assert generate(model, PROMPTS, config) == generate(model.decoder, PROMPTS, config)


def test_context_length_is_that_of_the_decoder() -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    model = tiny_retro(decoder=PretrainedLM(config=config, dtype="float32")).eval()
    reading = RetrievalDecoder(model, ToyRetriever(), num_neighbors=2)
    for one in (model, reading):
        assert context_length(one) == 16
        [[response]] = generate(one, [[1, 2, 3]], GenerationConfig(max_new_tokens=30, temperature=0.0), eos_id=99)
        assert len(response.tokens) == 13
    assert context_length(tiny_retro()) is None


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="got 5 for the retriever and 4 for the model"):
        RetrievalDecoder(tiny_retro(), ToyRetriever(5), num_neighbors=2)
    with pytest.raises(ValueError, match="`num_neighbors` must be at least 1, but got 0"):
        RetrievalDecoder(tiny_retro(), ToyRetriever(), num_neighbors=0)


def test_given_neighbors_are_used_instead_of_a_search() -> None:
    model = tiny_retro(dtype=torch.float64)
    config = GenerationConfig(max_new_tokens=2 * SIZE, temperature=0.0)
    prompt, inner = PROMPTS[4], ToyRetriever()
    retriever = GivenNeighbors(inner)
    given = [[[11, 12, 13, 14, 15], [3]], []]
    retriever.give(prompt, given)
    decoder = RetrievalDecoder(model, retriever, num_neighbors=3)
    ((result,),) = generate(decoder, [prompt], config)
    tokens, mask = torch.zeros(1, 2, 3, 2 * SIZE, dtype=torch.long), torch.zeros(1, 2, 3, 2 * SIZE, dtype=torch.bool)
    for place, run in enumerate(given[0]):
        tokens[0, 0, place, : len(run)], mask[0, 0, place, : len(run)] = torch.tensor(run), True
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), neighbors=NeighborTokens(tokens, mask))[0, -1]
    assert result.tokens[0] == int(logits.argmax())
    assert inner.queries[0] == (prompt + result.tokens)[2 * SIZE : 3 * SIZE], "the chunks of the prompt were not searched for"
    found = retriever.search([prompt[:SIZE], prompt[SIZE : 2 * SIZE]], 2)
    assert found.ids.tolist() == [[-1, -1], [0, 0]] and found.mask.tolist() == [[True, True], [False, False]]
    assert found.tokens.ids[0, 0].tolist() == [11, 12, 13, 14, 15, 0, 0, 0]
    # Without a retriever, other chunks have no neighbors.
    alone = RetrievalDecoder(model, GivenNeighbors(chunk_size=SIZE), num_neighbors=2)
    assert generate(alone, [prompt], config) == generate(model, [prompt], config)
    with pytest.raises(ValueError, match="a list for each of the 2 full chunks of 4 tokens of the prompt, but has 1"):
        retriever.give(prompt, [[]])
    with pytest.raises(ValueError, match=r"from 1 to 8 tokens .* one of chunk 1 has 9"):
        retriever.give(prompt, [[], [[1] * 9]])
    with pytest.raises(ValueError, match="got None for `chunk_size` and None for the retriever"):
        GivenNeighbors()
    with pytest.raises(ValueError, match="got 5 for `chunk_size` and 4 for the retriever"):
        GivenNeighbors(inner, chunk_size=5)


def test_decoders_in_several_threads_share_a_model() -> None:
    model, config = tiny_retro(), GenerationConfig(max_new_tokens=3 * SIZE, temperature=0.0)
    decoders = [RetrievalDecoder(model, ToyRetriever(), num_neighbors=count) for count in (1, 2, 3)]
    expected = [generate(decoder, PROMPTS, config) for decoder in decoders]
    assert len({str(results) for results in expected}) == 3
    for decoder in decoders:
        decoder.found.clear()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: generate(decoders[number % 3], PROMPTS, config), range(12)))
    assert found == [expected[number % 3] for number in range(12)]


def test_the_last_search_results_are_kept_up_to_a_number() -> None:
    decoder = RetrievalDecoder(tiny_retro(), ToyRetriever(), num_neighbors=2, max_found=3)
    chunks = torch.arange(1, 21).reshape(5, SIZE)
    one = decoder.search(chunks)
    assert list(decoder.found) == [tuple(chunk) for chunk in chunks[2:].tolist()]
    decoder.search(chunks[2:3])
    decoder.search(chunks[:1])
    assert list(decoder.found) == [tuple(chunks[row].tolist()) for row in (4, 2, 0)]
    assert torch.equal(decoder.search(chunks)[0], one[0])
    with pytest.raises(ValueError, match="`max_found` must be at least 1, but got 0"):
        RetrievalDecoder(tiny_retro(), ToyRetriever(), num_neighbors=2, max_found=0)
