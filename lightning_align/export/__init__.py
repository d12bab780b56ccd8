"""Export: folders that transformers and vLLM read, and the model card in them."""

from lightning_align.export.callback import ExportModel
from lightning_align.export.card import SHOWN, model_card
from lightning_align.export.checkpoint import export_checkpoint

__all__ = ["SHOWN", "ExportModel", "export_checkpoint", "model_card"]
