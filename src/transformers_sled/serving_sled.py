"""Serving: many streams in one batch, which each of them may join and leave between any two frames."""

import asyncio
import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig

from .codec_sled import SledAudioChunker, SledStreamingDecoder
from .engine_sled import SledEngine, SledFrame
from .generation_sled import SledStreamRequest, get_pieces
from .text_sled import SledTextSource


if TYPE_CHECKING:
    from .modeling_sled import SledForSpeechSynthesis
    from .processing_sled import SledProcessor

# Text and voice prompt of a stream that joins are read this many positions at a time, with frames of the others in between.
MAX_PREFILL_POSITIONS = 64

# A stream of which this much audio waits to be fetched sits out.
MAX_UNFETCHED_SECONDS = 30.0

# Arguments of `generate` that a stream cannot choose for itself.
ENGINE_ARGUMENTS = ("use_cache", "cache_implementation", "compile_config", "disable_compile", "synced_gpus")


class _Channel:
    """What passes between a stream and its server: text in one direction, audio in the other."""

    def __init__(self, pieces: Iterator[str] | None, max_samples: float, wake: Callable[[], None]) -> None:
        self.pieces = pieces
        self.max_samples = max_samples
        self.wake = wake
        # What is to be done with the text in the server's next step.
        self.inbox: deque[Callable[[SledTextSource], None]] = deque()
        # Waveforms, then None at the end. A `SimpleQueue`, whose `put` may run inside itself, because the garbage
        # collector may close a stream at any point.
        self.outbox: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        # Each counted by one side alone.
        self.num_samples_put = 0
        self.num_samples_taken = 0
        # Wakes a consumer in an event loop.
        self.notify: Callable[[], object] | None = None
        self.is_finished = self.is_closed = False
        self.error: BaseException | None = None

    @property
    def is_full(self) -> bool:
        """Whether so much audio waits to be fetched that the stream sits out."""
        return self.num_samples_put - self.num_samples_taken >= self.max_samples

    def put_text(self, action: Callable[[SledTextSource], None]) -> None:
        if not self.is_finished:
            self.inbox.append(action)
            self.wake()

    def pull(self, pieces: Iterator[str]) -> None:
        """Fetches the next piece of text from where it comes."""
        end = object()
        try:
            piece: Any = next(pieces, end)
        except BaseException as error:
            self.put_text(partial(_raise, error))
        else:
            self.put_text(methodcaller("finish") if piece is end else methodcaller("push", piece))

    def put_audio(self, waveform: torch.Tensor | None) -> None:
        if waveform is not None:
            self.num_samples_put += len(waveform)
        self.outbox.put(waveform)
        notify = self.notify
        if notify is not None:
            # Its event loop may be gone.
            with contextlib.suppress(RuntimeError):
                notify()

    def end(self, error: BaseException | None = None) -> None:
        """Called by the server, when the speech is complete or given up."""
        # Who has given the stream up did not lose it.
        self.error = None if self.is_closed else error
        self.is_finished = True
        self.pieces = None
        self.inbox.clear()
        self.put_audio(None)

    def close(self) -> None:
        """Called by the consumer, or when there is none any more."""
        self.is_closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.outbox.get_nowait()
        self.put_audio(None)
        self.wake()


class SledStream:
    r"""
    One text on its way through a [`SledStreamServer`], as [`SledStreamServer.add`] returns it. Iterate over it for its
    audio: waveforms of shape `(num_samples,)` in float32 on the CPU, at the codec's sampling rate, which joined are what
    `generate` returns. What ended the stream before its time ([`SledStream.error`]) is raised after the audio made until
    then. A stream that nobody holds any more ends.

    While the server runs in its thread, text may be pushed and audio fetched in any threads, or with `async for` in an
    event loop. Without that, iterating runs the server's steps, and what they give other streams is kept for them.
    """

    def __init__(self, server: "SledStreamServer", channel: _Channel, takes_pieces: bool) -> None:
        self._server = server
        self._channel = channel
        self._takes_pieces = takes_pieces
        self._is_exhausted = False
        weakref.finalize(self, channel.close).atexit = False

    @property
    def is_finished(self) -> bool:
        """Whether the server has made all of the stream's audio, or has given it up (`bool`)."""
        return self._channel.is_finished

    @property
    def error(self) -> BaseException | None:
        """What ended the stream before its time (`BaseException`), or `None`."""
        return self._channel.error

    def push(self, piece: str) -> None:
        r"""
        Gives the stream the next piece of its text.

        Args:
            piece (`str`):
                The piece, cut anywhere.

        Raises:
            `ValueError`: if `piece` is not a string.
            `RuntimeError`: if the stream got its text in `add`, or the text was finished.
        """
        if not isinstance(piece, str):
            raise ValueError(f"`piece` must be a string, got {piece!r} of type {type(piece).__name__}.")
        self._check_takes_pieces()
        self._channel.put_text(methodcaller("push", piece))

    def finish(self) -> None:
        r"""
        Ends the text.

        Raises:
            `RuntimeError`: if the stream got its text in `add`, or the text was finished already.
        """
        self._check_takes_pieces()
        self._takes_pieces = False
        self._channel.put_text(methodcaller("finish"))

    def close(self) -> None:
        """Gives the stream up: audio that is not fetched yet is lost, iteration ends, and its place becomes free."""
        self._channel.close()

    def _check_takes_pieces(self) -> None:
        if not self._takes_pieces:
            raise RuntimeError("The text is complete: it was given to `add`, or `finish` was called.")

    def _take(self, block: bool) -> torch.Tensor | None:
        """The next waveform, or `None` at the end."""
        if self._is_exhausted:
            return None
        channel = self._channel
        waveform = channel.outbox.get(block=block)
        if waveform is not None and not channel.is_closed:
            was_full = channel.is_full
            channel.num_samples_taken += len(waveform)
            if was_full:
                channel.wake()
            return waveform
        self._is_exhausted = True
        if channel.error is not None and not channel.is_closed:
            raise channel.error
        return None

    def __iter__(self) -> "SledStream":
        return self

    def __next__(self) -> torch.Tensor:
        while True:
            try:
                waveform = self._take(block=self._server.is_running)
            except queue.Empty:
                self._server._work()
                continue
            if waveform is None:
                raise StopIteration
            return waveform

    def __aiter__(self) -> "SledStream":
        return self

    async def __anext__(self) -> torch.Tensor:
        event = asyncio.Event()
        self._channel.notify = partial(asyncio.get_running_loop().call_soon_threadsafe, event.set)
        try:
            while True:
                event.clear()
                try:
                    waveform = self._take(block=False)
                except queue.Empty:
                    if not self._server.is_running:
                        raise RuntimeError(
                            "`async for` needs a server that runs in its thread: call `start`."
                        ) from None
                    await event.wait()
                    continue
                if waveform is None:
                    raise StopAsyncIteration
                return waveform
        finally:
            self._channel.notify = None


class _Speech:
    """What is said on one stream."""

    def __init__(self, request: SledStreamRequest, chunker: SledAudioChunker, channel: _Channel) -> None:
        self.utterance, self.source = request.prepare()
        self.chunker = chunker
        self.channel = channel
        self.stream: weakref.ref[SledStream]
        # Whether the next piece of text is being fetched.
        self.is_pulling = False
        if self.utterance.prompt is not None:
            # Here, because it would hold up the other streams in a step.
            chunker.push(self.utterance.prompt[None], is_prompt=True)


_Deliver = Callable[[_Speech, torch.Tensor], None]


class SledStreamServer:
    r"""
    Speaks many texts at a time, by continuous batching: every frame of all streams is made in one batch, and a stream may
    join or leave between any two frames. The audio of a stream is that of `model.generate` for its text alone; it does not
    depend on the other streams, provided that it has a `generator` of its own.

    There are three ways to run it:

    - in a thread, between [`~SledStreamServer.start`] and [`~SledStreamServer.close`] or in a `with` block. Streams may
      then be added, fed and listened to in any threads. Iterables of text are read in threads, so that one that waits,
      such as a language model, holds up nobody else;
    - by calling [`~SledStreamServer.step`] again and again. Iterables of text are read in that call;
    - by iterating over the streams, which calls it.

    At most `max_streams` streams are active; further ones wait until one of these is done, in the order in which they were
    added. An active stream whose text has not arrived, or of whose audio half a minute waits to be fetched, sits out
    without holding up the others, but keeps its place. A stream that nobody holds any more ends.

    A text or voice prompt that joins is read in portions between the frames of the others.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model, with `sdpa` or `eager` attention.
        processor ([`SledProcessor`]):
            The model's processor.
        max_streams (`int`, *optional*, defaults to 8):
            Number of streams that are active at a time.
        compile_config ([`~transformers.CompileConfig`], *optional*):
            Compiles the step that makes a frame of all streams, for which its first call takes half a minute or more.
            By default that of `model.generation_config`, which
            [`~SledGenerationMixin.compile_generation`] sets after it has compiled ahead.

    Raises:
        `ValueError`: if the model has no codec or another kind of attention, `processor` is something else, or
        `max_streams` is out of range.

    Example:

    ```python
    >>> from transformers_sled import SledStreamServer

    >>> with SledStreamServer(model, processor, max_streams=8) as server:
    ...     streams = [server.add(text, generator=torch.Generator().manual_seed(0)) for text in texts]
    ...     audio = [torch.cat(list(stream)) for stream in streams]
    ```

    In an event loop, a server that runs in its thread is listened to without another:

    ```python
    >>> async def speak(text):
    ...     async for waveform in server.add(text):
    ...         print(waveform.shape)
    ```
    """

    def __init__(
        self,
        model: "SledForSpeechSynthesis",
        processor: "SledProcessor",
        max_streams: int = 8,
        compile_config: CompileConfig | None = None,
    ) -> None:
        if isinstance(max_streams, bool) or not isinstance(max_streams, int) or max_streams < 1:
            raise ValueError(f"`max_streams` must be an integer of at least 1, got {max_streams!r}.")
        if not hasattr(processor, "split_text"):
            raise ValueError(f"`processor` must be a `SledProcessor`, got {type(processor).__name__}.")
        attn_implementation = model.config._attn_implementation
        if attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"`model` must have 'sdpa' or 'eager' attention (`attn_implementation`), got {attn_implementation!r}."
            )
        self.model = model
        self.processor = processor
        self.max_streams = max_streams
        self._waiting: deque[_Speech] = deque()
        self._active: list[_Speech] = []
        self._decoder = SledStreamingDecoder(model.get_codec())
        self._engine = SledEngine(
            model,
            compile_config=compile_config or model.generation_config.compile_config,
            prefill_size=MAX_PREFILL_POSITIONS,
        )
        self._step_lock = threading.Lock()
        # The thread that is taking a step.
        self._stepping: int | None = None
        # A `SimpleQueue` for the reason that a channel's is one.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def num_active_streams(self) -> int:
        """Number of streams that have a place in the batch (`int`)."""
        return len(self._active)

    @property
    def num_waiting_streams(self) -> int:
        """Number of streams that wait for a place (`int`)."""
        return sum(not speech.channel.is_closed for speech in list(self._waiting))

    @property
    def is_running(self) -> bool:
        """Whether the server runs in a thread (`bool`)."""
        return self._thread is not None and self._thread.is_alive()

    def add(
        self,
        text: str | Iterable[str] | None = None,
        chunk_duration: float = 0.2,
        max_duration: float | None = None,
        **kwargs: Any,
    ) -> SledStream:
        r"""
        Adds a stream.

        Args:
            text (`str` or an iterable of `str`, *optional*):
                The text, or pieces of it, cut anywhere, that are fetched when they are needed. Without it, the text comes
                by [`SledStream.push`] until [`SledStream.finish`]. An offline model waits for the last piece.
            chunk_duration (`float`, *optional*, defaults to 0.2):
                Duration in seconds of every waveform but the first few, as with `stream`, and the last.
            max_duration (`float`, *optional*):
                Duration in seconds after which the speech is cut off. A source that never ends needs one.
            kwargs:
                The voice, as the processor takes it (`voice_preset`, `prompt_text`, `prompt_audio` and `sampling_rate`, or
                `prompt_latents` and `prompt_latents_mask`), `generator`, `generation_config`, `stopping_criteria`, and
                generation parameters as [`~SledGenerationMixin.generate`] takes them: `guidance_scale`, `temperature`,
                `do_sample`, `eos_threshold`, `max_new_tokens`, `min_new_tokens`, and `max_time`, which starts with this
                call. They may differ from stream to stream. Without a `generator`, noise comes from the global one.

        Returns:
            [`SledStream`]: the stream.

        Raises:
            `ValueError`: if an argument has another type or is out of range, or the text is empty or does not fit.
            `RuntimeError`: if the server is closed.

        Example:

        ```python
        >>> stream = server.add(guidance_scale=1.5)
        >>> stream.push("The dog barked ")
        >>> stream.push("all night.")
        >>> stream.finish()
        >>> for waveform in stream:
        ...     print(waveform.shape)
        ```
        """
        self._check_open()
        pieces = None if text is None else get_pieces(text)
        if refused := sorted(set(ENGINE_ARGUMENTS) & set(kwargs)):
            raise ValueError(f"Arguments that a server does not take: {', '.join(map(repr, refused))}.")
        # All streams share the decoder's weights.
        chunker = SledAudioChunker(self._decoder.select_rows([0]), chunk_duration)
        channel = _Channel(pieces, MAX_UNFETCHED_SECONDS * self._decoder.codec.config.sampling_rate, self._wake)
        speech = _Speech(SledStreamRequest(self.model, text, self.processor, max_duration, kwargs), chunker, channel)
        stream = SledStream(self, channel, takes_pieces=text is None)
        speech.stream = weakref.ref(stream)
        self._waiting.append(speech)
        self._wake()
        if self._is_closed:
            # By another thread, which may have missed this stream.
            channel.end(_closed_error())
        return stream

    def step(self) -> list[tuple[SledStream, torch.Tensor]]:
        r"""
        Makes the next frame of every stream that has its text, and reads on in the texts and voice prompts of streams that
        join.

        Returns:
            `list[tuple[SledStream, torch.FloatTensor]]`: the waveforms of shape `(num_samples,)` that are complete now,
            with their streams, in float32 on the CPU. They are not given again when the streams are iterated over.

        Raises:
            `RuntimeError`: if the server runs in a thread, or is closed.
        """
        self._check_open()
        if self.is_running:
            raise RuntimeError("The server runs in a thread, which takes the steps: iterate over the streams instead.")
        waveforms: list[tuple[SledStream, torch.Tensor]] = []

        def deliver(speech: _Speech, waveform: torch.Tensor) -> None:
            stream = speech.stream()
            if stream is not None:
                waveforms.append((stream, waveform))

        self._step(deliver)
        return waveforms

    def start(self) -> None:
        r"""
        Runs the server in a thread until it is closed.

        Raises:
            `RuntimeError`: if it is running already, or is closed.
        """
        self._check_open()
        if self.is_running:
            raise RuntimeError("The server is running already.")
        self._thread = threading.Thread(target=self._run, name="SledStreamServer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """
        Stops the server and frees its memory. Streams that are not finished end with a `RuntimeError`, after the audio
        made until then.
        """
        self._is_closed = True
        self._wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._step_lock:
            self._end_all(_closed_error())

    def __enter__(self) -> "SledStreamServer":
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("The server is closed.")

    def _wake(self) -> None:
        self._news.put(None)

    def _run(self) -> None:
        while not self._is_closed:
            # A step that fails closes the server and gives the error to all streams.
            with contextlib.suppress(Exception):
                self._work()

    def _work(self) -> None:
        """Takes a step that leaves its waveforms with their streams, or waits until there is something to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._news.get_nowait()
        if self._step(lambda speech, waveform: speech.channel.put_audio(waveform)):
            # Others may wait for what this step gave them.
            self._wake()
        elif not self._is_closed:
            self._news.get()

    def _end_all(self, error: BaseException) -> None:
        self._is_closed = True
        for speech in [*self._active, *self._waiting]:
            speech.channel.end(error)
        self._active.clear()
        self._waiting.clear()
        self._engine = SledEngine(self.model)

    def _step(self, deliver: _Deliver) -> bool:
        """Takes a step and hands out its waveforms. Returns whether there was anything to do."""
        if self._stepping == threading.get_ident():
            raise RuntimeError(
                "A source of text must not read a stream of its own server, which waits for the source."
            )
        with self._step_lock:
            if self._is_closed:
                return False
            self._stepping = threading.get_ident()
            try:
                has_worked = self._admit()
                for speech in list(self._active):
                    has_worked |= self._prepare(speech, deliver)
                speaking = {speech.utterance.row: speech for speech in self._active if speech.utterance.row}
                if self._engine.can_step:
                    has_worked = True
                    frames = [(speaking[row], frame, row.has_ended) for row, frame in self._engine.step()]
                    self._take_frames(frames, deliver)
                return has_worked
            except BaseException as error:
                self._end_all(error)
                raise
            finally:
                self._stepping = None

    def _admit(self) -> bool:
        """Drops streams that were closed and lets others take their places. Returns whether there were any."""
        closed = [speech for speech in self._active if speech.channel.is_closed]
        for speech in closed:
            self._remove(speech)
        has_worked = len(closed) > 0
        while self._waiting and len(self._active) < self.max_streams:
            has_worked = True
            speech = self._waiting.popleft()
            if speech.channel.is_closed:
                speech.channel.end()
            else:
                self._active.append(speech)
        return has_worked

    def _prepare(self, speech: _Speech, deliver: _Deliver) -> bool:
        """
        Takes the text that has come, lets the next part join, and asks for more text where it is needed. Returns whether
        there was anything to do.
        """
        channel, utterance = speech.channel, speech.utterance
        has_worked = len(channel.inbox) > 0
        try:
            while channel.inbox:
                speech.is_pulling = False
                channel.inbox.popleft()(speech.source)
        except BaseException as error:
            if not isinstance(error, Exception) and not self.is_running:
                raise
            self._remove(speech, error)
            return True
        utterance.join(self._engine)
        if utterance.is_finished:
            self._finish(speech, deliver)
            return True
        if utterance.row is not None:
            utterance.row.is_paused = channel.is_full
        if utterance.needs_text(self._engine) and channel.pieces is not None and not speech.is_pulling:
            speech.is_pulling = True
            if self.is_running:
                threading.Thread(target=channel.pull, args=(channel.pieces,), daemon=True).start()
            else:
                has_worked = True
                channel.pull(channel.pieces)
        return has_worked

    def _take_frames(self, frames: list[tuple[_Speech, SledFrame, bool]], deliver: _Deliver) -> None:
        """Takes a frame of each speech, with whether it ends a part."""
        for speech, frame, _ in frames:
            speech.utterance.take(frame)
        heard = [(speech, frame.latents[None, None]) for speech, frame, _ in frames if frame.is_heard]
        chunkers = [speech.chunker for speech, _ in heard]
        for (speech, _), waveforms in zip(
            heard, SledAudioChunker.push_each(chunkers, [latents for _, latents in heard]), strict=True
        ):
            for waveform in waveforms:
                deliver(speech, waveform)
        for speech, _, ends_part in frames:
            if ends_part:
                speech.chunker.end_part()
            # In the step that made the last frame, so that the place is free for the next.
            speech.utterance.join(self._engine)
            if speech.utterance.is_finished:
                self._finish(speech, deliver)

    def _finish(self, speech: _Speech, deliver: _Deliver) -> None:
        for waveform in speech.chunker.finish():
            deliver(speech, waveform)
        self._remove(speech)

    def _remove(self, speech: _Speech, error: BaseException | None = None) -> None:
        self._active.remove(speech)
        speech.utterance.leave(self._engine)
        speech.channel.end(error)


def _raise(error: BaseException, source: SledTextSource) -> None:
    raise error


def _closed_error() -> RuntimeError:
    return RuntimeError("The server was closed before the speech ended.")


__all__ = ["SledStream", "SledStreamServer"]
