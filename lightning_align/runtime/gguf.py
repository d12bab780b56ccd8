"""GGUF files: models in one file, mostly with quantized weights, as llama.cpp reads them."""

from importlib.util import find_spec
from pathlib import Path

ENDING = ".gguf"


def split_gguf(name: str, *, what: str) -> tuple[str, dict[str, str]]:
    """Split the path of a GGUF file into what transformers loads: a folder, and the name of the file as an argument.

    Args:
        name: The path of a file, or any other name, such as that of a folder or of a model on the hub.
        what: What is loaded, for messages.

    Returns:
        The folder and ``{"gguf_file": file}``. For another name, the name and no arguments.

    Raises:
        ValueError: If there is no such file, or the package that reads it is missing.
    """
    path = Path(name).expanduser()
    if not name.endswith(ENDING) or path.is_dir():
        return name, {}
    if not path.is_file():
        raise ValueError(f"{what} {name!r}: there is no such file (the working directory is {Path.cwd()}).")
    if find_spec("gguf") is None:
        raise ValueError(f"{what} {name!r}: GGUF files need the package gguf. Install it: pip install 'lightning-align[gguf]'")
    with open(path, "rb") as opened:
        start = opened.read(4)
    if start != b"GGUF":
        raise ValueError(f"{what} {name!r} is not a GGUF file: it must begin with GGUF, but begins with {start!r}.")
    return str(path.parent), {"gguf_file": path.name}
