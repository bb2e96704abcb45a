"""A Hub cache on disk, as `huggingface_hub` lays it out, made from local folders."""

from pathlib import Path


COMMIT = "0" * 40


def prepare_hub_cache(cache: Path, repositories: dict[str, Path | str]) -> Path:
    """
    Puts repositories into a Hub cache, as if they had been downloaded.

    Args:
        cache (`Path`):
            The cache folder, which `HF_HUB_CACHE` or `cache_dir` names.
        repositories (`dict[str, Path | str]`):
            Repository names, and the folders with their files.

    Returns:
        `Path`: the cache folder.
    """
    for name, folder in repositories.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        for file in Path(folder).iterdir():
            (snapshot / file.name).symlink_to(file.resolve())
    return cache
