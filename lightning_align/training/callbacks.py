"""Callbacks that any method can use: samples, solved problems, and predictions. None of them changes what is learned."""

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchmetrics.aggregation import MeanMetric

from lightning_align.data.rows import Grader, RowTask
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.models.language_model import policy_of
from lightning_align.runtime.files import check_writable, publish_text
from lightning_align.runtime.lightning_internals import datamodule_of
from lightning_align.runtime.ranks import data_world, is_first_copy
from lightning_align.runtime.run_folder import run_folder
from lightning_align.runtime.team import Team
from lightning_align.training.markdown import block
from lightning_align.training.panels import show_table
from lightning_align.training.tensorboard import Charts


def _continue(
    module: Any, tokenizer: Any, prompts: list[list[int]], config: GenerationConfig, **options: Any
) -> list[list[Generation]]:
    """Generate with the module's own method, or with the policy of a module of another package."""
    policy = policy_of(module)
    own = getattr(module, "continue_prompts", None)
    ends = Ends.of(tokenizer=tokenizer, model=policy, config=config, default=getattr(module, "generation", None))
    results: list[list[Generation]] = (own or partial(generate, policy))(prompts, config, ends=ends, **options)
    return results


def _decode_shared(
    trainer: L.Trainer, module: Any, prompts: list[list[int]], config: GenerationConfig
) -> list[tuple[int, Generation]]:
    """Generate responses to this rank's share of the prompts: (index of the prompt, response).

    Under a sharded strategy each forward pass is a collective. So every rank makes the same number of calls on the same number
    of prompts. A rank with fewer prompts repeats its last one.
    """
    rank, ranks = data_world()
    mine = list(range(rank, len(prompts), ranks))
    padded = mine + [mine[-1] if mine else 0] * (-(-len(prompts) // ranks) - len(mine))
    tokenizer = datamodule_of(trainer).tokenizer
    with trainer.precision_plugin.forward_context():
        # The random numbers of a response depend on its prompt's number, not on the number of ranks.
        results = _continue(module, tokenizer, [prompts[i] for i in padded], config, ids=padded)
    return [(index, responses[0]) for index, responses in zip(mine, results, strict=False)]


def _require_data(trainer: L.Trainer, what: str, attribute: str) -> Any:
    data = getattr(trainer, "datamodule", None)
    if data is None or getattr(data, attribute, None) is None:
        raise ValueError(
            f"{what} needs a data module with `{attribute}`, but {type(data).__name__ if data else 'a bare loader'} has none. "
            "Use a data module of lightning_align, or remove the callback."
        )
    return data


class SampleLogger(Callback):
    """Logs samples: prompt, chosen response and generated response.

    The samples are appended to ``samples.jsonl`` in the run's folder. TensorBoard shows them as texts. Loggers of Weights &
    Biases, MLflow and Comet, and others with `log_table` or `log_text`, get a table.
    """

    def __init__(self, *, num_samples: int = 4, max_new_tokens: int = 128, temperature: float = 0.0) -> None:
        """Sample at the end of each validation.

        Args:
            num_samples: The number of prompts, taken from the first validation rows.
            max_new_tokens: The largest number of tokens per response.
            temperature: The sampling temperature. 0 takes the most likely token.
        """
        self.num_samples = num_samples
        self.config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample and log."""
        if trainer.sanity_checking:
            return
        data = _require_data(trainer, "SampleLogger", "validation_prompts")
        triples = data.validation_prompts(self.num_samples)
        if not triples:
            return
        # Every rank generates all samples. They are few, and nothing has to be gathered.
        with trainer.precision_plugin.forward_context():
            results = _continue(pl_module, data.tokenizer, [t[0] for t in triples], self.config)
        samples = [
            {"prompt": prompt, "chosen": chosen, "generated": data.tokenizer.decode(responses[0].tokens)}
            for (_, prompt, chosen), responses in zip(triples, results, strict=True)
        ]
        self._write(trainer, run_folder(trainer), samples)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, folder: Path, samples: list[dict[str, str]]) -> None:
        texts = ["\n\n".join(f"**{name}**\n\n{block(text)}" for name, text in sample.items()) for sample in samples]
        rows = [list(sample.values()) for sample in samples]
        markdown = {f"val/samples/{number}": text for number, text in enumerate(texts)}
        show_table(trainer.loggers, "val/samples", list(samples[0]), rows, step=trainer.global_step, markdown=markdown)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": trainer.global_step, **sample}, ensure_ascii=False) + "\n")


class SolveRate(Callback):
    """Logs ``val/solved``: the share of the problems of a graded task that the policy solves."""

    def __init__(
        self,
        problems: RowTask,
        *,
        num_problems: int = 500,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        batch_size: int = 250,
        name: str = "solved",
    ) -> None:
        """Solve at the end of each validation or test.

        Args:
            problems: A task with `grade`. Use another split than that of the training rows.
            num_problems: The number of problems, taken from the start of the task.
            max_new_tokens: The largest number of tokens per response. A response that reaches it is not solved.
            temperature: The sampling temperature. 0 takes the most likely token.
            batch_size: Problems per generated batch.
            name: The logged name: ``val/<name>``. Several of these callbacks need different names.

        Raises:
            ValueError: If the task has no `grade`.
        """
        if not isinstance(problems, Grader):
            raise ValueError(
                f"SolveRate: `problems` must be a task with a method `grade`, but got a {type(problems).__name__}. Use a task "
                "such as Arithmetic."
            )
        self.grader, self.name = problems, name
        self.prompts = [str(row["prompt"]) for row in islice(problems.rows(), num_problems)]
        self.config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)

    @property
    def charts(self) -> Charts:
        """The chart of the callback in TensorBoard."""
        return {f"{self.name}: share of problems": (f"val/{self.name}",)}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Solve, grade and log."""
        if not trainer.sanity_checking:
            pl_module.log(f"val/{self.name}", self._solve(trainer, pl_module), prog_bar=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Solve, grade and log."""
        pl_module.log(f"test/{self.name}", self._solve(trainer, pl_module))

    def _solve(self, trainer: L.Trainer, pl_module: L.LightningModule) -> torch.Tensor:
        tokenizer = _require_data(trainer, "SolveRate", "tokenizer").tokenizer
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompts = [[*start, *encoding.ids] for encoding in tokenizer.encode_batch(self.prompts)]
        metric = MeanMetric().to(pl_module.device)
        for index, response in _decode_shared(trainer, pl_module, prompts, self.config):
            answer = tokenizer.decode(response.tokens)
            metric.update(float(response.finished and self.grader.grade(self.prompts[index], answer)))
        trainer.strategy.barrier("solved")  # the ranks generate for different times
        # compute() gathers the sums and counts of all ranks.
        return metric.compute()


class PredictionWriter(Callback):
    """Writes what `predict_step` returns to a JSONL file, one line per row, in the order of the rows."""

    def __init__(self, path: str | Path) -> None:
        """Set the file.

        Args:
            path: The file. It is written at the end of the prediction, whole or not at all.
        """
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before the prediction that the file can be written."""
        if stage == "predict" and trainer.is_global_zero:
            if self.path.is_dir():
                raise ValueError(f"{self.path} is a folder. Give the name of a file to write.")
            check_writable(self.path)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rows of a batch.

        Raises:
            SIGTERMException: If the process was told to end, which Lightning looks at in the other commands only.
        """
        self.rows.extend(outputs)
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file. Of several ranks, each writes its rows to a file of its own, and the first rank joins them."""
        rows, self.rows = self.rows if is_first_copy() else [], []
        team = Team()
        try:
            parts = [self.path.with_name(f".{self.path.name}.rank-{rank}") for rank in range(team.size)]
            if team.size > 1:
                with team.together():
                    publish_text(parts[team.rank], _json_lines(rows))
            with team.together():
                if team.rank == 0:
                    self._join(rows if team.size == 1 else None, parts)
        finally:
            team.close()

    def _join(self, rows: list[dict[str, Any]] | None, parts: list[Path]) -> None:
        if rows is None:
            if missing := [part for part in parts if not part.is_file()]:
                raise ValueError(
                    f"{missing[0]} is missing. All nodes must share the folder of the predictions. Each node has the rows of "
                    f"its own ranks, in {parts[0].name} and so on."
                )
            # Not `splitlines`, which also splits at U+2028 and similar.
            rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").split("\n")[:-1]]
        publish_text(self.path, _json_lines(sorted(rows, key=lambda row: int(row["row"]))))
        for part in parts:
            part.unlink(missing_ok=True)
        rank_zero_info(f"{len(rows)} predictions in {self.path}")


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
