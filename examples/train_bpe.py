"""Train a byte-level BPE tokenizer on a folder of text, or on the sources of Python's standard library.

python examples/train_bpe.py configs/retro/python_bpe.json --size 2048
python examples/train_bpe.py texts.json --size 8192 --folder texts --glob '**/*.md'

Of the files only those that FolderDocuments(part="train") takes are read, so that what is held out stays so.
"""

import argparse

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_align.data.documents import FolderDocuments, StandardLibrary


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--size", type=int, default=2048, help="of the vocabulary")
    parser.add_argument("--folder", help="by default the standard library's")
    parser.add_argument("--glob", default="**/*.txt")
    parser.add_argument("--held-out", type=float, default=0.08, help="share of the files that is not read")
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
