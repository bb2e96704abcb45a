"""Batch jobs on a Ray cluster on this machine, left alone and killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pyarrow.dataset
import pytest

from ray_cluster import OBJECT_STORE_BYTES, run_cluster, save_tiny_checkpoints


pytest.importorskip("ray.data", reason="needs the extra `ray`")

from transformers_sled.batch.job import BatchSettings, run_batch


pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TEXTS = ["No.", "The dog barked.", "She left.", "Two plus two is four."]
BAD = [{"text": ""}, {"text": "x" * 2_000}, {"text": "No.", "voice": "nobody"}, {"text": 5}]


def write_texts(path: Path, num_rows: int) -> None:
    """One row in 50 is bad."""
    rows = [{"id": f"row-{number:05d}", "text": TEXTS[number % 4]} for number in range(num_rows)]
    for index, number in enumerate(range(10, num_rows, 50)):
        rows[number].update(BAD[index % 4])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(output: Path) -> list[dict]:
    """All rows, in the order of their ids."""
    files = [str(file) for file in (output / "data").glob("*.parquet")]
    return sorted(pyarrow.dataset.dataset(files).to_table().to_pylist(), key=lambda row: row["id"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny_checkpoints(tmp_path_factory.mktemp("checkpoints"))[0]


def test_a_job(checkpoint, tmp_path):
    write_texts(tmp_path / "texts.jsonl", 70)
    settings = BatchSettings(
        model=checkpoint,
        max_streams=4,
        max_characters=1_000,
        options={"max_duration": 0.1},
        num_actors=2,
        num_cpus=0.5,
        rows_per_file=16,
    )
    source, output = str(tmp_path / "texts.jsonl"), tmp_path / "spoken"
    with run_cluster():
        report = run_batch(source, output, settings)
        assert (report.rows, report.spoken_rows, report.num_errors) == (70, 70, 2)
        assert report.audio_seconds == pytest.approx(68 * 8 / 75) and report.seconds > 0
        assert json.loads((output / "report.json").read_text())["rows"] == 70
        rows = read_rows(output)
        assert len({row["id"] for row in rows}) == 70
        # What is done stays, and is not done again.
        assert run_batch(source, output, settings).spoken_rows == 0
        assert read_rows(output) == rows
        with pytest.raises(ValueError, match="another job: options differ"):
            run_batch(source, output, BatchSettings(model=checkpoint, max_streams=4, max_characters=1_000))
        dataset = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
        assert isinstance(dataset.features["audio"], datasets.Audio)
        heard = dataset.cast_column("audio", datasets.Audio(decode=False)).filter(lambda row: row["error"] is None)
        assert len(heard) == 68 and heard[0]["audio"]["bytes"].startswith(b"fLaC")
        # As if it had been killed in the middle of a file.
        file = next((output / "data").glob("*.parquet"))
        file.write_bytes(file.read_bytes()[:1_000])
        [done] = (output / ".batch" / "checkpoint").glob(f"{file.stem.rpartition('-')[0]}*")
        done.rename(done.with_suffix(".pending.parquet"))
        assert 0 < run_batch(source, output, settings).spoken_rows < 70
        assert read_rows(output) == rows
        next((output / "data").glob("*.parquet")).unlink()
        with pytest.raises(ValueError, match="rows in place of 70"):
            run_batch(source, output, settings)


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again(checkpoint, tmp_path):
    """The driver, an actor and a machine are killed at random; what comes out is what an undisturbed job gives."""
    from ray.cluster_utils import Cluster

    num_rows = int(os.environ.get("SLED_NUM_ROWS", "2000"))
    write_texts(tmp_path / "texts.jsonl", num_rows)
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    node = {"num_cpus": 4, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    del node["include_dashboard"]
    worker = cluster.add_node(**node)
    chance = random.Random(0)

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "transformers_sled.cli", "batch", str(tmp_path / "texts.jsonl")]
        command += ["--output", str(output), "--model", checkpoint, "--max-streams", "8", "--max-duration", "0.1"]
        command += ["--max-characters", "1000", "--num-actors", "2", "--num-cpus", "2", "--rows-per-file", "32"]
        return subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address})

    def wait_for_progress(output: Path, process: subprocess.Popen) -> None:
        """Until some more files are there, at least one."""
        before = len(list((output / "data").glob("*.parquet")))
        more = chance.randint(1, 4)
        while len(list((output / "data").glob("*.parquet"))) < before + more:
            assert process.poll() is None, "It has ended before it was killed."
            time.sleep(0.2)
        time.sleep(chance.random())

    try:
        undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
        assert start(undisturbed).wait() == 0
        process = start(disturbed)
        wait_for_progress(disturbed, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start(disturbed)
        wait_for_progress(disturbed, process)
        actors = [
            one
            for one in psutil.process_iter(["name", "cmdline"])
            if "MapWorker" in " ".join(one.info["cmdline"] or [])
        ]
        chance.choice(actors).kill()
        wait_for_progress(disturbed, process)
        cluster.remove_node(worker, allow_graceful=False)
        assert process.wait() == 0
        # And once more, where there is nothing left to do.
        assert start(disturbed).wait() == 0
    finally:
        cluster.shutdown()
    expected, rows = read_rows(undisturbed), read_rows(disturbed)
    assert len(rows) == num_rows and len({row["id"] for row in rows}) == num_rows
    assert rows == expected
    errors = [row["error"] for row in rows if row["error"] is not None]
    assert len(errors) == len(range(10, num_rows, 50))
