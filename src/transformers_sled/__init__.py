"""SLED text-to-speech for Hugging Face transformers. Importing it registers its classes with the Auto classes."""

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForTextToWaveform

from .configuration_sled import SledConfig
from .generation_sled import SledGenerateOutput
from .modeling_sled import SledForSpeechSynthesis, SledModel

AutoConfig.register("sled", SledConfig)
CONFIG_MAPPING.register("speech_llama", SledConfig)
AutoModel.register(SledConfig, SledModel)
AutoModelForTextToWaveform.register(SledConfig, SledForSpeechSynthesis)
