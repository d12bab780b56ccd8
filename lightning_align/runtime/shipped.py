"""The folder of configurations that the package ships."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def shipped_file(path: str) -> str:
    """Return the path of a file that a shipped configuration names, also outside of a checkout.

    Args:
        path: A path such as ``configs/retro/python_bpe.json``. A file that exists there has precedence.
    """
    head, _, rest = path.partition("/")
    if head == CONFIGS.name and rest and not Path(path).exists() and (CONFIGS / rest).exists():
        return str(CONFIGS / rest)
    return path
