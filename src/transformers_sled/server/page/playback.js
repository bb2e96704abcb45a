// Plays waveforms one after the other. Runs in the audio thread.
class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.waveforms = [];
    this.offset = 0;
    this.played = 0;
    this.waited = 0;
    this.isStarted = false;
    this.isComplete = false;
    this.port.onmessage = ({ data }) => {
      if (data.waveform) this.waveforms.push(data.waveform);
      if (data.start) this.isStarted = true;
      if (data.complete) this.isComplete = true;
      if (data.stop) {
        this.waveforms = [];
        this.offset = 0;
        this.isComplete = true;
      }
    };
  }

  process(inputs, outputs) {
    const output = outputs[0][0];
    if (!this.isStarted) return true;
    let filled = 0;
    while (filled < output.length && this.waveforms.length) {
      const waveform = this.waveforms[0];
      const count = Math.min(output.length - filled, waveform.length - this.offset);
      output.set(waveform.subarray(this.offset, this.offset + count), filled);
      filled += count;
      this.offset += count;
      if (this.offset === waveform.length) {
        this.waveforms.shift();
        this.offset = 0;
      }
    }
    this.played += filled;
    if (filled < output.length && !this.isComplete) this.waited += output.length - filled;
    const isOver = this.isComplete && !this.waveforms.length;
    this.port.postMessage({ played: this.played, waited: this.waited, isOver });
    return !isOver;
  }
}

registerProcessor("playback", Playback);
