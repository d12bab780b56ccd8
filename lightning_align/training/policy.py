"""What a policy is built from: a backbone, a checkpoint, and LoRA adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_align.models.building import Backbone, backbone_spec, build_backbone, has_own_weights
from lightning_align.models.causality import check_causal
from lightning_align.models.checkpoint import load_policy, read_checkpoint
from lightning_align.models.lora import LoRAConfig, add_lora, train_only
from lightning_align.models.lora_calls import check_layers_called
from lightning_align.runtime.plain import plain


class PolicySource:
    """Builds a policy. It holds no part of it: the policy itself belongs to the module."""

    def __init__(self, owner: str, backbone: Backbone | None, *, init_from: str | None, lora: LoRAConfig | None) -> None:
        """Keep what the policy is built from.

        Args:
            owner: The class name of the module, for messages.
            backbone: The language model: a module, a factory, or ``{class_path, init_args}``.
            init_from: A checkpoint to take the weights from.
            lora: The adapters to train, or None to train all weights.

        Raises:
            ValueError: If there is neither a backbone nor a checkpoint.
        """
        if backbone is None and init_from is None:
            raise ValueError(
                f"{owner} needs `backbone` (what to build), `init_from` (a checkpoint), or both. On the command line: --config "
                "model/palm_tiny, or --model.init_from PATH."
            )
        self.owner, self.backbone, self.init_from, self.lora = owner, plain(backbone), init_from, lora
        self.awaits_weights = False
        """Whether the weights of ``init_from`` are still missing and must come from a checkpoint of the run itself."""

    def build(self) -> nn.Module:
        """Build the policy with the weights of ``init_from``, without adapters.

        Raises:
            ValueError: If the policy is not causal.
        """
        policy = self._build()
        check_causal(policy)
        return policy

    def _build(self) -> nn.Module:
        if self.init_from is None:
            assert self.backbone is not None
            return build_backbone(self.backbone)
        if self.backbone is not None and self.lora is None and not Path(self.init_from).exists():
            # A checkpoint of this run holds all weights, and may outlive the file that the run began from. Whether Lightning is
            # about to load one is not known yet: `check_weights` raises later if it did not.
            self.awaits_weights = True
            return build_backbone(self.backbone)
        return load_policy(self.init_from, self.backbone).train()  # an exported folder is read in evaluation mode

    def add_adapters(self, policy: nn.Module) -> None:
        """Add the adapters of ``lora``, if any, and freeze all other weights.

        Args:
            policy: What `build` returned; changed in place.

        Raises:
            ValueError: If the frozen weights would be random, so that no checkpoint could restore them.
        """
        if self.lora is None:
            return
        given = self.init_from is not None or isinstance(self.backbone, nn.Module)
        if not given and not has_own_weights(policy):
            raise ValueError(
                f"{self.owner}: `lora` trains adapters on a frozen base model, which is not saved in checkpoints. Give the "
                "base model's weights as `init_from`, or use a backbone that loads its own weights."
            )
        if self.init_from is None and (new := getattr(policy, "num_new_tokens", 0)):
            raise ValueError(
                f"{self.owner}: `lora` freezes the embeddings, so the {new} tokens of `resize_embeddings` would not train. "
                f"Use `adapter: {{r: {self.lora.rank}, lora_alpha: {self.lora.alpha:g}}}` of the backbone instead of `lora`: "
                "it trains them too. Or train all weights first, and give that checkpoint as `init_from`."
            )
        add_lora(policy, self.lora)
        check_layers_called(policy, self.lora.scope)
        train_only(policy, self.lora.scope)

    def check_weights(self) -> None:
        """Raise if the weights were to come from ``init_from`` and no checkpoint has brought them.

        Raises:
            ValueError: Naming the missing file.
        """
        if self.awaits_weights:
            assert self.init_from is not None
            read_checkpoint(self.init_from)

    def described(self) -> dict[str, Any] | None:
        """Return ``{class_path, init_args}`` of the backbone, which a checkpoint can hold, or None for other objects."""
        described = backbone_spec(self.backbone) if isinstance(self.backbone, nn.Module) else self.backbone
        return dict(described) if isinstance(described, Mapping) else None
