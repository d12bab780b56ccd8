"""What a composition keeps and writes: its description, the hashes of its frozen models, its connections, and its folder."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_align.calm.alignment import Alignment
from lightning_align.calm.connection_file import read_connections, write_connections
from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.folder import check_exportable, read_composition, write_composition
from lightning_align.calm.identity import Fingerprints, check_frozen, exact_hashes, fingerprints, frozen_models
from lightning_align.calm.parts import (
    build_augments,
    build_part,
    described_composition,
    proof_inputs,
    readable_tokens,
    source_names,
)
from lightning_align.calm.settings import settings_record
from lightning_align.calm.spec import Augment, Spot
from lightning_align.models.composed import FROZEN, ROUNDED, FrozenParts
from lightning_align.models.proof import Expected


class StoredModel(nn.Module):
    """The part of `CALM` that other rooms use through `lightning_align.models.composed`, and that files are written from."""

    frozen_parts = ("anchor", "augments")
    """The submodules whose weights files refer to by their hashes."""
    anchor: nn.Module
    augments: nn.ModuleList
    connections: nn.ModuleList
    readers: list[Any]
    given: Any
    alignment: Alignment | None
    _spots: list[Spot]

    def build_parts(
        self, anchor: Any, augments: Any, arguments: Mapping[str, Any]
    ) -> tuple[nn.Module, list[Augment], ConnectionConfig]:
        """Build the models that are given by descriptions, and keep the arguments.

        Args:
            anchor: A module, or what builds it.
            augments: The augments, with modules or with what builds them.
            arguments: All arguments of the constructor.

        Returns:
            The anchor, the augments with their modules, and the architecture of the connections.
        """
        left_out = ("self", "__class__", "anchor", "augments", "check")
        self.arguments: dict[str, Any] = {name: value for name, value in arguments.items() if name not in left_out}
        built = build_part(anchor)
        self.specs = build_augments(augments)
        connection = arguments["connection"]
        config = ConnectionConfig(**connection) if isinstance(connection, Mapping) else connection or ConnectionConfig()
        return built, self.specs, config

    def record_settings(self, config: ConnectionConfig) -> None:
        """Record the settings of the connections, and the description from which the composition can be rebuilt."""
        first: Any = self.connections[0]
        self.settings = settings_record(
            self.specs,
            self._spots,
            config,
            dim_head=first.dim_head,
            combine=self.arguments["combine"],
            anchor_position=self.arguments["anchor_position"],
        )
        """What the connections depend on besides their weights; see `lightning_align.calm.settings`."""
        described = described_composition(self.anchor, self.specs, self._spots, self.arguments)
        if described is not None:
            self.init_args: dict[str, Any] = described
        self._identity: dict[str, str] | None = None
        self._fingerprints: Fingerprints | None = None

    # -- the frozen models

    @property
    def identity(self) -> dict[str, str]:
        """The SHA-256 of the weights of each frozen model. It is computed once, and must be before the models are sharded."""
        if self._identity is None:
            self._identity = exact_hashes(frozen_models(self.anchor, self.augments))
        return self._identity

    @property
    def fingerprints(self) -> Fingerprints:
        """The hashes of the frozen models that do not depend on their dtype. They are computed once, as `identity` is."""
        if self._fingerprints is None:
            self._fingerprints = fingerprints(frozen_models(self.anchor, self.augments))
        return self._fingerprints

    def frozen_record(self) -> dict[str, Any]:
        """Return both kinds of hashes as a checkpoint holds them."""
        return {FROZEN: dict(self.identity), ROUNDED: self.fingerprints}

    def check_frozen_record(self, record: Mapping[str, Any], path: str | Path) -> None:
        """Compare the frozen models with the hashes in a checkpoint.

        Args:
            record: The checkpoint.
            path: The path of the checkpoint, for the message.

        Raises:
            ValueError: If a model has other weights. The message names it.
        """
        check_frozen(
            self.identity,
            record.get(FROZEN, {}),
            path,
            rounded_here=lambda: self.fingerprints,
            rounded_there=record.get(ROUNDED),
            sources=source_names(frozen_models(self.anchor, self.augments)),
        )

    @property
    def readable_tokens(self) -> int:
        """The number of token ids that the anchor and all augments that read its tokens have."""
        return readable_tokens(self.anchor, self.specs)

    def proving(self) -> AbstractContextManager[None]:
        """Give every augment an input that the anchor's tokens determine, inside a ``with`` block."""
        connected: list[tuple[Spot, Any]] = list(zip(self._spots, self.connections, strict=True))
        widths = [
            [next(link.dim_augment for spot, link in connected if spot[:2] == (index, depth)) for depth in reader.depths]
            for index, reader in enumerate(self.readers)
        ]
        context: AbstractContextManager[None] = self.given(lambda tokens: proof_inputs(self.readers, tokens, widths))
        return context

    # -- the connections

    @property
    def trained_part(self) -> nn.Module:
        """The connections."""
        return self.connections

    def twin(self) -> Self:
        """Return a copy with its own connections that shares the frozen models. Call it before the models are sharded."""
        specs = [spec.with_changes(model=model) for spec, model in zip(self.specs, self.augments, strict=True)]
        with isolate_rng():
            make: Any = type(self)
            other: Self = make(self.anchor, specs, check=False, **self.arguments)
        other.connections.load_state_dict(self.connections.state_dict())
        other._identity, other._fingerprints = self._identity, self._fingerprints
        other.alignment = self.alignment
        return other.train(self.training)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the connections, without those of the frozen models."""
        return {f"connections.{name}": value for name, value in self.connections.state_dict().items()}

    def save_connections(self, path: str | Path) -> None:
        """Write the connections to a safetensors file, with their settings and the hashes of the models that they connect.

        Args:
            path: The path of the file. It is written completely or not at all.

        Raises:
            ValueError: If a weight is not finite, or what is read back is not what was written.
        """
        write_connections(path, self.trainable_state_dict(), self._spots, self.identity, self.settings, self.fingerprints)

    def load_connections(self, path: str | Path) -> None:
        """Load a file that `save_connections` wrote.

        Args:
            path: The path of the file.

        Raises:
            ValueError: If the file cannot be read, connects other layers, or was trained with other settings or other models.
        """
        read_connections(
            path,
            self.connections,
            self._spots,
            self.identity,
            self.settings,
            lambda: self.fingerprints,
            source_names(frozen_models(self.anchor, self.augments)),
        )

    # -- the folder

    def check_exportable(self, frozen: FrozenParts = "whole") -> None:
        """See `lightning_align.calm.folder.check_exportable`."""
        check_exportable(self, frozen)

    def write_folder(
        self, weights: Mapping[str, Tensor], folder: str | Path, *, frozen: FrozenParts, expected: Expected, **options: Any
    ) -> None:
        """See `lightning_align.calm.folder.write_composition`."""
        write_composition(self, weights, folder, frozen=frozen, expected=expected, **options)

    @classmethod
    def read_folder(cls, folder: str | Path) -> Self:
        """See `lightning_align.calm.folder.read_composition`."""
        model: Self = read_composition(cls, folder)
        return model
