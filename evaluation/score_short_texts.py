"""
Scores how well a voice says a word or a few after each of its voice prompts, where a model can take the end of the prompt for
the end of the text.

    python evaluation/score_short_texts.py --recognizer faster-whisper:base

prints, for every named voice and for all, how many of the texts stay unspoken, how many run on for more than three seconds,
and the word error rate.
"""

import argparse
import json
import sys
from typing import Any

import soxr
import torch
from tqdm import tqdm

from metrics.word_error_rate.word_error_rate import edit_counts, error_rates
from recognizers import SAMPLING_RATE, load_recognizer
from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


TEXTS = [
    *["No.", "Yes.", "Hello.", "Stop!", "Why?", "Two.", "Of course.", "Thank you.", "Goodbye.", "Seven.", "Monday."],
    *[
        "Absolutely.",
        "Careful!",
        "Tomorrow.",
        "Nothing.",
        "Follow me.",
        "Blue.",
        "Enough!",
        "Not today.",
        "Breakfast?",
    ],
    *["Second floor.", "Left or right?", "Eleven o'clock.", "Turn around."],
]
# What is shorter or quieter than speech can be, and longer than so few words are (seconds, root mean square, seconds).
MIN_SECONDS, MIN_LEVEL, MAX_SECONDS = 0.2, 0.01, 3.0


def score(model: SledForSpeechSynthesis, processor: SledProcessor, recognizer: Any, seed: int) -> dict[str, Any]:
    """Numbers of texts, of those that are unspoken and too long, and word error rates in percent, by voice and of all."""
    results, all_counts = {}, []
    for name in tqdm(processor.voices, desc="Voices"):
        inputs = processor(TEXTS, **processor.load_voice(name)).to(model.device)
        generators = [torch.Generator().manual_seed(seed) for _ in TEXTS]
        waveforms = [audio.cpu().numpy() for audio in model.generate(**inputs, generator=generators)]
        seconds = [len(waveform) / processor.sampling_rate for waveform in waveforms]
        is_spoken = [
            length >= MIN_SECONDS and (waveform**2).mean() ** 0.5 >= MIN_LEVEL
            for waveform, length in zip(waveforms, seconds, strict=True)
        ]
        counts = []
        for waveform, text, spoken in zip(waveforms, TEXTS, is_spoken, strict=True):
            resampled = soxr.resample(waveform, processor.sampling_rate, SAMPLING_RATE)
            counts.append(edit_counts(recognizer([resampled])[0] if spoken else "", text))
        all_counts += counts
        results[name] = {
            "texts": len(TEXTS),
            "unspoken": is_spoken.count(False),
            "too_long": sum(length > MAX_SECONDS for length in seconds),
            "word_error_rate": round(float(error_rates(counts)["word_error_rate"]), 1),
        }
    totals = {name: sum(result[name] for result in results.values()) for name in ("texts", "unspoken", "too_long")}
    rate = round(float(error_rates(all_counts)["word_error_rate"]), 1)
    return {**results, "all": {**totals, "word_error_rate": rate}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recognizer", required=True, help="speech recognizer, as for run_eval.py")
    add("--model", default=builtin_voice(), help="model that speaks (default: the offline voice in the box)")
    add("--min-new-tokens", type=int, help="fewest frames of a text (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
        recognizer = load_recognizer(options.recognizer, "en", device)
        model = SledForSpeechSynthesis.from_pretrained(options.model).to(device)
        processor = SledProcessor.from_pretrained(options.model)
        if not processor.voices:
            raise ValueError(f"`model` {options.model} has no named voices.")
        if options.min_new_tokens is not None:
            model.generation_config.min_new_tokens = options.min_new_tokens
        result = score(model, processor, recognizer, options.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
