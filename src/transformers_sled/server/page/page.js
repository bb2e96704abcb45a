const SAMPLING_RATE = 24000;
// Characters that a second of English speech has, where nothing better is known yet.
const CHARACTERS_PER_SECOND = 14;
const MIN_BUFFERED_SECONDS = 0.25;

const element = (id) => document.getElementById(id);
let apiKey = "";
let context = null;
let current = null;

/** Speech that is being received and played. */
class Speech {
  constructor(getText) {
    this.getText = getText;
    this.controller = new AbortController();
    this.startTime = null;
    this.firstAudioTime = null;
    this.lastAudioTime = null;
    this.samples = 0;
    this.pieces = [];
    this.isComplete = false;
    this.isPlaying = false;
    this.ended = new Promise((resolve) => { this.end = resolve; });
  }

  async open() {
    context ??= new AudioContext({ sampleRate: SAMPLING_RATE });
    context.playbackModule ??= context.audioWorklet.addModule("page/playback.js");
    await context.playbackModule;
    await context.resume();
    this.node = new AudioWorkletNode(context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.node.port.onmessage = ({ data }) => this.show(data);
    this.node.connect(context.destination);
  }

  get duration() { return this.samples / SAMPLING_RATE; }

  /** Takes the next 16-bit samples. */
  push(samples) {
    if (!samples.length) return;
    this.lastAudioTime = performance.now();
    this.firstAudioTime ??= this.lastAudioTime;
    this.samples += samples.length;
    const waveform = Float32Array.from(samples, (sample) => sample / 32767);
    this.node.port.postMessage({ waveform }, [waveform.buffer]);
    this.start();
  }

  /** Starts to play when what is there, and what will have come by then, lasts to the end. */
  start() {
    if (this.isPlaying) return;
    const elapsed = (performance.now() - this.startTime) / 1000;
    const speed = this.duration / elapsed;
    // Slow speakers and pauses take more than most texts do.
    const longest = 0.5 + (1.5 * this.getText().length) / CHARACTERS_PER_SECOND;
    const needed = MIN_BUFFERED_SECONDS + Math.max(0, 1 - speed) * Math.max(0, longest - this.duration);
    if (this.isComplete || this.duration >= needed) {
      this.isPlaying = true;
      this.node.port.postMessage({ start: true });
      say("Speaking.");
    }
  }

  complete() {
    this.isComplete = true;
    this.start();
    this.node.port.postMessage({ complete: true });
  }

  stop() {
    this.isStopped = true;
    this.controller.abort();
    this.isPlaying = true;
    this.node.port.postMessage({ start: true, stop: true });
  }

  show({ played, waited, isOver }) {
    this.waited = waited;
    showSpoken(this.getText(), played / SAMPLING_RATE, this);
    showFigures(this);
    if (isOver) {
      this.node.disconnect();
      this.end();
    }
  }
}

function say(message) { element("status").textContent = message; }

function showSpoken(text, seconds, speech) {
  const expected = speech.isComplete ? speech.duration : Math.max(speech.duration, text.length / CHARACTERS_PER_SECOND);
  let end = expected ? Math.round((text.length * Math.min(seconds, expected)) / expected) : 0;
  while (end > 0 && end < text.length && !/\s/.test(text[end])) end += 1;
  const lit = document.createElement("mark");
  lit.textContent = text.slice(0, end);
  element("spoken").replaceChildren(lit, text.slice(end));
}

function showFigures(speech) {
  if (speech.firstAudioTime === null) return;
  element("figures").hidden = false;
  element("first-audio").textContent = `${((speech.firstAudioTime - speech.startTime) / 1000).toFixed(2)} s`;
  element("real-time-factor").textContent =
    ((speech.lastAudioTime - speech.startTime) / 1000 / speech.duration).toFixed(2);
  element("duration").textContent = `${speech.duration.toFixed(2)} s`;
}

function getHeaders() { return apiKey ? { authorization: `Bearer ${apiKey}` } : {}; }

/** Asks the service. Throws what it says is wrong. */
async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...getHeaders(), ...options.headers } });
  if (response.ok) return response;
  if (response.status === 401) element("key-form").hidden = false;
  let message = `The service answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* It is not the service that answered. */ }
  throw new Error(message);
}

function getOptions() {
  const options = {};
  if (element("seed").value) options.seed = Number(element("seed").value);
  if (element("guidance").value) options.guidance_scale = Number(element("guidance").value);
  return options;
}

/** Reads a WAV file while it comes: its header, then its samples. */
class WavReader {
  constructor() { this.bytes = new Uint8Array(); this.header = null; }

  take(bytes) {
    const joined = new Uint8Array(this.bytes.length + bytes.length);
    joined.set(this.bytes);
    joined.set(bytes, this.bytes.length);
    this.bytes = joined;
    if (!this.header) {
      const start = findData(joined);
      if (start === null) return new Int16Array();
      this.header = joined.slice(0, start);
      this.bytes = joined.slice(start);
    }
    const count = this.bytes.length >> 1;
    const samples = new Int16Array(this.bytes.slice(0, 2 * count).buffer);
    this.bytes = this.bytes.slice(2 * count);
    return samples;
  }
}

/** Where the samples of a WAV file start, once that is there. */
function findData(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let position = 12;
  while (position + 8 <= bytes.length) {
    const name = String.fromCharCode(...bytes.subarray(position, position + 4));
    if (name === "data") return position + 8;
    const size = view.getUint32(position + 4, true);
    position += 8 + size + (size % 2);
  }
  return null;
}

async function speakWhole() {
  const text = element("text").value;
  const speech = new Speech(() => text);
  current = speech;
  const reader = new WavReader();
  await speech.open();
  speech.startTime = performance.now();
  const body = JSON.stringify({
    model: "tts-1", input: text, voice: element("voice").value, response_format: "wav", ...getOptions(),
  });
  const response = await ask("v1/audio/speech", {
    method: "POST", body, headers: { "content-type": "application/json" }, signal: speech.controller.signal,
  });
  for await (const bytes of iterate(response.body)) {
    const samples = reader.take(bytes);
    speech.pieces.push(samples);
    speech.push(samples);
  }
  if (!speech.samples) throw new Error("The speech ended before it began. Another seed may help.");
  speech.complete();
  offerDownload(reader.header, speech.pieces);
  await speech.ended;
}

async function* iterate(stream) {
  const reader = stream.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Lets the file be saved as it came, with the sizes that a stream does not know. */
function offerDownload(header, pieces) {
  const view = new DataView(header.buffer);
  const size = pieces.reduce((sum, piece) => sum + piece.byteLength, 0);
  view.setUint32(4, header.length - 8 + size, true);
  view.setUint32(header.length - 4, size, true);
  const link = element("download");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([header, ...pieces], { type: "audio/wav" }));
  link.download = "speech.wav";
  link.hidden = false;
}

/** Speaks while the text is being typed: whole words go out as they are there. */
async function speakTyped() {
  const field = element("text");
  field.value = "";
  field.focus();
  const speech = new Speech(() => field.value);
  current = speech;
  await speech.open();
  const query = new URLSearchParams({ model: element("voice").value, encoding: "linear16", sample_rate: SAMPLING_RATE });
  if (element("seed").value) query.set("seed", element("seed").value);
  const url = new URL(`v1/speak?${query}`, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url, apiKey ? ["token", apiKey] : []);
  socket.binaryType = "arraybuffer";
  let sent = 0;
  const send = (message) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message));
  const sendWords = (isLast) => {
    const end = isLast ? field.value.length : field.value.search(/\S*$/);
    if (end > sent) {
      speech.startTime ??= performance.now();
      send({ type: "Speak", text: field.value.slice(sent, end) });
      sent = end;
    }
  };
  const onInput = () => sendWords(false);
  const onKey = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    field.readOnly = true;
    sendWords(true);
    send({ type: "Close" });
  };
  speech.controller.signal.addEventListener("abort", () => { send({ type: "Clear" }); socket.close(); });
  field.addEventListener("input", onInput);
  field.addEventListener("keydown", onKey);
  say("Type; Enter ends the text.");
  try {
    await new Promise((resolve, reject) => {
      socket.onmessage = ({ data }) => {
        if (typeof data !== "string") speech.push(new Int16Array(data));
        else if (JSON.parse(data).type === "Error") reject(new Error(JSON.parse(data).description));
      };
      socket.onclose = ({ code }) => (code === 1000 || speech.isStopped ? resolve() : reject(new Error("The connection broke.")));
      socket.onerror = () => reject(new Error("The connection could not be made."));
    });
    if (speech.samples) {
      speech.complete();
      await speech.ended;
    }
  } finally {
    socket.close();
    field.readOnly = false;
    field.removeEventListener("input", onInput);
    field.removeEventListener("keydown", onKey);
  }
}

async function speak() {
  if (current) return;
  const isTyping = document.querySelector("input[name=mode]:checked").value === "typing";
  if (!isTyping && !element("text").value.trim()) {
    say("Write some text first.");
    element("text").focus();
    return;
  }
  element("speak").disabled = true;
  element("stop").disabled = false;
  element("download").hidden = true;
  element("figures").hidden = true;
  say("Preparing.");
  try {
    await (isTyping ? speakTyped() : speakWhole());
    say(current.isStopped ? "Stopped." : "Done.");
  } catch (error) {
    const isStopped = current.isStopped;
    if (!isStopped) current.node && current.stop();
    say(isStopped ? "Stopped." : error.message);
  }
  current = null;
  element("speak").disabled = false;
  element("stop").disabled = true;
}

async function listVoices(chosen) {
  const { voices } = await (await ask("v1/audio/voices")).json();
  element("voice").replaceChildren(...voices.map(({ id, name }) => new Option(name, id, false, id === chosen)));
}

/** Shows how to clone a voice where the service lets one. */
async function showCloning() {
  const response = await fetch("v1/audio/voice_consents", { headers: getHeaders() });
  element("clone").hidden = response.status === 403;
}

/** Records from the microphone into a file field. */
async function record(button) {
  if (button.recorder) {
    button.recorder.stop();
    return;
  }
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = ({ data }) => pieces.push(data);
  recorder.onstop = () => {
    for (const track of stream.getTracks()) track.stop();
    const files = new DataTransfer();
    files.items.add(new File(pieces, "recording.webm", { type: recorder.mimeType }));
    element(button.dataset.records).files = files.files;
    button.recorder = null;
    button.textContent = "Record again";
  };
  recorder.start();
  button.recorder = recorder;
  button.textContent = "Stop recording";
}

async function makeVoice() {
  const consentForm = new FormData();
  consentForm.set("name", element("voice-name").value);
  consentForm.set("language", navigator.language);
  consentForm.set("recording", element("consent-file").files[0]);
  const consent = await (await ask("v1/audio/voice_consents", { method: "POST", body: consentForm })).json();
  const voiceForm = new FormData();
  voiceForm.set("name", element("voice-name").value);
  voiceForm.set("consent", consent.id);
  voiceForm.set("transcript", element("transcript").value);
  voiceForm.set("audio_sample", element("sample-file").files[0]);
  const voice = await (await ask("v1/audio/voices", { method: "POST", body: voiceForm })).json();
  await listVoices(voice.id);
}

/** Shows the error of something that may fail. */
function showing(id, action) {
  return async (event) => {
    event.preventDefault();
    const button = event.submitter;
    if (button) button.disabled = true;
    try {
      await action(event);
    } catch (error) {
      element(id).textContent = error.message;
    }
    if (button) button.disabled = false;
  };
}

element("speech-form").addEventListener("submit", (event) => { event.preventDefault(); speak(); });
element("stop").addEventListener("click", () => current?.stop());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") current?.stop();
  if (event.key === "Enter" && event.ctrlKey) speak();
});
element("key-form").addEventListener("submit", showing("status", async () => {
  apiKey = element("key").value;
  await listVoices();
  await showCloning();
  element("key-form").hidden = true;
  say("");
}));
element("agreed").addEventListener("change", () => { element("clone-fields").disabled = !element("agreed").checked; });
for (const button of document.querySelectorAll("[data-records]")) {
  button.addEventListener("click", showing("clone-status", () => record(button)));
}
element("clone-form").addEventListener("submit", showing("clone-status", async () => {
  element("clone-status").textContent = "Making the voice.";
  await makeVoice();
  element("clone-form").reset();
  element("clone-fields").disabled = true;
  element("clone-status").textContent = "The voice is in the list.";
}));
/** Tells whether speech is watermarked, and whether the service hears by itself what a sample says. */
async function showService() {
  const { watermark, recognizer } = await (await fetch("ready")).json();
  element("watermark").textContent = watermark ? "It is watermarked." : "It is not watermarked.";
  element("transcript").required = !recognizer;
  element("transcript-note").hidden = !recognizer;
}

showService().catch(() => {});
listVoices().then(showCloning).catch((error) => say(error.message));
