"""The texts between which a model thinks: s1's, and those of `<think>` models.

s1 and s1.1 write `<|im_start|>think ... <|im_start|>answer ...`, and either of ChatML's two markers
ends thinking. R1's distillations, QwQ and Qwen3 write `<think> ... </think> ...`; there the model's
own stop ids end thinking too, so that a trace that was never closed still gets its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from s1fast.errors import InputError

MarkersName = Literal["auto", "s1", "s1.1", "think"]


@dataclass(frozen=True, kw_only=True)
class Markers:
    """The delimiters of one family of models."""

    start: str
    """Thinking is what follows it."""
    opening: str
    """What a prompt ends with: the start, and what its training always had behind it."""
    ends: tuple[str, ...]
    """Any of them, sampled, ends thinking."""
    single: bool
    """Whether each end must be one token of the vocabulary."""
    stops_end: bool
    """Whether the model's own stop ids end thinking as well."""
    answer: str
    """Appended where thinking has ended."""


S1 = Markers(
    start="<|im_start|>think",
    opening="<|im_start|>think",
    ends=("<|im_start|>", "<|im_end|>"),
    single=True,
    stops_end=False,
    answer="<|im_start|>answer",
)
THINK = Markers(
    start="<think>",
    opening="<think>\n",
    ends=("</think>",),
    single=False,
    stops_end=True,
    answer="</think>",
)
PRESETS = {"s1": S1, "s1.1": S1, "think": THINK}


def choose(name: str, single_tokens: frozenset[str]) -> Markers:
    """The preset of that name; "auto" takes `<think>` where the vocabulary has it as a token.

    Raises:
        InputError: no such preset.
    """
    if name == "auto":
        return THINK if {"<think>", "</think>"} <= single_tokens else S1
    if name not in PRESETS:
        raise InputError(f"markers {name!r}: there are auto, {', '.join(PRESETS)}")
    return PRESETS[name]
