"""What is spoken and with which prompt: data sets, the utterances they give, and the paper's protocols."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
from datasets import Audio, Dataset, DatasetDict, load_dataset, load_from_disk
from tqdm import tqdm

PROTOCOLS = {
    "continuation": "the first seconds of the utterance as prompt, its whole transcript as text",
    "reference": "the speaker's previous utterance as prompt, with its transcript",
    "text": "no prompt",
    "streaming": "no prompt, text and speech interleaved",
}

LIBRISPEECH_PC = "yoom618/librispeech_pc"

FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class Utterance:
    """
    One utterance to evaluate.

    Args:
        id (`str`):
            Its id, unique in the data set.
        row (`int`):
            Its row in the data set.
        text (`str`):
            Its transcript.
        speaker (`str`):
            Who speaks.
        seconds (`float`):
            Its duration.
    """

    id: str
    row: int
    text: str
    speaker: str
    seconds: float

    def to_dict(self) -> dict[str, str | int | float]:
        """The utterance as plain data."""
        return asdict(self)


class SpeechDataset:
    """
    A table of utterances with text, audio and speaker, local or from the Hub.

    Args:
        name (`str`):
            A Parquet, JSON lines, CSV or Arrow file, a folder written by `save_to_disk`, a folder of audio files with a
            `metadata.csv` or `metadata.jsonl`, or a Hub id.
        config (`str`, *optional*):
            Configuration of a Hub data set.
        split (`str`, *optional*, defaults to `"test.clean"`):
            Split of a Hub data set.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the transcripts.
        audio_column (`str`, *optional*):
            Column of the recordings; by default `audio`, or `file_name` in a folder of audio files.
        speaker_column (`str`, *optional*):
            Column of the speakers; by default `speaker` or `speaker_id`.
        id_column (`str`, *optional*):
            Column of unique ids; by default `id` where there is one, else the row number.

    Raises:
        ValueError: the data set cannot be loaded or lacks a column.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "test.clean",
        text_column: str = "text",
        audio_column: str | None = None,
        speaker_column: str | None = None,
        id_column: str | None = None,
    ):
        self.folder = Path(name) if Path(name).is_dir() else Path(name).parent
        try:
            self.table = _load_table(name, config, split)
        except Exception as error:
            raise ValueError(
                f"Data set {name!r} (config {config}, split {split}) could not be loaded: {error}"
            ) from error
        columns = self.table.column_names

        def find(what: str, wanted: str | None, usual: tuple[str, ...]) -> str:
            for column in (wanted,) if wanted else usual:
                if column in columns:
                    return column
            flag = f"--{what}-column"
            raise ValueError(
                f"Data set {name!r} has no column {wanted or ' or '.join(usual)}; name one of {columns} by {flag}."
            )

        self.text_column = find("text", text_column, ("text",))
        self.audio_column = find("audio", audio_column, ("audio", "file_name"))
        self.speaker_column = find("speaker", speaker_column, ("speaker", "speaker_id"))
        self.id_column = find("id", id_column, ("id",)) if id_column or "id" in columns else None
        if isinstance(self.table.features[self.audio_column], Audio):
            self.table = self.table.cast_column(self.audio_column, Audio(decode=False))

    def read_audio(self, row: int) -> tuple[np.ndarray, int]:
        """
        Decode one recording.

        Args:
            row (`int`):
                Row of the table.

        Returns:
            `tuple[np.ndarray, int]`: the mono float32 waveform and its sampling rate in hertz.

        Raises:
            ValueError: the recording cannot be decoded, is empty or has values that are not finite.
        """
        value = self.table[row][self.audio_column]
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
        try:
            source = io.BytesIO(content) if content else self.folder / path
            audio, sampling_rate = soundfile.read(source, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError, TypeError) as error:
            raise ValueError(f"Row {row}: audio cannot be read: {error}") from error
        audio = audio.mean(axis=1)
        if not len(audio) or not np.isfinite(audio).all():
            raise ValueError(f"Row {row}: audio is empty or has values that are not finite.")
        return audio, sampling_rate

    def select(
        self, min_seconds: float, max_seconds: float, progress: bool = True
    ) -> tuple[list[Utterance], dict[str, int]]:
        """
        The utterances longer than `min_seconds` and shorter than `max_seconds`, in the order of the table.

        Args:
            min_seconds (`float`):
                Lower bound, in seconds.
            max_seconds (`float`):
                Upper bound, in seconds.
            progress (`bool`, *optional*, defaults to `True`):
                Whether to show a progress bar.

        Returns:
            `tuple[list[Utterance], dict[str, int]]`: the utterances, and how many were left out by reason.

        Raises:
            ValueError: an id comes twice, or no utterance is left.
        """
        utterances, left_out = [], Counter()
        names = [self.text_column, self.speaker_column, *([self.id_column] if self.id_column else [])]
        for row, entry in enumerate(
            tqdm(self.table.select_columns(names), "reading the data set", disable=not progress)
        ):
            text = entry[self.text_column]
            if not isinstance(text, str) or not text.strip():
                left_out["without text"] += 1
                continue
            try:
                audio, sampling_rate = self.read_audio(row)
            except ValueError:
                left_out["unreadable audio"] += 1
                continue
            seconds = len(audio) / sampling_rate
            if not min_seconds < seconds < max_seconds:
                left_out["outside the length bounds"] += 1
                continue
            name = str(entry[self.id_column]) if self.id_column else str(row)
            utterances.append(Utterance(name, row, text.strip(), str(entry[self.speaker_column]), round(seconds, 4)))
        repeated = [name for name, count in Counter(utterance.id for utterance in utterances).items() if count > 1]
        if repeated:
            raise ValueError(
                f"Column {self.id_column} has ids that come more than once: {repeated[:5]}; use --id-column."
            )
        if not utterances:
            raise ValueError(
                f"No utterance between {min_seconds} and {max_seconds} s is left (left out: {dict(left_out)}); "
                "see --min-seconds and --max-seconds."
            )
        return utterances, dict(left_out)


def _load_table(name: str, config: str | None, split: str) -> Dataset:
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"file type {path.suffix!r} is not one of {sorted(FILE_FORMATS)}")
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        # As a table: the audio folder loader would want to decode.
        for metadata in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
            if (path / metadata).is_file():
                return _load_table(str(path / metadata), None, split)
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"its splits are {sorted(loaded)}; name one by --split")
            return loaded[split]
        return loaded
    return load_dataset(name, config, split=split)


def pair_with_prompts(
    protocol: str, utterances: Iterable[Utterance], prompt_seconds: float
) -> tuple[list[tuple[Utterance, Utterance | None]], dict[str, int]]:
    """
    Pair every utterance with the utterance its prompt comes from.

    Args:
        protocol (`str`):
            One of [`PROTOCOLS`].
        utterances (`Iterable[Utterance]`):
            What [`SpeechDataset.select`] returned.
        prompt_seconds (`float`):
            Length of the prompt of `continuation`, in seconds.

    Returns:
        `tuple[list[tuple[Utterance, Utterance | None]], dict[str, int]]`: pairs of an utterance and the source of its
        prompt (itself for `continuation`, the speaker's previous utterance for `reference` with the last one for the
        first, `None` without a prompt), and how many utterances were left out by reason.

    Raises:
        ValueError: the protocol leaves no utterance.
    """
    utterances = list(utterances)
    left_out = {}
    if protocol == "continuation":
        pairs = [(utterance, utterance) for utterance in utterances if utterance.seconds > prompt_seconds]
        left_out = {f"not longer than the prompt of {prompt_seconds:g} s": len(utterances) - len(pairs)}
    elif protocol == "reference":
        by_speaker = defaultdict(list)
        for utterance in utterances:
            by_speaker[utterance.speaker].append(utterance)
        previous = {
            utterance.id: group[position - 1]
            for group in by_speaker.values()
            if len(group) > 1
            for position, utterance in enumerate(group)
        }
        pairs = [(utterance, previous[utterance.id]) for utterance in utterances if utterance.id in previous]
        left_out = {"of a speaker with one utterance only": len(utterances) - len(pairs)}
    else:
        pairs = [(utterance, None) for utterance in utterances]
    if not pairs:
        raise ValueError(f"Protocol {protocol} leaves none of the {len(utterances)} utterances: {left_out}.")
    return pairs, {reason: count for reason, count in left_out.items() if count}
