"""Training of a byte-level BPE tokenizer, laid out as the released one, on the text of any language."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaTokenizer


# The ids that the released models use: 0, 1, 2 and 3. <mask> has no embedding and comes after the last piece.
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
NUM_BYTES = 256


@dataclass
class TokenizerArguments:
    """How to train a tokenizer."""

    output_dir: str = field(metadata={"help": "Folder to write the tokenizer to."})
    vocab_size: int = field(default=16384, metadata={"help": "Pieces, with the special tokens but <mask>."})
    min_frequency: int = field(default=2, metadata={"help": "How often a pair must occur to become a piece."})


def train_tokenizer(texts: Iterable[list[str]], arguments: TokenizerArguments) -> RobertaTokenizer:
    """
    Trains a tokenizer and saves it.

    Args:
        texts (iterable of `list[str]`):
            The text, in batches.
        arguments ([`TokenizerArguments`]):
            How large it should be, and where to save it.

    Returns:
        [`RobertaTokenizer`]: the tokenizer, which pads on the left.

    Raises:
        `ValueError`: If `vocab_size` does not hold special tokens and bytes, or there is too little text.

    Example:

    ```python
    >>> from transformers_sled.training import TokenizerArguments, load_source, train_tokenizer

    >>> texts = (batch["text"] for batch in load_source("my_codes/").iter(batch_size=1000))  # doctest: +SKIP
    >>> tokenizer = train_tokenizer(texts, TokenizerArguments("my_tokenizer/"))  # doctest: +SKIP
    ```
    """
    smallest = len(SPECIAL_TOKENS) + NUM_BYTES
    if arguments.vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` must be at least {smallest} (special tokens and bytes), got {arguments.vocab_size}"
        )
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts,
        vocab_size=arguments.vocab_size,
        min_frequency=arguments.min_frequency,
        special_tokens=SPECIAL_TOKENS,
    )
    if bpe.get_vocab_size() == smallest < arguments.vocab_size:
        raise ValueError("No pair of characters occurs often enough in the text to learn from: is it empty?")
    os.makedirs(arguments.output_dir, exist_ok=True)
    bpe.save_model(arguments.output_dir)
    tokenizer = RobertaTokenizer.from_pretrained(arguments.output_dir, padding_side="left")
    tokenizer.save_pretrained(arguments.output_dir)
    return tokenizer
