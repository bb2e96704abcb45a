"""The engine: rows that start, go on and end as each would alone, in every kind of pass; limits; processes in step."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from transformers_sled import SledForSpeechSynthesis, engine_sled
from transformers_sled.engine_sled import SledEngine, SledFrame, SledNoise, SledRow, get_frame_budget
from transformers_sled.text_sled import SledTextPart


GOLDEN = Path(__file__).parent / "fixtures" / "golden"


@functools.cache
def load(side: str) -> SledForSpeechSynthesis:
    return SledForSpeechSynthesis.from_pretrained(GOLDEN / side, codec=GOLDEN / "codec")


def make_row(
    model, length: int, seed: int, num_prompt_frames: int = 0, guidance_scale: float = 2.0, **kwargs
) -> SledRow:
    generator = torch.Generator().manual_seed(seed)
    ids = [0, *torch.randint(5, 700, (length - 2,), generator=generator).tolist(), 2]
    prompt = (
        torch.randn(num_prompt_frames, model.config.latent_dim, generator=generator) if num_prompt_frames else None
    )
    options = {"guidance_scale": guidance_scale, "eos_threshold": 1.0, "max_length": 2048}
    config = GenerationConfig(guidance_scale=guidance_scale, max_length=2048)
    config.eos_threshold = kwargs.pop("eos_threshold", options["eos_threshold"])
    noise = SledNoise(generator, 1, model.config.noise_dim, 1.0, model.device)
    return SledRow(SledTextPart(ids), config, noise, prompt=prompt, **{"max_frames": 12, **kwargs})


def make_rows(model) -> list[SledRow]:
    """Texts and prompts of many lengths, with and without guidance."""
    return [
        make_row(model, 7, 1),
        make_row(model, 23, 2, num_prompt_frames=14, max_frames=20),
        make_row(model, 12, 3, guidance_scale=1.0, max_frames=5),
        make_row(model, 2, 4, num_prompt_frames=3, guidance_scale=0.5),
    ]


def run(engine: SledEngine, rows: list[SledRow], every: int = 0) -> list[torch.Tensor]:
    """Steps until all have ended. With `every`, a row joins after so many steps of the one before."""
    waiting, frames = list(rows), {row: [] for row in rows}
    steps = 0
    while waiting or engine.rows:
        if waiting and (every == 0 or steps % every == 0):
            engine.join(waiting.pop(0))
            if every == 0:
                continue
        for row, frame in engine.step():
            assert isinstance(frame, SledFrame)
            frames[row].append(frame.latents.clone())
        steps += 1
    return [torch.stack(frames[row]) for row in rows]


def get_expected(model) -> list[torch.Tensor]:
    """Every row alone, read again from the start at every step."""
    return [run(SledEngine(model, use_cache=False), [row])[0] for row in make_rows(model)]


ENGINES = {
    "growing": {},
    "fixed": {"num_positions": 100},
    "without a cache": {"use_cache": False},
    "in portions": {"prefill_size": 5},
}


@pytest.mark.parametrize("side", ["offline", "streaming"])
@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_rows_get_what_each_gets_alone(side, every, options):
    model = load(side)
    for actual, expected in zip(
        run(SledEngine(model, **options), make_rows(model), every), get_expected(model), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("limit", [0, 40, 512])
def test_starting_in_one_pass_or_several_is_the_same(limit, monkeypatch):
    model = load("offline")
    expected = get_expected(model)
    monkeypatch.setattr(engine_sled, "MAX_STARTING_POSITIONS", limit)
    num_passes = 0

    def count(*args):
        nonlocal num_passes
        num_passes += 1

    handle = model.model.register_forward_pre_hook(count)
    actual = run(SledEngine(model), make_rows(model))
    handle.remove()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    # One for each frame of the longest row, and for starting none or several more.
    assert num_passes == 20 if limit == 512 else num_passes > 20


def test_both_branches_are_read_at_their_own_length():
    model = load("offline")
    lengths = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    run(SledEngine(model), [make_row(model, 40, 0, max_frames=3)])
    handle.remove()
    assert lengths == [41, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["offline", "streaming"])
def test_compiled_rows_get_what_eager_ones_get(side):
    model = load(side)
    # What is traced anew shows with any back end, and this one takes seconds in place of minutes.
    compile_config = CompileConfig(mode="default", backend="aot_eager")
    torch._dynamo.reset()
    engine = SledEngine(model, num_positions=200, compile_config=compile_config)
    for actual, expected in zip(run(engine, make_rows(model), every=2), get_expected(model), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_ended_rows_leave_no_gap():
    model = load("offline")
    engine = SledEngine(model)
    rows = make_rows(model)
    for row in rows:
        engine.join(row)
    engine.step()
    engine.leave(rows[0])
    engine.leave(rows[2])
    places = sorted(branch.row for row in engine.rows for branch in row.branches)
    assert places == list(range(4)) and rows[0].branches == []
    # Rows that end do so once, and are not counted on.
    frames = dict.fromkeys(engine.rows, 1)
    while engine.rows:
        for row, _ in engine.step():
            frames[row] += 1
    assert frames == {rows[1]: 20, rows[3]: 12}
    assert [row.num_frames for row in (rows[1], rows[3])] == [20, 12]


@pytest.mark.parametrize("options", [{}, {"num_positions": 200}])
def test_a_paused_row_goes_on_where_it_was(options):
    model = load("streaming")
    expected = get_expected(model)
    engine = SledEngine(model, **options)
    rows = make_rows(model)
    for row in rows:
        engine.join(row)
    frames = {row: [] for row in rows}
    steps = 0
    while engine.rows:
        rows[1].is_paused = steps % 4 < 3 and len(engine.rows) > 1
        for row, frame in engine.step():
            frames[row].append(frame.latents.clone())
        steps += 1
    assert steps > 20
    for row, one in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.stack(frames[row]), one, atol=1e-4, rtol=0)


def test_end_of_speech_is_held_off_and_cut_off():
    model = load("offline")
    # An end at every frame, of which the first four are not accepted.
    row = make_row(model, 6, 0, eos_threshold=0.0, min_frames=4)
    assert len(run(SledEngine(model), [row])[0]) == 5 and not row.is_cut_off
    # A budget follows from the text, unless more is held on to.
    budget = get_frame_budget(model, 6)
    row = make_row(model, 6, 0, max_frames=None)
    assert len(run(SledEngine(model), [row])[0]) == budget and row.is_cut_off
    # What a voice prompt says is not said again.
    row = make_row(model, 9, 0, max_frames=None, num_prompt_tokens=3)
    assert len(run(SledEngine(model), [row])[0]) == budget
    row = make_row(model, 6, 0, max_frames=None, min_frames=budget + 7)
    assert len(run(SledEngine(model), [row])[0]) == budget + 7
    # Positions end it in any case.
    row = make_row(model, 6, 0, num_prompt_frames=2, max_frames=None, min_frames=budget + 7)
    row.config.max_length = 30
    assert len(run(SledEngine(model), [row])[0]) == 22 and row.is_cut_off


def test_noise_of_a_batch_does_not_depend_on_when_rows_end():
    model = load("offline")

    def speak(lengths: list[int]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        noise = SledNoise(generator, len(lengths), model.config.noise_dim, 1.0, model.device)
        rows = [make_row(model, 6, 7, max_frames=length) for length in lengths]
        for index, row in enumerate(rows):
            row.noise, row.noise_index = noise, index
        return run(SledEngine(model), rows)

    long, short = speak([9, 9, 9]), speak([2, 9, 4])
    for one, other in zip(short, long, strict=True):
        torch.testing.assert_close(one, other[: len(one)], atol=1e-4, rtol=0)
    assert not torch.equal(long[0], long[1])


SYNCED = """
import sys
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers_sled import SledForSpeechSynthesis, SledProcessor

dist.init_process_group("gloo")
golden = sys.argv[1]
model = SledForSpeechSynthesis.from_pretrained(golden + "/offline", codec=golden + "/codec")
processor = SledProcessor.from_pretrained(golden + "/offline")
options = {"do_sample": False, "eos_threshold": 1.0}
texts = ["No.", "She opened the window and looked at the garden."]
lengths = [3, 11]
expected = [model.generate(**processor(t), max_new_tokens=n, **options)[0] for t, n in zip(texts, lengths)]
for part in (*model.model.layers, model.generative_head, model.eos_head, model.z_proj, model.z_proj_ln):
    fully_shard(part, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
rank = dist.get_rank()
audio = model.generate(**processor(texts[rank]), max_new_tokens=lengths[rank], synced_gpus=True, **options)[0]
assert (audio - expected[rank]).abs().max() < 1e-4
"""


@pytest.mark.slow
def test_processes_that_share_weights_end_together(tmp_path):
    script = tmp_path / "synced.py"
    script.write_text(SYNCED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(GOLDEN)]
    subprocess.run(command, check=True, timeout=240)
