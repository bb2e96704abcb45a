"""Where text and speech stand in a row, against the original's rule written out block by block."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_sled.interleaving_sled import count_frames_before, count_tokens_before, get_positions, interleave


def make_config(text_chunk_size: int | None, speech_chunk_size: int | None) -> SimpleNamespace:
    return SimpleNamespace(text_chunk_size=text_chunk_size, speech_chunk_size=speech_chunk_size)


def write_out(num_tokens: int, num_frames: int, text_size: int, speech_size: int) -> list[tuple[str, int]]:
    """Blocks of text and speech in turn while both fill one, then a block of text, all other speech, all other text."""
    tokens = [("token", index) for index in range(num_tokens)]
    frames = [("frame", index) for index in range(num_frames)]
    order: list[tuple[str, int]] = []
    for _ in range(min(num_tokens // text_size, num_frames // speech_size)):
        order += tokens[:text_size] + frames[:speech_size]
        tokens, frames = tokens[text_size:], frames[speech_size:]
    return order + tokens[:text_size] + frames + tokens[text_size:]


COUNTS = st.integers(0, 40)
SIZES = st.integers(1, 9)


@settings(deadline=None)
@given(num_tokens=st.integers(1, 40), num_frames=COUNTS, text_size=SIZES, speech_size=SIZES)
def test_rows_are_in_the_original_order(num_tokens, num_frames, text_size, speech_size):
    config = make_config(text_size, speech_size)
    expected = write_out(num_tokens, num_frames, text_size, speech_size)
    counts = torch.tensor([num_tokens]), torch.tensor([num_frames])
    # Padded by three on both sides.
    text_positions, frame_positions = get_positions(config, *counts, num_tokens + 3, num_frames + 3)
    order: dict[int, tuple[str, int]] = {}
    for index in range(num_tokens):
        order[int(text_positions[0, index])] = ("token", index)
    for index in range(num_frames):
        order[int(frame_positions[0, index])] = ("frame", index)
    assert [order[position] for position in range(num_tokens + num_frames)] == expected
    # Generation asks for numbers, one frame at a time.
    for position, (kind, index) in enumerate(expected):
        if kind == "frame":
            assert count_tokens_before(config, index, num_tokens) == position - index
        else:
            assert count_frames_before(config, index, num_frames) == position - index
    text, speech = torch.arange(num_tokens)[:, None] + 0.25, torch.arange(num_frames)[:, None] + 0.5
    row = interleave(config, text, speech)[:, 0].tolist()
    assert row == [index + (0.25 if kind == "token" else 0.5) for kind, index in expected]


def test_offline_text_comes_first():
    config = make_config(None, None)
    text_positions, frame_positions = get_positions(config, torch.tensor([2, 3]), torch.tensor([4, 1]), 3, 4)
    assert text_positions.tolist() == [[0, 1, 2]] * 2
    assert frame_positions.tolist() == [[2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]
    assert count_tokens_before(config, 7, 5) == 5 and count_frames_before(config, 3, 9) == 0


@pytest.mark.parametrize("num_frames", [0, 1, 8, 9, 10, 18])
def test_end_is_asked_behind_the_text_that_is_due(num_frames):
    config = make_config(5, 9)
    _, frame_positions = get_positions(config, torch.tensor([12]), torch.tensor([num_frames]), 12, num_frames)
    assert frame_positions[0, -1] == num_frames + min(12, 5 * (num_frames // 9 + 1))
