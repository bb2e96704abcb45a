"""Speaker encoders: waveforms to embeddings whose cosine says how alike two voices are."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import soxr
import torch


class XVectorEncoder:
    """
    A transformers speaker verification model, such as WavLM with an x-vector head.

    Args:
        model (`str`):
            Hub id or local folder of a model with an audio x-vector head.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to run it.

    Raises:
        ValueError: the model cannot be loaded, or has no x-vector head.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu"):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        try:
            self.feature_extractor = AutoFeatureExtractor.from_pretrained(model)
            self.model = AutoModelForAudioXVector.from_pretrained(model).to(device).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"Speaker encoder {model!r} could not be loaded: {error}") from error
        self.sampling_rate = self.feature_extractor.sampling_rate

    @torch.inference_mode()
    def __call__(self, audio: np.ndarray) -> np.ndarray:
        inputs = self.feature_extractor(audio, sampling_rate=self.sampling_rate, return_tensors="pt")
        return self.model(**inputs.to(self.model.device)).embeddings[0].float().cpu().numpy()


class ResemblyzerEncoder:
    """
    The GE2E encoder of the `resemblyzer` package, which carries its weights.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to run it.

    Raises:
        ValueError: `resemblyzer` or a package it needs is not installed.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        for package in ("librosa", "webrtcvad", "resemblyzer"):
            if find_spec(package) is None:
                raise ValueError(
                    f"Speaker encoder 'resemblyzer' needs the package {package}, which is not installed: "
                    "pip install --no-deps resemblyzer && pip install librosa webrtcvad-wheels"
                )
        import resemblyzer

        self.preprocess = resemblyzer.preprocess_wav
        self.model = resemblyzer.VoiceEncoder(torch.device(device), verbose=False)
        self.sampling_rate = resemblyzer.sampling_rate

    def __call__(self, audio: np.ndarray) -> np.ndarray | None:
        speech = self.preprocess(audio)
        return self.model.embed_utterance(speech) if len(speech) else None


def load_speaker_encoder(name: str, device: str | torch.device = "cpu") -> XVectorEncoder | ResemblyzerEncoder:
    """
    Load a speaker encoder by name.

    Args:
        name (`str`):
            `"resemblyzer"`, or the Hub id or local folder of a transformers model with an x-vector head.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to run it.

    Returns:
        An encoder: called with a mono float32 waveform at its `sampling_rate`, it returns the embedding.
    """
    return ResemblyzerEncoder(device) if name == "resemblyzer" else XVectorEncoder(name, device)


def embed(encoder: XVectorEncoder | ResemblyzerEncoder, audio: np.ndarray, sampling_rate: int) -> np.ndarray | None:
    """
    Embed one waveform of any rate, scaled to length 1.

    Args:
        encoder ([`XVectorEncoder`] or [`ResemblyzerEncoder`]):
            What [`load_speaker_encoder`] returned.
        audio (`np.ndarray` of shape `(samples,)`):
            Mono waveform.
        sampling_rate (`int`):
            Its sampling rate in hertz.

    Returns:
        `np.ndarray` or `None`: the embedding, float32; `None` for silence, which is nobody's voice.
    """
    audio = soxr.resample(np.asarray(audio, dtype=np.float32), sampling_rate, encoder.sampling_rate)
    if not np.any(audio):
        return None
    # The x-vector head's convolutions need about a third of a second.
    audio = np.pad(audio, (0, max(0, encoder.sampling_rate // 2 - len(audio))))
    embedding = encoder(audio)
    return None if embedding is None else embedding / np.linalg.norm(embedding)
