"""The report of a run: a Markdown table, plots, and pages to listen to."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure

from protocols import PROTOCOLS
from results import write_file
from summary import Scores, interval, ratio


WORST = 10
LENGTH_BINS = 6


def write_report(folder: Path, scores: Scores, summary: dict[str, Any], timings: dict[str, Any]) -> None:
    """
    Write `report.md`, `plots/`, and `index.html` with one page a protocol.

    Args:
        folder (`Path`):
            Output folder of the run.
        scores ([`~summary.Scores`]):
            Scores of the utterances.
        summary (`dict[str, Any]`):
            The figures.
        timings (`dict[str, Any]`):
            The speeds.
    """
    write_file(folder / "report.md", markdown(summary, timings))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = {}
    for protocol in summary["protocols"]:
        rows = scores.protocol(protocol)
        plots[protocol] = write_plots(folder, protocol, rows, scores, summary)
        page = environment.get_template("protocol.html").render(
            protocol=protocol,
            description=PROTOCOLS[protocol],
            header=header(summary["protocols"][protocol]["rows"]),
            table=table_rows(summary["protocols"][protocol]["rows"], timings),
            plots=plots[protocol],
            entries=listening_entries(protocol, rows, scores),
        )
        write_file(folder / f"{protocol}.html", page)
    page = environment.get_template("index.html").render(
        title=title(summary), summary=summary, descriptions=PROTOCOLS, notes=notes(summary, timings)
    )
    write_file(folder / "index.html", page)


def title(summary: dict[str, Any]) -> str:
    settings = summary["settings"]
    return f"{settings['model'] or settings['codec']} on {settings['dataset']}"


def with_interval(row: dict[str, Any], name: str, digits: int) -> str:
    if name not in row:
        return "-"
    text = f"{row[name]:.{digits}f}"
    bounds = row[f"{name}_interval"]
    return text if bounds is None else f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


MEANS = {
    "similarity_to_prompt": "SIM to prompt ↑",
    "similarity_of_new_speech_to_prompt": "SIM to prompt, new speech ↑",
    "similarity_to_original": "SIM to original ↑",
    "dnsmos": "DNSMOS ↑",
}


def header(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Column titles of a protocol's table: only what the protocol has."""
    means = [text for name, text in MEANS.items() if any(name in row for row in rows.values())]
    return ["System", "WER (%) ↓", "Ins / Del / Sub", "CER (%) ↓", *means, "Real-time factor ↓"]


def table_rows(rows: dict[str, dict[str, Any]], timings: dict[str, Any]) -> list[list[str]]:
    """Cells of a protocol's table."""
    factors = timings["real_time_factor"]
    table = []
    for name, row in rows.items():
        means = [with_interval(row, mean, 3) for mean in MEANS if any(mean in other for other in rows.values())]
        factor = factors.get(row["system"])
        edits = " / ".join(str(row[edit]) for edit in ("insertions", "deletions", "substitutions"))
        rates = [with_interval(row, "word_error_rate", 2), edits, with_interval(row, "character_error_rate", 2)]
        table.append([name, *rates, *means, "-" if factor is None else f"{factor:.2f}"])
    return table


def notes(summary: dict[str, Any], timings: dict[str, Any]) -> list[str]:
    """What a reader has to know to put the figures next to others."""
    settings = summary["settings"]
    lines = [
        f"Utterances longer than {settings['min_seconds']:g} s and shorter than {settings['max_seconds']:g} s: "
        f"{summary['utterances']}; left out: {counts_text(summary['left_out'])}.",
        f"Recognizer {settings['recognizer']}, greedy; speaker encoder {settings['speaker_encoder']}; "
        f"seed {settings['seed']}; brackets: bootstrap 95 % intervals over utterances.",
    ]
    sanity = summary["speaker_encoder"]
    if sanity:
        lines.append(
            f"The speaker encoder tells the voices of the ground truth apart with an equal error rate of "
            f"{sanity['equal_error_rate']:.2f} % ({sanity['same_speaker_pairs']} pairs by one speaker, "
            f"{sanity['different_speaker_pairs']} by two)."
        )
    if settings["language"] == "en" and not summary["spelling_entries"]:
        lines.append(
            "Without the package whisper-normalizer, British and American spellings count as different words."
        )
    first = timings["time_to_first_audio"]
    if timings["real_time_factor"]:
        lines.append(f"Speeds on {timings['device']}, batches of {timings['batch_size']}.")
    if first["utterances"]:
        lines.append(
            f"Time to first audio: median {first['median_seconds']:.3f} s over {first['utterances']} utterances, "
            "streamed one by one without a prompt."
        )
    return lines


def counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"


def markdown(summary: dict[str, Any], timings: dict[str, Any]) -> str:
    """
    The tables and their notes.

    Args:
        summary (`dict[str, Any]`):
            The figures.
        timings (`dict[str, Any]`):
            The speeds.

    Returns:
        `str`: Markdown.
    """
    lines = [f"# {title(summary)}", ""]
    for protocol, entry in summary["protocols"].items():
        left_out = f" Left out: {counts_text(entry['left_out'])}." if entry["left_out"] else ""
        lines += [f"## {protocol.capitalize()}", ""]
        lines += [f"{PROTOCOLS[protocol].capitalize()}; {entry['utterances']} utterances.{left_out}", ""]
        columns = header(entry["rows"])
        lines += ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
        lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(entry["rows"], timings)]
        for name, row in entry["rows"].items():
            troubles = {
                "nothing was recognized": row["unheard"],
                "no voice to compare": row["voiceless"],
                "ended at once": row["ended_at_once"],
                "never ended": row["never_ended"],
                "synthesis failed": row["failed"],
            }
            if any(troubles.values()):
                lines += ["", f"{name}: {counts_text({what: count for what, count in troubles.items() if count})}."]
        lines.append("")
    return "\n".join(lines + [f"- {note}" for note in notes(summary, timings)]) + "\n"


def judged_row(rows: dict[str, Any]) -> str:
    """The row whose errors sort the page: the first synthesis, else the resynthesis."""
    return list(rows)[min(2, len(rows) - 1)]


def worst_first(entries: list[dict[str, Any]]) -> list[int]:
    """Positions of the utterances, those with the highest error rate first."""

    def key(position: int) -> tuple[float, float, str]:
        counts = entries[position]["counts"]
        similarity = entries[position].get("similarity_to_prompt") or 0.0
        return (-counts["word_errors"] / max(1, counts["reference_words"]), similarity, entries[position]["id"])

    return sorted(range(len(entries)), key=key)


def listening_entries(protocol: str, rows: dict[str, list[dict[str, Any]]], scores: Scores) -> list[dict[str, Any]]:
    """What the page of a protocol shows of each utterance, the worst first."""
    systems = scores.systems(protocol)
    entries = []
    for position in worst_first(rows[judged_row(rows)]):
        name, prompt_id = scores.plan["protocols"][protocol]["pairs"][position]
        players = []
        if protocol == "continuation":
            players.append({"title": "Prompt", "path": scores.audio["prompt", name]["path"]})
        elif protocol == "reference":
            players.append({"title": "Prompt", "path": scores.audio["original", prompt_id]["path"]})
        for title, row in systems.items():
            score = rows[title][position]
            counts = score["counts"]
            players.append(
                {
                    "title": title,
                    "path": scores.audio[row["system"], name]["path"],
                    "heard": score["hypothesis"],
                    "errors": f"{counts['word_errors']} of {counts['reference_words']} words",
                    "similarity": score.get("similarity_to_prompt", score.get("similarity_to_original")),
                    "error": score["error"],
                }
            )
        utterance = scores.utterances[name]
        entries.append({"id": name, "text": utterance["text"], "speaker": utterance["speaker"], "players": players})
    return entries


def save_figure(figure: Figure, folder: Path, path: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(folder / path, buffer.getvalue())
    return path


def write_plots(
    folder: Path, protocol: str, rows: dict[str, list[dict[str, Any]]], scores: Scores, summary: dict[str, Any]
) -> list[str]:
    """Draw the plots of one protocol; returns their paths in the folder."""
    figures = {"error-by-length": plot_error_by_length(rows), "similarity": plot_similarity(rows)}
    table = summary["protocols"][protocol]["rows"]
    if sum(row["guidance_scale"] is not None for row in table.values()) > 1:
        figures["guidance"] = plot_guidance(table)
    figures["worst"] = plot_worst(folder, protocol, rows, scores)
    return [save_figure(figure, folder, f"plots/{protocol}-{name}.png") for name, figure in figures.items()]


def plot_error_by_length(rows: dict[str, list[dict[str, Any]]]) -> Figure:
    """Word error rate against the length of the original, in bins of as many utterances each."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, entries in rows.items():
        ordered = sorted(entries, key=lambda entry: (entry["seconds"], entry["id"]))
        bins = np.array_split(np.arange(len(ordered)), min(LENGTH_BINS, len(ordered)))
        centers, rates, bounds = [], [], []
        for positions in bins:
            group = [ordered[position] for position in positions]
            errors = [entry["counts"]["word_errors"] for entry in group]
            words = [entry["counts"]["reference_words"] for entry in group]
            centers.append(np.mean([entry["seconds"] for entry in group]))
            rates.append(float(ratio(np.array(errors), np.array(words))))
            low_high = interval(ratio, errors, words) or [rates[-1]] * 2
            bounds.append([max(0, rates[-1] - low_high[0]), max(0, low_high[1] - rates[-1])])
        axes.errorbar(centers, rates, np.array(bounds).T, marker="o", capsize=3, label=name)
    axes.set(xlabel="length of the original (s)", ylabel="word error rate (%)", ylim=(0, None))
    axes.legend()
    return figure


def plot_similarity(rows: dict[str, list[dict[str, Any]]]) -> Figure:
    """Distribution of the similarity to the prompt, or to the original where there is none."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = next(iter(rows.values()))[0]
    name = next(
        candidate
        for candidate in ("similarity_of_new_speech_to_prompt", "similarity_to_prompt", "similarity_to_original")
        if candidate in first or candidate == "similarity_to_original"
    )
    for title, entries in rows.items():
        values = [entry[name] for entry in entries if entry.get(name) is not None]
        if values:
            axes.hist(values, bins=np.linspace(min(0, *values), 1, 41), histtype="step", linewidth=1.6, label=title)
    axes.set(xlabel=name.replace("_", " "), ylabel="utterances")
    if axes.patches:
        axes.legend(loc="upper left")
    return figure


def plot_worst(folder: Path, protocol: str, rows: dict[str, list[dict[str, Any]]], scores: Scores) -> Figure:
    """Spectrograms of the ten utterances with most errors, next to their originals."""
    judged = judged_row(rows)
    system = scores.systems(protocol)[judged]["system"]
    entries = [rows[judged][position] for position in worst_first(rows[judged])[:WORST]]
    figure = Figure(figsize=(12, 1.9 * len(entries)), layout="constrained")
    for axes, entry in zip(figure.subplots(len(entries), 2, squeeze=False), entries, strict=True):
        heard = entry["hypothesis"] or "(nothing)"
        texts = (scores.utterances[entry["id"]]["text"], f"{judged}: {heard}")
        for axis, name, text in zip(axes, ("original", system), texts, strict=True):
            audio, sampling_rate = soundfile.read(folder / scores.audio[name, entry["id"]]["path"], dtype="float32")
            draw_spectrogram(axis, audio, sampling_rate)
            axis.set_title(text if len(text) < 90 else text[:87] + "...", fontsize=8, loc="left")
    return figure


def draw_spectrogram(axes: Any, audio: np.ndarray, sampling_rate: int) -> None:
    window = 512
    audio = np.pad(audio, (0, max(0, 2 * window - len(audio))))
    # A floor of noise far below hearing keeps silence out of the logarithm.
    audio = audio + 1e-5 * np.random.default_rng(0).standard_normal(len(audio))
    axes.specgram(audio, NFFT=window, Fs=sampling_rate, noverlap=window * 3 // 4, vmin=-130, vmax=-30)
    axes.set(ylim=(0, min(8000, sampling_rate / 2)))
    axes.tick_params(labelsize=7)


def plot_guidance(table: dict[str, dict[str, Any]]) -> Figure:
    """Error rate and similarity against the guidance scale."""
    points = [row for row in table.values() if row["guidance_scale"] is not None]
    points.sort(key=lambda row: row["guidance_scale"])
    scales = [row["guidance_scale"] for row in points]
    names = [name for name in MEANS if name != "dnsmos" and name in points[0]]
    similarity = names[1] if "similarity_of_new_speech_to_prompt" in names else (names or [None])[0]
    panels = ["word_error_rate", *([similarity] if similarity else [])]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = [row.get(name, math.nan) for row in points]
        bounds = [row.get(f"{name}_interval") or [value, value] for row, value in zip(points, values, strict=True)]
        low, high = np.array(bounds).T
        axes.errorbar(
            scales, values, [np.maximum(0, values - low), np.maximum(0, high - values)], marker="o", capsize=3
        )
        axes.set(xlabel="guidance scale", ylabel=name.replace("_", " ") + (" (%)" if name == panels[0] else ""))
    return figure
