"""Tokenizers: UTF-8 bytes, a ``tokenizer.json`` file, or a transformers tokenizer with its chat template.

No tokenizer here adds special tokens to a text. `lightning_align.data.encode` adds the beginning-of-sequence and
end-of-sequence ids, once and in one place.
"""

from lightning_align.data.tokenizer.byte import ByteTokenizer
from lightning_align.data.tokenizer.chat import check_messages, render_plain
from lightning_align.data.tokenizer.file import FileTokenizer
from lightning_align.data.tokenizer.loading import check_vocabulary, load_tokenizer
from lightning_align.data.tokenizer.protocol import Encoding, Message, Segment, Tokenizer, all_ends
from lightning_align.data.tokenizer.training import train_tokenizer
from lightning_align.data.tokenizer.transformers import TransformersTokenizer

__all__ = [
    "ByteTokenizer",
    "Encoding",
    "FileTokenizer",
    "Message",
    "Segment",
    "Tokenizer",
    "TransformersTokenizer",
    "all_ends",
    "check_messages",
    "check_vocabulary",
    "load_tokenizer",
    "render_plain",
    "train_tokenizer",
]
