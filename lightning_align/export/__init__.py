"""Export: folders that transformers and vLLM read, and the model card in them."""

from lightning_align.export.callback import ExportModel
from lightning_align.export.card import model_card
from lightning_align.export.checkpoint import export_checkpoint

__all__ = ["ExportModel", "export_checkpoint", "model_card"]
