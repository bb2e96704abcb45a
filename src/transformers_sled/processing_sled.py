"""SLED processor: text and audio to tensors, voices to files and back, audio to files."""

import copy
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

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
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, PaddingStrategy, cached_file, logging

from .audio_sled import describe, list_audio, measure_sound, read_audio, write_audio
from .configuration_sled import SledConfig
from .hub_sled import VOICE_SUFFIX, VOICES_FOLDER, SledHubMixin, find_voices, link_processor
from .normalization_sled import is_available
from .text_sled import (
    TEXT_BYTES_PER_SECOND,
    SledPartSplitter,
    SledTextReader,
    check_normalizer,
    check_text,
    encode_text,
    is_sentence_end,
)


logger = logging.get_logger(__name__)


# Fast speech has 20 characters a second, and a few more fit into a short recording.
MAX_PROMPT_CHARACTERS_PER_SECOND, MAX_PROMPT_CHARACTERS = 30.0, 10

# Slow speech in a script of a character for each syllable or word.
MIN_CHARACTERS_PER_SECOND = 2.0

# A voice prompt whose loudest 20 ms are below this root mean square (-60 dB) has nothing to go on with.
MIN_PROMPT_LEVEL = 1e-3


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
            if isinstance(value, torch.Tensor):
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
        normalizer (`str` or `Callable[[str], str]`, *optional*):
            Writes out numbers, dates, abbreviations and the like before a text is spoken. `"en"` reads American English
            (package `inflect`, extra `text`) and is saved with the processor. A function gets one sentence at a time and
            returns how it is read; it is not saved.
        default_voice (`str`, *optional*):
            Name of the voice, one of [`~SledProcessor.voices`], that speaks where a call gives none. Without it, the model
            draws a speaker.

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
        normalizer: str | Callable[[str], str] | None = None,
        default_voice: str | None = None,
    ) -> None:
        is_number = isinstance(max_part_seconds, int | float) and not isinstance(max_part_seconds, bool)
        if max_part_seconds is not None and not (is_number and 1 <= max_part_seconds < math.inf):
            raise ValueError(f"`max_part_seconds` must be at least 1 second, or None, got {max_part_seconds!r}.")
        check_normalizer(normalizer)
        super().__init__(feature_extractor, tokenizer)
        self.hop_length = EncodecConfig().hop_length if hop_length is None else hop_length
        self.max_position_embeddings = max_position_embeddings
        self.language = language
        self.max_part_seconds = max_part_seconds
        self.normalizer = normalizer
        self.default_voice = default_voice
        # What is kept of each voice, or a function that gives the path of its file.
        self._voices: dict[str, dict[str, Any] | Callable[[], str]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SledProcessor":
        """
        Loads a processor with the voices of its checkpoint. A repository with only tokenizer files, as the released ones,
        gets the rest from its model configuration and the codec's.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Repository on the Hub, or local folder.
            kwargs:
                Everything that [`~transformers.ProcessorMixin.from_pretrained`] takes.

        Returns:
            [`SledProcessor`]: the processor.

        Raises:
            `OSError`: if the repository cannot be found.
            `ValueError`: if a file is missing in it, or its tokenizer is not the model's.
        """
        hub_names = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        location = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name)}
        name = str(pretrained_model_name_or_path)

        def has_file(file_name: str) -> bool:
            options = {f"_raise_exceptions_for_{error}": False for error in ("missing_entries", "connection_errors")}
            return cached_file(name, file_name, **options, **hub_kwargs, **location) is not None

        has_config, has_processor = has_file(CONFIG_NAME), has_file(PROCESSOR_NAME)
        # transformers would make up what is missing in a folder.
        if not has_config and not has_processor and Path(name, location.get("subfolder", "")).is_dir():
            raise ValueError(f"{name!r} is no SLED checkpoint, or an incomplete one: it has no {CONFIG_NAME}.")
        # A processor may be in a folder of its own, without a model.
        config: Any = None
        if has_config or not has_processor:
            config = SledConfig.from_pretrained(name, **hub_kwargs, **location)
        for file_names in (("tokenizer.json", "vocab.json"), ("tokenizer_config.json",)):
            if not any(has_file(file_name) for file_name in file_names):
                raise ValueError(f"{name!r} is incomplete: it has no {file_names[0]}.")
        if has_processor:
            processor = super().from_pretrained(name, **kwargs)
        else:
            codec_config = config.codec_config
            if codec_config is None and config.codec_id == SledConfig.codec_id:
                codec_config = EncodecConfig()
            elif codec_config is None:
                codec_config = EncodecConfig.from_pretrained(config.codec_id, **hub_kwargs)
            processor = cls(
                EncodecFeatureExtractor(sampling_rate=codec_config.sampling_rate),
                AutoTokenizer.from_pretrained(name, config=config, **hub_kwargs, **location),
                hop_length=codec_config.hop_length,
                max_position_embeddings=config.max_position_embeddings,
            )
        if config is not None:
            _check_tokenizer(processor.tokenizer, config, name)
        processor._voices = dict(find_voices(name, **hub_kwargs, **location))
        return processor

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> list[str]:
        """
        Saves the tokenizer's files, the processor's own and its voices. Saved beside a model that holds its code, they
        point to it.

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
        if callable(self.normalizer):
            logger.warning(
                "`normalizer` is a function, which is not saved: give it again when the processor is loaded."
            )
        files = super().save_pretrained(save_directory)
        link_processor(save_directory)
        folder = Path(save_directory, VOICES_FOLDER)
        for name, voice in self._voices.items():
            folder.mkdir(exist_ok=True)
            _write_voice(folder / f"{name}{VOICE_SUFFIX}", self.load_voice(name) if callable(voice) else voice)
        return files

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # A voice that was saved with a normalizer speaks without it where that is not installed.
        is_missing = processor_dict.get("normalizer") is not None and "normalizer" not in kwargs and not is_available()
        if is_missing:
            logger.warning_once(
                "Numbers and abbreviations are spoken as they are written: this voice's `normalizer` needs the package "
                "inflect, `pip install inflect`."
            )
        processor = super().from_args_and_dict(
            args, {**processor_dict, "normalizer": None} if is_missing else processor_dict, **kwargs
        )
        if is_missing:
            (processor[0] if isinstance(processor, tuple) else processor).normalizer = processor_dict["normalizer"]
        return processor

    def to_dict(self) -> dict[str, Any]:
        """
        The processor as it is saved. A function as `normalizer` is not.

        Returns:
            `dict`: its parameters.
        """
        plain = copy.copy(self)
        if callable(self.normalizer):
            plain.normalizer = None
        return super(SledProcessor, plain).to_dict()

    @property
    def voices(self) -> list[str]:
        """Names of the voices that `voice_preset` takes: the checkpoint's, and those that `save_voice` has added."""
        return sorted(self._voices)

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
            "num_prompt_tokens",
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
        voice_preset: str | Sequence[str] | None = None,
        padding: bool | str = True,
        truncation: bool | str | None = None,
        return_tensors: str = "pt",
    ) -> SledBatchFeature:
        r"""
        Turns text, and either a voice prompt or training audio, into the model's inputs.

        An audio is an array or tensor of shape `(num_samples,)`, or with channels in a second dimension, a list of
        floats, the path of a file, or an item of a `datasets` audio column. It is mixed to mono and resampled to the
        codec's rate.

        Args:
            text (`str` or a sequence of them):
                Text to speak. Text that is too long to be spoken in one go is split into parts, which follow each other in
                a row of `input_ids`, each with its own start and end token.
            audio (an audio or a sequence of them, *optional*):
                Speech that says the text, for training: one for each text.
            prompt_text (`str` or a sequence of them, *optional*):
                What the voice prompt says. It is put before every part of the text. Without it, the text is taken to
                start with what the prompt says.
            prompt_audio (an audio or a sequence of them, *optional*):
                Voice prompts: one for all texts, or one for each.
            prompt_latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`, *optional*):
                Voice prompts from [`~SledForSpeechSynthesis.encode_prompt`] or [`~SledProcessor.load_voice`], instead of
                `prompt_audio`: one for all texts, or one for each.
            prompt_latents_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for a frame, 0 for padding.
            sampling_rate (`int`, *optional*):
                Sampling rate in Hz of audio given as arrays. Files and `datasets` items know their own.
            voice_preset (`str` or a sequence of them, *optional*):
                Name of a voice, one of [`~SledProcessor.voices`], or one for each text, instead of a voice prompt. Where
                neither is given, `default_voice` speaks; set it to `None` to let the model draw a speaker.
            padding (`bool` or `str`, *optional*, defaults to `True`):
                `True` or `"longest"` pads to the longest row. `False` or `"do_not_pad"` is for rows of one length.
            truncation (`bool` or `str`, *optional*):
                Only `False`, `"do_not_truncate"` and `None`, which are the same: a long text is spoken in parts.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for tensors, `"np"` for NumPy arrays.

        Returns:
            [`~transformers.BatchFeature`]: with

            - **input_ids**, **attention_mask** (`torch.LongTensor` of shape `(batch_size, num_tokens)`)
            - **prompt_values** (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`), **prompt_values_mask**
              (`torch.LongTensor` of shape `(batch_size, num_samples)`) for a voice prompt given as audio, completed with
              silence to whole frames
            - **prompt_latents**, **prompt_latents_mask** for one given as latents
            - **num_prompt_tokens** (`torch.LongTensor` of shape `(batch_size,)`) with `prompt_text`: how many tokens of every
              part of a text say it
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
        _check_batching(padding, truncation, return_tensors)
        texts = _check_texts(text, "text")
        prompt = {
            "prompt_text": prompt_text,
            "prompt_audio": prompt_audio,
            "prompt_latents": prompt_latents,
            "prompt_latents_mask": prompt_latents_mask,
            "sampling_rate": sampling_rate,
        }
        if audio is None:
            if _is_list(voice_preset) and len(voice_preset) not in (1, len(texts)):
                raise ValueError(
                    f"`voice_preset` must be one name or one for each of the {len(texts)} texts, got "
                    f"{len(voice_preset)}."
                )
            prompt = self.get_voice(voice_preset, **prompt)
        else:
            voice_names = ("prompt_text", "prompt_audio", "prompt_latents", "prompt_latents_mask")
            given = {**prompt, "voice_preset": voice_preset}
            for name in (*voice_names, "voice_preset"):
                if given[name] is not None:
                    raise ValueError(f"`audio` is for training and `{name}` for a voice: give one of them.")
        prompt_texts, num_prompt_frames, data = self._get_prompts(texts, **prompt)
        if audio is not None:
            values, mask = self._get_audio(audio, sampling_rate, "audio", len(texts), to_whole_frames=False)
            if len(values) != len(texts):
                raise ValueError(f"`audio` must have one audio for each of the {len(texts)} texts, got {len(values)}.")
            data["input_values"], data["padding_mask"] = values, mask
            readers = [SledTextReader(self.language) for _ in texts]
            words = [reader.push(one) + reader.finish() for reader, one in zip(readers, texts, strict=True)]
            rows = [encode_text(self.tokenizer, "".join(one).replace("\n\n", " ")) for one in words]
        else:
            rows = []
            for one, before, num_frames in zip(texts, prompt_texts, num_prompt_frames, strict=True):
                parts = self.split_text(one, num_frames, before or None)
                rows.append([token for part in parts for token in encode_text(self.tokenizer, part)])
            if any(prompt_texts):
                data["num_prompt_tokens"] = torch.tensor([self.count_prompt_tokens(before) for before in prompt_texts])
        if not _is_padding(padding) and len({len(row) for row in rows}) > 1:
            raise ValueError(f"`padding` is {padding!r}, but the texts are of {len(rows)} lengths: set it to True.")
        encoded = self.tokenizer.pad({"input_ids": rows}, return_attention_mask=True, return_tensors="pt")
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **data}
        return SledBatchFeature(
            {name: value.numpy() for name, value in data.items()} if return_tensors == "np" else data
        )

    def _get_prompts(
        self,
        texts: list[str],
        prompt_text: str | Sequence[str] | None,
        prompt_audio: Any,
        prompt_latents: torch.Tensor | None,
        prompt_latents_mask: torch.Tensor | None,
        sampling_rate: int | None,
    ) -> tuple[list[str], list[int], dict[str, torch.Tensor]]:
        """What each text's voice prompt says, how many frames it has, and the tensors of all."""
        if prompt_audio is not None and prompt_latents is not None:
            raise ValueError("Give the voice either as `prompt_audio` or as `prompt_latents`.")
        if prompt_latents_mask is not None and prompt_latents is None:
            raise ValueError("`prompt_latents_mask` needs `prompt_latents`.")
        has_prompt = prompt_audio is not None or prompt_latents is not None
        if prompt_text is not None and not has_prompt:
            raise ValueError(
                f"`prompt_text` is {prompt_text!r:.200}, but there is neither `prompt_audio` nor `prompt_latents` that "
                "says it."
            )
        prompt_texts = [""] if prompt_text is None else _check_texts(prompt_text, "prompt_text")
        if len(prompt_texts) not in (1, len(texts)):
            raise ValueError(
                f"`prompt_text` must be one text or one for each of the {len(texts)} in `text`, got {len(prompt_texts)}."
            )
        num_frames, seconds, data = [0], [0.0], {}
        name = "prompt_audio" if prompt_audio is not None else "prompt_latents"
        if prompt_audio is not None:
            values, mask = self._get_audio(prompt_audio, sampling_rate, name, len(texts), to_whole_frames=True)
            data["prompt_values"], data["prompt_values_mask"] = values, mask
            num_frames = (mask.sum(dim=1) // self.hop_length).tolist()
            seconds = [
                self._measure_prompt(waveform[0, : int(length)].numpy())
                for waveform, length in zip(values, mask.sum(dim=1), strict=True)
            ]
        elif prompt_latents is not None:
            latents, mask = _check_latents(prompt_latents, prompt_latents_mask, len(texts))
            data["prompt_latents"], data["prompt_latents_mask"] = latents, mask
            num_frames = mask.sum(dim=1).tolist()
            seconds = [frames * self.hop_length / self.sampling_rate for frames in num_frames]
        prompt_texts = prompt_texts * (len(texts) // len(prompt_texts))
        num_frames = num_frames * (len(texts) // len(num_frames))
        seconds = seconds * (len(texts) // len(seconds))
        if has_prompt:
            for row in zip(texts, prompt_texts, num_frames, seconds, strict=True):
                self._check_prompt(*row, name)
        return prompt_texts, num_frames, data

    def _measure_prompt(self, waveform: np.ndarray) -> float:
        """Seconds of sound in a voice prompt, which must have some."""
        seconds, level = measure_sound(waveform, self.sampling_rate)
        if level < MIN_PROMPT_LEVEL:
            decibels = f"{20 * math.log10(level):.0f} dB below full scale" if level else "silence"
            raise ValueError(
                f"`prompt_audio` has no usable sound: its loudest part is {decibels}. Give a recording of speech with a "
                f"level of at least {20 * math.log10(MIN_PROMPT_LEVEL):.0f} dB."
            )
        return seconds

    def _check_prompt(self, text: str, prompt_text: str, num_frames: int, seconds: float, name: str) -> None:
        """Whether a transcript can belong to its voice prompt, and both leave room to speak."""
        num_positions = num_frames + len(encode_text(self.tokenizer, prompt_text))
        if num_positions >= self.max_position_embeddings:
            duration = num_frames * self.hop_length / self.sampling_rate
            limit = duration * self.max_position_embeddings / num_positions / 2
            raise ValueError(
                f"`{name}` is too long for a voice prompt: its {duration:.1f} s ({num_frames} frames) take, with their "
                f"transcript, {num_positions} of the model's {self.max_position_embeddings} positions. Trim it and its "
                f"transcript to {limit:.1f} s or less."
            )
        if len(prompt_text.strip()) > MAX_PROMPT_CHARACTERS_PER_SECOND * seconds + MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"`prompt_text` cannot be what `{name}` says: it has {len(prompt_text.strip())} characters, and the "
                f"recording {seconds:.2f} s of sound. Speech has 4 to 30 characters a second: give the whole recording, or "
                "only the words that are in it."
            )
        if prompt_text and len(prompt_text.strip()) < MIN_CHARACTERS_PER_SECOND * seconds - MAX_PROMPT_CHARACTERS:
            logger.warning(
                f"`prompt_text` has {len(prompt_text.strip())} characters, but `{name}` {seconds:.1f} s of sound, in which "
                "more is said. What is missing in it may be spoken or left out."
            )
        if not prompt_text and len(text) < TEXT_BYTES_PER_SECOND * seconds:
            logger.warning(
                f"`prompt_text` is missing, so `text` must begin with what `{name}` says. It has {len(text)} characters, "
                f"too few for {seconds:.1f} s of sound and new speech: little or nothing may be spoken. Give `prompt_text`."
            )

    def get_reader(self) -> SledTextReader:
        """
        Starts to read a text that arrives in pieces.

        Returns:
            [`SledTextReader`]: takes the pieces, gives words as they will be read.
        """
        is_missing = self.normalizer == "en" and not is_available()
        return SledTextReader(self.language, None if is_missing else self.normalizer)

    def get_words(self, text: str) -> list[str]:
        """
        Cuts a text into words, as they will be read.

        Args:
            text (`str`):
                The text.

        Returns:
            `list[str]`: the words, each with the white space before it: a space, or `"\\n\\n"` where a paragraph begins.

        Raises:
            `ValueError`: if `text` is not a string of whole characters.
        """
        reader = self.get_reader()
        return reader.push(check_text("text", text)) + reader.finish()

    def count_prompt_tokens(self, prompt_text: str) -> int:
        """
        Counts the tokens that a transcript takes at the start of a text.

        Args:
            prompt_text (`str`):
                What a voice prompt says.

        Returns:
            `int`: their number, special tokens left out.
        """
        words = "".join(self.get_words(prompt_text))
        return len(encode_text(self.tokenizer, words, add_special_tokens=False))

    def normalize(self, text: str) -> str:
        """
        Shows what of a text will be read: without what no voice should read, and with numbers and the like written out if
        the processor has a `normalizer`.

        Args:
            text (`str`):
                The text.

        Returns:
            `str`: the text to read, in which a blank line begins a paragraph.

        Raises:
            `ValueError`: if `text` is not a string of whole characters.

        Example:

        ```python
        >>> processor = SledProcessor.from_pretrained(builtin_voice(), normalizer="en")
        >>> processor.normalize("Dr. Smith paid $3.50 at 5 p.m.")
        'Doctor Smith paid three dollars and fifty cents at five P M.'
        ```
        """
        return "".join(self.get_words(text))

    def split_text(self, text: str, num_prompt_frames: int = 0, prompt_text: str | None = None) -> list[str]:
        """
        Splits a text into parts, each of which is spoken in one go, of at most `max_part_seconds`, or of what fits the
        model's positions. A part ends after a sentence, or where a sentence alone is too long after a clause, else after a
        word, else anywhere. A blank line ends a part. Text that is still being written has the same parts.

        Args:
            text (`str`):
                The text.
            num_prompt_frames (`int`, *optional*, defaults to 0):
                Length in frames of the voice prompt.
            prompt_text (`str`, *optional*):
                What the voice prompt says, if `text` does not start with it. It begins every part.

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
        saving_path: str | Path | None = None,
        prompt_text: str | None = None,
        prompt_latents: torch.Tensor | None = None,
        prompt_latents_mask: torch.Tensor | None = None,
        name: str | None = None,
    ) -> None:
        """
        Keeps a voice: its latents, and what they say.

        Args:
            saving_path (`str` or `Path`, *optional*):
                A safetensors file to keep it in.
            prompt_text (`str`):
                What the voice prompt says.
            prompt_latents (`torch.FloatTensor` of shape `(1, num_frames, latent_dim)`):
                The voice prompt from [`~SledForSpeechSynthesis.encode_prompt`].
            prompt_latents_mask (`torch.LongTensor` of shape `(1, num_frames)`, *optional*):
                1 for a frame, 0 for padding.
            name (`str`, *optional*):
                Name to add it by to [`~SledProcessor.voices`], which `save_pretrained` and `push_to_hub` take along.

        Raises:
            `ValueError`: if neither `saving_path` nor `name` is given, a name cannot be a file's, the text is empty, or the
                latents are not those of one voice.

        Example:

        ```python
        >>> voice = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
        >>> processor.save_voice("voice.safetensors", "How are you?", **voice)
        >>> inputs = processor("Another sentence.", **processor.load_voice("voice.safetensors"))
        >>> processor.save_voice(prompt_text="How are you?", **voice, name="anna")
        >>> inputs = processor("Another sentence.", voice_preset="anna")
        ```
        """
        if saving_path is None and name is None:
            raise ValueError("`name` or `saving_path` is missing: where to keep the voice.")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)):
            raise ValueError(f"`name` must be of letters, digits, '_', '-' and '.', got {name!r:.100}.")
        texts = _check_texts(prompt_text, "prompt_text")
        if len(texts) != 1:
            raise ValueError(f"`prompt_text` must be one text, got {len(texts)}.")
        latents, mask = _check_latents(prompt_latents, prompt_latents_mask, 1)
        latents = latents[mask.bool()].cpu()[None]
        voice = {"prompt_text": texts[0], "prompt_latents": latents, "prompt_latents_mask": _get_mask(latents)}
        if saving_path is not None:
            if not Path(saving_path).parent.is_dir():
                raise ValueError(f"`saving_path` {describe(saving_path)} is in a folder that does not exist.")
            _write_voice(saving_path, voice)
        if name is not None:
            self._voices[name] = voice

    def load_voice(self, path: str | Path) -> dict[str, Any]:
        """
        Gives a voice that [`~SledProcessor.save_voice`] has kept.

        Args:
            path (`str` or `Path`):
                One of [`~SledProcessor.voices`], or a file.

        Returns:
            `dict`: `prompt_text`, `prompt_latents` (`torch.FloatTensor` of shape `(1, num_frames, latent_dim)`) and
            `prompt_latents_mask`, which the processor takes as keyword arguments.

        Raises:
            `ValueError`: if the file cannot be read or holds no voice.
        """
        voice = self._voices.get(path) if isinstance(path, str) else None
        if isinstance(voice, dict):
            return dict(voice)
        file_name = path if voice is None else voice()
        if not isinstance(file_name, str | os.PathLike) or not Path(file_name).expanduser().is_file():
            raise ValueError(
                f"`path` must be one of the voices {self.voices} or a file that `save_voice` has written, got "
                f"{describe(path)}."
            )
        try:
            with safe_open(Path(file_name).expanduser(), framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                if "prompt_text" not in metadata or names != {"prompt_latents"}:
                    raise ValueError(f"`path` {describe(path)} holds no voice: it was not written by `save_voice`.")
                # A copy, which does not change with the file.
                latents = file.get_tensor("prompt_latents").clone()[None]
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"`path` {describe(path)} cannot be read as a voice: {error!s:.200}.") from error
        latents, mask = _check_latents(latents, None, 1)
        return {"prompt_text": metadata["prompt_text"], "prompt_latents": latents, "prompt_latents_mask": mask}

    def get_voice(self, voice_preset: str | Sequence[str] | None = None, **prompt: Any) -> dict[str, Any]:
        """
        Tells the voice that a call speaks in: the one that its arguments give, or else the default one.

        Args:
            voice_preset (`str` or a sequence of them, *optional*):
                One of [`~SledProcessor.voices`], or one for each text.
            prompt:
                The voice prompt itself, as the processor takes it: `prompt_text`, `prompt_audio`, `prompt_latents`,
                `prompt_latents_mask`, `sampling_rate`.

        Returns:
            `dict`: the voice prompt, as the processor takes it; empty where there is none.

        Raises:
            `ValueError`: if there is no such voice, or both a name and a voice prompt are given.
        """
        names = ("prompt_text", "prompt_audio", "prompt_latents", "prompt_latents_mask")
        given = [name for name in names if prompt.get(name) is not None]
        argument = "voice_preset"
        if voice_preset is None:
            if given or self.default_voice is None:
                return prompt
            voice_preset, argument = self.default_voice, "default_voice"
        elif given:
            raise ValueError(
                f"`voice_preset` is {voice_preset!r:.100}, but `{given[0]}` gives a voice too: give one of them."
            )
        presets: list[Any] = list(voice_preset) if _is_list(voice_preset) else [voice_preset]
        if not presets:
            raise ValueError(f"`{argument}` must not be empty.")
        for preset in presets:
            if not isinstance(preset, str) or preset not in self._voices:
                known = f"one of {self.voices}" if self._voices else "left out, since this checkpoint has no voices"
                raise ValueError(f"`{argument}` must be {known}, got {preset!r:.100}.")
        voices = {preset: self.load_voice(preset) for preset in dict.fromkeys(presets)}
        if len(presets) == 1:
            return {**prompt, **voices[presets[0]]}
        rows = [voices[preset]["prompt_latents"][0] for preset in presets]
        masks = [voices[preset]["prompt_latents_mask"][0] for preset in presets]
        return {
            **prompt,
            "prompt_text": [voices[preset]["prompt_text"] for preset in presets],
            "prompt_latents": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "prompt_latents_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
        }


def _write_voice(path: str | Path, voice: dict[str, Any]) -> None:
    latents = voice["prompt_latents"][0].contiguous()
    save_file({"prompt_latents": latents}, path, metadata={"prompt_text": voice["prompt_text"]})


def _get_mask(latents: torch.Tensor) -> torch.Tensor:
    return torch.ones(latents.shape[:2], dtype=torch.long, device=latents.device)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: SledConfig, name: str) -> None:
    """Whether a checkpoint's tokenizer is the one that its model has learned with."""
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{name!r} has a tokenizer without a padding token: its tokenizer_config.json must name one.")
    for token in ("bos_token_id", "eos_token_id"):
        expected = getattr(config, token)
        if expected is not None and getattr(tokenizer, token) != expected:
            raise ValueError(
                f"{name!r} has a tokenizer that is not its model's: `{token}` is {getattr(tokenizer, token)} in the "
                f"tokenizer and {expected} in {CONFIG_NAME}."
            )
    # Without what has been added: `<mask>` stands beyond the vocabulary of the released models, and in no text.
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{name!r} has a tokenizer that is not its model's: its vocabulary has {tokenizer.vocab_size} tokens, and "
            f"`vocab_size` in {CONFIG_NAME} is {config.vocab_size}."
        )


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, a column or an array of others."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_padding(padding: bool | str | None) -> bool:
    return padding is True or padding == PaddingStrategy.LONGEST


def _check_batching(padding: bool | str | None, truncation: bool | str | None, return_tensors: str) -> None:
    if not (_is_padding(padding) or padding is False or padding == PaddingStrategy.DO_NOT_PAD):
        raise ValueError(
            f"`padding` must be True, 'longest', False or 'do_not_pad', got {padding!r:.100}: rows of a fixed length would "
            "be of no use to the model."
        )
    if truncation not in (None, False, "do_not_truncate"):
        raise ValueError(
            f"`truncation` must be False, got {truncation!r:.100}: a text that is too long is spoken in parts, not cut."
        )
    if return_tensors not in ("pt", "np"):
        raise ValueError(f"`return_tensors` must be 'pt' or 'np', got {return_tensors!r:.100}.")


def _check_texts(text: Any, name: str) -> list[str]:
    """The texts as a list, each of which must say something."""
    texts = [text] if isinstance(text, str) else text
    if _is_list(texts):
        # A column of `datasets` reads its rows anew each time.
        texts = texts.tolist() if isinstance(texts, np.ndarray) else list(texts)
    if not isinstance(texts, list) or len(texts) == 0 or not all(isinstance(one, str) for one in texts):
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
    mask = _get_mask(latents) if mask is None else mask.long()
    if mask.shape != latents.shape[:2] or not mask.bool().any(dim=1).all():
        raise ValueError(
            f"`prompt_latents_mask` must be of shape {tuple(latents.shape[:2])} with a frame in every row, got "
            f"{tuple(mask.shape)}."
        )
    return latents.float(), mask


__all__ = ["SledBatchFeature", "SledProcessor"]
