"""Results on disk: JSON lines that survive a kill at any point, and files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


Record = dict[str, Any]


def write_file(path: Path, content: bytes | str) -> None:
    """
    Write a file so that at any moment it is either complete or not there.

    Args:
        path (`Path`):
            File to write; its folder is made if need be.
        content (`bytes` or `str`):
            What goes into it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


class RecordStore:
    """
    Records of several stages, one JSON lines file for each stage and process.

    Records are found by their `system` and `id` (and `part`, where they have one); a process appends to its own files
    and reads those of all. A line that a kill cut short is dropped, so its record is made again.

    Args:
        folder (`Path`):
            Where the files are.
        process_index (`int`, *optional*, defaults to 0):
            Index of this process.
    """

    def __init__(self, folder: Path, process_index: int = 0):
        self.folder = folder
        self.process_index = process_index
        self.repaired = set()

    def read(self, stage: str) -> dict[tuple[str, ...], Record]:
        """
        All complete records of a stage, by (system, id) or (system, id, part).

        Args:
            stage (`str`):
                Name of the stage.

        Returns:
            `dict[tuple[str, ...], Record]`: the records.
        """
        records = {}
        for path in sorted(self.folder.glob(f"{stage}.*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                record = json.loads(line)
                key = tuple(record[name] for name in ("system", "id", "part") if name in record)
                records.setdefault(key, record)
        return records

    def append(self, stage: str, records: Iterable[Record]) -> None:
        """
        Append records; they are on disk when this returns.

        Args:
            stage (`str`):
                Name of the stage.
            records (`Iterable[Record]`):
                What to append.
        """
        path = self.folder / f"{stage}.{self.process_index:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path not in self.repaired:
            if path.exists():
                content = path.read_bytes()
                os.truncate(path, content.rfind(b"\n") + 1)
            self.repaired.add(path)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with path.open("ab", buffering=0) as file:
            file.write(lines.encode())
            os.fsync(file.fileno())
