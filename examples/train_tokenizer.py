"""
Train a byte-level BPE tokenizer for SLED on the text of any language.

    python examples/train_tokenizer.py --dataset my_codes/ --output_dir my_tokenizer/
    python examples/train_tokenizer.py --text_files book1.txt book2.txt --output_dir my_tokenizer/
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from transformers_sled.training import TokenizerArguments, load_source, run_command, train_tokenizer


@dataclass
class TextArguments:
    dataset: str | None = field(
        default=None, metadata={"help": "A dataset from prepare_data.py, or any other with a column of text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset that has several."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    text_files: list[str] = field(default_factory=list, metadata={"help": "Instead of a dataset: plain text, UTF-8."})


def main() -> None:
    source, arguments = HfArgumentParser((TextArguments, TokenizerArguments)).parse_args_into_dataclasses()
    if bool(source.text_files) == (source.dataset is not None):
        raise ValueError("Give either --dataset or --text_files")
    if source.text_files:
        dataset, column = load_dataset("text", data_files=source.text_files, split="train"), "text"
    else:
        dataset, column = load_source(source.dataset, source.dataset_config, source.dataset_split), source.text_column
        if column not in dataset.column_names:
            raise ValueError(f"--text_column must be one of {dataset.column_names}, got {column!r}")
    batches = dataset.select_columns([column]).iter(batch_size=1000)
    tokenizer = train_tokenizer(([text for text in batch[column] if text] for batch in batches), arguments)
    print(f"{tokenizer.vocab_size} pieces (of {arguments.vocab_size} asked for), saved to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
