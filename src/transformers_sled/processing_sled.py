"""SLED processor: text and audio to tensors, voices to files and back, audio to files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    BatchFeature,
    EncodecConfig,
    EncodecFeatureExtractor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import PROCESSOR_NAME, cached_file

from .audio_sled import describe, list_audio, read_audio, write_audio
from .configuration_sled import SledConfig
from .hub_sled import SledHubMixin, link_processor
from .text_sled import (
    TEXT_BYTES_PER_SECOND,
    SledPartSplitter,
    SledTextCleaner,
    check_text,
    encode_text,
    is_sentence_end,
)


class SledBatchFeature(BatchFeature):
    """A [`~transformers.BatchFeature`] whose audio and latents stay in float32, as the codec needs them."""

    _float32_names = ("input_values", "prompt_values", "prompt_latents")

    def to(self, *args: Any, **kwargs: Any) -> "SledBatchFeature":
        """
        Moves the tensors to a device. A `dtype` does not apply to audio and latents, which `pipeline` would otherwise
        round to the model's dtype.
        """
        exact = {name: self.data[name] for name in self._float32_names if name in self.data}
        super().to(*args, **kwargs)
        for name, value in exact.items():
            self.data[name] = value.to(self.data[name].device)
        return self


class SledProcessor(SledHubMixin, ProcessorMixin):
    """
    Prepares text, voice prompts and training audio for [`SledForSpeechSynthesis`].

    Args:
        feature_extractor ([`~transformers.EncodecFeatureExtractor`]):
            Pads audio and knows the codec's sampling rate.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            A tokenizer that puts a start token before a text and an end token after it, and pads on the left for an
            offline model, on the right for an interleaved one.
        hop_length (`int`, *optional*):
            Samples to a speech frame. That of `facebook/encodec_24khz` by default.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Positions of the model, for the text and its speech together. Longer text is split at sentences.
        language (`str`, *optional*, defaults to `"en"`):
            Code of the language whose rules split a text into sentences.
        max_part_seconds (`float`, *optional*):
            Seconds of speech that the voice has learned to say in one go, as expected from the text. Longer text is spoken
            in parts. By default a text is one part if it fits the positions with its speech.

    Raises:
        `ValueError`: if a number is out of range.

    Example:

    ```python
    >>> from transformers_sled import SledProcessor

    >>> processor = SledProcessor.from_pretrained("ICTNLP/SLED-TTS-Libriheavy")
    >>> inputs = processor("Hello, world.", return_tensors="pt")
    >>> sorted(inputs)
    ['attention_mask', 'input_ids']
    ```
    """

    def __init__(
        self,
        feature_extractor: EncodecFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        hop_length: int | None = None,
        max_position_embeddings: int = 2048,
        language: str = "en",
        max_part_seconds: float | None = None,
    ) -> None:
        super().__init__(feature_extractor, tokenizer)
        self.hop_length = EncodecConfig().hop_length if hop_length is None else hop_length
        self.max_position_embeddings = max_position_embeddings
        self.language = language
        self.max_part_seconds = max_part_seconds

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SledProcessor":
        """
        Loads a processor. A repository with only tokenizer files, as the released ones, gets the rest from its model
        configuration and the codec's.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Repository on the Hub, or local folder.
            kwargs:
                Everything that [`~transformers.ProcessorMixin.from_pretrained`] takes.

        Returns:
            [`SledProcessor`]: the processor.

        Raises:
            `OSError`: if the repository or its files cannot be found.
        """
        hub_names = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        location = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name)}
        processor_file = cached_file(
            pretrained_model_name_or_path,
            PROCESSOR_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_kwargs,
            **location,
        )
        if processor_file is not None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = SledConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs, **location)
        codec_config = config.codec_config
        if codec_config is None and config.codec_id == SledConfig.codec_id:
            codec_config = EncodecConfig()
        elif codec_config is None:
            codec_config = EncodecConfig.from_pretrained(config.codec_id, **hub_kwargs)
        return cls(
            EncodecFeatureExtractor(sampling_rate=codec_config.sampling_rate),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=config, **hub_kwargs, **location),
            hop_length=codec_config.hop_length,
            max_position_embeddings=config.max_position_embeddings,
        )

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> list[str]:
        """
        Saves the tokenizer's files and the processor's own. Saved beside a model that holds its code, they point to it.

        Args:
            save_directory (`str` or `Path`):
                Folder to save to, which is created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload what has been saved.
            repo_id (`str`, *optional*):
                Repository to push to. The name of the folder by default.
            kwargs:
                Further arguments of `push_to_hub`.

        Returns:
            `list[str]`: the files that describe the processor.
        """
        if push_to_hub:
            self._save_and_push(save_directory, repo_id or Path(save_directory).resolve().name, **kwargs)
            return [str(Path(save_directory, PROCESSOR_NAME))]
        files = super().save_pretrained(save_directory)
        link_processor(save_directory)
        return files

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the codec in Hz."""
        return self.feature_extractor.sampling_rate

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "input_values",
            "padding_mask",
            "prompt_values",
            "prompt_values_mask",
            "prompt_latents",
            "prompt_latents_mask",
        ]

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        prompt_text: str | Sequence[str] | None = None,
        prompt_audio: Any = None,
        prompt_latents: torch.Tensor | None = None,
        prompt_latents_mask: torch.Tensor | None = None,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
    ) -> SledBatchFeature:
        r"""
        Turns text, and either a voice prompt or training audio, into the model's inputs.

        An audio is an array or tensor of shape `(num_samples,)`, or with channels in a second dimension, a list of
        floats, the path of a file, or an item of a `datasets` audio column. It is mixed to mono and resampled to the
        codec's rate.

        Args:
            text (`str` or a sequence of them):
                Text to speak. Text that is too long for the model is split into parts of whole sentences, which follow
                each other in a row of `input_ids`, each with its own start and end token.
            audio (an audio or a sequence of them, *optional*):
                Speech that says the text, for training: one for each text.
            prompt_text (`str` or a sequence of them, *optional*):
                What the voice prompt says. It is put before the text. Without it, the text is taken to start with what
                the prompt says.
            prompt_audio (an audio or a sequence of them, *optional*):
                Voice prompts: one for all texts, or one for each.
            prompt_latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`, *optional*):
                Voice prompts from [`~SledForSpeechSynthesis.encode_prompt`] or [`~SledProcessor.load_voice`], instead of
                `prompt_audio`: one for all texts, or one for each.
            prompt_latents_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for a frame, 0 for padding.
            sampling_rate (`int`, *optional*):
                Sampling rate in Hz of audio given as arrays. Files and `datasets` items know their own.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                Only `"pt"` is supported.

        Returns:
            [`~transformers.BatchFeature`]: with

            - **input_ids**, **attention_mask** (`torch.LongTensor` of shape `(batch_size, num_tokens)`)
            - **prompt_values** (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`), **prompt_values_mask**
              (`torch.LongTensor` of shape `(batch_size, num_samples)`) for a voice prompt given as audio, completed with
              silence to whole frames
            - **prompt_latents**, **prompt_latents_mask** for one given as latents
            - **input_values** (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`), **padding_mask**
              (`torch.LongTensor` of shape `(batch_size, num_samples)`) for training audio

        Raises:
            `ValueError`: if an argument is of another type, empty or out of range, an audio cannot be read, or a sentence
            alone is too long for the model.

        Example:

        ```python
        >>> inputs = processor("And this is new.", prompt_text="How are you?", prompt_audio="voice.wav")
        >>> audio = model.generate(**inputs)
        ```
        """
        if return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {return_tensors!r}.")
        texts = _check_texts(text, "text")
        has_prompt = prompt_audio is not None or prompt_latents is not None
        if audio is not None and (has_prompt or prompt_text is not None):
            raise ValueError("`audio` is for training and `prompt_audio` for a voice: give one of them.")
        if prompt_audio is not None and prompt_latents is not None:
            raise ValueError("Give the voice either as `prompt_audio` or as `prompt_latents`.")
        if prompt_latents_mask is not None and prompt_latents is None:
            raise ValueError("`prompt_latents_mask` needs `prompt_latents`.")
        prompt_texts: list[str | None] = [None] * len(texts)
        if prompt_text is not None:
            if not has_prompt:
                raise ValueError(
                    f"`prompt_text` is {prompt_text!r}, but there is neither `prompt_audio` nor `prompt_latents` that says "
                    "it."
                )
            prompt_texts = [*_check_texts(prompt_text, "prompt_text")]
            if len(prompt_texts) not in (1, len(texts)):
                raise ValueError(
                    f"`prompt_text` must be one text or one for each of the {len(texts)} in `text`, got "
                    f"{len(prompt_texts)}."
                )
            prompt_texts = prompt_texts * len(texts) if len(prompt_texts) == 1 else prompt_texts

        data: dict[str, torch.Tensor] = {}
        num_prompt_frames = [0] * len(texts)
        if prompt_audio is not None:
            values, mask = self._get_audio(
                prompt_audio, sampling_rate, "prompt_audio", len(texts), to_whole_frames=True
            )
            data["prompt_values"], data["prompt_values_mask"] = values, mask
            num_prompt_frames = (mask.sum(dim=1) // self.hop_length).tolist()
        if prompt_latents is not None:
            latents, mask = _check_latents(prompt_latents, prompt_latents_mask, len(texts))
            data["prompt_latents"], data["prompt_latents_mask"] = latents, mask
            num_prompt_frames = mask.sum(dim=1).tolist()
        if len(num_prompt_frames) == 1:
            num_prompt_frames = num_prompt_frames * len(texts)
        if audio is not None:
            values, mask = self._get_audio(audio, sampling_rate, "audio", len(texts), to_whole_frames=False)
            if len(values) != len(texts):
                raise ValueError(f"`audio` must have one audio for each of the {len(texts)} texts, got {len(values)}.")
            data["input_values"], data["padding_mask"] = values, mask
            rows = [encode_text(self.tokenizer, one) for one in texts]
        else:
            rows = []
            for one, before, num_frames in zip(texts, prompt_texts, num_prompt_frames, strict=True):
                parts = self.split_text(one, num_frames, before)
                rows.append([token for part in parts for token in encode_text(self.tokenizer, part)])
        encoded = self.tokenizer.pad({"input_ids": rows}, return_attention_mask=True, return_tensors="pt")
        return SledBatchFeature(
            {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **data}
        )

    def get_reader(self) -> SledTextCleaner:
        """
        Starts to read a text that arrives in pieces.

        Returns:
            [`SledTextCleaner`]: takes the pieces, gives words as they will be read.
        """
        return SledTextCleaner(self.language)

    def get_words(self, text: str) -> list[str]:
        """
        Cuts a text into words, as they will be read.

        Args:
            text (`str`):
                The text.

        Returns:
            `list[str]`: the words, each with the white space before it: a space, or `"\\n\\n"` where a paragraph begins.
        """
        reader = self.get_reader()
        return reader.push(check_text("text", text)) + reader.finish()

    def split_text(self, text: str, num_prompt_frames: int = 0, prompt_text: str | None = None) -> list[str]:
        """
        Splits a text into parts, each of which is spoken in one go: as many whole sentences as fit `max_part_seconds` and
        the model's positions. A sentence that alone is too long is cut after a clause, else after a word, else anywhere. A
        blank line ends a part. Text that is still being written has the same parts.

        Args:
            text (`str`):
                The text.
            num_prompt_frames (`int`, *optional*, defaults to 0):
                Length in frames of the voice prompt, which is part of the first part.
            prompt_text (`str`, *optional*):
                What the voice prompt says, if `text` does not start with it. It begins the first part.

        Returns:
            `list[str]`: the parts. A space between two starts the later one, where a byte-level tokenizer makes it part of
            a word.

        Raises:
            `ValueError`: if there is nothing to say in the text, or the voice prompt leaves no room.
        """
        words = self.get_words(text)
        prompt_words = [] if prompt_text is None else self.get_words(prompt_text)
        if prompt_words:
            words = [f" {words[0].lstrip()}", *words[1:]] if words else []
        splitter = SledPartSplitter(self, prompt_words, num_prompt_frames)
        parts = ["".join(part) for part in splitter.push(words) + splitter.finish()]
        if not parts:
            raise ValueError(f"`text` has nothing to say: there is no letter or digit in {text[:60]!r}.")
        return parts

    def split_sentences(self, text: str) -> list[str]:
        """
        Splits a text into sentences by the rules of the processor's `language`.

        Args:
            text (`str`):
                The text.

        Returns:
            `list[str]`: the sentences. A space between two starts the later one.
        """
        sentences: list[str] = []
        for word in self.get_words(text):
            if not sentences or word.startswith("\n") or is_sentence_end(sentences[-1], word, self.language):
                sentences.append("")
            sentences[-1] += word.replace("\n\n", " ")
        return sentences

    def estimate_num_positions(self, text: str, num_prompt_frames: int = 0) -> int:
        """
        Estimates how many of the model's positions a text takes with its speech.

        Args:
            text (`str`):
                The text, with the transcript of the voice prompt at its start if there is one.
            num_prompt_frames (`int`, *optional*, defaults to 0):
                Length in frames of the voice prompt.

        Returns:
            `int`: the number of tokens and expected frames.
        """
        num_tokens = len(encode_text(self.tokenizer, text))
        num_bytes = len(text.encode())
        num_frames = math.ceil(num_bytes / TEXT_BYTES_PER_SECOND * self.sampling_rate / self.hop_length)
        # A voice prompt says some of the text, so its frames and those of the text overlap.
        return num_tokens + max(num_frames, num_prompt_frames + 1)

    def _get_audio(
        self, audio: Any, sampling_rate: int | None, name: str, num_texts: int, to_whole_frames: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded waveforms (batch_size, 1, num_samples) at the codec's rate, and their mask (batch_size, num_samples)."""
        waveforms = [
            read_audio(item, sampling_rate, self.sampling_rate, name=name)
            for item in list_audio(audio, num_texts, name)
        ]
        if to_whole_frames:
            waveforms = [np.pad(waveform, (0, -len(waveform) % self.hop_length)) for waveform in waveforms]
        features = self.feature_extractor(
            waveforms, sampling_rate=self.sampling_rate, padding=True, return_tensors="pt"
        )
        return features["input_values"], features["padding_mask"].long()

    def save_audio(
        self, audio: Any, saving_path: Any, sampling_rate: int | None = None, format: str | None = None
    ) -> None:
        """
        Writes speech to audio files.

        Args:
            audio (`torch.Tensor`, `np.ndarray`, a sequence of numbers or of them, or `dict`):
                Waveforms of shape `(num_samples,)`, as `generate` returns them, or what
                `generate(..., return_dict_in_generate=True)` or a pipeline returns.
            saving_path (`str`, `os.PathLike`, binary file object or a sequence of them):
                One path or open file for each waveform.
            sampling_rate (`int`, *optional*):
                Sampling rate in Hz. That of a pipeline's output, or the codec's, by default.
            format (`str`, *optional*):
                Format of the files, such as `"wav"` or `"flac"`. That of each file's extension by default.

        Raises:
            `ValueError`: if the numbers of waveforms and paths differ, a waveform is not mono or not finite, a format is
                not known or a folder does not exist.

        Example:

        ```python
        >>> processor.save_audio(model.generate(**processor("Hello, world.")), ["hello.wav"])
        ```
        """
        outputs = audio if isinstance(audio, list | tuple) else [audio]
        if len(outputs) > 0 and all(isinstance(output, Mapping) for output in outputs):
            rates = {output.get("sampling_rate") or sampling_rate or self.sampling_rate for output in outputs}
            if any("audio" not in output for output in outputs) or len(rates) > 1:
                raise ValueError(
                    f"`audio` must have waveforms in 'audio', at one sampling rate, got {outputs!r:.200}."
                )
            (own_rate,) = rates
            if sampling_rate is not None and sampling_rate != own_rate:
                raise ValueError(f"`sampling_rate` is {sampling_rate}, but `audio` is at {own_rate} Hz.")
            audio, sampling_rate = [], own_rate
            for output in outputs:
                audio += output["audio"] if isinstance(output["audio"], list | tuple) else [output["audio"]]
        write_audio(audio, saving_path, self.sampling_rate if sampling_rate is None else sampling_rate, format)

    def save_voice(
        self,
        saving_path: str | Path,
        prompt_text: str,
        prompt_latents: torch.Tensor,
        prompt_latents_mask: torch.Tensor | None = None,
    ) -> None:
        """
        Keeps a voice in a safetensors file: its latents, and what they say.

        Args:
            saving_path (`str` or `Path`):
                The file.
            prompt_text (`str`):
                What the voice prompt says.
            prompt_latents (`torch.FloatTensor` of shape `(1, num_frames, latent_dim)`):
                The voice prompt from [`~SledForSpeechSynthesis.encode_prompt`].
            prompt_latents_mask (`torch.LongTensor` of shape `(1, num_frames)`, *optional*):
                1 for a frame, 0 for padding.

        Raises:
            `ValueError`: if the text is empty or the latents are not those of one voice.

        Example:

        ```python
        >>> voice = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
        >>> processor.save_voice("voice.safetensors", "How are you?", **voice)
        >>> inputs = processor("Another sentence.", **processor.load_voice("voice.safetensors"))
        ```
        """
        (prompt_text,) = _check_texts(prompt_text, "prompt_text")
        latents, mask = _check_latents(prompt_latents, prompt_latents_mask, 1)
        latents = latents[mask.bool()].cpu().contiguous()
        save_file({"prompt_latents": latents}, saving_path, metadata={"prompt_text": prompt_text})

    def load_voice(self, path: str | Path) -> dict[str, Any]:
        """
        Reads a voice that [`~SledProcessor.save_voice`] has kept.

        Args:
            path (`str` or `Path`):
                The file.

        Returns:
            `dict`: `prompt_text`, `prompt_latents` (`torch.FloatTensor` of shape `(1, num_frames, latent_dim)`) and
            `prompt_latents_mask`, which the processor takes as keyword arguments.

        Raises:
            `ValueError`: if the file cannot be read or holds no voice.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                if "prompt_text" not in metadata or names != {"prompt_latents"}:
                    raise ValueError(f"`path` {str(path)!r} holds no voice: it was not written by `save_voice`.")
                latents = file.get_tensor("prompt_latents")[None]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`path` {str(path)!r} cannot be read as a voice: {error}.") from error
        return {
            "prompt_text": metadata["prompt_text"],
            "prompt_latents": latents,
            "prompt_latents_mask": torch.ones(latents.shape[:2], dtype=torch.long),
        }


def _check_texts(text: Any, name: str) -> list[str]:
    """The texts as a list, each of which must say something."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or len(texts) == 0 or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"`{name}` must be a string or a list of strings, got {describe(text)}.")
    for one in texts:
        if not one.strip():
            raise ValueError(f"`{name}` must not be empty, got {one!r}.")
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"`{name}` must be valid Unicode, got {one!r}: {error}.") from error
    return list(texts)


def _check_latents(latents: Any, mask: torch.Tensor | None, num_texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(latents, torch.Tensor) or latents.ndim != 3 or 0 in latents.shape:
        raise ValueError(
            f"`prompt_latents` must be of shape (batch_size, num_frames, latent_dim), got {describe(latents)}."
        )
    if len(latents) not in (1, num_texts):
        raise ValueError(
            f"`prompt_latents` must have one row or one for each of the {num_texts} texts, got {len(latents)}."
        )
    if not latents.is_floating_point() or not torch.isfinite(latents).all():
        raise ValueError("`prompt_latents` must hold finite floating point numbers.")
    mask = torch.ones(latents.shape[:2], dtype=torch.long, device=latents.device) if mask is None else mask.long()
    if mask.shape != latents.shape[:2] or not mask.bool().any(dim=1).all():
        raise ValueError(
            f"`prompt_latents_mask` must be of shape {tuple(latents.shape[:2])} with a frame in every row, got "
            f"{tuple(mask.shape)}."
        )
    return latents.float(), mask


__all__ = ["SledBatchFeature", "SledProcessor"]
