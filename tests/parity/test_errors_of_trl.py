"""Errors of TRL's DPOTrainer that ours does not have. Each test pins an error, so that it fails once TRL fixes it."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import Ratios

WORDS = [f"w{number}" for number in range(20)]
PAIRS = [
    {"prompt": f"w{n} w{n + 1}", "chosen": " ".join(f" w{(n + k) % 20}" for k in range(n + 2)), "rejected": f" w{n + 5} w3"}
    for n in range(5)
]


@pytest.fixture(autouse=True)
def _ignore_warnings_of_trl() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes TRL's trainer of a tiny Llama on five pairs. It takes arguments of `DPOConfig`."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS), encoding="utf-8")
    # From a file, as users have it: `datasets` does not cache the results for rows in memory, so they would not be mixed up.
    rows = datasets.load_dataset("json", data_files=str(source), cache_dir=str(tmp_path / "cache"), split="train")
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<eos>", "<pad>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")

    def llama(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes))

    def make(**settings: Any) -> Any:
        given = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        given |= {"gradient_checkpointing": False, "learning_rate": 0.05, "lr_scheduler_type": "constant", "logging_steps": 1}
        config = DPOConfig(**{**given, "per_device_train_batch_size": 5, "seed": 0, "save_strategy": "no", **settings})
        return DPOTrainer(llama(0), llama(1), args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    return make


def test_trl_reuses_stored_reference_log_probs_of_another_length(trainer: Callable[..., Any]) -> None:
    """Its cache key lacks `max_length`, which its collator applies. Our key has the tokens and mask of each row."""

    def stored(max_length: int) -> list[float]:
        made = trainer(precompute_ref_log_probs=True, truncation_mode="keep_end", max_length=max_length)
        values: list[float] = made.train_dataset["ref_chosen_logps"]
        return values

    long, short = list(stored(64)), list(stored(4))
    assert long == short, "three rows have more than 4 tokens, so that their log-probs differ"
    assert (
        list(
            trainer(precompute_ref_log_probs=True, truncation_mode="keep_start", max_length=4).train_dataset["ref_chosen_logps"]
        )
        != long
    )


def test_trl_computes_stored_reference_log_probs_again_for_another_beta(
    trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They depend only on the reference. Ours serve every beta, loss and learning rate (tests/references/test_stored.py)."""
    from trl import DPOTrainer

    calls, real = [], DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *given: calls.append(1) or real(*given))
    for beta, expected in ((0.1, 1), (0.1, 1), (0.2, 2)):
        trainer(precompute_ref_log_probs=True, beta=beta)
        assert len(calls) == expected, "training and evaluation have the same rows, in one batch"


@pytest.mark.parametrize("metric", ["eval_rewards/margins", "eval_rewards/chosen"])
def test_trl_reports_other_rewards_at_another_evaluation_batch(trainer: Callable[..., Any], metric: str) -> None:
    """It averages the means of batches of unequal sizes. Ours are sums over samples (tests/distributed)."""
    by_batch = {size: trainer(per_device_eval_batch_size=size).evaluate() for size in (1, 2)}
    assert abs(by_batch[1]["eval_loss"] - by_batch[2]["eval_loss"]) < 1e-5
    assert abs(by_batch[1][metric] - by_batch[2][metric]) > 1e-4


def test_trl_forgets_a_moved_reference_on_resume(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Its checkpoint has only the policy. Ours resumes a moving reference bit for bit (tests/training/test_resume.py)."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 4}

    def losses(made: Any) -> list[float]:
        return [line["loss"] for line in made.state.log_history if "loss" in line]

    whole = trainer(**moving, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(**moving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-2"))
    policy, reference = (
        max(
            float((a - b).detach().abs().max())
            for a, b in zip(getattr(whole, name).parameters(), getattr(resumed, name).parameters(), strict=True)
        )
        for name in ("model", "ref_model")
    )
    assert losses(whole)[:2] == losses(resumed)[:2]
    assert losses(whole)[2:] != losses(resumed)[2:]
    assert policy > 1e-4
    assert reference > 1e-4


def test_trl_ignores_label_smoothing_of_its_default_loss(trainer: Callable[..., Any]) -> None:
    """Ours applies it."""
    plain, smoothed = (trainer(label_smoothing=share).evaluate()["eval_loss"] for share in (0.0, 0.3))
    assert plain == smoothed
    ratios = Ratios(torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([3]), torch.tensor([3]))
    assert float(sigmoid_loss(ratios, beta=1.0, label_smoothing=0.3)) > float(sigmoid_loss(ratios, beta=1.0)) + 0.1
