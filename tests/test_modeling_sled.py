"""The model against the original's numbers, and the ways of loading and running it against each other."""

import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForTextToWaveform, EncodecModel

from transformers_sled import SledConfig, SledForSpeechSynthesis, SledModel
from transformers_sled.modeling_sled import SledLinear


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = json.loads((GOLDEN / "expected.json").read_text())
TEXT_IDS = EXPECTED["offline.cfg2.input_ids"]


def load(name: str = "offline", **kwargs) -> SledForSpeechSynthesis:
    return SledForSpeechSynthesis.from_pretrained(GOLDEN / name, codec=GOLDEN / "codec", **kwargs)


@pytest.fixture(scope="module")
def models() -> dict[str, SledForSpeechSynthesis]:
    return {name: load(name) for name in ("offline", "streaming")}


@pytest.fixture(scope="module")
def model(models) -> SledForSpeechSynthesis:
    return models["offline"]


@pytest.fixture(scope="module")
def self_contained(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def speak(model: SledForSpeechSynthesis, input_ids: torch.Tensor = TEXT_IDS, **kwargs):
    kwargs = {"generator": seed(), "max_new_tokens": 12, "min_new_tokens": 12, **kwargs}
    return model.generate(input_ids=input_ids, return_dict_in_generate=True, **kwargs)


def get_batch(name: str = "offline", row: int = 0) -> dict[str, torch.Tensor]:
    """Text and speech of the golden losses: both rows of the offline case, or one of the interleaved."""
    lengths, waveform = CASES["loss.lengths"], EXPECTED["codec.waveform"]
    if name == "offline":
        padding_mask = (torch.arange(waveform.shape[-1]) < torch.tensor(lengths)[:, None]).long()
        return {
            "input_ids": EXPECTED["loss.offline.input_ids"],
            "attention_mask": EXPECTED["loss.offline.attention_mask"],
            "input_values": (waveform * padding_mask)[:, None],
            "padding_mask": padding_mask,
        }
    return {
        "input_ids": EXPECTED[f"loss.streaming.row{row}.input_ids"],
        "attention_mask": EXPECTED[f"loss.streaming.row{row}.attention_mask"],
        "input_values": waveform[row : row + 1, None, : lengths[row]],
    }


def without_dropout(model: SledForSpeechSynthesis, text_dropout_prob: float = 0.0) -> SledForSpeechSynthesis:
    """A copy in training mode whose only randomness is text dropout and noise."""
    model = copy.deepcopy(model).train()
    model.config.text_dropout_prob = text_dropout_prob
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


# The original's numbers.


def test_codec_matches_the_original(model):
    latents, mask = model.encode_audio(EXPECTED["codec.input_values"], EXPECTED["codec.padding_mask"])
    # The golden latents go on through the padding.
    expected = EXPECTED["codec.latents"]
    torch.testing.assert_close(latents, expected * mask[..., None], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode_codes(EXPECTED["codec.codes"]), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode_latents(expected), EXPECTED["codec.decoded"][:, 0], atol=1e-4, rtol=0)
    hop_length = model.codec.config.hop_length
    assert mask.sum(dim=1).tolist() == [-(-length // hop_length) for length in CASES["codec.lengths"]]


@pytest.mark.parametrize("text_dropout", [0, 1])
@pytest.mark.parametrize("name", ["offline", "streaming.row0", "streaming.row1"])
def test_losses_match_the_original(models, name, text_dropout):
    kind, _, row = name.partition(".row")
    model = without_dropout(models[kind], float(text_dropout))
    batch = get_batch(kind, int(row or 0))
    torch.manual_seed(CASES["loss.seed"])
    outputs = model(**batch)
    key = f"loss.{name}.textdrop{text_dropout}"
    torch.testing.assert_close(outputs.loss, EXPECTED[key].reshape(()), rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.loss, outputs.energy_loss + outputs.eos_loss)
    if text_dropout:
        # The original counts dropped text as positions of its own padded layout.
        return
    hidden_states = EXPECTED[f"{key}.hidden"]
    for row in range(len(hidden_states)):
        # The original's rows are padded on the left, ours on the right.
        expected = hidden_states[row]
        num_tokens = int(batch["attention_mask"][row].sum())
        start = batch["attention_mask"].shape[1] - num_tokens if kind == "offline" else 0
        num_frames = -(-CASES["loss.lengths"][row if kind == "offline" else int(name[-1])] // 320)
        length = num_tokens + num_frames
        found = outputs.last_hidden_state[row, :length]
        torch.testing.assert_close(found, expected[start : start + length], atol=1e-4, rtol=0)


def test_latent_noise_is_on_what_the_decoder_reads_in_training(models):
    batch = get_batch("offline", 0)
    plain, noisy = without_dropout(models["offline"]), without_dropout(models["offline"])
    noisy.config.latent_noise_std = 1.0
    with torch.no_grad():
        expected, states = (model(**batch, return_loss=False).last_hidden_state for model in (plain, noisy))
        for row, num_tokens in enumerate(batch["attention_mask"].sum(dim=1)):
            torch.testing.assert_close(states[row, :num_tokens], expected[row, :num_tokens])
            assert not torch.isclose(states[row, num_tokens:], expected[row, num_tokens:]).all(dim=-1).any()
        torch.manual_seed(0)
        expected = plain.eval()(**batch).loss
        torch.manual_seed(0)
        torch.testing.assert_close(noisy.eval()(**batch).loss, expected)


def test_latent_noise_is_drawn_for_each_row(models):
    model = without_dropout(models["offline"])
    model.config.latent_noise_std = 1.0
    codes = EXPECTED["codec.codes"][:1].expand(3, -1, -1)
    inputs = []
    model.z_proj.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    torch.manual_seed(0)
    with torch.no_grad():
        model(input_ids=TEXT_IDS[:1].expand(3, -1), audio_codes=codes, return_loss=False)
        noise = (inputs[0] - model.decode_codes(codes)).flatten(1)
    strengths = noise.std(dim=1)
    assert strengths.min() > 0 and strengths.max() <= 1.05 and strengths.diff().abs().min() > 0.05
    correlations = torch.corrcoef(noise) - torch.eye(3)
    assert correlations.abs().max() < 0.1
    # Of a row, each frame has its own.
    frames = noise[0].view(codes.shape[2], -1)
    assert (torch.corrcoef(frames) - torch.eye(len(frames))).abs().mean() < 0.3


@pytest.mark.parametrize(
    ("option", "silent_layers"),
    [
        ("dropout", ["o_proj", "down_proj"]),
        ("activation_dropout", ["down_proj"]),
        ("attention_dropout", ["o_proj"]),
    ],
)
def test_dropout_is_where_the_original_has_it(option, silent_layers):
    """Dropout that drops everything is what weights of zero are, in training; otherwise it changes nothing."""
    probabilities = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, option: 1.0}
    config = SledConfig.from_pretrained(GOLDEN / "offline", attn_implementation="eager", **probabilities)
    dropping = SledModel(config)
    silent = copy.deepcopy(dropping)
    for name, parameter in silent.named_parameters():
        if name.split(".")[-2] in silent_layers:
            torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        expected = silent.eval()(TEXT_IDS).last_hidden_state
        torch.testing.assert_close(dropping.train()(TEXT_IDS).last_hidden_state, expected)
        assert not torch.allclose(dropping.eval()(TEXT_IDS).last_hidden_state, expected)


def test_waveforms_may_be_padded_on_either_side(model):
    batch = get_batch()
    # Loud enough for the golden codec, whose random weights tell quiet waveforms apart by nothing.
    batch["input_values"] = batch["input_values"] * 300
    lengths, length = batch["padding_mask"].sum(dim=1).tolist(), batch["padding_mask"].shape[1]
    left = {
        "input_values": torch.stack(
            [row.roll(length - size, dims=-1) for row, size in zip(batch["input_values"], lengths, strict=True)]
        ),
        "padding_mask": torch.stack(
            [row.roll(length - size) for row, size in zip(batch["padding_mask"], lengths, strict=True)]
        ),
    }
    assert min(lengths) < length
    latents, mask = model.encode_audio(batch["input_values"], batch["padding_mask"])
    for found, expected in zip(model.encode_audio(**left), (latents, mask), strict=True):
        torch.testing.assert_close(found, expected)
    noise = torch.randn(2, *latents.shape[:2], model.config.noise_dim, generator=seed())
    torch.testing.assert_close(model(**batch | left, noise=noise).loss, model(**batch, noise=noise).loss)


@pytest.mark.parametrize("name", ["offline", "streaming"])
def test_codes_may_be_padded_on_either_side(models, name):
    model = models[name]
    text = {"input_ids": TEXT_IDS[:1].expand(2, -1), "attention_mask": torch.ones_like(TEXT_IDS[:1]).expand(2, -1)}
    codes, lengths = EXPECTED["codec.codes"][:2, :, :60], (60, 47)
    noise = torch.randn(2, 2, 60, model.config.noise_dim, generator=seed())
    losses = []
    for side in ("right", "left"):
        rows = torch.zeros_like(codes)
        mask = torch.zeros(2, 60, dtype=torch.long)
        for row, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(60 - length, 60)
            rows[row, :, place], mask[row, place] = codes[row, :, :length], 1
        losses.append(model(**text, audio_codes=rows, audio_codes_mask=mask, noise=noise).loss)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", list(CASES["cases"]))
def test_generation_matches_the_original(models, name):
    case = CASES["cases"][name]
    model = models[name.split(".")[0]]
    input_ids = EXPECTED[f"{name}.input_ids"]
    attention_mask = EXPECTED.get(f"{name}.attention_mask")
    num_prompt_frames = case.get("voice_frames") or 0
    prompt = {}
    if num_prompt_frames:
        prompt["prompt_latents"] = EXPECTED["codec.latents"][:1, :num_prompt_frames]
    torch.manual_seed(case["seed"])
    outputs = model.generate(
        input_ids=input_ids,
        attention_mask=None if attention_mask is None else attention_mask[:, : input_ids.shape[1]],
        guidance_scale=case["cfg"],
        max_new_tokens=case.get("max_new_frames", case.get("max_length")),
        return_dict_in_generate=True,
        **prompt,
    )
    assert outputs.latents_mask.sum(dim=1).tolist() == case["frames_before_eos"]
    hop_length = model.codec.config.hop_length
    for row, num_frames in enumerate(case["frames_before_eos"]):
        latents = EXPECTED[f"{name}.latents"][row, num_prompt_frames:][: num_frames + 1]
        torch.testing.assert_close(outputs.latents[row, : num_frames + 1], latents, atol=1e-4, rtol=0)
        waveform = EXPECTED[f"{name}.waveform"][row, 0, num_prompt_frames * hop_length :][: num_frames * hop_length]
        torch.testing.assert_close(outputs.audio[row], waveform, atol=1e-4, rtol=0)


# Ways of running that must not differ.


def test_a_row_of_a_batch_is_the_row_alone(model):
    input_ids = EXPECTED["offline.batch3_cfg2.input_ids"]
    attention_mask = EXPECTED["offline.batch3_cfg2.attention_mask"][:, : input_ids.shape[1]]
    options = {"max_new_tokens": 30, "min_new_tokens": 0}
    batch = speak(
        model, input_ids, attention_mask=attention_mask, generator=[seed(row) for row in range(3)], **options
    )
    for row in range(3):
        is_real = attention_mask[row].bool()
        alone = speak(model, input_ids[row : row + 1, is_real], generator=[seed(row)], **options)
        assert batch.audio[row].shape == alone.audio[0].shape
        torch.testing.assert_close(batch.audio[row], alone.audio[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["offline", "streaming"])
def test_padding_changes_nothing(models, name):
    model = models[name]
    padding = torch.full((1, 4), model.config.eos_token_id)
    input_ids = torch.cat([padding, TEXT_IDS], dim=1)
    attention_mask = torch.cat([torch.zeros_like(padding), torch.ones_like(TEXT_IDS)], dim=1)
    expected = speak(model)
    padded = speak(model, input_ids, attention_mask=attention_mask)
    torch.testing.assert_close(padded.latents, expected.latents, atol=1e-4, rtol=0)
    hidden_states = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 4:]
    torch.testing.assert_close(hidden_states, model(input_ids=TEXT_IDS).last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["offline", "streaming"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_caches_agree(models, name, options):
    torch.testing.assert_close(speak(models[name], **options).latents, speak(models[name]).latents, atol=1e-4, rtol=0)


def test_eager_and_sdpa_agree(model, self_contained):
    expected = speak(model)
    eager = load(attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(speak(eager).latents, expected.latents, atol=1e-4, rtol=0)
    eager.set_attn_implementation("sdpa")
    assert eager.config._attn_implementation == "sdpa"
    torch.testing.assert_close(speak(eager).latents, expected.latents, atol=1e-4, rtol=0)
    eager = SledForSpeechSynthesis.from_pretrained(self_contained, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(speak(eager).audio[0], expected.audio[0], atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_speech(model):
    first, second, other = (speak(model, generator=seed(number)).audio[0] for number in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_bfloat16_is_close_to_float32(model):
    half = load(dtype=torch.bfloat16)
    expected = model(input_ids=TEXT_IDS).last_hidden_state
    error = half(input_ids=TEXT_IDS).last_hidden_state.float() - expected
    assert error.norm() / expected.norm() < 0.02
    outputs = speak(half, guidance_scale=1.0)
    expected = speak(model, guidance_scale=1.0).latents
    assert outputs.audio[0].dtype == torch.float32
    assert (outputs.latents.float() - expected).norm() / expected.norm() < 0.05


def test_gradient_checkpointing_changes_no_gradient(model):
    noise = torch.randn(2, 2, 75, model.config.noise_dim, generator=seed())
    gradients = []
    for is_on in (False, True):
        copied = without_dropout(model)
        if is_on:
            copied.gradient_checkpointing_enable()
            assert copied.model.gradient_checkpointing
        outputs = copied(**get_batch(), noise=noise)
        outputs.loss.backward()
        gradients.append([parameter.grad for parameter in copied.parameters() if parameter.requires_grad])
    assert all(gradient is not None for gradient in gradients[0])
    for off, on in zip(*gradients, strict=True):
        torch.testing.assert_close(on, off, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_compiled_forward_is_the_eager_one(model):
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    torch.testing.assert_close(
        compiled(input_ids=TEXT_IDS).last_hidden_state,
        model(input_ids=TEXT_IDS).last_hidden_state,
        atol=1e-4,
        rtol=0,
    )


# Loading.


def assert_codec_is_exact(model: SledForSpeechSynthesis) -> None:
    """The codec has the original's very weights, in float32, and computes with them."""
    expected = EncodecModel.from_pretrained(GOLDEN / "codec").state_dict()
    found = model.codec.state_dict()
    assert found.keys() == expected.keys()
    assert not any(parameter.requires_grad for parameter in model.codec.parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    latents, _ = model.encode_audio(EXPECTED["codec.input_values"], EXPECTED["codec.padding_mask"])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents[0], EXPECTED["codec.latents"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["released", "self-contained"])
def test_the_codec_stays_in_float32_at_load(self_contained, layout, dtype):
    model = (
        load(dtype=dtype)
        if layout == "released"
        else SledForSpeechSynthesis.from_pretrained(self_contained, dtype=dtype)
    )
    assert {parameter.dtype for name, parameter in model.named_parameters() if not name.startswith("codec.")} == {
        dtype
    }
    assert model.dtype == dtype
    assert_codec_is_exact(model)


def test_a_checkpoint_in_half_precision_keeps_its_codec(tmp_path):
    load(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    model = SledForSpeechSynthesis.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert_codec_is_exact(model)
    assert_codec_is_exact(SledForSpeechSynthesis.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize(
    "cast",
    [lambda model: model.to(torch.bfloat16), lambda model: model.half(), lambda model: model.double()],
    ids=["to", "half", "double"],
)
def test_the_codec_stays_in_float32_when_the_model_is_cast(cast):
    model = cast(load())
    assert model.dtype in (torch.bfloat16, torch.float16, torch.float64)
    assert_codec_is_exact(model)
    assert_codec_is_exact(model.float())


def test_autocast_does_not_reach_the_codec(model):
    latents = EXPECTED["codec.latents"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_codec_is_exact(model)
        decoded = model.decode_latents(latents)
        loss = without_dropout(model)(**get_batch()).loss
        outputs = speak(model)
    assert torch.equal(decoded, model.decode_latents(latents))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert outputs.audio[0].dtype == torch.float32 and torch.isfinite(outputs.audio[0]).all()


PARTS = ("model", "z_proj", "z_proj_ln", "eos_head", "generative_head", "codec")


@pytest.mark.parametrize("layout", ["released", "self-contained"])
@pytest.mark.parametrize(
    ("placement", "expected_on_disk"),
    [
        ({"device_map": "cpu"}, set()),
        ({"device_map": "auto", "max_memory": {"cpu": "700KB"}}, {"model", "generative_head"}),
        ({"device_map": dict.fromkeys(PARTS, "cpu") | {"codec": "disk"}}, set()),
        ({"device_map": dict.fromkeys(PARTS, "cpu") | {"model": "disk"}}, {"model"}),
    ],
    ids=["cpu", "auto", "codec on disk", "decoder on disk"],
)
def test_device_map(model, self_contained, tmp_path, layout, placement, expected_on_disk):
    placement = placement | ({} if placement["device_map"] == "cpu" else {"offload_folder": tmp_path})
    if layout == "self-contained" and placement["device_map"] == "auto":
        if Version(transformers.__version__) < Version("5.20"):
            pytest.skip(
                "This version leaves room for the largest module, so that it puts all of so small a model on disk."
            )
        # Room for all but the codec.
        placement, expected_on_disk = placement | {"max_memory": {"cpu": "2MB"}}, {"codec"}
    if layout == "self-contained" and "disk" in str(placement.get("device_map")):
        # The codec of a released checkpoint is loaded on its own, to where the model computes.
        expected_on_disk = expected_on_disk | ({"codec"} if placement["device_map"]["codec"] == "disk" else set())
    loaded = (
        load(**placement)
        if layout == "released"
        else SledForSpeechSynthesis.from_pretrained(self_contained, **placement)
    )
    on_disk = {name.split(".")[0] for name, weight in loaded.named_parameters() if weight.device.type == "meta"}
    assert expected_on_disk <= on_disk
    assert loaded.device == torch.device("cpu")
    assert not any(name.startswith(("codec.", "generative_head.")) for name in getattr(loaded, "hf_device_map", {}))
    torch.testing.assert_close(speak(loaded).audio[0], speak(model).audio[0], atol=1e-4, rtol=0)
    assert torch.equal(
        loaded.encode_audio(EXPECTED["codec.input_values"])[0], model.encode_audio(EXPECTED["codec.input_values"])[0]
    )


def test_cpu_offload(model):
    offloaded = load()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert offloaded.codec.decoder.layers[0].conv.bias.device.type == "meta"
    torch.testing.assert_close(speak(offloaded).audio[0], speak(model).audio[0], atol=1e-4, rtol=0)
    latents, _ = offloaded.encode_audio(EXPECTED["codec.input_values"], EXPECTED["codec.padding_mask"])
    torch.testing.assert_close(latents[0], EXPECTED["codec.latents"][0], atol=1e-6, rtol=0)


def test_fields_of_the_configuration_as_arguments(self_contained):
    for kind in (SledForSpeechSynthesis, AutoModelForTextToWaveform):
        loaded = kind.from_pretrained(self_contained, attention_dropout=0.25, training_cfg=0.5)
        assert (loaded.config.attention_dropout, loaded.config.text_dropout_prob) == (0.25, 0.5)
        assert loaded.model.layers[0].self_attn.attention_dropout == 0.25
    assert load(training_cfg=0.5).config.text_dropout_prob == 0.5
    with pytest.raises(StrictDataclassError, match="text_dropout_prob"):
        load(text_dropout_prob=2.0)


def test_a_lora_folder_loads_as_its_model(self_contained, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "cond_embed"], init_lora_weights=False)
    trained = peft.get_peft_model(SledForSpeechSynthesis.from_pretrained(self_contained), config)
    trained.save_pretrained(tmp_path)
    expected = trained.eval()(input_ids=TEXT_IDS).last_hidden_state
    for kind in (SledForSpeechSynthesis, AutoModelForTextToWaveform):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is SledForSpeechSynthesis
        torch.testing.assert_close(loaded(input_ids=TEXT_IDS).last_hidden_state, expected)
        assert_codec_is_exact(loaded)


def test_a_checkpoint_without_its_configuration_is_refused_by_name(self_contained, tmp_path):
    shutil.copytree(self_contained, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"`config\.json`"):
        SledForSpeechSynthesis.from_pretrained(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["offline", "streaming"])
def test_weights_are_saved_under_the_names_of_the_classes(models, name, tmp_path):
    models[name].save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(models[name].state_dict())


def test_a_model_goes_to_other_processes(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert_codec_is_exact(copied)
        assert not copied.training and not copied.codec.training
        assert copied.codec.decoder.layers[0].conv.bias is not model.codec.decoder.layers[0].conv.bias
        # Sums depend on where weights lie in memory, on some processors.
        torch.testing.assert_close(speak(copied).audio[0], speak(model).audio[0], atol=1e-6, rtol=0)
    rows = datasets.Dataset.from_dict({"codes": [row.tolist() for row in EXPECTED["codec.codes"]]})
    rows = rows.map(lambda row: {"sum": model.decode_codes(torch.tensor([row["codes"]])).sum().item()}, num_proc=2)
    expected = EXPECTED["codec.latents"].sum(dim=(1, 2))
    torch.testing.assert_close(torch.tensor(rows["sum"][:]), expected, atol=1e-2, rtol=1e-4)


def send_speech(model: SledForSpeechSynthesis, queue: torch.multiprocessing.Queue) -> None:
    queue.put(speak(model).audio[0].numpy())


@pytest.mark.slow
def test_a_model_goes_to_a_process_that_is_spawned(model):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=send_speech, args=(model, queue))
    process.start()
    speech = torch.from_numpy(queue.get(timeout=300))
    process.join()
    torch.testing.assert_close(speech, speak(model).audio[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_auto_class_from_config(dtype):
    config = AutoConfig.from_pretrained(GOLDEN / "offline")
    config.codec_config = AutoConfig.from_pretrained(GOLDEN / "codec")
    model = AutoModelForTextToWaveform.from_config(config, dtype=dtype)
    assert isinstance(model, SledForSpeechSynthesis)
    assert model.dtype == (dtype or torch.float32)
    assert {tensor.dtype for tensor in model.codec.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.codec.parameters())
    assert torch.isfinite(speak(model).audio[0]).all()


@pytest.fixture
def default_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_default_dtype_does_not_reach_the_codec(model, default_bfloat16):
    assert_codec_is_exact(load(dtype=torch.float32))
    assert_codec_is_exact(model)
    decoded = model.decode_latents(EXPECTED["codec.latents"])
    torch.testing.assert_close(decoded, EXPECTED["codec.decoded"][:, 0], atol=1e-4, rtol=0)


def test_initialization_is_the_original_one():
    model = SledForSpeechSynthesis(
        SledConfig.from_pretrained(GOLDEN / "offline", codec_config=load().config.codec_config)
    )
    head = model.generative_head
    for linear in (model.z_proj, model.eos_head, head.cond_embed, head.input_proj, head.res_blocks[0].mlp[0]):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert linear.bias is None or not linear.bias.any()
    # A fresh head ignores its noise and puts out zeros.
    assert not speak(model).latents.any()
    standard_deviation = torch.cat([model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight]).std()
    torch.testing.assert_close(standard_deviation, torch.tensor(0.02), rtol=0.02, atol=0)


def test_lora_trains_and_merges(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "cond_embed"])
    lora = peft.get_peft_model(without_dropout(model), config)
    assert all("lora" in name for name, parameter in lora.named_parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    noise = torch.randn(2, 2, 75, model.config.noise_dim, generator=seed())
    losses = []
    for _ in range(2):
        loss = lora(**get_batch(), noise=noise).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    lora.eval()
    expected = lora(input_ids=TEXT_IDS).last_hidden_state
    merged = lora.merge_and_unload()
    assert isinstance(merged, SledForSpeechSynthesis)
    torch.testing.assert_close(merged(input_ids=TEXT_IDS).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(
        merged(input_ids=TEXT_IDS).last_hidden_state, model(input_ids=TEXT_IDS).last_hidden_state
    )
    assert_codec_is_exact(merged)


def test_torchao_quantization(model, tmp_path):
    torchao_quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig())
    quantized = load(dtype=torch.bfloat16, quantization_config=config)

    def get_quantized_names(model):
        return {name for name, parameter in model.named_parameters() if type(parameter) is not torch.nn.Parameter}

    names = get_quantized_names(quantized)
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any(name.startswith("codec.") or "norm" in name or "_ln" in name for name in names)
    assert_codec_is_exact(quantized)
    expected = model(input_ids=TEXT_IDS).last_hidden_state
    hidden_states = quantized(input_ids=TEXT_IDS).last_hidden_state.float()
    assert 0 < (hidden_states - expected).norm() / expected.norm() < 0.05
    outputs = speak(quantized)
    assert torch.isfinite(outputs.audio[0]).all()

    quantized.save_pretrained(tmp_path)
    loaded = SledForSpeechSynthesis.from_pretrained(tmp_path)
    assert get_quantized_names(loaded) == names
    assert_codec_is_exact(loaded)
    torch.testing.assert_close(loaded(input_ids=TEXT_IDS).last_hidden_state.float(), hidden_states)
    torch.testing.assert_close(speak(loaded).audio[0], outputs.audio[0], atol=1e-4, rtol=0.0)


@pytest.mark.slow
def test_full_size_is_one_file_and_loads_in_little_memory(tmp_path):
    script = Path(__file__).parents[1] / "evaluation" / "measure_loading.py"
    subprocess.run([sys.executable, script, "write", tmp_path], check=True)
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, script, "loading", tmp_path / dtype, tmp_path / "codec"]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        assert result["ratio"] <= 1.4
    SledForSpeechSynthesis(SledConfig()).save_pretrained(tmp_path / "saved")
    assert [file.name for file in (tmp_path / "saved").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 2, 7)])
def test_linear_layers_in_bfloat16_are_linear_layers(bias, shape):
    torch.manual_seed(0)
    parent = torch.nn.Sequential(torch.nn.Linear(48, 32, bias=bias)).bfloat16()
    plain = parent[0]
    SledLinear.replace_in(parent)
    assert parent[0].weight is plain.weight and parent[0].bias is plain.bias
    inputs = torch.randn(*shape, 48)
    with torch.no_grad():
        expected = torch.nn.functional.linear(
            inputs.bfloat16().double(), plain.weight.double(), plain.bias.double() if bias else None
        )
        actual = parent[0](inputs.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, atol=0.02, rtol=0.02)
    # Gradients take the base class's way.
    parent(inputs.bfloat16()).sum().backward()
    assert plain.weight.grad is not None
