"""
What goes to the Hub beside weights and configurations: the model card, the modelling files, the voices, and how they get
there and back.
"""

import importlib
import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub.utils as hub_utils
from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, PushToHubMixin, cached_file


# The HTTP client of huggingface_hub, which has one of its own name from version 2 on.
httpx: Any = getattr(hub_utils, "httpx", None) or importlib.import_module("httpx")

CARD_NAME = "README.md"

# Where a checkpoint keeps its voices, a file for each.
VOICES_FOLDER, VOICE_SUFFIX = "voices", ".safetensors"

# Where the Auto classes find the code of a checkpoint that holds it.
AUTO_MAP = {
    "AutoConfig": "configuration_sled.SledConfig",
    "AutoModel": "modeling_sled.SledModel",
    "AutoModelForTextToWaveform": "modeling_sled.SledForSpeechSynthesis",
    "AutoProcessor": "processing_sled.SledProcessor",
}

# What the cards of the released checkpoints say of them.
RELEASED_CHECKPOINTS = ("ICTNLP/SLED-TTS-Libriheavy", "ICTNLP/SLED-TTS-Streaming-Libriheavy")
RELEASED_METADATA = {"datasets": ["pkufool/libriheavy"], "language": ["en"]}

CARD_TEXT = """---
{{ card_data }}
---

# {{ name }}

A text-to-speech model of the [SLED](https://arxiv.org/abs/2505.13181) architecture: a decoder over text tokens and
continuous speech latents, a small head that samples the next latent, and an EnCodec that turns latents into audio.
{{ reading }}

| | |
| --- | --- |
| sampling rate | {{ sampling_rate }} Hz, mono |
| speech latents | {{ frame_rate }} a second, {{ latent_dim }} wide |
| parameters | {{ num_parameters }}, and {{ num_codec_parameters }} in the codec |
| longest text with its speech | {{ max_position_embeddings }} positions; longer text is spoken in parts |
| interleaved | {{ interleaved }} |

## Use

```bash
{{ requirements }}
```

```python
{{ import_line }}import soundfile
from transformers import pipeline

speaker = pipeline("text-to-speech", model="{{ name }}"{{ trust }})
speech = speaker("Hello, world.")
soundfile.write("hello.wav", speech["audio"].squeeze(), speech["sampling_rate"])
```

## Clone a voice

A few seconds of a recording and its transcript give the voice:

```python
voice = {"prompt_text": "What the recording says.", "prompt_audio": "voice.wav"}
speech = speaker("And this is new.", preprocess_params=voice)
soundfile.write("cloned.wav", speech["audio"].squeeze(), speech["sampling_rate"])
```

**Consent.** Clone the voice of a person only with their consent, and tell listeners that the speech is synthetic. Do not
use this model to impersonate, to deceive, or to get past voice authentication.

## Training data, languages and license

{{ training }}
"""


class SledHubMixin(PushToHubMixin):
    """Pushing for [`SledForSpeechSynthesis`] and [`SledProcessor`]: each its own files, and over no card that is there."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **save_kwargs: Any,
    ) -> str:
        """
        Saves to a repository on the Hub, which is created if it does not exist. The model brings a model card, unless the
        repository has one.

        Args:
            repo_id (`str`):
                Name of the repository, such as `"my-name/my-voice"`.
            commit_message (`str`, *optional*):
                Message of the commit.
            commit_description (`str`, *optional*):
                Description of the commit.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`bool` or `str`, *optional*):
                Token to use, by default the one that `hf auth login` has stored.
            revision (`str`, *optional*):
                Branch to commit to, `"main"` by default.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead of committing.
            tags (`list[str]`, *optional*):
                Tags to add to the model card.
            save_kwargs:
                Further arguments of `save_pretrained`, such as `max_shard_size` and the model's `include_code`.

        Returns:
            `str`: the address of the commit.

        Example:

        ```python
        >>> model.push_to_hub("my-name/my-voice")
        >>> processor.push_to_hub("my-name/my-voice")
        ```
        """
        with TemporaryDirectory() as folder:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            # The processor's file follows the configuration in naming Hub code.
            if api.file_exists(repo_id, CONFIG_NAME, revision=revision):
                shutil.copyfile(
                    api.hf_hub_download(repo_id, CONFIG_NAME, revision=revision), Path(folder, CONFIG_NAME)
                )
                os.utime(Path(folder, CONFIG_NAME), (0, 0))
            return self._save_and_push(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
                **save_kwargs,
            )

    def _save_and_push(
        self,
        folder: str | Path,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        **save_kwargs: Any,
    ) -> str:
        """Saves to a folder and uploads what that has changed. A card that the repository has gets new tags at most."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        Path(folder).mkdir(parents=True, exist_ok=True)
        timestamps = self._get_files_timestamps(folder)
        self.save_pretrained(folder, repo_id=repo_id, **save_kwargs)
        # A folder's own time does not tell that a file in it has changed.
        timestamps.pop(VOICES_FOLDER, None)
        card_path = Path(folder, CARD_NAME)
        has_card = api.file_exists(repo_id, CARD_NAME, revision=revision)
        if has_card:
            timestamps[CARD_NAME] = math.inf
        else:
            timestamps.pop(CARD_NAME, None)
        if tags and (has_card or card_path.is_file()):
            card = ModelCard.load(
                api.hf_hub_download(repo_id, CARD_NAME, revision=revision) if has_card else card_path
            )
            known_tags = card.data.tags or []
            card.data.tags = known_tags + [tag for tag in tags if tag not in known_tags]
            if has_card:
                api.upload_file(
                    path_or_fileobj=str(card).encode(),
                    path_in_repo=CARD_NAME,
                    repo_id=repo_id,
                    revision=revision,
                    create_pr=create_pr,
                )
            else:
                card.save(card_path)
        return self._upload_modified_files(
            folder,
            repo_id,
            timestamps,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )


def save_code(folder: str | Path) -> None:
    """Copies the modelling files, and what they import of the package, into a folder."""
    source = Path(__file__).parent
    modules = {entry.split(".")[0] for entry in AUTO_MAP.values()}
    files = {source / f"{module}.py" for module in modules}
    for file in sorted(files):
        files.update(Path(name) for name in get_relative_import_files(file))
    for file in files:
        shutil.copyfile(file, Path(folder, file.name))


def link_processor(folder: str | Path) -> None:
    """Names the processor's code in its own file, if the configuration beside it does: `AutoProcessor` looks only there."""
    config_file, processor_file = Path(folder, CONFIG_NAME), Path(folder, PROCESSOR_NAME)
    if not config_file.is_file() or not processor_file.is_file():
        return
    auto_map = json.loads(config_file.read_text(encoding="utf-8")).get("auto_map") or {}
    processor_dict = json.loads(processor_file.read_text(encoding="utf-8"))
    if "AutoProcessor" in auto_map and "auto_map" not in processor_dict:
        processor_dict["auto_map"] = {"AutoProcessor": auto_map["AutoProcessor"]}
        text = json.dumps(processor_dict, indent=2, sort_keys=True) + "\n"
        processor_file.write_text(text, encoding="utf-8")


def find_voices(
    pretrained_model_name_or_path: str | Path, subfolder: str = "", **hub_kwargs: Any
) -> dict[str, Callable[[], str]]:
    """
    Finds the voices of a checkpoint, without downloading any.

    Args:
        pretrained_model_name_or_path (`str` or `Path`):
            Repository on the Hub, or local folder.
        subfolder (`str`, *optional*):
            Folder in it that holds the checkpoint.
        hub_kwargs:
            `revision`, `cache_dir`, `token` and `local_files_only`, as `from_pretrained` takes them.

    Returns:
        `dict`: for each name a function that gives the path of its file, which it downloads if need be. Without a network,
        those of a repository that have been downloaded before.
    """
    name, folder = str(pretrained_model_name_or_path), Path(subfolder, VOICES_FOLDER)
    local_folder = Path(name)
    if not local_folder.is_dir():
        files = _list_hub_voices(name, folder.as_posix(), hub_kwargs)
        if files is not None:
            return {
                Path(file).stem: partial(cached_file, name, file, **hub_kwargs)
                for file in sorted(files)
                if file.endswith(VOICE_SUFFIX)
            }
        config_name = Path(subfolder, CONFIG_NAME).as_posix()
        revision, cache_dir = hub_kwargs.get("revision"), hub_kwargs.get("cache_dir")
        # The processor may have been downloaded alone.
        for file_name in (config_name, Path(subfolder, PROCESSOR_NAME).as_posix()):
            cached = try_to_load_from_cache(name, file_name, cache_dir=cache_dir, revision=revision)
            if isinstance(cached, str):
                local_folder = Path(cached.removesuffix(file_name))
    return {file.stem: partial(str, file) for file in sorted((local_folder / folder).glob(f"*{VOICE_SUFFIX}"))}


def _list_hub_voices(name: str, folder: str, hub_kwargs: dict[str, Any]) -> list[str] | None:
    """The files in a repository's folder of voices, or `None` without a network."""
    if hub_kwargs.get("local_files_only"):
        return None
    try:
        entries = HfApi(token=hub_kwargs.get("token")).list_repo_tree(
            name, path_in_repo=folder, revision=hub_kwargs.get("revision")
        )
        return [entry.path for entry in entries]
    except EntryNotFoundError:
        return []
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError):
        return None


def create_model_card(model: Any, name: str, include_code: bool = False) -> ModelCard:
    """
    Writes the card of a [`SledForSpeechSynthesis`] from what is known about it.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model, with its codec.
        name (`str`):
            Repository or folder that the card is for.
        include_code (`bool`, *optional*, defaults to `False`):
            Whether the repository holds the modelling files, so that nothing has to be installed for them.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    config, codec_config = model.config, model.get_codec().config
    metadata = _get_inherited_metadata(config, name)
    if config.is_interleaved:
        interleaved = f"yes, {config.text_chunk_size} text tokens to {config.speech_chunk_size} frames"
        reading = "It is interleaved: it speaks while its text is still arriving."
    else:
        interleaved = "no"
        reading = "It reads the whole text before it speaks."
    if "datasets" in metadata:
        training = f"Trained, it or the model that it comes from, on {', '.join(metadata['datasets'])}."
    else:
        training = "Not stated: whoever trained this model knows, and should say so here and in the metadata above."
    if metadata.get("license", "unknown") == "unknown":
        training += " No license is stated for the weights."
    num_codec_parameters = sum(parameter.numel() for parameter in model.get_codec().parameters())
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-to-speech",
        tags=["sled", "text-to-speech", "voice-cloning", *(["streaming"] if config.is_interleaved else [])],
        **{"license": "unknown", **metadata},
    )
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEXT,
        name=name,
        reading=reading,
        interleaved=interleaved,
        sampling_rate=f"{codec_config.sampling_rate:,}",
        frame_rate=f"{codec_config.sampling_rate / codec_config.hop_length:g}",
        latent_dim=config.latent_dim,
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()) - num_codec_parameters:,}",
        num_codec_parameters=f"{num_codec_parameters:,}",
        max_position_embeddings=f"{config.max_position_embeddings:,}",
        requirements="pip install torch transformers sentencex soundfile soxr"
        if include_code
        else "pip install .  # in a checkout of transformers-sled, which is on no package index yet",
        import_line="" if include_code else "import transformers_sled  # registers SLED with transformers\n",
        trust=", trust_remote_code=True" if include_code else "",
        training=training,
    )


def _get_inherited_metadata(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    """What is known from where the model was loaded: the name of a Hub repository, or the card in a local folder."""
    source = config.name_or_path
    if not source:
        return {}
    if not Path(source).exists():
        try:
            is_on_hub = isinstance(try_to_load_from_cache(source, CONFIG_NAME), str)
        except HFValidationError:
            is_on_hub = False
        if not is_on_hub:
            return {}
        metadata = dict(RELEASED_METADATA) if source in RELEASED_CHECKPOINTS else {}
        return metadata if source == name else {"base_model": source, **metadata}
    if not Path(source, CARD_NAME).is_file():
        return {}
    known = ModelCard.load(Path(source, CARD_NAME), ignore_metadata_errors=True).data.to_dict()
    return {key: known[key] for key in ("base_model", "datasets", "language", "license") if key in known}
