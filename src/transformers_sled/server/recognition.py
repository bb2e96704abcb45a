"""What the sample of a voice says, as a speech recognizer hears it."""

import threading

import numpy as np
from transformers import pipeline

from ..audio_sled import read_audio


class Recognizer:
    r"""
    Writes down what a recording says.

    Args:
        model (`str`):
            Model of `pipeline("automatic-speech-recognition")`: a repository on the Hub or a folder.
        device (`str`):
            Where to compute.

    Raises:
        `OSError`, `ValueError`: if there is no such model, or it does not recognize speech.
    """

    def __init__(self, model: str, device: str) -> None:
        self._pipeline = pipeline("automatic-speech-recognition", model=model, device=device)
        # A pipeline may not be called by several threads at a time.
        self._lock = threading.Lock()

    def recognize(self, waveform: np.ndarray, sampling_rate: int) -> str:
        """The text of a waveform `(num_samples,)` in float32, of 30 s at most. Empty where nothing is heard."""
        rate = self._pipeline.feature_extractor.sampling_rate
        recording = read_audio(waveform, sampling_rate=sampling_rate, target_rate=rate)
        with self._lock:
            heard = self._pipeline({"raw": recording, "sampling_rate": rate})
        return str(heard["text"]).strip()
