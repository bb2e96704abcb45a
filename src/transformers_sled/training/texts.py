"""
Texts of the kinds that a corpus of single statements lacks, for a teacher to speak: short utterances, questions and
exclamations, numbers, dates, lists, quotes and long sentences; and lists of the words that it lacks. Words and examples are
from WordNet. Needs the package `inflect`, which spells numbers.
"""

import calendar
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


try:
    import inflect
except ImportError:
    inflect = None


# How often a noun has to be in the texts that WordNet's authors counted.
MIN_COUNT = 3
EXAMPLE = re.compile(r'"([^"]+)"')
PLAIN = re.compile(r"[A-Za-z][A-Za-z' -]*(, [A-Za-z][A-Za-z' -]*)*[?!]?")
REPLIES = re.findall(
    r"\S[^.?!]*[.?!]",
    """Yes. No. Hello. Hello there. Good morning. Good evening. Good night. Goodbye. Thank you. Thanks a lot. Of course.
Maybe. Not yet. Never mind. Wait. Stop. Go on. I see. All right. Okay. Sure. Why not? Who is it? Really? What? Where? When?
How much? How come? Right now. See you. Come in. Sit down. Watch out! Help! Great! Well done! Happy birthday! Excuse me.
I'm sorry. No problem. Yes, please. No, thanks. One moment. Here we go. That's it. Good luck! Not at all. Are you sure?
I think so. Let's go. Me too. Very good. Hi. Please. Perfect. Exactly. Correct. Welcome. Sorry. Who? Which one? Ready?""",
)
# What is asked and quoted is a statement.
ASKS = ["Did you say that {}?", "Is it true that {}?", "Do you think that {}?", "Why is it that {}?"]
QUOTES = ['She said, "{}"', '"{}" he said.', 'The sign said, "{}"', '"{}" she asked. "Of course."', 'He shouted, "{}"']
LISTS = [
    "We need {}, {}, and {}.",
    "{}, {}, and {}.",
    "There were {}, {}, {}, and {}.",
    "Bring {}, {}, or {}.",
    "I saw {} and {}, but no {}.",
    "First {}, then {}, and finally {}.",
]
WORD = re.compile(r"[A-Za-z][a-z]{2,13}")
WORDS_IN_LIST = 5
NUMBERS = [
    "It costs {} dollars.",
    "She is {} years old.",
    "There are {} people in the room.",
    "Call me at {}, {}, {}.",
    "The train leaves at {} {}.",
    "Turn to page {}.",
    "That is {} percent.",
    "In nineteen {}, it was {} degrees.",
    "Room {}, please.",
    "{} plus {} is {}.",
    "We walked {} miles in {} hours.",
    "It is {} minutes past {}.",
]
DATES = ["On {month} the {day}.", "The letter came on {month} {day}.", "We meet on the {day} of {month}."]


def read_wordnet(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """
    Reads WordNet's data files.

    Args:
        folder (`str` or `os.PathLike`):
            Folder with `data.noun`, `data.verb` and so on, and `index.sense`.

    Returns:
        `tuple(list[str], list[str])`: example sentences of all words, and common nouns of one word that are spelled small.

    Raises:
        `ValueError`: If there are no such files.
    """
    examples = dict[str, None]()
    for line in read_data(folder):
        _, _, gloss = line.partition("|")
        for example in map(str.strip, EXAMPLE.findall(gloss)):
            if PLAIN.fullmatch(example) and "--" not in example:
                examples[example] = None
    # The class of nouns is 1.
    common = {key.split("%")[0] for key, count in read_senses(folder) if "%1:" in key and count >= MIN_COUNT}
    return list(examples), sorted(noun for noun in common if re.fullmatch(r"[a-z]{3,9}", noun))


def read_data(folder: str | os.PathLike) -> Iterator[str]:
    """Lines of WordNet's data files, or an error if there are none."""
    files = sorted(Path(folder).glob("data.*"))
    if not files or not Path(folder, "index.sense").is_file():
        raise ValueError(
            f"`folder` {folder} must have WordNet's files data.noun, data.verb and so on, and index.sense"
        )
    for file in files:
        yield from file.read_text(encoding="utf-8", errors="ignore").splitlines()


def read_senses(folder: str | os.PathLike) -> Iterator[tuple[str, int]]:
    """Keys of WordNet's senses, which are a word, its class and more, and how often each is in texts."""
    for line in Path(folder, "index.sense").read_text(encoding="utf-8").splitlines():
        key, _, _, count = line.split()
        yield key, int(count)


def read_words(folder: str | os.PathLike) -> list[str]:
    """
    Reads the single words in WordNet's data files, of 3 to 14 letters, of which only the first may be a capital.

    Args:
        folder (`str` or `os.PathLike`):
            Folder with `data.noun`, `data.verb` and so on, and `index.sense`.

    Returns:
        `list[str]`: words, with the capitals of names, those first that are most often in the texts that WordNet's authors
        counted.

    Raises:
        `ValueError`: If there are no such files.
    """
    words = dict[str, str]()
    for line in read_data(folder):
        # Offset, file, class, the number of words in hexadecimal, and each word with its number.
        fields = line.partition("|")[0].split()
        if not line.startswith(" ") and len(fields) > 4:
            for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
                # What is a name and a word, is a word.
                if WORD.fullmatch(word) and (word.islower() or word.lower() not in words):
                    words[word.lower()] = word
    counts = Counter[str]()
    for key, count in read_senses(folder):
        counts[key.partition("%")[0]] += count
    return [words[word] for word in sorted(words, key=lambda word: (-counts[word], word))]


def get_letters(text: str) -> str:
    """What two texts have in common that differ in capitals and punctuation only."""
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def punctuate(text: str) -> str:
    """A text with a capital at the start and a mark at the end."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in '.?!"' else f"{text}."


def write_short_texts(nouns: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """
    Writes what people say in one word or two: replies, half of all, and nouns, numbers, days and months.

    [`join_utterances`] puts them after sentences, so that a voice learns to say them after a voice prompt.

    Args:
        nouns (sequence of `str`):
            Nouns, from [`read_wordnet`].
        count (`int`):
            How many texts. Most replies come more than once, for several speakers.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.

    Returns:
        `list[str]`: the texts.

    Raises:
        `ValueError`: If `inflect` is not installed, there are no nouns, or `count` is less than 1.

    Example:

    ```python
    >>> from transformers_sled.training import read_wordnet, write_short_texts

    >>> examples, nouns = read_wordnet("wordnet/dict")  # doctest: +SKIP
    >>> write_short_texts(nouns, 3)  # doctest: +SKIP
    ['Why?', 'Let\'s go!', 'Ninety-nine.']
    ```
    """
    check_inflect()
    if not nouns:
        raise ValueError("`nouns` is empty")
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    chance, engine = random.Random(seed), inflect.engine()
    replies = [reply[:-1] for reply in REPLIES if len(reply.split()) <= 2]
    numbers = [engine.number_to_words(number) for number in range(101)]
    names = [*calendar.month_name[1:], *calendar.day_name]
    kinds = [replies, replies, replies, nouns, numbers, names]
    return [punctuate(chance.choice(chance.choice(kinds)) + chance.choice("...?!")) for _ in range(count)]


def write_word_lists(words: Sequence[str], known: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """
    Writes lists of five words that a corpus lacks. How an English word sounds does not follow from its letters: a voice says
    words worst that it has never heard.

    Args:
        words (sequence of `str`):
            Words, the most important first, from [`read_words`].
        known (sequence of `str`):
            Texts of the corpus.
        count (`int`):
            How many lists, or as many as there are words for.
        seed (`int`, *optional*, defaults to 0):
            Seed of what stands beside what.

    Returns:
        `list[str]`: the texts. No word comes twice.

    Raises:
        `ValueError`: If `count` is less than 1, or `known` has all words.

    Example:

    ```python
    >>> from transformers_sled.training import read_words, write_word_lists

    >>> words = read_words("wordnet/dict")  # doctest: +SKIP
    >>> write_word_lists(words, ["The dog barked all night."], 1)  # doctest: +SKIP
    ['Say, have, person, make, and not.']
    ```
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    heard = {word for text in known for word in get_letters(text).split()}
    unheard = [word for word in words if word.lower() not in heard][: count * WORDS_IN_LIST]
    if len(unheard) < WORDS_IN_LIST:
        raise ValueError(f"`words` has {len(unheard)} that are not in `known`, too few for a list of {WORDS_IN_LIST}")
    random.Random(seed).shuffle(unheard)
    starts = range(0, len(unheard) - WORDS_IN_LIST + 1, WORDS_IN_LIST)
    lists = [unheard[start : start + WORDS_IN_LIST] for start in starts]
    return [punctuate(", ".join(chosen[:-1]) + f", and {chosen[-1]}") for chosen in lists]


def check_inflect() -> None:
    if inflect is None:
        raise ValueError("inflect is not installed, which spells numbers: `pip install inflect`")


def fill(template: str, draw: Callable[[], str]) -> str:
    """A template with another value in every gap."""
    return re.sub(r"\{\}", lambda gap: draw(), template)


def write_texts(
    examples: Sequence[str], nouns: Sequence[str], per_kind: int, seed: int = 0, exclude: Sequence[str] = ()
) -> list[str]:
    """
    Writes texts of every kind.

    Args:
        examples (sequence of `str`):
            Sentences and phrases, from [`read_wordnet`].
        nouns (sequence of `str`):
            Nouns, from [`read_wordnet`].
        per_kind (`int`):
            Texts of each kind, about, or as many as there are.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        exclude (sequence of `str`, *optional*):
            Texts that are not to be used, such as those of tests.

    Returns:
        `list[str]`: the texts, without repetitions, in random order.

    Raises:
        `ValueError`: If `inflect` is not installed, or there are too few examples or nouns.

    Example:

    ```python
    >>> from transformers_sled.training import read_wordnet, write_texts

    >>> examples, nouns = read_wordnet("wordnet/dict")  # doctest: +SKIP
    >>> texts = write_texts(examples, nouns, per_kind=200)  # doctest: +SKIP
    ```
    """
    check_inflect()
    chance, engine, excluded = random.Random(seed), inflect.engine(), set(map(get_letters, exclude))
    examples = [example for example in examples if get_letters(example) not in excluded]
    lengths = {example: len(example.split()) for example in examples}
    statements = [text for text in examples if 4 <= lengths[text] <= 8 and text[0].islower() and text[-1].isalpha()]
    if not statements or not nouns:
        raise ValueError(
            f"`examples` and `nouns` must have statements and nouns, got {len(statements)} and {len(nouns)}"
        )

    def spell() -> str:
        number = chance.choice([chance.randint(0, 20), chance.randint(0, 100), chance.randint(0, 9999)])
        return engine.number_to_words(number, andword="", comma="")

    def date() -> str:
        day = engine.ordinal(engine.number_to_words(chance.randint(1, 31)))
        return chance.choice(DATES).format(month=chance.choice(calendar.month_name[1:]), day=day)

    def sample(texts: Sequence[str], count: int) -> list[str]:
        return chance.sample(texts, min(len(texts), count))

    kinds = [
        REPLIES,
        sample([text for text in examples if lengths[text] <= 3 and text[-1] not in "?!"], per_kind),
        sample(nouns, per_kind // 3),
        sample([text for text in examples if text[-1] == "?" and lengths[text] <= 12], 2 * per_kind),
        sample([text for text in examples if text[-1] == "!" and lengths[text] <= 12], 2 * per_kind),
        [chance.choice(ASKS).format(chance.choice(statements)) for _ in range(per_kind // 2)],
        [fill(chance.choice(NUMBERS), spell) for _ in range(per_kind)],
        [date() for _ in range(per_kind // 4)],
        [fill(chance.choice(LISTS), lambda: chance.choice(nouns)) for _ in range(per_kind)],
        [chance.choice(QUOTES).format(punctuate(chance.choice(statements))) for _ in range(per_kind // 2)],
        sample([text for text in examples if 13 <= lengths[text] <= 20], per_kind // 2),
    ]
    texts = list(dict.fromkeys(punctuate(text.strip()) for kind in kinds for text in kind))
    chance.shuffle(texts)
    return texts
