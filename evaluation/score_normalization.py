"""
Scores how hard lines are read: numbers, money, dates, abbreviations, addresses and the like.

    python evaluation/score_normalization.py
    python evaluation/score_normalization.py --lines evaluation/data/hard_lines_held_out.jsonl
    python evaluation/score_normalization.py --model MODEL --recognizer faster-whisper:base.en

It prints the share of lines that `SledProcessor.normalize` reads exactly as it should, and those that it does not. With a
recognizer, a model speaks each line as it is written, and as it should be read; the word error rates of both should be
close. Each line of a file is `{"kind": ..., "text": what is written, "read": what should be read}`.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import soxr
import torch

from metrics.word_error_rate.word_error_rate import edit_counts, error_rates
from recognizers import SAMPLING_RATE, load_recognizer
from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


LINES = Path(__file__).parent / "data" / "hard_lines.jsonl"


def load_lines(path: Path) -> list[dict[str, str]]:
    """Reads lines from a file, all of which must have a kind, a text and what should be read."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"`lines` cannot be read from {str(path)!r}: {error}") from error
    if not lines or any({"kind", "text", "read"} - set(line) for line in lines):
        raise ValueError(f"`lines` in {str(path)!r} must each have a kind, a text and what should be read.")
    return lines


def score_text(processor: SledProcessor, lines: list[dict[str, str]]) -> dict[str, Any]:
    """Exact matches, in all and by kind, and the lines that are read in another way."""
    wrong = [
        {**line, "is_read": is_read}
        for line in lines
        if (is_read := processor.normalize(line["text"])) != line["read"]
    ]
    totals, errors = Counter(line["kind"] for line in lines), Counter(line["kind"] for line in wrong)
    return {
        "lines": len(lines),
        "exact_percent": 100 * (1 - len(wrong) / len(lines)),
        "by_kind": {kind: f"{total - errors[kind]}/{total}" for kind, total in totals.items()},
        "wrong": wrong,
    }


def score_speech(
    model: SledForSpeechSynthesis,
    processor: SledProcessor,
    recognizer: Any,
    lines: list[dict[str, str]],
    voice: dict[str, Any],
    batch_size: int = 16,
) -> dict[str, float]:
    """Word error rates of the lines as they are written and as they should be read, spoken with the same noise."""
    rates = {}
    for name in ("text", "read"):
        counts = []
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            inputs = processor([line[name] for line in batch], **voice).to(model.device)
            generators = [torch.Generator().manual_seed(start + index) for index in range(len(batch))]
            audios = [
                soxr.resample(audio.cpu().numpy(), processor.sampling_rate, SAMPLING_RATE)
                for audio in model.generate(**inputs, generator=generators)
            ]
            heard = recognizer(audios)
            counts += [edit_counts(one, line["read"]) for one, line in zip(heard, batch, strict=True)]
        rates[f"word_error_rate_of_{name}"] = float(error_rates(counts)["word_error_rate"])
    return rates


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=LINES, help="file of lines")
    parser.add_argument("--model", default=builtin_voice(), help="model whose processor reads, and that speaks")
    parser.add_argument("--recognizer", help="speech recognizer, as for run_eval.py; without one nothing is spoken")
    parser.add_argument("--prompt-audio", help="recording of the voice to speak in")
    parser.add_argument("--prompt-text", help="what it says")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        lines = load_lines(options.lines)
        processor = SledProcessor.from_pretrained(options.model, normalizer="en")
        result = score_text(processor, lines)
        if options.recognizer is not None:
            device = torch.device(options.device)
            recognizer = load_recognizer(options.recognizer, "en", device)
            model = SledForSpeechSynthesis.from_pretrained(options.model).to(device)
            given = {"prompt_audio": options.prompt_audio, "prompt_text": options.prompt_text}
            voice = {name: value for name, value in given.items() if value is not None}
            result |= score_speech(model, processor, recognizer, lines, voice)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
