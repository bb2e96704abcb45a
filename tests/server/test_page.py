"""The page in a real browser. It needs `playwright` and Debian's chromium."""

import shutil

import httpx
import numpy as np
import pytest
import soundfile


pytestmark = pytest.mark.slow

RATE = 24_000
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}

# Records what goes to the speakers, in the audio thread, with the silence between.
RECORDER = """
(() => {
  const code = `registerProcessor("recorder", class extends AudioWorkletProcessor {
    process(inputs) { if (inputs[0][0]) this.port.postMessage(inputs[0][0].slice()); return true; }
  })`;
  window.recorded = [];
  const connect = AudioNode.prototype.connect;
  AudioNode.prototype.connect = function (target, ...rest) {
    if (target instanceof AudioDestinationNode && this instanceof AudioWorkletNode) {
      const context = this.context;
      context.recorderReady ??= context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
      context.recorderReady.then(() => {
        const recorder = new AudioWorkletNode(context, "recorder");
        recorder.port.onmessage = ({data}) => window.recorded.push(...data);
        connect.call(this, recorder);
        connect.call(recorder, context.destination);
      });
    }
    return connect.call(this, target, ...rest);
  };
})();
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    microphone = tmp_path_factory.mktemp("microphone") / "voice.wav"
    time = np.arange(RATE * 4) / RATE
    soundfile.write(microphone, 0.3 * np.sin(2 * np.pi * 200 * time) * np.sin(2 * np.pi * 3 * time), RATE)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox",
                "--autoplay-policy=no-user-gesture-required",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={microphone}",
            ],
        )
        yield browser
        browser.close()


def open_page(browser, service, size="desktop", **kwargs):
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, bypass_csp=True, accept_downloads=True, **kwargs
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url) if is_foreign(request.url, service) else None)
    page.add_init_script(RECORDER)
    page.goto(service.url)
    page.wait_for_selector("#voice option", state="attached")
    return page


def is_foreign(url, service) -> bool:
    return not url.startswith((service.url, "data:", "blob:"))


def wait_for_status(page, status):
    page.wait_for_function("status => document.getElementById('status').textContent === status", arg=status)


def get_recorded(page) -> np.ndarray:
    page.wait_for_timeout(300)
    return np.array(page.evaluate("window.recorded"), np.float32)


def get_longest_gap(samples: np.ndarray) -> float:
    """Seconds of the longest run of exact zeros between the first sound and the last."""
    sounding = np.flatnonzero(samples)
    return float(np.diff(sounding).max() - 1) / RATE


def find_speech(recorded: np.ndarray, speech: np.ndarray) -> int:
    """Where in a recording a speech starts, which is somewhere in it without a gap."""
    start = int(np.flatnonzero(np.abs(speech) > 0.05)[0])
    piece = speech[start : start + 64]
    windows = np.lib.stride_tricks.sliding_window_view(recorded, 64)
    return int(np.abs(windows - piece).max(axis=1).argmin()) - start


@pytest.mark.parametrize("size", SIZES)
def test_text_is_spoken_without_a_gap_and_saved(browser, service, size, tmp_path):
    page = open_page(browser, service, size)
    page.fill("#text", "The dog barked all night.")
    page.select_option("#voice", "bf_emma")
    page.fill("#seed", "3")
    page.keyboard.press("Control+Enter")
    wait_for_status(page, "Done.")
    assert page.text_content("#spoken mark") == "The dog barked all night."
    assert float(page.text_content("#first-audio").split()[0]) > 0
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "speech.wav")
    speech, rate = soundfile.read(tmp_path / "speech.wav", dtype="float32")
    assert rate == RATE
    request = {"model": "tts-1", "voice": "bf_emma", "input": "The dog barked all night.", "response_format": "pcm"}
    answer = httpx.post(f"{service.url}/v1/audio/speech", json={**request, "seed": 3}, timeout=60)
    expected = np.frombuffer(answer.content, "<i2")
    np.testing.assert_array_equal(np.rint(speech * 32768).astype(int), expected)
    recorded = get_recorded(page)
    start = find_speech(recorded, expected / 32767)
    heard = recorded[start : start + len(expected)]
    np.testing.assert_allclose(heard, expected[: len(heard)] / 32767, atol=1e-4)
    assert len(heard) >= len(expected) - 256
    assert get_longest_gap(heard) < max(0.02, get_longest_gap(expected / 32767) + 0.001)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "It must not scroll sideways."
    assert page.problems == []


def test_it_stops(browser, service):
    page = open_page(browser, service)
    page.fill("#text", "The dog barked all night, and nobody slept. " * 10)
    page.click("#speak")
    wait_for_status(page, "Speaking.")
    page.keyboard.press("Escape")
    wait_for_status(page, "Stopped.")
    service.wait_until(lambda: service.service.num_speeches == 0, 5)
    num_recorded = len(get_recorded(page))
    assert not get_recorded(page)[num_recorded:].any()
    assert page.is_enabled("#speak") and page.is_disabled("#stop")
    assert page.problems == []


def test_typing_is_spoken(browser, service):
    page = open_page(browser, service)
    page.check("input[value=typing]")
    page.click("#speak")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Type')")
    page.type("#text", "The dog barked all night, and nobody slept.", delay=40)
    page.keyboard.press("Enter")
    wait_for_status(page, "Done.")
    assert len(np.flatnonzero(get_recorded(page))) > RATE
    assert page.problems == []


def test_a_voice_is_cloned_after_consent(browser, service, tmp_path):
    page = open_page(browser, service)
    page.click("summary")
    assert page.is_disabled("#transcript")
    page.check("#agreed")
    page.click("[data-records=consent-file]")
    page.wait_for_timeout(2_000)
    page.click("[data-records=consent-file]")
    page.wait_for_function("document.getElementById('consent-file').files.length === 1")
    time = np.arange(RATE * 2) / RATE
    soundfile.write(tmp_path / "sample.wav", 0.3 * np.sin(2 * np.pi * 180 * time), RATE)
    page.set_input_files("#sample-file", tmp_path / "sample.wav")
    page.fill("#transcript", "Two plus two.")
    page.fill("#voice-name", "Mine")
    page.click("text=Make the voice")
    page.wait_for_function("document.getElementById('clone-status').textContent === 'The voice is in the list.'")
    assert page.eval_on_selector("#voice", "field => field.selectedOptions[0].textContent") == "Mine"
    page.fill("#text", "No.")
    page.fill("#seed", "1")
    page.click("#speak")
    wait_for_status(page, "Done.")
    assert page.problems == []


def test_errors_and_keys_are_told(browser, service_with_keys):
    service = service_with_keys
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(service.url)
    page.wait_for_selector("#key-form:not([hidden])")
    page.fill("#key", "wrong")
    page.click("#key-form button")
    wait_for_status(page, "The API key is wrong.")
    page.fill("#key", "first-key")
    page.click("#key-form button")
    page.wait_for_selector("#voice option", state="attached")
    page.fill("#text", "  ")
    page.click("#speak")
    wait_for_status(page, "Write some text first.")
    page.fill("#text", "No.")
    page.fill("#seed", "1")
    page.click("#speak")
    wait_for_status(page, "Done.")


def test_everything_can_be_reached_by_keyboard_and_has_a_name(browser, service):
    page = open_page(browser, service)
    page.click("summary")
    page.check("#agreed")
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
            )
        )
    for name in (
        "text",
        "voice",
        "seed",
        "guidance",
        "speak",
        "consent-file",
        "sample-file",
        "transcript",
        "voice-name",
    ):
        assert name in reached, name
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, textarea")]
           .filter((field) => !field.labels?.length && !field.ariaLabel).map((field) => field.id)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, service, scheme):
    page = open_page(browser, service, color_scheme=scheme)
    colors = page.evaluate(
        """["body", "button.primary", "#stop", "a", "textarea"].map((name) => {
             const style = getComputedStyle(document.querySelector(name));
             let back = document.querySelector(name);
             while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
             return [style.color, getComputedStyle(back).backgroundColor];
           })"""
    )
    for text, back in colors:
        bright, dim = sorted((get_luminance(text), get_luminance(back)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, back)


def get_luminance(color: str) -> float:
    values = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_service_that_makes_no_voices_offers_none(browser, make_service):
    with make_service(cloning=False) as service:
        page = open_page(browser, service)
        page.wait_for_selector("#clone", state="hidden")
