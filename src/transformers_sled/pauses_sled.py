"""Pauses where two parts of a text meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


# Quiet is this far below the loudest frame so far (-30 dB, as root mean square).
QUIET_LEVEL = 10 ** (-30 / 20)

# Seconds of quiet that are kept on either side of where two parts meet.
MAX_QUIET_SECONDS = 0.2

# Frames of a whole speech that are looked at at a time.
_BLOCK_FRAMES = 1000


class SledPauseLimiter:
    r"""
    Shortens the pauses between the parts of a text, each of which is spoken with quiet at its start and end. Audio in, in
    any portions, audio out; what comes out in all does not depend on the portions. Nothing is changed before the first
    part begins to sound, after the last one, or inside a part.

    Args:
        hop_length (`int`):
            Samples to a frame.
        sampling_rate (`int`):
            Sampling rate in Hz.

    Attributes:
        dropped_frames (`list[int]`): indices of the frames that were left out.

    Example:

    ```python
    >>> import torch
    >>> from transformers_sled.pauses_sled import SledPauseLimiter

    >>> limiter = SledPauseLimiter(hop_length=320, sampling_rate=24_000)
    >>> limiter.end_part(100)
    >>> speech, quiet = torch.ones(50 * 320), torch.zeros(50 * 320)
    >>> waveform = torch.cat([limiter.push(torch.cat([speech, quiet, quiet, speech])), limiter.finish()])
    >>> len(waveform) // 320
    130
    ```
    """

    def __init__(self, hop_length: int, sampling_rate: int) -> None:
        self.hop_length = hop_length
        self.dropped_frames: list[int] = []
        self._max_quiet_frames = round(MAX_QUIET_SECONDS * sampling_rate / hop_length)
        self._part_ends: deque[int] = deque()
        self._loudest = 0.0
        self._num_frames = self._num_quiet_frames = 0
        # Quiet frames that are left out if a part ends before another sound, or has yet to begin.
        self._held: list[tuple[int, Tensor]] = []
        self._is_before_part = False

    def end_part(self, num_frames: int) -> None:
        r"""
        Says where a part ends that another may follow.

        Args:
            num_frames (`int`):
                Number of frames of the speech up to there, from its start.
        """
        self._part_ends.append(num_frames)

    def push(self, waveform: Tensor) -> Tensor:
        r"""
        Takes the next audio.

        Args:
            waveform (`torch.FloatTensor` of shape `(num_samples,)`):
                Whole frames.

        Returns:
            `torch.FloatTensor` of shape `(num_kept_samples,)`: what is certain to be heard.
        """
        frames = waveform.view(-1, self.hop_length)
        kept = [waveform[:0]]
        for frame, level in zip(frames, frames.pow(2).mean(dim=1).sqrt().tolist(), strict=True):
            kept += self._push_frame(frame, level)
        return torch.cat(kept)

    def finish(self) -> Tensor:
        r"""
        Ends the speech.

        Returns:
            `torch.FloatTensor` of shape `(num_samples,)`: the quiet at its end.
        """
        frames = self._take_held()
        return torch.cat(frames) if frames else torch.zeros(0)

    def _push_frame(self, frame: Tensor, level: float) -> list[Tensor]:
        self._loudest = max(self._loudest, level)
        is_quiet = level < QUIET_LEVEL * self._loudest
        while self._part_ends and self._part_ends[0] <= self._num_frames:
            self._part_ends.popleft()
            self._is_before_part = self._num_frames > 0
            self._drop_held(0)
        index = self._num_frames
        self._num_frames += 1
        self._num_quiet_frames = self._num_quiet_frames + 1 if is_quiet else 0
        if is_quiet and (self._is_before_part or self._num_quiet_frames > self._max_quiet_frames):
            self._held.append((index, frame))
            if self._is_before_part:
                self._drop_held(self._max_quiet_frames)
            return []
        self._is_before_part = self._is_before_part and is_quiet
        return [*self._take_held(), frame]

    def _drop_held(self, num_kept: int) -> None:
        num_dropped = max(0, len(self._held) - num_kept)
        self.dropped_frames += [index for index, _ in self._held[:num_dropped]]
        del self._held[:num_dropped]

    def _take_held(self) -> list[Tensor]:
        frames, self._held = [frame for _, frame in self._held], []
        return frames


def limit_pauses(
    waveform: Tensor, part_ends: Sequence[int], hop_length: int, sampling_rate: int
) -> tuple[Tensor, list[int]]:
    """
    Shortens the pauses between the parts of a whole speech, in place.

    Args:
        waveform (`torch.FloatTensor` of shape `(num_samples,)`):
            The speech. It is written over.
        part_ends (sequence of `int`):
            Number of frames up to the end of each part.
        hop_length (`int`):
            Samples to a frame.
        sampling_rate (`int`):
            Sampling rate in Hz.

    Returns:
        `tuple(torch.FloatTensor, list[int])`: the speech, and the indices of the frames that were left out.
    """
    limiter = SledPauseLimiter(hop_length, sampling_rate)
    for num_frames in part_ends:
        limiter.end_part(num_frames)
    num_samples = 0
    for block in waveform.split(_BLOCK_FRAMES * hop_length):
        kept = limiter.push(block)
        # Never further than what has been read.
        waveform[num_samples : num_samples + len(kept)] = kept
        num_samples += len(kept)
    kept = limiter.finish()
    waveform[num_samples : num_samples + len(kept)] = kept
    return waveform[: num_samples + len(kept)], limiter.dropped_frames


__all__ = ["SledPauseLimiter", "limit_pauses"]
