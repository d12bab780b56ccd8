"""The prompts of tokenized rows, with the texts that they were made from."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from lightning_align.data.forms import form_of, prompt_text, read_conversation, side_text
from lightning_align.data.mixture import MixedStore
from lightning_align.data.recipe import Recipe
from lightning_align.data.rows import Source, read_rows
from lightning_align.data.store import TokenStore, read_forms
from lightning_align.data.tokenizer import Tokenizer


def first_prompts(
    store: TokenStore, sources: Sequence[tuple[Source, Recipe]], *, split: str, tokenizer: Tokenizer, limit: int
) -> list[tuple[list[int], str, str]]:
    """Return the prompts of the first rows of a store.

    Args:
        store: The tokenized rows.
        sources: What the store was made from, part by part: the source and how it was encoded.
        split: The split of a hub dataset if its name does not include one.
        tokenizer: The tokenizer.
        limit: The largest number of rows.

    Returns:
        For each prompt its token ids, its text, and the response of the row. Rows of text have no prompt.
    """
    stored = [store[i] for i in range(min(limit, len(store)))]
    wanted = {row.row: row for row in stored if row.num_prompt > 0}
    starts = store.starts if isinstance(store, MixedStore) else [0]
    prompts = []
    for start, (source, recipe) in zip(starts, sources, strict=False):
        rows = read_forms(read_rows(source, split=split), recipe=recipe)
        options: Any = {"tokenizer": tokenizer, "chat_template_kwargs": recipe.chat_template_kwargs}
        for index, row in islice(enumerate(rows, start), max(0, max(wanted, default=-1) + 1 - start)):
            if index not in wanted:
                continue
            form = form_of(row.fields, accepted=[form for form in recipe.accepted if form != "text"])
            conversation = read_conversation(row.fields, form=form, mask_turns=recipe.mask_turns, **options)
            found = wanted.pop(index)
            ids = found.sides[0].tokens[: found.num_prompt].tolist()
            prompts.append((ids, prompt_text(conversation), side_text(conversation)))
    return prompts
