"""
Measures when text goes into a stream and when audio comes out, and draws it.

    python evaluation/plot_stream_timeline.py --output docs/stream_timeline.png

A writer offers the words of a text at a given rate, as a language model would; the stream takes them when it needs them.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


TEXT = (
    "The kettle had been singing for some time before anyone in the kitchen noticed it, and by then the windows were "
    "white with steam."
)


def measure(
    model: SledForSpeechSynthesis, processor: SledProcessor, text: str, pieces_per_second: float, **options
) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Times in seconds since the first word: words written, words taken, and waveforms made with their durations."""
    words = text.split(" ")
    pieces = [word + " " for word in words[:-1]] + words[-1:]
    written = [index / pieces_per_second for index in range(len(pieces))]
    taken: list[float] = []
    start = time.perf_counter()

    def write() -> Iterator[str]:
        for piece, due in zip(pieces, written, strict=True):
            time.sleep(max(0.0, start + due - time.perf_counter()))
            taken.append(time.perf_counter() - start)
            yield piece

    waveforms = []
    for waveform in model.stream(write(), processor=processor, **options):
        waveforms.append((time.perf_counter() - start, len(waveform) / processor.sampling_rate))
    return written, taken, waveforms


def draw(
    written: list[float], taken: list[float], waveforms: list[tuple[float, float]], output: Path, title: str
) -> None:
    figure, axes = plt.subplots(figsize=(10, 3))
    axes.eventplot(
        [written, taken], lineoffsets=[3, 2], linelengths=0.6, linewidths=1.5, colors=["tab:gray", "tab:blue"]
    )
    bars = {"height": 0.6, "edgecolor": "white", "linewidth": 0.5, "align": "center"}
    # Each waveform is made in the time since the one before it, and played after it.
    made_from, played_from = 0.0, waveforms[0][0]
    for made, duration in waveforms:
        axes.barh(1, made - made_from, left=made_from, color="tab:orange", **bars)
        played_from = max(played_from, made)
        axes.barh(0, duration, left=played_from, color="tab:green", **bars)
        made_from, played_from = made, played_from + duration
    axes.axvline(waveforms[0][0], color="black", linestyle=":", linewidth=1)
    axes.annotate(f" first audio {waveforms[0][0]:.2f} s", (waveforms[0][0], 3.42), va="bottom", fontsize=9)
    axes.set_yticks([3, 2, 1, 0], ["words written", "words read", "audio made", "audio played"])
    axes.set(xlabel="seconds since the first word", xlim=(0, None), ylim=(-0.5, 3.8), title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=builtin_voice(interleaved=True), help="Interleaved model (default: the voice in the box)"
    )
    parser.add_argument("--codec", help="Codec of a model that comes without one")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--pieces-per-second", type=float, default=10.0, help="Words written in a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, help="Strength of guidance; 1 is off; the model's by default")
    parser.add_argument("--eos-threshold", type=float, help="Probability that ends the speech; the model's by default")
    parser.add_argument("--max-duration", type=float, help="Seconds of speech after which it is cut off")
    parser.add_argument("--output", type=Path, default=Path("docs/stream_timeline.png"))
    args = parser.parse_args()
    name = args.model
    model = SledForSpeechSynthesis.from_pretrained(name, codec=args.codec)
    if not model.config.is_interleaved:
        parser.error("--model must be interleaved: an offline model reads the whole text first.")
    processor = SledProcessor.from_pretrained(name)
    options = {
        name: value
        for name in ("guidance_scale", "eos_threshold", "max_duration")
        if (value := getattr(args, name)) is not None
    }
    # The first run of a model is slower than those that follow.
    for _ in model.stream("Warm up.", processor=processor, **options | {"max_duration": 0.5}):
        pass
    generator = torch.Generator().manual_seed(args.seed)
    written, taken, waveforms = measure(
        model, processor, args.text, args.pieces_per_second, generator=generator, **options
    )
    if not waveforms:
        parser.error("The model ended its speech at once; try another --seed.")
    duration = sum(duration for _, duration in waveforms)
    title = f"{len(written)} words written in {written[-1]:.1f} s, {duration:.1f} s of audio"
    draw(written, taken, waveforms, args.output, title)
    print(
        f"first audio after {waveforms[0][0]:.2f} s with {sum(time <= waveforms[0][0] for time in taken)} words read, "
        f"{duration:.2f} s of audio in {waveforms[-1][0]:.2f} s: {args.output}"
    )


if __name__ == "__main__":
    main()
