"""The pipeline of transformers for text-to-speech, for which a processor is enough."""

from typing import Any

from transformers import EncodecFeatureExtractor, PreTrainedModel, PreTrainedTokenizerBase, TextToAudioPipeline

from .configuration_sled import SledConfig
from .processing_sled import SledProcessor


class SledTextToAudioPipeline(TextToAudioPipeline):
    """
    The `"text-to-speech"` pipeline, in which a SLED model always has a [`SledProcessor`]: without one, its tokenizer would
    take the arguments of a voice and do nothing with them. To other models it is what it is in transformers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. That of `processor` by default.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            Its processor. For a SLED model by default that of the checkpoint it comes from, or one with `tokenizer`.
        kwargs:
            Further arguments of [`~transformers.TextToAudioPipeline`].

    Raises:
        `ValueError`: if there is neither, or a SLED model is given another model's processor.

    Example:

    ```python
    >>> pipe = pipeline("text-to-speech", model=model, processor=processor)
    >>> speech = pipe("Hello, world.", preprocess_params={"voice_preset": "af_heart"})
    ```
    """

    # `pipeline` must not insist on one where a processor is given.
    _load_tokenizer = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: Any = None,
        **kwargs: Any,
    ) -> None:
        if model.config.model_type == SledConfig.model_type:
            processor = _get_processor(model, tokenizer, processor)
            tokenizer = processor.tokenizer
            # Without it, the pipeline writes generation parameters into the model's configuration to look for it there.
            kwargs.setdefault("sampling_rate", processor.feature_extractor.sampling_rate)
        elif tokenizer is None and processor is None:
            raise ValueError(
                f"`processor` or `tokenizer` of {type(model).__name__} is missing, or could not be loaded."
            )
        super().__init__(model=model, tokenizer=tokenizer, processor=processor, **kwargs)


def _get_processor(model: PreTrainedModel, tokenizer: Any, processor: Any) -> Any:
    # By its name: the class in a checkpoint's own code is another one.
    names = [type(one).__name__ for one in (processor, tokenizer)]
    if SledProcessor.__name__ in names:
        return (processor, tokenizer)[names.index(SledProcessor.__name__)]
    if processor is not None:
        raise ValueError(f"`processor` must be a `SledProcessor`, got {names[0]}.")
    checkpoint = model.config.name_or_path
    if tokenizer is None and not checkpoint:
        raise ValueError("`processor` is missing, and the model comes from no checkpoint to load it from.")
    if tokenizer is None or tokenizer.name_or_path == checkpoint:
        return SledProcessor.from_pretrained(checkpoint)
    codec_config = model.get_codec().config
    return SledProcessor(
        EncodecFeatureExtractor(sampling_rate=codec_config.sampling_rate),
        tokenizer,
        hop_length=codec_config.hop_length,
        max_position_embeddings=model.config.max_position_embeddings,
    )


__all__ = ["SledTextToAudioPipeline"]
