"""The audio streamer: what a consumer in another thread gets of `generate`."""

import gc
import itertools
import queue
import threading
import time
import weakref

import pytest
import torch

from small_codec import decode_whole, live_tensor_bytes, make_codec, make_latents
from transformers_sled import SledAudioStreamer


def generate(streamer, frames, error=None, stopped=None):
    """What a model's `generate` does with a streamer: frame by frame, until the end, an error, or nobody listens."""
    for frame in frames:
        if streamer.closed:
            stopped.set()
            return
        streamer.put(frame)
    streamer.end(error)


def start_thread(*args, **kwargs) -> threading.Thread:
    thread = threading.Thread(target=generate, args=args, kwargs=kwargs, daemon=True)
    thread.start()
    return thread


class ModelWithCodec(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)
        self.codec = make_codec()


@pytest.mark.parametrize("make_model", [make_codec, ModelWithCodec])
def test_streamer_gives_the_whole_speech(make_model):
    latents = make_latents(90)
    streamer = SledAudioStreamer(make_model(), chunk_duration=0.02, timeout=60)
    thread = start_thread(streamer, latents.split(1, dim=1))
    waveforms = list(streamer)
    thread.join()
    assert all(waveform.ndim == 1 and waveform.dtype == torch.float32 for waveform in waveforms)
    frames = [len(waveform) / 24 for waveform in waveforms]
    assert frames == [7, 14, 20, 20, 20, 9]
    torch.testing.assert_close(torch.cat(waveforms), decode_whole(make_codec(), latents)[0], atol=1e-5, rtol=0)
    assert list(streamer) == []


def test_streamer_by_next():
    streamer = SledAudioStreamer(make_codec())
    latents = make_latents(9)
    generate(streamer, latents.split(1, dim=1))
    waveforms = [next(streamer), next(streamer)]
    torch.testing.assert_close(torch.cat(waveforms), decode_whole(make_codec(), latents)[0], atol=1e-5, rtol=0)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(streamer)


def test_streamer_cuts_the_prompt_off():
    latents = make_latents(50)
    streamer = SledAudioStreamer(make_codec())
    streamer.put(latents[:, :20], is_prompt=True)
    generate(streamer, latents[:, 20:].split(1, dim=1))
    expected = decode_whole(make_codec(), latents)[0, 20 * 24 :]
    torch.testing.assert_close(torch.cat(list(streamer)), expected, atol=1e-5, rtol=0)


def test_streamer_raises_the_error_of_the_generation():
    streamer = SledAudioStreamer(make_codec())
    start_thread(streamer, make_latents(8).split(1, dim=1), error=KeyError("the source failed"))
    with pytest.raises(KeyError, match="the source failed"):
        list(streamer)
    assert list(streamer) == []


def test_streamer_delivers_audio_before_the_error():
    streamer = SledAudioStreamer(make_codec())
    generate(streamer, make_latents(8).split(1, dim=1), error=RuntimeError("out of memory"))
    assert len(next(streamer)) == 7 * 24
    with pytest.raises(RuntimeError, match="out of memory"):
        next(streamer)
    with pytest.raises(StopIteration):
        next(streamer)


def consume_one_and_leave(streamer):
    for _ in streamer:
        break


def consume_and_fail(streamer):
    for _ in streamer:
        raise OSError("the sound card is gone")


def drop_iterator_unused(streamer):
    iter(streamer)


@pytest.mark.parametrize(
    "leave",
    [consume_one_and_leave, consume_and_fail, drop_iterator_unused, SledAudioStreamer.close],
    ids=["break", "error", "drop", "close"],
)
def test_generation_stops_when_nobody_listens(leave):
    streamer = SledAudioStreamer(make_codec())
    stopped = threading.Event()
    thread = start_thread(streamer, itertools.repeat(make_latents(1)), stopped=stopped)
    try:
        leave(streamer)
    except OSError:
        gc.collect()
    assert stopped.wait(timeout=10)
    thread.join()
    streamer.put(make_latents(1))
    streamer.end()
    assert list(streamer) == []


def test_close_wakes_a_waiting_consumer():
    streamer = SledAudioStreamer(make_codec())
    received: list = []
    consumer = threading.Thread(target=lambda: received.extend(streamer), daemon=True)
    consumer.start()
    time.sleep(0.05)
    streamer.close()
    consumer.join(timeout=10)
    assert not consumer.is_alive()
    assert received == []


def test_streamer_timeout():
    streamer = SledAudioStreamer(make_codec(), timeout=0.01)
    with pytest.raises(queue.Empty, match=r"0\.01"):
        list(streamer)
    assert streamer.closed


def test_abandoned_streams_leave_nothing():
    codec = make_codec()
    used = []
    references = []
    for _ in range(60):
        streamer = SledAudioStreamer(codec)
        thread = start_thread(streamer, itertools.repeat(make_latents(1)), stopped=threading.Event())
        consume_one_and_leave(streamer)
        thread.join()
        references.append(weakref.ref(streamer))
        del streamer, thread
        if len(references) % 20 == 0:
            used.append(live_tensor_bytes())
    assert all(reference() is None for reference in references)
    assert set(used) == {used[0]}


def test_bad_streamer_use():
    with pytest.raises(ValueError, match="EncodecModel"):
        SledAudioStreamer(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="chunk_duration"):
        SledAudioStreamer(make_codec(), chunk_duration=0)
    with pytest.raises(ValueError, match="timeout"):
        SledAudioStreamer(make_codec(), timeout=-1)
    streamer = SledAudioStreamer(make_codec())
    with pytest.raises(ValueError, match="batch size 1, got 2"):
        streamer.put(make_latents(3, batch_size=2))
    streamer.end()
    with pytest.raises(RuntimeError, match="end"):
        streamer.put(make_latents(1))
