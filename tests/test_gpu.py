"""On a GPU: what other tests hold on the CPU, and what only a GPU can get wrong. Needs pytest and the package alone."""

import asyncio
import threading
import warnings
from pathlib import Path

import pytest
import torch

from transformers_sled import SledForSpeechSynthesis, SledProcessor, SledStreamServer


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
TEXTS = ["No.", "She opened the window and looked at the garden.", "It was cold."]
OPTIONS = {"eos_threshold": 1.0, "max_new_tokens": 40, "min_new_tokens": 40}


def load(side="offline", device="cuda", **options):
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / side, codec=GOLDEN / "codec", **options)
    return model.to(device), SledProcessor.from_pretrained(GOLDEN / side)


def seeded(index, device="cpu"):
    return torch.Generator(device).manual_seed(index)


def generate(model, processor, texts, **options):
    inputs = processor(texts, return_tensors="pt").to(model.device)
    return [waveform.cpu() for waveform in model.generate(**inputs, **{**OPTIONS, **options})]


@pytest.fixture(scope="module")
def expected():
    """From the CPU, with generators of the CPU, which draw the same noise for every device."""
    model, processor = load(device="cpu")
    return [generate(model, processor, text, generator=seeded(index))[0] for index, text in enumerate(TEXTS)]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_batch_is_what_the_cpu_makes_of_each_row(expected, attn_implementation):
    model, processor = load(attn_implementation=attn_implementation)
    generators = [seeded(index) for index in range(3)]
    for actual, one in zip(generate(model, processor, TEXTS, generator=generators), expected, strict=True):
        torch.testing.assert_close(actual, one, atol=1e-3, rtol=0)


def test_streams_are_the_whole(expected):
    model, processor = load()
    streamed = torch.cat(list(model.stream(TEXTS[1], processor, generator=seeded(1), **OPTIONS)))
    torch.testing.assert_close(streamed, expected[1], atol=1e-3, rtol=0)
    with SledStreamServer(model, processor) as server:
        streams = [server.add(text, generator=seeded(index), **OPTIONS) for index, text in enumerate(TEXTS)]
        for stream, one in zip(streams, expected, strict=True):
            torch.testing.assert_close(torch.cat(list(stream)), one, atol=1e-3, rtol=0)


def test_a_step_waits_for_the_device_once():
    model, processor = load()
    server = SledStreamServer(model, processor)
    streams = [server.add(TEXTS[1], generator=seeded(index), **OPTIONS) for index in range(4)]
    # Beyond the first chunk of audio, and not at the end of one: those go to the host.
    for _ in range(12):
        server.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert server.step() == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # To know which streams have ended.
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 3
    assert len(streams) == 4
    server.close()


def test_generators_of_several_devices_in_a_batch(expected):
    model, processor = load()
    audio = generate(model, processor, TEXTS[:2], generator=[seeded(0), seeded(1, "cuda")])
    torch.testing.assert_close(audio[0], expected[0], atol=1e-3, rtol=0)
    assert torch.isfinite(audio[1]).all()


def test_padding_on_the_left_gives_numbers():
    model, _ = load()
    ids = torch.tensor([[1, 1, 1, 0, 7, 2], [0, 5, 6, 7, 8, 2]], device="cuda")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]], device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            states = model.to(dtype)(input_ids=ids, attention_mask=mask).last_hidden_state
            alone = model(input_ids=ids[:1, 3:]).last_hidden_state
        assert torch.isfinite(states[mask.bool()]).all()
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(states[:1, 3:], alone, atol=tolerance, rtol=tolerance)


def test_compiled_in_one_thread_and_used_in_others(expected):
    model, processor = load()
    model.compile_generation()
    torch.testing.assert_close(
        generate(model, processor, TEXTS[1], generator=seeded(1))[0], expected[1], atol=1e-3, rtol=0
    )
    audio = {}

    def listen(index):
        stream = model.stream(TEXTS[index], processor, generator=seeded(index), **OPTIONS)
        audio[index] = torch.cat(list(stream))

    for index in (0, 1):
        thread = threading.Thread(target=listen, args=(index,))
        thread.start()
        thread.join()

    async def speak():
        stream = model.astream(TEXTS[2], processor, generator=seeded(2), **OPTIONS)
        return torch.cat([waveform async for waveform in stream])

    audio[2] = asyncio.run(speak())
    for index, one in enumerate(expected):
        torch.testing.assert_close(audio[index], one, atol=1e-3, rtol=0)


def test_the_codec_is_exact_where_convolutions_round():
    model, _ = load()
    latents = torch.randn(1, 40, model.config.latent_dim, generator=seeded(0))
    reference, _ = load(device="cpu")
    torch.testing.assert_close(
        model.decode_latents(latents.cuda()).cpu(), reference.decode_latents(latents), atol=1e-4, rtol=0
    )
    waveform = torch.randn(1, 24_000, generator=seeded(1)) * 0.1
    (actual, _), (expected_latents, _) = model.encode_audio(waveform.cuda()), reference.encode_audio(waveform)
    # A vector that lies between two entries of a codebook may fall to either.
    assert (actual.cpu() - expected_latents).abs().amax(-1).gt(1e-3).float().mean() < 0.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_devices(expected):
    num_layers = load(device="cpu")[0].config.num_hidden_layers
    layers = {f"model.layers.{index}": index % 2 for index in range(num_layers)}
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "z_proj", "z_proj_ln", "eos_head")
    device_map = {**layers, **dict.fromkeys((*parts, "generative_head", "codec"), 0)}
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec", device_map=device_map)
    processor = SledProcessor.from_pretrained(GOLDEN / "offline")
    (audio,) = generate(model, processor, TEXTS[1], generator=seeded(1))
    torch.testing.assert_close(audio, expected[1], atol=1e-3, rtol=0)
