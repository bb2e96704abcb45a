"""
Labels of recordings: the phonemes and the pitch of their speech. Needs the program espeak-ng, which turns text into
phonemes, and the package `pyworld`, which finds pitch. Which phoneme is spoken when is found on cepstra.
"""

import logging
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.audio_utils import mel_filter_bank

from ..audio_sled import read_audio
from .alignment import LABEL_RATE, align, compute_features
from .sources import check_columns


try:
    import pyworld
except ImportError:
    pyworld = None


logger = logging.getLogger(__name__)

SAMPLING_RATE = 24_000
N_FFT = 1024
NUM_MEL_BINS = 40
NUM_CEPSTRA = 20
# The phonemes that the teacher of the corpus was given, each in one character, in this order.
REPLACEMENTS = {
    "əl": "ᵊl",
    "eɪ": "A",
    "oʊ": "O",
    "aɪ": "I",
    "aʊ": "W",
    "ɔɪ": "Y",
    "tʃ": "ʧ",
    "dʒ": "ʤ",
    "r": "ɹ",
    "ɚ": "əɹ",
    "ɝ": "ɜɹ",
    "e": "A",
    "ɐ": "ə",
    "x": "k",
}
# Marks inside of a sound, and of stress and length, which are no sounds of their own.
JOINING_MARKS = "\u0361\u200d_"
SILENT_MARKS = " ˈˌːʔ\u0303\u0329"
SILENCE = "sil"


def transcribe(text: str, language: str) -> str:
    """Phonemes of a text with their marks, a clause a line."""
    command = ["espeak-ng", "-q", "--ipa=1", "-v", language, "--", text]
    spoken = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spoken = spoken.translate(str.maketrans("", "", JOINING_MARKS))
    for before, after in REPLACEMENTS.items():
        spoken = spoken.replace(before, after)
    return spoken


def phonemize(text: str, language: str) -> list[str]:
    """Phonemes of a text, with silence before, between and after its clauses."""
    spoken = transcribe(text, language).translate(str.maketrans("", "", SILENT_MARKS))
    phonemes = [SILENCE]
    for clause in spoken.split():
        phonemes += [*clause, SILENCE]
    return phonemes


def compute_cepstra(samples: torch.Tensor) -> torch.Tensor:
    """Mel-frequency cepstra `(labels, NUM_CEPSTRA)` around the time of every label."""
    filters = mel_filter_bank(N_FFT // 2 + 1, NUM_MEL_BINS, 50.0, 8_000.0, SAMPLING_RATE, mel_scale="slaney")
    window = torch.hann_window(N_FFT)
    spectrum = torch.stft(samples, N_FFT, SAMPLING_RATE // LABEL_RATE, window=window, return_complex=True).abs()
    log_mel = (spectrum.T @ torch.from_numpy(filters).float() + 1e-2).log()
    order = torch.arange(NUM_CEPSTRA)[:, None] * (torch.arange(NUM_MEL_BINS) + 0.5) * (torch.pi / NUM_MEL_BINS)
    return log_mel @ order.cos().T


def compute_pitch(samples: np.ndarray) -> np.ndarray:
    """Fundamental frequency at the time of every label in Hz, 0 where there is none."""
    pitch, _ = pyworld.dio(
        samples.astype(np.float64), SAMPLING_RATE, f0_floor=60, f0_ceil=450, frame_period=1000 / LABEL_RATE, speed=6
    )
    return pitch.astype(np.float32)


def label_speech(
    dataset: datasets.Dataset,
    language: str = "en-us",
    num_iterations: int = 14,
    silence: tuple[float, float] = (0.0, 0.0),
) -> datasets.Dataset:
    """
    Labels recordings with phonemes and pitch, `LABEL_RATE` times a second.

    Args:
        dataset (`datasets.Dataset`):
            Utterances with `id`, `text` and `audio`, not decoded.
        language (`str`, *optional*, defaults to `"en-us"`):
            Voice of espeak-ng.
        num_iterations (`int`, *optional*, defaults to 14):
            Rounds of alignment.
        silence (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.0)`):
            Seconds of silence around the speech, for the first round: much depends on it.

    Returns:
        `datasets.Dataset`: with `id`, `phonemes` (classes) and `pitch` (in Hz, 0 where there is none). Speech too short
        for its text is left out.

    Raises:
        `ValueError`: If espeak-ng or pyworld is not installed, a column is missing or nothing can be labelled.
    """
    if shutil.which("espeak-ng") is None:
        raise ValueError("espeak-ng is not installed: it turns text into phonemes")
    if pyworld is None:
        raise ValueError("pyworld is not installed, which finds pitch: `pip install pyworld 'setuptools<80'`")
    check_columns(dataset, ["id", "text", "audio"], "The dataset")
    with ThreadPoolExecutor() as pool:
        texts = tqdm(dataset["text"][:], desc="Phonemizing")
        phonemes = list(pool.map(lambda text: phonemize(text, language), texts))
    names = [SILENCE, *sorted({phoneme for row in phonemes for phoneme in row} - {SILENCE})]
    index = {name: number for number, name in enumerate(names)}

    ids, features, pitches, states, phoneme_of_state = [], [], [], [], []
    for example, row in zip(tqdm(dataset, desc="Listening"), phonemes, strict=True):
        samples = read_audio(example["audio"], target_rate=SAMPLING_RATE)
        cepstra = compute_cepstra(torch.from_numpy(samples))
        # Two states in a row for every sound, and one for silence.
        visited = [(index[name], half) for name in row for half in range(1 if name == SILENCE else 2)]
        if len(cepstra) < len(visited):
            logger.warning("%s is left out: its speech is too short for its text", example["id"])
            continue
        ids.append(example["id"])
        features.append(compute_features(cepstra))
        pitches.append(compute_pitch(samples))
        states.append(torch.tensor([2 * number + half for number, half in visited]))
        phoneme_of_state.append(torch.tensor([number for number, _ in visited]))
    if not ids:
        raise ValueError("No utterance can be labelled: all speech is too short for its text")
    before, after = (round(seconds * LABEL_RATE) for seconds in silence)
    paths = align(features, states, 2 * len(names), num_iterations, (before, after))
    columns = {
        "id": ids,
        "phonemes": [row[path].tolist() for row, path in zip(phoneme_of_state, paths, strict=True)],
        "pitch": pitches,
    }
    types = datasets.Features(
        id=datasets.Value("string"),
        phonemes=datasets.Sequence(datasets.ClassLabel(names=names)),
        pitch=datasets.Sequence(datasets.Value("float32")),
    )
    logger.info("Labelled %d of %d utterances with %d phonemes", len(ids), len(dataset), len(names))
    return datasets.Dataset.from_dict(columns, features=types)
