"""What tells that speech was made by a model: metadata of its file."""


def get_metadata(model: str) -> dict[str, str]:
    """What the file of a speech says about itself."""
    return {"comment": "AI-generated speech", "artist": f"{model} (transformers-sled)"}
