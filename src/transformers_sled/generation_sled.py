"""Speech generation: the frame by frame loop, guidance, end of speech, long text."""

import asyncio
import contextlib
import copy
import functools
import itertools
import math
import re
import threading
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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import ModelOutput

from .codec_sled import SledAudioChunker
from .streaming_sled import SledAudioStreamer, SledIncrementalTokenizer, encode_text


if TYPE_CHECKING:
    from .modeling_sled import SledForSpeechSynthesis
    from .processing_sled import SledProcessor


# Probability of the end of speech from which a frame ends it: what the original's two generation scripts use.
OFFLINE_EOS_THRESHOLD = 0.8
INTERLEAVED_EOS_THRESHOLD = 0.5

# Speech that is still going on after this much time is taken for a model that missed the end.
MAX_SECONDS_PER_TOKEN = 1.0
MAX_EXTRA_SECONDS = 2.0

# A source that goes on beyond this many characters, or empty pieces, before there is anything to speak is taken for endless.
MAX_WAITING_CHARACTERS = 1_000_000

# Slots that the cache makes room for at least when it is full.
_MIN_CACHE_GROWTH = 64

# What a stream yields after a step that completes no waveform, and in place of one when it waits for text or, in a server,
# for a frame.
_WORKING, _NEEDS_TEXT, _NEEDS_FRAME = object(), object(), object()


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
            1 for frames that are heard, 0 for the ones that signal an end and for padding.
    """

    audio: list[torch.Tensor] | None = None
    latents: torch.Tensor | None = None
    eos_logits: torch.Tensor | None = None
    latents_mask: torch.Tensor | None = None


@dataclass
class SledText:
    """Token ids of one text, which may still be arriving."""

    ids: list[int] = field(default_factory=list)
    is_complete: bool = True


@dataclass
class _Row:
    """One utterance on its way through the loop."""

    text: SledText
    prompt: torch.Tensor | None = None
    min_frames: int = 0
    max_frames: int | None = None
    generator: torch.Generator | None = None
    num_tokens_read: int = 0
    num_frames: int = 0
    num_frames_in_chunk: int = 0
    has_ended: bool = False
    # Ended by a stopping criterion, which ends the parts to come as well.
    is_stopped: bool = False

    @property
    def num_prompt_frames(self) -> int:
        return 0 if self.prompt is None else len(self.prompt)


@dataclass
class _Frame:
    """What one step gives each row: rows that have ended before it have zeros and are not alive."""

    latents: torch.Tensor
    eos_logits: torch.Tensor
    is_alive: list[bool]
    is_heard: list[bool]


@dataclass
class _Utterance:
    """What has been generated for one row of the batch, over all parts of its text."""

    parts: list[list[int]]
    prompt: torch.Tensor | None = None
    latents: list[torch.Tensor] = field(default_factory=list)
    eos_logits: list[torch.Tensor] = field(default_factory=list)
    is_heard: list[bool] = field(default_factory=list)
    # Frames heard in the part before the one that is being spoken, the voice prompt included.
    previous_frames: list[torch.Tensor] = field(default_factory=list)
    part_frames: list[torch.Tensor] = field(default_factory=list)
    is_stopped: bool = False

    def add(self, latents: torch.Tensor, eos_logits: torch.Tensor, is_heard: bool) -> None:
        self.latents.append(latents)
        self.eos_logits.append(eos_logits)
        self.is_heard.append(is_heard)
        if is_heard:
            self.part_frames.append(latents)

    def start_part(self) -> None:
        self.previous_frames = self.part_frames
        self.part_frames = []


class _Slots:
    """
    Which cache slot of each row holds what: every step takes the same number of slots in all rows, left-padded where a
    row has less to feed. Padding is masked and takes no position.
    """

    def __init__(self, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.bias = torch.full((num_rows, capacity), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.next_position = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.used = 0
        self.has_padding = False

    def take(self, counts: list[int]) -> torch.Tensor:
        """Takes `max(counts)` slots of every row, of which its last `counts[row]` are real. Returns their positions."""
        length = max(counts)
        missing = self.used + length - self.bias.shape[1]
        if missing > 0:
            growth = (self.bias.shape[0], max(missing, self.bias.shape[1]))
            self.bias = torch.cat([self.bias, self.bias.new_full(growth, torch.finfo(self.bias.dtype).min)], dim=1)
        new = self.bias[:, self.used : self.used + length]
        self.used += length
        if min(counts) == length:
            new.zero_()
            positions = self.next_position[:, None] + torch.arange(length, device=new.device)
            self.next_position += length
            return positions
        self.has_padding = True
        counts_tensor = torch.tensor(counts, device=new.device)[:, None]
        index = torch.arange(length, device=new.device) - (length - counts_tensor)
        new.masked_fill_(index >= 0, 0)
        positions = (self.next_position[:, None] + index).clamp(min=0)
        self.next_position += counts_tensor[:, 0]
        return positions

    def get_additive_mask(self, length: int, kv_length: int) -> torch.Tensor:
        """Mask (rows, 1, length, kv_length) of the last `length` slots over the first `kv_length`, to be added to scores."""
        mask = self.bias[:, None, None, :kv_length]
        if length == 1:
            return mask
        keys = torch.arange(kv_length, device=mask.device)
        queries = torch.arange(self.used - length, self.used, device=mask.device)
        return mask.masked_fill(keys > queries[:, None], torch.finfo(mask.dtype).min)

    def get_padding_mask(self) -> torch.Tensor:
        """Mask (rows, used): 1 for a real slot, 0 for padding."""
        return (self.bias[:, : self.used] == 0).long()

    def select(self, indices: torch.Tensor) -> None:
        """Keeps only these rows."""
        self.bias = self.bias[indices]
        self.next_position = self.next_position[indices]


class _GrowingLayer(DynamicLayer):
    """Cache layer that writes into a buffer with room to grow; the base class copies all that it holds at every step."""

    keys: torch.Tensor
    values: torch.Tensor
    _buffer: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old_length = self.get_seq_length()
        length = old_length + key_states.shape[-2]
        if self._buffer is None or length > self._buffer.shape[3]:
            batch_size, num_heads, _, head_dim = key_states.shape
            capacity = length + max(_MIN_CACHE_GROWTH, length // 2)
            self._buffer = key_states.new_empty(2, batch_size, num_heads, capacity, head_dim)
            if old_length > 0:
                self._buffer[0, :, :, :old_length] = self.keys
                self._buffer[1, :, :, :old_length] = self.values
        self._buffer[0, :, :, old_length:length] = key_states
        self._buffer[1, :, :, old_length:length] = value_states
        self.keys, self.values = self._buffer[:, :, :, :length]
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffer = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffer = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffer = None


class SledGenerationMixin(GenerationMixin):
    """Speech generation for [`SledForSpeechSynthesis`]."""

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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: SledAudioStreamer | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor] | SledGenerateOutput:
        r"""
        Speaks texts, each in the voice of its prompt if it has one.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Text token ids from [`SledProcessor`]. A row may hold several parts of a long text, each with its own
                start and end token: they are spoken in turn, each primed with the part before it.
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
            generation_config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
            _check_generation_config(generation_config)
            texts = self._get_texts(input_ids, attention_mask)
            prompts = self._get_prompts(
                len(texts), prompt_values, prompt_values_mask, prompt_latents, prompt_latents_mask
            )
            copies = generation_config.num_return_sequences or 1
            texts = [parts for parts in texts for _ in range(copies)]
            prompts = [prompt for prompt in prompts for _ in range(copies)]
            shared_generator, generators = _get_generators(generator, len(texts))
            if streamer is not None and len(texts) > 1:
                raise ValueError(f"`streamer` takes a single row, but there are {len(texts)}.")
            for parts, prompt in zip(texts, prompts, strict=True):
                for index, part in enumerate(parts):
                    self._check_fits(len(part), len(prompt) if index == 0 and prompt is not None else 0)
            utterances = self._generate_parts(
                texts,
                prompts,
                generators,
                shared_generator,
                generation_config,
                _get_timed_criteria(generation_config, stopping_criteria),
                streamer,
                model_kwargs,
            )
            if streamer is not None:
                if streamer.closed:
                    utterances = [_Utterance([])]
                # Before the whole is decoded once more for the return value.
                streamer.end()
        except BaseException as error:
            if streamer is not None:
                streamer.end(error)
            raise
        output = self._collect(utterances)
        return output if generation_config.return_dict_in_generate else list(output.audio or ())

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
                Duration in seconds of every waveform but the first, which comes as early as possible, and the last.
            max_duration (`float`, *optional*):
                Duration in seconds after which the speech is cut off. A source that never ends needs one.
            kwargs:
                The voice, as the processor takes it (`prompt_text`, `prompt_audio` and `sampling_rate`, or
                `prompt_latents` and `prompt_latents_mask`), `generator`, `generation_config`, `stopping_criteria`, and
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
        pieces = _get_pieces(text)
        chunker = SledAudioChunker(self.get_codec(), chunk_duration)
        request = self._prepare_stream(text, processor, chunker, max_duration, kwargs)
        return _drive(self._stream_events(request), request.source, pieces)

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
                Duration in seconds of every waveform but the first and the last.
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
        pieces = aiter(text) if isinstance(text, AsyncIterable) else _get_pieces(text)
        chunker = SledAudioChunker(self.get_codec(), chunk_duration)
        request = self._prepare_stream(text, processor, chunker, max_duration, kwargs)
        return _drive_async(self._stream_events(request), request.source, pieces)

    def _prepare_stream(
        self: "SledForSpeechSynthesis",
        text: object,
        processor: "SledProcessor",
        chunker: SledAudioChunker,
        max_duration: float | None,
        kwargs: dict[str, Any],
    ) -> "_StreamRequest":
        """Checks the arguments of a stream and prepares its voice, and its text if that is a string."""
        if not hasattr(processor, "split_text"):
            raise ValueError(f"`processor` must be a `SledProcessor`, got {type(processor).__name__}.")
        if max_duration is not None and not (isinstance(max_duration, int | float) and 0 < max_duration < math.inf):
            raise ValueError(f"`max_duration` must be a positive number of seconds, got {max_duration!r}.")
        voice_names = ("prompt_text", "prompt_audio", "prompt_latents", "prompt_latents_mask", "sampling_rate")
        voice = {name: kwargs.pop(name) for name in voice_names if name in kwargs}
        generator = kwargs.pop("generator", None)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` must be a `torch.Generator`, got {type(generator).__name__}.")
        stopping_criteria = kwargs.pop("stopping_criteria", None)
        generation_config, model_kwargs = self._prepare_generation_config(
            kwargs.pop("generation_config", None), **kwargs
        )
        _check_generation_config(generation_config)
        stopping_criteria = _get_timed_criteria(generation_config, stopping_criteria)
        if (generation_config.num_return_sequences or 1) != 1:
            raise ValueError(f"`num_return_sequences` must be 1, got {generation_config.num_return_sequences}.")
        self._validate_model_kwargs(model_kwargs)
        if max_duration is not None:
            max_frames = math.ceil(max_duration * self.get_codec().config.sampling_rate / chunker.hop_length)
            if generation_config.max_new_tokens is not None:
                max_frames = min(max_frames, generation_config.max_new_tokens)
            generation_config.max_new_tokens = max_frames

        # Also where the text is yet to come, to check the voice and prepare it.
        inputs = processor(text if isinstance(text, str) else "a", **voice)
        prompt_names = ("prompt_values", "prompt_values_mask", "prompt_latents", "prompt_latents_mask")
        (prompt,) = self._get_prompts(1, *(inputs.get(name) for name in prompt_names))
        num_prompt_frames = 0 if prompt is None else len(prompt)
        source = _TextSource(
            processor,
            voice.get("prompt_text"),
            num_prompt_frames,
            self.config.is_interleaved,
            self._get_num_first_tokens(num_prompt_frames),
        )
        if isinstance(text, str):
            for ids in self._get_texts(inputs["input_ids"], inputs["attention_mask"])[0]:
                self._check_fits(len(ids), 0 if source.parts else num_prompt_frames)
                source.parts.append(SledText(ids))
            source.is_finished = True
        return _StreamRequest(source, prompt, generator, generation_config, stopping_criteria, chunker, model_kwargs)

    def _stream_events(
        self: "SledForSpeechSynthesis",
        request: "_StreamRequest",
        run: Callable[[_Row], Iterator[Any]] | None = None,
    ) -> Generator[Any, None, None]:
        """
        The stream without its text: yields waveforms, `_WORKING` after other steps, the voice prompt's first, and
        `_NEEDS_TEXT`. A server makes the frames of a row with `run`, in place of `_run`; its `_NEEDS_FRAME` is passed on.
        """
        source, chunker, config = request.source, request.chunker, request.generation_config
        utterance = _Utterance([], request.prompt)
        num_frames = 0
        if request.prompt is not None:
            chunker.push(request.prompt[None], is_prompt=True)
        yield _WORKING
        while True:
            index = len(utterance.parts)
            while len(source.parts) == index and not source.is_finished:
                yield _NEEDS_TEXT
            if len(source.parts) == index:
                break
            part = source.parts[index]
            while not part.ids and not part.is_complete:
                yield _NEEDS_TEXT
            # The list is the part's own, so that ids that arrive later are there when the next part is primed with it.
            utterance.parts.append(part.ids)
            is_last = not part.is_complete or (source.is_finished and index == len(source.parts) - 1)
            row = self._get_row(utterance, index, config, num_frames, is_last)
            if row is None:
                break
            num_primed = len(row.text.ids) - len(part.ids)
            primed = row.text.ids[: num_primed + 1]
            row.text.is_complete = part.is_complete
            frames = (
                self._run([row], config, request.stopping_criteria, request.generator, request.model_kwargs)
                if run is None
                else run(row)
            )
            for frame in frames:
                if isinstance(frame, _Frame):
                    num_frames += 1
                    waveforms = []
                    if frame.is_heard[0]:
                        utterance.part_frames.append(frame.latents[0])
                        waveforms = chunker.push(frame.latents[None, 0:1])
                    yield from waveforms or (_WORKING,)
                elif frame is _NEEDS_FRAME:
                    yield _NEEDS_FRAME
                else:
                    if len(row.text.ids) == num_primed + len(part.ids) and not part.is_complete:
                        yield _NEEDS_TEXT
                    row.text.ids = primed + part.ids[1:]
                    row.text.is_complete = part.is_complete
            if row.is_stopped or not part.is_complete:
                # The end of a part that is still being written is final.
                break
        yield from chunker.finish()

    def _generate_parts(
        self: "SledForSpeechSynthesis",
        texts: list[list[list[int]]],
        prompts: list[torch.Tensor | None],
        generators: list[torch.Generator | None],
        shared_generator: torch.Generator | None,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        streamer: SledAudioStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> list[_Utterance]:
        """Speaks the parts of every row in turn; all rows that have an n-th part speak it in one batch."""
        utterances = [_Utterance(parts, prompt) for parts, prompt in zip(texts, prompts, strict=True)]
        if streamer is not None and prompts[0] is not None:
            streamer.put(prompts[0][None], is_prompt=True)
        for index in range(max(len(parts) for parts in texts)):
            members, rows = [], []
            for utterance, generator in zip(utterances, generators, strict=True):
                row = self._get_row(utterance, index, generation_config, len(utterance.latents))
                if row is not None:
                    row.generator = generator
                    members.append(utterance)
                    rows.append(row)
            if not rows:
                break
            for frame in self._run(rows, generation_config, stopping_criteria, shared_generator, model_kwargs):
                assert frame is not None, "The text is complete."
                for position, utterance in enumerate(members):
                    if frame.is_alive[position]:
                        utterance.add(frame.latents[position], frame.eos_logits[position], frame.is_heard[position])
                if streamer is not None and frame.is_heard[0]:
                    streamer.put(frame.latents[None, :1])
                if streamer is not None and streamer.closed:
                    return utterances
            for utterance, row in zip(members, rows, strict=True):
                utterance.is_stopped = row.is_stopped
        return utterances

    def _get_row(
        self: "SledForSpeechSynthesis",
        utterance: _Utterance,
        index: int,
        generation_config: GenerationConfig,
        num_frames: int,
        is_last: bool | None = None,
    ) -> _Row | None:
        """The loop's view of the `index`-th part of an utterance, or `None` if there is nothing left to say."""
        if index >= len(utterance.parts) or utterance.is_stopped:
            return None
        max_frames = generation_config.max_new_tokens
        if max_frames is not None:
            max_frames -= num_frames
            if max_frames <= 0:
                return None
        if is_last is None:
            is_last = index == len(utterance.parts) - 1
        min_frames = max(0, (generation_config.min_new_tokens or 0) - num_frames) if is_last else 0
        utterance.start_part()
        ids, prompt = self._prime(utterance.parts[: index + 1], utterance.previous_frames, utterance.prompt)
        if index == 0 and prompt is not None:
            utterance.part_frames = list(prompt)
        return _Row(SledText(ids), prompt, min_frames, max_frames)

    def _prime(
        self: "SledForSpeechSynthesis",
        parts: list[list[int]],
        previous_frames: list[torch.Tensor],
        voice_prompt: torch.Tensor | None,
    ) -> tuple[list[int], torch.Tensor | None]:
        """
        Text and prompt frames of the last of these parts. The whole part before it, text and frames, comes first so that
        the voice stays; it is left out where it was silent or leaves too little room.
        """
        ids = parts[-1]
        if len(parts) == 1:
            return ids, voice_prompt
        previous_ids = parts[-2]
        expected_frames = math.ceil(len(ids) * len(previous_frames) / len(previous_ids))
        num_positions = len(previous_ids) + len(ids) + len(previous_frames) + expected_frames
        if not previous_frames or num_positions > self.config.max_position_embeddings:
            return ids, None
        return previous_ids[:-1] + ids[1:], torch.stack(previous_frames)

    def _collect(self: "SledForSpeechSynthesis", utterances: list[_Utterance]) -> SledGenerateOutput:
        """Pads what the utterances hold into one batch and decodes it."""
        num_frames = max(len(utterance.latents) for utterance in utterances)
        shape = (len(utterances), num_frames)
        latents = torch.zeros(*shape, self.config.latent_dim, dtype=self.dtype, device=self.device)
        eos_logits = torch.zeros(shape, device=self.device)
        mask = torch.zeros(shape, dtype=torch.long, device=self.device)
        sequences = []
        for row, utterance in enumerate(utterances):
            if utterance.latents:
                latents[row, : len(utterance.latents)] = torch.stack(utterance.latents)
                eos_logits[row, : len(utterance.latents)] = torch.stack(utterance.eos_logits)
                mask[row, : len(utterance.latents)] = torch.tensor(utterance.is_heard, device=self.device).long()
            sequence = latents[row, mask[row].bool()].float()
            sequences.append(sequence if utterance.prompt is None else torch.cat([utterance.prompt, sequence]))
        hop_length = self.get_codec().config.hop_length
        waveforms = self.decode_latents(torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True))
        audio = []
        for waveform, sequence, utterance in zip(waveforms, sequences, utterances, strict=True):
            num_prompt_frames = 0 if utterance.prompt is None else len(utterance.prompt)
            audio.append(waveform[num_prompt_frames * hop_length : len(sequence) * hop_length].clone())
        return SledGenerateOutput(audio=audio, latents=latents, eos_logits=eos_logits, latents_mask=mask)

    def _get_texts(
        self: "SledForSpeechSynthesis", input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> list[list[list[int]]]:
        """Token ids of every part of every row, without padding."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or 0 in input_ids.shape:
            found = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"`input_ids` must be a tensor of shape (batch_size, num_tokens), got {found}.")
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise ValueError(f"`input_ids` must hold integers, got {input_ids.dtype}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
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

    def _check_fits(self: "SledForSpeechSynthesis", num_tokens: int, num_prompt_frames: int) -> None:
        if num_tokens + num_prompt_frames >= self.config.max_position_embeddings:
            prompt = f" with a voice prompt of {num_prompt_frames} frames" if num_prompt_frames else ""
            raise ValueError(
                f"`input_ids` has a text of {num_tokens} tokens{prompt}, which leaves no room for speech in the model's "
                f"{self.config.max_position_embeddings} positions."
            )

    def _get_frame_limit(self: "SledForSpeechSynthesis", row: _Row) -> int:
        """Number of frames at which a row ends if nothing else ends it: what fits, what was asked for, what is sane."""
        limit = self.config.max_position_embeddings - len(row.text.ids) - row.num_prompt_frames
        if row.max_frames is not None:
            return min(limit, row.max_frames)
        if not row.text.is_complete:
            return limit
        codec_config = self.get_codec().config
        seconds = MAX_EXTRA_SECONDS + MAX_SECONDS_PER_TOKEN * len(row.text.ids)
        num_frames = math.ceil(seconds * codec_config.sampling_rate / codec_config.hop_length)
        return min(limit, max(row.min_frames, num_frames))

    def _run(
        self: "SledForSpeechSynthesis",
        rows: list[_Row],
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        noise_generator: torch.Generator | None,
        model_kwargs: dict[str, Any],
    ) -> "Generator[_Frame | None, None, None]":
        """The base class's `generate` on rows: returns the loop of `_sample`, ready to be iterated."""
        generation_config = copy.deepcopy(generation_config)
        # The loop counts frames itself, row by row.
        generation_config.max_new_tokens = generation_config.min_new_tokens = None
        generation_config.num_return_sequences = 1
        generation_config.max_length = self.config.max_position_embeddings
        placeholder_ids = torch.zeros(len(rows), 1, dtype=torch.long, device=self.device)
        return super().generate(
            placeholder_ids,
            generation_config=generation_config,
            stopping_criteria=stopping_criteria,
            attention_mask=torch.ones_like(placeholder_ids),
            rows=rows,
            noise_generator=noise_generator,
            **model_kwargs,
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
            "pad_token_id": self.config.eos_token_id,
        }
        for name, value in defaults.items():
            if getattr(self.generation_config, name, None) is None:
                setattr(self.generation_config, name, value)
        # Of one marked as derived from the model's configuration, `from_pretrained` would leave `eos_threshold` unread.
        self.generation_config._from_model_config = None

    def adjust_generation_fn(
        self: "SledForSpeechSynthesis", *args: Any, build_codec: bool = True, **kwargs: Any
    ) -> None:
        """
        Called by `from_pretrained` to load the generation config; the released one sets none of SLED's parameters.
        `build_codec` is the model's own argument, which the base class would add to the parameters.
        """
        super().adjust_generation_fn(*args, **kwargs)
        self.fill_generation_config()

    def _validate_model_kwargs(self: "SledForSpeechSynthesis", model_kwargs: dict[str, Any]) -> None:
        own = ("rows", "noise_generator")
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in own})

    def _get_logits_processor(
        self, *args: Any, logits_processor: LogitsProcessorList | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        # There are no logits; the base class would add its own guidance for a `guidance_scale` other than 1.
        if logits_processor:
            raise ValueError("`logits_processor` does not apply: SLED generates continuous latents, not tokens.")
        return LogitsProcessorList()

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        # The loop has its own rules for length and end.
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        own = (MaxLengthCriteria, EosTokenCriteria)
        return StoppingCriteriaList([criterion for criterion in criteria if not isinstance(criterion, own)])

    def _prepare_cache_for_generation(
        self: "SledForSpeechSynthesis",
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("`past_key_values` must be an empty cache: the text decides what it holds.")
        rows: list[_Row] = model_kwargs["rows"]
        if any(not row.text.is_complete for row in rows):
            max_cache_length = self.config.max_position_embeddings
        else:
            # Rows may read their text chunks at different steps, and each of them takes slots in every row.
            num_frames = max(row.num_prompt_frames + self._get_frame_limit(row) for row in rows)
            max_cache_length = num_frames + sum(len(row.text.ids) for row in rows)
        if generation_config.guidance_scale != 1:
            batch_size *= 2
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        new_cache = model_kwargs.get("past_key_values")
        if cache is None and isinstance(new_cache, DynamicCache) and not new_cache.offloading:
            new_cache.layers = [_GrowingLayer() for _ in new_cache.layers]

    @torch.no_grad()
    def _sample(
        self: "SledForSpeechSynthesis",
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        rows: list[_Row],
        synced_gpus: bool = False,
        noise_generator: torch.Generator | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        **model_kwargs: Any,
    ) -> "Generator[_Frame | None, None, None]":
        """
        The loop, in place of the base class's: a generator that yields what every step gives the rows, or `None` when a
        row needs more text than has arrived.

        Each step feeds every row its last frame, and with it the next text chunk where one is due, and samples the next
        frame from the last hidden state. Under guidance a second half of the batch holds the unconditional branch,
        `</s>` and the same frames, and hidden states are mixed as `uncond + guidance_scale * (cond - uncond)`; the end is
        decided on the conditional branch. A row that ends leaves the batch.
        """
        guidance_scale = generation_config.guidance_scale
        is_guided = guidance_scale != 1
        max_cache_length = -1 if past_key_values is None else past_key_values.get_max_length()
        is_static = max_cache_length != -1
        compile_config = generation_config.compile_config
        if compile_config is not None:
            # The base class compiles on accelerators only; a configuration that is given asks for it on CPU as well.
            compile_config._compile_all_devices = True
        is_compiled = self._valid_auto_compile_criteria({"past_key_values": past_key_values}, generation_config)
        decode = self._get_compiled_step(compile_config) if is_compiled else self._step
        takes_additive_mask = self.config._attn_implementation in ("eager", "sdpa")

        while any(not self._has_text(row) for row in rows):
            yield None
        sequences = [self._get_first_inputs(row) for row in rows]
        if is_guided:
            sequences += [self._get_first_unconditional_inputs(row) for row in rows]
        counts = [len(sequence) for sequence in sequences]
        embeds = _left_pad(sequences)
        capacity = max_cache_length if is_static else embeds.shape[1]
        slots = _Slots(len(sequences), capacity, embeds.dtype, embeds.device)
        history: list[tuple[torch.Tensor, torch.Tensor]] = []
        live = list(range(len(rows)))

        while True:
            position_ids = slots.take(counts)
            num_new = embeds.shape[1]
            if not use_cache:
                history.append((embeds, position_ids))
                embeds, position_ids = (torch.cat(parts, dim=1) for parts in zip(*history, strict=True))
            attention_mask = None
            if takes_additive_mask and (is_static or slots.has_padding):
                attention_mask = slots.get_additive_mask(embeds.shape[1], capacity if is_static else slots.used)
            elif slots.has_padding:
                attention_mask = slots.get_padding_mask()
            noise = self._draw_noise(rows, live, generation_config, noise_generator)
            step = decode if num_new == 1 else self._step
            latents, eos_logits = step(
                embeds,
                noise.to(embeds.device, embeds.dtype),
                guidance_scale,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
            if is_compiled:
                # CUDA graphs write the next step's results to the same memory.
                latents, eos_logits = latents.clone(), eos_logits.clone()

            frame, ended = self._end_rows(rows, live, latents, eos_logits, generation_config, stopping_criteria)
            yield frame
            if len(ended) == len(live):
                return
            if ended and not is_static:
                kept = [index for index in range(len(live)) if index not in ended]
                indices = torch.tensor(kept, device=embeds.device)
                latents = latents[indices]
                if is_guided:
                    indices = torch.cat([indices, indices + len(live)])
                live = [live[index] for index in kept]
                slots.select(indices)
                if past_key_values is not None:
                    past_key_values.batch_select_indices(indices)
                history = [(step[indices], positions[indices]) for step, positions in history]

            embeds = self.embed_latents(latents[:, None])
            counts = [1] * (len(live) * (2 if is_guided else 1))
            chunks = []
            for row in (rows[index] for index in live):
                while not self._has_text(row):
                    yield None
                chunks.append(self._read_chunk(row))
            conditional = embeds
            if any(chunks):
                sequences = [
                    torch.cat([embed, self.embed_text(torch.tensor([chunk], device=embed.device))[0]])
                    if chunk
                    else embed
                    for embed, chunk in zip(embeds, chunks, strict=True)
                ]
                counts[: len(live)] = [len(sequence) for sequence in sequences]
                conditional = _left_pad(sequences)
            if is_guided:
                unconditional = torch.nn.functional.pad(embeds, (0, 0, conditional.shape[1] - 1, 0))
                embeds = torch.cat([conditional, unconditional])
            else:
                embeds = conditional

    def _step(
        self: "SledForSpeechSynthesis",
        inputs_embeds: torch.Tensor,
        noise: torch.Tensor,
        guidance_scale: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (rows, latent_dim) and end-of-speech logits (rows,) in float32 of the frame that follows the inputs."""
        outputs = self(inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state[:, -1]
        if guidance_scale != 1:
            conditional, unconditional = hidden_states.chunk(2)
            hidden_states = unconditional + guidance_scale * (conditional - unconditional)
        return self.generative_head(hidden_states, noise), outputs.eos_logits[: len(noise), -1].float()

    def _get_compiled_step(self: "SledForSpeechSynthesis", compile_config: CompileConfig | None) -> Callable:
        """`_step` compiled, head included; the base class's `get_compiled_call` is for `forward` alone."""
        compile_config = compile_config or CompileConfig()
        if getattr(self, "_step_compile_config", None) != compile_config:
            self._step_compile_config = compile_config
            # Of the class, so that a copy of the model runs its own weights.
            self._compiled_step = torch.compile(type(self)._step, **compile_config.to_dict())
        return functools.partial(self._compiled_step, self)

    def _draw_noise(
        self: "SledForSpeechSynthesis",
        rows: list[_Row],
        live: list[int],
        generation_config: GenerationConfig,
        noise_generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Noise of the next frame of the live rows in float32, drawn as the original draws it."""
        noise_dim = self.config.noise_dim
        scale = 1.0 if generation_config.temperature is None else generation_config.temperature
        if not generation_config.do_sample or scale == 0:
            return torch.zeros(len(live), noise_dim, device=self.device)
        generators = [generator for index in live if (generator := rows[index].generator) is not None]
        if generators:
            draws = [torch.randn(1, noise_dim, generator=one, device=one.device) for one in generators]
            return torch.cat(draws) * scale
        device = self.device if noise_generator is None else noise_generator.device
        # For all rows until the last one ends, so that what a row draws does not depend on when others end.
        noise = torch.randn(len(rows), noise_dim, generator=noise_generator, device=device) * scale
        return noise if len(live) == len(rows) else noise[live]

    def _end_rows(
        self: "SledForSpeechSynthesis",
        rows: list[_Row],
        live: list[int],
        latents: torch.Tensor,
        eos_logits: torch.Tensor,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList,
    ) -> tuple[_Frame, set[int]]:
        """Counts the new frames, decides which rows they end, and returns them with the ended rows' places in `live`."""
        is_end = (torch.sigmoid(eos_logits) >= generation_config.eos_threshold).tolist()
        is_stopped = [False] * len(live)
        if stopping_criteria:
            num_frames = max(rows[index].num_frames for index in live) + 1
            placeholder_ids = torch.zeros(len(live), num_frames, dtype=torch.long, device=eos_logits.device)
            is_stopped = stopping_criteria(placeholder_ids, eos_logits).tolist()
        is_alive, is_heard, ended = [False] * len(rows), [False] * len(rows), set()
        for place, index in enumerate(live):
            row = rows[index]
            if row.has_ended:
                continue
            row.num_frames += 1
            row.num_frames_in_chunk += 1
            is_alive[index] = True
            is_heard[index] = not (is_end[place] and row.num_frames > row.min_frames)
            row.is_stopped = is_stopped[place]
            row.has_ended = not is_heard[index] or row.is_stopped or row.num_frames >= self._get_frame_limit(row)
        ended = {place for place, index in enumerate(live) if rows[index].has_ended}
        if len(live) < len(rows):
            all_latents, all_logits = latents.new_zeros(len(rows), latents.shape[1]), eos_logits.new_zeros(len(rows))
            all_latents[live], all_logits[live] = latents, eos_logits
            latents, eos_logits = all_latents, all_logits
        return _Frame(latents, eos_logits, is_alive, is_heard), ended

    def _is_chunk_due(self: "SledForSpeechSynthesis", row: _Row) -> bool:
        """Whether the next step feeds text, if there is any left."""
        if row.has_ended:
            return False
        return self.config.is_interleaved and row.num_frames_in_chunk == self.config.speech_chunk_size

    def _has_text(self: "SledForSpeechSynthesis", row: _Row) -> bool:
        """Whether the text for the row's next step has arrived."""
        if row.text.is_complete:
            return True
        text_size = self.config.text_chunk_size
        if text_size is None:
            return False
        if row.num_tokens_read == 0:
            return len(row.text.ids) >= self._get_num_first_tokens(row.num_prompt_frames)
        return not self._is_chunk_due(row) or len(row.text.ids) - row.num_tokens_read >= text_size

    def _get_num_first_tokens(self: "SledForSpeechSynthesis", num_prompt_frames: int) -> int:
        """What an interleaved model reads before its first frame: every chunk that the prompt fills, and the one after."""
        text_size, speech_size = self.config.text_chunk_size, self.config.speech_chunk_size
        if text_size is None or speech_size is None:
            return 0
        return (num_prompt_frames // speech_size + 1) * text_size

    def _read_chunk(self: "SledForSpeechSynthesis", row: _Row) -> list[int]:
        """Ids of the next text chunk if one is due now, empty otherwise."""
        if not self._is_chunk_due(row) or row.num_tokens_read == len(row.text.ids):
            return []
        chunk = row.text.ids[row.num_tokens_read :][: self.config.text_chunk_size]
        row.num_tokens_read += len(chunk)
        row.num_frames_in_chunk = 0
        return chunk

    def _get_first_inputs(self: "SledForSpeechSynthesis", row: _Row) -> torch.Tensor:
        """Embeddings (length, hidden_size) of all that comes before the first new frame: text, and the prompt's frames."""
        text_size = self.config.text_chunk_size or len(row.text.ids)
        speech_size = self.config.speech_chunk_size or row.num_prompt_frames
        text = self.embed_text(torch.tensor([row.text.ids], device=self.device))[0]
        pieces, num_prompt_frames_read = [], 0
        while True:
            chunk = text[row.num_tokens_read : row.num_tokens_read + text_size]
            pieces.append(chunk)
            row.num_tokens_read += len(chunk)
            row.num_frames_in_chunk = 0
            if row.prompt is not None:
                # After the last text chunk, frames go on to the end.
                is_last = row.text.is_complete and row.num_tokens_read == len(row.text.ids)
                frames = (
                    row.prompt[num_prompt_frames_read:]
                    if is_last
                    else row.prompt[num_prompt_frames_read:][:speech_size]
                )
                if len(frames) > 0:
                    pieces.append(self.embed_latents(frames))
                num_prompt_frames_read += len(frames)
                row.num_frames_in_chunk = len(frames)
            is_full = self.config.is_interleaved and row.num_frames_in_chunk == speech_size
            if num_prompt_frames_read == row.num_prompt_frames and not is_full:
                return torch.cat(pieces)
            if row.num_tokens_read == len(row.text.ids):
                return torch.cat(pieces)

    def _get_first_unconditional_inputs(self: "SledForSpeechSynthesis", row: _Row) -> torch.Tensor:
        """Embeddings (length, hidden_size) of what the branch without text reads before the first new frame."""
        start = self.embed_text(torch.tensor([[self.config.eos_token_id]], device=self.device))[0]
        return start if row.prompt is None else torch.cat([start, self.embed_latents(row.prompt)])


class _TextSource:
    """
    Turns pieces of text into parts: token ids of texts that fit the model's positions.

    An interleaved model gets the first part as it is written. Whether the text ends up as one part shows late, and with it
    whether the part must leave room to be primed with: once the part has its share, text from the end of the sentence on
    is held back until all of it has arrived, or more than fits. Later parts are made of whole sentences.
    """

    def __init__(
        self,
        processor: "SledProcessor",
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
        self.parts: list[SledText] = []
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
                self.parts.append(SledText(encode_text(self.processor.tokenizer, part)))
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
            self.parts.append(SledText(is_complete=False))
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


@dataclass
class _StreamRequest:
    """What a stream is to say and how, and where its frames go."""

    source: _TextSource
    # Latents (num_frames, latent_dim) in float32.
    prompt: torch.Tensor | None
    generator: torch.Generator | None
    generation_config: GenerationConfig
    stopping_criteria: StoppingCriteriaList
    chunker: SledAudioChunker
    model_kwargs: dict[str, Any]


def _get_pieces(text: object) -> Iterator[str]:
    """Checks what a stream was given as its text. Returns its pieces."""
    if isinstance(text, bytes | bytearray | dict) or not isinstance(text, Iterable):
        hint = ": `astream` takes asynchronous iterables" if isinstance(text, AsyncIterable) else ""
        raise ValueError(f"`text` must be a string or an iterable of strings, got {type(text).__name__}{hint}.")
    return iter(text)


def _drive(
    events: Generator[Any, None, None], source: _TextSource, pieces: Iterator[str]
) -> Generator[torch.Tensor, None, None]:
    """Feeds a stream from an iterator."""
    with contextlib.closing(events):
        for event in events:
            if event is _NEEDS_TEXT:
                for piece in pieces:
                    source.push(piece)
                    break
                else:
                    source.finish()
            elif event is not _WORKING:
                yield event


async def _drive_async(
    events: Generator[Any, None, None], source: _TextSource, pieces: Iterator[str] | AsyncIterator[str]
) -> AsyncGenerator[torch.Tensor, None]:
    """Feeds a stream from an iterator of either kind, its steps in threads that end with the stream."""
    end = object()
    is_abandoned = threading.Event()
    steps = [events]
    del events

    def advance() -> Any:
        for event in itertools.chain.from_iterable(steps):
            if event is not _WORKING or is_abandoned.is_set():
                return event
        return end

    def get_piece() -> Awaitable[Any]:
        return (
            anext(pieces, end) if isinstance(pieces, AsyncIterator) else _in_daemon_thread(lambda: next(pieces, end))
        )

    try:
        while (event := await _in_daemon_thread(advance)) is not end:
            if event is not _NEEDS_TEXT:
                yield event
            elif (piece := await get_piece()) is end:
                source.finish()
            else:
                source.push(piece)
    finally:
        # A step that is still running stops after its frame. The last reference to the stream goes with it, also where an
        # error's traceback keeps this frame.
        is_abandoned.set()
        steps.clear()


def _in_daemon_thread(function: Callable[[], Any]) -> Awaitable[Any]:
    """
    Runs a function in a thread of its own. Unlike an executor's, the thread ends with the function, and a source that
    never returns does not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def set_result(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        # The loop may be gone by now, and with it whoever waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(set_result, result, error)
        # The error's traceback refers to this frame: without a cycle, what it holds goes with the error.
        del error

    threading.Thread(target=run, daemon=True).start()
    return future


def _left_pad(sequences: list[torch.Tensor]) -> torch.Tensor:
    """Stacks sequences (length, width) of different lengths, padded with zeros on the left."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side="left")


def _get_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_rows: int
) -> tuple[torch.Generator | None, list[torch.Generator | None]]:
    """The generator of the whole batch, and those of its rows."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator, [None] * num_rows
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, got {type(generator).__name__}.")
    if len(generator) != num_rows:
        raise ValueError(f"`generator` must have one generator for each of the {num_rows} rows, got {len(generator)}.")
    return None, list(generator)


def _get_timed_criteria(
    generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None
) -> StoppingCriteriaList:
    """Makes `max_time` a criterion from now on, for all parts of a text together."""
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if generation_config.max_time is not None:
        criteria.append(MaxTimeCriteria(generation_config.max_time))
        generation_config.max_time = None
    return criteria


def _check_generation_config(generation_config: GenerationConfig) -> None:
    def check(name: str, is_valid: bool, accepted: str) -> None:
        if not is_valid:
            raise ValueError(f"`{name}` must be {accepted}, got {getattr(generation_config, name)!r}.")

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def is_count(value: Any, minimum: int) -> bool:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= minimum)

    config = generation_config
    check("guidance_scale", is_number(config.guidance_scale) and config.guidance_scale >= 0, "finite and at least 0")
    check(
        "temperature",
        config.temperature is None or (is_number(config.temperature) and config.temperature >= 0),
        "finite and at least 0",
    )
    check(
        "eos_threshold",
        is_number(config.eos_threshold) and 0 <= config.eos_threshold <= 1,
        "a probability between 0 and 1",
    )
    check("max_new_tokens", is_count(config.max_new_tokens, 1), "a whole number of frames, at least 1")
    check("min_new_tokens", is_count(config.min_new_tokens, 0), "a whole number of frames, at least 0")
    check("num_return_sequences", is_count(config.num_return_sequences, 1), "a whole number, at least 1")


__all__ = ["SledGenerateOutput", "SledGenerationMixin"]
