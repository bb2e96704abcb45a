"""The codec: whole, with state and in rows of different lengths against EnCodec itself, chunking, loading, precision."""

import doctest
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import EncodecModel

from small_codec import decode_whole, live_tensor_bytes, make_codec, make_latents, split
from transformers_sled import codec_sled
from transformers_sled.codec_sled import (
    SledAudioChunker,
    SledStreamingDecoder,
    decode_codes,
    decode_latents,
    encode_codes,
)


GOLDEN = Path(__file__).parent / "fixtures" / "golden"


# Decoding


@settings(deadline=None, max_examples=100)
@given(
    frames=st.integers(0, 50),
    cuts=st.lists(st.integers(0, 50), max_size=8),
    batch_size=st.integers(1, 3),
    num_lstm_layers=st.sampled_from([1, 2]),
    pad_mode=st.sampled_from(["reflect", "constant"]),
    use_conv_shortcut=st.booleans(),
    num_residual_layers=st.sampled_from([1, 3]),
    kernels=st.sampled_from([(7, 7, 3), (1, 3, 5), (9, 1, 1)]),
    upsampling_ratios=st.sampled_from([(4, 3, 2), (2,), (2, 1, 2)]),
)
def test_any_split_decodes_to_the_whole_waveform(frames, cuts, batch_size, kernels, **config):
    config |= dict(zip(("kernel_size", "last_kernel_size", "residual_kernel_size"), kernels, strict=True))
    codec = make_codec(**config)
    latents = make_latents(frames, batch_size)
    decoder = SledStreamingDecoder(codec, batch_size)
    portions = [decoder.decode(latents[:, portion]) for portion in split(frames, cuts)] + [decoder.finish()]
    waveform = torch.cat(portions, dim=1)
    assert waveform.shape == (batch_size, frames * codec.config.hop_length)
    if frames > 0:
        torch.testing.assert_close(waveform, decode_whole(codec, latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("portion_size", [1, 7, 40, 100])
def test_golden_waveforms(portion_size):
    expected = load_file(GOLDEN / "expected.safetensors")
    codec = EncodecModel.from_pretrained(GOLDEN / "codec")
    latents, waveform = expected["codec.latents"], expected["codec.decoded"].flatten(1)
    decoder = SledStreamingDecoder(codec, latents.shape[0])
    portions = [decoder.decode(portion) for portion in latents.split(portion_size, dim=1)] + [decoder.finish()]
    torch.testing.assert_close(torch.cat(portions, dim=1), waveform, atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 7])
def test_signals_shorter_than_the_padding(frames):
    codec = make_codec()
    latents = make_latents(frames)
    decoder = SledStreamingDecoder(codec)
    portions = [decoder.decode(frame) for frame in latents.split(1, dim=1)]
    assert [portion.shape[1] for portion in portions[:6]] == [0] * min(frames, 6)
    waveform = torch.cat([*portions, decoder.finish()], dim=1)
    torch.testing.assert_close(waveform, decode_whole(codec, latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("pad_mode", "first_frames"), [("reflect", 7), ("constant", 1)])
def test_only_the_frames_that_reflection_needs_are_held_back(pad_mode, first_frames):
    codec = make_codec(pad_mode=pad_mode)
    decoder = SledStreamingDecoder(codec)
    assert decoder.frames_to_start == first_frames
    held = 0
    for frame in make_latents(12).split(1, dim=1):
        held += 1
        samples = decoder.decode(frame).shape[1]
        assert samples == (0 if decoder.frames_to_start > 0 else held * codec.config.hop_length)
        held = held if samples == 0 else 0
    assert held == 0
    assert decoder.finish().shape == (1, 0)


def test_empty_signal():
    decoder = SledStreamingDecoder(make_codec(), batch_size=2)
    assert decoder.decode(torch.zeros(2, 0, 8)).shape == (2, 0)
    assert decoder.finish().shape == (2, 0)


def test_decoding_leaves_the_codec_alone():
    codec = make_codec()
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    decoder = SledStreamingDecoder(codec)
    decoder.decode(make_latents(20))
    after = codec.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert codec.decoder.layers[0].conv.weight.requires_grad


def test_float32_without_gradients_under_autocast_and_from_half_precision():
    codec = make_codec()
    latents = make_latents(20).bfloat16()
    decoder = SledStreamingDecoder(codec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        waveform = decoder.decode(latents.requires_grad_())
    assert waveform.dtype == torch.float32
    assert not waveform.requires_grad
    torch.testing.assert_close(waveform, decode_whole(codec, latents.float()), atol=1e-5, rtol=0)


def test_memory_and_work_do_not_grow():
    codec = make_codec()
    decoder = SledStreamingDecoder(codec)
    latents, long_latents = make_latents(10), make_latents(300)
    used, work = [], []
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            decoder.decode(latents)
        work.append(counter.get_total_flops())
        used.append(live_tensor_bytes())
        decoder.decode(long_latents)
    assert work[0] > 0 and set(work) == {work[0]}
    assert set(used) == {used[0]}
    # Nor does a long input stay in memory.
    assert live_tensor_bytes() == used[0]


def test_select_rows_reorders_drops_and_splits():
    codec = make_codec()
    latents = make_latents(40, batch_size=3)
    expected = decode_whole(codec, latents)
    decoder = SledStreamingDecoder(codec, batch_size=3)
    start = decoder.decode(latents[:, :15])
    kept = decoder.select_rows([2, 0])
    assert (kept.batch_size, decoder.batch_size) == (2, 3)
    rest = kept.decode(latents[[2, 0], 15:])
    torch.testing.assert_close(torch.cat([start[[2, 0]], rest], dim=1), expected[[2, 0]], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder.decode(latents[:, 15:]), expected[:, start.shape[1] :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_select_rows_before_the_start(pad_mode):
    codec = make_codec(pad_mode=pad_mode)
    latents = make_latents(4, batch_size=2)
    decoder = SledStreamingDecoder(codec, batch_size=2)
    start = decoder.decode(latents[:, :3])
    last = decoder.select_rows(torch.tensor([1]))
    waveform = torch.cat([start[1:], last.decode(latents[1:, 3:]), last.finish()], dim=1)
    torch.testing.assert_close(waveform, decode_whole(codec, latents[1:]), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(
    starts=st.lists(st.integers(7, 30), min_size=1, max_size=4),
    frames=st.integers(0, 20),
    pad_mode=st.sampled_from(["reflect", "constant"]),
)
def test_rows_at_different_times_decode_side_by_side(starts, frames, pad_mode):
    codec = make_codec(pad_mode=pad_mode)
    streams = [make_latents(start + frames) for start in starts]
    decoders = [SledStreamingDecoder(codec) for _ in streams]
    heads = [
        decoder.decode(stream[:, :start]) for decoder, stream, start in zip(decoders, streams, starts, strict=True)
    ]
    joined = SledStreamingDecoder.concatenate(decoders)
    tails = joined.decode(torch.cat([stream[:, start:] for stream, start in zip(streams, starts, strict=True)]))
    assert joined.finish().shape == (len(streams), 0)
    for stream, head, tail in zip(streams, heads, tails, strict=True):
        waveform = torch.cat([head, tail[None]], dim=1)
        torch.testing.assert_close(waveform, decode_whole(codec, stream), atol=1e-5, rtol=0)


def test_concatenate_rows_that_have_not_started():
    codec = make_codec()
    latents = make_latents(20, batch_size=2)
    decoders = [SledStreamingDecoder(codec) for _ in range(2)]
    for row, decoder in enumerate(decoders):
        decoder.decode(latents[row : row + 1, :3])
    waveform = SledStreamingDecoder.concatenate(decoders).decode(latents[:, 3:])
    torch.testing.assert_close(waveform, decode_whole(codec, latents), atol=1e-5, rtol=0)


def test_concatenate_refuses_rows_that_cannot_go_side_by_side():
    codec = make_codec()
    started, new, finished = (SledStreamingDecoder(codec) for _ in range(3))
    started.decode(make_latents(7))
    finished.finish()
    with pytest.raises(ValueError, match=r"\[0, 7\]"):
        SledStreamingDecoder.concatenate([started, new])
    with pytest.raises(ValueError, match="finished"):
        SledStreamingDecoder.concatenate([new, finished])
    with pytest.raises(ValueError, match="same codec"):
        SledStreamingDecoder.concatenate([new, SledStreamingDecoder(make_codec(pad_mode="constant"))])
    with pytest.raises(ValueError, match="at least one"):
        SledStreamingDecoder.concatenate([])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_causal_conv", False),
        ("norm_type", "time_group_norm"),
        ("trim_right_ratio", 0.5),
        ("pad_mode", "replicate"),
        ("audio_channels", 2),
    ],
)
def test_codecs_that_cannot_be_streamed(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        SledStreamingDecoder(make_codec(**{field: value}))


def test_bad_codec():
    with pytest.raises(ValueError, match="EncodecModel"):
        SledStreamingDecoder(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="bfloat16"):
        SledStreamingDecoder(EncodecModel(make_codec().config).bfloat16())
    with pytest.raises(ValueError, match="batch_size"):
        SledStreamingDecoder(make_codec(), batch_size=0)


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(1, 8),
        torch.zeros(2, 3, 8),
        torch.zeros(1, 8, 3),
        torch.zeros(1, 3, 8, dtype=torch.long),
        [[0.0] * 8],
    ],
)
def test_bad_latents(latents):
    for push in (SledStreamingDecoder(make_codec()).decode, SledAudioChunker(make_codec()).push):
        with pytest.raises(ValueError, match="latents"):
            push(latents)


@pytest.mark.parametrize("indices", [[], [2], [-1], [True, False], torch.tensor([True, False]), [0.5]])
def test_bad_rows(indices):
    with pytest.raises(ValueError, match="indices"):
        SledStreamingDecoder(make_codec(), batch_size=2).select_rows(indices)


def test_nothing_after_the_end():
    decoder, chunker = SledStreamingDecoder(make_codec()), SledAudioChunker(make_codec())
    decoder.finish(), chunker.finish()
    for call in (lambda: decoder.decode(make_latents(1)), decoder.finish):
        with pytest.raises(RuntimeError, match="finish"):
            call()
    for call in (lambda: chunker.push(make_latents(1)), chunker.finish):
        with pytest.raises(RuntimeError, match="finish"):
            call()


# Chunking


@settings(deadline=None, max_examples=50)
@given(
    frames=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    prompt_frames=st.integers(0, 20),
    pad_mode=st.sampled_from(["reflect", "constant"]),
)
def test_chunks_depend_on_the_number_of_frames_alone(frames, cuts, prompt_frames, pad_mode):
    codec = make_codec(pad_mode=pad_mode, sampling_rate=24 * 50)  # 50 frames a second
    hop_length = codec.config.hop_length
    latents = make_latents(prompt_frames + frames)
    chunker = SledAudioChunker(codec, chunk_duration=0.2)
    waveforms = chunker.push(latents[:, :prompt_frames], is_prompt=True)
    assert waveforms == []
    speech = latents[:, prompt_frames:]
    for portion in split(frames, cuts):
        waveforms += chunker.push(speech[:, portion])
    waveforms += chunker.finish()

    first = max(1, 7 - prompt_frames) if pad_mode == "reflect" else 1
    expected = [first] + [10] * ((frames - first) // 10) + [(frames - first) % 10] if frames >= first else [frames]
    assert [len(waveform) / hop_length for waveform in waveforms] == [size for size in expected if size > 0]
    if frames > 0:
        whole = decode_whole(codec, latents)[0, prompt_frames * hop_length :]
        torch.testing.assert_close(torch.cat(waveforms), whole, atol=1e-5, rtol=0)


def test_chunk_shorter_than_a_frame():
    chunker = SledAudioChunker(make_codec(pad_mode="constant"), chunk_duration=1e-6)
    assert [len(waveform) for waveform in chunker.push(make_latents(4))] == [24] * 4


def test_chunker_goes_on_with_a_decoder():
    codec, latents = make_codec(), make_latents(40)
    whole = decode_whole(codec, latents)[0]
    # Before and after the first frames, which the decoder holds back.
    for num_decoded in (0, 3, 20):
        decoder = SledStreamingDecoder(codec)
        num_samples = decoder.decode(latents[:, :num_decoded]).shape[1]
        chunker = SledAudioChunker(decoder.select_rows([0]))
        waveforms = chunker.push(latents[:, num_decoded:]) + chunker.finish()
        torch.testing.assert_close(torch.cat(waveforms), whole[num_samples:], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="codec"):
        SledAudioChunker(decoder.select_rows([0, 0]))


def test_prompt_comes_first():
    chunker = SledAudioChunker(make_codec())
    chunker.push(make_latents(2), is_prompt=True)
    chunker.push(make_latents(3), is_prompt=True)
    chunker.push(make_latents(1))
    with pytest.raises(ValueError, match="is_prompt"):
        chunker.push(make_latents(1), is_prompt=True)


@pytest.mark.parametrize("chunk_duration", [0, -0.2, float("nan"), float("inf"), "0.2", None])
def test_bad_chunk_duration(chunk_duration):
    with pytest.raises(ValueError, match="chunk_duration"):
        SledAudioChunker(make_codec(), chunk_duration)


# Rows of different lengths


@settings(deadline=None, max_examples=60)
@given(
    frames=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    pad_mode=st.sampled_from(["reflect", "constant"]),
    use_conv_shortcut=st.booleans(),
    num_residual_layers=st.sampled_from([1, 2]),
    upsampling_ratios=st.sampled_from([(4, 3, 2), (2, 1, 2)]),
)
def test_rows_of_any_lengths_decode_as_each_alone(frames, **config):
    codec = make_codec(**config)
    rows = [make_latents(length)[0] for length in frames]
    waveforms = decode_latents(codec, rows)
    for row, waveform in zip(rows, waveforms, strict=True):
        assert waveform.shape == (len(row) * codec.config.hop_length,) and waveform.dtype == torch.float32
        if len(row) > 0:
            torch.testing.assert_close(waveform, decode_whole(codec, row[None])[0], atol=1e-5, rtol=0)


# The same examples each time: a code that two ways of adding up decide otherwise is rare, and no error.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    samples=st.lists(st.integers(0, 2000), min_size=1, max_size=5),
    pad_mode=st.sampled_from(["reflect", "constant"]),
    use_conv_shortcut=st.booleans(),
    num_residual_layers=st.sampled_from([1, 2]),
    kernels=st.sampled_from([(7, 7, 3), (1, 3, 5), (9, 1, 1)]),
    upsampling_ratios=st.sampled_from([(4, 3, 2), (2, 1, 2)]),
)
def test_rows_of_any_lengths_encode_as_each_alone(samples, kernels, **config):
    config |= dict(zip(("kernel_size", "last_kernel_size", "residual_kernel_size"), kernels, strict=True))
    codec = fill_codebooks(make_codec(**config))
    hop_length = codec.config.hop_length
    waveforms = [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in samples]
    codes = encode_codes(codec, waveforms, bandwidth=3.0)
    for waveform, row in zip(waveforms, codes, strict=True):
        assert row.shape == (codec.quantizer.get_num_quantizers_for_bandwidth(3.0), -(-len(waveform) // hop_length))
        if len(waveform) > 0:
            padded = torch.nn.functional.pad(waveform, (0, -len(waveform) % hop_length))
            with torch.no_grad():
                expected = codec.encode(padded[None, None], bandwidth=3.0).audio_codes[0, 0]
            assert torch.equal(row, expected)


def fill_codebooks(codec: EncodecModel) -> EncodecModel:
    for layer in codec.quantizer.layers:
        embed = layer.codebook.embed
        embed.copy_(torch.randn(embed.shape, generator=torch.Generator().manual_seed(0)))
    return codec


def test_golden_codes():
    expected = load_file(GOLDEN / "expected.safetensors")
    lengths = json.loads((GOLDEN / "expected.json").read_text())["codec.lengths"]
    codec = EncodecModel.from_pretrained(GOLDEN / "codec")
    waveforms = [row[:length] for row, length in zip(expected["codec.waveform"], lengths, strict=True)]
    for row, golden in zip(encode_codes(codec, waveforms, 6.0), expected["codec.codes"], strict=True):
        assert torch.equal(row, golden[:, : row.shape[1]])
        torch.testing.assert_close(
            decode_codes(codec, row[None]), decode_codes(codec, golden[None])[:, : row.shape[1]]
        )


@pytest.mark.parametrize("name", ["SledStreamingDecoder", "SledAudioChunker", "encode_codes"])
def test_documented_examples_run(name):
    examples = doctest.DocTestFinder(recurse=False).find(getattr(codec_sled, name), name, module=codec_sled)
    assert len(examples) == 1 and examples[0].examples
    assert doctest.DocTestRunner().run(examples[0]).failed == 0
