"""
Measures how many streams a `SledStreamServer` speaks at a time, and how fast.

    python evaluation/benchmark_serving.py --dtype bfloat16 --threads 2 --output results/serving.json --plot docs/serving.png

Streams of one voice and no end are spoken until a number of frames has been measured for each number of streams. Without
`--model`, the model has the released architecture and random weights, which take as long as trained ones. The numbers of
streams take turns, so that a machine that is busy with something else for a while slows down all of them. The unit of
measurement is a block of frames in which the audio of every stream is decoded once; medians and quartiles are over blocks.

What is written: for every number of streams, the milliseconds that a frame of all streams takes, the frames a second over
all streams, and the real-time factor of a stream, which is the time that its speech takes over how long it lasts; the
processor time of a frame, which on one thread is what it takes where nothing else runs; and the largest measured number of
streams whose real-time factor is at most 1.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from transformers_sled import SledConfig, SledForSpeechSynthesis, SledProcessor
from transformers_sled.serving_sled import SledStream, SledStreamServer


TOKENIZER = Path(__file__).parents[1] / "tests" / "fixtures" / "golden" / "offline"
TEXT = "She was humiliated by his remarks, and she left."


def load(arguments: argparse.Namespace) -> tuple[SledForSpeechSynthesis, SledProcessor]:
    """The checkpoint, or a model of the released architecture with random weights."""
    torch.manual_seed(0)
    if arguments.model is None:
        model = SledForSpeechSynthesis(SledConfig()).to(getattr(torch, arguments.dtype)).eval()
        processor = SledProcessor.from_pretrained(TOKENIZER)
    else:
        model = SledForSpeechSynthesis.from_pretrained(
            arguments.model, codec=arguments.codec, dtype=getattr(torch, arguments.dtype)
        )
        processor = SledProcessor.from_pretrained(arguments.model)
        # A voice would be read with every text.
        processor.default_voice = None
    model.to(arguments.device)
    if arguments.compile:
        model.compile_generation()
    return model, processor


def start_server(
    model: SledForSpeechSynthesis, processor: SledProcessor, num_streams: int, guidance_scale: float
) -> tuple[SledStreamServer, list[SledStream]]:
    """A server whose streams all speak, and have given their first waveforms. A stream that nobody holds would end."""
    server = SledStreamServer(model, processor, max_streams=num_streams)
    streams = [
        server.add(
            TEXT,
            generator=torch.Generator().manual_seed(seed),
            guidance_scale=guidance_scale,
            eos_threshold=1.0,
            max_new_tokens=model.config.max_position_embeddings,
        )
        for seed in range(num_streams)
    ]
    started: set[SledStream] = set()
    while len(started) < num_streams:
        started.update(stream for stream, _ in server.step())
    return server, streams


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_block(server: SledStreamServer, num_frames: int) -> tuple[float, float]:
    """Seconds for a number of frames of all streams, and seconds of processor time, of all threads together."""
    synchronize(server.model.device)
    start, processor_start = time.perf_counter(), time.process_time()
    for _ in range(num_frames):
        server.step()
    synchronize(server.model.device)
    return time.perf_counter() - start, time.process_time() - processor_start


def summarize(
    blocks: list[tuple[float, float]], num_streams: int, num_frames: int, frame_seconds: float
) -> dict[str, Any]:
    """Figures of one number of streams, from what its blocks took."""
    step_seconds = [seconds / num_frames for seconds, _ in blocks]
    lower, median, upper = statistics.quantiles(step_seconds, n=4) if len(blocks) > 1 else step_seconds * 3
    return {
        "num_streams": num_streams,
        "num_blocks": len(blocks),
        "milliseconds_per_frame": 1000 * median,
        "milliseconds_per_frame_quartiles": [1000 * lower, 1000 * upper],
        "processor_milliseconds_per_frame": 1000 * statistics.median(seconds / num_frames for _, seconds in blocks),
        "frames_per_second": num_streams / median,
        "real_time_factor": median / frame_seconds,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        models = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws frames a second and real-time factor against the number of streams."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = report["results"]
    numbers = [result["num_streams"] for result in results]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(numbers, [result["frames_per_second"] for result in results], marker="o")
    left.set(xlabel="Streams at a time", ylabel="Frames a second, all streams", ylim=(0, None))
    left.axhline(1 / report["frame_seconds"], color="gray", linestyle=":", label="one stream in real time")
    left.legend()
    right.plot(numbers, [result["real_time_factor"] for result in results], marker="o")
    right.set(xlabel="Streams at a time", ylabel="Real-time factor of a stream", ylim=(0, None))
    right.axhline(1, color="gray", linestyle=":", label="real time")
    right.legend()
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.grid(alpha=0.3)
    machine = report["machine"]
    figure.suptitle(f"{report['model']}, {report['dtype']}, {machine['device']}, {machine['threads']} threads", size=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--model", help="checkpoint; the released architecture with random weights by default")
    parser.add_argument("--codec", help="codec of a checkpoint that holds none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="CPU threads; as torch chooses by default")
    parser.add_argument("--compile", action="store_true", help="compile the step ahead")
    parser.add_argument("--num-streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--num-blocks", type=int, default=3, help="blocks to measure for each number of streams")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    if min(arguments.num_streams) < 1 or arguments.num_blocks < 1:
        parser.error("`--num-streams` and `--num-blocks` must be at least 1.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, processor = load(arguments)
    codec_config = model.get_codec().config
    frame_seconds = codec_config.hop_length / codec_config.sampling_rate
    num_frames = round(0.2 / frame_seconds)
    with tqdm(total=len(arguments.num_streams) * (1 + arguments.num_blocks), unit="block") as progress:
        servers: dict[int, tuple[SledStreamServer, list[SledStream]]] = {}
        for number in sorted(set(arguments.num_streams)):
            servers[number] = start_server(model, processor, number, arguments.guidance_scale)
            progress.update()
        blocks: dict[int, list[tuple[float, float]]] = {number: [] for number in servers}
        for _ in range(arguments.num_blocks):
            for number, (server, _) in servers.items():
                blocks[number].append(measure_block(server, num_frames))
                progress.update()
            # After every round, so that nothing is lost.
            results = [summarize(blocks[number], number, num_frames, frame_seconds) for number in servers]
            report = {
                "model": "released architecture, random weights" if arguments.model is None else str(arguments.model),
                "dtype": arguments.dtype,
                "is_compiled": arguments.compile,
                "guidance_scale": arguments.guidance_scale,
                "frame_seconds": frame_seconds,
                "frames_per_block": num_frames,
                "machine": describe_machine(model.device),
                "results": results,
                "streams_in_real_time": max(
                    (result["num_streams"] for result in results if result["real_time_factor"] <= 1), default=0
                ),
            }
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot is not None:
        plot(report, arguments.plot)
    for result in results:
        print(
            f"{result['num_streams']:4d} streams: {result['milliseconds_per_frame']:8.1f} ms a frame "
            f"({result['processor_milliseconds_per_frame']:.1f} ms of processor time), "
            f"{result['frames_per_second']:8.1f} frames a second, real-time factor {result['real_time_factor']:.2f}"
        )


if __name__ == "__main__":
    main()
