"""
Simulates many replicas of the service under load, with the times that frames take on one machine.

    python evaluation/benchmark_serving.py --model CHECKPOINT --threads 1 --output results/serving.json
    python evaluation/simulate_serving.py results/serving.json --plot docs/many_machines.png

Texts arrive at random, at a constant rate. As with Ray Serve, two replicas are drawn for a text, and the one that speaks
less takes it if it has a place; if neither has one, others are asked; if none has, the text waits, until as many wait as
may. A replica makes a frame of all its streams in one step, which takes what the first command has measured for that many
streams. A load of 1 is the rate at which all places of all replicas are always taken.

What is written, for each load: the median and the 95th percentile of the seconds to the first audio, the share of texts
refused, the share of streams that are made at least as fast as they are played, and how many places are taken.
"""

import argparse
import heapq
import json
import math
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm


@dataclass
class Stream:
    """A text on its way: when it came, how many frames it takes, and when its audio began."""

    arrival: float
    num_frames: int
    first_audio: float = math.nan


@dataclass
class Replica:
    """A machine, and its streams by the steps in which they have their first audio, and their last frame."""

    number: int
    step: int = 0
    num_streams: int = 0
    is_stepping: bool = False
    events: list[tuple[int, int, bool, Stream]] = field(default_factory=list)


class Cluster:
    """Replicas, and the texts that wait for them."""

    def __init__(self, step_seconds: np.ndarray, arguments: argparse.Namespace) -> None:
        self.step_seconds = step_seconds
        self.frame_seconds = arguments.frame_seconds
        self.max_streams, self.max_queue = arguments.max_streams, arguments.max_queue
        self.num_first_frames = arguments.num_first_frames
        self.random = random.Random(0)
        self.replicas = [Replica(number) for number in range(arguments.num_replicas)]
        self.waiting: deque[Stream] = deque()
        # Ends of steps: time, replica.
        self.steps: list[tuple[float, int]] = []
        self.num_events = self.num_refused = 0
        self.first_audio: list[float] = []
        self.has_kept_up: list[bool] = []
        self.taken: list[int] = []

    def arrive(self, stream: Stream) -> None:
        self.taken.append(sum(replica.num_streams for replica in self.replicas))
        drawn = self.random.sample(self.replicas, min(2, len(self.replicas)))
        free = min(drawn, key=lambda replica: replica.num_streams)
        if free.num_streams == self.max_streams:
            free = min(self.replicas, key=lambda replica: replica.num_streams)
        if free.num_streams < self.max_streams:
            self.join(free, stream)
            if not free.is_stepping:
                self.begin_step(free, stream.arrival)
        elif len(self.waiting) < self.max_queue:
            self.waiting.append(stream)
        else:
            self.num_refused += 1

    def join(self, replica: Replica, stream: Stream) -> None:
        replica.num_streams += 1
        # A step that is being taken began without it.
        start = replica.step + replica.is_stepping
        for num_frames, is_end in ((min(self.num_first_frames, stream.num_frames), False), (stream.num_frames, True)):
            self.num_events += 1
            heapq.heappush(replica.events, (start + num_frames, self.num_events, is_end, stream))

    def begin_step(self, replica: Replica, now: float) -> None:
        replica.is_stepping = replica.num_streams > 0
        if replica.is_stepping:
            heapq.heappush(self.steps, (now + self.step_seconds[replica.num_streams], replica.number))

    def end_step(self) -> None:
        now, number = heapq.heappop(self.steps)
        replica = self.replicas[number]
        replica.step += 1
        replica.is_stepping = False
        while replica.events and replica.events[0][0] <= replica.step:
            _, _, is_end, stream = heapq.heappop(replica.events)
            if is_end:
                self.has_kept_up.append(now - stream.first_audio <= stream.num_frames * self.frame_seconds)
                replica.num_streams -= 1
            else:
                stream.first_audio = now
                self.first_audio.append(now - stream.arrival)
        while self.waiting and replica.num_streams < self.max_streams:
            self.join(replica, self.waiting.popleft())
        self.begin_step(replica, now)

    def run(self, rate: float, num_texts: int, mean_seconds: float) -> dict[str, float]:
        """Lets texts come at a rate, and gives what came of all but the first tenth."""
        now, mean_frames = 0.0, mean_seconds / self.frame_seconds
        for number in range(num_texts):
            if number == num_texts // 10:
                self.num_refused, self.first_audio, self.has_kept_up, self.taken = 0, [], [], []
            now += self.random.expovariate(rate)
            while self.steps and self.steps[0][0] <= now:
                self.end_step()
            # Sentences differ in length by about half of it.
            num_frames = self.random.lognormvariate(math.log(mean_frames) - 0.125, 0.5)
            self.arrive(Stream(now, max(1, round(num_frames))))
        return {
            "first_audio_p50": float(np.percentile(self.first_audio, 50)),
            "first_audio_p95": float(np.percentile(self.first_audio, 95)),
            "refused_share": self.num_refused / (num_texts - num_texts // 10),
            "kept_up_share": float(np.mean(self.has_kept_up)),
            "taken_share": float(np.mean(self.taken)) / len(self.replicas) / self.max_streams,
        }


def read_step_seconds(report: dict[str, Any], max_streams: int) -> np.ndarray:
    """Seconds of a step by number of streams, from 0 on: on a line between the numbers that were measured."""
    numbers = [result["num_streams"] for result in report["results"]]
    if max_streams > max(numbers):
        raise ValueError(f"`--max-streams` must be at most {max(numbers)}, which is what was measured.")
    seconds = [result["processor_milliseconds_per_frame"] / 1000 for result in report["results"]]
    return np.interp(np.arange(max_streams + 1), numbers, seconds)


def plot(results: list[dict[str, float]], title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    loads = [result["load"] for result in results]
    for axes, name, label, factor in (
        (left, "first_audio_p95", "95th percentile", 1),
        (left, "first_audio_p50", "median", 1),
        (right, "refused_share", "refused", 100),
        (right, "kept_up_share", "made in real time", 100),
    ):
        axes.plot(loads, [factor * result[name] for result in results], marker="o", label=label)
    left.set(xlabel="Load", ylabel="First audio after, s", ylim=(0, None))
    right.set(xlabel="Load", ylabel="% of texts", ylim=(0, 105))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, size=9)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="what benchmark_serving.py has written")
    for name, default, text in (
        ("num-replicas", 100, "replicas"),
        ("max-streams", 8, "places of a replica"),
        ("max-queue", 32, "texts that may wait, at all replicas together"),
        ("num-first-frames", 4, "steps before the first audio: portions of the voice prompt, and a frame"),
        ("mean-seconds", 5, "duration of the speech of a text"),
        ("num-texts", 20_000, "texts for each load"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.3])
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = json.loads(arguments.benchmark.read_text())
    arguments.frame_seconds = report["frame_seconds"]
    step_seconds = read_step_seconds(report, arguments.max_streams)
    mean_frames = arguments.mean_seconds / arguments.frame_seconds
    capacity = arguments.num_replicas * arguments.max_streams / (mean_frames * step_seconds[-1])
    results = []
    for load in tqdm(arguments.loads, unit="load"):
        cluster = Cluster(step_seconds, arguments)
        results.append({"load": load, **cluster.run(load * capacity, arguments.num_texts, arguments.mean_seconds)})
    title = f"{arguments.num_replicas} replicas, {arguments.max_streams} places each, {capacity:.1f} texts/s at load 1"
    print(title)
    print("\n".join(", ".join(f"{name} {value:.3f}" for name, value in result.items()) for result in results))
    if arguments.plot is not None:
        plot(results, f"{title} ({report['machine']['device']}, simulated)", arguments.plot)


if __name__ == "__main__":
    main()
