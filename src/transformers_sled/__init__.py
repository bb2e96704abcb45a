"""SLED text-to-speech for Hugging Face transformers. Importing it registers its classes with the Auto classes."""

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForTextToWaveform, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .codec_sled import SledAudioChunker, SledStreamingDecoder
from .configuration_sled import SledConfig
from .generation_sled import SledAudioStreamer, SledGenerateOutput, SledGenerationMixin
from .modeling_sled import SledForSpeechSynthesis, SledGenerativeHead, SledModel, SledOutput, SledPromptOutput
from .pipeline_sled import SledTextToAudioPipeline
from .processing_sled import SledProcessor
from .quantization_sled import SledInt4Config
from .serving_sled import SledStream, SledStreamServer
from .text_sled import SledIncrementalTokenizer
from .training.collator import SledDataCollator
from .voices import builtin_voice


__version__ = "0.1.0"

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
    "SledDataCollator",
    "SledForSpeechSynthesis",
    "SledGenerateOutput",
    "SledGenerationMixin",
    "SledGenerativeHead",
    "SledIncrementalTokenizer",
    "SledInt4Config",
    "SledModel",
    "SledOutput",
    "SledProcessor",
    "SledPromptOutput",
    "SledStream",
    "SledStreamServer",
    "SledStreamingDecoder",
    "SledTextToAudioPipeline",
    "__version__",
    "builtin_voice",
]
