"""What is spoken and with which prompt: data sets, the utterances they give, and the paper's protocols."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from transformers_sled.audio_sled import read_audio
from transformers_sled.training import load_source


PROTOCOLS = {
    "continuation": "the first seconds of the utterance as prompt, its whole transcript as text",
    "reference": "the speaker's previous utterance as prompt, with its transcript",
    "text": "no prompt",
    "streaming": "no prompt, text and speech interleaved",
}

LIBRISPEECH_PC = "yoom618/librispeech_pc"


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
            What [`~transformers_sled.training.load_source`] takes: a Parquet, CSV or JSON lines file, a folder written
            by `save_to_disk`, a folder of audio files with a metadata file, or a Hub id.
        sampling_rate (`int`):
            The rate that recordings are read at, in hertz.
        config (`str`, *optional*):
            Configuration of a Hub data set.
        split (`str`, *optional*):
            Its split; by default `test.clean` of LibriSpeech-PC and `train` of others, as files have it.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the transcripts.
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column of the recordings.
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
        sampling_rate: int,
        config: str | None = None,
        split: str | None = None,
        text_column: str = "text",
        audio_column: str = "audio",
        speaker_column: str | None = None,
        id_column: str | None = None,
    ):
        self.sampling_rate = sampling_rate
        self.split = split or ("test.clean" if name == LIBRISPEECH_PC else "train")
        try:
            self.table = load_source(name, config, self.split)
        except Exception as error:
            raise ValueError(f"Data set {name!r} (split {self.split}) could not be loaded: {error}") from error
        columns = self.table.column_names

        def find(what: str, names: tuple[str, ...]) -> str:
            for column in names:
                if column in columns:
                    return column
            raise ValueError(
                f"Data set {name!r} has no column {' or '.join(names)}; name one of {columns} by --{what}-column."
            )

        self.text_column = find("text", (text_column,))
        self.audio_column = find("audio", (audio_column,))
        self.speaker_column = find("speaker", (speaker_column,) if speaker_column else ("speaker", "speaker_id"))
        self.id_column = find("id", (id_column or "id",)) if id_column or "id" in columns else None

    def read_audio(self, row: int) -> np.ndarray:
        """
        Decode one recording.

        Args:
            row (`int`):
                Row of the table.

        Returns:
            `np.ndarray` of shape `(samples,)`: the mono float32 waveform at `sampling_rate`.

        Raises:
            ValueError: the recording cannot be decoded, is empty or has values that are not finite.
        """
        return read_audio(self.table[row][self.audio_column], target_rate=self.sampling_rate)

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
                seconds = len(self.read_audio(row)) / self.sampling_rate
            except ValueError:
                left_out["unreadable audio"] += 1
                continue
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
