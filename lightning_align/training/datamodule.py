"""What every DataModule of the suite shares: sources in, batches out, every row accounted for."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_align.data.batching import (
    LengthGroupedSampler,
    ResumableLoader,
    RowLists,
    collate_pairs,
    collate_prompts,
    collate_tokens,
)
from lightning_align.data.encode import Truncation
from lightning_align.data.forms import BadRowError, Form, MaskTurns, form_of, prompt_text, read_conversation, side_text
from lightning_align.data.ledger import BadRow, Ledger, write_ledgers
from lightning_align.data.rows import Grader, RowTask, read_rows
from lightning_align.data.store import Recipe, StoredRow, TokenStore, build_store, store_path
from lightning_align.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lightning_align.runtime.lightning_internals import is_fast_dev_run, overfits

Stage = Literal["train", "validation", "test", "predict"]
_STAGES_OF: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
_SPLITS: dict[Stage, str] = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


class AlignDataModule(L.LightningDataModule):
    """Rows of files, of the hub or of a task as batches of token ids.

    A source is a file (.jsonl, .jsonl.gz, .parquet, .csv), a dataset of the Hugging Face hub (name, name:split or
    name:config:split), or a task (class_path and init_args).

    Args:
        train: Source of the training rows.
        validation: Source of the validation rows.
        test: Source of the test rows.
        predict: Source of the rows to continue or to score.
        tokenizer: bytes, the path of a tokenizer.json, or a folder or hub name of a transformers tokenizer.
        batch_size: Rows of a training batch of each device.
        eval_batch_size: Rows of a validation, test or prediction batch of each device; as batch_size where it is not
            given.
        max_length: Most tokens of a row, prompt and response together.
        truncation: What becomes of a longer row: keep_start cuts the end of the response, keep_end the beginning of the
            prompt, drop drops the row. Each is counted.
        mask_turns: Which turns of an answer are trained: the last_turn of the assistant, all of them (assistant_only),
            or all that follows the prompt, whoever says it.
        group_by_length: Whether a training batch has rows of about one length, which saves padding. Where length and
            content go together (sums of two digits, sums of three), groups make every batch one-sided and training
            slower or unstable: switch it off there.
        on_bad_row: What a broken row does: fail stops and names it, warn drops it and says so, skip drops and counts
            it.
        num_workers: Processes that make batches ahead of time; 0 makes them in the training process.
        cache_dir: Folder of the tokenised rows. Found again by the hash of all that they depend on, they may be deleted
            at any time.
        seed: Where the order of the training rows starts from.
    """

    kind: ClassVar[str]
    """Word of the cache's file names."""
    forms: ClassVar[tuple[Form, ...]]
    """Forms of rows to train on, preferred ones first."""
    predict_forms: ClassVar[tuple[Form, ...]] = ("prompt", "messages")
    """Forms of rows to predict on; where pairs are among them, a source of pairs is scored instead of continued."""

    def __init__(
        self,
        train: str | RowTask | None = None,
        *,
        validation: str | RowTask | None = None,
        test: str | RowTask | None = None,
        predict: str | RowTask | None = None,
        tokenizer: str = "bytes",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        truncation: Truncation = "keep_start",
        mask_turns: MaskTurns = "last_turn",
        on_bad_row: BadRow = "fail",
        group_by_length: bool = True,
        num_workers: int = 0,
        cache_dir: str = ".cache/lightning_align",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, expected {least} or more")
        for name, choice, choices in (
            ("truncation", truncation, ("keep_start", "keep_end", "drop")),
            ("mask_turns", mask_turns, ("last_turn", "assistant_only", "all")),
            ("on_bad_row", on_bad_row, ("fail", "warn", "skip")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(choices)}")
        self.sources: dict[Stage, str | RowTask] = {
            stage: source
            for stage, source in cast(
                "list[tuple[Stage, str | RowTask | None]]",
                [("train", train), ("validation", validation), ("test", test), ("predict", predict)],
            )
            if source is not None
        }
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.truncation: Truncation = truncation
        self.mask_turns: MaskTurns = mask_turns
        self.on_bad_row: BadRow = on_bad_row
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.seed = seed
        self.ledgers: dict[Stage, Ledger] = {}
        """What became of the rows of each source that was set up."""
        self._stores: dict[Stage, TokenStore] = {}
        self._tokenizer: Tokenizer | None = None
        self._limit_val_batches: int | float | None = None

    # -- the tokenised rows

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when it is first used."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    def prepare_data(self) -> None:
        """Tokenises the sources that are needed into the cache; the trainer calls it in one process a node."""
        trainer = self.trainer
        function = None if trainer is None else trainer.state.fn
        stages = tuple(self.sources) if function is None else _STAGES_OF[function.value]
        if function is not None:
            self._require(stages[0])  # before the others are tokenised and the model is built
        for stage in stages:
            self._open(stage)

    def setup(self, stage: str) -> None:
        """Opens the tokenised rows; shows what became of all rows and writes it to ``ledger.json`` beside the logs."""
        new = [name for name in _STAGES_OF[stage] if name in self.sources and name not in self._stores]
        for name in new:
            opened = self._open(name)
            assert opened is not None
            self._stores[name], self.ledgers[name] = opened
            rank_zero_info(f"{name} rows from {self.ledgers[name].table()}")
        trainer = self.trainer
        if stage == "fit" and trainer is not None and "validation" not in self.sources:
            # A fit without validation rows does not validate. Neither no loader nor an empty one says so without a warning.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        if trainer is not None and new and not is_fast_dev_run(trainer):
            # Asked for on every rank: the ranks agree on the folder by a broadcast.
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            if trainer.is_global_zero:
                write_ledgers(folder / "ledger.json", {str(name): ledger for name, ledger in self.ledgers.items()})

    def teardown(self, stage: str) -> None:
        """Leaves the trainer as it was."""
        if self.trainer is not None and self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def _open(self, stage: Stage) -> tuple[TokenStore, Ledger] | None:
        source = self.sources.get(stage)
        if source is None:
            return None
        split = _SPLITS[stage]
        recipe = self._recipe(stage, source)
        path = store_path(source, split=split, recipe=recipe, tokenizer=self.tokenizer, cache_dir=self.cache_dir)
        return build_store(path, source=source, split=split, recipe=recipe, tokenizer=self.tokenizer)

    def _recipe(self, stage: Stage, source: str | RowTask) -> Recipe:
        accepted, prompts_only = self.forms, False
        if stage == "predict":
            accepted = self.predict_forms
            if "pair" in accepted:
                pairs = _first_form(source, accepted, split=_SPLITS[stage]) == "pair"
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
        )

    # -- batches

    def train_dataloader(self) -> DataLoader[list[StoredRow]]:
        """Batches in an order of each epoch's own; resumes where a checkpoint was taken."""
        store = self._store("train")
        sampler = self._sampler(store, self.batch_size, shuffle=True, grouped=self.group_by_length)
        return self._loader(store, sampler, self._collate(store), resumable=True)

    def val_dataloader(self) -> DataLoader[list[StoredRow]]:
        """Batches of every row once."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[list[StoredRow]]:
        """Batches of every row once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[list[StoredRow]]:
        """Prompts to continue, or pairs to score, every row once and in the order of the source."""
        return self._eval_loader("predict")

    def _eval_loader(self, stage: Stage) -> DataLoader[list[StoredRow]]:
        store = self._store(stage)
        in_order = stage == "predict"
        sampler = self._sampler(store, self.eval_batch_size, shuffle=False, grouped=not in_order)
        collate = self._collate(store) if not in_order or store.num_sides == 2 else collate_prompts
        return self._loader(store, sampler, collate)

    def _sampler(self, store: TokenStore, batch_size: int, *, shuffle: bool, grouped: bool = True) -> LengthGroupedSampler:
        return LengthGroupedSampler(
            store.lengths() if grouped else None,
            num_rows=len(store),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **({} if self._overfits else (self.trainer and self.trainer.distributed_sampler_kwargs) or {}),
        )

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
    ) -> DataLoader[list[StoredRow]]:
        # The sampler yields whole batches: were it given as batch sampler, the trainer would put its own in its place.
        options: dict[str, Any] = {
            "batch_size": None,
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }
        if self._overfits:
            # The trainer then takes the first batches of a plain sampler, and deals them out to the ranks itself.
            return DataLoader(RowLists(store, list(sampler)), **options)
        loader = ResumableLoader if resumable else DataLoader
        return loader(RowLists(store), sampler=sampler, **options)

    @property
    def _overfits(self) -> bool:
        return overfits(self.trainer)

    def _store(self, stage: Stage) -> TokenStore:
        self._require(stage)
        if stage not in self._stores:
            raise ValueError("the rows are not open yet: call prepare_data() and setup() first, as the trainer does")
        self._check_vocabulary()
        return self._stores[stage]

    def _require(self, stage: Stage) -> None:
        if stage not in self.sources:
            raise ValueError(
                f"there is no source of {stage} rows: give {type(self).__name__}({stage}=...), on the command line "
                f"--data.{stage}: a file that is not empty or a task"
            )

    def _check_vocabulary(self) -> None:
        # Here and not in setup, where the module has not built its policy yet.
        policy = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
        for owner in (policy, getattr(policy, "config", None)):
            for name in ("num_tokens", "vocab_size"):
                if isinstance(num_tokens := getattr(owner, name, None), int):
                    check_vocabulary(self.tokenizer, num_tokens=num_tokens)
                    return

    # -- for callbacks

    @property
    def grader(self) -> Grader | None:
        """What can tell a right response from a wrong one: the task that the validation or the training rows are from."""
        for stage in ("validation", "train"):
            source = self.sources.get(stage)
            if isinstance(source, RowTask) and isinstance(source, Grader):
                return source
        return None

    def validation_prompts(self, limit: int) -> list[tuple[list[int], str, str]]:
        """The first validation prompts, for showing what the model makes of them.

        Args:
            limit: How many at most.

        Returns:
            For each the ids of the prompt, its text, and the reference: the response or the chosen answer. Empty where
            there are no validation rows, or plain texts, which have no prompts.
        """
        store = self._stores.get("validation")
        if store is None:
            return []
        stored = [store[i] for i in range(min(limit, len(store)))]
        wanted = {row.row: row for row in stored if row.num_prompt > 0}
        prompts = []
        rows = enumerate(read_rows(self.sources["validation"], split=_SPLITS["validation"]))
        for index, row in islice(rows, max(wanted, default=-1) + 1):
            if index not in wanted:
                continue
            forms = [form for form in self.forms if form != "text"]
            form = form_of(row.fields, accepted=forms)
            conversation = read_conversation(row.fields, form=form, tokenizer=self.tokenizer, mask_turns=self.mask_turns)
            ids = wanted[index].sides[0].tokens[: wanted[index].num_prompt].tolist()
            prompts.append((ids, prompt_text(conversation), side_text(conversation.sides[0])))
        return prompts


def _first_form(source: str | RowTask, accepted: Sequence[Form], *, split: str) -> Form | None:
    """The form of the first row that has one."""
    for row in read_rows(source, split=split):
        try:
            return form_of(row.fields, accepted=accepted)
        except BadRowError:
            continue
    return None
