"""The play of an iteration: the opponent answers the prompts of a set and scores both responses, part by part."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import nn
from tqdm.auto import tqdm

from lightning_align.generation.sampler import Generation
from lightning_align.runtime.ranks import is_sharded, largest, world
from lightning_align.spin.batches import sent
from lightning_align.spin.generations import GeneratedSet, answer_ids, join_rows
from lightning_align.spin.opponent import Opponent, score
from lightning_align.spin.set_files import Row
from lightning_align.types import TokenBatch


class Play:
    """The generation and scoring of the missing parts of a set.

    Args:
        trainer: The trainer, during `fit`.
        data: The data module.
        store: The rows of demonstrations, a `TokenStore` or the rows of a loader.
        generated: The set to complete.
        previous: The set of the previous iteration, which holds the responses to replay.
        loop: The `SelfPlayGeneration` callback.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        data: Any,
        store: Any,
        generated: GeneratedSet,
        previous: GeneratedSet,
        loop: Any,
    ) -> None:
        self.trainer, self.data, self.store, self.set, self.previous, self.loop = (
            trainer,
            data,
            store,
            generated,
            previous,
            loop,
        )
        module: Any = trainer.lightning_module
        opponent: Opponent = module.opponent
        self.module, self.player = module, opponent.player(module.policy)
        base = opponent.base(module.policy)
        # With adapters the base needs no memory, but scoring with it takes time.
        self.base = base if self.module.monitor_kl else None
        self._earlier: dict[int, list[Row]] | None = None

    def run(self, missing: list[int]) -> None:
        """Write the missing parts. Each rank writes its share. Every rank must call this with the same parts."""
        rank, ranks = world()
        mine = missing[rank::ranks]
        # Every rank must make the same number of calls, because forward passes of a sharded model are collectives. A part that
        # is generated twice is written once.
        extra = [missing[0]] * (-(-len(missing) // ranks) - len(mine))
        tokens, start = 0, time.perf_counter()
        parts = [*mine, *extra]
        bar = tqdm(
            total=len(parts),
            desc=f"Generating responses, iteration {self.loop.iteration}",
            unit="batch",
            leave=False,
            disable=None if rank == 0 else True,
        )
        with self.trainer.precision_plugin.forward_context(), bar:
            for number, answers in self._answers(parts, missing):
                part = parts[number]
                rows = self._rows(self.set.parts[part], answers, self._replayed())
                tokens += sum(len(answer.tokens) + 1 for responses in answers.values() for answer in responses)
                if number < len(mine):
                    self.set.write(part, rows)
                bar.update()
                if rank == 0:
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
        self.loop.record_speed(tokens, time.perf_counter() - start)

    def _answers(self, parts: list[int], missing: list[int]) -> Iterator[tuple[int, dict[int, list[Generation]]]]:
        """Yield the responses to the rows of each part, with the place of the part in `parts`."""
        backend = self.loop.backend
        if backend.whole:
            # Every rank requests all responses, because such a backend reads them from a file.
            indices = [row for part in missing for row in self.set.parts[part]]
            everything = dict(zip(indices, backend.generate(self.player, **self._request(indices)), strict=True))
            yield from ((number, {row: everything[row] for row in self.set.parts[part]}) for number, part in enumerate(parts))
        elif getattr(backend, "streams", False):
            indices, places = [], []
            for part in parts:
                places.append(list(range(len(indices), len(indices) + len(self.set.parts[part]))))
                indices += self.set.parts[part]
            for number, answers in backend.generate_parts(self.player, parts=places, **self._request(indices)):
                yield number, dict(zip(self.set.parts[parts[number]], answers, strict=True))
        else:
            for number, part in enumerate(parts):
                indices = self.set.parts[part]
                answers = backend.generate(self.player, **self._request(indices))
                yield number, dict(zip(indices, answers, strict=True))

    def _request(self, indices: list[int]) -> dict[str, Any]:
        prompts = [self._prompt(index) for index in indices]
        longest, most = self.data.max_length, self.module.generation.max_new_tokens
        return {
            "prompts": prompts,
            "config": self.module.generation,
            "ends": self.module.ends(),
            "ids": indices,
            "iteration": self.loop.iteration,
            "limits": [most if longest is None else longest - len(prompt) for prompt in prompts],
        }

    def _prompt(self, index: int) -> list[int]:
        stored = self.store[index]
        prompt: list[int] = stored.sides[0].tokens[: stored.num_prompt].tolist()
        return prompt

    def _replayed(self) -> dict[int, list[Row]]:
        """Return the responses of earlier iterations that are replayed, by row."""
        if not self.loop.replay or not self.loop.iteration:
            return {}
        if self._earlier is None:
            oldest = self.loop.iteration - self.loop.replay
            self._earlier = {
                row["row"]: [answer for answer in row["generated"] if answer["iteration"] >= oldest]
                for row in self.previous.rows()
            }
        return self._earlier

    def _rows(self, indices: list[int], answers: dict[int, list[Generation]], replayed: dict[int, list[Row]]) -> list[Row]:
        decode, eos_id = self.data.tokenizer.decode, self.data.tokenizer.eos_id
        rows: list[Row] = []
        for index in indices:
            new = [
                {
                    "iteration": self.loop.iteration,
                    "sample": sample,
                    "text": decode(answer.tokens),
                    "tokens": answer.tokens,
                    "reason": answer.reason,
                    "end": answer.end,
                    **({"unsupported": answer.unsupported} if answer.unsupported else {}),
                    "sampled_logprob": sum(answer.logprobs) if answer.logprobs else None,
                }
                for sample, answer in enumerate(answers[index])
            ]
            stored = self.store[index]
            rows.append(
                {
                    "row": index,
                    "prompt": decode(self._prompt(index)),
                    "real": decode(stored.sides[0].tokens[stored.num_prompt :].tolist()),
                    "generated": [*new, *replayed.get(index, [])],
                }
            )
        answers_of = [(row["row"], answer) for row in rows for answer in row["generated"]]
        # A real response is scored once for all of its generated responses. The base scores generated responses only.
        responses = [(index, answer_ids(answer, eos_id)) for index, answer in answers_of]
        scored = self._score(self.player, [*((row["row"], None) for row in rows), *responses])
        logprobs = scored[len(rows) :]
        for row, value in zip(rows, scored, strict=False):
            row["real_logprob"] = value
        based = [None] * len(responses) if self.base is None else self._score(self.base, responses)
        for (_, answer), own, base in zip(answers_of, logprobs, based, strict=True):
            answer["logprob"], answer["base_logprob"] = own, base
        return rows

    def _score(self, model: nn.Module, responses: Sequence[tuple[int, list[int] | None]]) -> list[float]:
        """Compute the log-probs of responses to rows of the store. Ids of None stand for the real response."""
        size = 2 * self.module.generation.batch_size
        # The responses to a prompt stay together, so that it is computed once for all of them.
        order = sorted(range(len(responses)), key=lambda place: responses[place][0])
        batches = [[responses[place] for place in order[start : start + size]] for start in range(0, len(order), size)]
        if is_sharded(self.player):
            # Every rank must make the same number of forward passes. The extra passes repeat the first batch.
            batches += batches[:1] * (largest(len(batches), self.module.device) - len(batches))
        sums = torch.cat([score(model, self._batch(some)) for some in batches])[: len(order)]
        return cast(list[float], sums[torch.tensor(order).argsort()].tolist())

    def _batch(self, responses: Sequence[tuple[int, list[int] | None]]) -> TokenBatch:
        rows, targets = [], []
        for index, ids in responses:
            stored = self.store[index]
            row = torch.from_numpy(stored.sides[0].tokens.astype("int64"))
            target = torch.from_numpy(stored.sides[0].targets.copy())
            if ids is not None:
                row = torch.cat((row[: stored.num_prompt], row.new_tensor(ids)))
                target = torch.arange(len(row)) >= stored.num_prompt
            rows.append(row)
            targets.append(target)
        joined = self.module.prefix_sharing.attach(join_rows(rows, targets, pad_id=self.data.tokenizer.pad_id))
        return sent(joined, self.module.device)


def real_ids(store: Any, index: int) -> list[int]:
    """Return the ids of the real response of a row."""
    stored = store[index]
    ids: list[int] = stored.sides[0].tokens[stored.num_prompt :].tolist()
    return ids
