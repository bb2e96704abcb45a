"""
Speaks text from standard input as it arrives.

To a file:

    python examples/stream_speech.py --output speech.wav < text.txt

To a player, as raw 16-bit mono PCM on standard output at the model's sampling rate (24 kHz):

    some-writer | python examples/stream_speech.py --output - | ffplay -nodisp -autoexit -f s16le -ar 24000 -ch_layout mono -
    some-writer | python examples/stream_speech.py --output - | aplay -t raw -f S16_LE -r 24000 -c 1

To the sound card (needs the package `sounddevice`):

    some-writer | python examples/stream_speech.py
"""

import argparse
import codecs
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import soundfile
import torch

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice
from transformers_sled.training import run_command


def read_text(file_descriptor: int) -> Iterator[str]:
    """Yields whatever is there to be read, without waiting for a full line or buffer."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while data := os.read(file_descriptor, 4096):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


@contextlib.contextmanager
def open_output(output: str | None, sampling_rate: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that takes waveforms in float32: to a file, to standard output or to the sound card."""
    if output is None:
        try:
            import sounddevice
        except ImportError:
            sys.exit("Install `sounddevice` to play the speech, or give --output.")
        with sounddevice.OutputStream(samplerate=sampling_rate, channels=1, dtype="float32") as card:
            yield lambda waveform: card.write(waveform[:, None])
    elif output == "-":

        def write(waveform: np.ndarray) -> None:
            sys.stdout.buffer.write((waveform.clip(-1, 1) * 32767).astype("<i2").tobytes())
            sys.stdout.buffer.flush()

        yield write
    else:
        with soundfile.SoundFile(output, "w", samplerate=sampling_rate, channels=1) as file:

            def write(waveform: np.ndarray) -> None:
                file.write(waveform)
                file.flush()

            yield write


def add_speech_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=builtin_voice(interleaved=True),
        help="Model on the Hub or in a folder (default: the voice in the box)",
    )
    parser.add_argument(
        "--codec", help="Codec of a model that comes without one, if not the one that its config names"
    )
    parser.add_argument("--output", help="Audio file, or - for raw 16-bit PCM on standard output; else the sound card")
    parser.add_argument("--voice", help="Voice to speak with: one of the checkpoint's, or a file with one")
    parser.add_argument("--prompt-audio", help="Recording of the voice to speak with")
    parser.add_argument("--prompt-text", help="What the recording says")
    parser.add_argument(
        "--guidance-scale", type=float, help="Strength of guidance; 1 is off (default: the model's own)"
    )
    parser.add_argument("--seed", type=int, help="Seed of the noise")
    parser.add_argument("--max-duration", type=float, help="Seconds of speech after which it is cut off")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load(args: argparse.Namespace) -> tuple[SledForSpeechSynthesis, SledProcessor]:
    name = args.model
    model = SledForSpeechSynthesis.from_pretrained(name, codec=args.codec)
    return model.to(args.device), SledProcessor.from_pretrained(name)


def speak(
    args: argparse.Namespace, model: SledForSpeechSynthesis, processor: SledProcessor, text: Iterable[str]
) -> int:
    """Speaks the text to the output that the arguments name. Returns the exit status."""
    options = {"max_duration": args.max_duration}
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    if args.seed is not None:
        options["generator"] = torch.Generator().manual_seed(args.seed)
    if args.voice:
        options.update(processor.load_voice(args.voice))
    if args.prompt_audio:
        options["prompt_audio"] = args.prompt_audio
    if args.prompt_text:
        options["prompt_text"] = args.prompt_text

    start = first_audio = None

    def timed_text() -> Iterator[str]:
        nonlocal start
        for piece in text:
            start = start or time.perf_counter()
            yield piece

    num_samples, status = 0, 0
    try:
        with open_output(args.output, processor.sampling_rate) as write:
            for waveform in model.stream(timed_text(), processor=processor, **options):
                first_audio = first_audio or time.perf_counter()
                num_samples += len(waveform)
                write(waveform.numpy())
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The listener has left. What is still buffered for it must not raise once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if first_audio is None:
        print("No audio.", file=sys.stderr)
        return status
    seconds, duration = time.perf_counter() - start, num_samples / processor.sampling_rate
    print(
        f"{duration:.2f} s of audio in {seconds:.2f} s since the first text, first audio after {first_audio - start:.2f} s, "
        f"real-time factor {seconds / duration:.2f}",
        file=sys.stderr,
    )
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_speech_arguments(parser)
    args = parser.parse_args()
    model, processor = load(args)
    sys.exit(speak(args, model, processor, read_text(sys.stdin.fileno())))


if __name__ == "__main__":
    run_command(main)
