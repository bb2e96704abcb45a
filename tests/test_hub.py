"""Checkpoints on the Hub: by name without a network, pushed and loaded again, with their own code; cards; bad ones."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import EncodecConfig, EncodecModel

from hub_cache import prepare_hub_cache
from hub_server import Hub
from transformers_sled import SledForSpeechSynthesis, SledProcessor


ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
TEXT = "The dog barked all night."
CODE_FILES = {
    "audio_sled.py",
    "cache_sled.py",
    "codec_sled.py",
    "configuration_sled.py",
    "engine_sled.py",
    "generation_sled.py",
    "hub_sled.py",
    "interleaving_sled.py",
    "modeling_sled.py",
    "normalization_sled.py",
    "pauses_sled.py",
    "processing_sled.py",
    "step_sled.py",
    "text_sled.py",
}


@pytest.fixture(scope="module")
def model() -> SledForSpeechSynthesis:
    return SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec")


@pytest.fixture(scope="module")
def processor() -> SledProcessor:
    return SledProcessor.from_pretrained(GOLDEN / "offline")


@pytest.fixture
def saved(model, processor, tmp_path) -> Path:
    folder = tmp_path / "my-voice"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def speak(model, processor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.generate(**processor(TEXT), generator=generator, max_new_tokens=20, min_new_tokens=20)[0]


def assert_same_audio(audio: torch.Tensor, expected: torch.Tensor) -> None:
    # Equal weights at another alignment in memory may be summed in another order.
    torch.testing.assert_close(audio, expected, atol=1e-4, rtol=0.0)


def run(script: str, *arguments: object, cwd: Path, python: str = sys.executable, **environment: object) -> None:
    """Runs a script in a process of its own, away from this machine's Hub cache."""
    environment = {name: str(value) for name, value in environment.items()}
    defaults = {"HF_HOME": str(cwd / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [python, "-c", script, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **defaults, **environment}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# Saving.


def test_saved_and_reloaded_is_the_original(model, processor, saved):
    assert {file.name for file in saved.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = SledForSpeechSynthesis.from_pretrained(saved)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert_same_audio(speak(loaded, SledProcessor.from_pretrained(saved)), speak(model, processor))
    # Nothing of where it came from on this machine.
    assert str(ROOT) not in "".join(file.read_text() for file in saved.iterdir() if file.suffix in (".json", ".md"))


def test_generation_parameters_of_a_checkpoint_are_kept(model, tmp_path, monkeypatch):
    settings = {"eos_threshold": 0.6, "guidance_scale": 1.5, "temperature": 0.4, "max_new_tokens": 30}
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    loaded = SledForSpeechSynthesis.from_pretrained(tmp_path).generation_config
    assert {name: getattr(loaded, name) for name in settings} == settings


def test_code_is_added_for_one_save_only(model, processor, saved, tmp_path):
    config, classes = model.config.to_dict(), (SledForSpeechSynthesis, SledProcessor, type(model.config))
    for order in ((model, processor), (processor, model)):
        folder = tmp_path / f"with-code-{order[0] is model}"
        for one in order:
            one.save_pretrained(folder, **({"include_code": True} if one is model else {}))
        assert {file.name for file in folder.glob("*.py")} == CODE_FILES
        assert read_json(folder / "config.json")["auto_map"] == {
            "AutoConfig": "configuration_sled.SledConfig",
            "AutoModel": "modeling_sled.SledModel",
            "AutoModelForTextToWaveform": "modeling_sled.SledForSpeechSynthesis",
            "AutoProcessor": "processing_sled.SledProcessor",
        }
        assert read_json(folder / "processor_config.json")["auto_map"] == {
            "AutoProcessor": "processing_sled.SledProcessor"
        }
    assert model.config.to_dict() == config
    assert all(one._auto_class is None for one in classes)

    # Neither what was saved with code, loaded where the package is installed, nor the original brings it into later saves.
    loaded, loaded_processor = SledForSpeechSynthesis.from_pretrained(folder), SledProcessor.from_pretrained(folder)
    for name, pair in {"again": (model, processor), "loaded": (loaded, loaded_processor)}.items():
        for one in pair:
            one.save_pretrained(tmp_path / name)
        assert {file.name for file in (tmp_path / name).iterdir()} == {file.name for file in saved.iterdir()}
        for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
            assert "auto_map" not in (tmp_path / name / file).read_text()
    assert_same_audio(speak(loaded, loaded_processor), speak(model, processor))


# The model card.


def test_card_tells_what_is_true(saved, tmp_path):
    card = ModelCard.load(saved / "README.md")
    assert card.data.pipeline_tag == "text-to-speech"
    assert card.data.library_name == "transformers"
    assert card.data.license == "unknown" and card.data.base_model is None and card.data.datasets is None
    model = SledForSpeechSynthesis.from_pretrained(saved)
    num_codec_parameters = sum(parameter.numel() for parameter in model.codec.parameters())
    num_parameters = model.num_parameters() - num_codec_parameters
    assert f"| parameters | {num_parameters:,}, and {num_codec_parameters:,} in the codec |" in card.text
    assert "| sampling rate | 24,000 Hz, mono |" in card.text
    assert "| interleaved | no |" in card.text
    assert "consent" in card.text

    # What the card beside a checkpoint says of its origin goes on with it.
    card.data.base_model, card.data.language, card.data.license = "somebody/voice", "de", "cc-by-4.0"
    card.save(saved / "README.md")
    model = SledForSpeechSynthesis.from_pretrained(saved)
    model.save_pretrained(tmp_path / "tuned")
    tuned = ModelCard.load(tmp_path / "tuned" / "README.md").data
    assert (tuned.base_model, tuned.language, tuned.license) == ("somebody/voice", "de", "cc-by-4.0")

    interleaved = SledForSpeechSynthesis.from_pretrained(GOLDEN / "streaming", codec=GOLDEN / "codec")
    interleaved.save_pretrained(tmp_path / "interleaved")
    card = ModelCard.load(tmp_path / "interleaved" / "README.md")
    assert "| interleaved | yes, 5 text tokens to 9 frames |" in card.text and "streaming" in card.data.tags


def test_an_edited_card_survives(model, processor, saved):
    card = "---\nlicense: mit\n---\nMy own words.\n"
    (saved / "README.md").write_text(card)
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    model.save_pretrained(saved, include_code=True)
    assert (saved / "README.md").read_text() == card


def test_snippets_of_the_card_run(saved, tmp_path, monkeypatch):
    text = (saved / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    noise = np.random.default_rng(0).normal(0, 0.1, 12_000)
    soundfile.write(tmp_path / "voice.wav", noise, 24_000)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    for name in ("hello.wav", "cloned.wav"):
        assert soundfile.info(tmp_path / name).samplerate == 24_000


# By name, without a network.

BY_NAME = """
import sys
import torch
import transformers_sled
from transformers import AutoConfig, AutoModel, AutoModelForTextToWaveform, AutoProcessor, AutoTokenizer, pipeline
from transformers_sled import SledConfig, SledForSpeechSynthesis, SledModel, SledProcessor

name, cache_without_codec, folder = "ICTNLP/SLED-TTS-Libriheavy", *sys.argv[1:]
speaker = pipeline("text-to-speech", model=name)
assert isinstance(speaker.processor, SledProcessor) and isinstance(speaker.model, SledForSpeechSynthesis)
speech = speaker("The dog barked all night.", generate_kwargs={"max_new_tokens": 20, "min_new_tokens": 20})
assert speech["audio"].shape[-1] == 20 * 320 and speech["sampling_rate"] == 24_000
assert isinstance(AutoConfig.from_pretrained(name), SledConfig)
backbone = AutoModel.from_pretrained(name)
assert isinstance(backbone, SledModel)
assert torch.equal(backbone.norm.weight, speaker.model.model.norm.weight)
model = AutoModelForTextToWaveform.from_pretrained(name)
assert isinstance(model, SledForSpeechSynthesis) and model.codec.dtype == torch.float32
processor = AutoProcessor.from_pretrained(name)
assert isinstance(processor, SledProcessor) and processor.sampling_rate == 24_000
tokenizer = AutoTokenizer.from_pretrained(name)
assert tokenizer("The dog.").input_ids == processor("The dog.")["input_ids"][0].tolist()
model.save_pretrained(folder)

for load in (
    lambda: AutoModelForTextToWaveform.from_pretrained(name, cache_dir=cache_without_codec),
    lambda: SledForSpeechSynthesis.from_pretrained(name, cache_dir=cache_without_codec),
):
    try:
        load()
    except OSError as error:
        message = str(error)
        assert "'facebook/encodec_24khz'" in message, message
        assert all(way in message for way in ("(1)", "(2)", "(3)", "hf download", "`codec=`", "save_pretrained")), message
    else:
        raise AssertionError("It has loaded without a codec.")
"""


def test_by_name_from_the_hub_cache(tmp_path):
    released = {"ICTNLP/SLED-TTS-Libriheavy": GOLDEN / "offline"}
    cache = prepare_hub_cache(tmp_path / "cache", {**released, "facebook/encodec_24khz": GOLDEN / "codec"})
    without_codec = prepare_hub_cache(tmp_path / "without_codec", released)
    run(BY_NAME, without_codec, tmp_path / "saved", cwd=tmp_path, HF_HUB_CACHE=cache, HF_HUB_OFFLINE=1)
    card = ModelCard.load(tmp_path / "saved" / "README.md").data
    assert card.base_model == "ICTNLP/SLED-TTS-Libriheavy"
    assert card.datasets == ["pkufool/libriheavy"] and card.language == ["en"]


# Pushed and loaded again.

PUSH = """
import sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForTextToWaveform, AutoProcessor
from transformers_sled import SledForSpeechSynthesis, SledProcessor

golden, text = Path(sys.argv[1]), sys.argv[2]
model = SledForSpeechSynthesis.from_pretrained(golden / "offline", codec=golden / "codec")
processor = SledProcessor.from_pretrained(golden / "offline")

def speak(model, processor):
    generator = torch.Generator().manual_seed(0)
    return model.generate(**processor(text), generator=generator, max_new_tokens=20, min_new_tokens=20)[0]

def get_files(name):
    return set(HfApi().list_repo_files(name)) - {".gitattributes"}

# Each pushes its own files.
model_files = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
processor_files = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
processor.push_to_hub("somebody/processor")
assert get_files("somebody/processor") == processor_files, get_files("somebody/processor")
model.push_to_hub("voice", commit_message="A voice", tags=["test"], private=True)
assert get_files("somebody/voice") == model_files, get_files("somebody/voice")
processor.push_to_hub("somebody/voice")
assert get_files("somebody/voice") == model_files | processor_files

loaded = AutoModelForTextToWaveform.from_pretrained("somebody/voice")
loaded_processor = AutoProcessor.from_pretrained("somebody/voice")
assert isinstance(loaded_processor, SledProcessor)
assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
torch.testing.assert_close(speak(loaded, loaded_processor), speak(model, processor), atol=1e-4, rtol=0.0)

# The card names the repository, and an edited one stays.
card = ModelCard.load("somebody/voice")
assert "test" in card.data.tags and 'model="somebody/voice"' in card.text
card.text += "My own words."
card = str(card).encode()
HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="somebody/voice")
model.push_to_hub("somebody/voice", tags=["more"])
processor.push_to_hub("somebody/voice")
card = ModelCard.load("somebody/voice")
assert "My own words." in card.text and {"test", "more"} <= set(card.data.tags)

# With code: the processor pushed after it follows.
model.save_pretrained("with-code", include_code=True, push_to_hub=True, repo_id="somebody/with-code")
processor.push_to_hub("somebody/with-code")
files = get_files("somebody/with-code")
assert {"modeling_sled.py", "processing_sled.py"} <= files, files

# A card written in the folder goes along, and one in the repository is not overwritten by the folder's.
Path("mine").mkdir()
Path("mine", "README.md").write_text("Written here.")
model.save_pretrained("mine", push_to_hub=True, repo_id="somebody/mine")
assert Path("mine", "README.md").read_text() == "Written here."
assert "Written here." in ModelCard.load("somebody/mine").text
Path("mine", "README.md").write_text("Changed.")
model.save_pretrained("mine", push_to_hub=True, repo_id="somebody/mine")
assert "Written here." in ModelCard.load("somebody/mine").text

# Another branch.
model.push_to_hub("somebody/voice", revision="next")
assert isinstance(AutoModelForTextToWaveform.from_pretrained("somebody/voice", revision="next"), SledForSpeechSynthesis)
"""

# Voices by name.
VOICES = """
import os, sys
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from transformers import AutoProcessor
from transformers_sled import SledConfig, SledProcessor

golden, is_offline = sys.argv[1], constants.HF_HUB_OFFLINE

def is_downloaded(name):
    return isinstance(try_to_load_from_cache("somebody/voices", f"voices/{name}.safetensors"), str)

if not is_offline:
    processor = SledProcessor.from_pretrained(f"{golden}/offline")
    processor.push_to_hub("somebody/voices")
    SledConfig.from_pretrained(f"{golden}/offline").push_to_hub("somebody/voices")
    assert SledProcessor.from_pretrained("somebody/voices").voices == []
    for name, num_frames in (("anna", 4), ("ben", 5)):
        processor.save_voice(prompt_text=f"I am {name}.", prompt_latents=torch.ones(1, num_frames, 32), name=name)
    processor.default_voice = "ben"
    processor.push_to_hub("somebody/voices")
    assert {f"voices/{name}.safetensors" for name in ("anna", "ben")} <= set(HfApi().list_repo_files("somebody/voices"))
    # Into a folder that holds one of them, too.
    processor.save_pretrained("folder")
    processor.save_voice(prompt_text="I am carl.", prompt_latents=torch.ones(1, 6, 32), name="carl")
    processor.save_pretrained("folder", push_to_hub=True, repo_id="somebody/more")
    assert SledProcessor.from_pretrained("somebody/more").voices == ["anna", "ben", "carl"]
    assert SledProcessor.from_pretrained("somebody/voices", revision=HfApi().model_info("somebody/voices").sha).voices

loaded = AutoProcessor.from_pretrained("somebody/voices")
assert loaded.default_voice == "ben"
if is_offline:
    assert loaded.voices == ["ben"], loaded.voices
else:
    assert loaded.voices == ["anna", "ben"] and not is_downloaded("anna") and not is_downloaded("ben")
assert loaded("Hello.")["prompt_latents"].shape == (1, 5, 32)
assert is_downloaded("ben") and not is_downloaded("anna")
"""


@pytest.mark.timeout(600)
def test_voices_by_name_from_the_hub(tmp_path):
    with Hub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_of_nobody", "HF_HUB_DISABLE_XET": 1}
        run(VOICES, GOLDEN, cwd=tmp_path, **environment)
        run(VOICES, GOLDEN, cwd=tmp_path, HF_HUB_OFFLINE=1, **environment)
    # Without a network, though it has not been switched off; before 2.0, huggingface_hub itself fails to try again.
    if Version(huggingface_hub.__version__) >= Version("2.0"):
        run(VOICES.replace("constants.HF_HUB_OFFLINE", "True"), GOLDEN, cwd=tmp_path, **environment)


# Code of the Hub where this package cannot be imported.
WITH_CODE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers_sled":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if "--block" in sys.argv:
    sys.meta_path.insert(0, Blocker())
try:
    import transformers_sled
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("The package can be imported here.")

import numpy, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForTextToWaveform, AutoProcessor, GenerationMixin, pipeline

text, folder, *names = [argument for argument in sys.argv[1:] if argument != "--block"]
options = {"max_new_tokens": 20, "min_new_tokens": 20}

def speak(model, processor):
    return model.generate(**processor(text), generator=torch.Generator().manual_seed(0), **options)[0]

for index, name in enumerate(names):
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    assert type(config).__name__ == "SledConfig" and config.model_type == "sled"
    assert type(AutoModel.from_pretrained(name, trust_remote_code=True)).__name__ == "SledModel"
    model = AutoModelForTextToWaveform.from_pretrained(name, trust_remote_code=True)
    assert type(model).__name__ == "SledForSpeechSynthesis" and isinstance(model, GenerationMixin)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    assert type(processor).__name__ == "SledProcessor"
    audio = speak(model, processor)
    save_file({"audio": audio}, f"{folder}/{index}.safetensors")
    speaker = pipeline("text-to-speech", model=name, trust_remote_code=True)
    assert type(speaker.processor).__name__ == "SledProcessor"
    generate_kwargs = {"generator": torch.Generator().manual_seed(0), **options}
    spoken = torch.from_numpy(speaker(text, generate_kwargs=generate_kwargs)["audio"].squeeze())
    torch.testing.assert_close(spoken, audio, atol=1e-4, rtol=0.0)

# What came with code keeps it.
model.save_pretrained(f"{folder}/again")
processor.save_pretrained(f"{folder}/again")
processor = AutoProcessor.from_pretrained(f"{folder}/again", trust_remote_code=True)
model = AutoModelForTextToWaveform.from_pretrained(f"{folder}/again", trust_remote_code=True)
torch.testing.assert_close(speak(model, processor), audio, atol=1e-4, rtol=0.0)
"""


@pytest.mark.timeout(600)
def test_pushed_and_loaded_again(model, processor, tmp_path):
    with Hub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_of_nobody", "HF_HUB_DISABLE_XET": 1}
        run(PUSH, GOLDEN, TEXT, cwd=tmp_path, **environment)
        config = json.loads(hub.get_files("somebody/with-code")["processor_config.json"])
        assert config["auto_map"] == {"AutoProcessor": "processing_sled.SledProcessor"}
        # From there and from a folder, with their code, where the package is missing.
        save_with_code(model, processor, tmp_path / "folder")
        (tmp_path / "audio").mkdir()
        names = ("somebody/with-code", tmp_path / "folder")
        run(WITH_CODE, "--block", TEXT, tmp_path / "audio", *names, cwd=tmp_path / "audio", **environment)
    for index in range(len(names)):
        audio = load_file(tmp_path / "audio" / f"{index}.safetensors")["audio"]
        assert_same_audio(audio, speak(model, processor))


def save_with_code(model, processor, folder: Path) -> None:
    model.save_pretrained(folder, include_code=True)
    processor.save_pretrained(folder)


@pytest.mark.slow
def test_a_folder_with_code_loads_in_a_fresh_environment(model, processor, tmp_path):
    save_with_code(model, processor, tmp_path / "with-code")
    (requirements,) = re.findall(
        r"^pip install (.*)$", (tmp_path / "with-code" / "README.md").read_text(), re.MULTILINE
    )
    venv.create(tmp_path / "environment", with_pip=True)
    python = str(tmp_path / "environment" / "bin" / "python")
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *requirements.split()], check=True)
    environment = {"HF_HUB_OFFLINE": 1, "PYTHONPATH": ""}
    run(WITH_CODE, TEXT, tmp_path, tmp_path / "with-code", cwd=tmp_path, python=python, **environment)
    audio = load_file(tmp_path / "0.safetensors")["audio"]
    torch.testing.assert_close(audio, speak(model, processor), atol=1e-4, rtol=0)


# Checkpoints that cannot be loaded.


def test_incomplete_checkpoints(saved):
    weights_file = saved / "model.safetensors"
    weights = load_file(weights_file)
    for missing in ("final_layer.linear.weight", "codec.decoder.layers.0.conv.bias", "z_proj.bias"):
        rest = {name: tensor for name, tensor in weights.items() if not name.endswith(missing)}
        assert len(rest) == len(weights) - 1
        save_file(rest, weights_file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=re.escape(missing)):
            SledForSpeechSynthesis.from_pretrained(saved)
    save_file({**weights, "z_proj.bias": torch.zeros(3)}, weights_file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"z_proj.bias.*\(3,\)"):
        SledForSpeechSynthesis.from_pretrained(saved)
    weights_file.write_bytes(weights_file.read_bytes()[:50_000])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        SledForSpeechSynthesis.from_pretrained(saved)


def test_checkpoints_that_are_not_sled(tmp_path):
    with pytest.raises(ValueError, match=r"not a SLED checkpoint.*'encodec'"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "codec")
    with pytest.raises(ValueError, match=r"`config`.*EncodecConfig"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", config=EncodecConfig())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a SLED checkpoint"):
        SledForSpeechSynthesis.from_pretrained(tmp_path)


def test_codecs_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"`codec` must be an EnCodec.*'speech_llama'"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "offline")
    config = EncodecConfig.from_pretrained(GOLDEN / "codec")
    small = {"num_filters": 2, "codebook_size": 16}
    wider = EncodecConfig(**{**config.to_dict(), **small, "hidden_size": 16, "codebook_dim": 16})
    with pytest.raises(ValueError, match=r"`codec` has latents of width 16.*32"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=EncodecModel(wider))
    stereo = EncodecConfig(**{**config.to_dict(), **small, "audio_channels": 2, "normalize": True})
    with pytest.raises(ValueError, match=r"`audio_channels`.*2"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=EncodecModel(stereo))
    other_bandwidths = EncodecConfig(**{**config.to_dict(), **small, "target_bandwidths": [1.5]})
    with pytest.raises(ValueError, match=r"`codec_bandwidth` is 6.0.*\[1.5\]"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=EncodecModel(other_bandwidths))
    shutil.copytree(GOLDEN / "codec", tmp_path / "codec")
    weights = load_file(tmp_path / "codec" / "model.safetensors")
    weights.popitem()
    save_file(weights, tmp_path / "codec" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`codec`.*is incomplete: 1 weights"):
        SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=tmp_path / "codec")
