"""
Measures the speech service: how soon it answers, whether listeners wait, and what it costs over its own engine.

    python evaluation/benchmark_service.py --output results/service.json

A service with the voices in the box, without a watermark, runs in a process of its own, as `sled serve` runs it, and clients in this one ask it
over the loopback: 1, 4 and 16 of them at a time, in PCM and MP3, in turns. The same texts, voices and seeds then go to a
`SledStreamServer` in this process, with no service around it, while the service is idle.

What is written: seconds from the start of the service to ready; for each number of clients and format, the median and the
95th percentile of the seconds to the first byte, the real-time factor, and the share of answers whose listener would have
waited for at most 100 ms; and for each number of clients, the time of the service in PCM over that of the engine alone, as
the median over the turns.

With `--ray`, the same service on a Ray cluster of this machine takes turns with the others, and what it adds to the first
byte and to the time of the service in PCM is written, too.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import transformers
from tqdm import tqdm

from transformers_sled import SledForSpeechSynthesis, SledProcessor, SledStreamServer, builtin_voice


TEXTS = (
    "The dog barked all night, and nobody slept.",
    "She was humiliated by his remarks, and she left.",
    "Two plus two is four, he said, and went on.",
    "What a long and winding road it was.",
)
VOICE = "bf_emma"
MAX_UNDERRUN = 0.1


@dataclass
class Answer:
    """How one text was answered, in seconds."""

    first: float
    total: float
    duration: float
    underrun: float


def get_request(number: int, audio_format: str) -> dict[str, Any]:
    text = TEXTS[number % len(TEXTS)]
    return {"model": "tts-1", "voice": VOICE, "input": text, "response_format": audio_format, "seed": number}


async def ask(client: httpx.AsyncClient, number: int, audio_format: str, seconds_a_byte: float) -> Answer:
    """Asks for a text, and notes when its bytes come."""
    start = time.perf_counter()
    first = None
    num_bytes, underrun = 0, 0.0
    async with client.stream("POST", "/v1/audio/speech", json=get_request(number, audio_format)) as response:
        response.raise_for_status()
        async for piece in response.aiter_raw():
            now = time.perf_counter()
            first = first or now
            underrun = max(underrun, now - first - num_bytes * seconds_a_byte)
            num_bytes += len(piece)
    return Answer((first or start) - start, time.perf_counter() - start, num_bytes * seconds_a_byte, underrun)


async def ask_all(url: str, num_clients: int, audio_format: str, seed: int) -> tuple[float, list[Answer]]:
    """Asks for one text by each client at the same time. Gives the seconds that all took, and their answers."""
    # MP3 comes at 64 kbit/s and PCM at 48 kB/s.
    seconds_a_byte = 1 / 8_000 if audio_format == "mp3" else 1 / 48_000
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(client.get("/health") for _ in range(num_clients)))
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(ask(client, seed + number, audio_format, seconds_a_byte) for number in range(num_clients))
        )
        return time.perf_counter() - start, answers


def speak_all(server: SledStreamServer, num_streams: int, seed: int) -> tuple[float, float]:
    """The same by the engine alone. Gives the seconds that all took, and the median of those to the first audio."""

    async def listen(number: int) -> float:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed + number)
        text = TEXTS[(seed + number) % len(TEXTS)]
        stream = await asyncio.to_thread(server.add, text, generator=generator, voice_preset=VOICE)
        first = None
        async for _ in stream:
            first = first or time.perf_counter()
        return (first or start) - start

    async def run() -> tuple[float, float]:
        start = time.perf_counter()
        firsts = await asyncio.gather(*(listen(number) for number in range(num_streams)))
        return time.perf_counter() - start, float(np.median(firsts))

    return asyncio.run(run())


class Service:
    """`sled serve` in a process of its own."""

    def __init__(self, max_streams: int, folder: str, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "transformers_sled.cli", "serve", "--port", str(port)]
        command += ["--max-streams", str(max_streams), "--voices-folder", folder, "--no-watermark", *options]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
        while True:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError("The service ended before it was ready.")
            time.sleep(0.02)
        self.seconds_to_ready = time.perf_counter() - start

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(300)


def summarize(answers: list[Answer]) -> dict[str, float]:
    firsts = [answer.first for answer in answers]
    return {
        "first_byte_p50": float(np.percentile(firsts, 50)),
        "first_byte_p95": float(np.percentile(firsts, 95)),
        "real_time_factor_p50": float(np.median([answer.total / answer.duration for answer in answers])),
        "share_without_underrun": float(np.mean([answer.underrun <= MAX_UNDERRUN for answer in answers])),
        "num_answers": len(answers),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ray", action="store_true", help="also measure the service on a Ray cluster of this machine")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if min(arguments.num_clients) < 1 or arguments.rounds < 1:
        parser.error("`--num-clients` and `--rounds` must be at least 1.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    max_streams = max(arguments.num_clients)
    checkpoint = builtin_voice()
    model, processor = SledForSpeechSynthesis.from_pretrained(checkpoint), SledProcessor.from_pretrained(checkpoint)
    answers: dict[tuple[int, str], list[Answer]] = {}
    seconds: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, SledStreamServer(model, processor, max_streams) as server:
        service = Service(max_streams, folder)
        services = {"": service}
        try:
            if arguments.ray:
                # Two models, with a thread each, and the ingress, which counts for one core, on two cores.
                services["ray "] = Service(max_streams, folder, "--ray", "--num-cpus", "0.5")
            # What is only done once is not what is measured.
            for one in services.values():
                asyncio.run(ask_all(one.url, 1, "mp3", 0))
            speak_all(server, 1, 0)
            turns = [
                (num_clients, 1000 * number)
                for number in range(arguments.rounds)
                for num_clients in arguments.num_clients
            ]
            with tqdm(total=len(turns) * (2 * len(services) + 1), unit="turn") as progress:
                for num_clients, seed in turns:
                    for audio_format in ("pcm", "mp3"):
                        for name, one in services.items():
                            taken, given = asyncio.run(ask_all(one.url, num_clients, audio_format, seed))
                            answers.setdefault((num_clients, name + audio_format), []).extend(given)
                            seconds.setdefault((num_clients, name + audio_format), []).append(taken)
                            progress.update()
                    alone, _ = speak_all(server, num_clients, seed)
                    seconds.setdefault((num_clients, "engine"), []).append(alone)
                    progress.update()
        finally:
            for one in services.values():
                one.stop()
    results = [
        {"num_clients": num_clients, "format": audio_format, **summarize(given)}
        for (num_clients, audio_format), given in answers.items()
    ]

    def compare(num_clients: int, name: str, other: str) -> float:
        return float(np.median(np.divide(seconds[num_clients, name], seconds[num_clients, other])))

    overhead = {num_clients: compare(num_clients, "pcm", "engine") - 1 for num_clients in arguments.num_clients}
    ray_overhead = {
        num_clients: {
            "first_byte_seconds": float(
                np.median([answer.first for answer in answers[num_clients, "ray pcm"]])
                - np.median([answer.first for answer in answers[num_clients, "pcm"]])
            ),
            "throughput": compare(num_clients, "pcm", "ray pcm"),
        }
        for num_clients in (arguments.num_clients if arguments.ray else ())
    }
    report = {
        "seconds_to_ready": service.seconds_to_ready,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "num_cores": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
        "overhead": overhead,
        "ray_overhead": ray_overhead,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"ready after {service.seconds_to_ready:.1f} s")
    for result in results:
        print(
            f"{result['num_clients']:3d} clients, {result['format']}: first byte after {result['first_byte_p50']:.3f} s "
            f"(95 %: {result['first_byte_p95']:.3f} s), real-time factor {result['real_time_factor_p50']:.2f}, "
            f"{100 * result['share_without_underrun']:.0f} % without an underrun"
        )
    for num_clients, share in overhead.items():
        print(f"{num_clients:3d} clients: {100 * share:+.1f} % over the engine alone")
    for num_clients, added in ray_overhead.items():
        print(
            f"{num_clients:3d} clients: Ray adds {1000 * added['first_byte_seconds']:.0f} ms to the first byte, and leaves "
            f"{100 * added['throughput']:.0f} % of the throughput"
        )


if __name__ == "__main__":
    main()
