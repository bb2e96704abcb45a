"""Speech recognizers: waveforms to text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import pipeline


SAMPLING_RATE = 16_000


class PipelineRecognizer:
    """
    Any model of `pipeline("automatic-speech-recognition")`, decoded greedily.

    Args:
        model (`str`):
            Hub id or local folder.
        language (`str`):
            Language code, given to multilingual Whisper models.
        device (`torch.device`):
            Where to run it.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, model: str, language: str, device: torch.device):
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        try:
            self.pipeline = pipeline("automatic-speech-recognition", model=model, device=device, dtype=dtype)
        except Exception as error:
            raise ValueError(f"Recognizer {model!r} could not be loaded: {error}") from error
        self.options = {}
        if self.pipeline.model.can_generate():
            self.options = {"num_beams": 1, "do_sample": False}
            if getattr(self.pipeline.model.generation_config, "is_multilingual", False):
                self.options |= {"language": language, "task": "transcribe"}

    def __call__(self, audios: list[np.ndarray]) -> list[str]:
        # The convolutions of CTC models need more than the one frame that speech can be.
        audios = [np.pad(audio, (0, max(0, SAMPLING_RATE // 10 - len(audio)))) for audio in audios]
        inputs = [{"raw": audio, "sampling_rate": SAMPLING_RATE} for audio in audios]
        if self.pipeline.type == "seq2seq_whisper" and max(map(len, audios)) > 30 * SAMPLING_RATE:
            return [
                self.pipeline(one, return_timestamps=True, generate_kwargs=self.options)["text"].strip()
                for one in inputs
            ]
        options = {"generate_kwargs": self.options} if self.options else {}
        return [result["text"].strip() for result in self.pipeline(inputs, batch_size=len(inputs), **options)]


class FasterWhisperRecognizer:
    """
    A Whisper model in the CTranslate2 format, run by `faster-whisper`, decoded greedily.

    Args:
        model (`str`):
            Local folder, Hub id or size, as `faster_whisper.WhisperModel` takes it.
        language (`str`):
            Language code, given to multilingual models.
        device (`torch.device`):
            Where to run it.

    Raises:
        ValueError: `faster-whisper` is not installed or the model cannot be loaded.
    """

    def __init__(self, model: str, language: str, device: torch.device):
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ValueError("A faster-whisper recognizer needs the package faster-whisper.") from error
        if Path(model).is_dir() and not (Path(model) / "model.bin").is_file():
            raise ValueError(
                f"Recognizer folder {model!r} has no model.bin; faster-whisper needs CTranslate2 weights."
            )
        compute_type = "float16" if device.type == "cuda" else "float32"
        try:
            self.model = WhisperModel(
                model, device=device.type, device_index=device.index or 0, compute_type=compute_type
            )
        except Exception as error:
            raise ValueError(f"Recognizer 'faster-whisper:{model}' could not be loaded: {error}") from error
        self.language = language if self.model.model.is_multilingual else "en"

    def __call__(self, audios: list[np.ndarray]) -> list[str]:
        return [self._transcribe(audio) for audio in audios]

    def _transcribe(self, audio: np.ndarray) -> str:
        segments, _ = self.model.transcribe(
            audio,
            language=self.language,
            beam_size=1,
            temperature=0.0,
            # Longer audio is read in windows that end between segments, where timestamps tell.
            without_timestamps=len(audio) <= 30 * SAMPLING_RATE,
            condition_on_previous_text=False,
        )
        return "".join(segment.text for segment in segments).strip()


def load_recognizer(name: str, language: str, device: torch.device) -> PipelineRecognizer | FasterWhisperRecognizer:
    """
    Load a recognizer by name.

    Args:
        name (`str`):
            Hub id or local folder of a transformers model, or `faster-whisper:` and a CTranslate2 model.
        language (`str`):
            Language code.
        device (`torch.device`):
            Where to run it.

    Returns:
        A recognizer: called with a list of mono float32 waveforms at 16 kHz, it returns their texts.

    Raises:
        ValueError: the recognizer cannot be loaded.
    """
    prefix = "faster-whisper:"
    if name.startswith(prefix):
        return FasterWhisperRecognizer(name.removeprefix(prefix), language, device)
    return PipelineRecognizer(name, language, device)
