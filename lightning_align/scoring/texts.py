"""Log-probs of texts, as evaluation harnesses ask for them: of continuations of a context, and of whole texts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.models.language_model import context_length, has_hidden, logits_of, vocabulary_size
from lightning_align.models.routers import announce_mask
from lightning_align.scoring.targets import check_ids

Request = tuple[list[int], int]
"""The ids that are read, context and continuation, and how many of the last ones are scored."""


class TextScorer:
    """Scores texts with a language model. The scores do not depend on which texts are in a batch, up to rounding.

    Args:
        model: Any language model. It is put into evaluation mode.
        tokenizer: The tokenizer of the model.
        batch_size: The number of texts that are computed together.
        max_length: The number of tokens that the model reads at most. Default is the context of the model, or 2048 if that is
            unknown.

    Raises:
        ValueError: If the batch size or the length is not positive.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> None:
        context = context_length(model)
        self.max_length = (context or 2048) if max_length is None else max_length
        for name, value in (("batch_size", batch_size), ("max_length", self.max_length)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, but got {value}.")
        if context is not None and self.max_length > context:
            raise ValueError(f"`max_length` must be at most {context}, the context of the model, but got {self.max_length}.")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.truncated = 0
        """The number of texts whose beginning was left out, because they are longer than the context."""

    @property
    def prefix(self) -> int:
        """The id that stands before a text without a context: the beginning of a sequence, or else its end."""
        start = self.tokenizer.bos_id
        return int(self.tokenizer.eos_id if start is None else start)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text.

        Args:
            text: The text. The text of a special token becomes that token.
            special: Whether the ids begin with the beginning-of-sequence token, if the tokenizer has one.
        """
        ids = [int(token) for token in self.tokenizer.encode_batch([text])[0].ids]
        start = self.tokenizer.bos_id
        return [int(start), *ids] if special and start is not None and ids[:1] != [start] else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation as the single text that they are, and split the ids.

        Spaces at the end of the context belong to the continuation, because tokenizers join them with the next word.

        Args:
            context: The context. Without one, the continuation follows `prefix`.
            continuation: The continuation.

        Returns:
            The ids of the context and those of the continuation.
        """
        if not context:
            return [self.prefix], self.encode(continuation, special=False)
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        whole, start = self.encode(context + continuation), self.encode(context)
        return (start, whole[len(start) :]) if start else ([self.prefix], whole)

    def loglikelihoods(
        self, pairs: Sequence[tuple[str, str]], *, done: Callable[[int], object] = lambda count: None
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            pairs: Contexts and continuations.
            done: Gets the number of pairs of each batch, for a progress bar.

        Returns:
            For each pair the log-prob of the continuation in nats, and whether it is what greedy decoding writes.

        Raises:
            ValueError: If a continuation has no tokens or more than the model reads.
        """
        requests = []
        for context, continuation in pairs:
            before, after = self.encode_pair(context, continuation)
            if not 1 <= len(after) <= self.max_length:
                raise ValueError(
                    f"A continuation must have 1 to {self.max_length} tokens, but {continuation[:40]!r} has {len(after)}."
                )
            ids = [*before, *after][-(self.max_length + 1) :]
            self.truncated += len(ids) < len(before) + len(after)
            requests.append((ids, len(after)))
        return self._scores(requests, done)

    def rolling(self, texts: Sequence[str], *, done: Callable[[int], object] = lambda count: None) -> list[float]:
        """Score whole texts: each token once, after as many tokens as fit if the text is longer than the context.

        Args:
            texts: The texts.
            done: Gets the number of texts of each step, for a progress bar.

        Returns:
            The log-prob of each text in nats.
        """
        sums = []
        for text in texts:
            windows = list(self.windows(self.encode(text, special=False)))
            sums.append(sum(score for score, _ in self._scores(windows, lambda count: None)))
            done(1)
        return sums

    def windows(self, ids: Sequence[int]) -> Iterator[Request]:
        """Cut ids into windows in which each id is scored once. The last window reaches back to fill the context."""
        whole = [self.prefix, *ids]
        for start in range(0, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            yield whole[max(0, end - self.max_length) : end + 1], end - start

    @torch.no_grad()
    def _scores(self, requests: Sequence[Request], done: Callable[[int], object]) -> list[tuple[float, bool]]:
        """Score the last tokens of ids, in batches of similar lengths."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for index, score in zip(chosen, self._batch([requests[index] for index in chosen]), strict=True):
                scores[index] = score
            done(len(chosen))
        return scores

    def _batch(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        device = next(self.model.parameters()).device
        width = max(len(ids) for ids, _ in requests) - 1  # the last id is only a target
        tokens = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, (ids, _) in enumerate(requests):
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        lengths = torch.tensor([len(ids) - 1 for ids, _ in requests])
        columns = torch.arange(width)
        mask = columns < lengths[:, None]
        starts = lengths - torch.tensor([count for _, count in requests])
        rows, before = (mask & (columns >= starts[:, None])).nonzero(as_tuple=True)
        targets = torch.cat([torch.tensor(ids[-count:]) for ids, count in requests]).to(device)
        check_ids(targets, vocabulary_size(self.model))
        logits = self._logits(tokens.to(device), mask.to(device), rows.to(device), before.to(device)).float()
        logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].double().cpu()
        greedy = (logits.argmax(dim=-1) == targets).cpu()
        sums = torch.zeros(len(requests), dtype=torch.float64).index_add_(0, rows, logprobs)
        wrong = torch.zeros(len(requests), dtype=torch.int64).index_add_(0, rows, (~greedy).long())
        return [(float(total), bool(count == 0)) for total, count in zip(sums, wrong, strict=True)]

    def _logits(self, tokens: Tensor, mask: Tensor, rows: Tensor, before: Tensor) -> Tensor:
        """Return the (T, V) logits at the positions before the targets."""
        announce_mask(self.model, mask)
        if has_hidden(self.model):
            return self.model.head.logits(self.model.hidden(tokens)[rows, before])
        return logits_of(self.model, tokens)[rows, before]
