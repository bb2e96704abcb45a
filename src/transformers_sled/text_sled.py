"""From what a person writes to token ids: words, parts, incremental tokenization, text as it is written."""

from __future__ import annotations

import html
import itertools
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sentencex
from tokenizers import pre_tokenizers

from .normalization_sled import EnglishNormalizer, is_available


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .processing_sled import SledProcessor


# Speech has about this many bytes of UTF-8 text a second: read English has 14 to 15, scripts with more bytes to a letter
# have fewer letters a second. It decides where long text is split, not how fast it is spoken.
TEXT_BYTES_PER_SECOND = 14.0

# A source that goes on beyond this many characters, or empty pieces, before there is anything to speak is taken for endless.
MAX_WAITING_CHARACTERS = 1_000_000

# Shares of the longest part that must be there before a part ends after a sentence, or inside one after a clause. Where
# the voice has learned no more, little is better; where the positions alone limit it, much is.
MIN_SHARES_OF_SECONDS = 1 / 4, 1 / 2
MIN_SHARES_OF_POSITIONS = 1 / 2, 3 / 4

# Words that begin a clause, where a sentence that is too long may be cut.
CONJUNCTIONS = {
    "en": frozenset(
        [
            "and",
            "but",
            "or",
            "nor",
            "so",
            "yet",
            "because",
            "although",
            "though",
            "while",
            "when",
            "where",
            "whereas",
            "which",
            "who",
            "whose",
            "that",
            "if",
            "unless",
            "until",
            "since",
            "after",
            "before",
            "as",
            "than",
        ]
    )
}

# Words that show, where they are in capitals, that their neighbours are words in capitals too and no acronyms.
COMMON_WORDS = {
    "en": frozenset(
        [
            "about",
            "after",
            "again",
            "all",
            "always",
            "am",
            "an",
            "and",
            "another",
            "any",
            "are",
            "as",
            "at",
            "away",
            "back",
            "be",
            "because",
            "been",
            "before",
            "best",
            "better",
            "big",
            "but",
            "by",
            "call",
            "can",
            "cannot",
            "come",
            "could",
            "danger",
            "day",
            "did",
            "didn't",
            "do",
            "does",
            "doesn't",
            "don't",
            "done",
            "door",
            "down",
            "even",
            "ever",
            "every",
            "find",
            "first",
            "for",
            "found",
            "free",
            "from",
            "get",
            "girl",
            "give",
            "go",
            "going",
            "good",
            "got",
            "great",
            "had",
            "happy",
            "has",
            "have",
            "he",
            "hello",
            "help",
            "her",
            "here",
            "him",
            "his",
            "home",
            "hot",
            "how",
            "hurry",
            "i'm",
            "if",
            "in",
            "into",
            "is",
            "isn't",
            "it",
            "it's",
            "its",
            "just",
            "keep",
            "know",
            "last",
            "leave",
            "left",
            "let",
            "life",
            "like",
            "listen",
            "little",
            "long",
            "look",
            "love",
            "made",
            "make",
            "man",
            "many",
            "may",
            "me",
            "more",
            "most",
            "much",
            "must",
            "my",
            "never",
            "new",
            "next",
            "nice",
            "no",
            "nobody",
            "not",
            "nothing",
            "now",
            "of",
            "off",
            "oh",
            "old",
            "on",
            "once",
            "one",
            "only",
            "open",
            "or",
            "other",
            "our",
            "out",
            "over",
            "part",
            "people",
            "place",
            "please",
            "put",
            "quiet",
            "read",
            "really",
            "right",
            "run",
            "said",
            "same",
            "saw",
            "say",
            "see",
            "she",
            "should",
            "small",
            "so",
            "some",
            "sorry",
            "start",
            "still",
            "stop",
            "such",
            "take",
            "tell",
            "than",
            "thank",
            "that",
            "that's",
            "the",
            "their",
            "them",
            "then",
            "there",
            "these",
            "they",
            "thing",
            "think",
            "this",
            "those",
            "time",
            "to",
            "today",
            "together",
            "tomorrow",
            "too",
            "two",
            "under",
            "until",
            "up",
            "us",
            "use",
            "very",
            "wait",
            "want",
            "wanted",
            "warning",
            "was",
            "watch",
            "way",
            "we",
            "welcome",
            "well",
            "went",
            "were",
            "what",
            "when",
            "where",
            "which",
            "while",
            "who",
            "why",
            "will",
            "with",
            "without",
            "won't",
            "work",
            "world",
            "would",
            "wow",
            "yes",
            "yet",
            "you",
            "your",
        ]
    )
}
# Of these, the ones that are more likely something else when they stand alone among words that are not in capitals.
AMBIGUOUS_WORDS = {"en": frozenset(["am", "an", "in", "it", "may", "me", "or", "us", "who"])}
# Read letter by letter also among words in capitals, if they have a vowel; without one they are in any case.
ACRONYMS = {
    "en": frozenset(
        [
            "ai",
            "api",
            "aka",
            "asap",
            "ceo",
            "cfo",
            "cia",
            "cio",
            "cpu",
            "diy",
            "dna",
            "ecg",
            "eeg",
            "eta",
            "eu",
            "faq",
            "fbi",
            "gpu",
            "hiv",
            "id",
            "iq",
            "io",
            "ios",
            "ip",
            "irs",
            "nba",
            "nfl",
            "oecd",
            "pa",
            "pin",
            "rna",
            "rsvp",
            "suv",
            "ua",
            "uae",
            "ufo",
            "ui",
            "uk",
            "un",
            "url",
            "usa",
            "usb",
            "ux",
            "vip",
            "vpn",
        ]
    )
}

# Marks after which a sentence may end; sentencex decides whether it does.
_TERMINATORS = ".!?…。！？｡．։؟۔।॥၊။።፧።᙮᠃᠉"
_CLOSERS = "\"'”’»)]}」』）〉》】"
# Another word may follow these without a space.
_NO_SPACE_AFTER = "。！？｡" + _CLOSERS
_ENDS_WITH_TERMINATOR = re.compile(rf"[{re.escape(_TERMINATORS)}][{re.escape(_CLOSERS)}]*$")
_ENDS_WITH_PAUSE = re.compile(rf"(?:[,;:،、，；：]|^[-–—]+|[–—])[{re.escape(_CLOSERS)}]*$")

# A word ends before white space, after the full stop of a script without spaces, and at some length.
_WORD = re.compile(rf"(?:[^\s。！？｡]{{1,200}}|(?=[。！？｡]))[。！？｡]{{0,20}}[{re.escape(_CLOSERS)}]{{0,20}}")
_SPACE = re.compile(r"\s+")
_LINE_END = re.compile(r"\r\n|[\n\r\x85\u2028]")
_PARAGRAPH_END = re.compile(r"[\f\u2029]")

# A word of more bytes than this may be cut, after any few of them, where it does not fit a part.
_MAX_WORD_LENGTH, _WORD_PIECE = 20, 5

# A tag of SSML, and an entity, are waited for this long.
_MAX_TAG_LENGTH, _MAX_ENTITY_LENGTH = 1000, 10
_TAG = re.compile(rf"<(/?)([A-Za-z][\w:-]*)?[^<>]{{0,{_MAX_TAG_LENGTH}}}>")
_ENTITY = re.compile(rf"&#?\w{{1,{_MAX_ENTITY_LENGTH}}};")
_OPEN_MARKUP = re.compile(rf"<[^<>]{{0,{_MAX_TAG_LENGTH}}}$|&#?\w{{0,{_MAX_ENTITY_LENGTH}}}$")
_PARAGRAPH_TAGS = frozenset(["break", "p", "speak"])

# Forms of characters that tokenizers and voices know.
_FORMS = {
    **dict.fromkeys("‘’‚‛′ʼʹ＇`´", "'"),
    **dict.fromkeys("“”„‟″«»‹›＂", '"'),
    **dict.fromkeys("‐‑−﹣－", "-"),
    **dict.fromkeys("―⸺⸻﹘", "—"),
    **{"‒": "–", "…": "...", "⁄": "/", "∕": "/", "℃": "°C", "℉": "°F", "№": "No. ", "⁇": "??", "‼": "!!", "⁉": "?!"},
    **dict.fromkeys("°±×÷€£¥¢₹₩₽§¶µ", None),
}
# Blocks of characters that are letters and digits in another form: full width, ligatures, letters of mathematics.
_COMPATIBLE = ((0xFB00, 0xFB06), (0xFF10, 0xFF19), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A), (0x1D400, 0x1D7FF))

_JOINERS = re.compile("(?<![\u0600-\U0003ffff])[\u200c\u200d]|[\u200c\u200d](?![\u0600-\U0003ffff])")
_STARS = re.compile(r"(?<!\d)\*+|\*+(?!\d)")
_UNDERSCORES = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")
_DASH = re.compile(r"\s*(?:—|--+|(?:(?<![^\W\d_])–|–(?![^\W\d_])))\s*")
_LETTERS = re.compile(r"[^\W\d_]+")
_ROMAN_NUMERAL = re.compile(r"[IVX]{2,}")

# Words in capitals that are looked at, at most, to tell whether they are words.
_CAPITAL_WINDOW = 4

# Words whose number of tokens is remembered.
_MAX_COUNTED_WORDS = 1000

# Words of a sentence that are looked at to tell where it ends, and that a normalizer gets at most.
_SENTENCE_WINDOW = 100

# What the pre-tokenizer of GPT-2 and RoBERTa splits off as soon as it is spelled out, whatever follows.
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def check_text(name: str, text: object) -> str:
    r"""
    Checks that an argument is a string of whole characters.

    Args:
        name (`str`):
            Name of the argument.
        text (`object`):
            Its value.

    Returns:
        `str`: the text.

    Raises:
        `ValueError`: if it is not a string, or holds half of a surrogate pair, which is no character.
    """
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must be a string, got {_shorten(text)} of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ValueError(
            f"`{name}` must be valid Unicode, got the lone surrogate {character!r} in {_shorten(text)}."
        ) from error
    return text


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> list[int]:
    r"""
    Token ids of a user's text, in which control tokens spelled out (`</s>`, `<pad>`, `<mask>`) are plain characters.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        text (`str`):
            The text.
        add_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether to put the tokenizer's own tokens around the text, `<s>` and `</s>` for SLED.

    Returns:
        `list[int]`: the ids.

    Raises:
        `ValueError`: if `text` is not a string, or holds half of a surrogate pair, which is no character.
    """
    return _encode_texts(tokenizer, [check_text("text", text)], add_special_tokens)[0]


def is_speakable(text: str) -> bool:
    r"""
    Tells whether there is anything to say in a text.

    Args:
        text (`str`):
            The text.

    Returns:
        `bool`: whether it has a letter or digit.
    """
    return any(character.isalnum() for character in text)


class SledWordReader:
    r"""
    Cuts a text that arrives in pieces into words, the same however it is cut into pieces. White space of any kind becomes
    one space before the next word, or a blank line (`"\n\n"`) where there was one, which ends a paragraph.

    Example:

    ```python
    >>> from transformers_sled.text_sled import SledWordReader

    >>> reader = SledWordReader()
    >>> [reader.push(piece) for piece in ["The d", "og\t bar", "ked.\n\nThe"]] + [reader.finish()]
    [['The'], [' dog'], [' barked.'], ['\n\nThe']]

    ```
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._num_line_ends = 0
        self._ends_with_return = self._has_space = self._is_started = False

    def push(self, piece: str) -> list[str]:
        r"""
        Takes the next piece of the text.

        Args:
            piece (`str`):
                Any number of characters, 0 included.

        Returns:
            `list[str]`: the words that are complete now, each with the white space before it.
        """
        self._buffer += piece
        return self._read(is_last=False)

    def finish(self) -> list[str]:
        r"""
        Ends the text.

        Returns:
            `list[str]`: the last word, if there is one.
        """
        return self._read(is_last=True)

    def _read(self, is_last: bool) -> list[str]:
        words: list[str] = []
        position = 0
        while position < len(self._buffer):
            space = _SPACE.match(self._buffer, position)
            if space is not None:
                self._take_space(space.group())
                position = space.end()
                continue
            word = _WORD.match(self._buffer, position)
            assert word is not None, "What is not white space is a word."
            if word.end() == len(self._buffer) and not is_last:
                break
            words.append(self._get_space() + word.group())
            # What is cut for its length goes on after a space.
            self._has_space = word.group()[-1] not in _NO_SPACE_AFTER
            position = word.end()
        self._buffer = self._buffer[position:]
        return words

    def _take_space(self, space: str) -> None:
        # A line feed after a carriage return belongs to it, also where a piece ends between the two.
        space_after = space[1:] if self._ends_with_return and space.startswith("\n") else space
        self._ends_with_return = space.endswith("\r")
        self._num_line_ends += len(_LINE_END.findall(space_after)) + 2 * len(_PARAGRAPH_END.findall(space_after))
        self._has_space = True

    def _get_space(self) -> str:
        space = "\n\n" if self._num_line_ends > 1 else " " if self._has_space else ""
        self._num_line_ends = 0
        self._ends_with_return = self._has_space = False
        if not self._is_started:
            self._is_started = True
            return ""
        return space


class _CharacterTable(dict[int, str | None]):
    """For `str.translate`: what each character becomes on its own, worked out when it is first seen."""

    def __missing__(self, code: int) -> str | None:
        self[code] = form = self._get_form(chr(code))
        return form

    @staticmethod
    def _get_form(character: str) -> str | None:
        code = ord(character)
        if character in _FORMS:
            return _FORMS[character] or character
        if any(first <= code <= last for first, last in _COMPATIBLE):
            return unicodedata.normalize("NFKC", character)
        if code < 0x7F and not character.isspace():
            return character if character.isprintable() else None
        if character.isspace() or character in "\u200c\u200d":
            return character
        category = unicodedata.category(character)
        if category in ("Cc", "Cf", "Cn", "Co") or 0xFE00 <= code <= 0xFE0F or code in (0x034F, 0x20E3):
            return None
        # Emoji, arrows and other signs that are seen and not read.
        return " " if category in ("So", "Sk", "Sm") else character


_CHARACTERS = _CharacterTable()


class SledTextCleaner:
    r"""
    Cuts a text that arrives in pieces into words and leaves out what no voice should read, the same however it is cut into
    pieces: white space of any kind becomes one space, or `"\n\n"` where a paragraph begins; characters without a sound
    (zero width, control, emoji) go; letters are composed (NFC); quotes, dashes and ellipses get plain forms; words in
    capitals are words, and what may be an acronym is left alone. A text that starts with `<speak>` is SSML: its tags go.
    In any other text, tags are plain characters.

    Args:
        language (`str`, *optional*, defaults to `"en"`):
            Code of the language, whose words are known by heart.

    Example:

    ```python
    >>> from transformers_sled.text_sled import SledTextCleaner

    >>> cleaner = SledTextCleaner()
    >>> [cleaner.push(piece) for piece in ["THE DO", "G\u00a0bark", "ed\u2026 \N{DOG}"]] + [cleaner.finish()]
    [['The'], [' dog'], [], [' barked...']]

    ```
    """

    def __init__(self, language: str = "en") -> None:
        self._common_words = COMMON_WORDS.get(language, frozenset())
        self._ambiguous_words = AMBIGUOUS_WORDS.get(language, frozenset())
        self._acronyms = ACRONYMS.get(language, frozenset())
        self._reader = SledWordReader()
        # Whether the text is SSML, and what is held back to tell, or to see the end of a tag.
        self._is_ssml: bool | None = None
        self._held = ""
        # Words in capitals that may be acronyms.
        self._capitals: list[str] = []
        self._is_shouting = False
        # Space that belongs to the next word, and the last word that was handed out.
        self._space = ""
        self._last = ""

    def push(self, piece: str) -> list[str]:
        r"""
        Takes the next piece of the text.

        Args:
            piece (`str`):
                Any number of characters, 0 included.

        Returns:
            `list[str]`: the words that are final now, each with the white space before it.
        """
        return self._clean(self._reader.push(self._read_markup(piece.translate(_CHARACTERS), is_last=False)))

    def finish(self) -> list[str]:
        r"""
        Ends the text.

        Returns:
            `list[str]`: the remaining words.
        """
        words = self._reader.push(self._read_markup("", is_last=True)) + self._reader.finish()
        return self._clean(words) + self._decide_capitals()

    def _read_markup(self, piece: str, is_last: bool) -> str:
        """The piece without tags, if the text is SSML."""
        if self._is_ssml is False:
            return piece
        text = self._held + piece
        if self._is_ssml is None:
            start = text.lstrip()[: len("<speak")]
            if "<speak".startswith(start) and len(start) < len("<speak") and not is_last:
                # White space before the first word needs no keeping.
                self._held = start
                return ""
            self._is_ssml = start == "<speak"
            if not self._is_ssml:
                self._held = ""
                return text
        open_markup = None if is_last else _OPEN_MARKUP.search(text)
        end = len(text) if open_markup is None else open_markup.start()
        text, self._held = text[:end], text[end:]
        text = _TAG.sub(lambda tag: "\n\n" if (tag.group(2) or "").lower() in _PARAGRAPH_TAGS else " ", text)
        return _ENTITY.sub(lambda entity: html.unescape(entity.group()), text).translate(_CHARACTERS)

    def _clean(self, words: list[str]) -> list[str]:
        cleaned: list[str] = []
        for word in words:
            text = word.lstrip()
            # The space of a word that says nothing goes to the next one.
            self._space = max(self._space, word[: len(word) - len(text)], key=len)
            for index, part in enumerate(self._clean_word(text).split(" ")):
                self._space = self._space or (" " if index else "")
                if part:
                    cleaned += self._read_word(part)
        return cleaned

    @staticmethod
    def _clean_word(word: str) -> str:
        """A word in plain characters. A comma stands for a dash; it may come first. There may be spaces."""
        word = unicodedata.normalize("NFC", word).translate(_CHARACTERS)
        word = _JOINERS.sub("", word)
        if word.isascii() and word.isalnum():
            return word
        word = _UNDERSCORES.sub("", _STARS.sub("", word)).strip("~|\\")
        word = re.sub(r"(?<!\w)''+|''+(?!\w)", '"', word)
        word = re.sub(r"\.{2,}", "...", word)
        word = re.sub(r"[!?]{2,}", lambda marks: "?" if "?" in marks.group() else "!", word)
        word = re.sub(r"(?<=\d)–(?=\d)|(?<=[^\W\d_])–(?=[^\W\d_])", "-", word)
        return _DASH.sub(", ", word).rstrip(" ")

    def _read_word(self, word: str) -> list[str]:
        """Hands out a word, unless it is in capitals and it is open what it is."""
        if word.startswith(",") or (word == "-" and not self._ends_with_digit()):
            # A pause, which belongs to the word before it.
            words = self._decide_capitals()
            rest = word[1:].lstrip(",")
            if self._last[-1:].isalnum():
                words += self._hand_out([","])
            if rest:
                words += self._read_word(rest)
            return words
        last = self._capitals[-1] if self._capitals else self._last
        if not word.strip(".,;:!?"):
            # Marks on their own go to the word before them.
            if not last or last[-1] in ".,;:!?":
                return []
            if last[-1].isalnum() or last[-1] in _CLOSERS:
                self._space = ""
        space = self._space if last else ""
        self._space = ""
        spaced = space + word
        letters = "".join(_LETTERS.findall(word))
        if not letters.isupper() or any(character.isdigit() for character in word) or len(letters) < 2:
            is_neutral = not letters or letters.isupper()
            if is_neutral and self._capitals:
                self._capitals.append(spaced)
                return self._decide_capitals() if self._ends_run(word) else []
            words = self._decide_capitals()
            self._is_shouting = self._is_shouting and is_neutral
            return words + self._hand_out([spaced])
        self._capitals.append(spaced)
        is_common = word.lower().strip("\"'()[]{}.,;:!?") in self._common_words
        num_capitals = sum(len("".join(_LETTERS.findall(one))) > 1 for one in self._capitals)
        if is_common and (num_capitals > 1 or word.lower().strip("\"'()[]{}.,;:!?") not in self._ambiguous_words):
            self._is_shouting = True
        if self._is_shouting or num_capitals >= _CAPITAL_WINDOW or self._ends_run(word):
            return self._decide_capitals()
        return []

    def _ends_with_digit(self) -> bool:
        return (self._capitals[-1] if self._capitals else self._last)[-1:].isdigit()

    @staticmethod
    def _ends_run(word: str) -> bool:
        return not word[-1].isalnum()

    def _decide_capitals(self) -> list[str]:
        """Hands out the words that were held back because they are in capitals."""
        words, self._capitals = self._capitals, []
        capitals = [letters for word in words if len(letters := "".join(_LETTERS.findall(word))) > 1]
        if not self._is_shouting:
            can_be_words = all(len(letters) > 3 and re.search("[AEIOUY]", letters) for letters in capitals)
            self._is_shouting = len(capitals) >= _CAPITAL_WINDOW or (len(capitals) > 1 and can_be_words)
        if not self._is_shouting:
            return self._hand_out(words)
        return list(itertools.chain.from_iterable(self._hand_out([self._lower(word)]) for word in words))

    def _lower(self, word: str) -> str:
        letters = "".join(_LETTERS.findall(word))
        if (
            len(letters) < 2
            or letters.lower() in self._acronyms
            or _ROMAN_NUMERAL.fullmatch(letters)
            or (letters.isascii() and not re.search("[AEIOUY]", letters))
        ):
            return word
        lowered = word.lower()
        if not self._last or word.startswith("\n") or _ENDS_WITH_TERMINATOR.search(self._last):
            start = _LETTERS.search(lowered)
            assert start is not None
            index = start.start()
            return lowered[:index] + lowered[index].upper() + lowered[index + 1 :]
        return re.sub(r"(?<!\w)i(?!\w)", "I", lowered)

    def _hand_out(self, words: list[str]) -> list[str]:
        if words:
            self._last = words[-1]
        return words


class SledTextReader:
    r"""
    Reads a text that arrives in pieces: cleans it ([`SledTextCleaner`]) and writes out numbers and short forms, if there is
    a normalizer. The words are those of the whole text, however it is cut into pieces.

    Args:
        language (`str`, *optional*, defaults to `"en"`):
            Code of the language.
        normalizer (`str` or `Callable`, *optional*):
            `"en"`, or a function that gets one sentence at a time and returns how it is read.

    Raises:
        `ValueError`: if the normalizer is not known, or what it needs is not installed.
    """

    def __init__(self, language: str = "en", normalizer: str | Callable[[str], str] | None = None) -> None:
        check_normalizer(normalizer)
        self._cleaner = SledTextCleaner(language)
        self._normalizer: EnglishNormalizer | _SentenceNormalizer | None = None
        if callable(normalizer):
            self._normalizer = _SentenceNormalizer(normalizer, language)
        elif normalizer is not None:
            self._normalizer = EnglishNormalizer()

    def push(self, piece: str) -> list[str]:
        r"""
        Takes the next piece of the text.

        Args:
            piece (`str`):
                Any number of characters, 0 included.

        Returns:
            `list[str]`: the words to read that are final now, each with the white space before it.
        """
        words = self._cleaner.push(piece)
        return words if self._normalizer is None else self._normalizer.push(words)

    def finish(self) -> list[str]:
        r"""
        Ends the text.

        Returns:
            `list[str]`: the remaining words.
        """
        words = self._cleaner.finish()
        return words if self._normalizer is None else self._normalizer.push(words) + self._normalizer.finish()


class _SentenceNormalizer:
    """Passes whole sentences through a function of the user's."""

    def __init__(self, function: Callable[[str], str], language: str) -> None:
        self._function = function
        self._language = language
        self._words: list[str] = []

    def push(self, words: list[str]) -> list[str]:
        read: list[str] = []
        for word in words:
            if self._words and (
                word.startswith("\n")
                or len(self._words) == _SENTENCE_WINDOW
                or is_sentence_end("".join(self._words), word, self._language)
            ):
                read += self.finish()
            self._words.append(word)
        return read

    def finish(self) -> list[str]:
        if not self._words:
            return []
        sentence, self._words = "".join(self._words), []
        text = sentence.lstrip()
        space = sentence[: len(sentence) - len(text)]
        normalized = self._function(text)
        if not isinstance(normalized, str):
            raise ValueError(f"`normalizer` must return a string, got {_shorten(normalized)} for {_shorten(text)}.")
        cleaner = SledTextCleaner(self._language)
        words = cleaner.push(check_text("normalizer(text)", normalized)) + cleaner.finish()
        return [space + word if index == 0 else word for index, word in enumerate(words)]


def check_normalizer(normalizer: object) -> None:
    r"""
    Checks a normalizer.

    Args:
        normalizer (`object`):
            What was given as one.

    Raises:
        `ValueError`: if it is neither `None`, a function nor `"en"`, or what `"en"` needs is not installed.
    """
    if normalizer == "en" and not is_available():
        EnglishNormalizer()
    if normalizer is not None and normalizer != "en" and not callable(normalizer):
        raise ValueError(f"`normalizer` must be a function, 'en' or None, got {_shorten(normalizer)}.")


def is_sentence_end(sentence: str, next_word: str, language: str) -> bool:
    r"""
    Tells whether a sentence ends between two words.

    Args:
        sentence (`str`):
            The sentence so far.
        next_word (`str`):
            The word after it.
        language (`str`):
            Code of the language whose rules decide.

    Returns:
        `bool`: whether it ends.
    """
    sentence, next_word = sentence.strip(), next_word.strip()
    if _ENDS_WITH_TERMINATOR.search(sentence) is None:
        return False
    space = "" if sentence[-1] in _NO_SPACE_AFTER else " "
    ends = itertools.accumulate(
        len(segment) for segment in sentencex.segment(language, f"{sentence}{space}{next_word}")
    )
    return any(len(sentence) <= end <= len(sentence) + len(space) for end in ends)


class SledPartSplitter:
    r"""
    Decides what is a part of a text: what is spoken in one go. Words come one at a time, and a part is ended by what has
    come so far, so that a complete text and one that is still being written have the same parts.

    A part ends after a sentence once it has a quarter of the length that its limit allows, after a clause once it has
    half, and where no more fits after a word, or inside one that alone is too long. A paragraph ends a part. Without
    `max_part_seconds` a text that fits the positions is one part, and parts of a longer one are half as full at least.

    Args:
        processor ([`SledProcessor`]):
            Knows the limits, the tokenizer and the language.
        prompt_words (`list[str]`, *optional*):
            Words of what the voice prompt says, which begin every part.
        num_prompt_frames (`int`, *optional*, defaults to 0):
            Length in frames of the voice prompt. Without `prompt_words` only the first part begins with it.

    Raises:
        `ValueError`: if the voice prompt leaves no room.
    """

    def __init__(
        self, processor: SledProcessor, prompt_words: list[str] | None = None, num_prompt_frames: int = 0
    ) -> None:
        self._processor = processor
        self._num_positions = processor.max_position_embeddings
        self._prompt_words = prompt_words or []
        self._num_prompt_frames = num_prompt_frames
        self._num_special = len(encode_text(processor.tokenizer, ""))
        self._frames_per_byte = processor.sampling_rate / processor.hop_length / TEXT_BYTES_PER_SECOND
        self._token_counts: dict[str, int] = {}
        self._num_prompt_tokens = sum(map(self._count_tokens, self._prompt_words))
        self._num_prompt_bytes = sum(len(word.encode()) for word in self._prompt_words)
        # Words of the open part beside the prompt's, their tokens and bytes.
        self._words: list[str] = []
        self._num_tokens = self._num_bytes = 0
        # The sentence so far, to tell where it ends.
        self._sentence: list[str] = []
        # Parts that are one with what follows if all of it fits the positions, and the tokens and bytes in them.
        self._may_be_one_part = processor.max_part_seconds is None
        shares = MIN_SHARES_OF_POSITIONS if processor.max_part_seconds is None else MIN_SHARES_OF_SECONDS
        self._sentence_share, self._clause_share = shares
        self._held_parts: list[list[str]] = []
        self._num_held_tokens = self._num_held_bytes = 0
        self._is_cut_in_word = False
        # Whether no part has ended yet, held or not, and whether none has been handed out.
        self._is_first_part = True
        self.is_first = True
        num_prompt_positions = self._count(0, 0) if num_prompt_frames > 0 else 0
        num_word_positions = math.ceil(_MAX_WORD_LENGTH * (1 + self._frames_per_byte))
        if num_prompt_positions > 0 and num_prompt_positions + num_word_positions > self._num_positions:
            raise ValueError(
                f"The voice prompt of {num_prompt_frames} frames (`prompt_audio` or `prompt_latents`) takes about "
                f"{num_prompt_positions} of the model's {self._num_positions} positions, which leaves no room for `text`. "
                "Give a shorter one."
            )
        self._num_base_positions = num_prompt_positions
        # Without a prompt's words, the next part is primed with this one.
        share = 1 if self._prompt_words else 1 / 2
        self._limit = num_prompt_positions + (self._num_positions - num_prompt_positions) * share

    @property
    def ends_with_word(self) -> bool:
        """Whether the certain words of the open part end with a whole word (`bool`)."""
        return not (self._held_parts and self._is_cut_in_word)

    @property
    def has_words(self) -> bool:
        """Whether there is an open part that says something of its own (`bool`)."""
        return bool(self._words or self._held_parts)

    def push(self, words: list[str]) -> list[list[str]]:
        r"""
        Takes the next words.

        Args:
            words (`list[str]`):
                The words, each with the white space before it.

        Returns:
            `list[list[str]]`: the parts that are complete now, as words.
        """
        parts: list[list[str]] = []
        for word in words:
            parts += self._push_word(word)
        return parts

    def finish(self) -> list[list[str]]:
        r"""
        Ends the text.

        Returns:
            `list[list[str]]`: the remaining parts.
        """
        return self._end_paragraph()

    def get_certain_words(self) -> list[str]:
        r"""
        The words that are certain to be in the open part, whatever comes.

        Returns:
            `list[str]`: the first of its words, the prompt's among them.
        """
        return self._prompt_words + (self._held_parts[0] if self._held_parts else self._words)

    def _push_word(self, word: str) -> list[list[str]]:
        text = word.lstrip()
        parts: list[list[str]] = []
        if word.startswith("\n"):
            self._sentence = []
            parts += self._end_paragraph()
        elif self._sentence and is_sentence_end("".join(self._sentence), text, self._processor.language):
            self._sentence = []
            parts += self._end_part(self._sentence_share)
        elif self._sentence and is_speakable(text) and self._is_clause_end(self._sentence[-1], text):
            parts += self._end_part(self._clause_share)
        if not self._sentence and not is_speakable(text):
            # Marks that begin a sentence say nothing, and a sentence may be nothing else.
            return parts
        if self._words and not word[:1].isspace() and not is_speakable(text):
            # Marks that go to the word before them. They count for nothing, so that they are never what is too much.
            self._words.append(text)
            self._sentence[-1] += text
            return parts
        is_start = self._is_first_part and not self._words and not self._prompt_words
        space = " " if word[:1].isspace() and not is_start else ""
        self._sentence = [*self._sentence[-_SENTENCE_WINDOW:], space + text]
        step = _WORD_PIECE if len(text.encode()) > _MAX_WORD_LENGTH else len(text)
        for start in range(0, len(text), step):
            piece = (space if start == 0 else "") + text[start : start + step]
            num_tokens, num_bytes = self._count_tokens(piece), len(piece.encode())
            if self._words and self._get_share(self._num_tokens + num_tokens, self._num_bytes + num_bytes) > 1:
                self._is_cut_in_word = start > 0 if self._is_first_part else self._is_cut_in_word
                parts += self._end_part(0)
            self._words.append(piece)
            self._num_tokens += num_tokens
            self._num_bytes += num_bytes
        return parts + self._hand_out()

    def _count_tokens(self, word: str) -> int:
        # Words come again, and a tokenizer takes its time for each.
        if word not in self._token_counts:
            self._token_counts[word] = len(_encode_texts(self._processor.tokenizer, [word])[0])
            while len(self._token_counts) > _MAX_COUNTED_WORDS:
                self._token_counts.pop(next(iter(self._token_counts)))
        return self._token_counts[word]

    def _is_clause_end(self, word: str, next_word: str) -> bool:
        conjunctions = CONJUNCTIONS.get(self._processor.language, frozenset())
        return _ENDS_WITH_PAUSE.search(word.strip()) is not None or next_word.lower() in conjunctions

    def _count(self, num_tokens: int, num_bytes: int) -> int:
        """Positions that so much text of the open part takes with its speech, and with the voice prompt."""
        num_frames = math.ceil((self._num_prompt_bytes + num_bytes) * self._frames_per_byte)
        if self._is_first_part or self._may_be_one_part or self._prompt_words:
            num_frames = max(num_frames, self._num_prompt_frames + 1)
        return self._num_special + self._num_prompt_tokens + num_tokens + num_frames

    def _get_share(self, num_tokens: int, num_bytes: int) -> float:
        """How much of a part's limit so much text takes; more than 1 is too much."""
        num_positions = self._count(num_tokens, num_bytes) - self._num_base_positions
        share = num_positions / (self._limit - self._num_base_positions)
        max_seconds = self._processor.max_part_seconds
        return share if max_seconds is None else max(share, num_bytes / TEXT_BYTES_PER_SECOND / max_seconds)

    def _end_part(self, min_share: float) -> list[list[str]]:
        """Ends the open part if it takes so much of its limit. Returns the parts that are complete by that."""
        if not self._words or self._get_share(self._num_tokens, self._num_bytes) < min_share:
            return []
        num_positions = self._count(self._num_tokens, self._num_bytes)
        self._held_parts.append(self._words)
        self._num_held_tokens += self._num_tokens
        self._num_held_bytes += self._num_bytes
        self._words = []
        self._num_tokens = self._num_bytes = 0
        self._is_first_part = False
        if not self._prompt_words:
            # Room for the next part to be primed with this one.
            self._num_base_positions = 0
            self._limit = min(self._num_positions / 2, self._num_positions - num_positions)
            if self._limit < self._num_positions / 8:
                self._limit = self._num_positions / 2
        return self._hand_out()

    def _hand_out(self) -> list[list[str]]:
        """The parts that have ended, once it is certain that they are not one with what follows."""
        if self._may_be_one_part:
            num_tokens = self._num_held_tokens + self._num_tokens
            self._may_be_one_part = (
                self._count(num_tokens, self._num_held_bytes + self._num_bytes) <= self._num_positions
            )
        if self._may_be_one_part or not self._held_parts:
            return []
        parts, self._held_parts = [self._prompt_words + words for words in self._held_parts], []
        self.is_first = False
        return parts

    def _end_paragraph(self) -> list[list[str]]:
        if self._may_be_one_part and self.has_words:
            self._words = [word for words in (*self._held_parts, self._words) for word in words]
            self._num_tokens += self._num_held_tokens
            self._num_bytes += self._num_held_bytes
            self._held_parts = []
            self._may_be_one_part = False
        return self._end_part(0)


@dataclass
class SledTextPart:
    """
    Token ids of a part of a text, which may still be arriving.

    Args:
        ids (`list[int]`):
            The ids, special tokens included. The list grows in place.
        is_complete (`bool`):
            Whether no more will come.
    """

    ids: list[int] = field(default_factory=list)
    is_complete: bool = True


class SledTextSource:
    r"""
    Turns a text that arrives in pieces into parts, those that [`SledProcessor.split_text`] gives for the whole text. For an
    interleaved model the ids of the first part come as soon as it is certain that they belong to it, later parts when they
    are complete; an offline model gets all of them at the end.

    Args:
        processor ([`SledProcessor`]):
            The model's processor.
        prompt_text (`str`, *optional*):
            What the voice prompt says.
        num_prompt_frames (`int`, *optional*, defaults to 0):
            Length in frames of the voice prompt.
        is_interleaved (`bool`, *optional*, defaults to `True`):
            Whether the model speaks while its text arrives.

    Raises:
        `ValueError`: if the voice prompt leaves no room.

    Attributes:
        parts (`list[SledTextPart]`): the parts so far; all but the last are complete.
        is_finished (`bool`): whether the text has ended.
        num_prompt_tokens (`int`): number of tokens at the start of every part that say what the voice prompt says.
    """

    def __init__(
        self,
        processor: SledProcessor,
        prompt_text: str | None = None,
        num_prompt_frames: int = 0,
        is_interleaved: bool = True,
    ) -> None:
        self.parts: list[SledTextPart] = []
        self.is_finished = False
        self._tokenizer = processor.tokenizer
        self._is_interleaved = is_interleaved
        self._reader = processor.get_reader()
        prompt_words = processor.get_words(prompt_text) if prompt_text is not None else []
        self.num_prompt_tokens = processor.count_prompt_tokens(prompt_text) if prompt_text is not None else 0
        self._splitter = SledPartSplitter(processor, prompt_words, num_prompt_frames)
        self._follows_prompt = bool(prompt_words)
        # Characters, and empty pieces, since there was last something to speak.
        self._num_waiting = 0
        self._has_text = False
        self._open: SledIncrementalTokenizer | None = None
        self._num_released = 0

    def push(self, piece: str) -> None:
        r"""
        Takes the next piece.

        Args:
            piece (`str`):
                Any number of characters, cut anywhere.

        Raises:
            `ValueError`: if it is not a string, or the text goes on without end before there is anything to speak.
        """
        if not isinstance(piece, str):
            raise ValueError(f"`text` must yield strings, got {_shorten(piece)} of type {type(piece).__name__}.")
        check_text("text", piece)
        words = self._reader.push(piece)
        self._has_text = self._has_text or not (piece == "" or piece.isspace())
        self._num_waiting += max(1, len(piece))
        if self._add(words) and self._is_interleaved:
            self._num_waiting = 0
        if self._num_waiting > MAX_WAITING_CHARACTERS:
            reason = (
                "without anything to speak"
                if self._is_interleaved
                else "and an offline model needs the whole text before it speaks. Use an interleaved model for text without end"
            )
            raise ValueError(
                f"`text` is still going on after {MAX_WAITING_CHARACTERS:,} characters or empty pieces, {reason}."
            )

    def finish(self) -> None:
        r"""
        Ends the text.

        Raises:
            `ValueError`: if there was nothing to speak in it.
        """
        self._add(self._reader.finish())
        for part in self._splitter.finish():
            self._close(part)
        if not self.parts:
            if not self._has_text:
                raise ValueError("`text` must not be empty, but its source has ended without any.")
            raise ValueError("`text` has nothing to say: there is no letter or digit in it.")
        self.is_finished = True

    def _add(self, words: list[str]) -> bool:
        """Passes words on. Returns whether there is anything to speak among them."""
        if words and self._follows_prompt:
            words = [f" {words[0].lstrip()}", *words[1:]]
            self._follows_prompt = False
        for part in self._splitter.push(words):
            self._close(part)
        # A part that is primed with the one before it must be complete, because its length decides whether both fit.
        is_started_early = self._splitter.is_first or self.num_prompt_tokens > 0
        if self._is_interleaved and is_started_early and self._splitter.has_words:
            self._release(self._splitter.get_certain_words())
        return any(map(is_speakable, words))

    def _release(self, words: list[str]) -> None:
        """Passes the first words of the open part to it, which this opens if need be."""
        if self._open is None:
            self._open = SledIncrementalTokenizer(self._tokenizer)
            self.parts.append(SledTextPart(is_complete=False))
            self._num_released = 0
        if len(words) > self._num_released:
            self.parts[-1].ids += self._open.push("".join(words[self._num_released :]))
            self._num_released = len(words)
            if words[-1][-1] not in _NO_SPACE_AFTER and self._splitter.ends_with_word:
                self.parts[-1].ids += self._open.finish_word()

    def _close(self, words: list[str]) -> None:
        """Passes all words of the open part to it and ends it."""
        if self._open is None:
            self.parts.append(SledTextPart(encode_text(self._tokenizer, "".join(words))))
            return
        self._release(words)
        self.parts[-1].ids += self._open.finish()
        self.parts[-1].is_complete = True
        self._open = None


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = False
) -> list[list[int]]:
    encoding = tokenizer(texts, add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)
    return encoding["input_ids"]


def _get_word_splitter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[str]] | None:
    """The pre-tokenizer, if it is one that cuts text by rules known here and nothing cuts or changes it before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pre_tokenizer = getattr(backend, "pre_tokenizer", None)
    if (
        not isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        or not pre_tokenizer.use_regex
        or pre_tokenizer.add_prefix_space
        or getattr(backend, "normalizer", None) is not None
        or not all(token.special for token in tokenizer.added_tokens_decoder.values())
    ):
        return None
    return lambda text: [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


class SledIncrementalTokenizer:
    r"""
    Tokenizes a text that arrives in pieces, to the ids that the whole text gives. A piece may end anywhere: inside a
    word, between a letter and its accent, around spaces. Ids are handed out once no later character can change them,
    which is when the word they belong to is complete; only the unfinished word is kept and looked at again. Control
    tokens spelled out are plain characters, as in [`encode_text`].

    Words are those of the byte-level pre-tokenizer of GPT-2 and RoBERTa, which SLED's tokenizer uses. With any other
    tokenizer all ids come from [`~SledIncrementalTokenizer.finish`]: correct, but late.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_sled import SledIncrementalTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained("ICTNLP/SLED-TTS-Streaming-Libriheavy")
    >>> incremental = SledIncrementalTokenizer(tokenizer)
    >>> ids = [incremental.push(piece) for piece in ["The d", "og bar", "ked."]] + [incremental.finish()]
    >>> tokenizer.convert_ids_to_tokens(ids[0])
    ['<s>', 'The']
    >>> sum(ids, []) == tokenizer("The dog barked.")["input_ids"]
    True

    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._split = _get_word_splitter(tokenizer)
        self._held = ""
        self._is_started = self._is_finished = False
        self._prefix: list[int] = []
        self._suffix: list[int] = []
        if self._split is not None:
            encoding = tokenizer("a", split_special_tokens=True, return_special_tokens_mask=True)
            ids, is_special = encoding["input_ids"], encoding["special_tokens_mask"]
            self._prefix = ids[: is_special.index(0)]
            self._suffix = ids[len(ids) - is_special[::-1].index(0) :]

    def push(self, piece: str) -> list[int]:
        r"""
        Takes the next piece of the text.

        Args:
            piece (`str`):
                Any number of characters, 0 included.

        Returns:
            `list[int]`: the ids that are final now, special tokens included.

        Raises:
            `ValueError`: if `piece` is not a string, or holds half of a surrogate pair, which is no character.
            `RuntimeError`: after [`~SledIncrementalTokenizer.finish`].
        """
        self._check_unfinished()
        check_text("piece", piece)
        self._held += piece
        if self._split is None:
            return []
        words = self._split(self._held)
        num_final = self._count_final(words)
        self._held = "".join(words[num_final:])
        return self._encode(words[:num_final])

    def finish_word(self) -> list[int]:
        r"""
        Ends the word at the end of the text so far: white space or nothing will follow it.

        Returns:
            `list[int]`: the ids that are final now, special tokens included.

        Raises:
            `RuntimeError`: after [`~SledIncrementalTokenizer.finish`].
        """
        self._check_unfinished()
        if self._split is None:
            return []
        words, self._held = self._split(self._held), ""
        return self._encode(words)

    def finish(self) -> list[int]:
        r"""
        Ends the text.

        Returns:
            `list[int]`: the remaining ids, special tokens included.

        Raises:
            `RuntimeError`: if called twice.
        """
        self._check_unfinished()
        self._is_finished = True
        if self._split is None:
            return encode_text(self.tokenizer, self._held)
        ids = self._encode(self._split(self._held))
        return ids + self._suffix if self._is_started else self._prefix + ids + self._suffix

    def _check_unfinished(self) -> None:
        if self._is_finished:
            raise RuntimeError("The text was finished already; a new text needs a new tokenizer.")

    @staticmethod
    def _count_final(words: list[str]) -> int:
        """Number of leading words that no later character can change."""
        if not words or words[-1] in _CONTRACTIONS:
            return len(words)
        # An apostrophe and a letter may become a contraction, which is one word.
        if words[-2:-1] == ["'"] and any(contraction.startswith("'" + words[-1]) for contraction in _CONTRACTIONS):
            return len(words) - 2
        # A run of letters, digits, signs or spaces may go on, and its last space may join the next word.
        return len(words) - 1

    def _encode(self, words: list[str]) -> list[int]:
        if not words:
            return []
        # Each word on its own, because spaces are cut into words in another way at the end of a text than before a word.
        ids = list(itertools.chain.from_iterable(_encode_texts(self.tokenizer, words)))
        if ids and not self._is_started:
            self._is_started = True
            return self._prefix + ids
        return ids


def _shorten(value: object) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = [
    "SledIncrementalTokenizer",
    "SledPartSplitter",
    "SledTextCleaner",
    "SledTextPart",
    "SledTextReader",
    "SledTextSource",
    "SledWordReader",
    "check_normalizer",
    "check_text",
    "encode_text",
    "is_sentence_end",
    "is_speakable",
]
