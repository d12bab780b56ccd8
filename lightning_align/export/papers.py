"""The papers behind a run, for its model card."""

from collections.abc import Mapping
from typing import Any

METHODS = {
    "SFTModule": ("Supervised fine-tuning", None),
    "DPOModule": ("Direct preference optimization (DPO)", "2305.18290"),
    "SPINModule": ("Self-play fine-tuning (SPIN)", "2401.01335"),
    "CALMModule": ("Composition to augment language models (CALM)", "2401.02412"),
    "RETROModule": ("Retrieval-enhanced transformer (RETRO)", "2112.04426"),
}
"""The name and the paper of the method of each module. Supervised fine-tuning has no paper."""
LOSSES = {
    "sigmoid": ("DPO", "2305.18290"),
    "sigmoid_norm": ("Length-normalized DPO (Tulu 3)", "2411.15124"),
    "hinge": ("SLiC", "2305.10425"),
    "ipo": ("IPO", "2310.12036"),
    "robust": ("Robust DPO", "2403.00409"),
    "exo_pair": ("EXO", "2402.00856"),
    "nca_pair": ("NCA", "2402.05369"),
    "bco_pair": ("BCO", "2404.04656"),
    "sppo_hard": ("SPPO", "2405.00675"),
    "aot": ("AOT", "2406.05882"),
    "aot_unpaired": ("AOT", "2406.05882"),
    "apo_zero": ("APO", "2408.06266"),
    "apo_down": ("APO", "2408.06266"),
    "discopop": ("DiscoPOP", "2406.08414"),
    "dpop": ("DPO-Positive", "2402.13228"),
    "simpo": ("SimPO", "2405.14734"),
    "cpo": ("CPO", "2401.08417"),
    "orpo": ("ORPO", "2403.07691"),
    "exponential": ("SPIN with an exponential loss", "2401.01335"),
    "correlation": ("SPIN with a correlation loss", "2401.01335"),
}
"""The name and the paper of each loss of `lightning_align.scoring.losses`."""
ADAPTERS = {
    "lora": ("LoRA", "2106.09685"),
    "rslora": ("Rank-stabilized LoRA", "2312.03732"),
    "dora": ("DoRA", "2402.09353"),
}


def papers_of(method: str, hparams: Mapping[str, Any], adapters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and arXiv numbers of what a run used, the method first, each once.

    Args:
        method: The class name of the module.
        hparams: The module's hyperparameters.
        adapters: The configuration of the adapters that were trained: a `LoRAConfig` or PEFT's, as a dictionary.
    """
    found = [METHODS[method]] if method in METHODS else []
    loss = hparams.get("loss")
    names = list(loss) if isinstance(loss, Mapping) else [loss]
    variants = [name for name in names if name in LOSSES and not (name == "sigmoid" and method in ("DPOModule", "SPINModule"))]
    found += [LOSSES[name] for name in variants]
    if "sigmoid" in names and hparams.get("sft_weight") and method == "DPOModule":
        found.append(("Iterative RPO", "2404.19733"))
    if hparams.get("divergence", "reverse_kl") != "reverse_kl":
        found.append(("DPO with other divergences", "2309.16240"))
    if hparams.get("confidence_weighting"):
        found.append(("WPO", "2406.11827"))
    if hparams.get("ld_alpha", 1.0) != 1.0:
        found.append(("LD-DPO", "2409.06411"))
    if hparams.get("reference") == "moving":
        found.append(("Trust region DPO", "2404.09656"))
    if hparams.get("opponent") == "mixture":
        found.append(("Mixture of iterate and base", "2404.04291"))
    if adapters and str(adapters.get("peft_type", "LORA")).upper() == "LORA":
        found.append(ADAPTERS["lora"])
        found += [ADAPTERS["rslora"]] if adapters.get("rslora") or adapters.get("use_rslora") else []
        found += [ADAPTERS["dora"]] if adapters.get("use_dora") else []
    once: dict[str, str] = {}
    for title, number in found:
        if number is not None and number not in once.values():
            once[title] = number
    return list(once.items())
