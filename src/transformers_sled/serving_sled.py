"""Serving: many streams in one batch, which each of them may join and leave between any two frames."""

import contextlib
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .codec_sled import SledAudioChunker, SledStreamingDecoder
from .generation_sled import _NEEDS_FRAME, _NEEDS_TEXT, _get_pieces, _Row, _StreamRequest, _TextSource


if TYPE_CHECKING:
    from .modeling_sled import SledForSpeechSynthesis
    from .processing_sled import SledProcessor

# Text and voice prompt of a stream that joins are read this many positions at a time, with frames of the others in between.
MAX_PREFILL_POSITIONS = 64

# Positions that the cache grows by when a stream needs more.
CACHE_GROWTH = 256


class _Branch:
    """One row of the batch: a stream has one for its text and, under guidance, one without."""

    def __init__(self) -> None:
        # Its place in the cache, or -1.
        self.row = -1
        self.length = 0
        # Embeddings (length, hidden_size) to be read before the next frame.
        self.inputs = torch.empty(0)


@dataclass
class _Places:
    """Where the next keys and values go: rows (batch_size,) and positions (batch_size, num_positions)."""

    rows: torch.Tensor
    positions: torch.Tensor
    # Positions that are filled then in the longest row.
    length: int
    are_first_rows: bool


class _BranchCacheLayer(CacheLayerMixin):
    """Keys and values (row, head, position, head_dim), each row filled up to a length of its own."""

    is_sliding = False

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.places = _Places(torch.empty(0), torch.empty(0), length=0, are_first_rows=True)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, num_heads, _, head_dim = key_states.shape
        self.keys = key_states.new_zeros(self.num_rows, num_heads, 0, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._store(self.keys, key_states)
        self.values = self._store(self.values, value_states)
        return self._get(self.keys), self._get(self.values)

    def _store(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        missing = self.places.length - stored.shape[2]
        if missing > 0:
            # Zeros, because what is masked must at least be finite.
            growth = math.ceil(missing / CACHE_GROWTH) * CACHE_GROWTH
            stored = torch.nn.functional.pad(stored, (0, 0, 0, growth))
        stored[self.places.rows[:, None], :, self.places.positions] = states.transpose(1, 2)
        return stored

    def _get(self, stored: torch.Tensor) -> torch.Tensor:
        stored = stored[:, :, : self.places.length]
        # Unless some streams sit out, the batch is the first rows, which need no copy.
        return stored[: len(self.places.rows)] if self.places.are_first_rows else stored[self.places.rows]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the first positions of a row to another."""
        for stored in (self.keys, self.values):
            stored[target, :, :length] = stored[source, :, :length]

    def get_seq_length(self) -> int:
        return self.places.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.length, 0


class _BranchCache(Cache):
    """Keys and values of all branches, without gaps between the rows."""

    def __init__(self, num_layers: int, num_rows: int) -> None:
        super().__init__(layers=[_BranchCacheLayer(num_rows) for _ in range(num_layers)])
        self.branches: list[_Branch] = []

    def add(self, branch: _Branch) -> None:
        branch.row = len(self.branches)
        self.branches.append(branch)

    def remove(self, branch: _Branch) -> None:
        """Takes a branch out; the last one moves into its row."""
        last = self.branches.pop()
        if last is not branch:
            if last.length > 0:
                for layer in self.layers:
                    layer.move_row(last.row, branch.row, last.length)
            last.row = branch.row
            self.branches[last.row] = last
        branch.row = -1

    def prepare(self, branches: list[_Branch], num_positions: int, device: torch.device) -> _Places:
        """Makes room for `num_positions` more positions of these branches, which are in the order of their rows."""
        lengths = torch.tensor([branch.length for branch in branches], device=device)
        places = _Places(
            rows=torch.tensor([branch.row for branch in branches], device=device),
            positions=lengths[:, None] + torch.arange(num_positions, device=device),
            length=max(branch.length for branch in branches) + num_positions,
            are_first_rows=branches[-1].row == len(branches) - 1,
        )
        for layer in self.layers:
            layer.places = places
        return places


class _Speech:
    """What is said on one stream, and what its branches read for it."""

    def __init__(self, model: "SledForSpeechSynthesis", request: _StreamRequest, stream: "SledStream") -> None:
        self.model = model
        self.request = request
        self.stream = stream
        self.guidance_scale = float(request.generation_config.guidance_scale)
        self.branches = [_Branch()] if self.guidance_scale == 1 else [_Branch(), _Branch()]
        # Whether the next piece of text is being fetched.
        self.is_pulling = False
        self.events = model._stream_events(request, self._run)
        # `_NEEDS_TEXT`, `_NEEDS_FRAME`, or `None` where it can go on by itself.
        self.needs: object = None
        # The part that is being spoken.
        self.row: _Row
        # What it gets when it needs a frame: latents (1, latent_dim), end-of-speech logit (1,) on the CPU, and the latents'
        # embedding (1, hidden_size).
        self.frame: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @property
    def is_speaking(self) -> bool:
        return self.row.num_frames > 0

    def draw_noise(self) -> torch.Tensor:
        """Noise (1, noise_dim) of the next frame in float32."""
        return self.model._draw_noise([self.row], [0], self.request.generation_config, self.request.generator)

    def _run(self, row: _Row) -> Generator[Any, None, None]:
        """What the model's `_run` does for one row, except that it asks for its frames."""
        model, request = self.model, self.request
        while not model._has_text(row):
            yield None
        self.row = row
        for branch in self.branches:
            branch.length = 0
        if self.guidance_scale != 1:
            self.branches[1].inputs = model._get_first_unconditional_inputs(row)
        self.branches[0].inputs = model._get_first_inputs(row)
        while True:
            yield _NEEDS_FRAME
            latents, eos_logit, embedding = self.frame
            yield model._end_rows(
                [row], [0], latents, eos_logit, request.generation_config, request.stopping_criteria
            )[0]
            if row.has_ended:
                return
            while not model._has_text(row):
                yield None
            self.branches[-1].inputs = self.branches[0].inputs = embedding
            if chunk := model._read_chunk(row):
                text = model.embed_text(torch.tensor([chunk], device=model.device))[0]
                self.branches[0].inputs = torch.cat([embedding, text])


class SledStream:
    r"""
    One text on its way through a [`SledStreamServer`], as [`SledStreamServer.add`] returns it. Iterate over it for its
    audio: waveforms of shape `(num_samples,)` in float32 on the CPU, at the codec's sampling rate, which joined are what
    `generate` returns. What ended the stream before its time ([`SledStream.error`]) is raised after the audio made until
    then.

    While the server runs in its thread, text may be pushed and audio fetched in any threads. Without that, iterating runs
    the server's steps, and what they give other streams is kept for them.
    """

    def __init__(self, server: "SledStreamServer", pieces: Iterator[str] | None, takes_pieces: bool) -> None:
        self._server = server
        self._pieces = pieces
        self._takes_pieces = takes_pieces
        # What is to be done with the text in the server's next step.
        self._inbox: deque[Callable[[_TextSource], None]] = deque()
        # Waveforms, then None at the end.
        self._outbox: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._is_finished = self._is_exhausted = self._is_closed = False
        self._error: BaseException | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the server has made all of the stream's audio, or has given it up (`bool`)."""
        return self._is_finished

    @property
    def error(self) -> BaseException | None:
        """What ended the stream before its time (`BaseException`), or `None`."""
        return self._error

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
        self._put(methodcaller("push", piece))

    def finish(self) -> None:
        r"""
        Ends the text.

        Raises:
            `RuntimeError`: if the stream got its text in `add`, or the text was finished already.
        """
        self._check_takes_pieces()
        self._takes_pieces = False
        self._put(methodcaller("finish"))

    def close(self) -> None:
        """Gives the stream up: audio that is not fetched yet is lost, iteration ends, and its place becomes free."""
        self._is_closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._outbox.get_nowait()
        self._outbox.put(None)
        self._server._wake()

    def _check_takes_pieces(self) -> None:
        if not self._takes_pieces:
            raise RuntimeError("The text is complete: it was given to `add`, or `finish` was called.")

    def _put(self, action: Callable[[_TextSource], None]) -> None:
        if not self._is_finished:
            self._inbox.append(action)
            self._server._wake()

    def _pull(self, pieces: Iterator[str]) -> None:
        """Fetches the next piece of text from where it comes."""
        end = object()
        try:
            piece: Any = next(pieces, end)
        except BaseException as error:
            self._put(partial(_raise, error))
        else:
            self._put(methodcaller("finish") if piece is end else methodcaller("push", piece))

    def _end(self, error: BaseException | None = None) -> None:
        self._error = error
        self._is_finished = True
        self._pieces = None
        self._inbox.clear()
        self._outbox.put(None)

    def __iter__(self) -> "SledStream":
        return self

    def __next__(self) -> torch.Tensor:
        if self._is_exhausted:
            raise StopIteration
        while True:
            try:
                waveform = self._outbox.get(block=self._server.is_running)
            except queue.Empty:
                self._server._work()
                continue
            if waveform is not None and not self._is_closed:
                return waveform
            self._is_exhausted = True
            if self._error is not None and not self._is_closed:
                raise self._error
            raise StopIteration


_Deliver = Callable[[SledStream, torch.Tensor], None]


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
    added. An active stream whose text has not arrived sits out without holding up the others, but keeps its place. A
    stream is spoken as fast as the machine can, and its audio is kept until it is fetched.

    A stream takes one row of the batch, and a second one where its `guidance_scale` is not 1. Rows have a key and value
    cache of their own, filled to lengths of their own, so that there is no padding between streams. A text or voice prompt
    that joins is read in portions between the frames of the others.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model, with `sdpa` or `eager` attention.
        processor ([`SledProcessor`]):
            The model's processor.
        max_streams (`int`, *optional*, defaults to 8):
            Number of streams that are active at a time.

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

    In an asynchronous program, waveforms are waited for in threads:

    ```python
    >>> async def speak(text):
    ...     stream = server.add(text)
    ...     while (waveform := await asyncio.to_thread(next, stream, None)) is not None:
    ...         print(waveform.shape)
    ```
    """

    def __init__(self, model: "SledForSpeechSynthesis", processor: "SledProcessor", max_streams: int = 8) -> None:
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
        self._cache = _BranchCache(model.config.num_hidden_layers, 2 * max_streams)
        self._decoder = SledStreamingDecoder(model.get_codec())
        self._step_lock = threading.Lock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def num_active_streams(self) -> int:
        """Number of streams that have a place in the batch (`int`)."""
        return len(self._active)

    @property
    def num_waiting_streams(self) -> int:
        """Number of streams that wait for a place (`int`)."""
        return len(self._waiting)

    @property
    def is_running(self) -> bool:
        """Whether the server runs in a thread (`bool`)."""
        return self._thread is not None

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
                Duration in seconds of every waveform but the first, which comes as early as possible, and the last.
            max_duration (`float`, *optional*):
                Duration in seconds after which the speech is cut off. A source that never ends needs one.
            kwargs:
                The voice, as the processor takes it (`prompt_text`, `prompt_audio` and `sampling_rate`, or
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
        pieces = None if text is None else _get_pieces(text)
        # All streams share the decoder's weights.
        chunker = SledAudioChunker(self._decoder.select_rows([0]), chunk_duration)
        request = self.model._prepare_stream(text, self.processor, chunker, max_duration, kwargs)
        if request.model_kwargs:
            names = ", ".join(map(repr, sorted(request.model_kwargs)))
            raise ValueError(f"Arguments that a server does not take: {names}.")
        stream = SledStream(self, pieces, takes_pieces=text is None)
        speech = _Speech(self.model, request, stream)
        # Decodes the voice prompt, which would hold up the other streams in a step.
        next(speech.events)
        self._waiting.append(speech)
        self._wake()
        if self._is_closed:
            # By another thread, which may have missed this stream.
            stream._end(_closed_error())
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
        self._step(lambda stream, waveform: waveforms.append((stream, waveform)))
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
        self._wake()

    def close(self) -> None:
        """
        Stops the server and frees its memory. Streams that are not finished end with a `RuntimeError`, after the audio
        made until then.
        """
        self._is_closed = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
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
        self._news.set()

    def _run(self) -> None:
        while not self._is_closed:
            # A step that fails closes the server and gives the error to all streams.
            with contextlib.suppress(Exception):
                self._work()

    def _work(self) -> None:
        """Takes a step that leaves its waveforms with their streams, or waits until there is something to do."""
        self._news.clear()
        if self._step(lambda stream, waveform: stream._outbox.put(waveform)):
            # Others may wait for what this step gave them.
            self._wake()
        elif not self._is_closed:
            self._news.wait()

    def _end_all(self, error: BaseException) -> None:
        self._is_closed = True
        for speech in [*self._active, *self._waiting]:
            speech.stream._end(error)
        self._active.clear()
        self._waiting.clear()
        self._cache = _BranchCache(0, 0)

    def _step(self, deliver: _Deliver) -> bool:
        """Takes a step and hands out its waveforms. Returns whether there was anything to do."""
        with self._step_lock, torch.no_grad():
            if self._is_closed:
                return False
            try:
                has_worked = self._admit()
                for speech in list(self._active):
                    has_worked |= self._take_text(speech, deliver)
                prefills = self._get_prefills()
                for branches in prefills:
                    self._prefill(branches)
                ready = [
                    speech
                    for speech in self._get_asking()
                    if all(len(branch.inputs) == 1 for branch in speech.branches)
                ]
                if ready:
                    self._make_frames(ready, deliver)
                return has_worked or len(prefills) + len(ready) > 0
            except BaseException as error:
                self._end_all(error)
                raise

    def _admit(self) -> bool:
        """Drops streams that were closed and lets others take their places. Returns whether there were any."""
        closed = [speech for speech in self._active if speech.stream._is_closed]
        for speech in closed:
            self._remove(speech)
        has_worked = len(closed) > 0
        while self._waiting and len(self._active) < self.max_streams:
            has_worked = True
            speech = self._waiting.popleft()
            if speech.stream._is_closed:
                speech.stream._end()
            else:
                self._active.append(speech)
        return has_worked

    def _take_text(self, speech: _Speech, deliver: _Deliver) -> bool:
        """Takes the text that has come, and asks for more where it is needed. Returns whether there was anything to do."""
        stream = speech.stream
        has_worked = len(stream._inbox) > 0
        try:
            while stream._inbox:
                speech.is_pulling = False
                stream._inbox.popleft()(speech.request.source)
        except BaseException as error:
            if not isinstance(error, Exception) and not self.is_running:
                raise
            self._remove(speech, error)
            return True
        if speech.needs is None or (has_worked and speech.needs is _NEEDS_TEXT):
            has_worked = True
            self._advance(speech, deliver)
        if speech.needs is _NEEDS_TEXT and stream._pieces is not None and not speech.is_pulling:
            speech.is_pulling = True
            if self.is_running:
                threading.Thread(target=stream._pull, args=(stream._pieces,), daemon=True).start()
            else:
                has_worked = True
                stream._pull(stream._pieces)
        return has_worked

    def _advance(self, speech: _Speech, deliver: _Deliver) -> None:
        """Lets a stream go on until it needs text or a frame, or ends."""
        try:
            for event in speech.events:
                if isinstance(event, torch.Tensor):
                    deliver(speech.stream, event)
                elif event in (_NEEDS_TEXT, _NEEDS_FRAME):
                    speech.needs = event
                    break
            else:
                self._remove(speech)
                return
        except Exception as error:
            self._remove(speech, error)
            return
        if speech.needs is _NEEDS_FRAME and speech.branches[0].row < 0:
            for branch in speech.branches:
                self._cache.add(branch)

    def _remove(self, speech: _Speech, error: BaseException | None = None) -> None:
        self._active.remove(speech)
        for branch in speech.branches:
            if branch.row >= 0:
                self._cache.remove(branch)
        speech.stream._end(error)

    def _get_asking(self) -> list[_Speech]:
        """Those that wait for a frame."""
        return [speech for speech in self._active if speech.needs is _NEEDS_FRAME]

    def _get_prefills(self) -> list[list[_Branch]]:
        """
        Branches that have more to read than a frame: in one batch those of all streams that speak and read on in their
        text, in another those of the first stream that joins.
        """
        speaking: list[_Branch] = []
        joining: list[_Branch] = []
        for speech in self._get_asking():
            branches = [branch for branch in speech.branches if len(branch.inputs) > 1]
            if speech.is_speaking:
                speaking += branches
            elif not joining:
                joining = branches
        return [branches for branches in (speaking, joining) if branches]

    def _prefill(self, branches: list[_Branch]) -> None:
        """Reads the next inputs of some branches, except for each one's last, which the frame is made from."""
        branches = sorted(branches, key=attrgetter("row"))
        inputs = [branch.inputs[:-1][:MAX_PREFILL_POSITIONS] for branch in branches]
        # What padding leaves behind a row's end is masked, and overwritten by what comes next.
        self._forward(branches, torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True))
        for branch, read in zip(branches, inputs, strict=True):
            branch.length += len(read)
            branch.inputs = branch.inputs[len(read) :]

    def _make_frames(self, speeches: list[_Speech], deliver: _Deliver) -> None:
        """Makes the next frame of these streams."""
        model = self.model
        branches = sorted((branch for speech in speeches for branch in speech.branches), key=attrgetter("row"))
        outputs = self._forward(branches, torch.stack([branch.inputs for branch in branches]))
        for branch in branches:
            branch.length += 1
        places = {branch.row: place for place, branch in enumerate(branches)}
        # Without guidance both are the same branch.
        conditional, unconditional = (
            torch.tensor([places[speech.branches[index].row] for speech in speeches], device=model.device)
            for index in (0, -1)
        )
        hidden_states = outputs.last_hidden_state[:, -1]
        scales = torch.tensor([[speech.guidance_scale] for speech in speeches], device=model.device)
        difference = hidden_states[conditional] - hidden_states[unconditional]
        mixed = (hidden_states[unconditional] + scales * difference).to(hidden_states.dtype)
        noise = torch.cat([speech.draw_noise().to(model.device) for speech in speeches])
        latents = model.generative_head(mixed, noise.to(mixed.dtype))
        embeddings = model.embed_latents(latents[:, None])
        # Moved in one go, because every stream looks at its own.
        eos_logits = outputs.eos_logits[conditional, -1].float().cpu()
        frames = zip(latents.split(1), eos_logits.split(1), embeddings, strict=True)
        for speech, frame in zip(speeches, frames, strict=True):
            speech.frame = frame
            self._advance(speech, deliver)

    def _forward(self, branches: list[_Branch], inputs_embeds: torch.Tensor) -> Any:
        """Runs the model on the next inputs (batch_size, num_positions, hidden_size) of branches in order of their rows."""
        places = self._cache.prepare(branches, inputs_embeds.shape[1], inputs_embeds.device)
        is_ahead = torch.arange(places.length, device=inputs_embeds.device) > places.positions[..., None]
        mask = torch.zeros_like(is_ahead, dtype=inputs_embeds.dtype)
        mask = mask.masked_fill(is_ahead, torch.finfo(mask.dtype).min)
        return self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask[:, None],
            position_ids=places.positions,
            past_key_values=self._cache,
            use_cache=True,
        )


def _raise(error: BaseException, source: _TextSource) -> None:
    raise error


def _closed_error() -> RuntimeError:
    return RuntimeError("The server was closed before the speech ended.")


__all__ = ["SledStream", "SledStreamServer"]
