"""Evaluate a SLED checkpoint: error rate, speaker similarity and speed, as tables, plots and a page to listen to.

    python evaluation/run_eval.py --model ICTNLP/SLED-TTS-Libriheavy --output-dir outputs/libriheavy

speaks every utterance of LibriSpeech-PC test-clean between 4 and 10 s under the paper's protocols, scores it next to
the ground truth and the codec's resynthesis, and writes `summary.json`, `report.md`, `plots/` and `index.html`.
`accelerate launch evaluation/run_eval.py ...` (on CPUs `torchrun --nproc-per-node 2 ... --cpu`) spreads the utterances over
processes that share the output folder.
The same command goes on where a killed run stopped. Without `--model`, only ground truth and resynthesis are scored.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoProcessor, EncodecModel

from metrics.dnsmos import dnsmos
from metrics.speaker_similarity.speaker_encoders import embed, load_speaker_encoder
from model_card import push_results
from protocols import LIBRISPEECH_PC, PROTOCOLS, SpeechDataset, Utterance, pair_with_prompts
from recognizers import SAMPLING_RATE as RECOGNIZER_SAMPLING_RATE
from recognizers import load_recognizer
from report import write_report
from results import RecordStore, write_file
from summary import Scores, system_name
from synthesis import Synthesizer, resynthesize
from transformers_sled import SledForSpeechSynthesis


# A process may wait this long for the others at the end of a stage.
PATIENCE = timedelta(days=1)
# What SLED uses of a codec that offers it, in kilobits a second.
DEFAULT_BANDWIDTH = 6.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help="folder of the results; an interrupted run goes on in it")
    add("--model", help="checkpoint to evaluate: Hub id or folder")
    add("--codec", help="EnCodec checkpoint, for a model that holds none or instead of a model")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the model's weights")
    add("--protocols", nargs="+", choices=PROTOCOLS, help="default: all an offline model has, streaming for others")
    add("--guidance-scales", nargs="+", type=float, help="one row each; default: the checkpoint's own scale")
    add("--temperature", type=float, help="scale of the noise; default: the checkpoint's own")
    add("--prompt-seconds", type=float, default=3.0, help="length of the prompt of continuation (default: 3)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--dataset", default=LIBRISPEECH_PC, help=f"file, folder or Hub id (default: {LIBRISPEECH_PC})")
    add("--dataset-config", help="configuration of a Hub data set")
    add("--split", help="split (default: test.clean of the default data set, else train)")
    add("--text-column", default="text", help="default: text")
    add("--audio-column", default="audio", help="default: audio")
    add("--speaker-column", help="default: speaker or speaker_id")
    add("--id-column", help="default: id where there is one, else the row number")
    add("--min-seconds", type=float, default=4.0, help="utterances have to be longer (default: 4)")
    add("--max-seconds", type=float, default=10.0, help="utterances have to be shorter (default: 10)")
    add("--limit", type=int, help="evaluate the first utterances only")
    add("--recognizer", default="openai/whisper-large-v3", help="Hub id, folder, or faster-whisper:MODEL")
    add("--language", default="en", help="language code, for the recognizer and the normalizer (default: en)")
    add("--speaker-encoder", default="microsoft/wavlm-base-plus-sv", help="Hub id, folder, or resemblyzer")
    add("--dnsmos", action="store_true", help="also predict opinion scores; needs the package speechmos")
    add("--batch-size", type=int, default=16, help="utterances spoken and recognized at once (default: 16)")
    add(
        "--latency-utterances",
        type=int,
        default=10,
        help="how many to stream for the time to first audio (default: 10)",
    )
    add("--cpu", action="store_true", help="use CPUs only; several processes on CPUs need it")
    add(
        "--push-results", action="store_true", help="write the figures to the model card: of the Hub id, or the folder"
    )
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; at least 1 is accepted.")
    if not 0 <= arguments.min_seconds < arguments.max_seconds:
        parser.error(
            f"--min-seconds {arguments.min_seconds:g} and --max-seconds {arguments.max_seconds:g} hold no utterance; "
            "0 <= min < max is accepted."
        )
    if not 0 < arguments.prompt_seconds < math.inf:
        parser.error(f"--prompt-seconds is {arguments.prompt_seconds}; a positive number is accepted.")
    for scale in arguments.guidance_scales or []:
        if not 0 <= scale < math.inf:
            parser.error(f"--guidance-scales has {scale}; finite numbers of at least 0 are accepted.")
    if arguments.temperature is not None and not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature is {arguments.temperature}; a finite number of at least 0 is accepted.")
    if arguments.model is None and arguments.codec is None:
        parser.error("neither --model nor --codec is given; one of them is needed.")
    options = (arguments.push_results, arguments.guidance_scales, arguments.temperature is not None)
    if arguments.model is None and any(options):
        parser.error("--push-results, --guidance-scales and --temperature need --model.")
    return arguments


class Run:
    """
    One evaluation: everything it needs loaded and checked, then its stages one after another.

    Args:
        arguments (`argparse.Namespace`):
            The command line.
        state (`PartialState`):
            This process among the others.

    Raises:
        ValueError: something asked for is missing, does not fit, or is not what the output folder was begun with.
    """

    def __init__(self, arguments: argparse.Namespace, state: PartialState):
        self.arguments = arguments
        self.state = state
        self.folder = arguments.output_dir
        self.store = RecordStore(self.folder / "records", state.process_index)
        if arguments.dnsmos:
            dnsmos.check_installed()
        self.synthesizer = None
        if arguments.model is not None:
            self.synthesizer = self.load_model()
            model = self.synthesizer.model
            self.codec, self.bandwidth = model.codec, model.config.codec_bandwidth
        else:
            try:
                self.codec = EncodecModel.from_pretrained(arguments.codec).to(state.device).eval()
            except (OSError, ValueError) as error:
                raise ValueError(f"Codec {arguments.codec!r} could not be loaded: {error}") from error
            bandwidths = self.codec.config.target_bandwidths
            self.bandwidth = DEFAULT_BANDWIDTH if DEFAULT_BANDWIDTH in bandwidths else max(bandwidths)
        self.sampling_rate = self.codec.config.sampling_rate
        self.protocols = self.choose_protocols()
        self.dataset = SpeechDataset(
            arguments.dataset,
            self.sampling_rate,
            config=arguments.dataset_config,
            split=arguments.split,
            text_column=arguments.text_column,
            audio_column=arguments.audio_column,
            speaker_column=arguments.speaker_column,
            id_column=arguments.id_column,
        )
        self.speaker_encoder = load_speaker_encoder(arguments.speaker_encoder, state.device)
        self.recognizer = load_recognizer(arguments.recognizer, arguments.language, state.device)
        self.plan = self.make_plan()
        self.utterances = {entry["id"]: Utterance(**entry) for entry in self.plan["utterances"]}

    def load_model(self) -> Synthesizer:
        arguments = self.arguments
        codec = {"codec": arguments.codec} if arguments.codec else {}
        try:
            model = SledForSpeechSynthesis.from_pretrained(arguments.model, dtype=arguments.dtype, **codec)
            processor = AutoProcessor.from_pretrained(arguments.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"Model {arguments.model!r} could not be loaded: {error}") from error
        if arguments.guidance_scales is None:
            arguments.guidance_scales = [model.generation_config.guidance_scale]
        model = model.to(self.state.device).eval()
        return Synthesizer(model, processor, arguments.prompt_seconds, arguments.seed, arguments.temperature)

    def choose_protocols(self) -> list[str]:
        wanted = self.arguments.protocols
        if self.synthesizer is None:
            return wanted or ["text"]
        interleaved = self.synthesizer.model.config.text_chunk_size is not None
        if wanted and "streaming" in wanted and not interleaved:
            raise ValueError(
                f"Protocol streaming needs an interleaved model; {self.arguments.model!r} is an offline one."
            )
        return wanted or (["streaming"] if interleaved else ["continuation", "reference", "text"])

    def make_plan(self) -> dict[str, Any]:
        """Choose the utterances and their prompts, or read the choice of the run that is resumed."""
        path = self.folder / "plan.json"
        arguments = self.arguments
        names = (
            "model codec dtype temperature prompt_seconds seed dataset dataset_config text_column audio_column "
            "speaker_column id_column min_seconds max_seconds limit recognizer language speaker_encoder dnsmos"
        )
        settings = {name: getattr(arguments, name) for name in names.split()}
        settings |= {"split": self.dataset.split, "protocols": self.protocols}
        settings["guidance_scales"] = arguments.guidance_scales or []
        if self.state.is_main_process and not path.exists():
            selected, left_out = self.dataset.select(arguments.min_seconds, arguments.max_seconds)
            protocols, needed = {}, {}
            for protocol in self.protocols:
                pairs, unpaired = pair_with_prompts(protocol, selected, arguments.prompt_seconds)
                pairs = pairs[: arguments.limit]
                needed |= {item.id: item for pair in pairs for item in pair if item is not None}
                ids = [[utterance.id, source.id if source else None] for utterance, source in pairs]
                protocols[protocol] = {"pairs": ids, "left_out": unpaired}
            utterances = [item.to_dict() for item in sorted(needed.values(), key=lambda item: item.row)]
            plan = {"settings": settings, "selected": len(selected), "left_out": left_out}
            plan |= {"protocols": protocols, "utterances": utterances}
            write_file(path, json.dumps(plan, ensure_ascii=False, indent=1))
        self.state.wait_for_everyone()
        plan = json.loads(path.read_text())
        changed = [name for name, value in settings.items() if plan["settings"].get(name) != value]
        if changed:
            differences = ", ".join(f"{name} was {plan['settings'].get(name)!r}" for name in changed)
            raise ValueError(
                f"{self.folder} holds a run with other settings ({differences}); use another --output-dir."
            )
        return plan

    @property
    def targets(self) -> list[str]:
        """Ids of all utterances that some protocol speaks, the shortest text first so that batches fit."""
        ids = {pair[0] for entry in self.plan["protocols"].values() for pair in entry["pairs"]}
        return sorted(ids, key=lambda name: (len(self.utterances[name].text), name))

    def share(self, work: list[Any], title: str) -> tqdm:
        """
        This process's part of the work, with a progress bar in the main process.

        The work has to be all of it, the done included: what is done changes while the processes look at it.
        """
        mine = work[self.state.process_index :: self.state.num_processes]
        return tqdm(mine, title, disable=not self.state.is_main_process)

    def batches(self, ids: list[str]) -> list[list[str]]:
        """The same batches in any process and any resumed run: what a batch holds can change roundings."""
        size = self.arguments.batch_size
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    def audio_path(self, system: str, name: str) -> Path:
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]
        return Path("audio") / system / f"{self.utterances[name].row:06d}-{safe}.wav"

    def keep_audio(self, system: str, name: str, audio: np.ndarray, **details: Any) -> dict[str, Any]:
        """Write a waveform, then return its record."""
        buffer = io.BytesIO()
        soundfile.write(buffer, audio, self.sampling_rate, subtype="PCM_16", format="WAV")
        path = self.audio_path(system, name)
        write_file(self.folder / path, buffer.getvalue())
        seconds = round(len(audio) / self.sampling_rate, 4)
        return {"system": system, "id": name, "path": path.as_posix(), "seconds": seconds, **details}

    def load_audio(self, system: str, name: str) -> np.ndarray:
        return soundfile.read(self.folder / self.audio_path(system, name), dtype="float32")[0]

    def make_references(self) -> None:
        """Originals, prompts and resyntheses, which all protocols share."""
        prompt_samples = int(self.arguments.prompt_seconds * self.sampling_rate)
        work = [("original", name) for name in self.utterances]
        work += [("resynthesis", name) for name in self.targets]
        if "continuation" in self.protocols:
            work += [("prompt", pair[0]) for pair in self.plan["protocols"]["continuation"]["pairs"]]
        done = self.store.read("audio")
        for system, name in self.share(work, "ground truth and resynthesis"):
            if (system, name) in done:
                continue
            audio = self.dataset.read_audio(self.utterances[name].row)
            if system == "resynthesis":
                audio = resynthesize(self.codec, audio, self.bandwidth)
            elif system == "prompt":
                audio = audio[:prompt_samples]
            self.store.append("audio", [self.keep_audio(system, name, audio)])

    def synthesize(self, protocol: str, guidance_scale: float) -> None:
        """Speak all utterances of a protocol at one guidance scale."""
        system = system_name(protocol, guidance_scale)
        sources = dict(self.plan["protocols"][protocol]["pairs"])
        done = self.store.read("audio")
        for batch in self.share(self.batches([name for name in self.targets if name in sources]), system):
            missing = {name for name in batch if (system, name) not in done}
            if not missing:
                continue
            prompts = [self.utterances[sources[name]] if sources[name] else None for name in batch]
            audios = [self.dataset.read_audio(prompt.row) if prompt else None for prompt in prompts]
            utterances = [self.utterances[name] for name in batch]
            speeches = self.synthesizer.speak(protocol, guidance_scale, utterances, prompts, audios)
            for name, speech in zip(batch, speeches, strict=True):
                if name in missing:
                    details = {"prompt_samples": speech.prompt_samples, "generation_seconds": speech.seconds}
                    details |= {"cut_off": speech.is_cut_off, "empty": len(speech.audio) == speech.prompt_samples}
                    details |= {"error": speech.error} if speech.error else {}
                    self.store.append("audio", [self.keep_audio(system, name, speech.audio, **details)])

    def transcribe(self, system: str, ids: list[str]) -> None:
        """Recognize what a system said; silence is not given to the recognizer, which might hear something in it."""
        done = self.store.read("text")
        for batch in self.share(self.batches(ids), f"recognizing {system}"):
            missing = {name for name in batch if (system, name) not in done}
            if not missing:
                continue
            audios = {name: self.load_audio(system, name) for name in batch}
            audible = [name for name in batch if np.any(audios[name])]
            inputs = [soxr.resample(audios[name], self.sampling_rate, RECOGNIZER_SAMPLING_RATE) for name in audible]
            texts = dict(zip(audible, self.recognizer(inputs) if inputs else [], strict=True))
            records = [
                {"system": system, "id": name, "text": texts.get(name, "")} for name in batch if name in missing
            ]
            self.store.append("text", records)

    def compare_voices(self) -> None:
        """Speaker embeddings of all audio, and of what follows the prompt in continuations."""
        clips = [(*key, "whole") for key in sorted(self.store.read("audio"))]
        prompt_samples = int(self.arguments.prompt_seconds * self.sampling_rate)
        if "continuation" in self.protocols:
            systems = ["original", "resynthesis"]
            systems += [system_name("continuation", scale) for scale in self.arguments.guidance_scales or []]
            pairs = self.plan["protocols"]["continuation"]["pairs"]
            clips += [(system, name, "new") for system in systems for name, _ in pairs]
        done = self.store.read("embedding")
        for system, name, part in self.share(clips, "speaker embeddings"):
            if (system, name, part) in done:
                continue
            audio = self.load_audio(system, name)
            audio = audio[prompt_samples:] if part == "new" else audio
            embedding = embed(self.speaker_encoder, audio, self.sampling_rate) if len(audio) else None
            values = None if embedding is None else [round(float(value), 6) for value in embedding]
            self.store.append("embedding", [{"system": system, "id": name, "part": part, "embedding": values}])

    def predict_opinions(self, systems: dict[str, list[str]]) -> None:
        """DNSMOS of all systems."""
        done = self.store.read("dnsmos")
        for system, name in self.share([(system, name) for system, ids in systems.items() for name in ids], "DNSMOS"):
            if (system, name) in done:
                continue
            audio = self.load_audio(system, name)
            scores = dnsmos.quality(audio, self.sampling_rate) if len(audio) else {"overall": None}
            self.store.append("dnsmos", [{"system": system, "id": name, **scores}])

    def time_streams(self) -> None:
        """Time to first audio of the first utterances, in the main process alone."""
        done = self.store.read("latency")
        names = self.targets[: self.arguments.latency_utterances]
        missing = [name for name in names if ("stream", name) not in done]
        for name in tqdm(missing, "time to first audio"):
            seconds = self.synthesizer.time_to_first_audio(
                self.utterances[name], guidance_scale=self.arguments.guidance_scales[0]
            )
            self.store.append("latency", [{"system": "stream", "id": name, "seconds": seconds}])

    def timings(self) -> dict[str, Any]:
        """Real-time factors and the time to first audio."""
        device = self.state.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        factors = {}
        audio = self.store.read("audio")
        for system in sorted({key[0] for key, record in audio.items() if "generation_seconds" in record}):
            records = [record for key, record in audio.items() if key[0] == system]
            spoken = sum(record["seconds"] - record["prompt_samples"] / self.sampling_rate for record in records)
            took = sum(record["generation_seconds"] for record in records)
            factors[system] = round(took / spoken, 4) if spoken else None
        latencies = [record["seconds"] for record in self.store.read("latency").values()]
        return {
            "device": name,
            "batch_size": self.arguments.batch_size,
            "real_time_factor": factors,
            "time_to_first_audio": {
                "utterances": len(latencies),
                "median_seconds": round(float(np.median(latencies)), 4) if latencies else None,
                "highest_seconds": round(max(latencies), 4) if latencies else None,
            },
        }

    def finish(self) -> None:
        """Write the report, in the main process alone."""
        scores, timings = Scores(self.plan, self.store), self.timings()
        summary = scores.summary()
        write_file(self.folder / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
        write_file(self.folder / "timings.json", json.dumps(timings, indent=2) + "\n")
        write_report(self.folder, scores, summary, timings)
        if self.arguments.push_results:
            push_results(self.arguments.model, summary)

    def __call__(self) -> None:
        """All stages; what an earlier run did is not done again."""
        scales = self.arguments.guidance_scales or []
        systems = {"original": self.targets, "resynthesis": self.targets}
        self.make_references()
        for protocol in self.protocols:
            spoken = {pair[0] for pair in self.plan["protocols"][protocol]["pairs"]}
            for scale in scales:
                self.synthesize(protocol, scale)
                systems[system_name(protocol, scale)] = [name for name in self.targets if name in spoken]
        self.state.wait_for_everyone()
        for system, ids in systems.items():
            self.transcribe(system, ids)
        self.compare_voices()
        if self.arguments.dnsmos:
            self.predict_opinions(systems)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            if self.synthesizer:
                self.time_streams()
            self.finish()
            print((self.folder / "report.md").read_text())


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse_arguments(argv)
    try:
        state = PartialState(cpu=arguments.cpu, timeout=PATIENCE)
        if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(f"{os.environ['WORLD_SIZE']} processes were launched without accelerators; add --cpu.")
        run = Run(arguments, state)
    except ValueError as error:
        sys.exit(f"run_eval.py: {error}")
    run()


if __name__ == "__main__":
    main()
