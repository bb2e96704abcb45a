"""Serving: streams that share a batch say what each would say alone, and none holds up or breaks another."""

import asyncio
import copy
import functools
import itertools
import random
import threading
from pathlib import Path

import pytest
import torch
from transformers import StoppingCriteria

from small_codec import live_tensor_bytes
from transformers_sled import SledForSpeechSynthesis, SledProcessor, cache_sled, generation_sled, serving_sled
from transformers_sled.serving_sled import SledStream, SledStreamServer


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
TEXTS = [
    "The dog barked all night.",
    "She was humiliated by his remarks, and she left.",
    "No.",
    "What a long and winding road it was, he said to himself, as he went on and on without a rest.",
]
# Both branches of guidance, at different strengths, and what may differ from stream to stream.
SETTINGS = [
    {"guidance_scale": 2.0, "min_new_tokens": 24, "max_new_tokens": 24},
    {"guidance_scale": 1.0, "min_new_tokens": 15, "max_new_tokens": 30},
    {"guidance_scale": 3.5, "min_new_tokens": 8, "max_new_tokens": 20, "eos_threshold": 0.3},
    {"guidance_scale": 0.0, "min_new_tokens": 6, "max_new_tokens": 6, "temperature": 0.5},
    {"guidance_scale": 1.3, "min_new_tokens": 20, "max_new_tokens": 20, "do_sample": False},
]


@functools.cache
def load(kind: str, attn_implementation: str = "sdpa", max_positions: int = 2048):
    folder = GOLDEN / kind
    model = SledForSpeechSynthesis.from_pretrained(
        folder, codec=GOLDEN / "codec", attn_implementation=attn_implementation
    )
    model.config.max_position_embeddings = max_positions
    processor = SledProcessor.from_pretrained(folder)
    processor.max_position_embeddings = max_positions
    return model, processor


@functools.cache
def get_voice(kind: str, seconds: float) -> dict:
    model, processor = load(kind)
    audio = torch.randn(int(24000 * seconds), generator=torch.Generator().manual_seed(1)) * 0.1
    inputs = processor("How so?", prompt_audio=audio, sampling_rate=24000)
    return {"prompt_text": "How so?", **model.encode_prompt(inputs["prompt_values"])}


def speak_alone(kind: str, text: str, seed: int, settings: dict, voice: dict, **load_kwargs) -> torch.Tensor:
    model, processor = load(kind, **load_kwargs)
    inputs = processor(text, **voice)
    return model.generate(**inputs, generator=torch.Generator().manual_seed(seed), **settings)[0]


def make_server(kind: str = "offline", max_streams: int = 4, **load_kwargs) -> SledStreamServer:
    return SledStreamServer(*load(kind, **load_kwargs), max_streams=max_streams)


def cut(text: str, rng: random.Random) -> list[str]:
    bounds = [0, *sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8))), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


async def write_asynchronously():
    yield TEXTS[0]


def drain(server: SledStreamServer) -> dict[SledStream, torch.Tensor]:
    """Steps until nothing is left to do. Returns the audio of every stream."""
    waveforms: dict[SledStream, list[torch.Tensor]] = {}
    while server.num_active_streams + server.num_waiting_streams > 0:
        for stream, waveform in server.step():
            waveforms.setdefault(stream, []).append(waveform)
    return {stream: torch.cat(parts) for stream, parts in waveforms.items()}


def assert_same(audio: torch.Tensor, expected: torch.Tensor) -> None:
    assert audio.dtype == torch.float32 and audio.device.type == "cpu"
    torch.testing.assert_close(audio, expected, atol=1e-4, rtol=0)


class StopAt(StoppingCriteria):
    def __init__(self, num_frames: int):
        self.num_frames = num_frames

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_frames)


class Feeder:
    """Pushes the text of streams piece by piece, at random."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.fed: list[tuple[SledStream, list[str]]] = []

    def feed(self, share: float) -> None:
        for stream, pieces in list(self.fed):
            if self.rng.random() >= share:
                continue
            if pieces:
                stream.push(pieces.pop(0))
            else:
                stream.finish()
                self.fed.remove((stream, pieces))


@pytest.mark.parametrize(
    ("kind", "attn_implementation"), [("offline", "sdpa"), ("streaming", "sdpa"), ("streaming", "eager")]
)
def test_streams_that_come_and_go_say_what_each_says_alone(kind, attn_implementation, monkeypatch):
    # Small enough for texts and prompts to be read in several portions, and the cache to grow several times.
    monkeypatch.setattr(serving_sled, "MAX_PREFILL_POSITIONS", 7)
    monkeypatch.setattr(cache_sled, "MIN_GROWTH", 16)
    rng = random.Random(3)
    server = make_server(kind, max_streams=3, attn_implementation=attn_implementation)
    waveforms: dict[SledStream, list[torch.Tensor]] = {}
    expected: dict[SledStream, torch.Tensor] = {}
    feeder = Feeder(rng)
    most_active = 0
    for number, way in enumerate(["pushed", "whole", "pieces", "pushed", "pieces", "whole", "whole"]):
        text, settings = TEXTS[number % len(TEXTS)], SETTINGS[number % len(SETTINGS)]
        voice = get_voice(kind, rng.choice([0.1, 0.4])) if number % 3 == 2 else {}
        pieces = cut(text, rng)
        source = {"whole": text, "pieces": iter(pieces), "pushed": None}[way]
        stream = server.add(source, generator=torch.Generator().manual_seed(number), **settings, **voice)
        waveforms[stream] = []
        expected[stream] = speak_alone(kind, text, number, settings, voice, attn_implementation=attn_implementation)
        if way == "pushed":
            feeder.fed.append((stream, pieces))
        for _ in range(rng.randrange(15)):
            feeder.feed(share=0.3)
            for other, waveform in server.step():
                waveforms[other].append(waveform)
            most_active = max(most_active, server.num_active_streams)
    while feeder.fed:
        feeder.feed(share=1)
    for stream, audio in drain(server).items():
        waveforms[stream].append(audio)
    assert most_active == 3
    for stream, audio in expected.items():
        assert stream.is_finished and stream.error is None
        assert len(audio) > 0
        assert_same(torch.cat(waveforms[stream]), audio)


@pytest.mark.parametrize("kind", ["offline", "streaming"])
def test_long_text_in_parts(kind):
    text = "The dog barked all night. No. It ran away. The cat slept on. No, no, no."
    pieces = [text[:40], text[40:]]
    # Reached a few times.
    settings = {"eos_threshold": 0.8 if kind == "offline" else 0.55, "max_new_tokens": 90}
    model, processor = load(kind, max_positions=300)
    assert len(processor.split_text(text)) > 2

    def make_generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    server = make_server(kind, max_positions=300)
    whole, in_voice, in_pieces = (
        server.add(source, generator=make_generator(), **settings, **voice)
        for source, voice in [(text, {}), (text, get_voice(kind, 0.1)), (iter(pieces), {})]
    )
    audio = drain(server)
    inputs = processor(text)
    expected = model.generate(**inputs, generator=make_generator(), return_dict_in_generate=True, **settings)
    assert (expected.latents_mask[0, :-1] == 0).any(), "There must be a part after another."
    assert_same(audio[whole], expected.audio[0])
    alone = speak_alone(kind, text, 1, settings, get_voice(kind, 0.1), max_positions=300)
    assert_same(audio[in_voice], alone)
    streamed = model.stream(iter(pieces), processor, generator=make_generator(), **settings)
    assert_same(audio[in_pieces], torch.cat(list(streamed)))


def test_what_stops_a_stream_stops_all_its_parts_and_no_other():
    text = "The dog barked all night. No. It ran away. The cat slept on. No, no, no."
    server = make_server("offline", max_positions=300)
    assert len(server.processor.split_text(text)) > 2
    timed = server.add(text, max_time=1e-6, eos_threshold=1.0)
    stopped = server.add(text, stopping_criteria=[StopAt(9)], eos_threshold=1.0)
    other = server.add(TEXTS[0], generator=torch.Generator().manual_seed(1), **SETTINGS[1])
    audio = drain(server)
    assert (len(audio[timed]), len(audio[stopped])) == (320, 9 * 320)
    assert_same(audio[other], speak_alone("offline", TEXTS[0], 1, SETTINGS[1], {}))


def test_a_stream_that_waits_for_text_sits_out():
    server = make_server("streaming", max_streams=3)
    waiting = server.add(generator=torch.Generator().manual_seed(0), **SETTINGS[0])
    waiting.push(TEXTS[1][:20])
    others = [server.add(TEXTS[0], generator=torch.Generator().manual_seed(1), **SETTINGS[0]) for _ in range(2)]
    waveforms: dict[SledStream, list[torch.Tensor]] = {stream: [] for stream in (waiting, *others)}
    while not all(other.is_finished for other in others):
        for stream, waveform in server.step():
            waveforms[stream].append(waveform)
    assert server.num_active_streams == 1 and not waiting.is_finished
    assert len(waveforms[waiting]) > 0
    assert server.step() == []
    waiting.push(TEXTS[1][20:])
    waiting.finish()
    waveforms[waiting].append(drain(server)[waiting])
    assert_same(torch.cat(waveforms[waiting]), speak_alone("streaming", TEXTS[1], 0, SETTINGS[0], {}))
    for other in others:
        assert_same(torch.cat(waveforms[other]), speak_alone("streaming", TEXTS[0], 1, SETTINGS[0], {}))


def test_further_streams_wait_for_a_place():
    server = make_server(max_streams=2)
    streams = [
        server.add(TEXTS[0], min_new_tokens=3 + 3 * number, max_new_tokens=3 + 3 * number) for number in range(4)
    ]
    assert (server.num_active_streams, server.num_waiting_streams) == (0, 4)
    server.step()
    assert (server.num_active_streams, server.num_waiting_streams) == (2, 2)
    streams[0].close()
    streams[2].close()
    assert server.num_waiting_streams == 1
    server.step()
    assert (server.num_active_streams, server.num_waiting_streams) == (2, 0)
    assert list(streams[0]) == [] and streams[2].is_finished
    assert [len(torch.cat(list(streams[number]))) for number in (1, 3)] == [6 * 320, 12 * 320]


def test_iterating_drives_the_server_and_keeps_what_others_get():
    server = make_server()
    first = server.add(TEXTS[0], generator=torch.Generator().manual_seed(0), **SETTINGS[0])
    second = server.add(TEXTS[0], generator=torch.Generator().manual_seed(0), **SETTINGS[3])
    assert_same(torch.cat(list(first)), speak_alone("offline", TEXTS[0], 0, SETTINGS[0], {}))
    assert second.is_finished
    assert_same(torch.cat(list(second)), speak_alone("offline", TEXTS[0], 0, SETTINGS[3], {}))
    assert list(first) == list(second) == []


def test_threads_feed_and_listen():
    threads = set(threading.enumerate())
    results: dict[int, torch.Tensor] = {}

    def speak(server: SledStreamServer, number: int) -> None:
        text = TEXTS[number % len(TEXTS)]
        rng = random.Random(number)
        pieces = cut(text, rng)
        stream = server.add(
            iter(pieces) if number % 2 else None,
            generator=torch.Generator().manual_seed(number),
            **SETTINGS[number % len(SETTINGS)],
        )
        if number % 2 == 0:
            for piece in pieces:
                stream.push(piece)
            stream.finish()
        results[number] = torch.cat(list(stream))

    with make_server("streaming", max_streams=3) as server:
        assert server.is_running
        consumers = [threading.Thread(target=speak, args=(server, number)) for number in range(6)]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join()
        assert (server.num_active_streams, server.num_waiting_streams) == (0, 0)
    assert set(threading.enumerate()) <= threads
    for number in range(6):
        settings = SETTINGS[number % len(SETTINGS)]
        assert_same(results[number], speak_alone("streaming", TEXTS[number % len(TEXTS)], number, settings, {}))


def test_a_source_that_blocks_holds_up_nobody_in_a_server_that_runs():
    is_released = threading.Event()

    def write():
        yield TEXTS[0][:10]
        is_released.wait()
        yield TEXTS[0][10:]

    with make_server("streaming") as server:
        blocked = server.add(write(), generator=torch.Generator().manual_seed(0), **SETTINGS[0])
        other = server.add(TEXTS[1], generator=torch.Generator().manual_seed(1), **SETTINGS[1])
        assert_same(torch.cat(list(other)), speak_alone("streaming", TEXTS[1], 1, SETTINGS[1], {}))
        assert not blocked.is_finished
        is_released.set()
        assert_same(torch.cat(list(blocked)), speak_alone("streaming", TEXTS[0], 0, SETTINGS[0], {}))


@pytest.mark.parametrize("is_running", [False, True])
def test_an_error_in_a_text_ends_its_stream_alone(is_running):
    def write():
        yield TEXTS[0]
        raise KeyError("the source broke")

    server = make_server("streaming")
    if is_running:
        server.start()
    broken = server.add(write(), min_new_tokens=40)
    of_numbers = server.add(iter([TEXTS[0], 5]), min_new_tokens=40)
    blank = server.add(iter(["  ", ""]))
    ends_early = server.add(iter([TEXTS[0], None]), min_new_tokens=40)
    fed_nothing = server.add()
    fed_nothing.finish()
    good = server.add(TEXTS[1], generator=torch.Generator().manual_seed(1), **SETTINGS[1])
    for stream, error, message in [
        (broken, KeyError, "the source broke"),
        (of_numbers, ValueError, "`text` must yield strings, got 5"),
        (blank, ValueError, "`text` must not be empty"),
        (ends_early, ValueError, "`text` must yield strings, got None"),
        (fed_nothing, ValueError, "`text` must not be empty"),
    ]:
        with pytest.raises(error, match=message):
            list(stream)
        assert stream.is_finished and isinstance(stream.error, error)
        assert list(stream) == []
    assert_same(torch.cat(list(good)), speak_alone("streaming", TEXTS[1], 1, SETTINGS[1], {}))
    server.close()


def test_an_endless_source_is_read_as_far_as_the_speech_goes():
    server = make_server("streaming")
    num_read = 0

    def write():
        nonlocal num_read
        while True:
            num_read += 1
            yield "again and "

    # Two chunks of 5 tokens to 9 frames, and the start of a third.
    stream = server.add(write(), max_duration=20 * 320 / 24000, min_new_tokens=20)
    assert len(torch.cat(list(stream))) == 20 * 320
    assert num_read < 20
    assert server.num_active_streams == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"text": ""}, "text"),
        ({"text": 5}, "text"),
        ({"text": b"bytes"}, "text"),
        ({"text": write_asynchronously()}, "text"),
        ({"text": "Hello.", "guidance_scale": -1}, "guidance_scale"),
        ({"text": "Hello.", "temperature": float("nan")}, "temperature"),
        ({"text": "Hello.", "eos_threshold": 2}, "eos_threshold"),
        ({"text": "Hello.", "max_new_tokens": 0}, "max_new_tokens"),
        ({"text": "Hello.", "num_return_sequences": 2}, "num_return_sequences"),
        ({"text": "Hello.", "chunk_duration": 0}, "chunk_duration"),
        ({"text": "Hello.", "max_duration": -1}, "max_duration"),
        ({"text": "Hello.", "generator": 5}, "generator"),
        ({"text": "Hello.", "generator": [torch.Generator()]}, "generator"),
        ({"text": "Hello.", "prompt_text": "How are you?"}, "prompt_text"),
        ({"text": "Hello.", "prompt_latents": torch.full((1, 4, 32), float("nan"))}, "prompt_latents"),
        ({"text": "Hello.", "prompt_latents": torch.zeros(1, 4, 31)}, "prompt_latents"),
        ({"text": "Hello.", "past_key_values": None, "speed": 2}, "speed"),
        ({"prompt_text": "How are you?"}, "prompt_text"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, name):
    server = make_server()
    with pytest.raises(ValueError, match=name):
        server.add(**arguments)
    assert (server.num_active_streams, server.num_waiting_streams) == (0, 0)


def test_bad_servers_are_refused():
    model, processor = load("offline")
    for max_streams in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="max_streams"):
            SledStreamServer(model, processor, max_streams=max_streams)
    with pytest.raises(ValueError, match="processor"):
        SledStreamServer(model, processor.tokenizer)
    flex = SledForSpeechSynthesis(copy.deepcopy(model.config))
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation"):
        SledStreamServer(flex, processor)
    without_codec = SledForSpeechSynthesis(model.config, build_codec=False)
    with pytest.raises(ValueError, match="codec"):
        SledStreamServer(without_codec, processor)


def test_misuse_of_a_stream_or_server():
    server = make_server()
    whole = server.add(TEXTS[0])
    fed = server.add()
    for use in (lambda: whole.push("more"), whole.finish):
        with pytest.raises(RuntimeError, match="text is complete"):
            use()
    with pytest.raises(ValueError, match="piece"):
        fed.push(None)
    fed.finish()
    with pytest.raises(RuntimeError, match="text is complete"):
        fed.push("more")
    server.start()
    with pytest.raises(RuntimeError, match="thread"):
        server.step()
    with pytest.raises(RuntimeError, match="running already"):
        server.start()
    server.close()
    server.close()
    for use in (server.step, server.start, lambda: server.add(TEXTS[0])):
        with pytest.raises(RuntimeError, match="closed"):
            use()


@pytest.mark.parametrize("is_running", [False, True])
def test_closing_the_server_ends_all_streams(is_running):
    threads = set(threading.enumerate())
    server = make_server(max_streams=2)
    if is_running:
        server.start()
    streams = [server.add(min_new_tokens=1000), *(server.add(TEXTS[0], min_new_tokens=1000) for _ in range(2))]
    first = next(streams[1])
    assert len(first) > 0
    server.close()
    assert set(threading.enumerate()) <= threads
    for stream in streams:
        with pytest.raises(RuntimeError, match="closed before the speech ended"):
            list(stream)
    assert (server.num_active_streams, server.num_waiting_streams) == (0, 0)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_failing_model_is_reported_to_everyone(is_running, monkeypatch):
    server = make_server(max_streams=1)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(server.model.generative_head, "forward", fail)
    streams = [server.add(TEXTS[0]) for _ in range(2)]
    if is_running:
        server.start()
    else:
        with pytest.raises(torch.OutOfMemoryError):
            while True:
                server.step()
    for stream in streams:
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        server.add(TEXTS[0])
    server.close()


def test_a_closed_stream_wakes_its_consumer():
    with make_server("streaming") as server:
        stream = server.add()
        ended = threading.Event()
        consumer = threading.Thread(target=lambda: (list(stream), ended.set()))
        consumer.start()
        stream.close()
        assert ended.wait(10)
        consumer.join()
    assert stream.is_finished and stream.error is None


def test_memory_does_not_grow_with_the_streams_served():
    server = make_server("streaming", max_streams=4)

    def serve(number: int) -> None:
        for index in range(number):
            stream = server.add(iter(["The dog ", "barked all night."]), min_new_tokens=2, max_new_tokens=2)
            if index % 5 == 0:
                next(stream, None)
                stream.close()
        drain(server)

    serve(8)
    before = live_tensor_bytes()
    serve(200)
    assert live_tensor_bytes() == before


def test_bfloat16():
    model, processor = load("offline")
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec", dtype="bfloat16")
    server = SledStreamServer(model, processor)
    streams = [
        server.add(TEXTS[0], generator=torch.Generator().manual_seed(0), **settings) for settings in SETTINGS[:2]
    ]
    audio = drain(server)
    for stream, settings in zip(streams, SETTINGS, strict=False):
        alone = model.generate(**processor(TEXTS[0]), generator=torch.Generator().manual_seed(0), **settings)[0]
        assert audio[stream].dtype == torch.float32
        # Rounding differs with the size of the batch.
        torch.testing.assert_close(audio[stream][: 5 * 320], alone[: 5 * 320], atol=0.05, rtol=0)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_stream_that_nobody_holds_ends(is_running):
    server = make_server(max_streams=1)
    if is_running:
        server.start()
    dropped = server.add(TEXTS[0], min_new_tokens=1500, max_new_tokens=1500)
    next(dropped)
    assert server.num_active_streams == 1
    del dropped
    # Its place is free for the next.
    other = server.add(TEXTS[0], generator=torch.Generator().manual_seed(0), **SETTINGS[0])
    assert_same(torch.cat(list(other)), speak_alone("offline", TEXTS[0], 0, SETTINGS[0], {}))
    server.close()


def test_a_source_that_reads_its_own_server_gets_an_error():
    server = make_server("streaming")
    other = server.add(TEXTS[0], min_new_tokens=5, max_new_tokens=5)

    def write():
        for _ in other:
            yield "word "

    reading = server.add(write())
    with pytest.raises(RuntimeError, match="must not read a stream of its own server"):
        list(reading)
    assert len(torch.cat(list(other))) == 5 * 320


def test_closing_from_two_threads():
    for _ in range(5):
        server = make_server(max_streams=2)
        server.start()
        stream = server.add(TEXTS[0], min_new_tokens=1000)
        next(stream)
        closers = [threading.Thread(target=server.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(20)
            assert not closer.is_alive()
        assert not server.is_running
        with pytest.raises(RuntimeError, match="closed before the speech ended"):
            list(stream)


def test_a_stream_added_while_the_server_closes_ends(monkeypatch):
    server = make_server()
    server.start()
    prepare = generation_sled.SledStreamRequest.prepare

    def close_meanwhile(request):
        server.close()
        return prepare(request)

    monkeypatch.setattr(generation_sled.SledStreamRequest, "prepare", close_meanwhile)
    stream = server.add(TEXTS[0])
    with pytest.raises(RuntimeError, match="closed before the speech ended"):
        list(stream)


def test_audio_that_nobody_fetches_is_bounded(monkeypatch):
    monkeypatch.setattr(serving_sled, "MAX_UNFETCHED_SECONDS", 0.3)
    server = make_server("offline", max_streams=2)
    settings = {"min_new_tokens": 120, "max_new_tokens": 120}
    slow = server.add(TEXTS[0], generator=torch.Generator().manual_seed(0), **settings)
    quick = server.add(TEXTS[1], generator=torch.Generator().manual_seed(1), **settings)
    assert_same(torch.cat(list(quick)), speak_alone("offline", TEXTS[1], 1, settings, {}))
    # It sits out, and goes on when its audio is fetched.
    assert not slow.is_finished and server.num_active_streams == 1
    assert server.step() == []
    first = next(slow)
    rest = torch.cat(list(slow))
    assert_same(torch.cat([first, rest]), speak_alone("offline", TEXTS[0], 0, settings, {}))


def test_an_event_loop_listens_without_a_thread():
    async def listen(stream):
        return torch.cat([waveform async for waveform in stream])

    async def run(server):
        streams = [
            server.add(TEXTS[number], generator=torch.Generator().manual_seed(number), **SETTINGS[number])
            for number in range(3)
        ]
        threads = set(threading.enumerate())
        task = asyncio.ensure_future(listen(server.add(min_new_tokens=50)))
        await asyncio.sleep(0.05)
        task.cancel()
        audio = await asyncio.gather(*map(listen, streams))
        assert set(threading.enumerate()) <= threads
        return audio

    with make_server(max_streams=4) as server:
        audio = asyncio.run(run(server))
    for number, one in enumerate(audio):
        assert_same(one, speak_alone("offline", TEXTS[number], number, SETTINGS[number], {}))
    server = make_server()
    stream = server.add(TEXTS[0])
    with pytest.raises(RuntimeError, match="runs in its thread"):
        asyncio.run(listen(stream))


@pytest.mark.parametrize("name", ["use_cache", "cache_implementation", "synced_gpus"])
def test_the_engine_is_shared(name):
    with pytest.raises(ValueError, match=name):
        make_server().add(TEXTS[0], **{name: "static"})
