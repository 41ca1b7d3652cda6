"""Flags that several commands have: how to think, and on what to run. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ThinkingFlags:
    """How to think and to draw."""

    min_thinking_tokens: int = 0
    """Thinking cannot end before this many tokens."""
    num_ignore: int | None = None
    """How many times the end of thinking is ignored."""
    ignore_text: tuple[str, ...] = ("Wait",)
    """Appended for each ignored end; several are used in turn."""
    final_text: str = "Final Answer:"
    """Appended after the answer marker when thinking is cut."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    max_tokens: int | None = None
    """Most tokens generated in all; the whole context unless given."""


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """On what to run, and how fast."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 on GPU and float32 on CPU."""
    markers: Literal["auto", "s1", "s1.1", "think"] = "auto"
    """Between which the model thinks: s1's, or <think> and </think>; auto: by the vocabulary."""
    speculate: int = 0
    """Draft up to so many tokens a step from what was written before; changes no token."""
    matmul: Literal["torch", "cuda"] = "torch"
    """Products of a GPU's steps: cuBLAS, or for up to 8 tokens on an H100 or H200 ours (csrc)."""
