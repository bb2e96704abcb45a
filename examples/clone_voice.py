"""
Speaks a text in the voice of a recording, of which the transcript is known:
`python examples/clone_voice.py "New words." --prompt-audio voice.wav --prompt-text "What the recording says."`

The voice can be kept with `--save-voice voice.safetensors` and used again with `--voice voice.safetensors`. Clone only
voices whose owners have agreed to it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor

from transformers_sled import builtin_voice
from transformers_sled.training import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "text", nargs="?", help="text to speak; from standard input if neither this nor a file is given"
    )
    parser.add_argument("--text-file", type=Path, help="file with the text to speak")
    parser.add_argument("--prompt-audio", type=Path, help="recording of the voice, a few seconds long")
    parser.add_argument("--prompt-text", help="what the recording says")
    parser.add_argument(
        "--voice",
        help="file that was written by --save-voice, or one of the checkpoint's voices, instead of a recording",
    )
    parser.add_argument("--save-voice", type=Path, help="file to keep the voice in")
    parser.add_argument("--output", type=Path, default=Path("speech.wav"), help="audio file, its format by extension")
    parser.add_argument(
        "--model", default=builtin_voice(), help="checkpoint: Hub repository or folder (default: the voice in the box)"
    )
    parser.add_argument("--codec", help="codec, where the checkpoint's own is not to be used: repository or folder")
    parser.add_argument(
        "--guidance-scale", type=float, help="how closely to follow the text; 1 is off (default: the checkpoint's own)"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same speech")
    parser.add_argument("--dtype", default="auto", help="precision of the model, such as bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    arguments = parser.parse_args()
    if arguments.text is not None and arguments.text_file is not None:
        parser.error("give the text either as an argument or as --text-file")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output} is in a folder that does not exist")
    if (arguments.voice is None) == (arguments.prompt_audio is None or arguments.prompt_text is None):
        parser.error("give either --voice, or --prompt-audio and --prompt-text")
    text = arguments.text_file.read_text() if arguments.text_file else arguments.text
    if text is None:
        text = sys.stdin.read()

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForTextToWaveform.from_pretrained(
        arguments.model, codec=arguments.codec, dtype=arguments.dtype, device_map=arguments.device
    )
    start = time.perf_counter()
    if arguments.voice is not None:
        voice = processor.load_voice(arguments.voice)
    else:
        inputs = processor(text, prompt_text=arguments.prompt_text, prompt_audio=arguments.prompt_audio)
        latents = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
        voice = {"prompt_text": arguments.prompt_text, **latents}
    if arguments.save_voice is not None:
        processor.save_voice(arguments.save_voice, **voice)
    (audio,) = model.generate(
        **processor(text, **voice),
        generator=None if arguments.seed is None else torch.Generator().manual_seed(arguments.seed),
        **({} if arguments.guidance_scale is None else {"guidance_scale": arguments.guidance_scale}),
    )
    taken = time.perf_counter() - start
    processor.save_audio(audio, arguments.output)
    duration = len(audio) / processor.sampling_rate
    rate = f"{taken / duration:.2f}" if duration else "undefined"
    print(f"{arguments.output}: {duration:.2f} s of audio in {taken:.2f} s, real-time factor {rate}")


if __name__ == "__main__":
    run_command(main)
