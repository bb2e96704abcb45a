"""The benchmark: what it accepts, what it writes; and what it rests on: compiled and int8 steps."""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, TorchAoConfig

from transformers_sled import SledForSpeechSynthesis, SledProcessor


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
sys.path.append(str(ROOT / "evaluation"))

import benchmark_serving  # noqa: E402
import run_benchmark  # noqa: E402
import simulate_serving  # noqa: E402
from run_benchmark import Configuration  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "checkpoint"
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec")
    model.save_pretrained(folder)
    SledProcessor.from_pretrained(GOLDEN / "offline").save_pretrained(folder)
    return folder


def generate(model, num_frames=12, **options):
    return model.generate(
        torch.tensor([[0, 5, 6, 7, 2]]),
        min_new_tokens=num_frames,
        max_new_tokens=num_frames,
        eos_threshold=1.0,
        generator=torch.Generator().manual_seed(0),
        return_dict_in_generate=True,
        **options,
    ).latents


def test_configuration_is_read():
    configuration = Configuration.parse("dtype=bfloat16,guidance=1,cache=static,compile=true,frames=30")
    assert configuration == Configuration("bfloat16", guidance=1.0, cache="static", compile=True, frames=30)
    assert configuration.name == "dtype=bfloat16, cache=static, compile=True, guidance=1, frames=30"


@pytest.mark.parametrize(
    "text",
    [
        "dtypes=float32",
        "dtype",
        "dtype=int3",
        "frames=many",
        "compile=true,cache=none",
        "compile=1",
        "mode=stream,batch=2",
    ],
)
def test_bad_configurations_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        Configuration.parse(text)


def test_benchmark_runs_configurations_in_turn(checkpoint, tmp_path, capsys):
    arguments = ["generation", "--model", str(checkpoint), "--output-dir", str(tmp_path)]
    arguments += ["--rounds", "2", "--threads", "1", "--breakdown"]
    arguments += ["--configuration", "frames=8,tokens=8", "--configuration", "frames=8,tokens=8,mode=stream"]
    run_benchmark.main(arguments)
    report = json.loads((tmp_path / "benchmark.json").read_text())
    offline, stream = report["results"]
    assert (tmp_path / "benchmark.png").stat().st_size > 0
    assert report["machine"]["threads"] == 1 and report["machine"]["torch"] == version("torch")
    assert report["command"].endswith("frames=8,tokens=8,mode=stream")
    for result in (offline, stream):
        low, high = result["ms_per_frame_range"]
        assert 0 < low <= result["ms_per_frame"] <= high
        assert result["peak_memory_mb"] > 0
    assert offline["real_time_factor"] == pytest.approx(offline["ms_per_frame"] * 75 / 1000)
    assert offline["seconds_to_first_audio"] == pytest.approx(offline["ms_per_frame"] * 8 / 1000)
    assert 0 < stream["seconds_to_first_audio"] < stream["ms_per_frame"] * 8 / 1000
    assert offline["bare_ms_per_frame"] > 0 and "bare_ms_per_frame" not in stream
    for result in (offline, stream):
        assert result["rounds"] == 2
        assert result["weights_ms_per_frame"] > 0 and result["weights_gb_per_second"] > 0
        low, high = result["times_weights_range"]
        assert 0 < low <= result["times_weights"] <= high
    breakdown = offline["breakdown_ms_per_frame"]
    assert set(breakdown) == {"loop", "backbone", "head", "codec"}
    assert all(value > -1e-6 for kinds in breakdown.values() for value in kinds.values())
    assert breakdown["backbone"]["matrix products"] > 0 and breakdown["backbone"]["attention"] > 0
    assert "frames=8" in capsys.readouterr().out


def test_interrupted_benchmark_keeps_its_rounds(checkpoint, tmp_path, monkeypatch):
    write_results = run_benchmark.write_results

    def write_and_interrupt(*args):
        write_results(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_benchmark, "write_results", write_and_interrupt)
    arguments = ["generation", "--model", str(checkpoint), "--output-dir", str(tmp_path), "--rounds", "3"]
    with pytest.raises(KeyboardInterrupt):
        run_benchmark.main([*arguments, "--threads", "1", "--configuration", "frames=8,tokens=8"])
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert result["rounds"] == 1 and result["ms_per_frame"] > 0


def test_streams_are_measured_and_their_times_played_through(checkpoint, tmp_path, monkeypatch, capsys):
    output, plot = tmp_path / "serving.json", tmp_path / "many_machines.png"
    command = ["benchmark_serving.py", "--model", str(checkpoint), "--num-streams", "1", "2", "--num-blocks", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    benchmark_serving.main()
    results = json.loads(output.read_text())["results"]
    assert [result["num_streams"] for result in results] == [1, 2]
    assert all(result["milliseconds_per_frame"] > 0 for result in results)
    command = ["simulate_serving.py", str(output), "--num-replicas", "3", "--max-streams", "2", "--max-queue", "4"]
    command += ["--num-texts", "400", "--loads", "0.3", "3.0", "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", command)
    simulate_serving.main()
    light, heavy = capsys.readouterr().out.splitlines()[-2:]
    assert "refused_share 0.000" in light and "refused_share 0.6" in heavy
    assert plot.stat().st_size > 0


def test_floor_counts_the_weights_of_a_frame(checkpoint):
    configuration = Configuration(frames=2, tokens=8)
    benchmark = run_benchmark.GenerationBenchmark(str(checkpoint), configuration, is_full_size=False)
    figures = benchmark.run_weights()
    model = benchmark.model
    modules = (model.model, model.generative_head, model.z_proj, model.eos_head)
    matrices = [
        parameter for module in modules for name, parameter in module.named_parameters() if parameter.ndim == 2
    ]
    num_bytes = sum(matrix.nbytes for matrix in matrices) - model.model.embed_tokens.weight.nbytes
    read = figures["weights_gb_per_second"] * 1e9 * figures["weights_ms_per_frame"] * 1e-3
    assert read == pytest.approx(num_bytes)


def test_streaming_text_needs_an_interleaved_checkpoint(checkpoint, tmp_path):
    arguments = ["generation", "--model", str(checkpoint), "--output-dir", str(tmp_path)]
    with pytest.raises(RuntimeError, match="interleaved"):
        run_benchmark.main([*arguments, "--configuration", "mode=stream-text"])


@pytest.mark.slow
def test_compiled_generation_compiles_once_for_all_lengths():
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec")
    # What is traced anew shows with any back end, and this one takes seconds in place of minutes.
    compile_config = CompileConfig(mode="default", dynamic=True, backend="aot_eager")
    options = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for num_frames in (12, 20, 9, 33):
        expected = generate(model, num_frames)
        torch.testing.assert_close(generate(model, num_frames, **options), expected, rtol=0, atol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_int8_weights_are_saved_and_loaded(checkpoint, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = SledForSpeechSynthesis.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=run_benchmark.make_quantization_config("int8")
    )
    is_int8 = {name for name, parameter in model.named_parameters() if type(parameter.data) is not torch.Tensor}
    assert "model.layers.0.self_attn.q_proj.weight" in is_int8
    assert "generative_head.res_blocks.0.mlp.0.weight" in is_int8
    assert not any("norm" in name or "_ln" in name or name.startswith(("codec", "eos_head")) for name in is_int8)
    assert model.codec.dtype == torch.float32
    assert isinstance(model.config.quantization_config, TorchAoConfig)
    assert isinstance(model.config.quantization_config.quant_type, quantization.Int8WeightOnlyConfig)
    model.save_pretrained(tmp_path)
    loaded = SledForSpeechSynthesis.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(generate(loaded), generate(model), rtol=0, atol=0)
    assert loaded.codec.dtype == torch.float32
    reference = SledForSpeechSynthesis.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        expected, actual = (one(ids).last_hidden_state.float() for one in (reference, loaded))
    assert (actual - expected).norm() / expected.norm() < 0.05
