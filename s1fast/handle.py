"""A submitted request, as its caller sees it: pieces to read as they come, completions to wait for.

The engine's thread puts items in; callers take them out, on another thread or in an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator

from s1fast.request import Completion, Piece

Item = tuple[int, Piece | Completion] | BaseException | None
"""Pieces and completions with their places in the order (sample, cell). None comes last."""


class Cancelled(Exception):
    """The request was cancelled while somebody waited for it."""


class Handle:
    """One request. Iterate it, in a plain or an async for, for its pieces, of a grid the longest
    cell's, and then its completions in order; or take `result()`; or all as it comes, `live()`.
    What was taken is gone: read it one way, once."""

    def __init__(
        self,
        job: int,
        samples: int,
        cells: int,
        longest: int,
        cancel: Callable[[Handle], None],
        streaming: bool,
    ) -> None:
        self.job, self.cells, self.streaming = job, cells, streaming
        self._longest = longest
        self.finished = False
        self._cancel = cancel
        self._done: list[Completion | None] = [None] * (samples * cells)
        self._left = samples * cells
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stops the request; its pages are free after the step that runs now."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Piece | Completion]:
        while (item := self._items.get()) is not None:
            yield from self._shown(*_checked(item))
        yield from self._all()

    async def __aiter__(self) -> AsyncIterator[Piece | Completion]:
        async for place, item in self.live():
            for piece in self._shown(place, item):
                yield piece
        for done in self._all():
            yield done

    def _shown(self, place: int, item: Piece | Completion) -> list[Piece]:
        longest = place % self.cells == self._longest
        return [item] if longest and isinstance(item, Piece) else []

    def _all(self) -> list[Completion]:
        return [done for done in self._done if done is not None]

    async def live(self) -> AsyncIterator[tuple[int, Piece | Completion]]:
        """Every cell's pieces, and each completion as soon as it is done, with their places."""
        ready, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads on
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        while True:
            ready.clear()
            while not self._items.empty():
                item = self._items.get()
                if item is None:
                    return
                yield _checked(item)
            if self._items.empty():
                await ready.wait()

    def result(self) -> list[Completion]:
        """Waits for all completions, in the order (sample, cell).

        Raises:
            Cancelled: somebody cancelled the request.
        """
        return [item for item in self if isinstance(item, Completion)]

    async def aresult(self) -> list[Completion]:
        """As result, without blocking the event loop."""
        return [item async for item in self if isinstance(item, Completion)]

    # -- the engine's side ----------------------------------------------------------------------

    def put(self, pieces: list[tuple[int, Piece]], done: list[tuple[int, Completion]]) -> None:
        """Takes what a row has produced, with places."""
        if self.finished:
            return
        for item in pieces:
            self._items.put(item)
        for place, completion in done:
            self._done[place] = completion
            self._left -= 1
            self._items.put((place, completion))
        if not self._left:
            self.finished = True
            self._items.put(None)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Ends the request with an exception for whoever reads it."""
        if not self.finished:
            self.finished = True
            self._items.put(error)
            self._items.put(None)
            self._wake()


def _checked(item: Item) -> tuple[int, Piece | Completion]:
    if isinstance(item, BaseException):
        raise item
    assert item is not None
    return item
