"""Measure how fast SLED generates and trains, and what memory it takes.

    python evaluation/run_benchmark.py generation --full-size --output-dir outputs/benchmark \\
        --configuration dtype=float32 --configuration dtype=bfloat16 --configuration dtype=bfloat16,guidance=1

Every `--configuration` is a comma-separated list of fields of `Configuration`, the first one the baseline. Each runs in a
process of its own, and the runs of all of them take turns, so that whatever else the machine does meets all alike.
`--full-size` takes the released architecture with random weights, `--model` a checkpoint; the end of speech is held off,
so that all runs are equally long. Writes `benchmark.json` after every round, and `benchmark.png` at the end.

Every frame multiplies by every weight once, which on few rows takes as long as reading them from memory does. Each round
times these products alone as well: `weights ms per frame`, and `times weights`, what a frame takes over that. `steady ms
per frame` is without the reading of the text, by the difference to an utterance of a few frames.

    python evaluation/run_benchmark.py training --full-size --output-dir outputs/training_speed

measures training steps from codes and from waveforms by length and batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_sled import (
    SledConfig,
    SledForSpeechSynthesis,
    SledProcessor,
    SledStreamingDecoder,
    builtin_voice,
    generation_sled,
)
from transformers_sled.cache_sled import CACHE_ARGUMENT
from transformers_sled.quantization_sled import get_quantization_config


TOKENIZER = Path(__file__).parents[1] / "tests" / "fixtures" / "golden" / "offline"
# Chunk sizes of the released interleaved checkpoint.
INTERLEAVED = {"text_chunk_size": 5, "speech_chunk_size": 45}
SENTENCE = "The quick brown fox jumps over the lazy dog while seven wizards make toxic brew for the evil queen."
# What frames take steadily is told from two utterances, one of which is only as long as this.
START_FRAMES = 8
# Parts of the model that the breakdown tells apart, by the name of their module.
REGIONS = {"model": "backbone", "generative_head": "head"}
# The codec's work, whole and streamed, by the object that holds the function.
CODEC_FUNCTIONS = ((generation_sled, "decode_latents"), (SledStreamingDecoder, "decode"))


@dataclass(frozen=True)
class Configuration:
    """What a run of `generate` depends on."""

    dtype: str = "float32"
    # none, int4 or int8 (weights only), or int8-dynamic (activations as well)
    quantization: str = "none"
    attention: str = "sdpa"
    # dynamic, static or none
    cache: str = "dynamic"
    compile: bool = False
    guidance: float = 2.0
    batch: int = 1
    frames: int = 150
    tokens: int = 40
    # offline (`generate`), stream (audio leaves as it is made) or stream-text (text arrives piece by piece as well)
    mode: str = "offline"

    @classmethod
    def parse(cls, text: str) -> Configuration:
        accepted = {
            "dtype": ("float32", "bfloat16", "float16"),
            "quantization": ("none", "int4", "int8", "int8-dynamic"),
            "cache": ("dynamic", "static", "none"),
            "mode": ("offline", "stream", "stream-text"),
        }
        kinds = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for item in filter(None, text.split(",")):
            name, separator, value = item.partition("=")
            if name not in kinds or not separator:
                raise argparse.ArgumentTypeError(f"must be name=value with a name of {list(kinds)}, got {item!r}")
            if value not in accepted.get(name, (value,)):
                raise argparse.ArgumentTypeError(f"{name} must be one of {accepted[name]}, got {value!r}")
            if kinds[name] is bool and value not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{name} must be true or false, got {value!r}")
            try:
                values[name] = value == "true" if kinds[name] is bool else kinds[name](value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{name} must be a number, got {value!r}") from None
        configuration = cls(**values)
        if configuration.mode != "offline" and configuration.batch != 1:
            raise argparse.ArgumentTypeError("a stream has a batch of 1")
        if configuration.compile and configuration.cache == "none":
            raise argparse.ArgumentTypeError("compile=true needs a cache")
        return configuration

    @property
    def name(self) -> str:
        """What sets it apart from the default, for tables and plots."""
        default = Configuration()
        changed = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in asdict(self).items()
            if value != getattr(default, key) or key == "dtype"
        ]
        return ", ".join(changed)


@dataclass(frozen=True)
class TrainingConfiguration:
    """What a training step depends on."""

    source: str
    seconds: float
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.source}, {self.seconds:g} s, batch {self.batch}, {self.dtype}"


def get_resident_bytes(field: str) -> int:
    """`VmRSS`, the resident memory now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"The system does not tell `{field}`.")


def make_quantization_config(quantization: str) -> QuantizationConfigMixin:
    if quantization != "int8-dynamic":
        return get_quantization_config(quantization)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(
        Int8DynamicActivationInt8WeightConfig(version=2), modules_to_not_convert=["codec", "eos_head"]
    )


def write_full_size(folder: Path) -> None:
    """Writes the released architecture with random weights. The head's are not left at zero, where they start."""
    torch.manual_seed(0)
    model = SledForSpeechSynthesis(SledConfig())
    for parameter in model.generative_head.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    shutil.copytree(
        TOKENIZER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )


def write_variant(source: Path, folder: Path, dtype: str, quantization: str) -> None:
    """Writes a checkpoint in another precision, which is what somebody who runs it would keep on disk."""
    options = {} if quantization == "none" else {"quantization_config": make_quantization_config(quantization)}
    model = SledForSpeechSynthesis.from_pretrained(source, dtype=dtype, **options)
    model.save_pretrained(folder)
    SledProcessor.from_pretrained(source).save_pretrained(folder)


class GenerationBenchmark:
    """One configuration of `generate` or `stream` on a loaded model."""

    def __init__(self, checkpoint: str, configuration: Configuration, is_full_size: bool) -> None:
        self.configuration = configuration
        config = SledConfig.from_pretrained(checkpoint)
        if configuration.mode == "stream-text" and not config.is_interleaved:
            if not is_full_size:
                raise ValueError("`mode=stream-text` needs an interleaved checkpoint, but this one is offline.")
            config.update(INTERLEAVED)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = SledForSpeechSynthesis.from_pretrained(
            checkpoint, config=config, dtype=configuration.dtype, attn_implementation=configuration.attention
        ).to(self.device)
        self.processor = SledProcessor.from_pretrained(checkpoint)
        # A voice would be read with every text.
        self.processor.default_voice = None
        words = SENTENCE.split()
        self.words = [words[0]]
        while self._count_tokens(" ".join(self.words)) < configuration.tokens:
            self.words.append(" " + words[len(self.words) % len(words)])
        text = "".join(self.words)
        self.inputs = self.processor([text] * configuration.batch, return_tensors="pt").to(self.device)
        self.text = text
        codec_config = self.model.get_codec().config
        self.frame_seconds = codec_config.hop_length / codec_config.sampling_rate
        self.options: dict[str, Any] = {
            "guidance_scale": configuration.guidance,
            "max_new_tokens": configuration.frames,
            "min_new_tokens": configuration.frames,
            "eos_threshold": 1.0,
            "use_cache": configuration.cache != "none",
        }
        if configuration.cache == "static":
            self.options["cache_implementation"] = "static"
            self.options["disable_compile"] = not configuration.compile
        if configuration.compile:
            self.model.compile_generation()

    def _count_tokens(self, text: str) -> int:
        return self.processor(text, return_tensors="pt")["input_ids"].shape[1]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self) -> dict[str, float]:
        """One utterance (or batch), timed."""
        first_audio = heard_first_chunk = None
        pieces = self._pieces() if self.configuration.mode == "stream-text" else self.text
        self.first_chunk_time = 0.0
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        if self.configuration.mode == "offline":
            self._generate(self.configuration.frames)
        else:
            for _ in self.model.stream(pieces, processor=self.processor, **self.options):
                if first_audio is None:
                    first_audio = time.perf_counter() - start
                    heard_first_chunk = time.perf_counter() - self.first_chunk_time
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        frames = self.configuration.frames
        figures = {
            "ms_per_frame": seconds / frames * 1e3,
            "cpu_ms_per_frame": cpu_seconds / frames * 1e3,
            "real_time_factor": seconds / (frames * self.frame_seconds),
            "frames_per_second": frames * self.configuration.batch / seconds,
            "seconds_to_first_audio": seconds if first_audio is None else first_audio,
        }
        if self.configuration.mode == "offline" and frames > START_FRAMES:
            start = time.perf_counter()
            self._generate(START_FRAMES)
            rest = seconds - (time.perf_counter() - start)
            figures["steady_ms_per_frame"] = rest / (frames - START_FRAMES) * 1e3
        if self.configuration.mode == "stream-text":
            figures["seconds_from_first_text_chunk_to_audio"] = heard_first_chunk
        return figures

    def _generate(self, num_frames: int) -> None:
        self.model.generate(
            **self.inputs, **(self.options | {"max_new_tokens": num_frames, "min_new_tokens": num_frames})
        )
        self._synchronize()

    def _pieces(self) -> Iterator[str]:
        """The text word by word; notes when the model's first chunk of tokens has been handed over."""
        for count, word in enumerate(self.words, 1):
            # The last token is the end of the text.
            if not self.first_chunk_time:
                num_tokens = self._count_tokens("".join(self.words[:count])) - 1
                if num_tokens >= self.model.config.text_chunk_size:
                    self.first_chunk_time = time.perf_counter()
            yield word

    @torch.no_grad()
    def run_bare(self) -> dict[str, float]:
        """The forward passes of `run` and nothing else: decoder, head, embedding of the frame, codec."""
        model, configuration = self.model, self.configuration
        if configuration.cache != "dynamic" or configuration.mode != "offline":
            return {}
        num_rows = configuration.batch * (2 if configuration.guidance != 1 else 1)
        ids = self.inputs["input_ids"][:1].expand(num_rows, -1)
        noise = torch.randn(configuration.batch, model.config.noise_dim, device=self.device).to(model.dtype)
        cache = DynamicCache(config=model.config)
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        embeds, frames = model.embed_text(ids), []
        for _ in range(configuration.frames):
            outputs = model(inputs_embeds=embeds, use_cache=True, **{CACHE_ARGUMENT: cache})
            latents = model.generative_head(outputs.last_hidden_state[: configuration.batch, -1], noise)
            frames.append(latents)
            embeds = model.embed_latents(latents[:, None]).repeat(num_rows // configuration.batch, 1, 1)
        model.decode_latents(torch.stack(frames, dim=1))
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return {
            "bare_ms_per_frame": seconds / configuration.frames * 1e3,
            "bare_cpu_ms_per_frame": cpu_seconds / configuration.frames * 1e3,
        }

    @torch.no_grad()
    def run_weights(self) -> dict[str, float]:
        """The matrix products of a frame and nothing else: all linear layers of decoder, head and embedding, eagerly."""
        configuration = self.configuration
        if configuration.quantization != "none" or configuration.cache == "none":
            return {}
        layers = []
        for path, layer in self.model.named_modules():
            if isinstance(layer, torch.nn.Linear) and not path.startswith("codec."):
                is_guided = path.startswith(("model.", "eos_head")) and configuration.guidance != 1
                num_rows = configuration.batch * (2 if is_guided else 1)
                layers.append((layer, torch.randn_like(layer.weight[:1]).repeat(num_rows, 1)))
        self._synchronize()
        start = time.perf_counter()
        for _ in range(configuration.frames):
            for layer, rows in layers:
                torch.nn.functional.linear(rows, layer.weight, layer.bias)
        self._synchronize()
        seconds = (time.perf_counter() - start) / configuration.frames
        num_bytes = sum(layer.weight.nbytes for layer, _ in layers)
        return {"weights_ms_per_frame": seconds * 1e3, "weights_gb_per_second": num_bytes / seconds / 1e9}

    def get_breakdown(self) -> dict[str, dict[str, float]]:
        """
        Milliseconds a frame by part of the model and kind of work, from the profiler, which slows Python down itself:
        `run` tells how long a frame takes without it. Parts inside a compiled step are not told apart.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        with self._regions(), torch.profiler.profile(activities=activities) as profiler, _region("loop"):
            self.run()
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        scale = 1e-3 / self.configuration.frames

        def add(event: Any, region: str) -> None:
            """Counts an event that no counted one holds, or goes through what a region holds."""
            elapsed = event.cpu_time_total * scale
            if not event.name.startswith("region:"):
                totals[region][_get_kind(event.name)] += elapsed
                totals[region]["python"] -= elapsed
                return
            inner = event.name.removeprefix("region:")
            totals[inner]["python"] += elapsed
            if inner != region:
                totals[region]["python"] -= elapsed
            for child in event.cpu_children:
                add(child, inner)

        roots = [event for event in profiler.events() if event.cpu_parent is None and event.name == "region:loop"]
        for root in roots:
            add(root, "loop")
        return {region: dict(kinds) for region, kinds in totals.items()}

    @contextmanager
    def _regions(self) -> Iterator[None]:
        handles, functions = [], []
        for owner, name in CODEC_FUNCTIONS:
            function = getattr(owner, name)
            functions.append((owner, name, function))

            def decode(*args: Any, function: Any = function, **kwargs: Any) -> Any:
                with _region("codec"):
                    return function(*args, **kwargs)

            setattr(owner, name, decode)
        if not self.configuration.compile:
            for path, name in REGIONS.items():
                module, open_regions = self.model.get_submodule(path), []

                def enter(*_: Any, name: str = name, open_regions: list = open_regions) -> None:
                    open_regions.append(_region(name))
                    open_regions[-1].__enter__()

                def leave(*_: Any, open_regions: list = open_regions) -> None:
                    open_regions.pop().__exit__(None, None, None)

                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner, name, function in functions:
                setattr(owner, name, function)


def _region(name: str) -> torch.profiler.record_function:
    return torch.profiler.record_function(f"region:{name}")


def _get_kind(name: str) -> str:
    if "attention" in name:
        return "attention"
    if any(part in name for part in ("linear", "addmm", "mm", "lstm", "conv", "int8")):
        return "matrix products"
    if "compiled" in name.lower():
        return "compiled"
    return "other operations"


class TrainingBenchmark:
    """Training steps of one kind of batch."""

    def __init__(self, checkpoint: str, configuration: TrainingConfiguration, is_full_size: bool) -> None:
        self.configuration = configuration
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = SledForSpeechSynthesis.from_pretrained(checkpoint).to(self.device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        codec = self.model.get_codec()
        hop_length = codec.config.hop_length
        num_frames = round(configuration.seconds * codec.config.sampling_rate / hop_length)
        # Text takes about 3 tokens a second.
        num_tokens = max(2, round(3 * configuration.seconds))
        generator = torch.Generator().manual_seed(0)
        shape = (configuration.batch, num_tokens)
        self.batch = {"input_ids": torch.randint(5, self.model.config.vocab_size, shape, generator=generator)}
        if configuration.source == "codes":
            num_codebooks = codec.quantizer.get_num_quantizers_for_bandwidth(self.model.config.codec_bandwidth)
            shape = (configuration.batch, num_codebooks, num_frames)
            self.batch["audio_codes"] = torch.randint(0, codec.config.codebook_size, shape, generator=generator)
        else:
            shape = (configuration.batch, 1, num_frames * hop_length)
            self.batch["input_values"] = torch.randn(shape, generator=generator) * 0.1
        self.batch = {name: tensor.to(self.device) for name, tensor in self.batch.items()}

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        use_autocast = self.configuration.dtype != "float32"
        dtype = getattr(torch, self.configuration.dtype)
        with torch.autocast(self.device.type, dtype, enabled=use_autocast):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {
            "seconds_per_step": seconds,
            "steps_per_second": 1 / seconds,
            "seconds_of_speech_per_second": self.configuration.batch * self.configuration.seconds / seconds,
        }

    def run_bare(self) -> dict[str, float]:
        return {}

    def run_weights(self) -> dict[str, float]:
        return {}

    def get_breakdown(self) -> dict[str, dict[str, float]]:
        return {}


def serve(
    connection: Connection, kind: type, checkpoint: str, configuration: Any, is_full_size: bool, threads: int | None
) -> None:
    """A worker process: loads, then measures what it is asked for."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    after_imports = get_resident_bytes("VmRSS")
    try:
        start = time.perf_counter()
        benchmark = kind(checkpoint, configuration, is_full_size)
        loading_seconds = time.perf_counter() - start
        connection.send({"seconds_to_load": loading_seconds})
        while (request := connection.recv()) is not None:
            if request == "memory":
                figures = {"peak_memory_mb": (get_resident_bytes("VmHWM") - after_imports) / 1e6}
                if torch.cuda.is_available():
                    figures["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
                connection.send(figures)
            else:
                connection.send(getattr(benchmark, request)())
    except Exception as error:
        connection.send(error)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, kind: type, checkpoint: str, configuration: Any, is_full_size: bool, threads: int | None):
        self.name = configuration.name
        self.configuration = configuration
        # A fresh interpreter, whose memory holds nothing of other configurations.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, kind, checkpoint, configuration, is_full_size, threads)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.loading = self._receive()

    def _receive(self) -> Any:
        try:
            reply = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name}: the process ended with {self.process.exitcode}.") from None
        if isinstance(reply, Exception):
            raise RuntimeError(f"{self.name}: {reply}") from reply
        return reply

    def ask(self, request: str) -> Any:
        self.connection.send(request)
        return self._receive()

    def close(self) -> None:
        if self.process.is_alive():
            self.connection.send(None)
            self.process.join()


def measure(workers: list[Worker], rounds: int, with_breakdown: bool) -> Iterator[list[dict[str, Any]]]:
    """
    Medians and spread of every worker's figures over rounds in which all take their turn: yields what there is so far after
    every round, and after the breakdown.
    """
    samples: list[dict[str, list[float]]] = [defaultdict(list) for _ in workers]
    loading: list[dict[str, Any]] = []
    for worker in tqdm(workers, desc="warm up"):
        worker.ask("run")
        loading.append(worker.loading | worker.ask("memory"))
        worker.ask("run")
    results = []
    for count in tqdm(range(1, rounds + 1), desc="rounds"):
        for worker, figures in zip(workers, samples, strict=True):
            measured = worker.ask("run") | worker.ask("run_bare") | worker.ask("run_weights")
            # Of each round, because what slows one down in passing slows the others as well.
            if "bare_ms_per_frame" in measured:
                measured["generate_overhead"] = measured["ms_per_frame"] / measured["bare_ms_per_frame"] - 1
            if "weights_ms_per_frame" in measured:
                measured["times_weights"] = measured["ms_per_frame"] / measured["weights_ms_per_frame"]
            for name, value in measured.items():
                figures[name].append(value)
        results = [
            {"name": worker.name, "configuration": asdict(worker.configuration), "rounds": count}
            | load
            | {name: statistics.median(values) for name, values in figures.items()}
            | {f"{name}_range": [min(values), max(values)] for name, values in figures.items()}
            for worker, load, figures in zip(workers, loading, samples, strict=True)
        ]
        yield results
    if with_breakdown:
        for worker, result in zip(workers, results, strict=True):
            result["breakdown_ms_per_frame"] = worker.ask("get_breakdown")
        yield results


def describe_machine(threads: int | None) -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    machine: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads or torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "transformers", "torchao", "transformers-sled"):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = None
    return machine


def write_plot(results: list[dict[str, Any]], frame_ms: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = results[::-1]
    medians = [result["ms_per_frame"] for result in results]
    ranges = [result["ms_per_frame_range"] for result in results]
    errors = [
        [median - low for median, (low, _) in zip(medians, ranges, strict=True)],
        [high - median for median, (_, high) in zip(medians, ranges, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(results)), layout="constrained")
    bars = axes.barh([result["name"] for result in results], medians, xerr=errors, color="#4c72b0", ecolor="#888888")
    axes.bar_label(bars, fmt="%.1f", padding=6)
    axes.axvline(frame_ms, color="#c44e52", linestyle="--", label=f"real time, {frame_ms:.1f} ms")
    axes.margins(x=0.12)
    axes.set_xlabel("ms a frame (median, range)")
    figure.legend(loc="outside upper right")
    figure.savefig(path, dpi=80)


def write_results(output_dir: Path, command: str, threads: int | None, results: list[dict[str, Any]]) -> None:
    report = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": describe_machine(threads),
        "results": results,
    }
    unfinished = output_dir / "benchmark.json.unfinished"
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(output_dir / "benchmark.json")


def print_table(results: list[dict[str, Any]]) -> None:
    baseline = results[0]
    names = [
        name
        for name in (
            "ms_per_frame",
            "steady_ms_per_frame",
            "bare_ms_per_frame",
            "generate_overhead",
            "weights_ms_per_frame",
            "times_weights",
            "cpu_ms_per_frame",
            "real_time_factor",
            "frames_per_second",
            "seconds_to_first_audio",
            "seconds_from_first_text_chunk_to_audio",
            "seconds_per_step",
            "seconds_of_speech_per_second",
            "seconds_to_load",
            "peak_memory_mb",
            "peak_gpu_memory_mb",
        )
        if any(name in result for result in results)
    ]
    print("| configuration | " + " | ".join(name.replace("_", " ") for name in names) + " | times baseline |")
    print("| --- |" + " --- |" * (len(names) + 1))
    key = "ms_per_frame" if "ms_per_frame" in baseline else "seconds_per_step"
    for result in results:
        cells = [f"{result[name]:.3g}" if name in result else "" for name in names]
        print(f"| {result['name']} | " + " | ".join(cells) + f" | {result[key] / baseline[key]:.2f} |")


def print_breakdown(result: dict[str, Any]) -> None:
    breakdown = result["breakdown_ms_per_frame"]
    kinds = sorted({kind for region in breakdown.values() for kind in region})
    print(f"\n{result['name']}: ms a frame under the profiler\n")
    print("| part | " + " | ".join(kinds) + " |")
    print("| --- |" + " --- |" * len(kinds))
    for region, values in breakdown.items():
        print(f"| {region} | " + " | ".join(f"{values.get(kind, 0.0):.2f}" for kind in kinds) + " |")


def run_generation(arguments: argparse.Namespace, checkpoint: Path, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the results so far."""
    configurations = arguments.configuration or [Configuration()]
    if len({configuration.name for configuration in configurations}) < len(configurations):
        raise ValueError("`--configuration` lists one twice.")
    context = multiprocessing.get_context("spawn")
    variants: dict[tuple[str, str], Path] = {}
    for configuration in configurations:
        variant = (configuration.dtype, configuration.quantization)
        if variant in variants:
            continue
        if variant == ("float32", "none"):
            variants[variant] = checkpoint
            continue
        variants[variant] = folder / "-".join(variant)
        process = context.Process(target=write_variant, args=(checkpoint, variants[variant], *variant))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"Writing the checkpoint in {variant} failed.")
    workers: list[Worker] = []
    try:
        for configuration in tqdm(configurations, desc="load"):
            path = variants[configuration.dtype, configuration.quantization]
            workers.append(
                Worker(GenerationBenchmark, str(path), configuration, arguments.full_size, arguments.threads)
            )
        yield from measure(workers, arguments.rounds, arguments.breakdown)
    finally:
        for worker in workers:
            worker.close()


def run_training(arguments: argparse.Namespace, checkpoint: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the results so far."""
    finished: list[dict[str, Any]] = []
    for seconds in arguments.seconds:
        for batch in arguments.batch:
            configurations = [
                TrainingConfiguration(source, seconds, batch, arguments.dtype) for source in ("codes", "waveforms")
            ]
            workers: list[Worker] = []
            try:
                for configuration in configurations:
                    workers.append(
                        Worker(
                            TrainingBenchmark, str(checkpoint), configuration, arguments.full_size, arguments.threads
                        )
                    )
                for results in measure(workers, arguments.rounds, with_breakdown=False):
                    yield finished + results
            finally:
                for worker in workers:
                    worker.close()
            finished += results


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="task", required=True)
    for task in ("generation", "training"):
        subparser = subparsers.add_parser(task)
        add = subparser.add_argument
        model = subparser.add_mutually_exclusive_group()
        model.add_argument(
            "--model", default=builtin_voice(), help="checkpoint that holds its codec (default: the voice in the box)"
        )
        model.add_argument("--full-size", action="store_true", help="the released architecture with random weights")
        add("--output-dir", type=Path, required=True, help="folder of the results")
        add("--rounds", type=int, default=5, help="runs of each configuration, taken in turn (default: 5)")
        add("--threads", type=int, help="threads of each process (default: torch's own choice)")
        if task == "generation":
            add("--configuration", action="append", type=Configuration.parse, metavar="NAME=VALUE,...")
            add("--breakdown", action="store_true", help="tell the time by part of the model, from the profiler")
        else:
            add("--seconds", type=float, nargs="+", default=[2.0, 5.0, 10.0], help="lengths of the utterances")
            add("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes")
            add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"`--rounds` must be at least 1, got {arguments.rounds}.")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    command = shlex.join(["python", "evaluation/run_benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "full-size"
        if arguments.full_size:
            write_full_size(checkpoint)
        else:
            checkpoint = arguments.model
        if arguments.task == "generation":
            progress = run_generation(arguments, checkpoint, folder)
        else:
            progress = run_training(arguments, checkpoint)
        for results in progress:
            write_results(arguments.output_dir, command, arguments.threads, results)
        if arguments.task == "generation":
            codec = SledConfig.from_pretrained(checkpoint).codec_config
            write_plot(results, codec.hop_length / codec.sampling_rate * 1e3, arguments.output_dir / "benchmark.png")
    print_table(results)
    for result in results:
        if result.get("breakdown_ms_per_frame"):
            print_breakdown(result)


if __name__ == "__main__":
    main()
