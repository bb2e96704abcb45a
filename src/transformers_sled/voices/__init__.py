"""The small English voice that comes with the package."""

from pathlib import Path


def builtin_voice(interleaved: bool = False) -> str:
    """
    Gives the folder of the small English checkpoint that comes with the package. It needs no network.

    A recording to clone a voice from lies in the folder `prompts` beside it, `af_heart.flac`, with what it says in
    `af_heart.txt`.

    Args:
        interleaved (`bool`, *optional*, defaults to `False`):
            Whether to give the model that reads text and writes speech in turns, for text that is still being written,
            in place of the one that reads the whole text first.

    Returns:
        `str`: the path, for `pipeline` and `from_pretrained`.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from transformers_sled import builtin_voice

    >>> pipe = pipeline("text-to-speech", model=builtin_voice())
    >>> speech = pipe("The dog barked all night.")
    ```
    """
    name = "sled-tiny-en-streaming" if interleaved else "sled-tiny-en"
    return str(Path(__file__).parent / name)


__all__ = ["builtin_voice"]
