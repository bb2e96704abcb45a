"""The figures of a run as `model-index` metadata of a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_update
from huggingface_hub.repocard_data import model_index_to_eval_results


METRICS = {
    "word_error_rate": ("wer", "Word error rate (%)"),
    "character_error_rate": ("cer", "Character error rate (%)"),
    "similarity_to_prompt": ("speaker_similarity", "Speaker similarity to the prompt"),
    "similarity_of_new_speech_to_prompt": ("speaker_similarity", "Speaker similarity of the new speech to the prompt"),
    "similarity_to_original": ("speaker_similarity", "Speaker similarity to the original"),
    "dnsmos": ("dnsmos", "DNSMOS, overall"),
}


def evaluation_results(summary: dict[str, Any]) -> list[EvalResult]:
    """
    The figures of the model's own rows, as a model card keeps them.

    Args:
        summary (`dict[str, Any]`):
            What `summary.json` holds.

    Returns:
        `list[EvalResult]`: one for each protocol, guidance scale and metric.
    """
    settings = summary["settings"]
    judges = f"{settings['recognizer']} and {settings['speaker_encoder']}"
    return [
        EvalResult(
            task_type="text-to-speech",
            task_name="Text to speech",
            dataset_type=Path(settings["dataset"]).name if Path(settings["dataset"]).exists() else settings["dataset"],
            dataset_name=Path(settings["dataset"]).name,
            dataset_config=settings["dataset_config"],
            dataset_split=settings["split"],
            metric_type=kind,
            metric_name=f"{text}: {protocol}, {title.removeprefix('SLED, ')}, by {judges}",
            metric_value=row[name],
        )
        for protocol, entry in summary["protocols"].items()
        for title, row in entry["rows"].items()
        if row["guidance_scale"] is not None
        for name, (kind, text) in METRICS.items()
        if name in row
    ]


def push_results(model: str, summary: dict[str, Any]) -> None:
    """
    Write the figures to the model card: of a Hub repository, or `README.md` of a local folder.

    Figures of the same metric, protocol and data set are replaced; all other metadata stays.

    Args:
        model (`str`):
            Hub id, or folder of a checkpoint.
        summary (`dict[str, Any]`):
            What `summary.json` holds.
    """
    name = Path(model).name
    update = ModelCardData(model_name=name, eval_results=evaluation_results(summary)).to_dict()
    if not Path(model).is_dir():
        metadata_update(model, {"model-index": update["model-index"]}, overwrite=True)
        return
    path = Path(model) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
    new = model_index_to_eval_results(update["model-index"])[1]
    replaced = {(result.unique_identifier, result.metric_name) for result in new}
    kept = [
        result
        for result in card.data.eval_results or []
        if (result.unique_identifier, result.metric_name) not in replaced
    ]
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = kept + new
    card.save(path)
