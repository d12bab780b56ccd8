"""The base data module: rows from sources, tokenized once, as batches."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_align.data.batching import (
    LengthGroupedSampler,
    RepeatedSampler,
    ResumableLoader,
    RowLists,
    collate_pairs,
    collate_prompts,
    collate_tokens,
)
from lightning_align.data.conversations import MaskTurns
from lightning_align.data.encode import Truncation
from lightning_align.data.forms import Form, first_form
from lightning_align.data.ledger import BadRow, Ledger, write_ledgers
from lightning_align.data.mapping import RowMapping, map_rows
from lightning_align.data.messages import check_template_kwargs
from lightning_align.data.mixture import MixedStore, MixtureSampler, MixtureStop, SourcePart, named_sources, parts_of
from lightning_align.data.recipe import Recipe
from lightning_align.data.rows import Grader, RowTask, read_rows
from lightning_align.data.shapes import RankedPairs, Shape
from lightning_align.data.store import StoredRow, TokenStore, build_store, store_path
from lightning_align.data.token_batches import TokenBatchSampler
from lightning_align.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lightning_align.runtime.kinds import check_kinds, hints_of
from lightning_align.runtime.lightning_internals import is_fast_dev_run, overfits
from lightning_align.runtime.plain import PlainNumbers
from lightning_align.runtime.run_folder import records_folder
from lightning_align.training.loading import for_device
from lightning_align.training.prompts import first_prompts

Stage = Literal["train", "validation", "test", "predict"]
Loader = DataLoader[list[StoredRow]]
_STAGES_OF: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
SPLITS: dict[str, str] = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


class AlignDataModule(PlainNumbers, L.LightningDataModule):
    """Reads rows from files, the hub or a task, tokenizes them, and makes batches of token ids.

    A source is a file (.jsonl, .json, .csv, .parquet or .arrow; text files also with .gz or .zst), a folder of files, a
    pattern (data/part-*.jsonl), a folder of `datasets.save_to_disk`, a dataset of the Hugging Face hub (name, name:split
    or name:config:split), a list of these, or a task (class_path and init_args). The files of a folder or a pattern are
    read in the order of their names.

    A mixture is a list of sources with settings of their own: `[{source: a.jsonl, weight: 2}, {source: b.jsonl, weight: 1}]`.
    Each may have its own `columns`, `roles`, `shape` and `ranked_pairs`. Without weights, an epoch has every row once.

    Args:
        train: The source of the training rows.
        validation: The source of the validation rows, or several by name: `{easy: a.jsonl, hard: b.jsonl}`. The metrics of
            each are logged as `val/easy/loss`, beside those of all rows as `val/loss`.
        test: The source of the test rows, or several by name.
        predict: The source of the rows to respond to or to score.
        tokenizer: `bytes`, the path of a tokenizer.json, or the folder or hub name of a transformers tokenizer.
        batch_size: Rows per training batch, on each device.
        batch_tokens: Tokens per training batch, on each device, in place of `batch_size`: as many rows as fit, of a pair both
            sides, without padding. The gradient of a step is the mean over all of its rows, whatever their number.
        eval_batch_size: Rows per validation, test or prediction batch, on each device. Default is `batch_size`.
        max_length: The largest number of tokens per row, prompt and response together.
        truncation: What happens to a longer row. `keep_start` cuts the end of the response, `keep_end` cuts the beginning
            of the prompt, and `drop` drops the row. Each is counted.
        mask_turns: Which turns are trained: the last turn of the assistant (`last_turn`), all turns of the assistant
            (`assistant_only`), or everything after the prompt (`all`).
        chat_template_kwargs: Variables of the tokenizer's chat template, such as `enable_thinking`. A column of the same
            name sets them per row, and has priority.
        group_by_length: Group rows of similar length in training batches, which saves padding. If length and content
            are related (sums of two and of three numbers, for example), groups make batches one-sided and training slower
            or unstable. Switch it off in that case.
        columns: The column of each field, such as `{prompt: instruction, response: output}`. A dot reads a column within a
            struct: `{prompt: info.post}`. Of a list of structs it reads the list of the values.
        roles: The role of each name in messages, such as `{visitor: user, expert: assistant}`.
        shape: The shape of the rows. `auto` finds it where it is certain, and `plain` takes rows as they are. `sharegpt` is
            {conversations: [{from, value}]}, `alpaca` {instruction, input, output}, `completion` {prompt, completion},
            `pair` {question, chosen, rejected}, `ranked` a prompt and answers with ranks or scores, `labelled` answers that
            are labelled good or bad or with a number, and `choice` two answers and which is better.
        ranked_pairs: The pairs of a row of ranked answers: the best and the worst (`best_worst`), every two of different rank
            (`all`), or each with the next one (`adjacent`).
        mixture_stop: When an epoch of a mixture with weights ends: when the first source has given all its rows
            (`first_exhausted`), or when all have (`all_exhausted`), with the rows of the others repeated.
        on_bad_row: What happens to a malformed row. `fail` stops and names the row, `warn` drops it with a warning, and
            `skip` drops and counts it.
        num_workers: Processes that prepare batches. 0 prepares them in the training process.
        preparation_workers: Processes that tokenize a source of many rows, before training. 0 takes all cores, and 1 tokenizes
            in the training process. The result is the same. An interrupted preparation continues where it stopped.
        cache_dir: The folder of tokenized rows. Its files are found by a hash of everything that they depend on, and may be
            deleted at any time.
        seed: The seed of the order of the training rows.
    """

    kind: ClassVar[str]
    """The first word of the cache's file names."""
    forms: ClassVar[tuple[Form, ...]]
    """The forms of training rows, preferred forms first."""
    predict_forms: ClassVar[tuple[Form, ...]] = ("prompt", "messages")
    """The forms of prediction rows. If pairs are among them, a source of pairs is scored."""

    # The order matters to the command line. A string comes first and `Path` is among the types, so that it does not read a
    # file of rows as a list or a configuration. `Path` comes last, because it takes any value.
    def __init__(
        self,
        train: str | list[str] | list[SourcePart] | RowTask | Path | None = None,
        *,
        validation: str | list[str] | list[SourcePart] | RowTask | dict[str, str | list[str]] | Path | None = None,
        test: str | list[str] | list[SourcePart] | RowTask | dict[str, str | list[str]] | Path | None = None,
        predict: str | list[str] | list[SourcePart] | RowTask | Path | None = None,
        tokenizer: str = "bytes",
        batch_size: int = 8,
        batch_tokens: int | None = None,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        truncation: Truncation = "keep_start",
        mask_turns: MaskTurns = "last_turn",
        columns: dict[str, str] | None = None,
        roles: dict[str, str] | None = None,
        shape: Shape = "auto",
        ranked_pairs: RankedPairs = "best_worst",
        mixture_stop: MixtureStop = "first_exhausted",
        on_bad_row: BadRow = "fail",
        chat_template_kwargs: dict[str, Any] | None = None,
        group_by_length: bool = True,
        num_workers: int = 0,
        preparation_workers: int = 0,
        cache_dir: str = ".cache/lightning_align",
        seed: int = 0,
    ) -> None:
        check_kinds(type(self).__name__, hints_of(AlignDataModule), locals())
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
            ("preparation_workers", preparation_workers, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be {least} or more, but got {value}.")
        for name, choice, choices in (
            ("truncation", truncation, ("keep_start", "keep_end", "drop")),
            ("mask_turns", mask_turns, ("last_turn", "assistant_only", "all")),
            ("on_bad_row", on_bad_row, ("fail", "warn", "skip")),
            ("mixture_stop", mixture_stop, ("first_exhausted", "all_exhausted")),
        ):
            if choice not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {choice!r}.")
        try:
            check_template_kwargs(chat_template_kwargs or {})
        except ValueError as error:
            raise ValueError(f"`chat_template_kwargs` is wrong: {error}.") from error
        given: dict[str, Any] = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.sources = named_sources(given)
        """The sources. The key is the stage, or `stage/name` for one of several."""
        self._parts = {stage: parts_of(source) for stage, source in self.sources.items()}
        self.tokenizer_name = os.fspath(tokenizer)
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.truncation: Truncation = truncation
        self.mask_turns: MaskTurns = mask_turns
        self.mapping = RowMapping(columns=columns or {}, roles=roles or {}, shape=shape, ranked_pairs=ranked_pairs)
        self.mixture_stop: MixtureStop = mixture_stop
        self.on_bad_row: BadRow = on_bad_row
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.group_by_length = group_by_length
        self.num_workers, self.preparation_workers = num_workers, preparation_workers
        self.cache_dir, self.seed = cache_dir, seed
        self.ledgers: dict[str, Ledger] = {}
        """Counts of kept, trimmed and dropped rows, per stage. The key of a part of a mixture is `stage/source`."""
        self._stores: dict[str, TokenStore] = {}
        self._tokenizer: Tokenizer | None = None
        self._limit_val_batches: int | float | None = None

    # -- tokenized rows

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    def prepare_data(self) -> None:
        """Tokenize the sources of the running command into the cache. The Trainer calls it in one process per node."""
        trainer = self.trainer
        function = None if trainer is None else trainer.state.fn
        stages = ("train", "validation", "test", "predict") if function is None else _STAGES_OF[function.value]
        if function is not None:
            self._require(stages[0])  # before other sources are tokenized and the model is built
        for key in (key for stage in stages for key in self._keys(stage)):
            self._open(key)

    def setup(self, stage: str) -> None:
        """Open the tokenized rows, print how many were kept, and write the counts to ``ledger.json`` in the run's folder."""
        new = [key for each in _STAGES_OF[stage] for key in self._keys(each) if key not in self._stores]
        for name in new:
            opened = self._open(name)
            names = [part.name for part in self._parts[name]]
            stores = [store for store, _ in opened]
            self._stores[name] = stores[0] if len(stores) == 1 else MixedStore(stores, names)
            for i, (_, ledger) in enumerate(opened):
                same = f" ({names[: i + 1].count(names[i])})" if names.count(names[i]) > 1 else ""
                self.ledgers[name if len(opened) == 1 else f"{name}/{names[i]}{same}"] = ledger
                rank_zero_info(f"{name} rows from {ledger.table()}")
                if advice := ledger.advice():
                    rank_zero_warn(f"{name} rows from {advice}")
        trainer = self.trainer
        if stage == "fit" and trainer is not None and not self._keys("validation"):
            # A fit without validation rows does not validate. Lightning warns if there is no loader or an empty one.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        if trainer is not None and new and not is_fast_dev_run(trainer):
            folder = records_folder(trainer)
            if trainer.is_global_zero and folder is not None:
                write_ledgers(folder / "ledger.json", self.ledgers)

    def teardown(self, stage: str) -> None:
        """Restore the Trainer's settings."""
        if self.trainer is not None and self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def _keys(self, stage: str) -> list[str]:
        """Return the keys of the sources of a stage."""
        return [key for key in self.sources if key.partition("/")[0] == stage]

    def _open(self, key: str) -> list[tuple[TokenStore, Ledger]]:
        """Open the store of each part of a source, or build it."""
        opened = []
        split = SPLITS[key.partition("/")[0]]
        for part in self._parts.get(key, ()):
            options: Any = {"split": split, "recipe": self._recipe(key, part), "tokenizer": self.tokenizer}
            path = store_path(part.rows, cache_dir=self.cache_dir, **options)
            opened.append(build_store(path, source=part.rows, num_workers=self.preparation_workers, **options))
        return opened

    def _recipe(self, key: str, part: SourcePart) -> Recipe:
        mapping = part.mapping(self.mapping)
        accepted, prompts_only = self.forms, False
        if key == "predict":
            accepted = self.predict_forms
            if "pair" in accepted:
                rows = map_rows(read_rows(part.rows, split=SPLITS[key]), mapping, accepted=accepted, prompts_only=True)
                pairs = first_form(rows, accepted) == "pair"
                accepted = ("pair",) if pairs else tuple(form for form in accepted if form != "pair")
            prompts_only = "pair" not in accepted
        return Recipe(
            kind=f"{self.kind}-prompts" if prompts_only else self.kind,
            accepted=accepted,
            max_length=self.max_length,
            truncation=self.truncation,
            mask_turns=self.mask_turns,
            on_bad_row=self.on_bad_row,
            prompts_only=prompts_only,
            mapping=mapping,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    # -- batches

    def train_dataloader(self) -> Loader:
        """Return training batches, in a new order for each epoch. A resumed run continues at the next batch."""
        store = self._store("train")
        sampler = self._sampler(store, self.batch_size, shuffle=True, grouped=self.group_by_length)
        return self._loader(store, sampler, self._collate(store), resumable=True)

    def val_dataloader(self) -> Loader | dict[str, Loader]:
        """Return batches of every row once. With several sources by name, a loader for each."""
        return self._eval_loaders("validation")

    def test_dataloader(self) -> Loader | dict[str, Loader]:
        """Return batches of every row once. With several sources by name, a loader for each."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> Loader:
        """Return prompts or pairs, every row once and in the order of the source."""
        return self._eval_loader("predict")

    def _eval_loaders(self, stage: Stage) -> Loader | dict[str, Loader]:
        self._require(stage)
        keys = self._keys(stage)
        return self._eval_loader(stage) if keys == [stage] else {k.partition("/")[2]: self._eval_loader(k) for k in keys}

    def _eval_loader(self, key: str) -> Loader:
        store = self._store(key)
        in_order = key == "predict"
        sampler = self._sampler(store, self.eval_batch_size, shuffle=False, grouped=not in_order)
        collate = self._collate(store) if not in_order or store.num_sides == 2 else collate_prompts
        return self._loader(store, sampler, collate)

    def _sampler(self, store: TokenStore, batch_size: int, *, shuffle: bool, grouped: bool = True) -> LengthGroupedSampler:
        replicas = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        lengths = store.lengths() if grouped else None
        weights = [part.weight for part in self._parts.get("train", ()) if part.weight is not None]
        if shuffle and self.batch_tokens is not None:
            if len(weights) > 1:
                raise ValueError(f"`batch_tokens` is {self.batch_tokens}, but weights of sources need `batch_size`. Drop one.")
            made = TokenBatchSampler(store.lengths(), budget=self.batch_tokens, grouped=grouped, seed=self.seed, **replicas)
            rank_zero_info(f"train: {made.describe()}")
            return made
        if shuffle and len(weights) > 1:
            return MixtureSampler(
                lengths,
                **self._parts_of_rows(store),
                weights=weights,
                stop=self.mixture_stop,
                batch_size=batch_size,
                seed=self.seed,
                **replicas,
            )
        return LengthGroupedSampler(
            lengths, num_rows=len(store), batch_size=batch_size, shuffle=shuffle, seed=self.seed, **replicas
        )

    def _parts_of_rows(self, store: TokenStore) -> dict[str, Any]:
        """Return the arguments of `MixtureSampler` that tell which rows are of which part."""
        return {"sizes": cast(MixedStore, store).sizes}

    def _collate(self, store: TokenStore) -> Callable[[Sequence[StoredRow]], Any]:
        collate = collate_pairs if store.num_sides == 2 else collate_tokens
        return partial(cast("Callable[..., Any]", collate), pad_id=self.tokenizer.pad_id)

    def _loader(
        self,
        store: TokenStore,
        sampler: LengthGroupedSampler,
        collate: Callable[[Sequence[StoredRow]], Any],
        *,
        resumable: bool = False,
    ) -> Loader:
        # The sampler yields whole batches. As a `batch_sampler`, Lightning would replace it with its own.
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        options = for_device(self.trainer, {"batch_size": None, "collate_fn": collate, **workers})
        repeated = RepeatedSampler(sampler) if overfits(self.trainer) else None
        loader = ResumableLoader if resumable else DataLoader
        return loader(RowLists(store, repeated), sampler=repeated or sampler, **options)

    def _store(self, key: str) -> TokenStore:
        self._require(key)
        if key not in self._stores:
            raise ValueError("The rows are not open yet. Call prepare_data() and setup() first, as the Trainer does.")
        self._check_vocabulary()
        return self._stores[key]

    def _require(self, stage: str) -> None:
        if stage not in self.sources and not self._keys(stage):
            raise ValueError(
                f"There is no source of {stage} rows. Give `{stage}` to {type(self).__name__}, on the command line "
                f"--data.{stage}: a file that is not empty, a hub dataset or a task."
            )

    def _check_vocabulary(self) -> None:
        # Not in `setup`, because the module builds its policy after it.
        policy = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
        for owner in (policy, getattr(policy, "config", None)):
            for name in ("num_tokens", "vocab_size"):
                if isinstance(num_tokens := getattr(owner, name, None), int):
                    check_vocabulary(self.tokenizer, num_tokens=num_tokens)
                    return

    # -- for callbacks

    @property
    def grader(self) -> Grader | None:
        """The task that grades responses: the source of the validation rows or of the training rows, or None."""
        for key in (*self._keys("validation"), "train"):
            source = self.sources.get(key)
            if isinstance(source, RowTask) and isinstance(source, Grader):
                return source
        return None

    def validation_prompts(self, limit: int) -> list[tuple[list[int], str, str]]:
        """Return the first validation prompts, for samples.

        Args:
            limit: The largest number of prompts.

        Returns:
            For each prompt its token ids, its text, and the response of the row (of a pair, the chosen response). Empty if
            there are no validation rows, or if they are plain texts without prompts.
        """
        key = next((key for key in self._keys("validation") if key in self._stores), None)
        if key is None:
            return []
        sources = [(part.rows, self._recipe(key, part)) for part in self._parts[key]]
        return first_prompts(self._stores[key], sources, split=SPLITS["validation"], tokenizer=self.tokenizer, limit=limit)
