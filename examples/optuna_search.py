"""A search for the learning rate and β of DPO with Optuna, which stops trials that fall behind.

    pip install optuna optuna-integration
    python examples/optuna_search.py pairs.jsonl

A trial reports its validation accuracy once per epoch: the callback counts epochs, so validate once in each.
"""

import sys
from functools import partial

import lightning as L
import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback

from lightning_align import DPODataModule, DPOModule, PaLM


def objective(trial: optuna.Trial, pairs: str, epochs: int) -> float:
    """Train with the settings of one trial and return its last validation accuracy.

    Losses of runs with another β cannot be compared. The share of pairs that the policy orders correctly can.
    """
    L.seed_everything(0, verbose=False)
    lr = trial.suggest_float("lr", 1e-6, 1e-2, log=True)
    beta = trial.suggest_float("beta", 0.05, 0.5)
    model = PaLM(num_tokens=259, dim=64, depth=2, heads=2, dim_head=32)
    module = DPOModule(model, beta=beta, optimizer=partial(torch.optim.AdamW, lr=lr))
    data = DPODataModule(pairs, validation=pairs, batch_size=4, max_length=64)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[PyTorchLightningPruningCallback(trial, monitor="val/rewards/accuracies")],
    )
    trainer.fit(module, data)
    return float(trainer.callback_metrics["val/rewards/accuracies"])


def main(pairs: str, trials: int = 20, epochs: int = 3) -> optuna.Study:
    """Run the trials and return the study, with the best settings in `best_params`."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(partial(objective, pairs=pairs, epochs=epochs), n_trials=trials)
    return study


if __name__ == "__main__":
    best = main(sys.argv[1])
    print(best.best_params, best.best_value)
