"""Speaks the rows of a batch."""

import hashlib
import re
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch
from datasets import Audio, Features, Value
from datasets import List as ListOf
from transformers import logging

from ..modeling_sled import SledForSpeechSynthesis
from ..processing_sled import SledProcessor
from ..serving_sled import SledStream, SledStreamServer
from .texts import TextRow


logger = logging.get_logger(__name__)

# Of every waveform but the first: nobody waits for them.
CHUNK_SECONDS = 2.0
# Between two paragraphs.
PAUSE_SECONDS = 0.4
MAX_TITLE_CHARACTERS = 80

FEATURES = Features(
    {
        "id": Value("string"),
        "audio": Audio(),
        "duration": Value("float64"),
        "frames": Value("int64"),
        "voice": Value("string"),
        "seed": Value("int64"),
        "chapters": ListOf({"start": Value("float64"), "title": Value("string")}),
        "model_revision": Value("string"),
        "error": Value("string"),
        "batch": Value("string"),
    }
)
SCHEMA: pa.Schema = FEATURES.arrow_schema


@dataclass
class _Paragraph:
    """A paragraph of a row, which is spoken as a text of its own."""

    row: TextRow
    text: str
    generator: torch.Generator
    pieces: list[np.ndarray] = field(default_factory=list)
    error: Exception | None = None


class BatchSpeaker:
    r"""
    Speaks rows, as many at a time as there are streams, with a generator for each: what is said in a row depends on its
    text, voice and seed alone.

    Args:
        checkpoint (`str`):
            The model: a repository on the Hub or a folder.
        max_streams (`int`):
            Texts that are spoken at a time.
        device (`str`):
            Where to compute.
        dtype (`str`):
            Precision of the model.
        options (`dict[str, Any]`):
            Generation parameters.
    """

    def __init__(self, checkpoint: str, max_streams: int, device: str, dtype: str, options: dict[str, Any]) -> None:
        self._model = SledForSpeechSynthesis.from_pretrained(checkpoint, dtype=dtype, device_map=device)
        self._processor = SledProcessor.from_pretrained(checkpoint)
        self._max_streams = max_streams
        self._options = options
        self._revision = get_revision(checkpoint, self._model)

    def speak(self, batch: str, rows: list[TextRow]) -> pa.Table:
        r"""
        Speaks the rows of a batch.

        Args:
            batch (`str`):
                Name of the batch.
            rows (`list[TextRow]`):
                The rows.

        Returns:
            `pyarrow.Table`: a row for each in the order given, with the audio as FLAC, or with what went wrong.
        """
        paragraphs: dict[str, list[_Paragraph]] = {row.id: self._split(row) for row in rows}
        together = [paragraph for parts in paragraphs.values() for paragraph in parts]
        try:
            self._speak_together(together)
        except Exception:
            logger.warning(f"Batch {batch} failed as a whole; its rows are spoken one by one.", exc_info=True)
            for parts in paragraphs.values():
                self._speak_alone(parts)
        results = [self._pack(batch, row, paragraphs[row.id]) for row in rows]
        return pa.Table.from_pylist(results, SCHEMA)

    def _split(self, row: TextRow) -> list[_Paragraph]:
        if row.error is not None:
            return []
        texts = [text.strip() for text in re.split(r"\n\s*\n", row.text) if any(map(str.isalnum, text))]
        # A text without a word is refused by the model, which says why.
        return [
            _Paragraph(row, text, _make_generator(row.seed, index)) for index, text in enumerate(texts or [row.text])
        ]

    def _check(self, row: TextRow) -> None:
        known = self._processor.voices
        if row.voice is not None and row.voice not in known:
            raise ValueError(f"`voice` must be one of {', '.join(known) or 'none'}, got {row.voice!r}.")
        if row.language is not None and row.language != self._processor.language:
            raise ValueError(f"`language` must be {self._processor.language!r}, got {row.language!r}.")

    def _speak_together(self, paragraphs: list[_Paragraph]) -> None:
        server = SledStreamServer(self._model, self._processor, max_streams=self._max_streams)
        speaking: dict[SledStream, _Paragraph] = {}
        for paragraph in paragraphs:
            paragraph.pieces.clear()
            voice: dict[str, Any] = {} if paragraph.row.voice is None else {"voice_preset": paragraph.row.voice}
            try:
                self._check(paragraph.row)
                stream = server.add(
                    paragraph.text,
                    chunk_duration=CHUNK_SECONDS,
                    generator=paragraph.generator,
                    **voice,
                    **self._options,
                )
            except ValueError as error:
                paragraph.error = error
                continue
            speaking[stream] = paragraph
        while not all(stream.is_finished for stream in speaking):
            for stream, waveform in server.step():
                speaking[stream].pieces.append(_to_int16(waveform.numpy()))
        for stream, paragraph in speaking.items():
            if isinstance(stream.error, Exception):
                paragraph.error = stream.error
        server.close()

    def _speak_alone(self, paragraphs: list[_Paragraph]) -> None:
        for index, paragraph in enumerate(paragraphs):
            paragraph.generator = _make_generator(paragraph.row.seed, index)
        try:
            self._speak_together(paragraphs)
        except Exception as error:
            for paragraph in paragraphs:
                paragraph.error = error

    def _pack(self, batch: str, row: TextRow, paragraphs: list[_Paragraph]) -> dict[str, Any]:
        rate, voice = self._processor.sampling_rate, row.voice or self._processor.default_voice
        result = {"id": row.id, "batch": batch, "voice": voice, "seed": row.seed, "model_revision": self._revision}
        error = row.error or next((str(paragraph.error) for paragraph in paragraphs if paragraph.error), None)
        pieces: list[np.ndarray] = []
        chapters = []
        num_samples = num_frames = 0
        for paragraph in paragraphs:
            if pieces:
                pieces.append(np.zeros(round(PAUSE_SECONDS * rate), np.int16))
                num_samples += len(pieces[-1])
            chapters.append({"start": num_samples / rate, "title": _get_title(paragraph.text)})
            spoken = sum(map(len, paragraph.pieces))
            num_samples += spoken
            num_frames += spoken // self._processor.hop_length
            pieces += paragraph.pieces
        if error is None and num_frames == 0:
            error = "The speech ended before it began. Another seed may help."
        if error is not None:
            return {**result, "error": error}
        file = BytesIO()
        soundfile.write(file, np.concatenate(pieces), rate, format="FLAC", subtype="PCM_16")
        return {
            **result,
            "audio": {"bytes": file.getvalue(), "path": f"{row.id}.flac"},
            "duration": num_samples / rate,
            "frames": num_frames,
            "chapters": chapters,
        }


def _make_generator(seed: int, index: int) -> torch.Generator:
    """Of a paragraph of a row. The first has the row's own seed, as `generate` takes it."""
    if index > 0:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def _to_int16(waveform: np.ndarray) -> np.ndarray:
    return np.rint(waveform.clip(-1, 1) * 32767).astype(np.int16)


def _get_title(text: str) -> str:
    """The first line of a paragraph, without the marks of a heading."""
    return text.splitlines()[0].lstrip("# ")[:MAX_TITLE_CHARACTERS] if text.strip() else ""


def get_revision(checkpoint: str, model: SledForSpeechSynthesis) -> str:
    r"""
    Names what a checkpoint holds.

    Args:
        checkpoint (`str`):
            A repository on the Hub or a folder.
        model ([`SledForSpeechSynthesis`]):
            The model that was loaded from it.

    Returns:
        `str`: the commit of a repository, or a hash of a folder's weights.
    """
    commit = getattr(model.config, "_commit_hash", None)
    if commit is not None:
        return commit
    digest = hashlib.sha256()
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:40]}"


__all__ = ["FEATURES", "SCHEMA", "BatchSpeaker", "get_revision"]
