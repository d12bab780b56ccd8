"""The charts of self-play in TensorBoard."""

from lightning_align.training.tensorboard import Charts

CHARTS: Charts = {
    "rewards: real above generated": ("val/rewards/real", "val/rewards/generated"),
    "margins: training and validation": ("train/rewards/margins", "val/rewards/margins"),
    "accuracies: training and validation": ("train/rewards/accuracies", "val/rewards/accuracies"),
    "log-probs: real must not fall far": ("val/logps/real", "val/logps/generated"),
    "by iteration: lengths of responses": ("spin/train/length", "spin/validation/length"),
    "by iteration: ends, cuts and copies": ("spin/train/eos_rate", "spin/train/truncation_rate", "spin/train/tie_rate"),
    "by iteration: log-probs of demonstrations": ("spin/train/real_logprob", "spin/validation/real_logprob"),
}
KL_CHARTS: Charts = {"by iteration: KL to the base model": ("spin/train/kl_to_base", "spin/validation/kl_to_base")}
METRICS = (
    "loss",
    "rewards/real",
    "rewards/generated",
    "rewards/margins",
    "rewards/accuracies",
    "logps/real",
    "logps/generated",
    "tie_rate",
)
