"""
Which of the units that are spoken one after the other, tokens or phonemes, is spoken when.

A hidden Markov model in the manner of speech recognition's flat start: every unit is a Gaussian over what is heard and its
slope (two in a row where it is long), the units of an utterance follow each other without a gap, and Viterbi alignment and
estimation take turns, the first time with every utterance cut into equal parts between its silences.
"""

import logging

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import EncodecModel, PreTrainedTokenizerBase

from ..codec_sled import decode_codes
from ..text_sled import encode_text
from .sources import check_columns


logger = logging.getLogger(__name__)

# Frames' worth of the overall mean and variance that every Gaussian starts from, so that rare tokens have one too.
PRIOR_COUNT = 10.0
MIN_VARIANCE = 0.05
BATCH_SIZE = 512
# Labels a second that label_speech.py writes.
LABEL_RATE = 60


def compute_features(latents: torch.Tensor) -> torch.Tensor:
    """Latents `(frames, size)` without their mean over the utterance, which is the voice's, next to their slope."""
    latents = latents - latents.mean(dim=0)
    slope = torch.zeros_like(latents)
    slope[1:-1] = (latents[2:] - latents[:-2]) / 2
    return torch.cat([latents, slope], dim=1)


def estimate(features: torch.Tensor, states: torch.Tensor, num_states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances `(num_states, size)` of the frames `(frames, size)` that are aligned to every state."""
    counts = torch.bincount(states, minlength=num_states)[:, None] + PRIOR_COUNT
    mean, square = features.mean(dim=0), features.square().mean(dim=0)
    means = (
        features.new_zeros(num_states, features.shape[1]).index_add_(0, states, features) + PRIOR_COUNT * mean
    ) / counts
    squares = features.new_zeros(num_states, features.shape[1]).index_add_(0, states, features.square())
    variances = (squares + PRIOR_COUNT * square) / counts - means.square()
    return means, variances.clamp(min=MIN_VARIANCE)


def find_paths(scores: torch.Tensor, num_frames: torch.Tensor, num_states: torch.Tensor) -> torch.Tensor:
    """
    Viterbi alignment: the best way through all states in order, a frame or more in each.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, frames, states)`):
            Log likelihood of every frame in every state of its row.
        num_frames (`torch.LongTensor` of shape `(batch_size,)`):
            Frames of every row, at least as many as states.
        num_states (`torch.LongTensor` of shape `(batch_size,)`):
            States of every row.

    Returns:
        `torch.LongTensor` of shape `(batch_size, frames)`: index of the state of every frame, 0 for padding.
    """
    batch_size, longest, _ = scores.shape
    best = scores[:, 0].clone()
    best[:, 1:] = -torch.inf
    moved = torch.zeros(scores.shape, dtype=torch.bool)
    for frame in range(1, longest):
        from_before = nn.functional.pad(best[:, :-1], (1, 0), value=-torch.inf)
        moved[:, frame] = from_before > best
        best = torch.maximum(best, from_before) + scores[:, frame]
    paths = torch.zeros(batch_size, longest, dtype=torch.long)
    state = num_states - 1
    for frame in range(longest - 1, -1, -1):
        is_speech = frame < num_frames
        paths[:, frame] = torch.where(is_speech, state, 0)
        state = state - (moved[:, frame].gather(1, state[:, None])[:, 0] & is_speech).long()
    return paths


def cut(num_frames: int, num_states: int, silence: tuple[int, int]) -> torch.Tensor:
    """The flat start: silence in the first and in the last state, the frames between in equal parts."""
    before, after = silence
    between = num_frames - before - after
    if num_states < 3 or between < num_states - 2:
        return torch.arange(num_frames) * num_states // num_frames
    inner = 1 + torch.arange(between) * (num_states - 2) // between
    return torch.cat([inner.new_zeros(before), inner, inner.new_full((after,), num_states - 1)])


def align(
    features: list[torch.Tensor],
    states: list[torch.Tensor],
    total_states: int,
    num_iterations: int,
    silence: tuple[int, int] = (0, 0),
) -> list[torch.Tensor]:
    """
    Aligns utterances to their states.

    Args:
        features (`list[torch.FloatTensor]`, each of shape `(frames, size)`):
            What is heard.
        states (`list[torch.LongTensor]`, each of shape `(states,)`):
            States of every utterance in order, no more than it has frames.
        total_states (`int`):
            How many different states there are.
        num_iterations (`int`):
            Rounds of estimation and alignment.
        silence (`tuple[int, int]`, *optional*, defaults to `(0, 0)`):
            Frames at the start and the end that the first round gives to the first and the last state.

    Returns:
        `list[torch.LongTensor]`: for every utterance the index into its `states` of every frame.
    """
    paths = [cut(len(heard), len(row), silence) for heard, row in zip(features, states, strict=True)]
    # Every feature counts alike, whatever its scale.
    scale = torch.cat(features).std(dim=0)
    features = [heard / scale for heard in features]
    all_features = torch.cat(features)
    by_length = sorted(range(len(features)), key=lambda index: len(features[index]))
    batches = [by_length[start : start + BATCH_SIZE] for start in range(0, len(by_length), BATCH_SIZE)]
    progress = tqdm(range(num_iterations), desc="Aligning")
    for _ in progress:
        aligned = torch.cat([row[path] for row, path in zip(states, paths, strict=True)])
        means, variances = estimate(all_features, aligned, total_states)
        precisions = 1 / variances
        constants = -0.5 * (variances.log() + means.square() * precisions).sum(dim=1)
        total = 0.0
        for batch in batches:
            heard = nn.utils.rnn.pad_sequence([features[index] for index in batch], batch_first=True)
            row = nn.utils.rnn.pad_sequence([states[index] for index in batch], batch_first=True)
            scores = heard @ (means * precisions)[row].transpose(1, 2) + constants[row][:, None]
            scores -= 0.5 * heard.square() @ precisions[row].transpose(1, 2)
            num_frames = torch.tensor([len(features[index]) for index in batch])
            found = find_paths(scores, num_frames, torch.tensor([len(states[index]) for index in batch]))
            scores = scores.gather(2, found[..., None])[..., 0]
            total += float(scores[torch.arange(scores.shape[1]) < num_frames[:, None]].sum())
            for index, path in zip(batch, found, strict=True):
                paths[index] = path[: len(features[index])]
        progress.set_postfix(log_likelihood=f"{total / len(all_features):.3f}")
    return paths


def count_states(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """States of every token of the vocabulary: one, or two where it has several letters."""
    letters = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    return torch.tensor([1 if token in special or len(text) < 2 else 2 for token, text in enumerate(letters)])


def sample_labels(labels: list[int], frame_rate: float, num_frames: int) -> list[int]:
    """The labels in the middle of every frame, the last one where the frames go on for longer."""
    times = (torch.arange(num_frames) + 0.5) / frame_rate
    indices = (times * LABEL_RATE).round().long().clamp(max=len(labels) - 1)
    return [labels[index] for index in indices.tolist()]


@torch.inference_mode()
def align_text(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    codec: EncodecModel,
    labels: datasets.Dataset | None = None,
    num_iterations: int = 12,
    silence: tuple[int, int] = (0, 0),
) -> datasets.Dataset:
    """
    Finds which text token is spoken in every frame of a prepared dataset.

    Args:
        dataset (`datasets.Dataset`):
            Utterances with `id`, `text` and `audio_codes`, from [`prepare_dataset`].
        tokenizer ([`PreTrainedTokenizerBase`]):
            Tokenizer of the model to train.
        codec ([`EncodecModel`]):
            The codec that made the codes.
        labels (`datasets.Dataset`, *optional*):
            From [`label_speech`]; its phonemes are added.
        num_iterations (`int`, *optional*, defaults to 12):
            Rounds of alignment.
        silence (`tuple[int, int]`, *optional*, defaults to `(0, 0)`):
            Frames of silence around the speech, for the first round: much depends on it.

    Returns:
        `datasets.Dataset`: with `id`, `alignment`, the index of a token of the text for every frame, and, with labels,
        `phonemes`, the class of the phoneme in the middle of every frame. Speech too short for its text is left out.

    Raises:
        `ValueError`: If a column is missing, nothing can be aligned, or labels are missing.
    """
    check_columns(dataset, ["id", "text", "audio_codes"], "A dataset from prepare_data.py")
    if labels is not None:
        check_columns(labels, ["id", "phonemes"], "Labels from label_speech.py")
    states_of_token = count_states(tokenizer)
    first_state = states_of_token.cumsum(dim=0) - states_of_token
    ids, features, states, token_of_state = [], [], [], []
    for example in tqdm(dataset, desc="Reading"):
        tokens = torch.tensor(encode_text(tokenizer, example["text"]))
        repeats = states_of_token[tokens]
        token_index = torch.arange(len(tokens)).repeat_interleave(repeats)
        within = torch.arange(len(token_index)) - (repeats.cumsum(dim=0) - repeats)[token_index]
        codes = torch.tensor(example["audio_codes"])
        if codes.shape[1] < len(token_index):
            logger.warning("%s is left out: its speech is too short for its text", example["id"])
            continue
        ids.append(example["id"])
        features.append(compute_features(decode_codes(codec, codes[None])[0]))
        states.append(first_state[tokens][token_index] + within)
        token_of_state.append(token_index)
    if not ids:
        raise ValueError("No utterance can be aligned: all speech is too short for its text")
    phonemes_of = {}
    if labels is not None:
        phonemes_of = dict(zip(labels["id"][:], labels["phonemes"][:], strict=True))
        if missing := [identifier for identifier in ids if identifier not in phonemes_of]:
            raise ValueError(f"There are no labels of {len(missing)} utterances, {missing[0]} among them")
    paths = align(features, states, int(states_of_token.sum()), num_iterations, silence)
    alignments = [tokens[path].tolist() for tokens, path in zip(token_of_state, paths, strict=True)]
    aligned = datasets.Dataset.from_dict({"id": ids, "alignment": alignments})
    logger.info("Aligned %d of %d utterances", len(ids), len(dataset))
    if labels is None:
        return aligned
    frame_rate = codec.config.sampling_rate / codec.config.hop_length
    phonemes = [
        sample_labels(phonemes_of[identifier], frame_rate, len(alignment))
        for identifier, alignment in zip(ids, alignments, strict=True)
    ]
    return aligned.add_column("phonemes", phonemes, feature=labels.features["phonemes"])
