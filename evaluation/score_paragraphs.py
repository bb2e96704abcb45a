"""
Scores how well a voice speaks paragraphs: the words that are understood, and the pauses where two parts meet.

    python evaluation/score_paragraphs.py --sentences sentences.txt --recognizer faster-whisper:base.en

takes a text file with a sentence in each line, joins every eight of them to a paragraph, and prints the word error rate
of the sentences spoken one by one, of the paragraphs by `generate`, and of the paragraphs by `stream`, with the text piece
by piece where the model is an interleaved one.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

from metrics.word_error_rate.word_error_rate import edit_counts, error_rates
from recognizers import SAMPLING_RATE, load_recognizer
from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


# Quiet this far below the loudest 10 ms, and this long, is a pause (seconds).
QUIET_LEVEL, MIN_PAUSE = 10 ** (-35 / 20), 0.1
# Paragraphs that are spoken at a time.
BATCH_SIZE = 8


def load_paragraphs(path: Path, num_paragraphs: int, num_sentences: int) -> list[list[str]]:
    """Reads sentences from a file, one in a line, and makes paragraphs of so many of them."""
    try:
        sentences = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"`sentences` cannot be read from {str(path)!r}: {error}") from error
    if len(sentences) < num_paragraphs * num_sentences:
        raise ValueError(
            f"`sentences` in {str(path)!r} are {len(sentences)}, too few for {num_paragraphs} paragraphs of {num_sentences}."
        )
    return [
        sentences[start : start + num_sentences] for start in range(0, num_paragraphs * num_sentences, num_sentences)
    ]


def in_pieces(text: str) -> Iterator[str]:
    """A text as a language model writes it."""
    for start in range(0, len(text), 7):
        yield text[start : start + 7]


def measure_pauses(waveform: np.ndarray, sampling_rate: int) -> list[float]:
    """Lengths in seconds of the pauses inside a waveform."""
    step = sampling_rate // 100
    frames = waveform[: len(waveform) // step * step].reshape(-1, step)
    levels = np.sqrt((frames.astype(np.float64) ** 2).mean(axis=1))
    sounds = np.flatnonzero(levels >= QUIET_LEVEL * levels.max())
    lengths = (np.diff(sounds) - 1) / 100
    return [float(length) for length in lengths if length >= MIN_PAUSE]


def score(
    model: SledForSpeechSynthesis,
    processor: SledProcessor,
    recognizer: Any,
    paragraphs: list[list[str]],
    seed: int,
    folder: Path | None,
) -> dict[str, Any]:
    """Word error rates in percent, and the longest pauses of the paragraphs, as many as there are joins."""
    errors: dict[str, list[tuple[int, ...]]] = {"sentences": [], "generate": [], "stream": []}
    pauses: dict[str, list[float]] = {"generate": [], "stream": []}

    def hear(name: str, audio: torch.Tensor, text: str) -> np.ndarray:
        waveform = audio.cpu().numpy()
        (heard,) = recognizer([soxr.resample(waveform, processor.sampling_rate, SAMPLING_RATE)])
        errors[name].append(edit_counts(heard, text))
        return waveform

    def speak(texts: list[str], seeds: list[int]) -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.generate(**processor(texts).to(model.device), generator=generators)

    seeds = list(range(seed, seed + len(paragraphs)))
    texts = [" ".join(sentences) for sentences in paragraphs]
    for sentences, paragraph_seed in zip(tqdm(paragraphs, desc="Sentences"), seeds, strict=True):
        for audio, sentence in zip(speak(sentences, [paragraph_seed] * len(sentences)), sentences, strict=True):
            hear("sentences", audio, sentence)
    spoken: dict[str, list[torch.Tensor]] = {"generate": [], "stream": []}
    for start in tqdm(range(0, len(texts), BATCH_SIZE), desc="Paragraphs"):
        batch = slice(start, start + BATCH_SIZE)
        spoken["generate"] += speak(texts[batch], seeds[batch])
    for text, paragraph_seed in zip(tqdm(texts, desc="Streams"), seeds, strict=True):
        pieces = in_pieces(text) if model.config.is_interleaved else text
        noise = torch.Generator().manual_seed(paragraph_seed)
        spoken["stream"].append(torch.cat(list(model.stream(pieces, processor=processor, generator=noise))))
    for name, audios in spoken.items():
        for number, (audio, text) in enumerate(zip(audios, texts, strict=True)):
            waveform = hear(name, audio, text)
            num_joins = len(processor.split_text(text)) - 1
            pauses[name] += sorted(measure_pauses(waveform, processor.sampling_rate))[::-1][:num_joins]
            if folder is not None:
                soundfile.write(folder / f"{number:02d}-{name}.flac", waveform, processor.sampling_rate)
    rates = {name: round(float(error_rates(counts)["word_error_rate"]), 2) for name, counts in errors.items()}
    return {
        "word_error_rate": rates,
        "pause_seconds": {
            name: dict(zip(("5%", "50%", "95%"), np.percentile(lengths, [5, 50, 95]).round(2).tolist(), strict=True))
            for name, lengths in pauses.items()
            if lengths
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sentences", type=Path, required=True, help="text file with a sentence in each line")
    add("--recognizer", required=True, help="speech recognizer, as for run_eval.py")
    add("--model", default=builtin_voice(), help="model that speaks (default: the offline voice in the box)")
    add("--voice", help="name of the voice (default: the checkpoint's)")
    add("--num-paragraphs", type=int, default=24, help="default: 24")
    add("--num-sentences", type=int, default=8, help="sentences in each (default: 8)")
    add("--max-part-seconds", type=float, help="length of a part (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--device", default="cpu")
    add("--output-dir", type=Path, help="folder for the audio of the paragraphs")
    options = parser.parse_args(arguments)
    try:
        paragraphs = load_paragraphs(options.sentences, options.num_paragraphs, options.num_sentences)
        device = torch.device(options.device)
        recognizer = load_recognizer(options.recognizer, "en", device)
        model = SledForSpeechSynthesis.from_pretrained(options.model).to(device)
        processor = SledProcessor.from_pretrained(options.model)
        processor.default_voice = options.voice or processor.default_voice
        processor.max_part_seconds = options.max_part_seconds or processor.max_part_seconds
        if options.output_dir is not None:
            options.output_dir.mkdir(parents=True, exist_ok=True)
        result = score(model, processor, recognizer, paragraphs, options.seed, options.output_dir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
