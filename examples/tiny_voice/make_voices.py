"""
Gives checkpoints voices by name. Of many recordings of a speaker it takes the one after which all of them speak other
sentences best: those in which a recognizer finds the most words, in a voice that is most like the speaker's. Before that counts
that none leaves a text of one word unspoken.

    python examples/tiny_voice/make_voices.py --model voices/sled-tiny-en --also voices/sled-tiny-en-streaming \
        --corpus "corpus/train-*.parquet" --recognizer tiny.en --speakers af_heart am_michael bf_emma bm_george
"""

import argparse
import sys
from pathlib import Path

import jiwer
import numpy as np
import soxr
import torch
from datasets import Audio, load_dataset
from faster_whisper import WhisperModel
from transformers import AutoModelForTextToWaveform, AutoProcessor
from whisper_normalizer.english import EnglishTextNormalizer

from transformers_sled.audio_sled import cut_silence, read_audio
from transformers_sled.training import run_command


sys.path.insert(0, str(Path(__file__).parents[2] / "evaluation" / "metrics" / "speaker_similarity"))
from speaker_encoders import embed, load_speaker_encoder


# Texts that are most easily left out. What is shorter (seconds) or quieter (root mean square) is not spoken.
SHORT_TEXTS = ["Right.", "Never.", "Really?", "Ten.", "Fine.", "Sorry.", "Wait!", "Red."]
MIN_SECONDS, MIN_LEVEL = 0.2, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--also", nargs="*", default=[], help="folders of checkpoints with the same codec, to give them to"
    )
    parser.add_argument("--corpus", required=True, help="parquet files with text, speaker, duration and audio")
    parser.add_argument("--num-validation", type=int, default=128, help="first rows, kept out of training")
    parser.add_argument("--speakers", nargs="+", required=True, help="whose voices to make")
    parser.add_argument("--recognizer", default="tiny.en", help="Whisper, as faster-whisper takes it")
    parser.add_argument(
        "--duration", type=float, nargs=2, default=(2.4, 4.0), help="seconds of a recording, from and to"
    )
    parser.add_argument("--max-silence", type=float, help="seconds of silence to keep at its end (default: all)")
    parser.add_argument("--candidates", type=int, default=12, help="recordings of each speaker to try")
    parser.add_argument("--sentences", type=int, default=16, help="sentences to try each with")
    parser.add_argument("--default", help="the voice that speaks where none is asked for (default: the clearest)")
    arguments = parser.parse_args()

    folders, rates = (arguments.model, *arguments.also), {}
    corpus = load_dataset("parquet", data_files=arguments.corpus, split="train")
    corpus = corpus.cast_column("audio", Audio(decode=False))
    sentences = corpus["text"][: arguments.sentences]
    speakers, durations = corpus["speaker"][:], corpus["duration"][:]
    models = [AutoModelForTextToWaveform.from_pretrained(folder) for folder in folders]
    processors = [AutoProcessor.from_pretrained(folder, default_voice=None) for folder in folders]
    model, processor = models[0], processors[0]
    recognizer = WhisperModel(arguments.recognizer, device="cpu", compute_type="int8", cpu_threads=1)
    encoder, normalize = load_speaker_encoder("resemblyzer"), EnglishTextNormalizer()
    random, rate = np.random.default_rng(0), processor.sampling_rate

    def speak(voice: dict, texts: list[str]) -> list[torch.Tensor]:
        """Texts spoken in a voice by every checkpoint."""
        return [
            audio
            for model, processor in zip(models, processors, strict=True)
            for audio in model.generate(**processor(texts, **voice), generator=torch.Generator().manual_seed(0))
        ]

    def score(voice: dict, likeness: np.ndarray, texts: list[str]) -> tuple[float, float]:
        """Word error rate, and mean similarity to the speaker, of texts spoken in a voice by all checkpoints."""
        heard, similarities = [], []
        for audio in speak(voice, texts):
            embedding = embed(encoder, audio.numpy(), rate) if len(audio) else None
            similarities.append(0.0 if embedding is None else float(embedding @ likeness))
            segments, _ = recognizer.transcribe(
                soxr.resample(audio.numpy(), rate, 16_000), language="en", beam_size=1, temperature=0.0
            )
            heard.append(normalize(" ".join(segment.text for segment in segments)))
        return jiwer.wer([normalize(text) for text in texts] * len(models), heard), float(np.mean(similarities))

    def count_unspoken(voice: dict) -> int:
        """How many short texts are not spoken in a voice, by all checkpoints."""
        speech = speak(voice, SHORT_TEXTS)
        return sum(len(audio) < MIN_SECONDS * rate or audio.square().mean().sqrt() < MIN_LEVEL for audio in speech)

    for speaker in arguments.speakers:
        first, last = arguments.duration
        rows = [
            row
            for row in range(arguments.num_validation, len(speakers))
            if speakers[row] == speaker and first <= durations[row] <= last
        ]
        if len(rows) < arguments.candidates:
            raise ValueError(f"--speakers {speaker} has {len(rows)} recordings of such a length")
        rows = random.permutation(rows)[: arguments.candidates].tolist()
        recordings = [read_audio(corpus[row]["audio"], target_rate=rate) for row in rows]
        if arguments.max_silence is not None:
            recordings = [cut_silence(recording, rate, arguments.max_silence) for recording in recordings]
        likeness = np.mean([embed(encoder, recording, rate) for recording in recordings], axis=0)
        likeness /= np.linalg.norm(likeness)
        voices = []
        for row, recording in zip(rows, recordings, strict=True):
            text = corpus[row]["text"]
            values = processor("a", prompt_text=text, prompt_audio=recording, sampling_rate=rate)["prompt_values"]
            voices.append({"prompt_text": text, **model.encode_prompt(values)})
        unspoken = [count_unspoken(voice) for voice in voices]
        # The others need not be scored.
        voices = [voice for voice, count in zip(voices, unspoken, strict=True) if count == min(unspoken)]
        scores = [score(voice, likeness, sentences) for voice in voices]
        best = min(range(len(voices)), key=lambda index: scores[index][0] - scores[index][1])
        rates[speaker], similarity = scores[best]
        for folder in folders:
            Path(folder, "voices").mkdir(exist_ok=True)
            processor.save_voice(Path(folder, "voices", f"{speaker}.safetensors"), **voices[best])
        print(
            f"{speaker}: word error rate {rates[speaker]:.3f} (mean of {len(scores)}: {np.mean([one[0] for one in scores]):.3f}), "
            f"similarity {similarity:.3f}, {min(unspoken)} of {len(models) * len(SHORT_TEXTS)} short texts unspoken, {voices[best]['prompt_text']!r}",
            flush=True,
        )

    default = arguments.default or min(rates, key=rates.get)
    for folder in folders:
        AutoProcessor.from_pretrained(folder, default_voice=default).save_pretrained(folder)
    print(f"default voice: {default}")


if __name__ == "__main__":
    run_command(main)
