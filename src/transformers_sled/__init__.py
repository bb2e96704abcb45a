"""SLED text-to-speech for Hugging Face transformers. Importing it registers its classes with the Auto classes."""

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForTextToWaveform, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_sled import SledConfig
from .generation_sled import SledGenerateOutput, SledGenerationMixin
from .modeling_sled import SledForSpeechSynthesis, SledGenerativeHead, SledModel, SledOutput, SledPromptOutput
from .pipeline_sled import SledTextToAudioPipeline
from .processing_sled import SledProcessor
from .serving_sled import SledStream, SledStreamServer
from .streaming_sled import SledAudioChunker, SledAudioStreamer, SledIncrementalTokenizer, SledStreamingDecoder
from .voices import builtin_voice


AutoConfig.register("sled", SledConfig)
# `AutoConfig.register` takes one model type for a class; this is the released checkpoints'.
CONFIG_MAPPING.register("speech_llama", SledConfig)
AutoModel.register(SledConfig, SledModel)
AutoModelForTextToWaveform.register(SledConfig, SledForSpeechSynthesis)
AutoProcessor.register(SledConfig, SledProcessor)
# `register_pipeline` would warn of the pipeline that this one extends.
PIPELINE_REGISTRY.supported_tasks["text-to-audio"]["impl"] = SledTextToAudioPipeline

__all__ = [
    "SledAudioChunker",
    "SledAudioStreamer",
    "SledConfig",
    "SledForSpeechSynthesis",
    "SledGenerateOutput",
    "SledGenerationMixin",
    "SledGenerativeHead",
    "SledIncrementalTokenizer",
    "SledModel",
    "SledOutput",
    "SledProcessor",
    "SledPromptOutput",
    "SledStream",
    "SledStreamServer",
    "SledStreamingDecoder",
    "SledTextToAudioPipeline",
    "builtin_voice",
]
