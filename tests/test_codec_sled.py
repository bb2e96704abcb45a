"""The codec: whole, with state and in rows of different lengths against EnCodec itself, chunking, loading, precision."""

import copy
import doctest
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import EncodecModel

from small_codec import decode_whole, live_tensor_bytes, make_codec, make_latents, split
from transformers_sled import codec_sled
from transformers_sled.codec_sled import (
    SledAudioChunker,
    SledCodec,
    SledStreamingDecoder,
    copy_codec,
    decode_codes,
    decode_latents,
    encode_codes,
    load_codec,
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


def test_decoders_share_weights_until_these_change():
    codec = copy.deepcopy(make_codec())
    latents = make_latents(12)

    def decode():
        return decode_latents(codec, list(latents))[0]

    with torch.no_grad():
        first = decode()
        prepared = live_tensor_bytes()
        decoders = [SledStreamingDecoder(codec) for _ in range(8)]
        weight_bytes = sum(parameter.nbytes for parameter in codec.decoder.parameters())
        assert live_tensor_bytes() - prepared < weight_bytes
        del decoders
        parameter = next(codec.decoder.parameters())
        for change in (
            lambda: parameter.mul_(2),
            lambda: codec.load_state_dict({name: value * 2 for name, value in codec.state_dict().items()}),
            lambda: setattr(parameter, "data", parameter.data * 2),
            lambda: codec.to(torch.float64).to(torch.float32).decoder.layers[0].conv.bias.zero_(),
        ):
            change()
            second = decode()
            assert not torch.equal(second, first)
            assert torch.allclose(second, decode_whole(codec, latents)[0], atol=1e-3 * float(second.abs().max()))
            first = second


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
    expected, size = [], first
    while (left := frames - sum(expected)) > 0:
        expected.append(min(size, left))
        size = min(2 * size, 10)
    assert [len(waveform) / hop_length for waveform in waveforms] == expected
    if frames > 0:
        whole = decode_whole(codec, latents)[0, prompt_frames * hop_length :]
        torch.testing.assert_close(torch.cat(waveforms), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_chunkers_that_push_side_by_side_give_what_each_gives_alone(pad_mode, monkeypatch):
    codec = make_codec(pad_mode=pad_mode, sampling_rate=24 * 50)
    starts, lengths = [0, 0, 0, 4, 13], [31, 12, 30, 40, 3]
    rows = [make_latents(length) for length in lengths]
    expected, alone = [], [SledAudioChunker(codec) for _ in rows]
    for chunker, row in zip(alone, rows, strict=True):
        expected.append([waveform for frame in row.split(1, dim=1) for waveform in chunker.push(frame)])
        expected[-1] += chunker.finish()
    num_decoded = []
    decode = SledStreamingDecoder.decode

    def count(self, latents):
        num_decoded.append(self.batch_size)
        return decode(self, latents)

    monkeypatch.setattr(SledStreamingDecoder, "decode", count)
    chunkers = [SledAudioChunker(codec) for _ in rows]
    actual: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(60):
        going = [index for index, row in enumerate(rows) if 0 <= step - starts[index] < row.shape[1]]
        frames = [rows[index][:, step - starts[index]][:, None] for index in going]
        pushed = SledAudioChunker.push_each([chunkers[index] for index in going], frames)
        for index, waveforms in zip(going, pushed, strict=True):
            actual[index] += waveforms
    for waveforms, chunker in zip(actual, chunkers, strict=True):
        waveforms += chunker.finish()
    for one, other in zip(actual, expected, strict=True):
        assert [len(waveform) for waveform in one] == [len(waveform) for waveform in other]
        torch.testing.assert_close(torch.cat(one), torch.cat(other), atol=1e-5, rtol=0)
    # The first three start together.
    assert max(num_decoded) == 3


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
                embeddings = codec.encoder(padded[None, None])[0].t().double()
            # The nearest entry, or one as near within what float32 resolves.
            distances = torch.cdist(embeddings, codec.quantizer.layers[0].codebook.embed.double()) ** 2
            assert (distances.gather(1, row[0][:, None])[:, 0] - distances.amin(dim=1)).max() < 5e-6
            assert len(waveform) < 1000 or len(row[0].unique()) > 1


def fill_codebooks(codec: EncodecModel) -> EncodecModel:
    """Codebooks of what the encoder makes of noise, so that codes differ from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in codec.quantizer.layers:
            embed = layer.codebook.embed
            noise = torch.randn(1, 1, len(embed) * codec.config.hop_length, generator=generator)
            embed.copy_(codec.encoder(noise)[0].t())
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


# Precision


def read_flags() -> dict[str, object]:
    """What a process has set for all of its threads."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "enabled": cudnn.enabled,
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "convolutions in TF32": cudnn.allow_tf32,
        "products in TF32": matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "threads": torch.get_num_threads(),
    }


@pytest.mark.slow
def test_threads_that_decode_change_nothing_for_others():
    codec = fill_codebooks(make_codec())
    latents, waveforms = list(make_latents(80, batch_size=2)), [torch.randn(1900), torch.randn(400)]
    before, seen, rounds = read_flags(), [], []
    is_over = threading.Event()

    def work() -> None:
        for _ in range(100):
            decode_latents(codec, latents)
            codes = encode_codes(codec, waveforms, 3.0)
            decode_codes(codec, codes[0][None])
            SledStreamingDecoder(codec).decode(latents[0][None])
        rounds.append(100)

    def watch() -> None:
        while not is_over.is_set():
            seen.append(read_flags())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers, watcher = [threading.Thread(target=work) for _ in range(3)], threading.Thread(target=watch)
        for thread in (watcher, *workers):
            thread.start()
        for thread in workers:
            thread.join()
        is_over.set()
        watcher.join()
    finally:
        sys.setswitchinterval(interval)
    assert rounds == [100] * 3 and len(seen) > 1000
    assert all(flags == before for flags in (*seen, read_flags()))


@pytest.mark.slow
def test_a_precision_that_the_user_has_chosen_is_left_alone():
    script = (
        "import torch; from transformers import EncodecConfig, EncodecModel\n"
        "from transformers_sled.codec_sled import SledStreamingDecoder, decode_codes, decode_latents, encode_codes\n"
        "torch.backends.fp32_precision = 'tf32'\n"
        "codec = EncodecModel(EncodecConfig(num_filters=2, codebook_size=8)).eval()\n"
        "codes = encode_codes(codec, [torch.randn(4000)], 6.0)\n"
        "latents = decode_codes(codec, codes[0][None])\n"
        "decode_latents(codec, list(latents)), SledStreamingDecoder(codec).decode(latents)\n"
        "print(torch.backends.fp32_precision)"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.strip() == "tf32"


@pytest.mark.gpu
def test_a_gpu_computes_in_float32_too():
    expected = load_file(GOLDEN / "expected.safetensors")
    codec = EncodecModel.from_pretrained(GOLDEN / "codec").cuda()
    codes = encode_codes(codec, list(expected["codec.waveform"]), 6.0)
    for row, golden in zip(codes, expected["codec.codes"], strict=True):
        assert torch.equal(row.cpu(), golden)
    waveform = torch.stack(decode_latents(codec, list(expected["codec.latents"]))).cpu()
    torch.testing.assert_close(waveform, expected["codec.decoded"].flatten(1), atol=1e-4, rtol=0)
    streamed = SledStreamingDecoder(codec, len(waveform)).decode(expected["codec.latents"]).cpu()
    torch.testing.assert_close(streamed, waveform, atol=1e-5, rtol=0)


def test_float32_under_autocast_and_without_gradients():
    codec = fill_codebooks(make_codec())
    latents, waveforms = list(make_latents(70, batch_size=2).requires_grad_()), [torch.randn(2000)]
    expected = decode_latents(codec, latents), encode_codes(codec, waveforms, 3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decode_latents(codec, latents), encode_codes(codec, waveforms, 3.0)
        looked_up = decode_codes(codec, found[1][0][None])
    assert looked_up.dtype == torch.float32
    for row, other in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        assert torch.equal(row, other) and not other.requires_grad


@pytest.mark.parametrize("kind", [SledCodec, EncodecModel])
def test_a_codec_built_under_another_default_dtype(kind):
    torch.set_default_dtype(torch.bfloat16)
    try:
        codec = kind(make_codec().config)
    finally:
        torch.set_default_dtype(torch.float32)
    if kind is SledCodec:
        assert codec.dtype == torch.float32 and decode_latents(codec, [make_latents(9)[0]])[0].isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"float32.*bfloat16"):
            decode_latents(codec, [make_latents(9)[0]])


class TensorSizes(TorchDispatchMode):
    """Bytes of the tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = output if isinstance(output, list | tuple) else [output]
        self.sizes |= {tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor)}
        return output


@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_memory_is_that_of_a_block(kind):
    codec = fill_codebooks(make_codec(num_filters=4))
    largest = []
    for frames in (150, 3000):
        samples, latents = frames * codec.config.hop_length, make_latents(frames)[0]
        waveform = torch.randn(samples)
        with TensorSizes() as mode:
            decode_latents(codec, [latents]) if kind == "decode" else encode_codes(codec, [waveform], 3.0)
        # What goes in and what comes out are as long as they are.
        largest.append(max(mode.sizes - {4 * samples, 4 * latents.numel(), 8 * frames}))
    assert largest[0] == largest[1]


# Codecs that cannot be used


def test_bad_codecs_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`codec`.*Linear"):
        copy_codec(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"`codec`.*float32.*bfloat16"):
        load_codec(EncodecModel(make_codec().config).bfloat16())
    for value in (None, 3, ["facebook/encodec_24khz"]):
        with pytest.raises(ValueError, match=r"`codec`.*" + type(value).__name__):
            load_codec(value)
    with pytest.raises(OSError, match="could not be loaded"):
        load_codec(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"`codec`.*`config\.json`"):
        load_codec(tmp_path)
    with pytest.raises(ValueError, match="`use_causal_conv`"):
        SledCodec(make_codec(use_causal_conv=False).config)


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (decode_latents, [torch.zeros(3, 7)], "latents"),
        (decode_latents, [torch.zeros(1, 3, 8)], "latents"),
        (decode_latents, [torch.zeros(3, 8, dtype=torch.long)], "latents"),
        (decode_latents, [[0.0] * 8], "latents"),
        (decode_codes, torch.zeros(8, 3, dtype=torch.long), "audio_codes"),
        (decode_codes, torch.zeros(1, 99, 3, dtype=torch.long), "audio_codes"),
        (decode_codes, torch.zeros(1, 8, 3), "audio_codes"),
        (decode_codes, torch.full((1, 8, 3), 8), "audio_codes"),
        (decode_codes, torch.full((1, 8, 3), -1), "audio_codes"),
        (lambda codec, rows: encode_codes(codec, rows, 3.0), [torch.zeros(1, 30)], "waveforms"),
        (lambda codec, rows: encode_codes(codec, rows, 3.0), [torch.zeros(30, dtype=torch.int16)], "waveforms"),
        (lambda codec, rows: encode_codes(codec, rows, 5.0), [torch.zeros(30)], "bandwidth"),
    ],
)
def test_bad_input_is_named(function, argument, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        function(make_codec(), argument)


@pytest.mark.parametrize("name", ["SledStreamingDecoder", "SledAudioChunker", "encode_codes"])
def test_documented_examples_run(name):
    examples = doctest.DocTestFinder(recurse=False).find(getattr(codec_sled, name), name, module=codec_sled)
    assert len(examples) == 1 and examples[0].examples
    assert doctest.DocTestRunner().run(examples[0]).failed == 0
