"""Whether the rows of a batch share the computation of their common beginnings."""

from typing import Literal

from torch import nn

from lightning_align.models.shared_rows import WORTH, plan_prefixes, prefix_fault
from lightning_align.types import TokenBatch

SharedPrefix = bool | Literal["auto"]


class PrefixSharing:
    """Plans the common beginnings of the rows of each batch, if they are to be computed once."""

    def __init__(self, setting: SharedPrefix, *, dropout: bool) -> None:
        """Choose whether beginnings are shared.

        Args:
            setting: `auto`, true or false; see `DPOModule`.
            dropout: Whether training has dropout. With `auto`, both rows of a pair then draw their own.

        Raises:
            ValueError: If the setting is none of these.
        """
        if not isinstance(setting, bool) and setting != "auto":
            raise ValueError(f"`shared_prefix` must be 'auto', true or false, but got {setting!r}.")
        self.required = setting is True
        self._on = setting is True or (setting == "auto" and not dropout)

    def attach(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch with the plan of its common beginnings, if it is on the CPU and has none yet.

        Args:
            batch: (B, N) tokens.
        """
        if not self._on or batch["tokens"].device.type != "cpu" or batch.get("prefixes") is not None:
            return batch
        return {**batch, "prefixes": plan_prefixes(batch, worth=0.0 if self.required else WORTH)}

    def check(self, model: nn.Module) -> None:
        """Check that a model shares beginnings, if it must.

        Args:
            model: The policy. All ranks must call this.

        Raises:
            ValueError: If the setting is true, and the model does not compute the numbers of separate rows.
        """
        if self.required and (fault := prefix_fault(model)) is not None:
            raise ValueError(
                f"`shared_prefix` is true, but {type(getattr(model, 'model', model)).__name__} must compute each row apart, "
                f"because {fault}. Set `shared_prefix: auto`, which gives the same losses."
            )
