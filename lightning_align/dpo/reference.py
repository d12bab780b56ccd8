"""The reference of a DPO run: how it is made from the initial policy, scored in advance, and checked on resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_align.models.weights import weights_hash
from lightning_align.references.frozen import AdaptersOff, FrozenCopy, frozen_copy
from lightning_align.references.moving import moving_reference
from lightning_align.references.protocol import MovingReference, Reference
from lightning_align.references.stored import Source, StoredLogProbs
from lightning_align.runtime.lightning_internals import trainer_of
from lightning_align.runtime.team import Team
from lightning_align.training.module import AlignModule
from lightning_align.training.passes import passes_of
from lightning_align.types import TokenBatch

ReferenceKind = Literal["frozen", "stored", "moving"]


class InitialPolicy:
    """The reference of a module whose policy starts as its reference."""

    def __init__(self, kind: ReferenceKind, *, cache_dir: str) -> None:
        """Choose the kind.

        Args:
            kind: ``frozen``, ``stored`` or ``moving``.
            cache_dir: The folder of stored log-probs.
        """
        self.kind, self.cache_dir = kind, cache_dir
        self.reference: Reference | None = None
        """None before `configure`, and where the initial weights are missing."""
        self.weights: str | None = None
        """The hash of the weights of a frozen copy; None for adapters off and for a moving reference."""

    def configure(self, module: AlignModule, policy: nn.Module) -> None:
        """Make the reference, before the policy is sharded and before a checkpoint is loaded into it.

        A frozen reference is the policy with its adapters off if only adapters train, otherwise a copy. It is a copy of the
        base model if PEFT adapters move its weights when they are created, as PiSSA does, or train its biases.

        Args:
            module: The module of the policy.
            policy: The policy with its initial weights.

        Raises:
            ValueError: If the policy has new adapters that change what it computes.
        """
        start = getattr(policy, "start", None) if module.init_from is None else None
        if start is not None and not start.on_is_base:
            raise ValueError(
                "The policy must start as its reference, but the new adapters change what the base model computes before the "
                "first step. Give them a start that does not, such as `init_lora_weights: true` (`init_weights: true` for some "
                "kinds), or train them by SFT first and pass their folder as `adapter`."
            )
        if self.kind == "moving":
            self.reference = moving_reference(
                policy,
                lora=module.lora,
                share=not module.is_sharded,
                convert=module.convert_like_policy,
                shard=module.shard_like_policy,
            )
            return
        if module.lora is not None:
            self.reference = AdaptersOff()
        elif module.init_from is None and (disabled := getattr(policy, "adapters_off", None)) is not None:
            self.reference = AdaptersOff(disabled)  # new adapters of another library
        elif module.source.awaits_weights:
            return
        else:
            base = policy.without_adapters() if start is not None else None  # type: ignore[operator]  # a `PretrainedLM`
            frozen = frozen_copy(policy, share=not module.is_sharded) if base is None else FrozenCopy(base)
            if start is not None:
                rank_zero_info(
                    "The base weights move or train beside the adapters. The reference is a copy of the base model, which "
                    "takes its memory."
                )
            self.reference, self.weights = frozen, module.hash_once(frozen.model)
            frozen.model = module.shard_like_policy(module.convert_like_policy(frozen.model))
        if self.kind == "stored":
            self.reference = self._stored(module, policy, self.reference)

    def _stored(self, module: AlignModule, policy: nn.Module, source: Reference) -> StoredLogProbs:
        trainer = trainer_of(module)
        return StoredLogProbs(
            source.logprobs,
            again=lambda: self._source_again(module, source),
            weights=self.weights or module.hash_once(policy),
            precision=str(trainer.precision if trainer is not None else next(policy.parameters()).dtype),
            cache_dir=self.cache_dir,
        )

    def _source_again(self, module: AlignModule, source: Reference) -> Source | None:
        """Make the source of stored log-probs again, for rows that come after it was freed; None if that is not possible."""
        if module.is_sharded:
            return None  # the ranks would have to find out at the same time
        if self.weights is None:
            return source.logprobs  # the policy with its adapters off
        trainer, backbone = trainer_of(module), module.source.backbone
        missing = module.init_from is not None and not Path(module.init_from).exists()
        if isinstance(backbone, nn.Module) or missing or trainer is None:
            return None
        context = trainer.precision_plugin.module_init_context()
        with isolate_rng(), trainer.strategy.tensor_init_context(), context:
            frozen = FrozenCopy(module.build_policy())
        if weights_hash(frozen.model) != self.weights:
            return None  # initialized at random, or the file has changed
        frozen.model = module.convert_like_policy(frozen.model)
        return frozen.logprobs

    def restore(self, policy: nn.Module) -> None:
        """Score with the average that a checkpoint may have brought, if the reference moves."""
        if isinstance(self.reference, MovingReference):
            self.reference.restore(policy)

    def begin_stage(self, stage: str) -> None:
        """Tell a stored reference which command asks for rows, for its messages."""
        if isinstance(self.reference, StoredLogProbs):
            self.reference.stage = getattr(stage, "value", stage)  # Lightning passes a member of an enum

    def end_stage(self) -> None:
        """Free what a stored reference needed for one command only."""
        if isinstance(self.reference, StoredLogProbs):
            self.reference.rest()

    def fill(self, module: Any) -> None:
        """Score the rows of the run under a stored reference, and free the model.

        The limits of the Trainer hold. If they leave rows to later epochs, or a loader has no length, the model stays, and
        scores the other rows when they come.

        Args:
            module: Attached to a Trainer, with a method ``join`` from a batch of pairs to a batch of rows.
        """
        stored = self.reference
        assert isinstance(stored, StoredLogProbs)
        with isolate_rng(), module.trainer.precision_plugin.forward_context():
            # New loaders: a data module's loaders split the rows over the ranks, and each row is in one of the parts.
            passes = passes_of(module.trainer)
            batches = (module.join(batch) for each in passes for batch in each.batches())
            team = Team()
            try:
                with team.together():
                    stored.fill(batches, module.policy, module.device, in_step=module.is_sharded)
                stored.exchange(team)
            finally:
                team.close()
        stored.finish(is_complete=all(each.is_complete for each in passes))

    def attach(self, batch: Any, join: Callable[[Any], TokenBatch]) -> Any:
        """Return a batch of pairs with the log-probs of a stored reference, if all of its rows are stored.

        Args:
            batch: A batch of any kind, on the CPU.
            join: Makes a batch of rows of a batch of pairs.
        """
        pairs = isinstance(batch, dict) and {"chosen", "rejected"} <= batch.keys() and "reference" not in batch
        if not pairs or not isinstance(self.reference, StoredLogProbs) or self.reference.is_joint:
            return batch
        found = self.reference.find(join(batch))
        return batch if found is None else {**batch, "reference": found}

    def check_resumed(self, module: AlignModule, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint was trained against this reference.

        Raises:
            ValueError: If the kind of reference differs, or training would go on with other reference weights.
        """
        kind = checkpoint.get("hyper_parameters", {}).get("reference", "frozen")
        if (kind == "moving") != (self.kind == "moving"):
            raise ValueError(
                f"The module has reference: {self.kind}, but the checkpoint is of a run with reference: {kind}. Resume with "
                "the same kind, or start a new run with the checkpoint as `init_from`."
            )
        then = checkpoint.get("reference_sha256")
        if then == self.weights:
            return
        trainer = trainer_of(module)
        if trainer is None or not trainer.training:
            # The policy alone may be all that is wanted. Scoring pairs raises.
            self.reference = self.weights = None
            return
        raise ValueError(
            f"The checkpoint was trained against a reference with weights {str(then)[:12]}, but the reference made from "
            f"{module.init_from or 'the backbone'} has {str(self.weights)[:12]}. Give the `init_from` (or the module) that the "
            "run started from."
        )
