"""Where text tokens and speech frames stand in a row: one set of rules for training and generation."""

from typing import TypeVar

import torch

from .configuration_sled import SledConfig


_Count = TypeVar("_Count", int, torch.Tensor)


def count_frames_before(config: SledConfig, token_index: _Count, num_frames: _Count) -> _Count:
    """
    Counts the frames that come before a text token. Offline, text comes first. Interleaved, blocks of text and speech
    alternate as long as there is speech; then the rest of the text follows (`modeling_speech_llama` of the original, for
    each row by its own lengths).

    Args:
        config ([`SledConfig`]):
            The model's configuration.
        token_index (`int` or `torch.LongTensor`):
            Index of the token in its text.
        num_frames (`int` or `torch.LongTensor`):
            Number of frames of the row.

    Returns:
        `int` or `torch.LongTensor`: the number of frames.
    """
    if config.text_chunk_size is None or config.speech_chunk_size is None:
        return token_index * 0
    return _get_smaller(token_index // config.text_chunk_size * config.speech_chunk_size, num_frames)


def count_tokens_before(config: SledConfig, frame_index: _Count, num_tokens: _Count) -> _Count:
    """
    Counts the text tokens that come before a frame: all of them offline, those of its block and the blocks before it
    interleaved.

    Args:
        config ([`SledConfig`]):
            The model's configuration.
        frame_index (`int` or `torch.LongTensor`):
            Index of the frame in its row, the frames of a voice prompt included.
        num_tokens (`int` or `torch.LongTensor`):
            Number of text tokens of the row.

    Returns:
        `int` or `torch.LongTensor`: the number of tokens.
    """
    if config.text_chunk_size is None or config.speech_chunk_size is None:
        return frame_index * 0 + num_tokens
    return _get_smaller((frame_index // config.speech_chunk_size + 1) * config.text_chunk_size, num_tokens)


def get_positions(
    config: SledConfig, num_tokens: torch.Tensor, num_frames: torch.Tensor, text_length: int, speech_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Places text tokens and frames in their rows.

    Args:
        config ([`SledConfig`]):
            The model's configuration.
        num_tokens (`torch.LongTensor` of shape `(batch_size,)`):
            Number of text tokens of each row.
        num_frames (`torch.LongTensor` of shape `(batch_size,)`):
            Number of frames of each row.
        text_length (`int`):
            Number of text tokens of a padded row.
        speech_length (`int`):
            Number of frames of a padded row.

    Returns:
        `tuple(torch.LongTensor, torch.LongTensor)`: the positions of the tokens `(batch_size, text_length)` and of the
        frames `(batch_size, speech_length + 1)`, the last of which is where a frame after the row's end would go. What
        is beyond a row's own numbers means nothing.
    """
    num_tokens, num_frames = num_tokens[:, None], num_frames[:, None]
    token_index = torch.arange(text_length, device=num_tokens.device)[None]
    frame_index = torch.arange(speech_length + 1, device=num_frames.device)[None]
    return (
        token_index + count_frames_before(config, token_index.expand(len(num_tokens), -1), num_frames),
        frame_index + count_tokens_before(config, frame_index.expand(len(num_frames), -1), num_tokens),
    )


def interleave(config: SledConfig, text: torch.Tensor, speech: torch.Tensor) -> torch.Tensor:
    """
    Puts a text and the frames that say it in the order in which the model reads them.

    Args:
        config ([`SledConfig`]):
            The model's configuration.
        text (`torch.FloatTensor` of shape `(num_tokens, hidden_size)`):
            Embeddings of the text tokens.
        speech (`torch.FloatTensor` of shape `(num_frames, hidden_size)`):
            Embeddings of the frames.

    Returns:
        `torch.FloatTensor` of shape `(num_tokens + num_frames, hidden_size)`.
    """
    num_tokens, num_frames = torch.tensor([len(text)]), torch.tensor([len(speech)])
    text_positions, frame_positions = get_positions(config, num_tokens, num_frames, len(text), len(speech))
    order = torch.cat([text_positions[0], frame_positions[0, :-1]]).argsort()
    return torch.cat([text, speech])[order.to(text.device)]


def _get_smaller(first: _Count, second: _Count) -> _Count:
    if isinstance(first, torch.Tensor):
        return torch.minimum(first, second)
    return min(first, second)


__all__ = ["count_frames_before", "count_tokens_before", "get_positions", "interleave"]
