"""SLED configuration."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import EncodecConfig, LlamaConfig


@strict
class SledConfig(LlamaConfig):
    r"""
    Configuration of a SLED text-to-speech model: a Llama-style decoder over text tokens and continuous speech latents, a
    generative head that samples the next latent in one pass, and an EnCodec codec between latents and audio. The default
    values are the released offline architecture, `ICTNLP/SLED-TTS-Libriheavy`.

    The fields of [`~transformers.LlamaConfig`] describe the decoder. The released checkpoints' own names
    (`vae_embed_dim`, `diffloss_d`, `diffloss_w`, `noise_channels`, `training_cfg`, `stream_n`, `stream_m`) are accepted
    in place of this class's and read the same value.

    Args:
        latent_dim (`int`, *optional*, defaults to 128):
            Width of a speech latent, which is the codec's `hidden_size`.
        head_num_layers (`int`, *optional*, defaults to 6):
            Number of residual blocks of the generative head.
        head_hidden_size (`int`, *optional*, defaults to 1024):
            Width of the generative head.
        noise_dim (`int`, *optional*, defaults to 128):
            Width of the noise that the generative head turns into a latent.
        text_dropout_prob (`float`, *optional*, defaults to 0.1):
            Probability of hiding a row's text in training, which teaches the unconditional branch of guidance.
        latent_noise_std (`float`, *optional*, defaults to 0.0):
            Largest standard deviation of the noise on the latents that the decoder reads in training, drawn for each row
            from 0 to it, in the unit of the latents. Targets stay without noise. Not in the original.
        text_chunk_size (`int`, *optional*):
            Number of text tokens that an interleaved model reads at a time. `None` for an offline model, which reads the
            whole text first.
        speech_chunk_size (`int`, *optional*):
            Number of speech frames that an interleaved model writes after each text chunk. `None` for an offline model.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout in training on the outputs of attention and of the MLP, before they join the residual.
        activation_dropout (`float`, *optional*, defaults to 0.1):
            Dropout in training inside the MLP, before its down projection.
        codec_config (`EncodecConfig` or `dict`, *optional*):
            Configuration of the codec. `None` in a checkpoint that holds no codec weights, as the released ones do: the
            codec then comes from `codec_id`.
        codec_id (`str`, *optional*, defaults to `"facebook/encodec_24khz"`):
            Repository that the codec is loaded from where the checkpoint holds none.
        codec_bandwidth (`float`, *optional*, defaults to 6.0):
            Bandwidth in kbit/s at which audio is quantized, which sets how many codebook vectors make a latent.

    Raises:
        `ValueError`: if a value is out of range, or only one of `text_chunk_size` and `speech_chunk_size` is given.

    Example:

    ```python
    >>> from transformers_sled import SledConfig, SledForSpeechSynthesis

    >>> configuration = SledConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    >>> model = SledForSpeechSynthesis(configuration)
    >>> model.config.is_interleaved
    False
    ```
    """

    model_type = "sled"
    # A `Trainer` would keep them of every batch that it predicts.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "last_hidden_state",
        "hidden_states",
        "attentions",
    ]
    sub_configs: ClassVar[dict[str, type]] = {"codec_config": EncodecConfig}
    attribute_map: ClassVar[dict[str, str]] = {
        "vae_embed_dim": "latent_dim",
        "diffloss_d": "head_num_layers",
        "diffloss_w": "head_hidden_size",
        "noise_channels": "noise_dim",
        "training_cfg": "text_dropout_prob",
        "stream_n": "text_chunk_size",
        "stream_m": "speech_chunk_size",
    }

    vocab_size: int = 16384
    hidden_size: int = 1024
    intermediate_size: int = 2752
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int = 2
    dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    attention_dropout: int | float | None = 0.1
    latent_dim: int = 128
    head_num_layers: int = 6
    head_hidden_size: int = 1024
    noise_dim: int = 128
    text_dropout_prob: float | int = 0.1
    latent_noise_std: float | int = 0.0
    text_chunk_size: int | None = None
    speech_chunk_size: int | None = None
    codec_config: EncodecConfig | dict | None = None
    codec_id: str | None = "facebook/encodec_24khz"
    codec_bandwidth: float | int = 6.0

    def __post_init__(self, **kwargs: Any) -> None:
        # A released checkpoint's own name would hide the class's.
        kwargs.pop("model_type", None)
        if isinstance(self.codec_config, dict):
            self.codec_config = EncodecConfig(**self.codec_config)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The released checkpoints' `model_type`, `speech_llama`, is read as this class's own."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == "speech_llama":
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        super().validate_architecture()
        for name in ("latent_dim", "head_num_layers", "head_hidden_size", "noise_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("dropout", "activation_dropout", "attention_dropout", "text_dropout_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be a probability between 0 and 1, got {getattr(self, name)}.")
        if self.latent_noise_std < 0:
            raise ValueError(f"`latent_noise_std` must not be negative, got {self.latent_noise_std}.")
        chunk_sizes = {name: getattr(self, name) for name in ("text_chunk_size", "speech_chunk_size")}
        if (self.text_chunk_size is None) != (self.speech_chunk_size is None):
            raise ValueError(
                f"`text_chunk_size` and `speech_chunk_size` go together: both are set for an interleaved model, both are "
                f"`None` for an offline one, got {chunk_sizes}."
            )
        if any(size is not None and size < 1 for size in chunk_sizes.values()):
            raise ValueError(f"`text_chunk_size` and `speech_chunk_size` must be at least 1, got {chunk_sizes}.")

    @property
    def is_interleaved(self) -> bool:
        """Whether the model reads text and writes speech in turns."""
        return self.text_chunk_size is not None


__all__ = ["SledConfig"]
