"""
Keeps short recordings of a corpus, with what they say, to clone voices from.

    python examples/tiny_voice/make_prompts.py --corpus "corpus/train-*.parquet" --output-dir voices/prompts \
        --speakers af_heart am_michael bf_emma
"""

import argparse
import io
from pathlib import Path

import soundfile
from datasets import Audio, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="parquet files with text, speaker, duration and audio")
    parser.add_argument("--speakers", nargs="+", required=True, help="whose recordings to keep, one of each")
    parser.add_argument("--duration", type=float, default=3.0, help="seconds that a recording should last")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()

    corpus = load_dataset("parquet", data_files=arguments.corpus, split="train")
    corpus = corpus.cast_column("audio", Audio(decode=False))
    speakers, durations = corpus["speaker"][:], corpus["duration"][:]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for speaker in arguments.speakers:
        rows = [row for row, name in enumerate(speakers) if name == speaker]
        if not rows:
            raise ValueError(f"--speakers must be of {sorted(set(speakers))}, got {speaker!r}")
        nearest = corpus[min(rows, key=lambda row: abs(durations[row] - arguments.duration))]
        samples, sampling_rate = soundfile.read(io.BytesIO(nearest["audio"]["bytes"]), dtype="float32")
        soundfile.write(arguments.output_dir / f"{speaker}.flac", samples, sampling_rate)
        (arguments.output_dir / f"{speaker}.txt").write_text(nearest["text"] + "\n", encoding="utf-8")
        print(f"{speaker}: {nearest['duration']:.2f} s, {nearest['text']}")


if __name__ == "__main__":
    main()
