"""
Train a byte-level BPE tokenizer for SLED on the text of any language.

    python examples/train_tokenizer.py --dataset my_codes/ --output_dir my_tokenizer/
    python examples/train_tokenizer.py --text_files book1.txt book2.txt --output_dir my_tokenizer/
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
from tokenizers import ByteLevelBPETokenizer
from transformers import HfArgumentParser, RobertaTokenizer

from transformers_sled.data_sled import load_source


# The ids that the released models use: 0, 1, 2 and 3. <mask> has no embedding and comes after the last piece.
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
NUM_BYTES = 256


@dataclass
class TokenizerArguments:
    output_dir: str = field(metadata={"help": "Folder to write the tokenizer to."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "A dataset prepared by prepare_data.py, or any other with a column of text."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset that has several."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    text_files: list[str] = field(default_factory=list, metadata={"help": "Instead of a dataset: plain text, UTF-8."})
    vocab_size: int = field(default=16384, metadata={"help": "Pieces, with the special tokens but <mask>."})
    min_frequency: int = field(default=2, metadata={"help": "How often a pair must occur to become a piece."})


def read_texts(args: TokenizerArguments) -> Iterator[list[str]]:
    if args.text_files:
        dataset, column = datasets.load_dataset("text", data_files=args.text_files, split="train"), "text"
    else:
        dataset, column = load_source(args.dataset, args.dataset_config, args.dataset_split), args.text_column
        if column not in dataset.column_names:
            raise ValueError(f"--text_column must be one of {dataset.column_names}, got {column!r}")
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        yield [text for text in batch[column] if text]


def train_tokenizer(
    texts: Iterator[list[str]], output_dir: str, vocab_size: int, min_frequency: int
) -> RobertaTokenizer:
    smallest = len(SPECIAL_TOKENS) + NUM_BYTES
    if vocab_size < smallest:
        raise ValueError(f"--vocab_size must be at least {smallest} (special tokens and bytes), got {vocab_size}")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=SPECIAL_TOKENS)
    if bpe.get_vocab_size() == smallest < vocab_size:
        raise ValueError("No pair of characters occurs often enough in the text to learn from: is it empty?")
    os.makedirs(output_dir, exist_ok=True)
    bpe.save_model(output_dir)
    tokenizer = RobertaTokenizer.from_pretrained(output_dir, padding_side="left")
    tokenizer.save_pretrained(output_dir)
    return tokenizer


def main() -> None:
    (args,) = HfArgumentParser(TokenizerArguments).parse_args_into_dataclasses()
    if bool(args.text_files) == (args.dataset is not None):
        raise ValueError("Give either --dataset or --text_files")
    tokenizer = train_tokenizer(read_texts(args), args.output_dir, args.vocab_size, args.min_frequency)
    print(f"{tokenizer.vocab_size} pieces (of {args.vocab_size} asked for), saved to {args.output_dir}")


if __name__ == "__main__":
    main()
