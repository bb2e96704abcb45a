"""The command `sled`: speaks a text, lists voices, runs the speech service, looks for its watermark."""

import codecs
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import torch
import typer
from transformers import logging

from . import __version__
from .audio_sled import read_audio
from .configuration_sled import SledConfig
from .modeling_sled import SledForSpeechSynthesis
from .precision import Precision, choose_precision
from .processing_sled import SledProcessor
from .voices import builtin_voice


# Of a batch job. Some are as many as there are bad rows.
MAX_SHOWN_ERRORS = 10

app = typer.Typer(
    name="sled",
    help="Text to speech with SLED.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class CommandError(typer.Exit):
    """Ends the command with one line that says why."""

    def __init__(self, message: str, code: int = 1) -> None:
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        super().__init__(code)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can mend is told in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            # The listener has left. What is still buffered for it must not raise once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        raise CommandError(str(error)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"transformers-sled {__version__}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Text to speech with SLED."""
    logging.disable_progress_bar()


@app.command()
def speak(
    text: Annotated[str | None, typer.Argument(help="Text to speak; from standard input by default.")] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Audio file, its format by extension, or - for raw 16-bit mono PCM on standard output; without it, the "
            "speech is played.",
        ),
    ] = None,
    voice: Annotated[
        str | None, typer.Option(help="A voice of `sled voices`, or a file that `save_voice` has written.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Speak standard input while it is being written.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: Hub repository or folder; by default the voice in the box.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the text; 1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="How much the speech varies.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same speech.")] = None,
    max_duration: Annotated[float | None, typer.Option(help="Seconds after which the speech is cut off.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Weights in int4 (on a CPU) or int8.")] = None,
) -> None:
    """Speak a text, to a file or aloud, while it is made."""
    if stream and text is not None:
        raise CommandError("--stream reads standard input: leave out the text.", code=2)
    with _one_line_errors():
        _check_output(output)
        pieces = _read_standard_input() if stream else (sys.stdin.read() if text is None else text)
        checkpoint = builtin_voice(interleaved=stream) if model is None else model
        loaded, processor = _load(checkpoint, device, quantization)
        options: dict[str, Any] = {} if voice is None else _get_voice(voice, processor)
        for name, value in (("guidance_scale", guidance_scale), ("temperature", temperature)):
            if value is not None:
                options[name] = value
        if seed is not None:
            options["generator"] = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        first_audio: float | None = None
        num_samples = 0
        waveforms = loaded.stream(pieces, processor, max_duration=max_duration, **options)
        # Before the output is opened, so that nothing is left of a text that is refused.
        waveform = next(waveforms, None)
        with _open_output(output, processor.sampling_rate) as write:
            while waveform is not None:
                first_audio = first_audio or time.perf_counter()
                num_samples += len(waveform)
                write(waveform.numpy())
                waveform = next(waveforms, None)
    seconds, duration = time.perf_counter() - start, num_samples / processor.sampling_rate
    if first_audio is None or duration == 0:
        raise CommandError("The speech ended before it began. Another --seed may help.")
    typer.echo(
        f"{duration:.2f} s of speech, first audio after {first_audio - start:.2f} s, all after {seconds:.2f} s",
        err=True,
    )


def _load(
    checkpoint: str, device: str | None, quantization: str | None
) -> tuple[SledForSpeechSynthesis, SledProcessor]:
    device = _get_device(device)
    try:
        precision = Precision("bfloat16", quantization)
        if quantization is None:
            config = SledConfig.from_pretrained(checkpoint)
            # One text is over before quantizing has paid.
            precision = choose_precision(config, device, num_streams=1, quantizes=False)
        model = SledForSpeechSynthesis.from_pretrained(
            checkpoint, device_map=device, **precision.get_loading_arguments()
        )
        return model, SledProcessor.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(f"--model {checkpoint!r} cannot be loaded: {error}") from error


def _get_device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _read_standard_input() -> Iterator[str]:
    """Whatever is there to be read, without waiting for a full line or buffer."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while data := os.read(sys.stdin.fileno(), 4096):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _get_voice(voice: str, processor: SledProcessor) -> dict[str, Any]:
    if voice in processor.voices:
        return {"voice_preset": voice}
    if Path(voice).is_file():
        return processor.load_voice(voice)
    raise ValueError(
        f"--voice {voice!r} is neither a file nor a voice of the checkpoint: {', '.join(processor.voices)}."
    )


def _check_output(output: str | None) -> None:
    """Refuses what cannot be written before the model is loaded."""
    if output is None:
        if importlib.util.find_spec("sounddevice") is None:
            raise ValueError("Nothing to play with: install `sounddevice`, or name a file with --output.")
    elif output != "-":
        if Path(output).suffix[1:].upper() not in soundfile.available_formats():
            known = ", ".join(sorted(name.lower() for name in soundfile.available_formats()))
            raise ValueError(f"--output {output!r} has no extension of a known audio format: {known}.")
        if not Path(output).parent.is_dir():
            raise ValueError(f"--output {output!r} is in a folder that does not exist.")


@contextlib.contextmanager
def _open_output(output: str | None, sampling_rate: int) -> Iterator[Callable[[np.ndarray], object]]:
    """A function that takes waveforms (num_samples,) in float32."""
    if output is None:
        import sounddevice  # An optional package, which looks for a sound card when it is imported.

        with sounddevice.OutputStream(samplerate=sampling_rate, channels=1, dtype="float32") as card:
            yield lambda waveform: card.write(waveform[:, None])
    elif output == "-":

        def write(waveform: np.ndarray) -> None:
            sys.stdout.buffer.write((waveform.clip(-1, 1) * 32767).astype("<i2").tobytes())
            sys.stdout.buffer.flush()

        yield write
    else:
        with soundfile.SoundFile(output, "w", samplerate=sampling_rate, channels=1) as file:
            yield file.write


@app.command()
def voices(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: Hub repository or folder; by default the voice in the box.")
    ] = None,
) -> None:
    """List the voices of a checkpoint."""
    checkpoint = model or builtin_voice()
    with _one_line_errors():
        try:
            processor = SledProcessor.from_pretrained(checkpoint)
        except OSError as error:
            raise ValueError(f"--model {checkpoint!r} cannot be loaded: {error}") from error
        for name in processor.voices:
            typer.echo(f"{name} (default)" if name == processor.default_voice else name)


@app.command()
def detect(file: Annotated[Path, typer.Argument(help="Audio file.", exists=True, dir_okay=False)]) -> None:
    """Look for the watermark of the speech service in a file. The exit status is 0 where it is found, and 1 where not."""
    with _one_line_errors():
        try:
            # The extras, which the other commands do without.
            from .server.watermark import SAMPLING_RATE, detect_watermark

            confidence = detect_watermark(read_audio(file, target_rate=SAMPLING_RATE))
        except ImportError as error:
            raise CommandError(
                "Looking for a watermark needs `pip install 'transformers-sled[serve,watermark]'`.", code=2
            ) from error
    typer.echo(f"{file}: {'watermarked' if confidence > 0.5 else 'no watermark'} ({confidence:.2f})")
    raise typer.Exit(0 if confidence > 0.5 else 1)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint for whole texts: Hub repository or folder; by default the voice in the box."),
    ] = None,
    streaming_model: Annotated[
        str | None,
        typer.Option(
            help="Interleaved checkpoint for texts that are being written; by default that in the box, or --model where "
            "that is given."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="SLED_API_KEY", help="Key that requests must bring; may be given several times."),
    ] = None,
    max_streams: Annotated[int, typer.Option(min=1, help="Texts that each model speaks at a time.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that wait at each model; more get status 429.")] = 32,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages elsewhere that may use the service.")
    ] = None,
    voices_folder: Annotated[
        str | None,
        typer.Option(help="Where voices that are made over HTTP are kept: a folder, or a URL that fsspec opens."),
    ] = None,
    cloning: Annotated[
        bool, typer.Option(help="Whether voices may be made over HTTP; without keys, everyone shares them.")
    ] = True,
    recognizer: Annotated[
        str | None,
        typer.Option(
            help="Speech recognizer, such as openai/whisper-base, that hears what the sample of a voice says. By default "
            "clients have to write it."
        ),
    ] = None,
    watermark: Annotated[
        bool, typer.Option(help="Whether to watermark the speech, where the extra `watermark` is installed.")
    ] = True,
    certificate: Annotated[Path | None, typer.Option(exists=True, help="Certificate for HTTPS.")] = None,
    private_key: Annotated[Path | None, typer.Option(exists=True, help="Private key for HTTPS.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the models, such as bfloat16, or auto for that of the checkpoints; by default what is fast on "
            "this machine."
        ),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Weights in int4 (on a CPU) or int8.")] = None,
    compile_step: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the models before the first request, which takes half a minute or more."
        ),
    ] = False,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Run on the Ray cluster of this machine, or that of RAY_ADDRESS.")
    ] = False,
    min_replicas: Annotated[int, typer.Option(min=1, help="With --ray, replicas of each model at least.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="With --ray, replicas of each model at most.")] = 1,
    num_cpus: Annotated[float, typer.Option(min=0, help="With --ray, cores of a replica.")] = 1.0,
    num_gpus: Annotated[float, typer.Option(min=0, help="With --ray, GPUs of a replica, such as 0.5.")] = 0.0,
) -> None:
    """Run the speech service: routes of OpenAI, Deepgram and ElevenLabs, and a page at /."""
    _check_installed("The service", "serve", "av", "fastapi", "fsspec", "prometheus_client", "uvicorn", "websockets")
    if on_ray:
        _check_installed("--ray", "ray", "ray")
    from .server import ServiceSettings, run_service  # The extra `serve`, which the other commands do without.

    with _one_line_errors():
        given: dict[str, Any] = {"model": model, "voices_folder": voices_folder}
        arguments: dict[str, Any] = dict(
            streaming_model=streaming_model,
            api_keys=tuple(api_key or ()),
            max_streams=max_streams,
            max_queue=max_queue,
            cors_origins=tuple(cors_origin or ()),
            cloning=cloning,
            recognizer=recognizer,
            watermark=watermark,
            # On a cluster, replicas with GPUs compute on these, whatever this machine has.
            device=_get_device(device or ("cpu" if on_ray else None)),
            dtype=dtype,
            quantization=quantization,
            compiles=compile_step,
            **{name: value for name, value in given.items() if value is not None},
        )
        settings = ServiceSettings(**arguments)
        if watermark and not settings.is_watermarking:
            typer.echo(
                "note: the speech is not watermarked: `pip install 'transformers-sled[watermark]'` brings a watermark.",
                err=True,
            )
        if host not in ("127.0.0.1", "localhost", "::1") and not settings.api_keys:
            typer.echo(f"warning: everyone who reaches {host} may use this service: give it an --api-key.", err=True)
        files = {
            "certificate": None if certificate is None else str(certificate),
            "private_key": None if private_key is None else str(private_key),
        }
        if on_ray:
            from .server.ray_app import RaySettings, run_on_ray  # The extra `ray`.

            arguments.update(
                min_replicas=min_replicas, max_replicas=max_replicas, num_cpus=num_cpus, num_gpus=num_gpus
            )
            run_on_ray(RaySettings(**arguments), host, port, **files)
        else:
            run_service(settings, host, port, **files)


def _check_installed(what: str, extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"{what} needs {', '.join(missing)}: install them with `pip install 'transformers-sled[{extra}]'`."
        )


@app.command()
def batch(
    source: Annotated[
        str,
        typer.Argument(
            help="Texts: a Parquet, JSON lines or CSV file with the columns id, text and, where wanted, voice, seed and "
            "language; a folder of text files; or a dataset on the Hub."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the audio, in Parquet files.")
    ],
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "train",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: Hub repository or folder; by default the voice in the box.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the text; 1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="How much the speech varies.")] = None,
    max_duration: Annotated[float | None, typer.Option(help="Seconds after which a paragraph is cut off.")] = None,
    max_characters: Annotated[int, typer.Option(min=1, help="Length of a text; longer ones get an error.")] = 200_000,
    max_streams: Annotated[int, typer.Option(min=1, help="Texts that an actor speaks at a time.")] = 16,
    num_actors: Annotated[int, typer.Option(min=1, help="Actors at most, each with a model of its own.")] = 1,
    num_cpus: Annotated[float, typer.Option(min=0, help="Cores of an actor.")] = 1.0,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of an actor, such as 0.5.")] = 0.0,
    rows_per_file: Annotated[int, typer.Option(min=1, help="Rows of a Parquet file at least.")] = 512,
    dtype: Annotated[str, typer.Option(help="Precision of the model, such as bfloat16.")] = "auto",
) -> None:
    """Speak many texts on a Ray cluster. Stopped at any time, the same command goes on where it was."""
    _check_installed("`sled batch`", "ray", "datasets", "pyarrow", "ray")
    from .batch.job import BatchSettings, run_batch  # The extra `ray`.

    wanted = {"guidance_scale": guidance_scale, "temperature": temperature, "max_duration": max_duration}
    with _one_line_errors():
        settings = BatchSettings(
            model=builtin_voice() if model is None else model,
            max_streams=max_streams,
            max_characters=max_characters,
            options={name: value for name, value in wanted.items() if value is not None},
            dtype=dtype,
            num_actors=num_actors,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            rows_per_file=rows_per_file,
        )
        report = run_batch(source, output, settings, split)
    errors = list(report.errors.items())
    for error, count in errors[:MAX_SHOWN_ERRORS]:
        typer.echo(f"{count} rows: {error}", err=True)
    if len(errors) > MAX_SHOWN_ERRORS:
        typer.echo(
            f"and {len(errors) - MAX_SHOWN_ERRORS} other errors, which {output / 'report.json'} names", err=True
        )
    typer.echo(
        f"{report.rows} rows, {report.num_errors} of them with an error, {report.audio_seconds:.1f} s of speech; this time "
        f"{report.spoken_rows} rows, {report.spoken_seconds:.1f} s of speech in {report.seconds:.1f} s",
        err=True,
    )


if __name__ == "__main__":
    app()
