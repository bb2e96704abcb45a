"""Pauses where two parts of a text meet."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_sled.pauses_sled import SledPauseLimiter, limit_pauses


HOP = 4
# 30 frames a second, of which 6 are kept of the quiet on either side of a join.
RATE = 30 * HOP
FRAMES = st.lists(st.tuples(st.sampled_from([1.0, 0.5, 0.01]), st.integers(1, 15)), max_size=12)


def make(runs: list[tuple[float, int]]) -> torch.Tensor:
    """Runs of frames of one level, all of whose samples differ in sign from their neighbours."""
    levels = torch.tensor([level for level, length in runs for _ in range(length * HOP)])
    return levels * (1 - 2 * (torch.arange(len(levels)) % 2))


def limit(waveform: torch.Tensor, part_ends: list[int], portions: list[int]) -> tuple[torch.Tensor, list[int]]:
    """What comes out if a part's end is told with the audio that follows it."""
    limiter = SledPauseLimiter(HOP, RATE)
    kept, start = [], 0
    part_ends = list(part_ends)
    for size in [*portions, len(waveform) // HOP]:
        while part_ends and part_ends[0] <= start + size:
            limiter.end_part(part_ends.pop(0))
        kept.append(limiter.push(waveform[start * HOP : (start + size) * HOP]))
        start = min(start + size, len(waveform) // HOP)
    return torch.cat([*kept, limiter.finish()]), limiter.dropped_frames


def count_quiet(waveform: torch.Tensor) -> list[int]:
    """Lengths in frames of the runs of quiet."""
    is_quiet = (waveform.view(-1, HOP).abs().amax(dim=1) < 0.03).tolist()
    return [len(run) for run in "".join("q" if one else " " for one in is_quiet).split()]


def test_quiet_at_a_join_is_shortened_on_either_side():
    waveform = make([(0.01, 20), (1.0, 10), (0.01, 20), (0.01, 30), (0.5, 10), (0.01, 20)])
    kept, dropped = limit(waveform, [50], [])
    # Not the quiet before the first part and after the last one.
    assert count_quiet(kept) == [20, 6 + 6, 20]
    assert dropped == [*range(36, 50), *range(50, 74)]


def test_quiet_inside_a_part_and_short_quiet_at_a_join_stay():
    waveform = make([(1.0, 10), (0.01, 20), (1.0, 10), (0.01, 3), (0.01, 2), (1.0, 10), (0.01, 40), (1.0, 5)])
    kept, dropped = limit(waveform, [43], [])
    assert torch.equal(kept, waveform) and dropped == []


def test_a_part_without_a_sound_adds_no_pause():
    waveform = make([(1.0, 10), (0.01, 20), (0.01, 30), (0.01, 20), (1.0, 10)])
    kept, _ = limit(waveform, [30, 60], [])
    assert count_quiet(kept) == [12]


def test_speech_as_low_as_its_prompt_is_no_quiet():
    waveform = 1e-3 * make([(1.0, 10), (0.5, 30), (0.5, 30), (1.0, 10)])
    assert torch.equal(limit(waveform, [40], [])[0], waveform)


@settings(deadline=None)
@given(
    runs=FRAMES,
    part_ends=st.lists(st.integers(1, 100), max_size=4),
    portions=st.lists(st.integers(0, 20), max_size=20),
)
def test_the_result_does_not_depend_on_the_portions(runs, part_ends, portions):
    waveform = make(runs)
    num_frames = len(waveform) // HOP
    part_ends = sorted({end for end in part_ends if end < num_frames})
    kept, dropped = limit(waveform, part_ends, portions)
    expected, expected_dropped = limit(waveform, part_ends, [])
    assert torch.equal(kept, expected) and dropped == expected_dropped
    is_kept = torch.ones(num_frames, dtype=torch.bool)
    is_kept[dropped] = False
    assert torch.equal(kept, waveform.view(-1, HOP)[is_kept].flatten())
    whole, whole_dropped = limit_pauses(waveform.clone(), part_ends, HOP, RATE)
    assert torch.equal(whole, kept) and whole_dropped == dropped


def test_long_speech_is_shortened_in_place():
    waveform = make([(1.0, 1500), (0.01, 400), (0.01, 600), (1.0, 1500)])
    storage = waveform.untyped_storage().data_ptr()
    kept, dropped = limit_pauses(waveform, [1900], HOP, RATE)
    assert kept.untyped_storage().data_ptr() == storage
    assert torch.equal(kept, make([(1.0, 1500), (0.01, 12), (1.0, 1500)]))
    assert len(dropped) == 1000 - 12
