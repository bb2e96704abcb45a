"""The systems of a table: what the data set holds, what the codec makes of it, and what the model says."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EncodecModel

from protocols import Utterance


@dataclass
class Speech:
    """
    Speech made for one utterance.

    Args:
        audio (`np.ndarray` of shape `(samples,)`):
            Mono waveform.
        prompt_samples (`int`, *optional*, defaults to 0):
            How many samples at its start are the prompt's.
        seconds (`float`, *optional*, defaults to 0.0):
            Time its making took; in a batch, the utterance's share by its length.
        is_cut_off (`bool`, *optional*, defaults to `False`):
            Whether it reached the limit of frames without an end of its own.
        error (`str`, *optional*):
            Why nothing could be said.
    """

    audio: np.ndarray
    prompt_samples: int = 0
    seconds: float = 0.0
    is_cut_off: bool = False
    error: str | None = None


def utterance_seed(seed: int, utterance_id: str) -> int:
    """
    The seed of one utterance's noise, the same in any batch and process.

    Args:
        seed (`int`):
            Seed of the run.
        utterance_id (`str`):
            Id of the utterance.

    Returns:
        `int`: 63 random-looking bits.
    """
    digest = hashlib.sha256(f"{seed} {utterance_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.inference_mode()
def resynthesize(codec: EncodecModel, audio: np.ndarray, bandwidth: float) -> np.ndarray:
    """
    Encode and decode a waveform: the best a model over this codec's latents can sound.

    Args:
        codec ([`~transformers.EncodecModel`]):
            The codec.
        audio (`np.ndarray` of shape `(samples,)`):
            Mono waveform at the codec's sampling rate.
        bandwidth (`float`):
            Bandwidth in kilobits a second, which sets the number of codebooks.

    Returns:
        `np.ndarray` of shape `(samples,)`: the resynthesis.
    """
    values = torch.from_numpy(audio)[None, None].to(codec.device, torch.float32)
    encoded = codec.encode(values, bandwidth=bandwidth)
    decoded = codec.decode(encoded.audio_codes, encoded.audio_scales).audio_values
    return decoded[0, 0, : len(audio)].cpu().numpy()


class Synthesizer:
    """
    A SLED model under the protocols of [`protocols.PROTOCOLS`].

    Args:
        model ([`~transformers_sled.SledForSpeechSynthesis`]):
            The model.
        processor ([`~transformers_sled.SledProcessor`]):
            Its processor.
        prompt_seconds (`float`):
            Length of the prompt of `continuation`, in seconds.
        seed (`int`):
            Seed of the run.
        temperature (`float`, *optional*):
            Scale of the noise; by default the checkpoint's own.
    """

    def __init__(self, model: Any, processor: Any, prompt_seconds: float, seed: int, temperature: float | None = None):
        self.model = model
        self.processor = processor
        self.seed = seed
        self.options = {} if temperature is None else {"temperature": temperature}
        self.sampling_rate = model.codec.config.sampling_rate
        self.prompt_samples = int(prompt_seconds * self.sampling_rate)

    def prompt_of(self, audio: np.ndarray) -> np.ndarray:
        """The prompt of `continuation`: the first seconds of a waveform."""
        return audio[: self.prompt_samples]

    def inputs(
        self,
        protocol: str,
        utterances: list[Utterance],
        sources: list[Utterance | None],
        audios: list[np.ndarray | None],
    ) -> dict[str, Any]:
        """
        What `generate` takes for a batch.

        Args:
            protocol (`str`):
                The protocol.
            utterances (`list[Utterance]`):
                What to say.
            sources (`list[Utterance | None]`):
                Where the prompts come from.
            audios (`list[np.ndarray | None]`):
                The recordings of `sources`.

        Returns:
            `dict[str, Any]`: inputs on the model's device.
        """
        prompt = {}
        if protocol == "continuation":
            prompt = {"prompt_audio": [self.prompt_of(audio) for audio in audios]}
        elif protocol == "reference":
            prompt = {"prompt_audio": audios, "prompt_text": [source.text for source in sources]}
        if prompt:
            prompt["sampling_rate"] = self.sampling_rate
        texts = [utterance.text for utterance in utterances]
        return self.processor(texts, return_tensors="pt", **prompt).to(self.model.device)

    @torch.inference_mode()
    def speak(
        self,
        protocol: str,
        guidance_scale: float,
        utterances: list[Utterance],
        sources: list[Utterance | None],
        audios: list[np.ndarray | None],
    ) -> list[Speech]:
        """
        Say a batch of utterances.

        Args:
            protocol (`str`):
                The protocol.
            guidance_scale (`float`):
                Scale of classifier-free guidance.
            utterances (`list[Utterance]`):
                What to say.
            sources (`list[Utterance | None]`):
                Where the prompts come from.
            audios (`list[np.ndarray | None]`):
                The recordings of `sources`.

        Returns:
            `list[Speech]`: one for each utterance. For `continuation` it starts with the prompt, as the codec has it.
        """
        started = time.perf_counter()
        try:
            inputs = self.inputs(protocol, utterances, sources, audios)
            outputs = self.model.generate(
                **inputs,
                guidance_scale=guidance_scale,
                generator=[self.generator(item.id) for item in utterances],
                return_dict_in_generate=True,
                **self.options,
            )
        except ValueError as error:
            if len(utterances) == 1:
                return [Speech(np.zeros(0, dtype=np.float32), error=str(error))]
            rows = zip(utterances, sources, audios, strict=True)
            return [self.speak(protocol, guidance_scale, *([value] for value in row))[0] for row in rows]
        waveforms = [waveform.cpu().numpy() for waveform in outputs.audio]
        # The frame that signals the end is not heard; the logits after it are zero.
        last = (outputs.eos_logits != 0).sum(dim=1, keepdim=True) - 1
        is_cut_off = outputs.latents_mask.gather(1, last.clamp(min=0))[:, 0].bool().tolist()
        took = (time.perf_counter() - started) / max(1, sum(map(len, waveforms)))
        speeches = []
        for waveform, cut_off, audio in zip(waveforms, is_cut_off, audios, strict=True):
            prompt = np.zeros(0, dtype=np.float32)
            if protocol == "continuation":
                prompt = resynthesize(self.model.codec, self.prompt_of(audio), self.model.config.codec_bandwidth)
            seconds = took * len(waveform)
            speeches.append(Speech(np.concatenate([prompt, waveform]), len(prompt), seconds, cut_off))
        return speeches

    @torch.inference_mode()
    def time_to_first_audio(self, utterance: Utterance, guidance_scale: float) -> float:
        """
        Stream an utterance, without a prompt, up to its first audio.

        Args:
            utterance ([`~protocols.Utterance`]):
                What to say.
            guidance_scale (`float`):
                Scale of classifier-free guidance.

        Returns:
            `float`: seconds from the call to the first chunk.
        """
        started = time.perf_counter()
        stream = self.model.stream(
            utterance.text,
            processor=self.processor,
            guidance_scale=guidance_scale,
            generator=self.generator(utterance.id),
            **self.options,
        )
        next(stream, None)
        seconds = time.perf_counter() - started
        stream.close()
        return seconds

    def generator(self, utterance_id: str) -> torch.Generator:
        """The noise source of one utterance."""
        return torch.Generator(self.model.device).manual_seed(utterance_seed(self.seed, utterance_id))
