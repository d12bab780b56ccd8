"""Values of our preference losses against those of the installed TRL, on a thousand random pairs.

TRL's formulas are inside a method of its trainer. This script takes them from the source file and runs them on plain tensors,
so it does not import TRL.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import math
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import common
from lightning_align.scoring.objective import Objective
from lightning_align.scoring.ratios import Ratios

PAIRS, BETA, TOLERANCE = 1000, 0.1, 1e-6
SMOOTHED = {"robust": 0.1, "exo_pair": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
NAMES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard")
NAMES += ("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop")
DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def trl_source() -> tuple[str, str]:
    """Source code of TRL's divergences and of its chain of losses."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("this needs TRL: pip install -c constraints.txt -e '.[bench]'")
    text = (Path(spec.submodule_search_locations[0]) / "trainer" / "dpo_trainer.py").read_text()
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If) and "chosen_scores = chosen_logratios" in ast.unparse(node):
            found.setdefault("divergence", ast.unparse(node))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "loss_type == 'sigmoid'":
            found.setdefault("loss", ast.unparse(node))
    return found["divergence"], found["loss"]


def main() -> None:
    """Compare, print the section, and fail if a difference is too large."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    divergence, chain = trl_source()
    torch.manual_seed(0)
    policy, reference = (-100 * torch.rand(2, PAIRS) for _ in range(2))
    lengths = torch.randint(1, 50, (2, PAIRS))
    mask = (torch.arange(50) < lengths.flatten()[:, None]).long()
    rows, worst = [], 0.0
    for name in NAMES:
        for ours, theirs in DIVERGENCES.items():
            if ours != "reverse_kl" and name not in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust"):
                continue
            smoothing = SMOOTHED.get(name, 0.0)
            trainer = SimpleNamespace(
                beta=BETA,
                label_smoothing=smoothing,
                f_divergence_type=theirs,
                f_alpha_divergence_coef=0.5,
                args=SimpleNamespace(discopop_tau=0.05),
            )
            # Log-ratios of a few nats, where no loss saturates.
            scale = 0.02
            space: dict[str, Any] = {"torch": torch, "F": F, "math": math, "self": trainer, "loss_type": name, "device": "cpu"}
            space |= {"chosen_logps": scale * policy[0], "rejected_logps": scale * policy[1], "completion_mask": mask}
            space |= {"ref_chosen_logps": scale * reference[0], "ref_rejected_logps": scale * reference[1]}
            space |= {
                f"{side}_logratios": space[f"{side}_logps"] - space[f"ref_{side}_logps"] for side in ("chosen", "rejected")
            }
            code = f"{divergence}\ndelta_score = chosen_scores - rejected_scores\n{chain}"
            exec(textwrap.dedent(code), space)
            ratios = Ratios(
                space["chosen_logratios"],
                space["rejected_logratios"],
                lengths[0],
                lengths[1],
                space["chosen_logps"] - space["rejected_logps"],
            )
            objective = Objective(name, beta=BETA, label_smoothing=smoothing, divergence=ours)  # type: ignore[arg-type]
            expected, values = space["per_sequence_loss"], objective(ratios)
            difference = float(((values - expected).abs() / expected.abs().clamp(min=1)).max())
            worst = max(worst, difference)
            rows.append({"loss": name, "divergence": ours, "largest difference": f"{difference:.1e}"})
    common.heading(
        f"Losses against TRL {importlib.metadata.version('trl')}",
        f"The same {PAIRS:,} random pairs for both sides, beta {BETA}. Largest difference: relative to max(1, value).",
    )
    print(common.table(rows))
    print(common.table([common.claim("largest difference", f"≤ {TOLERANCE:.0e}", f"{worst:.1e}", worst <= TOLERANCE)]))
    if worst > TOLERANCE:
        sys.exit(f"largest difference {worst:.1e} is above {TOLERANCE}")


if __name__ == "__main__":
    main()
