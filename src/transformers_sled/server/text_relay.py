"""Texts that are being written, on their way to the replicas that speak them."""

import asyncio


class TextRelay:
    """
    Texts on their way from those who write them to the replicas that speak them, by a name for each. It runs as an actor,
    because a call of a replica takes no further input once it has begun, and a second call may reach another one.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, asyncio.Queue[str | None]] = {}

    async def open(self, name: str) -> None:
        """Begins a text."""
        self._pieces[name] = asyncio.Queue()

    async def put(self, name: str, pieces: list[str | None]) -> None:
        """Adds pieces of the text, `None` after the last. They are dropped where nobody speaks the text any more."""
        if (waiting := self._pieces.get(name)) is not None:
            for piece in pieces:
                waiting.put_nowait(piece)

    async def get(self, name: str) -> list[str | None]:
        """Waits for the next pieces."""
        waiting = self._pieces.get(name)
        return [None] if waiting is None else await take_all(waiting)

    async def close(self, name: str) -> None:
        """Forgets the text."""
        if (waiting := self._pieces.pop(name, None)) is not None:
            waiting.put_nowait(None)

    async def check(self) -> None:
        """Answers, where it can."""


async def take_all(waiting: "asyncio.Queue[str | None]") -> list[str | None]:
    """What is in a queue, where there is at least one thing in it."""
    taken = [await waiting.get()]
    while not waiting.empty():
        taken.append(waiting.get_nowait())
    return taken


__all__ = ["TextRelay", "take_all"]
