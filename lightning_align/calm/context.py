"""The context of augments: how many tokens each can read, and what happens to longer rows.

An augment with its own tokenizer reads the first tokens of a row, as many as its context has. Later positions of the anchor
see these tokens and no others. The number of its tokens is not known before a row is complete, so generation could not refuse
the row. An augment that reads the anchor's tokens, or a prefix, refuses longer rows, as a backbone does in generation.
"""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.calm.reading import Reader
from lightning_align.calm.spec import AugmentInput
from lightning_align.models.language_model import context_length


def within_context(index: int, reader: Reader, given: AugmentInput | None) -> AugmentInput | None:
    """Cut the input of an augment with its own tokenizer, or of a prefix, to what the augment can read.

    Args:
        index: The index of the augment.
        reader: The reader of the augment.
        given: The input. Hidden states that are given are not cut.

    Raises:
        ValueError: If a prefix is too long.
    """
    size = context_length(reader.model)
    if given is None or size is None or given.states is not None:
        return given
    tokens, mask = given.tokens, given.mask
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] <= size:
        return given
    if reader.own:
        warn_cut(index, reader)
    else:
        # The columns of a prefix are those of the anchor, and the pads are on the right.
        longest = tokens.shape[1] if mask is None else int(mask.sum(dim=1).max())
        check_context(index, reader, longest, what="the prefix")
    cut = [None if part is None else part[:, :size] for part in (mask, given.ends, given.columns)]
    return given._replace(tokens=tokens[:, :size], mask=cut[0], ends=cut[1], columns=cut[2])


def check_context(index: int, reader: Reader, length: int, *, what: str = "a row") -> None:
    """Check that an augment that reads the anchor's tokens can read a row.

    Args:
        index: The index of the augment.
        reader: The reader of the augment.
        length: The number of tokens.
        what: What has this length.

    Raises:
        ValueError: If the row is longer than the context of the augment.
    """
    size = context_length(reader.model)
    if size is not None and length > size:
        raise ValueError(
            f"augment {index} ({type(reader.model).__name__}) has a context of {size} tokens, but {what} has {length}. Set "
            f"`max_length` of the data module to at most {size}, or use an augment with a longer context."
        )


def warn_cut(index: int, reader: Reader) -> None:
    """Warn, once, that an augment with its own tokenizer does not read all of a row."""
    size = context_length(reader.model)
    rank_zero_warn(
        f"augment {index} ({type(reader.model).__name__}) has a context of {size} tokens, but a row is longer. It reads "
        f"the first {size} tokens, and later positions see only these. To make it read whole rows, lower `max_length` of the "
        "data module."
    )


def check_rows(readers: Sequence[Reader], longest: int, longest_prompt: int, longest_own: Sequence[int]) -> None:
    """Compare the longest rows of a source with the contexts of the augments, before the first step.

    Args:
        readers: The reader of each augment.
        longest: The largest number of tokens of the anchor per row.
        longest_prompt: The largest number of tokens of the anchor per prompt.
        longest_own: For each augment with its own tokenizer, its largest number of tokens per row. 0 for others.

    Raises:
        ValueError: If an augment that reads the anchor's tokens or the prompt cannot read all rows.
    """
    for index, reader in enumerate(readers):
        if reader.own:
            size, own = context_length(reader.model), longest_own[index] if index < len(longest_own) else 0
            if size is not None and own > size:
                warn_cut(index, reader)
        elif reader.prefix:
            check_context(index, reader, longest_prompt, what="a prompt, which it reads as a prefix,")
        else:
            check_context(index, reader, longest)
