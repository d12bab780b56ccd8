"""Components that align and augment language models with PyTorch Lightning.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_align.models.auto_hook import TransformersHook
from lightning_align.runtime.namespaces import NamespacesHook
from lightning_align.runtime.old_paths import OldPaths

if TYPE_CHECKING:
    from lightning_align.calm.connections import ConnectionConfig
    from lightning_align.calm.datamodule import CALMDataModule
    from lightning_align.calm.folder import load_composition, save_composition
    from lightning_align.calm.model import CALM
    from lightning_align.calm.module import CALMModule
    from lightning_align.calm.spec import Augment, AugmentInput
    from lightning_align.data.documents import FileDocuments, FolderDocuments, RowDocuments, StandardLibrary
    from lightning_align.data.rows import RowTask
    from lightning_align.data.tasks.arithmetic import Arithmetic
    from lightning_align.data.tasks.facts import Facts
    from lightning_align.data.tasks.key_value import KeyValue
    from lightning_align.data.tasks.markov import MarkovChain
    from lightning_align.dpo.datamodule import DPODataModule
    from lightning_align.dpo.module import DPOModule
    from lightning_align.dpo.monitor import PreferenceMonitor
    from lightning_align.export.callback import ExportModel
    from lightning_align.generation.ends import Ends
    from lightning_align.generation.sampler import GenerationConfig, generate
    from lightning_align.models.lora import (
        LoRAConfig,
        add_lora,
        lora_disabled,
        merge_lora,
        remove_lora,
        unmerge_lora,
        use_lora,
        using_lora,
    )
    from lightning_align.models.palm import PaLM
    from lightning_align.models.palm_import import load_palm_rlhf
    from lightning_align.models.pretrained import PretrainedLM
    from lightning_align.references.update import ReferenceUpdate
    from lightning_align.retrieval.database import RetrievalDatabase
    from lightning_align.retrieval.given import GivenNeighbors
    from lightning_align.retrieval.lance import LanceRetriever
    from lightning_align.retrieval.qdrant import QdrantRetriever
    from lightning_align.retro.callbacks import RetrievalIndexing
    from lightning_align.retro.datamodule import RETRODataModule
    from lightning_align.retro.decoding import RetrievalDecoder
    from lightning_align.retro.indexing import add_documents, build_database, compact_database, delete_documents, open_retriever
    from lightning_align.retro.model import RETRO
    from lightning_align.retro.module import RETROModule
    from lightning_align.retro.panel import NeighborPanel
    from lightning_align.scoring.sums import response_logprobs
    from lightning_align.sft.datamodule import SFTDataModule
    from lightning_align.sft.module import SFTModule
    from lightning_align.spin.batches import collate_ids
    from lightning_align.spin.callbacks import SelfPlayGeneration
    from lightning_align.spin.datamodule import SPINDataModule
    from lightning_align.spin.loss import self_play_loss, spin_loss
    from lightning_align.spin.module import SPINModule
    from lightning_align.training.auto_precision import AutoPrecision
    from lightning_align.training.callbacks import SampleLogger, SolveRate
    from lightning_align.training.schedules import WarmupDecay

__version__ = "0.1.0"

if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
    sys.meta_path.append(OldPaths())
if not any(isinstance(finder, TransformersHook) for finder in sys.meta_path):
    sys.meta_path.insert(0, TransformersHook())
if not any(isinstance(finder, NamespacesHook) for finder in sys.meta_path):
    sys.meta_path.insert(0, NamespacesHook())

_HOME = {
    "Arithmetic": "data.tasks.arithmetic",
    "Augment": "calm.spec",
    "AugmentInput": "calm.spec",
    "AutoPrecision": "training.auto_precision",
    "CALM": "calm.model",
    "CALMDataModule": "calm.datamodule",
    "CALMModule": "calm.module",
    "ConnectionConfig": "calm.connections",
    "DPODataModule": "dpo.datamodule",
    "DPOModule": "dpo.module",
    "Ends": "generation.ends",
    "ExportModel": "export.callback",
    "Facts": "data.tasks.facts",
    "FileDocuments": "data.documents",
    "FolderDocuments": "data.documents",
    "GenerationConfig": "generation.sampler",
    "GivenNeighbors": "retrieval.given",
    "KeyValue": "data.tasks.key_value",
    "LanceRetriever": "retrieval.lance",
    "LoRAConfig": "models.lora",
    "MarkovChain": "data.tasks.markov",
    "NeighborPanel": "retro.panel",
    "PaLM": "models.palm",
    "PretrainedLM": "models.pretrained",
    "PreferenceMonitor": "dpo.monitor",
    "QdrantRetriever": "retrieval.qdrant",
    "ReferenceUpdate": "references.update",
    "RETRO": "retro.model",
    "RETRODataModule": "retro.datamodule",
    "RETROModule": "retro.module",
    "RetrievalDatabase": "retrieval.database",
    "RetrievalDecoder": "retro.decoding",
    "RetrievalIndexing": "retro.callbacks",
    "RowDocuments": "data.documents",
    "RowTask": "data.rows",
    "SFTDataModule": "sft.datamodule",
    "SFTModule": "sft.module",
    "SPINDataModule": "spin.datamodule",
    "SPINModule": "spin.module",
    "SampleLogger": "training.callbacks",
    "SelfPlayGeneration": "spin.callbacks",
    "SolveRate": "training.callbacks",
    "StandardLibrary": "data.documents",
    "WarmupDecay": "training.schedules",
    "add_documents": "retro.indexing",
    "add_lora": "models.lora",
    "build_database": "retro.indexing",
    "collate_ids": "spin.batches",
    "compact_database": "retro.indexing",
    "delete_documents": "retro.indexing",
    "generate": "generation.sampler",
    "load_composition": "calm.folder",
    "load_palm_rlhf": "models.palm_import",
    "lora_disabled": "models.lora",
    "merge_lora": "models.lora",
    "open_retriever": "retro.indexing",
    "remove_lora": "models.lora",
    "response_logprobs": "scoring.sums",
    "save_composition": "calm.folder",
    "self_play_loss": "spin.loss",
    "spin_loss": "spin.loss",
    "unmerge_lora": "models.lora",
    "use_lora": "models.lora",
    "using_lora": "models.lora",
}

__all__ = [
    "CALM",
    "RETRO",
    "Arithmetic",
    "Augment",
    "AugmentInput",
    "AutoPrecision",
    "CALMDataModule",
    "CALMModule",
    "ConnectionConfig",
    "DPODataModule",
    "DPOModule",
    "Ends",
    "ExportModel",
    "Facts",
    "FileDocuments",
    "FolderDocuments",
    "GenerationConfig",
    "GivenNeighbors",
    "KeyValue",
    "LanceRetriever",
    "LoRAConfig",
    "MarkovChain",
    "NeighborPanel",
    "PaLM",
    "PreferenceMonitor",
    "PretrainedLM",
    "QdrantRetriever",
    "RETRODataModule",
    "RETROModule",
    "ReferenceUpdate",
    "RetrievalDatabase",
    "RetrievalDecoder",
    "RetrievalIndexing",
    "RowDocuments",
    "RowTask",
    "SFTDataModule",
    "SFTModule",
    "SPINDataModule",
    "SPINModule",
    "SampleLogger",
    "SelfPlayGeneration",
    "SolveRate",
    "StandardLibrary",
    "WarmupDecay",
    "__version__",
    "add_documents",
    "add_lora",
    "build_database",
    "collate_ids",
    "compact_database",
    "delete_documents",
    "generate",
    "load_composition",
    "load_palm_rlhf",
    "lora_disabled",
    "merge_lora",
    "open_retriever",
    "remove_lora",
    "response_logprobs",
    "save_composition",
    "self_play_loss",
    "spin_loss",
    "unmerge_lora",
    "use_lora",
    "using_lora",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
