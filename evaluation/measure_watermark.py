"""
Measures what the watermark of the speech service does to speech, and how surely it is found.

    python evaluation/measure_watermark.py --sentences sentences.txt --recognizer faster-whisper:base.en

speaks a text file with a sentence in each line in the voices of the box in turn, and prints the word error rate, DNSMOS and
the detector's certainty (lowest, median, highest) for the speech without the mark and with it. It needs the extras `serve`
and `watermark` and the package `speechmos`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from tqdm import tqdm

from metrics.dnsmos import dnsmos
from metrics.word_error_rate.word_error_rate import edit_counts, error_rates
from recognizers import SAMPLING_RATE, load_recognizer
from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice
from transformers_sled.server.watermark import Watermarker, detect_watermark


# Samples that the service hands out at a time.
CHUNK_SIZE = 4800


def mark(waveform: np.ndarray) -> np.ndarray:
    """Marks speech as the service does, while it is made."""
    marker = Watermarker()
    marked = [marker.mark(waveform[start : start + CHUNK_SIZE]) for start in range(0, len(waveform), CHUNK_SIZE)]
    return np.concatenate([*marked, marker.finish()])


def measure(sentences: list[str], recognizer: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Word error rate in percent, mean DNSMOS and certainty, without the mark and with it."""
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice())
    processor = SledProcessor.from_pretrained(builtin_voice())
    errors: dict[str, list[tuple[int, ...]]] = {"unmarked": [], "marked": []}
    scores: dict[str, list[float]] = {"unmarked": [], "marked": []}
    certainties: dict[str, list[float]] = {"unmarked": [], "marked": []}
    for number, sentence in enumerate(tqdm(sentences, unit="sentence")):
        inputs = processor(sentence, voice_preset=processor.voices[number % len(processor.voices)])
        speech = model.generate(**inputs, generator=torch.Generator().manual_seed(seed + number))[0].numpy()
        for name, waveform in (("unmarked", speech), ("marked", mark(speech))):
            (heard,) = recognizer([soxr.resample(waveform, processor.sampling_rate, SAMPLING_RATE)])
            errors[name].append(edit_counts(heard, sentence))
            scores[name].append(dnsmos.quality(waveform, processor.sampling_rate)["overall"])
            certainties[name].append(detect_watermark(waveform))
    return {
        name: {
            "word_error_rate": round(float(error_rates(errors[name])["word_error_rate"]), 2),
            "dnsmos": round(float(np.mean(scores[name])), 3),
            "certainty": np.percentile(certainties[name], [0, 50, 100]).round(3).tolist(),
        }
        for name in errors
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True, help="text file with a sentence in each line")
    parser.add_argument("--recognizer", required=True, help="speech recognizer, as for run_eval.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    options = parser.parse_args()
    try:
        dnsmos.check_installed()
        sentences = options.sentences.read_text(encoding="utf-8").splitlines()
        recognizer = load_recognizer(options.recognizer, "en", torch.device("cpu"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(measure(sentences, recognizer, options.seed), indent=2))


if __name__ == "__main__":
    main()
