"""
Gives a trained model another codec, so that it need not learn to speak from nothing after the codec was trained anew.

    python examples/tiny_voice/change_codec.py --model src/transformers_sled/voices/sled-tiny-en --codec latents/export \
        --train-files "corpus/train-*.parquet" --output-dir sled_changed

The two codecs must have the same frame rate.
"""

import argparse

import torch
from transformers import EncodecModel

from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.audio_sled import read_audio
from transformers_sled.training import change_codec, load_source, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint with its codec: Hub repository or folder")
    parser.add_argument("--codec", required=True, help="the new codec: Hub repository or folder")
    parser.add_argument("--train-files", required=True, help="parquet files (a glob pattern) with an `audio` column")
    parser.add_argument("--num-utterances", type=int, default=750, help="to compare on (default: %(default)s)")
    parser.add_argument("--output-dir", required=True, help="folder to write")
    arguments = parser.parse_args()

    model = SledForSpeechSynthesis.from_pretrained(arguments.model, dtype=torch.float32)
    codec = EncodecModel.from_pretrained(arguments.codec)
    dataset = load_source(arguments.train_files).shuffle(seed=0)
    rows = dataset.select(range(min(arguments.num_utterances, len(dataset))))
    audio = [torch.from_numpy(read_audio(row["audio"], target_rate=codec.config.sampling_rate)) for row in rows]
    explained_old, explained_new = change_codec(model, codec, audio)
    model.save_pretrained(arguments.output_dir)
    SledProcessor.from_pretrained(arguments.model).save_pretrained(arguments.output_dir)
    print(f"explained variance of the old latents: {explained_old:.2f}, of the new ones: {explained_new:.2f}")


if __name__ == "__main__":
    run_command(main)
