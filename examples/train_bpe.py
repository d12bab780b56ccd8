"""Train a byte-level BPE tokenizer on a folder of text, or on the source files of Python's standard library.

python examples/train_bpe.py configs/retro/python_bpe.json --size 2048
python examples/train_bpe.py texts.json --size 8192 --folder texts --glob '**/*.md'

Only the files of FolderDocuments(part="train") are used. The tokenizer never sees the held-out files.
"""

import argparse

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_align.data.documents import FolderDocuments, StandardLibrary


def main() -> None:
    """Train the tokenizer and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--size", type=int, default=2048, help="the size of the vocabulary")
    parser.add_argument("--folder", help="the folder of text; default is the standard library")
    parser.add_argument("--glob", default="**/*.txt")
    parser.add_argument("--held-out", type=float, default=0.08, help="the share of files to hold out")
    arguments = parser.parse_args()
    if arguments.folder is None:
        source: FolderDocuments = StandardLibrary(part="train", held_out=arguments.held_out)
    else:
        source = FolderDocuments(arguments.folder, glob=arguments.glob, part="train", held_out=arguments.held_out)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in source.documents())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(arguments.output, pretty=False)


if __name__ == "__main__":
    main()
