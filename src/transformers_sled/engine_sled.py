"""The one loop of generation: rows that join, step and leave; guidance, noise and the end of speech, compiled or not."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from transformers import CompileConfig, GenerationConfig
from transformers.generation import StoppingCriteriaList

from .cache_sled import CACHE_ARGUMENT, SledCache, attends_in_float32, get_fixed_capacity
from .interleaving_sled import count_tokens_before, interleave
from .step_sled import SledStep
from .text_sled import SledTextPart


if TYPE_CHECKING:
    from .modeling_sled import SledForSpeechSynthesis

# Speech that is still going on after this much time is taken for a model that missed the end.
MAX_SECONDS_PER_TOKEN = 0.5
MAX_EXTRA_SECONDS = 2.0

# Sequences are read in one batch if padding them to its longest adds no more than this share.
MAX_PADDING = 0.2

# Rows that start together read up to this many positions and make their first frames in one pass over the weights. The
# attention of more costs more than that saves.
MAX_STARTING_POSITIONS = 512


class SledNoise:
    """
    Source of the noise of one or more rows.

    Args:
        generator (`torch.Generator`, *optional*):
            Generator to draw from, the global one by default.
        num_rows (`int`):
            Number of rows that share it. Every draw is for all of them, whether they have ended or not, so that what a
            row gets does not depend on when others end.
        noise_dim (`int`):
            Width of the noise.
        scale (`float`):
            Factor of standard normal noise; 0 for none, which draws nothing.
        device (`torch.device`):
            Device of the noise where there is no generator.
    """

    def __init__(
        self, generator: torch.Generator | None, num_rows: int, noise_dim: int, scale: float, device: torch.device
    ) -> None:
        self.generator = generator
        self.shape = (num_rows, noise_dim)
        self.scale = scale
        self.device = device if generator is None else generator.device

    def __len__(self) -> int:
        return self.shape[0]

    def draw(self) -> torch.Tensor:
        """
        Returns:
            `torch.FloatTensor` of shape `(num_rows, noise_dim)`: noise of the next frame in float32.
        """
        if self.scale == 0:
            return torch.zeros(self.shape, device=self.device)
        return torch.randn(self.shape, generator=self.generator, device=self.device) * self.scale


@dataclass(eq=False)
class SledBranch:
    """A row of the cache: every utterance has one that reads its text and, under guidance, one that does not."""

    row: int = -1
    length: int = 0
    # Embeddings (num_positions, hidden_size) to be read before the one that the next frame is made from.
    pending: torch.Tensor | None = None
    # All that was read (num_positions, hidden_size), where there is no cache.
    history: torch.Tensor | None = None


@dataclass(eq=False)
class SledRow:
    """
    One part of a text on its way through the engine.

    Args:
        part ([`SledTextPart`]):
            Its token ids, which may still be arriving.
        config ([`~transformers.GenerationConfig`]):
            What it is generated with: `guidance_scale` and `eos_threshold`.
        noise ([`SledNoise`]):
            Where its noise comes from.
        noise_index (`int`, *optional*, defaults to 0):
            Its row of the noise.
        criteria ([`~transformers.StoppingCriteriaList`], *optional*):
            Criteria that end it, and all parts to come. Rows with the same list are asked together.
        primed_ids (`list[int]`, *optional*):
            Token ids of the part before it, read first, without the end token.
        prompt (`torch.FloatTensor` of shape `(num_frames, latent_dim)`, *optional*):
            Frames of the voice prompt or of the part before it.
        min_frames (`int`, *optional*, defaults to 0):
            Number of frames before which no end is accepted.
        max_frames (`int`, *optional*):
            Number of frames at which it ends. By default a budget follows from the text.
        num_earlier_frames (`int`, *optional*, defaults to 0):
            Number of frames of the parts before it, which stopping criteria count.
        num_prompt_tokens (`int`, *optional*, defaults to 0):
            Number of its tokens, the first ones, that say what `prompt` says.
    """

    part: SledTextPart
    config: GenerationConfig
    noise: SledNoise
    noise_index: int = 0
    criteria: StoppingCriteriaList | None = None
    primed_ids: list[int] = field(default_factory=list)
    prompt: torch.Tensor | None = None
    min_frames: int = 0
    max_frames: int | None = None
    num_earlier_frames: int = 0
    num_prompt_tokens: int = 0

    # Sits out, although its text has arrived.
    is_paused: bool = field(default=False, init=False)
    num_frames: int = field(default=0, init=False)
    num_tokens_read: int = field(default=0, init=False)
    has_ended: bool = field(default=False, init=False)
    # Ended by a stopping criterion, which ends the parts to come as well.
    is_stopped: bool = field(default=False, init=False)
    # Ended by the number of frames and not by the model.
    is_cut_off: bool = field(default=False, init=False)
    branches: list[SledBranch] = field(default_factory=list, init=False)

    @property
    def is_guided(self) -> bool:
        """Whether it has a branch without text (`bool`)."""
        return float(self.config.guidance_scale) != 1

    @property
    def num_prompt_frames(self) -> int:
        """Number of frames that are given (`int`)."""
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that have arrived (`int`)."""
        return len(self.primed_ids) + max(0, len(self.part.ids) - (1 if self.primed_ids else 0))

    def read_tokens(self, end: int) -> list[int]:
        """The next tokens (`list[int]`) up to index `end`, which count as read from now on."""
        # The start token stands once, at the start.
        ids = self.primed_ids + self.part.ids[1:] if self.primed_ids else self.part.ids
        tokens = ids[self.num_tokens_read : end]
        self.num_tokens_read += len(tokens)
        return tokens


@dataclass
class SledFrame:
    """
    What one step gives a row.

    Args:
        latents (`torch.FloatTensor` of shape `(latent_dim,)`):
            The frame.
        eos_logit (`torch.FloatTensor` of shape `()`):
            Its end-of-speech logit.
        is_heard (`bool`):
            Whether it is part of the speech, or signals its end.
    """

    latents: torch.Tensor
    eos_logit: torch.Tensor
    is_heard: bool


# Embeddings, mask, positions, and where the last input of every branch is, as [`SledStep`] takes them.
_Inputs: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]"


class SledEngine:
    r"""
    Generates frames for any number of rows in one batch. A row joins with its text and voice, gets a frame at every step
    for which its text has arrived, and leaves when it has ended. Rows are at points of their own: every branch has its
    own length in the cache and nothing is padded on the left.

    Under guidance a row has a second branch that reads `</s>` and the same frames; hidden states are mixed as
    `unconditional + guidance_scale * (conditional - unconditional)` before the generative head, and the end is decided on
    the conditional one, as in the original.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        num_positions (`int`, *optional*):
            Positions that every row has room for, in a cache of fixed capacity. By default the cache grows.
        compile_config ([`~transformers.CompileConfig`], *optional*):
            Compiles the step with these options. With `dynamic=True` it is traced once for all numbers of rows, and without
            for every one it meets, of which there are few, because rows are then padded to powers of two.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether to keep keys and values; without them every step reads everything again.
        prefill_size (`int`, *optional*):
            Number of positions of a joining row that are read at a time, with frames of the others in between. All at
            once by default.
        synced_gpus (`bool`, *optional*, defaults to `False`):
            Whether to run as many forward passes as the slowest process, for weights that are sharded.
    """

    def __init__(
        self,
        model: "SledForSpeechSynthesis",
        num_positions: int | None = None,
        compile_config: CompileConfig | None = None,
        use_cache: bool = True,
        prefill_size: int | None = None,
        synced_gpus: bool = False,
    ) -> None:
        self.model = model
        self.config = model.config
        self.prefill_size = prefill_size
        self.synced_gpus = synced_gpus
        self._takes_additive_mask = self.config._attn_implementation in ("eager", "sdpa")
        self.rows: list[SledRow] = []
        self._branches: list[SledBranch] = []
        self._cache: SledCache | None = None
        if use_cache:
            # A text chunk that is shorter than another is padded behind its row's end.
            slack = self.config.text_chunk_size or 0
            capacity = None if num_positions is None else get_fixed_capacity(num_positions + slack)
            self._cache = SledCache(self.config.num_hidden_layers, capacity)
        self._step = SledStep(model, compile_config)
        # Powers of two for a step that is traced for every size it meets.
        self._pads_to_powers = compile_config is not None and not compile_config.dynamic
        self._dtype, self._device = model.get_input_embeddings().weight.dtype, model.device
        self._mask_dtype = torch.float32 if attends_in_float32(self.config, self._device, self._dtype) else self._dtype
        # The embeddings that the next frames are made from, and how much each row of the cache holds.
        self._inputs = torch.zeros(0, 1, self.config.hidden_size, dtype=self._dtype, device=self._device)
        self._lengths = torch.zeros(0, dtype=torch.long, device=self._device)
        self._layout: _Layout | None = None

    def join(self, row: SledRow) -> None:
        """
        Lets a row join.

        Args:
            row ([`SledRow`]):
                The row.
        """
        self.rows.append(row)
        self._layout = None

    def leave(self, row: SledRow) -> None:
        """
        Takes a row out, which a row that has ended does by itself.

        Args:
            row ([`SledRow`]):
                The row.
        """
        self.rows.remove(row)
        self._layout = None
        for branch in row.branches:
            last = self._branches.pop()
            if last is not branch:
                self._move(last, branch.row)
        row.branches = []

    def _move(self, branch: SledBranch, row: int) -> None:
        """Moves the last branch to the row of one that has left, so that there are no gaps."""
        if self._cache is not None:
            self._cache.move_row(branch.row, row, branch.length)
        self._inputs[row] = self._inputs[branch.row]
        self._lengths[row] = self._lengths[branch.row]
        branch.row = row
        self._branches[row] = branch

    def needs_text(self, row: SledRow) -> bool:
        """
        Whether the text for a row's next step has yet to arrive.

        Args:
            row ([`SledRow`]):
                The row.

        Returns:
            `bool`: `True` if it sits out until then.
        """
        return not row.part.is_complete and row.num_tokens < self._count_tokens_due(row)

    def _count_tokens_due(self, row: SledRow) -> int:
        """Number of tokens that the model reads before the row's next frame, if the text has as many."""
        num_frames = row.num_prompt_frames + row.num_frames
        if self.config.is_interleaved:
            return count_tokens_before(self.config, num_frames, self.config.max_position_embeddings)
        return self.config.max_position_embeddings

    @property
    def can_step(self) -> bool:
        """Whether there is a row that can go on (`bool`)."""
        return any(not row.is_paused and not self.needs_text(row) for row in self.rows)

    @torch.no_grad()
    def step(self) -> list[tuple[SledRow, SledFrame]]:
        """
        Makes the next frame of every row that has its text. Rows that end leave.

        Returns:
            `list[tuple[SledRow, SledFrame]]`: the rows and their frames. There are none where the text of joining rows is
            being read in portions.
        """
        ready = [row for row in self.rows if not row.is_paused and not self.needs_text(row)]
        for row in ready:
            self._feed(row)
        if self._can_start_at_once(ready):
            return self._make_frames(ready, starts=True)
        self._read(ready)
        ready = [row for row in ready if all(branch.pending is None for branch in row.branches)]
        return self._make_frames(ready) if ready else []

    def _can_start_at_once(self, rows: list[SledRow]) -> bool:
        branches = [branch for row in rows for branch in row.branches]
        num_positions = sum(1 if branch.pending is None else len(branch.pending) + 1 for branch in branches)
        return (
            self._cache is not None
            and self._takes_additive_mask
            and len(branches) == len(self._branches)
            and all(branch.length == 0 for branch in branches)
            and len(branches) < num_positions <= (self.prefill_size or MAX_STARTING_POSITIONS)
        )

    # Inputs

    def _feed(self, row: SledRow) -> None:
        """Gives a row's branches what they have to read before its next frame, if that is more than the last frame."""
        if not row.branches:
            self._start(row)
            return
        due = self._count_tokens_due(row)
        if due <= row.num_tokens_read or not (tokens := row.read_tokens(due)):
            return
        branch = row.branches[0]
        frame = self._inputs[branch.row]
        text = self._embed_text(tokens)
        branch.pending = torch.cat([frame, text[:-1]])
        self._inputs[branch.row] = text[-1]

    def _start(self, row: SledRow) -> None:
        model = self.model
        # With a voice prompt, its frames fill the chunks of the text.
        text = self._embed_text(row.read_tokens(self._count_tokens_due(row)))
        sequences = [text]
        prompt = None if row.prompt is None else model.embed_latents(row.prompt[None])[0]
        if prompt is not None:
            sequences = [interleave(self.config, text, prompt)]
        if row.is_guided:
            start = self._embed_text([self.config.eos_token_id])
            sequences.append(start if prompt is None else torch.cat([start, prompt]))
        for sequence in sequences:
            branch = SledBranch(row=len(self._branches))
            row.branches.append(branch)
            self._branches.append(branch)
            self._make_room()
            self._lengths[branch.row] = 0
            self._inputs[branch.row] = sequence[-1]
            if len(sequence) > 1:
                branch.pending = sequence[:-1]
        self._layout = None

    def _make_room(self) -> None:
        if len(self._branches) > len(self._lengths):
            growth = max(2, len(self._lengths))
            self._inputs = torch.nn.functional.pad(self._inputs, (0, 0, 0, 0, 0, growth))
            self._lengths = torch.nn.functional.pad(self._lengths, (0, growth))

    def _embed_text(self, ids: list[int]) -> torch.Tensor:
        return self.model.embed_text(torch.tensor([ids], device=self._device))[0]

    # Reading

    def _read(self, rows: Sequence[SledRow]) -> None:
        """Reads what comes before the next frames' inputs: all of it, or the next portion of the first row that joins."""
        branches: list[SledBranch] = []
        is_joining = False
        for row in rows:
            pending = [branch for branch in row.branches if branch.pending is not None]
            if pending and row.num_frames == 0 and self.prefill_size is not None:
                if is_joining:
                    continue
                is_joining = True
            branches += pending
        portions = {branch: _split(branch, self.prefill_size) for branch in branches}
        branches.sort(key=lambda branch: -len(portions[branch]))
        while branches:
            first = branches[0]
            batch = [
                branch
                for branch in branches
                if (branch.length == 0) == (first.length == 0)
                and len(portions[branch]) >= (1 - MAX_PADDING) * len(portions[first])
                # Masks of other kinds know no rows that go on at different lengths.
                and (first.length == 0 or self._takes_additive_mask or branch is first)
            ]
            self._read_batch(batch, [portions[branch] for branch in batch])
            branches = [branch for branch in branches if branch not in batch]

    def _read_batch(self, branches: list[SledBranch], inputs: list[torch.Tensor]) -> None:
        """Reads inputs (num_positions, hidden_size) of some branches, padded behind their ends."""
        if self._cache is None:
            for branch, portion in zip(branches, inputs, strict=True):
                branch.history = portion if branch.history is None else torch.cat([branch.history, portion])
                branch.length += len(portion)
            return
        embeds = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        rows = torch.tensor([branch.row for branch in branches], device=self._device)
        positions = self._lengths[rows, None] + torch.arange(embeds.shape[1], device=self._device)
        num_positions = max(branch.length for branch in branches) + embeds.shape[1]
        mask = None
        if branches[0].length == 0:
            self._cache.start(rows[:, None], positions, len(self._lengths), num_positions)
        else:
            num_visible = self._cache.select(rows, positions, len(self._lengths), num_positions)
            if self._takes_additive_mask:
                mask = self._get_mask(positions, num_visible)
        self._synchronize(True)
        self.model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE_ARGUMENT: self._cache},
        )
        if self.synced_gpus:
            self._run_heads()
        for branch, portion in zip(branches, inputs, strict=True):
            branch.length += len(portion)
        self._lengths[rows] = torch.tensor([branch.length for branch in branches], device=self._device)

    def _get_mask(self, positions: torch.Tensor, num_positions: int) -> torch.Tensor:
        """Mask over the cache for inputs at `positions` (batch_size, length), which see what is not ahead of them."""
        keys = torch.arange(num_positions, device=positions.device)
        if not self._takes_additive_mask:
            return (keys <= positions).long()
        is_ahead = keys > positions[:, None, :, None]
        mask = torch.zeros(is_ahead.shape, dtype=self._mask_dtype, device=positions.device)
        return mask.masked_fill_(is_ahead, torch.finfo(self._mask_dtype).min)

    # Frames

    def _make_frames(self, rows: list[SledRow], starts: bool = False) -> list[tuple[SledRow, SledFrame]]:
        layout = self._layout
        if layout is None or layout.rows != rows:
            layout = self._layout = self._arrange(rows)
        draws = [one.draw() for one in layout.noises]
        if len({draw.device for draw in draws}) > 1:
            draws = [draw.to(self._device) for draw in draws]
        # One upload, which does not wait for what the device is doing.
        noise = torch.cat(draws).to(self._device, self._dtype, non_blocking=True)
        if layout.noise_index is not None:
            noise = noise[layout.noise_index]
        if self._cache is None:
            inputs = self._get_histories()
        else:
            inputs = self._get_starts() if starts else self._get_next(layout)
        self._synchronize(True)
        latents, eos_logits, embeds = self._step(
            *inputs, self._cache, layout.conditional, layout.unconditional, layout.scales, noise
        )
        for row in rows:
            for branch in row.branches:
                branch.length += 1
        if self._cache is not None:
            self._lengths[: len(layout.cache_rows), None] += layout.advance
        for index in (layout.conditional, layout.unconditional):
            if index is not None:
                self._inputs[index[: len(rows)]] = embeds[: len(rows)].to(self._dtype)
        return self._end_rows(layout, latents[: len(rows)], eos_logits[: len(rows)])

    def _get_next(self, layout: "_Layout") -> _Inputs:
        """One position of every row of the cache."""
        assert self._cache is not None
        lengths = [branch.length for branch in self._branches]
        num_positions = max(lengths) + 1
        positions = self._lengths[: len(layout.cache_rows), None]
        num_visible = self._cache.select(
            layout.cache_rows, positions, len(self._lengths), num_positions, are_first_rows=True
        )
        mask = None
        # A graph has a mask or none.
        if self._step.is_compiled or min(lengths) + 1 < num_visible:
            mask = self._get_mask(positions, num_visible)
        return self._inputs[: len(layout.cache_rows)], mask, positions, None

    def _get_starts(self) -> _Inputs:
        """All of several sequences, one after another in one row of the batch, each of which sees itself alone."""
        assert self._cache is not None
        sequences = []
        for branch in self._branches:
            inputs = self._inputs[branch.row]
            sequences.append(inputs if branch.pending is None else torch.cat([branch.pending, inputs]))
            branch.pending = None
            branch.length = len(sequences[-1]) - 1
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self._device)
        rows = torch.arange(len(sequences), device=self._device)
        # Told how many there are, it does not wait for the device to count them.
        rows = rows.repeat_interleave(lengths, output_size=sum(map(len, sequences)))[None]
        ends = lengths.cumsum(0)
        positions = torch.arange(rows.shape[1], device=self._device) - (ends - lengths)[rows]
        self._cache.start(rows, positions, len(self._lengths), max(len(sequence) for sequence in sequences))
        is_seen = (rows[:, None, :, None] == rows[:, None, None]) & (
            positions[:, None, None] <= positions[:, None, :, None]
        )
        mask = torch.zeros(is_seen.shape, dtype=self._mask_dtype, device=self._device)
        self._lengths[: len(sequences)] = lengths - 1
        return (
            torch.cat(sequences)[None],
            mask.masked_fill_(~is_seen, torch.finfo(self._mask_dtype).min),
            positions,
            ends - 1,
        )

    def _get_histories(self) -> _Inputs:
        """All that was read so far, where there is no cache."""
        for branch in self._branches:
            inputs = self._inputs[branch.row].clone()
            branch.history = inputs if branch.history is None else torch.cat([branch.history, inputs])
        embeds = torch.nn.utils.rnn.pad_sequence(
            [branch.history for branch in self._branches if branch.history is not None], batch_first=True
        )
        starts = torch.arange(len(embeds)) * embeds.shape[1]
        lengths = torch.tensor([branch.length for branch in self._branches])
        positions = torch.arange(embeds.shape[1], device=self._device)[None]
        return embeds, None, positions, (starts + lengths).to(self._device)

    def _arrange(self, rows: list[SledRow]) -> "_Layout":
        device = self._device

        def get_size(number: int) -> int:
            if self._pads_to_powers:
                number = 1 << (number - 1).bit_length()
            # One is a case of its own to the compiler.
            return max(2, number) if self._step.is_compiled else number

        def pad(indices: list[int]) -> torch.Tensor:
            return torch.tensor(indices + [0] * (get_size(len(indices)) - len(indices)), device=device)

        noises = list(dict.fromkeys(row.noise for row in rows))
        offsets = dict(zip(noises, itertools.accumulate([0, *(len(noise) for noise in noises)]), strict=False))
        conditional = pad([row.branches[0].row for row in rows])
        noise_places = [offsets[row.noise] + row.noise_index for row in rows]
        is_same = noise_places == list(range(sum(len(noise) for noise in noises))) and len(rows) == len(conditional)
        num_branches = get_size(len(self._branches))
        going = {branch.row for row in rows for branch in row.branches}
        advance = torch.tensor([[int(row in going)] for row in range(num_branches)], device=device)
        guidance_scales = [float(row.config.guidance_scale) for row in rows]
        scales = torch.tensor(guidance_scales + [1.0] * (len(conditional) - len(rows)), device=device)[:, None]
        # Without guidance both are the same branch, which a compiled step mixes all the same.
        is_guided = self._step.is_compiled or any(row.is_guided for row in rows)
        criteria: dict[int, tuple[StoppingCriteriaList, list[int]]] = {}
        for index, row in enumerate(rows):
            if row.criteria:
                criteria.setdefault(id(row.criteria), (row.criteria, []))[1].append(index)
        return _Layout(
            rows=list(rows),
            conditional=conditional,
            unconditional=pad([row.branches[-1].row for row in rows]) if is_guided else None,
            scales=scales,
            advance=advance,
            cache_rows=torch.arange(num_branches, device=device),
            noises=noises,
            noise_index=None if is_same else pad(noise_places),
            criteria=list(criteria.values()),
        )

    def _end_rows(
        self, layout: "_Layout", latents: torch.Tensor, eos_logits: torch.Tensor
    ) -> list[tuple[SledRow, SledFrame]]:
        """Counts the new frames and decides which rows they end."""
        rows = layout.rows
        probabilities = torch.sigmoid(eos_logits).tolist()
        for row in rows:
            row.num_frames += 1
        for criteria, members in layout.criteria:
            num_frames = max(rows[index].num_earlier_frames + rows[index].num_frames for index in members)
            placeholder_ids = torch.zeros(len(members), num_frames, dtype=torch.long, device=eos_logits.device)
            is_stopped = criteria(placeholder_ids, eos_logits[members]).tolist()
            for index, value in zip(members, is_stopped, strict=True):
                rows[index].is_stopped = value
        frames = []
        for row, probability, frame, logit in zip(rows, probabilities, latents, eos_logits, strict=True):
            is_end = probability >= row.config.eos_threshold and row.num_frames > row.min_frames
            limit = self._get_frame_limit(row)
            row.is_cut_off = not is_end and not row.is_stopped and row.num_frames >= limit
            row.has_ended = is_end or row.is_stopped or row.is_cut_off
            frames.append((row, SledFrame(frame, logit, is_heard=not is_end)))
        for row in rows:
            if row.has_ended:
                self.leave(row)
        return frames

    def _get_frame_limit(self, row: SledRow) -> int:
        """Number of frames at which a row ends if nothing else ends it: what fits, what was asked for, what is sane."""
        num_positions = min(self.config.max_position_embeddings, row.config.max_length or math.inf)
        limit = int(num_positions) - row.num_tokens - row.num_prompt_frames
        if row.max_frames is not None:
            return min(limit, row.max_frames)
        if not row.part.is_complete:
            return limit
        return min(limit, max(row.min_frames, get_frame_budget(self.model, row.num_tokens - row.num_prompt_tokens)))

    # Weights that are sharded

    def run_idle_steps(self) -> None:
        """Goes along with other processes until these have made their last frames, where weights are sharded."""
        inputs = torch.zeros(1, 1, self.config.hidden_size, dtype=self._dtype, device=self._device)
        while self.synced_gpus and self._synchronize(False):
            self.model.model(inputs_embeds=inputs, use_cache=False)
            self._run_heads()

    def _run_heads(self) -> None:
        """What follows the decoder in a step that makes frames, as others may do in this one."""
        states = torch.zeros(1, self.config.hidden_size, dtype=self._dtype, device=self._device)
        noise = torch.zeros(1, self.config.noise_dim, dtype=self._dtype, device=self._device)
        latents = self.model.generative_head(states, noise)
        self.model.eos_head(states)
        self.model.embed_latents(latents[:, None])

    def _synchronize(self, is_working: bool) -> bool:
        """Whether any process is about to run the decoder. All of them call this, and then run it together."""
        if not self.synced_gpus:
            return is_working
        flag = torch.tensor(float(is_working), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def get_frame_budget(model: "SledForSpeechSynthesis", num_tokens: int) -> int:
    """
    Number of frames after which the speech of a text is taken to have missed its end.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        num_tokens (`int`):
            Number of text tokens, without those that a voice prompt says.

    Returns:
        `int`: the number of frames.
    """
    codec_config = model.get_codec().config
    seconds = MAX_EXTRA_SECONDS + MAX_SECONDS_PER_TOKEN * num_tokens
    return math.ceil(seconds * codec_config.sampling_rate / codec_config.hop_length)


@dataclass
class _Layout:
    """The rows of a step, where they are in the cache, and what differs from row to row."""

    rows: list[SledRow]
    conditional: torch.Tensor
    unconditional: torch.Tensor | None
    scales: torch.Tensor
    # 1 for the cache's rows that go on. What others write is overwritten by what they read next.
    advance: torch.Tensor
    cache_rows: torch.Tensor
    noises: list[SledNoise]
    noise_index: torch.Tensor | None
    criteria: list[tuple[StoppingCriteriaList, list[int]]]


def _split(branch: SledBranch, size: int | None) -> torch.Tensor:
    """Takes the next portion off what a branch has to read."""
    assert branch.pending is not None
    size = len(branch.pending) if size is None else size
    portion, rest = branch.pending[:size], branch.pending[size:]
    branch.pending = rest if len(rest) > 0 else None
    return portion


__all__ = ["SledEngine", "SledFrame", "SledNoise", "SledRow", "get_frame_budget"]
