"""A submitted request, as its caller sees it: pieces to read as they come, completions to wait for.

The engine's thread puts items in; callers take them out, on another thread or in an event loop.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator

from s1fast.request import Completion, Piece

Item = Piece | Completion | BaseException | None
"""None comes last."""


class Cancelled(Exception):
    """The request was cancelled while somebody waited for it."""


class Handle:
    """One request. Iterate it, in a plain or an async for, for its pieces and then its completions
    in order; or take `result()`. What was taken is gone: read it one way, once."""

    def __init__(
        self,
        job: int,
        samples: int,
        cells: int,
        cancel: Callable[[Handle], None],
        streaming: bool,
    ) -> None:
        self.job, self.cells, self.streaming = job, cells, streaming
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
            yield _checked(item)

    async def __aiter__(self) -> AsyncIterator[Piece | Completion]:
        ready, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            if not loop.is_closed():
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

    def put(self, pieces: list[Piece], done: list[tuple[int, Completion]]) -> None:
        """Takes what a row has produced; completions with their places."""
        if self.finished:
            return
        if self.streaming:
            for piece in pieces:
                self._items.put(piece)
        for place, completion in done:
            self._done[place] = completion
            self._left -= 1
        if not self._left:
            self.finished = True
            for completion in self._done:  # type: ignore[assignment]
                self._items.put(completion)
            self._items.put(None)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Ends the request with an exception for whoever reads it."""
        if not self.finished:
            self.finished = True
            self._items.put(error)
            self._items.put(None)
            self._wake()


def _checked(item: Item) -> Piece | Completion:
    if isinstance(item, BaseException):
        raise item
    assert item is not None
    return item
