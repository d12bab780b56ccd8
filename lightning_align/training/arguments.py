"""The constructor arguments that modules forward to `AlignModule`, for type checkers and editors."""

from typing import TYPE_CHECKING, Any, TypedDict

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.activations import Checkpointing
from lightning_align.models.lora import LoRAConfig

if TYPE_CHECKING:
    from typing import Unpack
else:

    class Unpack:
        """Reads as ``Any`` at run time.

        For an unpacked TypedDict, jsonargparse knows neither defaults nor help. For other keyword arguments it follows
        ``super().__init__`` and takes both from `AlignModule`.
        """

        def __class_getitem__(cls, item: object) -> object:
            return Any


class PolicyArguments(TypedDict, total=False):
    """The arguments of every module that trains one language model. They are documented in `AlignModule`."""

    init_from: str | None
    lora: LoRAConfig | None
    optimizer: OptimizerCallable | None
    lr_scheduler: LRSchedulerCallable | None
    generation: GenerationConfig | None
    dropout: bool | None
    router_aux_loss_coef: float | None
    activation_checkpointing: Checkpointing


__all__ = ["PolicyArguments", "Unpack"]
