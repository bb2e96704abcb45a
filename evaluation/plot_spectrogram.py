"""
Speaks a text and draws the spectrogram of the speech.

    python evaluation/plot_spectrogram.py "The dog barked all night." --output docs/spectrogram.png
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor

from transformers_sled import builtin_voice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="text to speak")
    parser.add_argument("--model", default=builtin_voice(), help="checkpoint: Hub repository or folder")
    parser.add_argument("--codec", help="codec, where the checkpoint's own is not to be used: repository or folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/spectrogram.png"))
    arguments = parser.parse_args()

    model = AutoModelForTextToWaveform.from_pretrained(arguments.model, codec=arguments.codec)
    processor = AutoProcessor.from_pretrained(arguments.model)
    inputs = processor(arguments.text, return_tensors="pt")
    (audio,) = model.generate(**inputs, generator=torch.Generator().manual_seed(arguments.seed))
    window = 1024
    if len(audio) < window:
        parser.error("The model ended its speech at once; try another --seed.")
    _, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    axes.specgram(audio.float().numpy(), NFFT=window, Fs=processor.sampling_rate, noverlap=window - 256, vmin=-160)
    axes.set(xlabel="seconds", ylabel="Hz", title=arguments.text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(arguments.output, dpi=110)
    print(f"{len(audio) / processor.sampling_rate:.2f} s: {arguments.output}")


if __name__ == "__main__":
    main()
