"""The model against the original's numbers, and the ways of loading and running it against each other."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForTextToWaveform, EncodecModel

from transformers_sled import SledConfig, SledForSpeechSynthesis


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
    "cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()], ids=["to", "half"]
)
def test_the_codec_stays_in_float32_when_the_model_is_cast(cast):
    model = cast(load())
    assert model.dtype in (torch.bfloat16, torch.float16)
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


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(model, self_contained, device_map):
    expected = speak(model)
    for loaded in (
        load(device_map=device_map),
        SledForSpeechSynthesis.from_pretrained(self_contained, device_map=device_map),
    ):
        outputs = speak(loaded)
        torch.testing.assert_close(outputs.audio[0].cpu(), expected.audio[0], atol=1e-3, rtol=0)


def test_auto_class_from_config():
    config = AutoConfig.from_pretrained(GOLDEN / "offline")
    config.codec_config = AutoConfig.from_pretrained(GOLDEN / "codec")
    model = AutoModelForTextToWaveform.from_config(config)
    assert isinstance(model, SledForSpeechSynthesis)
    assert model.codec.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.codec.parameters())


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
