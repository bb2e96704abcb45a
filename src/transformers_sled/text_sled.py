"""Text to token ids: parts, incremental tokenization, text as it is written."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenizers import pre_tokenizers


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .processing_sled import SledProcessor

MAX_WAITING_CHARACTERS = 1_000_000
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


@dataclass
class SledTextPart:
    """Token ids of one part of a text, which may still be arriving."""

    ids: list[int] = field(default_factory=list)
    is_complete: bool = True


class SledTextSource:
    """
    Turns pieces of text into parts: token ids of texts that fit the model's positions.

    An interleaved model gets the first part as it is written. Whether the text ends up as one part shows late, and with it
    whether the part must leave room to be primed with: once the part has its share, text from the end of the sentence on
    is held back until all of it has arrived, or more than fits. Later parts are made of whole sentences.
    """

    def __init__(
        self,
        processor: SledProcessor,
        prompt_text: str | None,
        num_prompt_frames: int,
        is_interleaved: bool,
        num_first_tokens: int = 0,
    ) -> None:
        self.processor = processor
        self.num_prompt_frames = num_prompt_frames
        self.is_interleaved = is_interleaved
        # What the model reads before its first frame, which is never held back.
        self.num_first_tokens = num_first_tokens
        self.parts: list[SledTextPart] = []
        self.is_finished = False
        self._prefix = "" if prompt_text is None else f"{prompt_text} "
        self._num_prompt_positions = 0
        if num_prompt_frames > 0:
            self._num_prompt_positions = processor.estimate_num_positions(self._prefix, num_prompt_frames)
        self._tokenizer: SledIncrementalTokenizer | None = None
        # Pieces without anything to speak, or all of them for an offline model.
        self._waiting: list[str] = []
        self._num_waiting = 0
        self._is_blank = True
        # The text of the open part, as far as the tokenizer has it, and what is held back.
        self._text, self._held = "", self._prefix
        # Estimated positions of the last part that is closed.
        self._num_previous = 0
        # No text of more characters than this fits, so no more is looked at in one go.
        self._num_characters = 1
        while processor.estimate_num_positions("a" * self._num_characters) <= processor.max_position_embeddings:
            self._num_characters *= 2

    def push(self, piece: str) -> None:
        """Takes the next piece."""
        if not isinstance(piece, str):
            raise ValueError(f"`text` must yield strings, got {piece!r} of type {type(piece).__name__}.")
        has_words = bool(piece) and not piece.isspace()
        self._is_blank = self._is_blank and not has_words
        self._waiting.append(piece)
        self._num_waiting += max(1, len(piece))
        if self.is_interleaved and (has_words or (piece and self._tokenizer is not None)):
            num_ids = sum(len(part.ids) for part in self.parts[-1:])
            state = len(self.parts), num_ids, len(self._held)
            self._held += "".join(self._waiting)
            self._waiting = []
            self._advance()
            num_ids = sum(len(part.ids) for part in self.parts[-1:])
            if state != (len(self.parts), num_ids, len(self._held)):
                self._num_waiting = 0
        if self._num_waiting > MAX_WAITING_CHARACTERS:
            reason = (
                "without anything to speak"
                if self.is_interleaved
                else "and an offline model needs the whole text before it speaks. Use an interleaved model for text without end"
            )
            raise ValueError(
                f"`text` is still going on after {MAX_WAITING_CHARACTERS:,} characters or empty pieces, {reason}."
            )

    def finish(self) -> None:
        """Ends the text."""
        if self._is_blank:
            raise ValueError("`text` must not be empty, but its source has ended without any.")
        self._held += "".join(self._waiting)
        if not self.is_interleaved:
            for part in self.processor.split_text(self._held, self.num_prompt_frames, len(self._prefix)):
                self.parts.append(SledTextPart(encode_text(self.processor.tokenizer, part)))
        elif self._is_first() or self._held.strip():
            self._close_part(len(self._held))
        self.is_finished = True

    def _is_first(self) -> bool:
        return not self.parts or not self.parts[0].is_complete

    def _count_positions(self, text: str) -> int:
        return self.processor.estimate_num_positions(text, self.num_prompt_frames if self._is_first() else 0)

    def _get_sentence_ends(self, text: str) -> list[int]:
        """Where a part of this text may end after a sentence. The last sentence may go on and does not count."""
        ends = itertools.accumulate(len(sentence) for sentence in self.processor.split_sentences(text)[:-1])
        return [end for end in ends if end >= self._get_first_end()]

    def _get_word_ends(self, text: str, num_positions: float) -> list[int]:
        """Where a part of this text, of at most this many positions, may end after a word."""
        ends = [match.end() for match in re.finditer(r"\S+(?=\s)", text)]
        return [
            end for end in ends if end >= self._get_first_end() and self._count_positions(text[:end]) <= num_positions
        ]

    def _get_first_end(self) -> int:
        """No part ends inside what the tokenizer has, and the first one goes beyond what the prompt says."""
        return max(len(self._text), len(self._prefix) + 1 if self._is_first() else 1)

    def _advance(self) -> None:
        """Moves text that is held back into parts, as far as it is clear where it belongs."""
        while (end := self._find_end()) is not None:
            self._close_part(end - len(self._text))
        if self._is_first():
            self._release(self._find_hold() - len(self._text))
            while self._held and len(self.parts[0].ids) < self.num_first_tokens:
                words = self._held.split(maxsplit=1)
                self._release(len(self._held) - len(words[1]) if len(words) > 1 else len(self._held))

    def _find_end(self) -> int | None:
        """Where the part at the start of the text ends, or `None` if it may still take what follows."""
        num_positions = self.processor.max_position_embeddings
        text = (self._text + self._held)[: self._num_characters]
        count = self._count_positions(text)
        # A text that does not fit is cut into parts that leave each other room.
        limit = min(num_positions / 2, num_positions - self._num_previous)
        if count <= (num_positions if self._is_first() else limit):
            return None
        ends = self._get_sentence_ends(text)
        fitting = [end for end in ends if self._count_positions(text[:end]) <= limit]
        if fitting:
            return fitting[-1]
        if ends and self._count_positions(text[: ends[0]]) <= num_positions:
            return ends[0]
        if count <= num_positions:
            return None
        # A sentence that does not fit is cut after a word.
        words = self._get_word_ends(text, num_positions / 2)
        return words[-1] if words else max(self._get_first_end(), len(text) // 2)

    def _find_hold(self) -> int:
        """How far the text of the first part goes for certain, as long as it is not clear whether all of it fits."""
        text = self._text + self._held
        free = self.processor.max_position_embeddings - self._num_prompt_positions
        if self._count_positions(text) <= self._num_prompt_positions + free / 3:
            return len(text)
        for end in self._get_sentence_ends(text):
            if self._count_positions(text[:end]) >= self._num_prompt_positions + free / 3:
                return end
        words = self._get_word_ends(text, self._num_prompt_positions + free / 2)
        return words[-1] if words else len(self._text)

    def _release(self, length: int) -> None:
        """Passes held back characters to the open part, which this opens if need be."""
        if self._tokenizer is None:
            self._tokenizer = SledIncrementalTokenizer(self.processor.tokenizer)
            self.parts.append(SledTextPart(is_complete=False))
        released, self._held = self._held[:length], self._held[length:]
        self._text += released
        self.parts[-1].ids += self._tokenizer.push(released)

    def _close_part(self, length: int) -> None:
        """Passes held back characters to the open part and ends it."""
        self._num_previous = self._count_positions(self._text + self._held[:length])
        self._release(length)
        if self._tokenizer is not None:
            self.parts[-1].ids += self._tokenizer.finish()
        self.parts[-1].is_complete = True
        self._tokenizer, self._text = None, ""


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
    _check_text("text", text)
    return _encode_texts(tokenizer, [text], add_special_tokens)[0]


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = False
) -> list[list[int]]:
    encoding = tokenizer(texts, add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)
    return encoding["input_ids"]


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must be a string, got {text!r} of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ValueError(
            f"`{name}` must be valid Unicode, got the lone surrogate {character!r} in {text!r}."
        ) from error


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
        _check_text("piece", piece)
        self._held += piece
        if self._split is None:
            return []
        words = self._split(self._held)
        num_final = self._count_final(words)
        self._held = "".join(words[num_final:])
        return self._encode(words[:num_final])

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
