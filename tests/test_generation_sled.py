"""Generation from outside: golden cases, streams, batches, ends and limits, long text, abandonment, bad input."""

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import EncodecModel, StoppingCriteria, StoppingCriteriaList

from transformers_sled import (
    SledAudioStreamer,
    SledConfig,
    SledForSpeechSynthesis,
    SledProcessor,
    generation_sled,
    text_sled,
)
from transformers_sled.engine_sled import SledEngine, SledNoise, SledRow
from transformers_sled.generation_sled import SledKnownParts, SledUtterance
from transformers_sled.text_sled import SledTextPart, encode_text


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = json.loads((GOLDEN / "expected.json").read_text())["cases"]
SIDES = ["offline", "streaming"]
TEXT = "She was humiliated by his remarks, and she left the room before the dog barked."
# The speech goes on until something else than the model's own end stops it.
ENDLESS = {"eos_threshold": 1.0}


@functools.cache
def load(side: str, num_positions: int = 2048) -> tuple[SledForSpeechSynthesis, SledProcessor]:
    """A golden model and its processor, also with fewer positions, which makes short text a long one."""
    config = SledConfig.from_pretrained(GOLDEN / side, max_position_embeddings=num_positions)
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / side, config=config, codec=GOLDEN / "codec")
    processor = SledProcessor.from_pretrained(GOLDEN / side)
    processor.max_position_embeddings = num_positions
    # What is laid out at first use stays with the model: nothing that a stream leaves behind.
    for _ in model.stream("No.", processor=processor, max_new_tokens=2):
        pass
    return model, processor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def join(waveforms) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *waveforms])


def collect(stream) -> torch.Tensor:
    """All of an asynchronous stream."""

    async def run():
        return join([waveform async for waveform in stream])

    return asyncio.run(run())


async def as_async(pieces):
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def get_latents(num_frames: int, offset: int = 0) -> torch.Tensor:
    return EXPECTED["codec.latents"][:1, offset : offset + num_frames]


class Watched:
    """A part of a text, and how many positions were read for each of its frames."""

    def __init__(self, row: SledRow):
        self.row = row
        self.lengths: list[int] = []

    @property
    def ids(self) -> list[int]:
        """With the part that it is primed with, whose end and this one's start are left out."""
        return self.row.primed_ids + self.row.part.ids[1 if self.row.primed_ids else 0 :]


@contextlib.contextmanager
def watch(model, last_frame: int | None = None):
    """Records the parts of a text. With `last_frame`, the model ends every part at this frame and none before."""
    parts: list[Watched] = []
    num_read = 0
    join = SledEngine.join

    def record_row(engine, row):
        parts.append(Watched(row))
        join(engine, row)

    def before_decoder(module, args, kwargs):
        nonlocal num_read
        num_read += kwargs["inputs_embeds"].shape[1]

    def after_end_of_speech(module, args, output):
        nonlocal num_read
        parts[-1].lengths.append(num_read)
        num_read = 0
        if last_frame is not None:
            output.fill_(20.0 if len(parts[-1].lengths) == last_frame else -20.0)
        return output

    hooks = [
        model.model.register_forward_pre_hook(before_decoder, with_kwargs=True),
        model.eos_head.register_forward_hook(after_end_of_speech),
    ]
    SledEngine.join = record_row
    try:
        yield parts
    finally:
        SledEngine.join = join
        for hook in hooks:
            hook.remove()


# Golden cases


def get_golden_inputs(name: str) -> dict:
    case = CASES[name]
    ids = EXPECTED[f"{name}.input_ids"]
    inputs = {"input_ids": ids}
    if f"{name}.attention_mask" in EXPECTED:
        inputs["attention_mask"] = EXPECTED[f"{name}.attention_mask"][:, : ids.shape[1]]
    if case.get("voice_frames"):
        inputs["prompt_latents"] = get_latents(case["voice_frames"])
    limit = case.get("max_new_frames") or case["max_length"]
    return inputs | {"guidance_scale": case["cfg"], "max_new_tokens": limit}


@pytest.mark.parametrize("name", CASES)
def test_golden_generation(name):
    model, processor = load(name.split(".")[0])
    case = CASES[name]
    torch.manual_seed(case["seed"])
    output = model.generate(**get_golden_inputs(name), return_dict_in_generate=True)
    num_prompt_frames = case.get("voice_frames") or 0
    latents = EXPECTED[f"{name}.latents"][:, num_prompt_frames:]
    hop_length = processor.hop_length
    waveforms = EXPECTED[f"{name}.waveform"][:, 0, num_prompt_frames * hop_length :]
    assert output.latents_mask.sum(dim=1).tolist() == case["frames_before_eos"]
    for row, num_frames in enumerate(case["frames_before_eos"]):
        assert_same(output.latents[row, : num_frames + 1], latents[row, : num_frames + 1])
        assert len(output.audio[row]) == num_frames * hop_length
        assert_same(output.audio[row], waveforms[row, : num_frames * hop_length])


@pytest.mark.parametrize("name", [name for name in CASES if "batch" not in name])
def test_golden_streams(name):
    side = name.split(".")[0]
    model, processor = load(side)
    case = CASES[name]
    inputs = get_golden_inputs(name)
    num_prompt_frames = case.get("voice_frames") or 0
    kwargs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    num_samples = case["frames_before_eos"][0] * processor.hop_length
    expected = EXPECTED[f"{name}.waveform"][0, 0, num_prompt_frames * processor.hop_length :][:num_samples]
    # Every other character is a piece, which cuts words and the spaces between them.
    for text in (case["texts"][0], cut(case["texts"][0], 2)):
        torch.manual_seed(case["seed"])
        assert_same(join(model.stream(text, processor=processor, **kwargs)), expected)


# Streamed equals whole


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("voice", ["none", "audio", "latents", "continuation"])
def test_every_form_of_a_stream_is_the_whole(side, guidance_scale, voice):
    model, processor = load(side)
    kwargs = {
        "none": {},
        "audio": {"prompt_text": "And this.", "prompt_audio": torch.randn(5_000, generator=seeded(1)) * 0.1}
        | {"sampling_rate": 16_000},
        "latents": {"prompt_text": "Two, plus two.", "prompt_latents": get_latents(21)},
        "continuation": {"prompt_latents": get_latents(13)},
    }[voice]
    options = {"max_new_tokens": 26, "guidance_scale": guidance_scale} | ENDLESS
    inputs = processor(TEXT, **kwargs)
    output = model.generate(**inputs, generator=seeded(3), return_dict_in_generate=True, **options)
    (whole,) = output.audio
    assert len(whole) == 26 * processor.hop_length
    # Decoded in one go behind the prompt.
    prompt = torch.zeros(1, 0, 32)
    if "prompt_values" in inputs:
        prompt = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"]).prompt_latents
    elif "prompt_latents" in inputs:
        prompt = inputs["prompt_latents"]
    decoded = model.decode_latents(torch.cat([prompt, output.latents], dim=1))[0]
    assert_same(whole, decoded[prompt.shape[1] * processor.hop_length :])

    stream = functools.partial(model.stream, processor=processor, **kwargs, **options)
    assert_same(join(stream(TEXT, generator=seeded(3))), whole)
    assert_same(join(stream(iter(cut(TEXT, 3)), generator=seeded(3))), whole)
    astream = functools.partial(model.astream, processor=processor, **kwargs, **options)
    assert_same(collect(astream(as_async(cut(TEXT, 5)), generator=seeded(3))), whole)
    if voice == "none":
        assert_same(collect(astream(TEXT, generator=seeded(3))), whole)
        assert_same(collect(astream(iter(cut(TEXT, 4)), generator=seeded(3))), whole)


@pytest.mark.parametrize("chunk_duration", [0.001, 0.1, 0.2, 5.0])
def test_chunk_duration_cuts_the_same_audio(chunk_duration):
    model, processor = load("streaming")
    options = {"max_new_tokens": 25, "guidance_scale": 1.0} | ENDLESS
    (whole,) = model.generate(**processor(TEXT), generator=seeded(3), **options)
    stream = model.stream(TEXT, processor=processor, chunk_duration=chunk_duration, generator=seeded(3), **options)
    waveforms = list(stream)
    assert_same(join(waveforms), whole)
    num_frames = [len(waveform) / processor.hop_length for waveform in waveforms]
    chunk_frames = max(1, round(chunk_duration * 75))
    assert num_frames[0] == 7
    for size, before in itertools.pairwise(reversed(num_frames[:-1])):
        assert size == min(2 * before, chunk_frames)


@settings(deadline=None, max_examples=12)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=20), text=st.sampled_from(["A  naïve café’s — 日本語! He's", TEXT[:60]])
)
def test_text_cut_anywhere_gives_the_same_speech(cuts, text):
    model, processor = load("streaming")
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    options = {"guidance_scale": 1.0, "min_new_tokens": 1, "max_new_tokens": 40} | ENDLESS
    with watch(model) as whole_parts:
        (whole,) = model.generate(**processor(text), generator=seeded(5), **options)
    with watch(model) as parts:
        assert_same(join(model.stream(pieces, processor=processor, generator=seeded(5), **options)), whole)
    # The same number of tokens at every step.
    assert parts[0].lengths == whole_parts[0].lengths


def test_text_that_fits_is_one_part_however_it_arrives():
    model, processor = load("streaming", 512)
    text = "A dog barked. It was late. She left him there. He did not mind that."
    assert processor.split_text(text) == [text]
    with watch(model, last_frame=60) as whole_parts:
        (whole,) = model.generate(**processor(text), generator=seeded(2), guidance_scale=1.0)
    with watch(model, last_frame=60) as parts:
        speech = join(model.stream(cut(text, 1), processor=processor, generator=seeded(2), guidance_scale=1.0))
    assert len(parts) == 1 and parts[0].lengths == whole_parts[0].lengths
    assert_same(speech, whole)


@pytest.mark.parametrize("num_prompt_frames", [0, 20])
def test_first_waveform_comes_early(num_prompt_frames):
    model, processor = load("streaming")
    text_chunk_size = model.config.text_chunk_size
    num_tokens = (num_prompt_frames // model.config.speech_chunk_size + 1) * text_chunk_size
    voice = {"prompt_text": "Hm.", "prompt_latents": get_latents(num_prompt_frames)} if num_prompt_frames else {}
    pulled = []

    def source():
        for piece in TEXT:
            pulled.append(piece)
            yield piece

    stream = model.stream(source(), processor=processor, generator=seeded(0), **voice, **ENDLESS)
    assert pulled == []
    with watch(model) as parts:
        next(stream)
        assert len(parts[0].lengths) <= 8
    stream.close()
    # Without the last word there would not have been enough tokens.
    text = ("Hm. " if voice else "") + "".join(pulled)
    assert len(encode_text(processor.tokenizer, text.rstrip().rpartition(" ")[0])) - 1 < num_tokens
    assert len(pulled) < len(TEXT)


# Streamer of `generate`


def start_generation(model, **kwargs) -> tuple[threading.Thread, list]:
    results: list = []

    def run():
        try:
            results.append(model.generate(**kwargs))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


@pytest.mark.parametrize("side", SIDES)
def test_streamer(side):
    model, processor = load(side)
    kwargs = {**processor(TEXT), "max_new_tokens": 24, "prompt_latents": get_latents(10)} | ENDLESS
    streamer = SledAudioStreamer(model, timeout=60)
    thread, results = start_generation(model, streamer=streamer, generator=seeded(4), **kwargs)
    speech = join(streamer)
    thread.join()
    assert_same(speech, results[0][0])
    assert_same(speech, model.generate(generator=seeded(4), **kwargs)[0])


def test_streamer_delivers_errors():
    model, processor = load("offline")

    class Failing(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 10:
                raise RuntimeError("out of memory")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    streamer = SledAudioStreamer(model, timeout=60)
    thread, results = start_generation(
        model, **processor(TEXT), streamer=streamer, stopping_criteria=StoppingCriteriaList([Failing()]), **ENDLESS
    )
    waveforms = iter(streamer)
    next(waveforms)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(waveforms)
    thread.join()
    assert isinstance(results[0], RuntimeError)

    streamer = SledAudioStreamer(model, timeout=60)
    with pytest.raises(ValueError, match="guidance_scale"):
        model.generate(**processor(TEXT), streamer=streamer, guidance_scale=-1.0)
    with pytest.raises(ValueError, match="guidance_scale"):
        next(iter(streamer))


def test_consumer_that_leaves_stops_generation():
    model, processor = load("offline")
    streamer = SledAudioStreamer(model, timeout=60)
    # Would take minutes.
    thread, results = start_generation(model, **processor(TEXT), streamer=streamer, max_new_tokens=1900, **ENDLESS)
    for _ in streamer:
        break
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(results[0][0]) == 0


# Batches


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("with_voices", [False, True])
def test_row_of_a_batch_is_the_row_alone(side, guidance_scale, with_voices):
    model, processor = load(side)
    texts = ["Stop.", TEXT, "The dog barked all night."]
    threshold = 0.42 if side == "streaming" else 0.8
    options = {"guidance_scale": guidance_scale, "max_new_tokens": 30, "eos_threshold": threshold}
    voices = [{} for _ in texts]
    batch_voice = {}
    if with_voices:
        voices = [
            {"prompt_text": prompt_text, "prompt_latents": get_latents(num_frames, num_frames)}
            for prompt_text, num_frames in zip(["So.", "He said that.", "Two plus two."], [3, 20, 9], strict=True)
        ]
        latents = [voice["prompt_latents"][0] for voice in voices]
        batch_voice = {
            "prompt_text": [voice["prompt_text"] for voice in voices],
            "prompt_latents": torch.nn.utils.rnn.pad_sequence(latents, batch_first=True),
            "prompt_latents_mask": torch.tensor([[frame < len(one) for frame in range(20)] for one in latents]).long(),
        }
    batch = model.generate(
        **processor(texts, **batch_voice),
        generator=[seeded(row) for row in range(3)],
        return_dict_in_generate=True,
        **options,
    )
    num_frames = set()
    for row, (text, voice) in enumerate(zip(texts, voices, strict=True)):
        alone = model.generate(
            **processor(text, **voice), generator=[seeded(row)], return_dict_in_generate=True, **options
        )
        assert_same(batch.audio[row], alone.audio[0])
        length = alone.latents.shape[1]
        num_frames.add(length)
        assert_same(batch.latents[row, :length], alone.latents[0])
        assert_same(batch.eos_logits[row, :length], alone.eos_logits[0])
        assert not batch.latents[row, length:].any() and not batch.latents_mask[row, length:].any()
        stream = model.stream(text, processor=processor, generator=seeded(row), **options, **voice)
        assert_same(join(stream), alone.audio[0])
    # The rows have ended at different points.
    assert len(num_frames) > 1


def test_rows_of_long_text_end_alone():
    model, processor = load("streaming", 512)
    texts = ["Stop.", " ".join(f"It is {word}." for word in ["late", "dark", "cold", "good", "fine", "here"] * 2)]
    generators = [seeded(0), seeded(1)]
    with watch(model, last_frame=25) as parts:
        batch = model.generate(**processor(texts), generator=generators, guidance_scale=1.0)
    with watch(model, last_frame=25):
        for row, text in enumerate(texts):
            (alone,) = model.generate(**processor(text), generator=[seeded(row)], guidance_scale=1.0)
            assert_same(batch[row], alone)
    assert len(batch[1]) > 2 * len(batch[0]) > 0
    assert len(parts) > 2


def test_copies_are_adjacent():
    model, processor = load("offline")
    texts = ["Stop.", "The dog barked."]
    options = {"max_new_tokens": 6} | ENDLESS
    copies = model.generate(
        **processor(texts), num_return_sequences=2, generator=[seeded(seed) for seed in (1, 2, 3, 4)], **options
    )
    assert len(copies) == 4
    for index, (text, seed) in enumerate([(texts[0], 1), (texts[0], 2), (texts[1], 3), (texts[1], 4)]):
        assert_same(copies[index], model.generate(**processor(text), generator=[seeded(seed)], **options)[0])
    assert not torch.equal(copies[0], copies[1])


# Ends and limits


@pytest.mark.parametrize("side", SIDES)
def test_limits_count_frames(side):
    model, processor = load(side)
    hop_length = processor.hop_length
    inputs = processor(TEXT, prompt_text="Hm.", prompt_latents=get_latents(12))
    options = {"return_dict_in_generate": True, "guidance_scale": 1.0, "generator": seeded(0)}
    output = model.generate(**inputs, max_new_tokens=5, **options, **ENDLESS)
    assert output.latents.shape[:2] == output.eos_logits.shape == output.latents_mask.shape == (1, 5)
    assert output.latents_mask.all() and len(output.audio[0]) == 5 * hop_length
    # The end frame counts, and is not heard.
    output = model.generate(**inputs, min_new_tokens=4, eos_threshold=0.0, **options)
    assert output.latents_mask.tolist() == [[1, 1, 1, 1, 0]] and len(output.audio[0]) == 4 * hop_length
    output = model.generate(**inputs, eos_threshold=0.0, **options)
    assert output.latents_mask.tolist() == [[0]] and output.audio[0].shape == (0,)
    assert list(model.stream(TEXT, processor=processor, eos_threshold=0.0)) == []
    # A duration that is not of whole frames is rounded up.
    stream = functools.partial(model.stream, TEXT, processor=processor, guidance_scale=1.0, **ENDLESS)
    assert len(join(stream(max_duration=0.1))) == 8 * hop_length
    assert len(join(stream(max_duration=0.1, max_new_tokens=3))) == 3 * hop_length


def test_speech_without_end_is_cut_off():
    model, processor = load("offline")
    output = model.generate(**processor("No."), guidance_scale=1.0, return_dict_in_generate=True, **ENDLESS)
    # By a budget that follows from the text, not by the positions.
    assert 75 <= output.latents.shape[1] <= 600


def test_early_end_is_final():
    model, processor = load("streaming")
    case = CASES["streaming.cfg2"]
    pulled = []

    def source():
        for piece in itertools.chain(case["texts"][0].split(" "), itertools.repeat("again")):
            pulled.append(piece)
            yield piece + " "

    torch.manual_seed(case["seed"])
    speech = join(model.stream(source(), processor=processor, guidance_scale=case["cfg"]))
    assert len(speech) == case["frames_before_eos"][0] * processor.hop_length
    assert len(pulled) < len(case["texts"][0].split(" "))


@pytest.mark.parametrize("options", [{"do_sample": False}, {"temperature": 0.0}, {"temperature": 0}])
def test_no_noise(options):
    model, processor = load("offline")
    options = {"max_new_tokens": 8, **options} | ENDLESS
    first, second = (model.generate(**processor(TEXT), generator=seeded(seed), **options)[0] for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.generate(**processor(TEXT), max_new_tokens=8, **ENDLESS)[0])


class StopAt(StoppingCriteria):
    def __init__(self, num_frames: int):
        self.num_frames = num_frames

    def __call__(self, input_ids, scores, **kwargs):
        assert scores.shape == (len(input_ids),)
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_frames)


def test_stopping_criteria_end_all_parts():
    model, processor = load("offline", 512)
    inputs = processor("It is late. " * 20)
    assert (inputs["input_ids"] == model.config.bos_token_id).sum() > 2
    criteria = StoppingCriteriaList([StopAt(9)])
    output = model.generate(**inputs, stopping_criteria=criteria, return_dict_in_generate=True, **ENDLESS)
    assert output.latents.shape[1] == 9 and output.latents_mask.all()
    speech = join(model.stream("It is late. " * 20, processor=processor, stopping_criteria=criteria, **ENDLESS))
    assert len(speech) == 9 * processor.hop_length
    output = model.generate(**inputs, max_time=1e-6, return_dict_in_generate=True, **ENDLESS)
    assert output.latents.shape[1] == 1
    assert len(join(model.stream("It is late. " * 20, processor=processor, max_time=1e-6, **ENDLESS))) == 320


# Long text


LONG_TEXT = " ".join(f"It is {word}." for word in ["late", "dark", "cold", "good", "fine", "here"] * 4)


def get_part_texts(processor: SledProcessor, parts: list[Watched]) -> list[str]:
    """What each part adds to the one it is primed with."""
    tokenizer = processor.tokenizer
    ids = [part.ids[len(part.row.primed_ids) :] for part in parts]
    return [tokenizer.decode(one, skip_special_tokens=True) for one in ids]


@pytest.mark.parametrize("prompt_text", ["So.", None])
@pytest.mark.parametrize("side", SIDES)
def test_long_text_is_spoken_part_by_part(side, prompt_text):
    model, processor = load(side, 512)
    options = {"guidance_scale": 1.0, "prompt_text": prompt_text, "prompt_latents": get_latents(11)}
    inputs = processor(LONG_TEXT, prompt_text=prompt_text, prompt_latents=options["prompt_latents"])
    with watch(model, last_frame=40) as parts:
        output = model.generate(**inputs, generator=seeded(2), guidance_scale=1.0, return_dict_in_generate=True)
    assert len(parts) > 3
    # Nothing dropped, nothing said twice, whole sentences.
    texts = get_part_texts(processor, parts)
    assert all(text.endswith(".") for text in texts)
    assert "".join(text.removeprefix(prompt_text or "") for text in texts).strip() == LONG_TEXT
    assert [len(part.lengths) for part in parts] == [40] * len(parts)
    mask = output.latents_mask[0].tolist()
    assert mask == ([1] * 39 + [0]) * len(parts)
    if prompt_text is not None:
        # Each part goes on from the voice prompt.
        assert all(text.startswith(prompt_text) for text in texts)
        assert all(part.row.num_prompt_frames == 11 for part in parts)
    else:
        # Each part is primed with the text and the frames of the whole part before it.
        primed = [processor.tokenizer.decode(part.row.primed_ids, skip_special_tokens=True) for part in parts]
        assert primed == ["", *texts[:-1]]
        assert [part.row.num_prompt_frames for part in parts] == [11, 11 + 39] + [39] * (len(parts) - 2)
    # No step at a join is larger than those inside the parts.
    (whole,) = output.audio
    steps = whole.diff().abs()
    joins = torch.arange(1, len(parts)) * 39 * processor.hop_length - 1
    inside = steps.clone()
    inside[joins] = 0
    assert steps[joins].max() <= inside.max()
    # Decoded in one go, and streamed.
    decoded = model.decode_latents(
        torch.cat([get_latents(11), output.latents[:, output.latents_mask[0].bool()]], dim=1)
    )
    assert_same(whole, decoded[0, 11 * processor.hop_length :])
    for text in (LONG_TEXT, cut(LONG_TEXT, 7)):
        with watch(model, last_frame=40):
            assert_same(join(model.stream(text, processor=processor, generator=seeded(2), **options)), whole)


def test_min_and_max_frames_of_long_text():
    model, processor = load("offline", 512)
    options = {"guidance_scale": 1.0, "return_dict_in_generate": True}
    with watch(model, last_frame=5) as parts:
        output = model.generate(**processor(LONG_TEXT), max_new_tokens=13, **options)
    assert output.latents.shape[1] == 13 and [len(part.lengths) for part in parts] == [5, 5, 3]
    num_parts = len(processor.split_text(LONG_TEXT))
    num_frames = 2 * num_parts + 3
    options = {"guidance_scale": 1.0, "eos_threshold": 0.0, "min_new_tokens": num_frames}
    with watch(model) as parts:
        (whole,) = model.generate(**processor(LONG_TEXT), generator=seeded(0), **options)
    # Only the last part is held on to.
    assert [len(part.lengths) for part in parts] == [1] * (num_parts - 1) + [num_frames - num_parts + 2]
    assert_same(join(model.stream(LONG_TEXT, processor=processor, generator=seeded(0), **options)), whole)


def test_iterator_longer_than_the_positions_goes_on():
    model, processor = load("streaming", 512)
    sentences = (f"It was {number}. " for number in itertools.count())
    with watch(model, last_frame=40) as parts:
        stream = model.stream(sentences, processor=processor, guidance_scale=1.0, max_duration=6.0)
        assert len(join(stream)) <= 6 * 24_000
    # Frames that signal an end count.
    assert sum(len(part.lengths) for part in parts) == 450
    texts = get_part_texts(processor, parts)
    assert len(parts) == 12 and all(text.endswith(".") for text in texts)
    assert "".join(f"It was {number}. " for number in range(100)).startswith("".join(texts))


def test_words_without_a_sentence_go_on():
    model, processor = load("streaming", 512)
    with watch(model, last_frame=40) as parts:
        join(model.stream(itertools.repeat("word "), processor=processor, guidance_scale=1.0, max_duration=2.5))
    assert len(parts) > 3
    texts = get_part_texts(processor, parts)
    assert " " + "".join(texts) == " word" * "".join(texts).count("word")
    # Each is primed with the one before it.
    words = [text.count("word") for text in texts]
    primed = [processor.tokenizer.decode(part.ids).count("word") for part in parts[1:]]
    assert primed == [before + after for before, after in itertools.pairwise(words)]


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_two_thousand_words(side):
    model, processor = load(side)
    text = " ".join(f"{TEXT} {number} dogs barked all night." for number in range(100))
    assert len(text.split()) >= 2000
    with watch(model, last_frame=90) as parts:
        speech = join(model.stream(text, processor=processor, generator=seeded(0), guidance_scale=1.0))
    assert "".join(get_part_texts(processor, parts)) == text
    assert len(speech) == len(parts) * 89 * processor.hop_length


def test_prompt_fills_the_chunks_of_an_interleaved_text():
    model, processor = load("streaming")
    text_size, speech_size = model.config.text_chunk_size, model.config.speech_chunk_size
    num_frames = 2 * speech_size + 4
    inputs = processor(TEXT, prompt_text="Two plus two.", prompt_latents=get_latents(num_frames))
    num_tokens = inputs["input_ids"].shape[1]
    with watch(model) as parts:
        model.generate(**inputs, guidance_scale=1.0, max_new_tokens=60, **ENDLESS)
    # Text and frames in turn, then the rest of the started chunk, then the next text with its last frame.
    lengths = parts[0].lengths
    assert lengths[0] == 3 * text_size + num_frames
    num_left = speech_size - 4
    assert lengths[1 : num_left + 1] == [1] * (num_left - 1) + [1 + text_size]
    assert lengths[num_left + 1 :][:speech_size] == [1] * (speech_size - 1) + [1 + text_size]
    assert sum(lengths) == num_tokens + num_frames + 59


# Abandonment


def count_tensors() -> int:
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@contextlib.contextmanager
def nothing_left(collects: bool = False):
    """Within a second no thread and no tensor is left, without the help of the garbage collector."""
    gc.collect()
    num_tensors, threads = count_tensors(), set(threading.enumerate())
    gc.disable()
    try:
        yield
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and (set(threading.enumerate()) - threads or count_tensors() > num_tensors):
            time.sleep(0.02)
            if collects:
                gc.collect()
        assert not set(threading.enumerate()) - threads
        assert count_tensors() <= num_tensors
    finally:
        gc.enable()


def endless():
    yield from itertools.repeat("again and ")


def test_consumer_breaks_out():
    model, processor = load("streaming")

    def leave():
        for _ in model.stream(endless(), processor=processor, **ENDLESS):
            break

    with nothing_left():
        leave()
    stream = model.stream(endless(), processor=processor, **ENDLESS)
    with nothing_left():
        next(stream)
        stream.close()
    with nothing_left():
        # Never started.
        model.stream(endless(), processor=processor, **ENDLESS)


def test_source_raises():
    model, processor = load("streaming")

    def source():
        yield from cut(TEXT, 20)
        raise OSError("connection lost")

    def listen():
        num_samples = 0
        try:
            for waveform in model.stream(source(), processor=processor, **ENDLESS):
                num_samples += len(waveform)
        except OSError as error:
            assert str(error) == "connection lost"
        assert num_samples > 0

    with nothing_left():
        listen()

    async def run():
        async for waveform in model.astream(source(), processor=processor, **ENDLESS):
            del waveform

    # Before 3.11, the event loop's task and the error refer to each other.
    with nothing_left(collects=sys.version_info < (3, 11)):
        try:
            asyncio.run(run())
        except OSError as error:
            assert str(error) == "connection lost"


def test_consumer_is_interrupted():
    model, processor = load("offline")

    def listen():
        for _ in model.stream(TEXT, processor=processor, **ENDLESS):
            raise KeyboardInterrupt

    with nothing_left(), contextlib.suppress(KeyboardInterrupt):
        listen()


def test_model_fails_in_a_thread():
    model, processor = load("offline")

    def fail(module, args, kwargs, output):
        if kwargs["inputs_embeds"].shape[1] == 1:
            raise RuntimeError("out of memory")

    async def run():
        async for _ in model.astream(TEXT, processor=processor, **ENDLESS):
            pass

    hook = model.model.register_forward_hook(fail, with_kwargs=True)
    # The event loop's task and the error refer to each other.
    with nothing_left(collects=True), contextlib.suppress(RuntimeError):
        asyncio.run(run())
    hook.remove()


def test_event_loop_cancels():
    model, processor = load("streaming")

    async def speak(text):
        async for _ in model.astream(text, processor=processor, **ENDLESS):
            pass

    async def cancel(text):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(speak(text), timeout=0.3)

    async def waiting():
        yield "Half a"
        await asyncio.sleep(60)

    with nothing_left():
        # While the model works.
        asyncio.run(cancel(endless()))
    with nothing_left():
        # While the source waits.
        asyncio.run(cancel(waiting()))


def test_blocked_source_is_dropped_when_it_returns():
    model, processor = load("streaming")
    is_blocked, released = threading.Event(), threading.Event()

    def source():
        yield from cut(TEXT, 20)
        is_blocked.set()
        released.wait(60)
        yield "too late"

    async def speak():
        async for _ in model.astream(source(), processor=processor, **ENDLESS):
            pass

    async def run():
        task = asyncio.ensure_future(speak())
        while not is_blocked.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with nothing_left():
        # Does not wait for the source.
        asyncio.run(run())
        assert not released.is_set()
        released.set()


@pytest.mark.parametrize("text", ["whole", "pieces", "asynchronous"])
def test_event_loop_is_not_blocked(text, monkeypatch):
    model, processor = load("streaming")
    encode_prompt = model.encode_prompt
    threads = set()

    def encode_slowly(*args):
        time.sleep(1.0)
        threads.add(threading.current_thread())
        return encode_prompt(*args)

    def source():
        time.sleep(1.0)
        threads.add(threading.current_thread())
        yield TEXT

    monkeypatch.setattr(model, "encode_prompt", encode_slowly)
    voice = {
        "prompt_text": "Hm.",
        "prompt_audio": torch.randn(8_000, generator=seeded(1)) * 0.1,
        "sampling_rate": 24_000,
    }
    texts = {"whole": TEXT, "pieces": source(), "asynchronous": as_async([TEXT])}

    async def run():
        pauses = []

        async def tick():
            while True:
                start = time.monotonic()
                await asyncio.sleep(0.01)
                pauses.append(time.monotonic() - start)

        ticker = asyncio.ensure_future(tick())
        async for _ in model.astream(texts[text], processor=processor, max_new_tokens=10, **voice, **ENDLESS):
            pass
        ticker.cancel()
        return max(pauses)

    # Neither the voice nor the text is waited for in the loop, and one thread does it all.
    assert asyncio.run(run()) < 0.8
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_stream_in_a_thread_keeps_the_autocast():
    model, processor = load("offline")
    options = {"max_new_tokens": 6, **ENDLESS}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = join(model.stream(TEXT, processor=processor, generator=seeded(0), **options))
        actual = collect(model.astream(TEXT, processor=processor, generator=seeded(0), **options))
    assert_same(actual, expected)
    assert not torch.equal(actual, join(model.stream(TEXT, processor=processor, generator=seeded(0), **options)))


def test_two_hundred_streams_leave_nothing():
    model, processor = load("streaming")
    process = psutil.Process()

    async def leave_async():
        async for _ in model.astream(as_async(endless()), processor=processor, guidance_scale=1.0, **ENDLESS):
            break

    def leave(number):
        if number % 8 == 0:
            asyncio.run(leave_async())
        else:
            stream = model.stream(endless(), processor=processor, guidance_scale=1.0, **ENDLESS)
            next(stream)
            if number % 2:
                stream.close()

    for number in range(40):
        leave(number)
    gc.collect()
    memory = process.memory_info().rss
    with nothing_left():
        for number in range(200):
            leave(number)
    # A stream's cache alone takes more than 64 kB, its decoder 0.2 MB.
    assert process.memory_info().rss - memory < 8e6


# Bad input


STREAM_ERRORS = [
    ("text", dict(text=iter([1]))),
    ("text", dict(text=["He", None])),
    ("text", dict(text=[b"Hello"])),
    ("text", dict(text=[])),
    ("text", dict(text=["", " ", "\n"])),
    ("text", dict(text="")),
    ("text", dict(text=" \n")),
    ("text", dict(text=b"Hello")),
    ("text", dict(text=None)),
    ("text", dict(text=5)),
    ("text", dict(text={"Hello": 1})),
    ("text", dict(text=["\ud800"])),
    ("chunk_duration", dict(chunk_duration=0)),
    ("chunk_duration", dict(chunk_duration=-1.0)),
    ("chunk_duration", dict(chunk_duration=float("nan"))),
    ("chunk_duration", dict(chunk_duration="0.2")),
    ("max_duration", dict(max_duration=0)),
    ("max_duration", dict(max_duration=float("inf"))),
    ("max_duration", dict(max_duration=float("nan"))),
    ("max_duration", dict(max_duration="1")),
    ("generator", dict(generator=[torch.Generator()])),
    ("generator", dict(generator=0)),
    ("guidance_scale", dict(guidance_scale=-1.0)),
    ("guidance_scale", dict(guidance_scale=float("nan"))),
    ("temperature", dict(temperature=-0.5)),
    ("eos_threshold", dict(eos_threshold=1.5)),
    ("max_new_tokens", dict(max_new_tokens=0)),
    ("num_return_sequences", dict(num_return_sequences=2)),
    ("prompt_text", dict(prompt_text="alone")),
    ("prompt_latents", dict(prompt_latents=torch.zeros(1, 4, 7))),
    ("prompt_latents", dict(prompt_latents=torch.zeros(2, 4, 32))),
    ("sampling_rate", dict(prompt_audio=torch.zeros(100))),
    ("processor", dict(processor=None)),
    ("speed", dict(speed=2)),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "arguments"), STREAM_ERRORS)
def test_bad_input_to_a_stream(side, name, arguments):
    model, processor = load(side)
    arguments = {"text": TEXT, "processor": processor, **arguments}
    if isinstance(arguments["text"], type(iter([]))):
        arguments["text"] = iter([1])
    with pytest.raises(ValueError, match=name):
        list(model.stream(**arguments))
    if isinstance(arguments["text"], type(iter([]))):
        arguments["text"] = iter([1])
    with pytest.raises(ValueError, match=name):
        collect(model.astream(**arguments))


def test_bad_arguments_are_refused_at_the_call():
    model, processor = load("offline")
    for name, arguments in STREAM_ERRORS:
        if name != "text":
            with pytest.raises(ValueError, match=name):
                model.stream(**{"text": endless(), "processor": processor, **arguments})
    with pytest.raises(ValueError, match="text"):
        model.stream(as_async([TEXT]), processor=processor)


def test_endless_sources(monkeypatch):
    monkeypatch.setattr(text_sled, "MAX_WAITING_CHARACTERS", 50_000)
    model, processor = load("offline")
    with pytest.raises(ValueError, match="`text` is still going on"):
        list(model.stream(itertools.repeat("word " * 1000), processor=processor))
    with pytest.raises(ValueError, match="`text` is still going on"):
        list(model.stream(itertools.repeat(""), processor=processor))
    model, processor = load("streaming")
    for blank in (" " * 1000, ""):
        with pytest.raises(ValueError, match="`text` is still going on"):
            list(model.stream(itertools.repeat(blank), processor=processor))
    with pytest.raises(ValueError, match="`text` is still going on"):
        list(model.stream(itertools.chain(["Well"], itertools.repeat("")), processor=processor))
    stream = model.stream(endless(), processor=processor, max_duration=0.4, **ENDLESS)
    assert len(join(stream)) == 30 * processor.hop_length


GENERATE_ERRORS = [
    ("input_ids", dict(input_ids=None)),
    ("input_ids", dict(input_ids=[[0, 5, 2]])),
    ("input_ids", dict(input_ids=torch.tensor([0, 5, 2]))),
    ("input_ids", dict(input_ids=torch.zeros(1, 0, dtype=torch.long))),
    ("input_ids", dict(input_ids=torch.tensor([[0.0, 5.0]]))),
    ("input_ids", dict(input_ids=torch.tensor([[0, 760]]))),
    ("input_ids", dict(input_ids=torch.tensor([[0, -1]]))),
    ("input_ids", dict(input_ids=torch.full((1, 2048), 5))),
    ("input_ids", dict(attention_mask=torch.zeros(1, 3))),
    ("attention_mask", dict(attention_mask=torch.ones(1, 2))),
    ("prompt_values", dict(prompt_values=torch.zeros(1, 1, 320), prompt_latents=torch.zeros(1, 4, 32))),
    ("prompt_latents", dict(prompt_latents=torch.full((1, 4, 32), float("nan")))),
    ("prompt_latents_mask", dict(prompt_latents=torch.zeros(1, 4, 32), prompt_latents_mask=torch.ones(1, 3))),
    ("voice prompt of 2046 frames", dict(prompt_latents=torch.zeros(1, 2046, 32))),
    ("generator", dict(generator=[torch.Generator(), torch.Generator()])),
    ("streamer", dict(streamer=print)),
    ("logits_processor", dict(logits_processor=[print])),
    ("min_new_tokens", dict(min_new_tokens=-1)),
    ("max_new_tokens", dict(max_new_tokens=2.5)),
    ("num_return_sequences", dict(num_return_sequences=0)),
]


@pytest.mark.parametrize(("name", "arguments"), GENERATE_ERRORS)
def test_bad_input_to_generate(name, arguments):
    model, _ = load("offline")
    with pytest.raises(ValueError, match=name):
        model.generate(**{"input_ids": torch.tensor([[0, 5, 2]]), **arguments})


def test_streamer_takes_one_row():
    model, processor = load("offline")
    codec = EncodecModel.from_pretrained(GOLDEN / "codec")
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**processor(["One.", "Two."]), streamer=SledAudioStreamer(codec))


# Parameters of the base class


REFUSED = [
    {"num_beams": 2},
    {"stop_strings": ["night"]},
    {"output_scores": True},
    {"output_logits": True},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"penalty_alpha": 0.6},
    {"prompt_lookup_num_tokens": 3},
    {"watermarking_config": {"bias": 2.0}},
    {"constraints": [1]},
    {"cache_config": {"backend": "quanto"}},
    {"cache_implementation": "quantized"},
    {"eos_token_id": 7},
    {"bos_token_id": 7},
    {"negative_prompt_ids": torch.tensor([[0, 2]])},
    {"prefix_allowed_tokens_fn": lambda row, ids: [1]},
    {"tokenizer": "any"},
    {"assistant_model": "any"},
    {"min_new_tokens": 50, "max_new_tokens": 10},
    {"max_length": 0},
    {"max_length": 5},
    {"min_length": -1},
    {"max_time": "soon"},
    {"generation_config": {"do_sample": False}},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: next(iter(options)))
def test_what_does_not_apply_is_refused_by_name(options):
    model, processor = load("offline")
    name = "input_ids" if options == {"max_length": 5} else next(iter(options))
    with pytest.raises(ValueError, match=name):
        model.generate(**processor(TEXT), **options)


LOGITS_ONLY = [
    {"top_k": 1},
    {"top_p": 0.1},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[5]]},
    {"suppress_tokens": [5]},
]


@pytest.mark.parametrize("options", LOGITS_ONLY, ids=lambda options: next(iter(options)))
def test_what_concerns_logits_alone_warns(options, monkeypatch):
    model, processor = load("offline")
    messages = []
    monkeypatch.setattr(generation_sled.logger, "warning_once", messages.append)
    expected = model.generate(**processor(TEXT), generator=seeded(0), max_new_tokens=3, **ENDLESS)[0]
    assert messages == []
    actual = model.generate(**processor(TEXT), generator=seeded(0), max_new_tokens=3, **ENDLESS, **options)[0]
    assert torch.equal(actual, expected)
    assert len(messages) == 1 and next(iter(options)) in messages[0] and "no effect" in messages[0]


def test_lengths_count_positions():
    model, processor = load("offline")
    inputs = processor(TEXT, prompt_text="Hm.", prompt_latents=get_latents(12))
    num_given = inputs["input_ids"].shape[1] + 12
    options = {"guidance_scale": 1.0, "return_dict_in_generate": True}
    output = model.generate(**inputs, max_length=num_given + 7, **options, **ENDLESS)
    assert output.latents.shape[1] == 7
    output = model.generate(**inputs, min_length=num_given + 4, eos_threshold=0.0, **options)
    assert output.latents_mask.tolist() == [[1, 1, 1, 1, 0]]


def test_scalars_of_numpy_and_torch_are_numbers():
    model, processor = load("offline")
    plain = {"guidance_scale": 1.5, "temperature": 0.5, "max_new_tokens": 4, "eos_threshold": 1.0}
    expected = model.generate(**processor(TEXT), generator=seeded(0), **plain)[0]
    for kind in (lambda value: np.array([value])[0], np.array, torch.tensor):
        options = {name: kind(value) for name, value in plain.items()}
        assert torch.equal(model.generate(**processor(TEXT), generator=seeded(0), **options)[0], expected)


def test_padding_without_a_mask_is_told_by_its_id():
    model, processor = load("offline")
    pad_token_id = processor.tokenizer.pad_token_id
    inputs = processor(["No.", TEXT])
    assert (inputs["input_ids"] == pad_token_id).any()
    options = {"max_new_tokens": 4, **ENDLESS}
    expected = model.generate(**inputs, generator=seeded(0), **options)
    actual = model.generate(inputs["input_ids"], pad_token_id=pad_token_id, generator=seeded(0), **options)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("side", SIDES)
def test_gradient_checkpointing_generates_without_a_cache(side):
    model, processor = load(side)
    options = {"max_new_tokens": 12, "guidance_scale": 2.0, **ENDLESS}
    expected = model.generate(**processor(TEXT), generator=seeded(0), **options)[0]
    # A copy without dropout, which training mode would switch on.
    config = SledConfig.from_pretrained(GOLDEN / side, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0)
    copied = SledForSpeechSynthesis.from_pretrained(GOLDEN / side, config=config, codec=GOLDEN / "codec")
    copied.gradient_checkpointing_enable()
    for training in (False, True):
        copied.train(training)
        assert_same(copied.generate(**processor(TEXT), generator=seeded(0), **options)[0], expected)


def test_greedy_for_good_is_saved(tmp_path):
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec")
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.2
    model.save_pretrained(tmp_path)
    assert model.generation_config.temperature == 0.2
    loaded = SledForSpeechSynthesis.from_pretrained(tmp_path)
    assert loaded.generation_config.do_sample is False


def test_results_that_went_wrong_are_warned_about():
    model, processor = load("offline")
    with pytest.warns(UserWarning, match="Row 1 of the result is empty"):
        model.generate(**processor([TEXT, TEXT]), eos_threshold=0.0)
    with pytest.warns(UserWarning, match="Row 0 of the result ran to the limit"):
        model.generate(**processor("No."), guidance_scale=1.0, **ENDLESS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**processor("No."), max_new_tokens=3, **ENDLESS)


@pytest.mark.parametrize(
    "counts", [[1], torch.tensor([1.0]), torch.tensor([1, 1]), torch.tensor([-1]), torch.tensor([99])]
)
def test_bad_numbers_of_prompt_tokens_are_refused(counts):
    model, processor = load("offline")
    with pytest.raises(ValueError, match="`num_prompt_tokens`"):
        model.generate(**processor(TEXT), prompt_latents=get_latents(5), num_prompt_tokens=counts)
    with pytest.raises(ValueError, match="`num_prompt_tokens` needs a voice prompt"):
        model.generate(**processor(TEXT), num_prompt_tokens=torch.tensor([1]))


def test_a_part_is_primed_only_where_both_fit():
    model, _ = load("offline", 512)
    parts = [SledTextPart([0, *[5] * 200, 2]), SledTextPart([0, *[6] * 100, 2])]

    def get_primed(num_frames: int) -> list[int]:
        config = generation_sled.prepare_generation_config(model, None, {"max_new_tokens": 400, **ENDLESS})
        noise = SledNoise(None, 1, model.config.noise_dim, 0.0, model.device)
        utterance = SledUtterance(model, SledKnownParts(parts), None, config, noise)
        with watch(model, last_frame=num_frames + 1) as watched:
            engine = SledEngine(model)
            while len(watched) < 2:
                utterance.join(engine)
                for _, frame in engine.step() if len(watched) < 2 else ():
                    utterance.take(frame)
        return watched[1].row.primed_ids

    # 202 + 102 tokens, the frames, and half as many for the second part.
    assert get_primed(130) == parts[0].ids[:-1]
    assert get_primed(145) == []
