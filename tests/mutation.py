"""One place of the code, and how to break it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; both may be pieces of a line."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("tests/test_linear_cross_entropy.py",)
