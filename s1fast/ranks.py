"""The ranks of a run as its files need them: who I am, and texts told to all.

What one rank finds out, bad input or a full disk, all must know: a rank that ends alone leaves the
others waiting for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from s1fast.errors import InputError


def _alone(text: str) -> list[str]:
    return [text]


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; by default it is the only one."""

    rank: int = 0
    world: int = 1
    exchange: Callable[[str], list[str]] = _alone
    """Called by all ranks, each with a text: returns every rank's, in order. Also a barrier."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks if it fails on one; there is no exchange within it.

        Raises:
            InputError: that of the block, or, naming the ranks, those of other ranks.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        texts = self.exchange(_told(failure) if failure else "")
        if failure is not None and (self.world == 1 or not isinstance(failure, InputError)):
            raise failure
        if any(texts):
            raise InputError(_summary(texts))


ALONE = Ranks()


def _told(error: Exception) -> str:
    text = str(error) or "no message"
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _summary(texts: list[str]) -> str:
    """One line; which ranks it was, unless all say the same."""
    by_text: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        by_text.setdefault(text, []).append(str(rank))
    if len(by_text) == 1:
        return texts[0]
    by_text.pop("", None)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}: {text}"
        for text, ranks in by_text.items()
    )


def process_group(device: str = "cpu") -> Ranks:
    """The ranks of torch.distributed's default group; device: what its tensors lie on."""
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()

    def gather(ours: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(ours) for _ in range(world)]
        dist.all_gather(everyone, ours)
        return everyone

    def exchange(text: str) -> list[str]:
        # Bytes, not objects: torch's exchange of objects would unpickle them.
        data = text.encode()
        sizes = [int(size) for size in gather(torch.tensor([len(data)], device=device))]
        padded = bytearray(data.ljust(max(sizes) + 1))
        rows = gather(torch.frombuffer(padded, dtype=torch.uint8).to(device))
        texts = (bytes(row.cpu().numpy()[:size]) for row, size in zip(rows, sizes, strict=True))
        return [text.decode() for text in texts]

    return Ranks(rank, world, exchange)
