"""How the rows of a batch are spoken, without a cluster."""

from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch

from ray_cluster import save_tiny_checkpoints
from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.batch.speaker import PAUSE_SECONDS, BatchSpeaker
from transformers_sled.batch.texts import TextRow


SECONDS = 0.2
ROWS = [
    TextRow("a", "No.", seed=1),
    TextRow("long", "# One\n\nThe dog barked.\n\n...\n\nShe left.", seed=2),
    TextRow("voice", "No.", voice="nobody"),
    TextRow("language", "No.", language="de"),
    TextRow("dots", "..."),
    TextRow("bad", error="`text` must not be empty."),
    TextRow("b", "Two plus two is four.", seed=3),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny_checkpoints(tmp_path_factory.mktemp("checkpoints"))[0]


def make_speaker(checkpoint: str, max_streams: int = 4) -> BatchSpeaker:
    return BatchSpeaker(checkpoint, max_streams, "cpu", "auto", {"max_duration": SECONDS})


@pytest.fixture(scope="module")
def speaker(checkpoint) -> BatchSpeaker:
    return make_speaker(checkpoint)


@pytest.fixture(scope="module")
def spoken(speaker) -> dict[str, dict]:
    return {row["id"]: row for row in speaker.speak("000", ROWS).to_pylist()}


def read(row: dict) -> np.ndarray:
    samples, rate = soundfile.read(BytesIO(row["audio"]["bytes"]), dtype="int16")
    assert rate == 24_000 and len(samples) == round(row["duration"] * rate)
    return samples


def test_a_row_is_what_generate_gives(spoken, checkpoint):
    model, processor = SledForSpeechSynthesis.from_pretrained(checkpoint), SledProcessor.from_pretrained(checkpoint)
    for name, text, seed in (("a", "No.", 1), ("b", "Two plus two is four.", 3)):
        generator = torch.Generator().manual_seed(seed)
        num_frames = round(SECONDS * 75)
        [expected] = model.generate(**processor(text), generator=generator, max_new_tokens=num_frames)
        np.testing.assert_allclose(read(spoken[name]) / 32767, expected.numpy().clip(-1, 1), atol=3e-4)
        assert spoken[name]["frames"] == num_frames and spoken[name]["seed"] == seed
        assert spoken[name]["error"] is None and spoken[name]["model_revision"].startswith("sha256:")


def test_paragraphs_are_one_audio_with_marks(spoken):
    row = spoken["long"]
    starts = [index * (SECONDS + PAUSE_SECONDS) for index in range(3)]
    assert [chapter["title"] for chapter in row["chapters"]] == ["One", "The dog barked.", "She left."]
    assert [chapter["start"] for chapter in row["chapters"]] == pytest.approx(starts)
    samples = read(row)
    assert len(samples) == pytest.approx((starts[-1] + SECONDS) * 24_000)
    pause = samples[round(SECONDS * 24_000) : round(starts[1] * 24_000)]
    assert not pause.any() and samples[round(starts[1] * 24_000) :].any()


@pytest.mark.parametrize(
    ("name", "message"),
    [("voice", "`voice` must be one of"), ("language", "`language` must be 'en'"), ("dots", "nothing to say")],
)
def test_what_the_model_refuses_is_an_error_of_its_row(spoken, name, message):
    assert message in spoken[name]["error"] and spoken[name]["audio"] is None
    assert spoken["bad"]["error"] == "`text` must not be empty."


def test_a_row_does_not_depend_on_the_others(spoken, checkpoint):
    again = make_speaker(checkpoint, max_streams=1).speak("000", ROWS[::-1]).to_pylist()
    for row in again:
        if row["error"] is None:
            # Sums in another order differ in the last bit.
            assert np.abs(read(row).astype(int) - read(spoken[row["id"]])).max() <= 2


def test_the_same_batch_is_the_same_to_the_byte(speaker, checkpoint):
    assert speaker.speak("000", ROWS[:2]) == make_speaker(checkpoint).speak("000", ROWS[:2])


def test_a_row_that_breaks_the_model_spoils_no_other(speaker, spoken, monkeypatch):
    head = speaker._model.generative_head
    forward = head.forward

    def fail(hidden, *args, **kwargs):
        # As memory runs out: only where many are spoken at a time.
        if len(hidden) > 1:
            raise MemoryError("no memory left")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(head, "forward", fail)
    rows = speaker.speak("000", [ROWS[0], ROWS[6]]).to_pylist()
    for row in rows:
        assert np.abs(read(row).astype(int) - read(spoken[row["id"]])).max() <= 2
    monkeypatch.setattr(head, "forward", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("no memory left")))
    assert [row["error"] for row in speaker.speak("000", ROWS[:1]).to_pylist()] == ["no memory left"]
