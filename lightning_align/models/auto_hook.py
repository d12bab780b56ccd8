"""Teaching transformers the folders of this package, without importing transformers.

A folder that `write_model` wrote for a `PaLM` names a model type of this package. The auto classes of transformers know it when
both packages are imported, in either order. So importing this package adds a finder: when the auto classes are imported, it
registers the classes of `lightning_align.models.auto`.
"""

from functools import partial
from importlib import import_module

from lightning_align.runtime.after_import import AfterImport

REGISTERS = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_model",
}
"""The modules with the auto classes, and the function that registers ours with each."""


def register(name: str) -> None:
    """Register the classes of this package with one of the modules of `REGISTERS`, which is imported."""
    getattr(import_module("lightning_align.models.auto"), REGISTERS[name])()


class TransformersHook(AfterImport):
    """A finder that registers the classes of this package as soon as transformers imports its auto classes."""

    def __init__(self) -> None:
        """Register at once where transformers is imported already."""
        super().__init__({name: partial(register, name) for name in REGISTERS})
