"""Streaming parts of SLED: handing audio out while it is being made, and tokenization of text as it arrives."""

from __future__ import annotations

import itertools
import math
import queue
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import EncodecModel
from transformers.generation.streamers import BaseStreamer

from .codec_sled import SledAudioChunker


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What the pre-tokenizer of GPT-2 and RoBERTa splits off as soon as it is spelled out, whatever follows.
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class SledAudioStreamer(BaseStreamer):
    r"""
    Streamer that hands the audio of `generate`, running in another thread, to whoever iterates over it, while it is
    being made; the counterpart of [`~transformers.TextIteratorStreamer`] for speech. The waveforms are those of
    [`SledAudioChunker`] and, one after another, the whole speech.

    An error in `generate` is raised to the consumer, after the audio made until then. A consumer that leaves its loop,
    or drops the iterator, closes the streamer: the attribute `closed` (`bool`) tells `generate` to stop. A streamer
    serves one generation of one row.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that generates, or its codec.
        chunk_duration (`float`, *optional*, defaults to 0.2):
            Duration in seconds of every waveform but the first, which is shorter, and the last.
        timeout (`float`, *optional*):
            Seconds to wait for the next waveform before `queue.Empty` is raised. Waits without end if not given.

    Raises:
        `ValueError`: if the model has no codec, the codec cannot be streamed, or a number is out of range.

    Example:

    ```python
    >>> from threading import Thread
    >>> from transformers import AutoModelForTextToWaveform, AutoProcessor
    >>> from transformers_sled import SledAudioStreamer

    >>> model = AutoModelForTextToWaveform.from_pretrained("ICTNLP/SLED-TTS-Libriheavy")
    >>> processor = AutoProcessor.from_pretrained("ICTNLP/SLED-TTS-Libriheavy")
    >>> inputs = processor("The dog barked all night.", return_tensors="pt")

    >>> streamer = SledAudioStreamer(model)
    >>> thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer})
    >>> thread.start()
    >>> for waveform in streamer:
    ...     print(waveform.shape)  # write it to a sound card or a socket
    ```
    """

    def __init__(self, model: PreTrainedModel, chunk_duration: float = 0.2, timeout: float | None = None):
        modules = model.modules() if isinstance(model, nn.Module) else ()
        codec = next((module for module in modules if isinstance(module, EncodecModel)), None)
        if codec is None:
            raise ValueError(f"`model` must be a model with an `EncodecModel`, or one, got {type(model).__name__}.")
        if timeout is not None and (not isinstance(timeout, int | float) or not 0 < timeout < math.inf):
            raise ValueError(f"`timeout` must be a positive, finite number of seconds, got {timeout!r}.")
        self.timeout = timeout
        self._chunker: SledAudioChunker | None = SledAudioChunker(codec, chunk_duration)
        # Waveforms, then None at the end or the error that ended the generation. A `SimpleQueue`, whose `put` may run
        # inside itself, because the garbage collector may call `close` at any point.
        self._queue: queue.SimpleQueue[Tensor | BaseException | None] = queue.SimpleQueue()
        self._is_exhausted = False
        self.closed = False

    def put(self, value: Tensor, is_prompt: bool = False) -> None:
        r"""
        Called by `generate` with new frames.

        Args:
            value (`torch.FloatTensor` of shape `(1, frames, latent_dim)`):
                The frames. Ignored once the streamer is closed.
            is_prompt (`bool`, *optional*, defaults to `False`):
                Whether they are a voice prompt's, whose audio is not part of the speech.

        Raises:
            `ValueError`: if `value` has more than one row or another shape, or a prompt follows speech.
            `RuntimeError`: after [`~SledAudioStreamer.end`].
        """
        # Read before `closed`, because another thread may close the streamer at any point.
        chunker = self._chunker
        if self.closed:
            return
        if chunker is None:
            raise RuntimeError("Frames came after `end`; a streamer serves one generation.")
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] > 1:
            raise ValueError(f"`SledAudioStreamer` only supports batch size 1, got {value.shape[0]}.")
        for waveform in chunker.push(value, is_prompt):
            self._queue.put(waveform)

    def end(self, error: BaseException | None = None) -> None:
        r"""
        Called by `generate` when the speech is complete, or when it has failed.

        Args:
            error (`BaseException`, *optional*):
                What went wrong. The consumer gets it after the audio made until then.
        """
        chunker = self._chunker
        if chunker is None:
            return
        if error is None:
            for waveform in chunker.finish():
                self._queue.put(waveform)
        self._chunker = None
        self._queue.put(error)

    def close(self) -> None:
        """Called by the consumer to stop listening: audio that is not fetched yet is lost, and iteration ends."""
        self.closed = True
        self._chunker = None
        # Wakes a consumer that waits in another thread.
        self._queue.put(None)

    def __next__(self) -> Tensor:
        if self.closed or self._is_exhausted:
            raise StopIteration
        try:
            item = self._queue.get(timeout=self.timeout)
        except queue.Empty:
            raise queue.Empty(f"No audio came within the `timeout` of {self.timeout} seconds.") from None
        if isinstance(item, Tensor) and not self.closed:
            return item
        self._is_exhausted = True
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def __iter__(self) -> Iterator[Tensor]:
        return _AudioIterator(self)


class _AudioIterator:
    """Closes the streamer when the consumer drops it, even before its first step, which a generator would not."""

    def __init__(self, streamer: SledAudioStreamer):
        self._streamer = streamer

    def __iter__(self) -> _AudioIterator:
        return self

    def __next__(self) -> Tensor:
        return next(self._streamer)

    def __del__(self) -> None:
        self._streamer.close()


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
