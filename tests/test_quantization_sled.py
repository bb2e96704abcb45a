"""4-bit weights: what is quantized and how well, and that it is saved, loaded, streamed and compiled as it is."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTextToWaveform

from transformers_sled import SledConfig, SledForSpeechSynthesis, SledInt4Config
from transformers_sled.quantization_sled import SledInt4Linear, quantize_weight


IDS = torch.tensor([[0, 5, 9, 7, 11, 2]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = SledConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        latent_dim=8,
        noise_dim=8,
        head_num_layers=2,
        head_hidden_size=64,
        max_position_embeddings=128,
        codec_config={"num_filters": 2, "hidden_size": 8, "codebook_size": 8, "upsampling_ratios": [4, 3, 2]},
    )
    model = SledForSpeechSynthesis(config)
    for parameter in model.generative_head.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def load(folder, dtype="float32", **options):
    return SledForSpeechSynthesis.from_pretrained(folder, dtype=dtype, **options).eval()


def generate(model, **options):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "generator": torch.Generator().manual_seed(0)} | options
    output = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), return_dict_in_generate=True, **options
    )
    return output.latents


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_quantized_computes_with_the_weights_it_stands_for(checkpoint, dtype):
    model = load(checkpoint, dtype, quantization_config=SledInt4Config())
    original = load(checkpoint)
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, SledInt4Linear)}
    linear = {name for name, layer in original.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert linear - quantized == {
        "z_proj", "eos_head", "generative_head.input_proj", "generative_head.final_layer.linear"
    }  # fmt: skip
    last = f"model.layers.{len(model.model.layers) - 1}.mlp.down_proj"
    doubled = {name for name in quantized if name.startswith("generative_head.")} | {last}
    assert {name for name in quantized if model.get_submodule(name).num_terms == 2} == doubled != {last}
    for name in quantized:
        layer, weight = model.get_submodule(name), original.get_submodule(name).weight
        steps = (weight.unflatten(1, (-1, 32)).amax(-1) - weight.unflatten(1, (-1, 32)).amin(-1)) / 15
        error = (layer.dequantize() - weight).abs().unflatten(1, (-1, 32)).amax(-1)
        # Half a step would be the most without fitting; what is fitted may cut off the ends.
        assert (error < 2.5 * steps * (0.2 if name in doubled else 1)).all()
        inputs = torch.randn(3, 2, weight.shape[1]).to(getattr(torch, dtype))
        bias = None if layer.bias is None else layer.bias.float()
        expected = torch.nn.functional.linear(inputs.float(), layer.dequantize(), bias)
        assert layer(inputs).dtype == inputs.dtype
        torch.testing.assert_close(layer(inputs).float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("group_size", [32, 64])
def test_fit_beats_the_range(group_size):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    numbers, lines = quantize_weight(weight, group_size)
    assert numbers.min() >= 0 and numbers.max() <= 15
    scales, offsets = lines.float().repeat_interleave(group_size, dim=0).unbind(-1)
    error = ((numbers - 8) * scales.t() + offsets.t() - weight).square().mean()
    groups = weight.unflatten(1, (-1, group_size))
    lowest = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - lowest) / 15
    plain = (((groups - lowest) / step).round() * step + lowest - groups).square().mean()
    assert error < 0.9 * plain


def test_groups_of_one_value_are_exact():
    weight = torch.tensor([0.0, 0.5, -3.0]).repeat_interleave(32).expand(16, -1)
    numbers, lines = quantize_weight(weight, 32)
    scales, offsets = lines.float().repeat_interleave(32, dim=0).unbind(-1)
    assert torch.equal((numbers - 8) * scales.t() + offsets.t(), weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_it_is_the_same(checkpoint, tmp_path, dtype):
    model = load(checkpoint, dtype, quantization_config=SledInt4Config())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].dtype == torch.uint8 and stored[name].shape == (64, 80)
    # The file's layout is its own and not a processor's: the first of two neighbours is in the low half.
    numbers = model.model.layers[0].mlp.down_proj.get_numbers()
    assert torch.equal(stored[name] & 15, numbers[:, ::2]) and torch.equal(stored[name] >> 4, numbers[:, 1::2])
    again = AutoModelForTextToWaveform.from_pretrained(tmp_path)
    assert again.dtype == model.dtype and again.config.quantization_config.group_size == 32
    assert torch.equal(generate(again), generate(model))
    again.save_pretrained(tmp_path / "again")
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(value, stored[key]), key
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, SledInt4Linear):
            layer.weight.zero_()
            layer.scales_and_offsets.zero_()
    assert not torch.equal(generate(copied), generate(model))
    copied.load_state_dict(model.state_dict())
    assert torch.equal(generate(copied), generate(model))


def test_weights_take_an_eighth(checkpoint):
    def count(model):
        return sum(
            tensor.nbytes
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if "layers.0" in name and "proj" in name
        )

    whole = count(load(checkpoint).model)
    # Scale and offset of a group of 32 add 1 bit to 4.
    assert count(load(checkpoint, quantization_config=SledInt4Config()).model) == whole * 5 / 32


def test_streams_and_batches_as_any_model(checkpoint):
    model = load(checkpoint, quantization_config=SledInt4Config())
    latents = generate(model, guidance_scale=2.0)
    twice = model.generate(
        input_ids=IDS.repeat(2, 1),
        attention_mask=torch.ones(2, IDS.shape[1], dtype=torch.long),
        max_new_tokens=12,
        min_new_tokens=12,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        return_dict_in_generate=True,
    ).latents
    torch.testing.assert_close(twice[:1], latents, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_is_eager(checkpoint, dtype):
    model = load(checkpoint, dtype, quantization_config=SledInt4Config())
    expected = generate(model, guidance_scale=2.0)
    model.compile_generation()
    difference = (generate(model, guidance_scale=2.0) - expected).float()
    # Products round their inputs, and in bfloat16 the compiler rounds less often in between than PyTorch does.
    assert difference.norm() / expected.float().norm() < (0.01 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("group_size", [0, 48, "32"])
def test_bad_group_size(group_size):
    with pytest.raises(ValueError, match="`group_size`"):
        SledInt4Config(group_size=group_size)


def test_other_devices_are_refused(checkpoint):
    with pytest.raises(ValueError, match="TorchAoConfig"):
        load(checkpoint, quantization_config=SledInt4Config(), device_map="cuda")
    layer = SledInt4Linear(32, 16, device="meta")
    with pytest.raises(ValueError, match="TorchAoConfig"):
        layer(torch.ones(1, 32, device="meta"))


def test_layers_that_do_not_fit_are_left(checkpoint):
    model = load(checkpoint, quantization_config=SledInt4Config(group_size=64))
    assert isinstance(model.model.layers[0].mlp.up_proj, SledInt4Linear)
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    model = load(checkpoint, quantization_config=SledInt4Config(modules_to_not_convert=["codec", "generative_head"]))
    assert isinstance(model.model.layers[0].mlp.up_proj, SledInt4Linear)
    assert not any(isinstance(layer, SledInt4Linear) for layer in model.generative_head.modules())


def test_checkpoint_in_the_released_format(tmp_path):
    golden = Path(__file__).parent / "fixtures" / "golden"
    released = golden / "offline"
    options = {"codec": golden / "codec"} if (golden / "codec").exists() else {}
    model = load(released, quantization_config=SledInt4Config(), **options)
    assert any(isinstance(layer, SledInt4Linear) for layer in model.modules())
