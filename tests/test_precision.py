"""What a model is loaded in where nothing is asked for."""

import pytest
import torch

from transformers_sled import SledConfig, SledInt4Config, builtin_voice
from transformers_sled.precision import Precision, choose_precision


@pytest.fixture(params=[True, False])
def is_fast_in_bfloat16(request, monkeypatch):
    # Which processor this is.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def test_few_streams_of_a_large_model_are_in_4_bits_and_many_in_bfloat16(is_fast_in_bfloat16):
    choices = [choose_precision(SledConfig(), "cpu", num_streams) for num_streams in (1, 4, 5, 32)]
    if is_fast_in_bfloat16:
        assert choices == [Precision("bfloat16", "int4")] * 2 + [Precision("bfloat16")] * 2
    else:
        assert choices == [Precision()] * 4
    assert choose_precision(SledConfig(), "cuda:1", 1) == Precision("bfloat16")


def test_one_text_is_not_quantized_for(is_fast_in_bfloat16):
    choice = choose_precision(SledConfig(), "cpu", 1, quantizes=False)
    assert choice == Precision("bfloat16" if is_fast_in_bfloat16 else "auto")


def test_small_and_quantized_models_are_left(is_fast_in_bfloat16):
    assert choose_precision(SledConfig.from_pretrained(builtin_voice()), "cuda", 1) == Precision()
    config = SledConfig()
    config.quantization_config = SledInt4Config()
    assert choose_precision(config, "cpu", 1) == Precision()


def test_arguments_are_those_of_loading():
    assert Precision().get_loading_arguments() == {"dtype": "auto"}
    arguments = Precision("bfloat16", "int4").get_loading_arguments()
    assert arguments["dtype"] == "bfloat16" and isinstance(arguments["quantization_config"], SledInt4Config)
    assert str(Precision("bfloat16", "int4")) == "bfloat16 with int4 weights"
    with pytest.raises(ValueError, match="`quantization`"):
        Precision("bfloat16", "int5").get_loading_arguments()
