"""What the speech service can be told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path

from ..voices import builtin_voice
from .watermark import is_available


@dataclass(frozen=True)
class ServiceSettings:
    r"""
    Settings of the speech service.

    Args:
        model (`str`, *optional*):
            Checkpoint that speaks whole texts: a repository on the Hub or a folder. The voice in the box by default.
        streaming_model (`str`, *optional*):
            Interleaved checkpoint that speaks texts while they are written. By default that of the box beside the default
            `model`, and `model` itself beside another one.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where to compute.
        dtype (`str`, *optional*):
            Precision of the models, `"auto"` for that of the checkpoints. By default what is fastest on this machine, as
            [`choose_precision`] says, unless `quantization` is given.
        quantization (`str`, *optional*):
            Weights in `"int4"`, on a CPU, or in `"int8"`.
        compiles (`bool`, *optional*, defaults to `False`):
            Whether to compile the models before the service is ready, which takes half a minute or more.
        api_keys (`tuple[str, ...]`, *optional*):
            Keys of which a request must bring one. None are asked for by default.
        max_streams (`int`, *optional*, defaults to 8):
            Texts that each model speaks at a time.
        max_queue (`int`, *optional*, defaults to 32):
            Texts that wait for their turn at each model. Further ones are refused with status 429.
        max_input_characters (`int`, *optional*, defaults to 4096):
            Length of the text of one request, or of one utterance on a WebSocket.
        max_body_bytes (`int`, *optional*, defaults to 12 MiB):
            Size of the body of one request.
        max_duration (`float`, *optional*, defaults to 600):
            Seconds of speech after which an utterance is cut off.
        max_connections (`int`, *optional*, defaults to 512):
            Connections at a time. Further ones are refused with status 503.
        client_timeout (`float`, *optional*, defaults to 30):
            Seconds for which a client may keep the service waiting, for the body of its request or by not reading what is
            sent to it, before it is dropped.
        idle_timeout (`float`, *optional*, defaults to 300):
            Seconds for which a WebSocket may stay silent while nothing is spoken on it.
        shutdown_timeout (`int`, *optional*, defaults to 30):
            Seconds that streams get to finish when the service is stopped.
        cors_origins (`tuple[str, ...]`, *optional*):
            Origins of web pages elsewhere that may use the service, such as `https://example.org`.
        voices_folder (`str` or `Path`, *optional*):
            Where voices that are made over HTTP are kept: a path, or a URL that fsspec opens.
        cloning (`bool`, *optional*, defaults to `True`):
            Whether voices may be made over HTTP. Where no keys are asked for, everyone shares them.
        recognizer (`str`, *optional*):
            Model of `pipeline("automatic-speech-recognition")` that writes down what the sample of a voice says where the
            client does not: a repository on the Hub or a folder. By default the client has to.
        watermark (`bool`, *optional*, defaults to `True`):
            Whether to watermark the speech, where the extra `watermark` is installed.
    """

    model: str = field(default_factory=builtin_voice)
    streaming_model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    quantization: str | None = None
    compiles: bool = False
    api_keys: tuple[str, ...] = ()
    max_streams: int = 8
    max_queue: int = 32
    max_input_characters: int = 4096
    max_body_bytes: int = 12 * 2**20
    max_duration: float = 600.0
    max_connections: int = 512
    client_timeout: float = 30.0
    idle_timeout: float = 300.0
    shutdown_timeout: int = 30
    cors_origins: tuple[str, ...] = ()
    voices_folder: str | Path = Path.home() / ".local" / "share" / "transformers-sled" / "voices"
    cloning: bool = True
    recognizer: str | None = None
    watermark: bool = True

    def __post_init__(self) -> None:
        for name in ("max_streams", "max_input_characters", "max_body_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.quantization not in (None, "int4", "int8"):
            raise ValueError(f"`quantization` must be 'int4' or 'int8', got {self.quantization!r}.")
        if self.max_queue < 0:
            raise ValueError(f"`max_queue` must be at least 0, got {self.max_queue}.")
        for name in ("max_duration", "client_timeout", "idle_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be a positive number of seconds, got {getattr(self, name)}.")
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("`api_keys` must not hold an empty key.")

    @property
    def is_watermarking(self) -> bool:
        """Whether speech is watermarked: where that is wanted and the extra `watermark` is installed."""
        return self.watermark and is_available()

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The checkpoint for whole texts, and the one for texts that are being written where that is another."""
        if self.streaming_model is not None:
            return (self.model, self.streaming_model) if self.streaming_model != self.model else (self.model,)
        return (self.model, builtin_voice(interleaved=True)) if self.model == builtin_voice() else (self.model,)
