"""csrc/gemv.cuh on a CPU: built by g++ over fibers.h, with sanitizers, asked case after case."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "gemv.cuh"
EPS = 1e-5
UNTOUCHED = 7.0
"""What `out` holds before the launch."""


def constant(name: str) -> int:
    """A number that csrc/gemv.cuh states."""
    found = re.search(rf"^constexpr int {name} = (\d+);", SOURCE.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A launch. outputs: N; width: K; live: tokens there, None for all; processors: blocks at most;
    early: copies are there at once; padding: elements between rows."""

    slots: int
    outputs: int
    width: int
    live: int | None = None
    norm: bool = False
    swiglu: bool = False
    bias: bool = False
    residual: bool = False
    processors: int = 4
    seed: int = 0
    early: bool = False
    padding: int = 0

    @property
    def num_live(self) -> int:
        return self.slots if self.live is None else max(0, min(self.live, self.slots))


@dataclass(frozen=True)
class Inputs:
    weight_NK: Tensor
    x_MK: Tensor
    norm_K: Tensor
    bias_N: Tensor
    residual_MN: Tensor


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random bf16; the seed of the case does not enter, so that launches can be compared."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).bfloat16()

    rows = case.outputs * (2 if case.swiglu else 1)
    return Inputs(
        weight_NK=normal(rows, case.width),
        x_MK=normal(8, case.width)[: case.slots],  # the same tokens however many slots
        norm_K=(1 + 0.3 * torch.randn(case.width, generator=draw)).bfloat16(),
        bias_N=normal(case.outputs),
        residual_MN=normal(8, case.outputs)[: case.slots],
    )


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output in float64, and how far from it a right answer may lie.

    bf16 rounds by at most 2^-8 of a value: once the output, and with a norm every x * norm. fp32
    sums err by at most 2^-23 of the terms' magnitudes an addition, of which there are K and a few.
    """
    weight, x = inputs.weight_NK.double(), inputs.x_MK.double()
    per_term = (case.width + 16) * 2.0**-23
    if case.norm:
        x = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * inputs.norm_K.double()
        per_term += 2.0**-8 + (case.width + 16) * 2.0**-23
    y, error = x @ weight.T, x.abs() @ weight.abs().T * per_term
    if case.swiglu:
        (gate, up), (dgate, dup) = y.chunk(2, 1), error.chunk(2, 1)
        silu = gate * gate.sigmoid()
        y = silu * up
        # The slope of silu stays below 1.1; the exponential is good to 2^-20.
        error = 1.1 * dgate * up.abs() + silu.abs() * dup + 1.1 * dgate * dup + y.abs() * 2.0**-20
    if case.bias:
        y = y + inputs.bias_N.double()
    if case.residual:
        y = y + inputs.residual_MN.double()
    return y, error + 2.0**-8 * (y.abs() + error) + 1e-30


def build(folder: Path, *extra: str) -> Path:
    """The program, or an error with the compiler's output."""
    compiler = shutil.which("g++")
    assert compiler is not None
    program = folder / "gemv_fibers"
    command = [compiler, "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *extra]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    command += [str(ROOT / "tests" / "gemv_fibers.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return program


def run(program: Path, cases: Sequence[Case], inputs: Sequence[Inputs]) -> list[Tensor]:
    """The outputs in bf16, all rows."""
    done = ask(program, b"".join(encode(c, i) for c, i in zip(cases, inputs, strict=True)))
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    answers, at = [], 0
    for case in cases:
        count = case.slots * case.outputs
        raw = bytearray(done.stdout[at : at + 2 * count])
        answers.append(torch.frombuffer(raw, dtype=torch.bfloat16).view(case.slots, case.outputs))
        at += 2 * count
    assert at == len(done.stdout)
    return answers


def ask(program: Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(program)], input=data, capture_output=True, timeout=300)


def encode(case: Case, inputs: Inputs) -> bytes:
    """A case as gemv_fibers.cpp reads it."""
    stride = case.width + case.padding
    live = -(2**31) if case.live is None else case.live
    head = struct.pack(
        "<13if",
        *(case.slots, case.outputs, case.width, live, case.norm, case.swiglu, case.bias),
        *(case.residual, case.processors, case.seed, case.early, stride, stride),
        EPS,
    )
    arrays = [_padded(inputs.weight_NK, stride), _padded(inputs.x_MK, stride)]
    arrays += [inputs.norm_K] if case.norm else []
    arrays += [inputs.bias_N] if case.bias else []
    arrays += [inputs.residual_MN] if case.residual else []
    arrays.append(torch.full((case.slots, case.outputs), UNTOUCHED).bfloat16())
    return head + b"".join(a.contiguous().view(torch.int16).numpy().tobytes() for a in arrays)


def _padded(x: Tensor, stride: int) -> Tensor:
    """Rows `stride` apart with NaN between them, nothing after the last."""
    wide = torch.full((x.shape[0], stride), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide.flatten()[: (x.shape[0] - 1) * stride + x.shape[1]]
