"""
Measures what `generate` takes of memory for speech of several lengths.

    python evaluation/measure_memory.py --seconds 10 600

prints, for each length, the peak of the process above what it held before the call, in a process of its own, and how much
of that is the audio. Linux only.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


SENTENCE = "The dog barked all night. "


def read_status(name: str) -> float:
    """A size of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def measure(model_name: str, seconds: float) -> dict[str, float]:
    model, processor = SledForSpeechSynthesis.from_pretrained(model_name), SledProcessor.from_pretrained(model_name)
    frames_per_second = processor.sampling_rate / processor.hop_length
    model.generate(**processor(SENTENCE), max_new_tokens=round(frames_per_second))
    before = read_status("VmRSS")
    # Starts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    generator = torch.Generator().manual_seed(0)
    inputs = processor(SENTENCE * (1 + round(seconds)))
    (audio,) = model.generate(**inputs, generator=generator, max_new_tokens=round(seconds * frames_per_second))
    return {
        "seconds": round(len(audio) / processor.sampling_rate, 1),
        "peak_mb": round(read_status("VmHWM") - before),
        "audio_mb": round(audio.nbytes / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=builtin_voice(), help="model that speaks")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 600], help="lengths of the speech")
    options = parser.parse_args()
    if len(options.seconds) == 1:
        print(json.dumps(measure(options.model, options.seconds[0])))
        return
    for seconds in options.seconds:
        subprocess.run([sys.executable, __file__, "--model", options.model, "--seconds", str(seconds)], check=True)


if __name__ == "__main__":
    main()
