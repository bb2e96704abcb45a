"""Speech generation: arguments in, the engine driven, audio out."""

import asyncio
import contextlib
import copy
import itertools
import json
import math
import queue
import threading
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import CompileConfig, EncodecModel, GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .codec_sled import SledAudioChunker, decode_latents
from .engine_sled import SledEngine, SledFrame, SledNoise, SledRow, get_frame_budget
from .pauses_sled import limit_pauses
from .text_sled import SledTextPart, SledTextSource


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_sled import SledForSpeechSynthesis
    from .processing_sled import SledProcessor

logger = logging.get_logger(__name__)

# Probability of the end of speech from which a frame ends it: what the original's two generation scripts use.
OFFLINE_EOS_THRESHOLD = 0.8
INTERLEAVED_EOS_THRESHOLD = 0.5

# Generation parameters that SLED obeys, and what the base class keeps beside them.
OBEYED_PARAMETERS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "max_time",
    "do_sample",
    "temperature",
    "guidance_scale",
    "eos_threshold",
    "num_return_sequences",
    "return_dict_in_generate",
    "use_cache",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "transformers_version",
)

# Those that change logits, which SLED has none of, with the values that change none.
LOGITS_PARAMETERS: dict[str, Any] = {
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "renormalize_logits": None,
    "remove_invalid_values": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "diversity_penalty": 0.0,
    "early_stopping": False,
}

# Values of further parameters that ask for nothing.
IDLE_VALUES: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}

VOICE_ARGUMENTS = (
    "prompt_text",
    "prompt_audio",
    "prompt_latents",
    "prompt_latents_mask",
    "sampling_rate",
    "voice_preset",
)

# What a stream's events are beside waveforms: a step that completes none, and a wait for text.
WORKING, NEEDS_TEXT = object(), object()


@dataclass
class SledGenerateOutput(ModelOutput):
    """
    Output of [`SledForSpeechSynthesis.generate`] with `return_dict_in_generate=True`.

    Args:
        audio (`list[torch.FloatTensor]`):
            One waveform per row, `(num_samples,)`, in float32 at the codec's sampling rate, without the voice prompt.
            Empty where the speech ends at once.
        latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`):
            The generated speech latents without the voice prompt, the frame that signals the end included, zero after it.
        eos_logits (`torch.FloatTensor` of shape `(batch_size, num_frames)`):
            End-of-speech logit of every generated frame, zero after the end.
        latents_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`):
            1 for frames that are heard, 0 for the ones that signal an end, for quiet that is left out between two parts of
            a text, and for padding.
    """

    audio: list[torch.Tensor] | None = None
    latents: torch.Tensor | None = None
    eos_logits: torch.Tensor | None = None
    latents_mask: torch.Tensor | None = None


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
            Duration in seconds of every waveform but the first few, which are shorter, and the last.
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

    def __init__(
        self, model: "PreTrainedModel | EncodecModel", chunk_duration: float = 0.2, timeout: float | None = None
    ):
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        codec = next((module for module in modules if isinstance(module, EncodecModel)), None)
        if codec is None:
            raise ValueError(f"`model` must be a model with an `EncodecModel`, or one, got {type(model).__name__}.")
        if timeout is not None and (not isinstance(timeout, int | float) or not 0 < timeout < math.inf):
            raise ValueError(f"`timeout` must be a positive, finite number of seconds, got {timeout!r}.")
        self.timeout = timeout
        self._chunker: SledAudioChunker | None = SledAudioChunker(codec, chunk_duration)
        # Waveforms, then None at the end or the error that ended the generation. A `SimpleQueue`, whose `put` may run
        # inside itself, because the garbage collector may call `close` at any point.
        self._queue: queue.SimpleQueue[torch.Tensor | BaseException | None] = queue.SimpleQueue()
        self._is_exhausted = False
        self.closed = False

    def put(self, value: torch.Tensor, is_prompt: bool = False) -> None:
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
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[0] > 1:
            raise ValueError(f"`SledAudioStreamer` only supports batch size 1, got {value.shape[0]}.")
        for waveform in chunker.push(value, is_prompt):
            self._queue.put(waveform)

    def end_part(self) -> None:
        """Called by `generate` after a part of the text, to which another may follow."""
        chunker = self._chunker
        if chunker is not None:
            chunker.end_part()

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

    def __next__(self) -> torch.Tensor:
        if self.closed or self._is_exhausted:
            raise StopIteration
        try:
            item = self._queue.get(timeout=self.timeout)
        except queue.Empty:
            raise queue.Empty(f"No audio came within the `timeout` of {self.timeout} seconds.") from None
        if isinstance(item, torch.Tensor) and not self.closed:
            return item
        self._is_exhausted = True
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def __iter__(self) -> Iterator[torch.Tensor]:
        return _AudioIterator(self)


class _AudioIterator:
    """Closes the streamer when the consumer drops it, even before its first step, which a generator would not."""

    def __init__(self, streamer: SledAudioStreamer):
        self._streamer = streamer

    def __iter__(self) -> "_AudioIterator":
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._streamer)

    def __del__(self) -> None:
        self._streamer.close()


class SledParts(Protocol):
    """
    Parts of a text, whether there are no more to come, and how many tokens at the start of each say what the voice prompt
    says: a [`SledTextSource`], or [`SledKnownParts`].
    """

    parts: list[SledTextPart]
    is_finished: bool

    @property
    def num_prompt_tokens(self) -> int: ...


@dataclass
class SledKnownParts:
    """Parts of a text that is there as a whole."""

    parts: list[SledTextPart]
    is_finished: bool = True
    num_prompt_tokens: int = 0


class SledUtterance:
    """
    What is said for one text: its parts in turn. So that the voice stays, each goes on from the voice prompt, if it begins
    with what that says, and else from the whole part before it.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        text ([`SledTextSource`] or [`SledKnownParts`]):
            The parts, which may still be arriving.
        prompt (`torch.FloatTensor` of shape `(num_frames, latent_dim)`, *optional*):
            The voice prompt, in float32.
        config ([`~transformers.GenerationConfig`]):
            What it is generated with.
        noise ([`SledNoise`]):
            Where its noise comes from.
        noise_index (`int`, *optional*, defaults to 0):
            Its row of the noise.
        criteria ([`~transformers.StoppingCriteriaList`], *optional*):
            Criteria that end it.
    """

    def __init__(
        self,
        model: "SledForSpeechSynthesis",
        text: SledParts,
        prompt: torch.Tensor | None,
        config: GenerationConfig,
        noise: SledNoise,
        noise_index: int = 0,
        criteria: StoppingCriteriaList | None = None,
    ) -> None:
        self.model = model
        self.text = text
        self.prompt = prompt
        self.config = config
        self.noise = noise
        self.noise_index = noise_index
        self.criteria = criteria
        # The part that is being said, and how many have been.
        self.row: SledRow | None = None
        self.num_parts_said = 0
        self.num_frames = 0
        self.is_finished = False
        # Ended by the frames that the model has room for, or that its text can take, and not by the model.
        self.is_cut_off = False
        # Frames heard in the part before, the voice prompt included, and in this one.
        self._previous_frames: torch.Tensor | None = None
        self._frames: list[torch.Tensor] = []

    def join(self, engine: SledEngine) -> None:
        """
        Lets the next part join once the one before it has ended and it has begun to arrive. Sets `is_finished` where
        there is no other.

        Args:
            engine ([`SledEngine`]):
                The engine.
        """
        if self.row is not None or self.is_finished:
            return
        if self.num_parts_said == len(self.text.parts):
            self.is_finished = self.text.is_finished
            return
        part = self.text.parts[self.num_parts_said]
        if not part.ids and not part.is_complete:
            return
        max_frames = self.config.max_new_tokens
        if max_frames is not None:
            max_frames -= self.num_frames
            if max_frames <= 0:
                self.is_finished = True
                return
        primed_ids, prompt = self._prime(part)
        self._frames = [] if self.num_parts_said > 0 or prompt is None else list(prompt)
        self.row = SledRow(
            part,
            self.config,
            self.noise,
            self.noise_index,
            self.criteria,
            primed_ids,
            prompt,
            self._get_min_frames(part, primed_ids, prompt),
            max_frames,
            self.num_frames,
            len(primed_ids) or self.text.num_prompt_tokens,
        )
        engine.join(self.row)

    def _prime(self, part: SledTextPart) -> tuple[list[int], torch.Tensor | None]:
        """
        The ids and frames that a part is primed with: the voice prompt, or the whole part before it, which is left out where
        it was silent or leaves too little room.
        """
        if self.num_parts_said == 0 or self.text.num_prompt_tokens > 0:
            return [], self.prompt
        previous_ids = self.text.parts[self.num_parts_said - 1].ids
        previous_frames = self._previous_frames
        if previous_frames is None:
            return [], None
        expected_frames = math.ceil(len(part.ids) * len(previous_frames) / len(previous_ids))
        num_positions = len(previous_ids) + len(part.ids) + len(previous_frames) + expected_frames
        if num_positions > self.model.config.max_position_embeddings:
            return [], None
        return previous_ids[:-1], previous_frames

    def _get_min_frames(self, part: SledTextPart, primed_ids: list[int], prompt: torch.Tensor | None) -> int:
        """Only the last part is held on to."""
        is_last = self.text.is_finished and self.num_parts_said == len(self.text.parts) - 1
        if part.is_complete and not is_last:
            return 0
        num_given = len(primed_ids) + len(part.ids) + (0 if prompt is None else len(prompt))
        return max(0, (self.config.min_new_tokens or 0) - self.num_frames, (self.config.min_length or 0) - num_given)

    def take(self, frame: SledFrame) -> None:
        """
        Takes what a step has given its row.

        Args:
            frame ([`SledFrame`]):
                The frame.
        """
        row = self.row
        assert row is not None
        self.num_frames += 1
        if frame.is_heard:
            self._frames.append(frame.latents)
        if not row.has_ended:
            return
        self._previous_frames = torch.stack([one.float() for one in self._frames]) if self._frames else None
        self._frames = []
        self.num_parts_said += 1
        # The end of a part that is still being written is final.
        self.is_finished = row.is_stopped or not row.part.is_complete
        self.is_cut_off = self.is_cut_off or (row.is_cut_off and row.num_frames != row.max_frames)
        self.row = None

    def leave(self, engine: SledEngine) -> None:
        """
        Gives the utterance up.

        Args:
            engine ([`SledEngine`]):
                The engine.
        """
        self.is_finished = True
        if self.row is not None and self.row in engine.rows:
            engine.leave(self.row)
        self.row = None

    def needs_text(self, engine: SledEngine) -> bool:
        """
        Whether it cannot go on before more text has arrived.

        Args:
            engine ([`SledEngine`]):
                The engine.

        Returns:
            `bool`: `True` if it waits.
        """
        if self.row is None:
            return not self.is_finished
        return engine.needs_text(self.row)


class _Recording:
    """All frames of one row of `generate`, those of a part that has ended in one piece."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []
        self.eos_logits: list[torch.Tensor] = []
        self.is_heard: list[bool] = []
        # Number of heard frames up to the end of each part.
        self.part_ends: list[int] = []

    def add(self, frame: SledFrame, ends_part: bool) -> None:
        self.latents.append(frame.latents[None])
        self.eos_logits.append(frame.eos_logit[None])
        self.is_heard.append(frame.is_heard)
        if ends_part:
            num_pieces = len(self.part_ends)
            for pieces in (self.latents, self.eos_logits):
                pieces[num_pieces:] = [torch.cat(pieces[num_pieces:])]
            self.part_ends.append(sum(self.is_heard))


class SledGenerationMixin(GenerationMixin):
    """Speech generation for [`SledForSpeechSynthesis`]."""

    generation_config: GenerationConfig
    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    @torch.no_grad()
    def generate(
        self: "SledForSpeechSynthesis",
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_values: torch.FloatTensor | None = None,
        prompt_values_mask: torch.Tensor | None = None,
        prompt_latents: torch.FloatTensor | None = None,
        prompt_latents_mask: torch.Tensor | None = None,
        num_prompt_tokens: torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: SledAudioStreamer | None = None,
        synced_gpus: bool | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor] | SledGenerateOutput:
        r"""
        Speaks texts, each in the voice of its prompt if it has one.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Text token ids from [`SledProcessor`]. A row may hold several parts of a long text, each with its own
                start and end token: they are spoken in turn.
            attention_mask (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for a token, 0 for padding on either side.
            prompt_values (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`, *optional*):
                Voice prompts at the codec's sampling rate, one for each row or one for all. The text starts with what
                they say.
            prompt_values_mask (`torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for a sample, 0 for padding.
            prompt_latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`, *optional*):
                Voice prompts from [`~SledForSpeechSynthesis.encode_prompt`], instead of `prompt_values`.
            prompt_latents_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for a frame, 0 for padding.
            num_prompt_tokens (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Number of tokens at the start of every part of a row that say what its voice prompt says, so that each part
                goes on from the prompt. By default only the first part does, and a later one is primed with the part
                before it.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of the noise. One generator draws for the whole batch. A list has one for each row (and each of its
                `num_return_sequences`), which draws for that row alone, so that a row does not depend on the others.
            generation_config ([`~transformers.GenerationConfig`], *optional*):
                Configuration to use instead of keyword arguments.
            stopping_criteria ([`~transformers.StoppingCriteriaList`], *optional*):
                Further criteria. They see placeholder ids, one for each frame so far, and the end-of-speech logits.
            streamer ([`SledAudioStreamer`], *optional*):
                Receives the audio of a single row as it is made. If its consumer leaves, generation stops and returns
                nothing.
            kwargs:
                Generation parameters. `guidance_scale` (2.0; 1 is off), `temperature` (1.0; scale of the noise),
                `do_sample` (`True`; `False` is zero noise), `eos_threshold` (probability that ends the speech),
                `max_new_tokens` (frames to generate at most, all parts together, the one that signals the end included;
                by default it follows from the length of the text), `min_new_tokens` (frames before which no end is
                accepted), `num_return_sequences`, `max_time`, `cache_implementation`, `use_cache`,
                `return_dict_in_generate`.

        Returns:
            `list[torch.FloatTensor]` or [`SledGenerateOutput`]: one waveform per row, in float32 at the codec's sampling
            rate, without the prompt and cut at its end. Copies from `num_return_sequences` are adjacent.

        Raises:
            `ValueError`: if an argument has another type or shape or is out of range, or a text does not fit the
            positions.

        Example:

        ```python
        >>> inputs = processor("Hello, world.", return_tensors="pt")
        >>> audio = model.generate(**inputs, generator=torch.Generator().manual_seed(0))
        >>> processor.save_audio(audio, ["hello.wav"])
        ```
        """
        if streamer is not None and not isinstance(streamer, SledAudioStreamer):
            raise ValueError(f"`streamer` must be a `SledAudioStreamer`, got {type(streamer).__name__}.")
        try:
            config = prepare_generation_config(self, generation_config, kwargs)
            texts = self._get_texts(input_ids, attention_mask, config)
            prompts = self._get_prompts(
                len(texts), prompt_values, prompt_values_mask, prompt_latents, prompt_latents_mask
            )
            copies = config.num_return_sequences or 1
            prompt_token_counts = _get_counts(num_prompt_tokens, texts)
            texts = [parts for parts in texts for _ in range(copies)]
            prompts = [prompt for prompt in prompts for _ in range(copies)]
            prompt_token_counts = [count for count in prompt_token_counts for _ in range(copies)]
            noises = get_noises(self, config, generator, len(texts))
            if streamer is not None and len(texts) > 1:
                raise ValueError(f"`streamer` takes a single row, but there are {len(texts)}.")
            for parts, prompt, count in zip(texts, prompts, prompt_token_counts, strict=True):
                if count > 0 and prompt is None:
                    raise ValueError("`num_prompt_tokens` needs a voice prompt, `prompt_values` or `prompt_latents`.")
                for index, part in enumerate(parts):
                    is_prompted = index == 0 or count > 0
                    self._check_fits(config, len(part), len(prompt) if prompt is not None and is_prompted else 0)
            criteria = get_criteria(config, stopping_criteria)
            utterances = [
                SledUtterance(
                    self,
                    SledKnownParts([SledTextPart(ids) for ids in parts], num_prompt_tokens=count),
                    prompt,
                    config,
                    *noise,
                    criteria,
                )
                for parts, count, prompt, noise in zip(texts, prompt_token_counts, prompts, noises, strict=True)
            ]
            recordings = self._record(utterances, config, streamer, _is_synced(self, synced_gpus))
            if streamer is not None:
                if streamer.closed:
                    recordings = [_Recording()]
                # Before the whole is decoded once more for the return value.
                streamer.end()
        except BaseException as error:
            if streamer is not None:
                streamer.end(error)
            raise
        output = self._collect(recordings, prompts)
        if streamer is None or not streamer.closed:
            _warn_of_ends(utterances, output)
        return output if config.return_dict_in_generate else list(output.audio or ())

    def stream(
        self: "SledForSpeechSynthesis",
        text: str | Iterable[str],
        processor: "SledProcessor",
        chunk_duration: float = 0.2,
        max_duration: float | None = None,
        **kwargs: Any,
    ) -> Generator[torch.Tensor, None, None]:
        r"""
        Speaks a text and yields the audio as it is made. Joined, the waveforms are what `generate` returns.

        An interleaved model takes its text piece by piece as well: it pulls the next pieces when it has spoken the
        earlier ones, and starts to speak after its first `config.text_chunk_size` tokens. All work is done in the
        caller's thread, when the next waveform is asked for; leaving the loop ends it.

        Args:
            text (`str` or an iterable of `str`):
                The text, or pieces of it, cut anywhere. An offline model waits for the last piece.
            processor ([`SledProcessor`]):
                The model's processor.
            chunk_duration (`float`, *optional*, defaults to 0.2):
                Duration in seconds of every waveform but the last and the first few, of which the first comes as early as
                possible and each has up to twice as much as the one before.
            max_duration (`float`, *optional*):
                Duration in seconds after which the speech is cut off. A source that never ends needs one.
            kwargs:
                The voice, as the processor takes it (`voice_preset`, or `prompt_text` with `prompt_audio` and
                `sampling_rate` or with `prompt_latents` and `prompt_latents_mask`), `generator`, `generation_config`, `stopping_criteria`, and
                generation parameters as [`~SledGenerationMixin.generate`] takes them.

        Yields:
            `torch.FloatTensor` of shape `(num_samples,)`: the next waveform, in float32 on the CPU, at the codec's
            sampling rate.

        Raises:
            `ValueError`: if an argument has another type or is out of range, the text is empty, or its source yields
            something else than strings or, for an offline model, goes on without end.

        Example:

        ```python
        >>> for waveform in model.stream("Hello, world.", processor=processor):
        ...     print(waveform.shape)
        ```
        """
        pieces = get_pieces(text)
        request = SledStreamRequest(self, text, processor, max_duration, kwargs)
        chunker = SledAudioChunker(self.get_codec(), chunk_duration)
        utterance, source = request.prepare()
        return _drive(_run_stream(utterance, chunker, make_engine(self, request.config, [utterance])), source, pieces)

    def astream(
        self: "SledForSpeechSynthesis",
        text: str | Iterable[str] | AsyncIterable[str],
        processor: "SledProcessor",
        chunk_duration: float = 0.2,
        max_duration: float | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[torch.Tensor, None]:
        r"""
        [`~SledGenerationMixin.stream`] for `async for`: generation runs in a thread and does not block the event loop.

        Args:
            text (`str`, an iterable or an asynchronous iterable of `str`):
                The text, or pieces of it, cut anywhere. An iterable is waited for in a thread.
            processor ([`SledProcessor`]):
                The model's processor.
            chunk_duration (`float`, *optional*, defaults to 0.2):
                Duration in seconds of every waveform but the first few and the last.
            max_duration (`float`, *optional*):
                Duration in seconds after which the speech is cut off.
            kwargs:
                As for [`~SledGenerationMixin.stream`].

        Yields:
            `torch.FloatTensor` of shape `(num_samples,)`: the next waveform.

        Raises:
            `ValueError`: as [`~SledGenerationMixin.stream`].

        Example:

        ```python
        >>> async def speak(text):
        ...     async for waveform in model.astream(text, processor=processor):
        ...         print(waveform.shape)
        ```
        """
        pieces = aiter(text) if isinstance(text, AsyncIterable) else get_pieces(text)
        request = SledStreamRequest(self, text, processor, max_duration, kwargs)
        chunker = SledAudioChunker(self.get_codec(), chunk_duration)

        def start() -> tuple[Generator[Any, None, None], SledTextSource]:
            utterance, source = request.prepare()
            return _run_stream(utterance, chunker, make_engine(self, request.config, [utterance])), source

        return _drive_async([start], pieces, _Worker(self.device.type))

    @torch.no_grad()
    def compile_generation(self: "SledForSpeechSynthesis", compile_config: CompileConfig | None = None) -> None:
        r"""
        Compiles the step of generation ahead, so that nobody waits for it: `generate`, `stream`, `astream` and
        [`SledStreamServer`] use it from then on (`generation_config.compile_config`). On two cores this takes a minute at
        the released size, once: PyTorch keeps the compiled code on disk for later processes (`TORCHINDUCTOR_CACHE_DIR`).
        `disable_compile=True` leaves it out in a call.

        Args:
            compile_config ([`~transformers.CompileConfig`], *optional*):
                Options of `torch.compile`. By default the code serves all lengths and numbers of rows and uses no CUDA
                graphs, which would belong to one thread.

        Example:

        ```python
        >>> model.compile_generation()
        >>> audio = model.generate(**inputs)
        ```
        """
        compile_config = get_default_compile_config() if compile_config is None else compile_config
        engine = SledEngine(self, compile_config=compile_config)
        config = GenerationConfig(guidance_scale=2.0)
        config.eos_threshold = 1.0
        noise = SledNoise(None, 1, self.config.noise_dim, 0.0, self.device)
        # More rows than one, and more positions than rows: the compiler takes equal sizes for the same, and one for a case of
        # its own.
        part, prompt = SledTextPart([0, 0]), torch.zeros(20, self.config.latent_dim, device=self.device)
        for _ in range(3):
            engine.join(SledRow(part, config, noise, prompt=prompt, max_frames=4))
        # What starts, in the first of these steps, is not compiled.
        for _ in logging.tqdm(range(3), desc="Compiling generation"):
            engine.step()
        self.generation_config.compile_config = compile_config

    def _record(
        self: "SledForSpeechSynthesis",
        utterances: list[SledUtterance],
        config: GenerationConfig,
        streamer: SledAudioStreamer | None,
        synced_gpus: bool,
    ) -> list[_Recording]:
        """Says all utterances in one batch."""
        engine = make_engine(self, config, utterances, synced_gpus)
        recordings = {utterance: _Recording() for utterance in utterances}
        if streamer is not None and utterances[0].prompt is not None:
            streamer.put(utterances[0].prompt[None], is_prompt=True)
        while True:
            speaking = {}
            for utterance in utterances:
                utterance.join(engine)
                if utterance.row is not None:
                    speaking[utterance.row] = utterance
            if not speaking:
                break
            for row, frame in engine.step():
                speaking[row].take(frame)
                recordings[speaking[row]].add(frame, row.has_ended)
                if streamer is not None and frame.is_heard:
                    streamer.put(frame.latents[None, None])
                if streamer is not None and row.has_ended:
                    streamer.end_part()
            if streamer is not None and streamer.closed:
                break
        engine.run_idle_steps()
        return list(recordings.values())

    def _collect(
        self: "SledForSpeechSynthesis", recordings: list[_Recording], prompts: list[torch.Tensor | None]
    ) -> SledGenerateOutput:
        """Pads what was recorded into one batch and decodes it."""
        num_frames = max(len(recording.is_heard) for recording in recordings)
        shape = (len(recordings), num_frames)
        latents = torch.zeros(*shape, self.config.latent_dim, dtype=self.dtype, device=self.device)
        eos_logits = torch.zeros(shape, device=self.device)
        mask = torch.zeros(shape, dtype=torch.long, device=self.device)
        sequences = []
        for row, (recording, prompt) in enumerate(zip(recordings, prompts, strict=True)):
            length = len(recording.is_heard)
            if length > 0:
                latents[row, :length] = torch.cat(recording.latents)
                eos_logits[row, :length] = torch.cat(recording.eos_logits)
                mask[row, :length] = torch.tensor(recording.is_heard, device=self.device).long()
            sequence = latents[row, mask[row].bool()].float()
            sequences.append(sequence if prompt is None else torch.cat([prompt, sequence]))
        codec = self.get_codec()
        audio = []
        decoded = zip(recordings, decode_latents(codec, sequences), prompts, strict=True)
        for row, (recording, waveform, prompt) in enumerate(decoded):
            if prompt is not None:
                waveform = waveform[len(prompt) * codec.config.hop_length :]
            if len(recording.part_ends) > 1:
                waveform, dropped_frames = limit_pauses(
                    waveform, recording.part_ends, codec.config.hop_length, codec.config.sampling_rate
                )
                mask[row, mask[row].nonzero()[dropped_frames]] = 0
            elif prompt is not None:
                # A copy, because a view would keep the prompt's audio in memory.
                waveform = waveform.clone()
            audio.append(waveform)
        return SledGenerateOutput(audio=audio, latents=latents, eos_logits=eos_logits, latents_mask=mask)

    def _get_texts(
        self: "SledForSpeechSynthesis",
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        config: GenerationConfig,
    ) -> list[list[list[int]]]:
        """Token ids of every part of every row, without padding."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or 0 in input_ids.shape:
            found = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"`input_ids` must be a tensor of shape (batch_size, num_tokens), got {found}.")
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise ValueError(f"`input_ids` must hold integers, got {input_ids.dtype}.")
        if attention_mask is None:
            pad_token_id = config.pad_token_id
            is_padding = torch.zeros_like(input_ids, dtype=torch.bool)
            if pad_token_id is not None and pad_token_id != self.config.eos_token_id:
                is_padding = input_ids == pad_token_id
            attention_mask = ~is_padding
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            found = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
            raise ValueError(
                f"`attention_mask` must be of the shape of `input_ids`, {tuple(input_ids.shape)}, got {found}."
            )
        texts = []
        for row_ids, mask in zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True):
            ids = [token for token, is_real in zip(row_ids, mask, strict=True) if is_real]
            if not ids:
                raise ValueError("`input_ids` has a row without any token.")
            if min(ids) < 0 or max(ids) >= self.config.vocab_size:
                raise ValueError(
                    f"`input_ids` must be between 0 and {self.config.vocab_size - 1}, got {min(ids)} to {max(ids)}."
                )
            starts = [0, *(index for index in range(1, len(ids)) if ids[index] == self.config.bos_token_id), len(ids)]
            texts.append([ids[start:end] for start, end in itertools.pairwise(starts)])
        return texts

    def _get_prompts(
        self: "SledForSpeechSynthesis",
        num_rows: int,
        prompt_values: torch.Tensor | None,
        prompt_values_mask: torch.Tensor | None,
        prompt_latents: torch.Tensor | None,
        prompt_latents_mask: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """Voice prompts as float32 latents (num_frames, latent_dim), one for each row."""
        if prompt_values is not None and prompt_latents is not None:
            raise ValueError("Give a voice prompt either as `prompt_values` or as `prompt_latents`.")
        if prompt_values_mask is not None and prompt_values is None:
            raise ValueError("`prompt_values_mask` needs `prompt_values`.")
        if prompt_latents_mask is not None and prompt_latents is None:
            raise ValueError("`prompt_latents_mask` needs `prompt_latents`.")
        name = "prompt_latents" if prompt_values is None else "prompt_values"
        if prompt_values is not None:
            prompt_latents, prompt_latents_mask = self.encode_prompt(prompt_values, prompt_values_mask).to_tuple()
        if prompt_latents is None:
            return [None] * num_rows
        latent_dim = self.config.latent_dim
        if prompt_latents.ndim != 3 or prompt_latents.shape[-1] != latent_dim or 0 in prompt_latents.shape:
            raise ValueError(
                f"`prompt_latents` must be of shape (batch_size, num_frames, {latent_dim}), got "
                f"{tuple(prompt_latents.shape)}."
            )
        if prompt_latents_mask is None:
            prompt_latents_mask = torch.ones(prompt_latents.shape[:2])
        if prompt_latents_mask.shape != prompt_latents.shape[:2]:
            raise ValueError(
                f"`prompt_latents_mask` must be of shape {tuple(prompt_latents.shape[:2])}, got "
                f"{tuple(prompt_latents_mask.shape)}."
            )
        if len(prompt_latents) not in (1, num_rows):
            raise ValueError(
                f"`{name}` must have one row, or one for each of the {num_rows} texts, got {len(prompt_latents)}."
            )
        if not torch.isfinite(prompt_latents).all():
            raise ValueError("`prompt_latents` has values that are not finite.")
        prompts: list[torch.Tensor | None] = []
        for latents, mask in zip(prompt_latents, prompt_latents_mask.bool(), strict=True):
            if not mask.any():
                raise ValueError(f"`{name}` has a row without any frame.")
            prompts.append(latents[mask.to(latents.device)].to(self.device, torch.float32))
        return prompts * num_rows if len(prompts) == 1 else prompts

    def _check_fits(
        self: "SledForSpeechSynthesis", config: GenerationConfig, num_tokens: int, num_prompt_frames: int
    ) -> None:
        num_positions = get_num_positions(self, config)
        if num_tokens + num_prompt_frames < num_positions:
            return
        if num_prompt_frames > 0:
            raise ValueError(
                f"The voice prompt of {num_prompt_frames} frames and the text of {num_tokens} tokens in `input_ids` leave no "
                f"room for speech in {num_positions} positions. Give a shorter voice prompt."
            )
        raise ValueError(
            f"`input_ids` has a text of {num_tokens} tokens, which leaves no room for speech in {num_positions} positions. "
            "The processor splits long text into parts."
        )

    def fill_generation_config(self: "SledForSpeechSynthesis") -> None:
        """Sets what the generation config leaves open to SLED's defaults."""
        defaults = {
            "do_sample": True,
            "guidance_scale": 2.0,
            "eos_threshold": INTERLEAVED_EOS_THRESHOLD if self.config.is_interleaved else OFFLINE_EOS_THRESHOLD,
            # Keeps `pipeline` from setting its own limit of 256 new tokens, 3.4 seconds of speech.
            "max_length": self.config.max_position_embeddings,
            "bos_token_id": self.config.bos_token_id,
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id,
        }
        # Anew, without the mark of having been derived from the model's configuration, for which `from_pretrained` would
        # leave `eos_threshold` unread.
        parameters = json.loads(self.generation_config.to_json_string(use_diff=False, ignore_metadata=True))
        given = {name: value for name, value in parameters.items() if value is not None}
        self.generation_config = GenerationConfig.from_dict({**defaults, **given})

    def adjust_generation_fn(
        self: "SledForSpeechSynthesis", *args: Any, build_codec: bool = True, **kwargs: Any
    ) -> None:
        """
        Called by `from_pretrained` to load the generation config; the released one sets none of SLED's parameters.
        `build_codec` is the model's own argument, which the base class would add to the parameters.
        """
        super().adjust_generation_fn(*args, **kwargs)
        self.fill_generation_config()


class SledStreamRequest:
    """
    What a stream is to say and how. The arguments are checked at once; [`~SledStreamRequest.prepare`] reads text and
    voice, which takes a while.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        text (`str` or anything else):
            The text. What is no string arrives piece by piece.
        processor ([`SledProcessor`]):
            The model's processor.
        max_duration (`float`, *optional*):
            Duration in seconds after which the speech is cut off.
        kwargs (`dict`):
            The voice, `generator`, `generation_config`, `stopping_criteria`, and generation parameters.

    Raises:
        `ValueError`: if an argument has another type or is out of range.
    """

    def __init__(
        self,
        model: "SledForSpeechSynthesis",
        text: object,
        processor: "SledProcessor",
        max_duration: float | None,
        kwargs: dict[str, Any],
    ) -> None:
        if not hasattr(processor, "split_text"):
            raise ValueError(f"`processor` must be a `SledProcessor`, got {type(processor).__name__}.")
        if max_duration is not None and not (isinstance(max_duration, int | float) and 0 < max_duration < math.inf):
            raise ValueError(f"`max_duration` must be a positive number of seconds, got {max_duration!r}.")
        self.model = model
        self.processor = processor
        self.text = text if isinstance(text, str) else None
        self.voice = {name: kwargs.pop(name) for name in VOICE_ARGUMENTS if name in kwargs}
        generator = kwargs.pop("generator", None)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` must be a `torch.Generator`, got {type(generator).__name__}.")
        stopping_criteria = kwargs.pop("stopping_criteria", None)
        self.config = prepare_generation_config(model, kwargs.pop("generation_config", None), kwargs)
        if (self.config.num_return_sequences or 1) != 1:
            raise ValueError(f"`num_return_sequences` must be 1, got {self.config.num_return_sequences}.")
        if max_duration is not None:
            codec_config = model.get_codec().config
            max_frames = math.ceil(max_duration * codec_config.sampling_rate / codec_config.hop_length)
            self.config.max_new_tokens = min(max_frames, self.config.max_new_tokens or max_frames)
        self.criteria = get_criteria(self.config, stopping_criteria)
        self.noise = get_noises(model, self.config, generator, 1)[0]

    def prepare(self) -> tuple[SledUtterance, SledTextSource]:
        """
        Reads the text, if that is a string, and the voice.

        Returns:
            `tuple(SledUtterance, SledTextSource)`: what is said, and where its text comes from.

        Raises:
            `ValueError`: if the text is empty, or the voice cannot be used.
        """
        model, processor = self.model, self.processor
        # Also where the text is yet to come, to check the voice and prepare it.
        voice = processor.get_voice(**self.voice)
        inputs = processor("a" if self.text is None else self.text, **voice)
        prompt_names = ("prompt_values", "prompt_values_mask", "prompt_latents", "prompt_latents_mask")
        (prompt,) = model._get_prompts(1, *(inputs.get(name) for name in prompt_names))
        num_prompt_frames = 0 if prompt is None else len(prompt)
        source = SledTextSource(processor, voice.get("prompt_text"), num_prompt_frames, model.config.is_interleaved)
        if self.text is not None:
            for ids in model._get_texts(inputs["input_ids"], inputs["attention_mask"], self.config)[0]:
                is_prompted = not source.parts or source.num_prompt_tokens > 0
                model._check_fits(self.config, len(ids), num_prompt_frames if is_prompted else 0)
                source.parts.append(SledTextPart(ids))
            source.is_finished = True
        return SledUtterance(model, source, prompt, self.config, *self.noise, self.criteria), source


def prepare_generation_config(
    model: "SledForSpeechSynthesis", generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    """
    Puts together what an utterance is generated with: keyword arguments, then a configuration that is given, then the
    model's.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            Configuration to use instead of the model's.
        kwargs (`dict`):
            Generation parameters. Scalars of numpy and torch count as numbers.

    Returns:
        [`~transformers.GenerationConfig`]: the configuration, a copy.

    Raises:
        `ValueError`: if an argument is unknown, out of range, or asks for something that does not apply to SLED.
    """
    kwargs = {name: _get_scalar(value) for name, value in kwargs.items()}
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(f"`generation_config` must be a `GenerationConfig`, got {type(generation_config).__name__}.")
    config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    unused = {name: value for name, value in config.update(**kwargs).items() if value is not None}
    if unused:
        names = ", ".join(f"`{name}`" for name in sorted(unused))
        raise ValueError(f"Arguments that SLED does not take: {names}.")
    _check_generation_config(model, config)
    return config


def _get_scalar(value: Any) -> Any:
    is_scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0)
    return value.item() if is_scalar else value


def _check_generation_config(model: "SledForSpeechSynthesis", config: GenerationConfig) -> None:
    def check(name: str, is_valid: bool, accepted: str) -> None:
        if not is_valid:
            raise ValueError(f"`{name}` must be {accepted}, got {getattr(config, name)!r}.")

    def is_number(name: str, minimum: float = 0, maximum: float = math.inf) -> bool:
        value = getattr(config, name)
        is_real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_real and minimum <= value <= maximum

    def is_count(name: str, minimum: int) -> bool:
        value = getattr(config, name)
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= minimum)

    check("guidance_scale", is_number("guidance_scale"), "finite and at least 0")
    check("temperature", config.temperature is None or is_number("temperature"), "finite and at least 0")
    check("eos_threshold", is_number("eos_threshold", maximum=1), "a probability between 0 and 1")
    check("max_new_tokens", is_count("max_new_tokens", 1), "a whole number of frames, at least 1")
    check("min_new_tokens", is_count("min_new_tokens", 0), "a whole number of frames, at least 0")
    check("max_length", is_count("max_length", 1), "a whole number of positions, at least 1")
    check("min_length", is_count("min_length", 0), "a whole number of positions, at least 0")
    check("num_return_sequences", is_count("num_return_sequences", 1), "a whole number, at least 1")
    check("max_time", config.max_time is None or is_number("max_time"), "finite and at least 0 seconds")
    check(
        "cache_implementation",
        config.cache_implementation in (None, "dynamic", "static"),
        "'dynamic', which grows, or 'static', of fixed size",
    )
    if (config.min_new_tokens or 0) > (config.max_new_tokens or math.inf):
        raise ValueError(
            f"`min_new_tokens` must not be above `max_new_tokens`, got {config.min_new_tokens} and "
            f"{config.max_new_tokens}."
        )
    for name in ("bos_token_id", "eos_token_id"):
        expected = getattr(model.config, name)
        check(name, getattr(config, name) in (None, expected, [expected]), f"the model's own, {expected}")
    for name, value in vars(config).items():
        if name in OBEYED_PARAMETERS or name.startswith("_") or name == "eos_threshold":
            continue
        if name in LOGITS_PARAMETERS:
            if value is not None and value != LOGITS_PARAMETERS[name]:
                logger.warning_once(
                    f"`{name}` is set to {value!r}, but SLED generates latents without logits: it has no effect."
                )
        elif value is not None and value is not False and (name not in IDLE_VALUES or value != IDLE_VALUES[name]):
            raise ValueError(f"`{name}` does not apply to SLED, got {value!r}.")


def get_num_positions(model: "SledForSpeechSynthesis", config: GenerationConfig) -> int:
    """
    Positions that text, voice prompt and speech of a part may take together.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        config ([`~transformers.GenerationConfig`]):
            What it is generated with.

    Returns:
        `int`: the model's positions, or `max_length` where that is less.
    """
    return min(model.config.max_position_embeddings, config.max_length or model.config.max_position_embeddings)


def get_criteria(config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None) -> StoppingCriteriaList:
    """
    Stopping criteria of one call, for all its rows and parts together. `max_time` starts now.

    Args:
        config ([`~transformers.GenerationConfig`]):
            What it is generated with.
        stopping_criteria ([`~transformers.StoppingCriteriaList`], *optional*):
            Further criteria.

    Returns:
        [`~transformers.StoppingCriteriaList`]: the criteria.
    """
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    return criteria


def get_noises(
    model: "SledForSpeechSynthesis",
    config: GenerationConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    num_rows: int,
) -> list[tuple[SledNoise, int]]:
    """
    Where the noise of every row comes from.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        config ([`~transformers.GenerationConfig`]):
            What it is generated with.
        generator (`torch.Generator` or a list of them, *optional*):
            One for all rows, or one for each.
        num_rows (`int`):
            Number of rows.

    Returns:
        `list[tuple[SledNoise, int]]`: for every row the source, and its row in it.

    Raises:
        `ValueError`: if `generator` is something else, or not one for each row.
    """
    scale = 1.0 if config.temperature is None else float(config.temperature)
    arguments = (model.config.noise_dim, scale if config.do_sample else 0.0, model.device)
    if generator is None or isinstance(generator, torch.Generator):
        noise = SledNoise(generator, num_rows, *arguments)
        return [(noise, row) for row in range(num_rows)]
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, got {type(generator).__name__}.")
    if len(generator) != num_rows:
        raise ValueError(f"`generator` must have one generator for each of the {num_rows} rows, got {len(generator)}.")
    return [(SledNoise(one, 1, *arguments), 0) for one in generator]


def make_engine(
    model: "SledForSpeechSynthesis",
    config: GenerationConfig,
    utterances: Sequence[SledUtterance],
    synced_gpus: bool = False,
) -> SledEngine:
    """
    Makes the engine that says some utterances, with the cache that their configuration names.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        config ([`~transformers.GenerationConfig`]):
            What they are generated with: `use_cache`, `cache_implementation`, `compile_config`, `disable_compile`.
        utterances (sequence of [`SledUtterance`]):
            The utterances.
        synced_gpus (`bool`, *optional*, defaults to `False`):
            Whether other processes hold parts of the weights.

    Returns:
        [`SledEngine`]: the engine.
    """
    # Layers that recompute their activations keep no keys and values.
    is_recomputing = model.training and model.model.layers[0].gradient_checkpointing
    if config.use_cache is False or is_recomputing:
        return SledEngine(model, use_cache=False, synced_gpus=synced_gpus)
    num_positions = None
    compile_config = config.compile_config
    if config.cache_implementation == "static":
        num_positions = max(_count_positions(model, config, utterance) for utterance in utterances)
        if compile_config is None and model.device.type != "cpu":
            compile_config = get_default_compile_config()
    return SledEngine(
        model, num_positions, None if config.disable_compile else compile_config, synced_gpus=synced_gpus
    )


def get_default_compile_config() -> CompileConfig:
    """
    How the step is compiled where nothing else is asked for: once for all lengths and numbers of rows, and without CUDA
    graphs, which belong to the thread that has recorded them.

    Returns:
        [`~transformers.CompileConfig`]: the options of `torch.compile`.
    """
    return CompileConfig(mode="default", dynamic=True)


def _count_positions(model: "SledForSpeechSynthesis", config: GenerationConfig, utterance: SledUtterance) -> int:
    """Positions that an utterance takes at most."""
    num_positions = get_num_positions(model, config)
    parts = utterance.text.parts
    if len(parts) != 1 or not parts[0].is_complete or not utterance.text.is_finished:
        return num_positions
    num_tokens = len(parts[0].ids) - utterance.text.num_prompt_tokens
    num_frames = max(get_frame_budget(model, num_tokens), config.min_new_tokens or 0)
    num_prompt_frames = 0 if utterance.prompt is None else len(utterance.prompt)
    return min(num_positions, len(parts[0].ids) + num_prompt_frames + (config.max_new_tokens or num_frames))


def _get_counts(values: object, texts: list[list[list[int]]]) -> list[int]:
    """`num_prompt_tokens` of every row."""
    if values is None:
        return [0] * len(texts)
    if not isinstance(values, torch.Tensor) or values.shape != (len(texts),) or values.is_floating_point():
        found = (
            f"{values.dtype} of {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        )
        raise ValueError(f"`num_prompt_tokens` must be {len(texts)} integers, one for each row, got {found}.")
    counts = values.tolist()
    for parts, count in zip(texts, counts, strict=True):
        if not 0 <= count < min(map(len, parts)):
            raise ValueError(
                f"`num_prompt_tokens` must be at least 0 and less than the tokens of each part of `input_ids`, got {count}."
            )
    return counts


def _is_synced(model: "SledForSpeechSynthesis", synced_gpus: bool | None) -> bool:
    """The base class's rule: processes that share weights stay together."""
    if synced_gpus is None:
        synced_gpus = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return bool(synced_gpus) and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _warn_of_ends(utterances: list[SledUtterance], output: SledGenerateOutput) -> None:
    for row, (utterance, audio) in enumerate(zip(utterances, output.audio or (), strict=True)):
        if len(audio) == 0:
            warnings.warn(f"Row {row} of the result is empty: the speech ended at its first frame.", stacklevel=3)
        elif utterance.is_cut_off:
            warnings.warn(
                f"Row {row} of the result ran to the limit of frames that its text leaves room for, {utterance.num_frames}, "
                "without an end: the model may have lost its way.",
                stacklevel=3,
            )


def get_pieces(text: object) -> Iterator[str]:
    """Checks what a stream was given as its text. Returns its pieces."""
    if isinstance(text, bytes | bytearray | dict) or not isinstance(text, Iterable):
        hint = ": `astream` takes asynchronous iterables" if isinstance(text, AsyncIterable) else ""
        raise ValueError(f"`text` must be a string or an iterable of strings, got {type(text).__name__}{hint}.")
    return iter(text)


def _run_stream(utterance: SledUtterance, chunker: SledAudioChunker, engine: SledEngine) -> Generator[Any, None, None]:
    """A stream without its text: yields waveforms, `WORKING` after other steps, and `NEEDS_TEXT`."""
    if utterance.prompt is not None:
        chunker.push(utterance.prompt[None], is_prompt=True)
    yield WORKING
    while True:
        utterance.join(engine)
        if utterance.is_finished:
            break
        if utterance.needs_text(engine):
            yield NEEDS_TEXT
            continue
        for row, frame in engine.step():
            utterance.take(frame)
            waveforms = chunker.push(frame.latents[None, None]) if frame.is_heard else []
            if row.has_ended:
                chunker.end_part()
            yield from waveforms or (WORKING,)
    yield from chunker.finish()


def _drive(
    events: Generator[Any, None, None], source: SledTextSource, pieces: Iterator[str]
) -> Generator[torch.Tensor, None, None]:
    """Feeds a stream from an iterator."""
    with contextlib.closing(events):
        for event in events:
            if event is NEEDS_TEXT:
                for piece in pieces:
                    source.push(piece)
                    break
                else:
                    source.finish()
            elif event is not WORKING:
                yield event


async def _drive_async(
    stream: list[Any],
    pieces: Iterator[str] | AsyncIterator[str],
    worker: "_Worker",
) -> AsyncGenerator[torch.Tensor, None]:
    """
    Feeds a stream from an iterator of either kind. All its work is done by one thread, which ends with it. `stream` holds
    a function that starts it, and then what that returns: the events and the source of their text.
    """
    end = object()
    is_abandoned = threading.Event()

    def advance(piece: Any = None) -> Any:
        """Takes a piece, if there is one, and goes on to the next waveform or, in an event loop's text, the next wait."""
        if len(stream) == 1:
            stream[:] = stream[0]()
        if piece is not None:
            feed(piece)
        # The events have no name here: the traceback of a source's error would keep them.
        for event in stream[0]:
            if is_abandoned.is_set():
                break
            if event is NEEDS_TEXT and isinstance(pieces, Iterator):
                feed(next(pieces, end))
            elif event is not WORKING:
                return event
        return end

    def feed(piece: Any) -> None:
        if piece is end:
            stream[1].finish()
        else:
            stream[1].push(piece)

    try:
        piece: Any = None
        while (event := await worker.run(partial(advance, piece))) is not end:
            piece = None
            if isinstance(pieces, AsyncIterator) and event is NEEDS_TEXT:
                piece = await anext(pieces, end)
            else:
                yield event
                # The traceback of a source's error would keep the waveform.
                del event
    finally:
        # A step that is still running stops after its frame. The last reference to the stream goes with it, also where an
        # error's traceback keeps this frame.
        is_abandoned.set()
        stream.clear()
        worker.close()


class _Worker:
    """
    A thread that runs functions one after another, in the autocast of whoever made it. Unlike an executor's, it does not
    keep the process from ending where a source never returns.
    """

    def __init__(self, device_type: str) -> None:
        is_enabled = torch.is_autocast_enabled(device_type)
        self._autocast = (device_type, torch.get_autocast_dtype(device_type), is_enabled)
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_started = False

    def run(self, function: Callable[[], Any]) -> Awaitable[Any]:
        """What the function returns, to be awaited."""
        if not self._is_started:
            self._is_started = True
            threading.Thread(target=_work, args=(self._jobs, self._autocast), daemon=True).start()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._jobs.put((function, loop, future))
        return future

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._jobs.put(None)


def _work(jobs: "queue.SimpleQueue[Any]", autocast: tuple[str, torch.dtype, bool]) -> None:
    def set_result(future: asyncio.Future, result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    device_type, dtype, is_enabled = autocast
    with torch.autocast(device_type, dtype=dtype, enabled=is_enabled):
        while (job := jobs.get()) is not None:
            function, loop, future = job
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            # The loop may be gone by now, and with it whoever waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(set_result, future, result, error)
            # Nothing is kept while the next function is waited for.
            del function, loop, future, job, result, error


__all__ = [
    "SledAudioStreamer",
    "SledGenerateOutput",
    "SledGenerationMixin",
    "SledKnownParts",
    "SledStreamRequest",
    "SledUtterance",
    "get_default_compile_config",
    "get_pieces",
    "make_engine",
    "prepare_generation_config",
]
