"""What an operation tells the bench about itself: shapes, inputs, floor, reference, providers.

One file per operation holds one `Op`; kernels.py measures any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s1fast.errors import InputError

Sizes = dict[str, int]
Output = Tensor | tuple[Tensor, ...]
Forward = Callable[[], Output]
Context = Callable[[], AbstractContextManager[object]]


class MissingError(Exception):
    """Raised by a provider's `build` where it cannot run for lack of a package or device."""


@dataclass(frozen=True)
class Problem:
    """One shape with its inputs.

    arguments: what our public function takes, in its order. leaves: those of them that get a
    gradient, by name. upstream: gradient of the output, of each where there are several, None for
    a scalar. flops, num_bytes: the least that forward and backward together must compute, and move
    through memory. forward_flops, forward_bytes: the forward's part, the latter where there are no
    FLOPs to speak of and a rate is one of bytes. backward: whether there is one; without, only
    "full" is measured, which is then the call itself.
    """

    arguments: tuple[Any, ...]
    num_bytes: int = 0
    leaves: dict[str, Tensor] = field(default_factory=dict)
    upstream: Output | None = None
    forward_flops: int = 0
    flops: int = 0
    forward_bytes: int = 0
    backward: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments[0].dtype

    def clear(self) -> None:
        """Takes the gradients away, so that the next backward allocates them anew."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def inference(self, forward: Forward) -> None:
        """Forward as in evaluation: some implementations ask the inputs, some the grad mode."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(False)
        try:
            with torch.no_grad():
                forward()
        finally:
            for leaf in self.leaves.values():
                leaf.requires_grad_()

    def full(self, forward: Forward) -> Output:
        """Forward and backward, if there is one; the output."""
        self.clear()
        output = forward()
        if self.backward:
            torch.autograd.backward(output, self.upstream)
        return output


@dataclass(frozen=True)
class Provider:
    """One implementation: `build` imports what it needs and returns forward over the problem.

    package: the distribution whose version is recorded with the result. context: what it is built
    and run in, forward and backward.
    """

    name: str
    build: Callable[[Problem], Forward]
    package: str | None = None
    context: Context = nullcontext


@dataclass(frozen=True)
class Op:
    """One operation.

    sizes: what completes a shape that leaves something out, on a GPU and on a CPU. shapes: what is
    measured unless shapes are given, each completed likewise. make: inputs on a device. reference:
    output and gradients by leaf, far more precise than any provider.
    """

    name: str
    gpu_sizes: Sizes
    cpu_sizes: Sizes
    gpu_shapes: tuple[str, ...]
    cpu_shapes: tuple[str, ...]
    make: Callable[[Mapping[str, int], torch.device], Problem]
    reference: Callable[[Problem], tuple[Tensor, dict[str, Tensor]]]
    ours: Provider
    peers: tuple[Provider, ...]

    def sizes(self, device: torch.device) -> Sizes:
        return self.gpu_sizes if device.type == "cuda" else self.cpu_sizes

    def shapes(self, device: torch.device) -> tuple[str, ...]:
        return self.gpu_shapes if device.type == "cuda" else self.cpu_shapes

    def problem(self, sizes: Sizes, device: torch.device) -> Problem:
        """The inputs; an InputError where the device has no memory for them."""
        try:
            return self.make(sizes, device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--shape: {shape_name(sizes)} cannot be made: {reason}") from None

    def against(self, name: str, function: Callable[..., Output]) -> Provider:
        """One more provider: any callable that takes what ours takes."""
        return Provider(name, lambda problem: lambda: function(*problem.arguments))


class Normal:
    """Normal tensors, bf16 on a GPU, elsewhere fp32 unless told, the same ones every time."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.random = device, torch.Generator(device).manual_seed(0)
        self.dtype = torch.bfloat16 if device.type == "cuda" else dtype

    def __call__(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        x = torch.empty(shape, device=self.device, dtype=self.dtype)
        return x.normal_(mean, std, generator=self.random)


def compiled(problem: Problem, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function by torch.compile, each shape anew: none is measured with code for several."""
    if not problem.arguments[0].is_cuda:
        raise MissingError("timed on a GPU only")
    torch.compiler.reset()
    return torch.compile(function, **options)


def joined(output: Output) -> Tensor:
    """One tensor of an output, without its graph; several are put in a row."""
    if isinstance(output, tuple):
        return torch.cat([x.detach().flatten() for x in output])
    return output.detach()


def parse_shape(text: str, defaults: Mapping[str, int]) -> Sizes:
    """Sizes of "T4700xmasked50": letters with their numbers, words with a percentage or none."""
    example = shape_name(defaults)
    sizes = dict(defaults)
    for part in text.split("x"):
        found = re.fullmatch(r"([A-Za-z]+)(\d{0,12})", part)
        if not found or found[1] not in defaults:
            known = ", ".join(defaults)
            raise InputError(f"--shape: {text!r}: {part!r} is no size of {known}, as in {example}")
        name, value = found[1], int(found[2] or 1)
        if name.isupper() and not value:
            raise InputError(f"--shape: {text!r}: {name} must be at least 1, as in {example}")
        if not name.isupper() and value > 100:
            raise InputError(f"--shape: {text!r}: {name} is a percentage, at most 100")
        sizes[name] = value
    return sizes


def shape_name(sizes: Mapping[str, int]) -> str:
    """The text that parses to these sizes; words, which are options, only where they are not 0."""
    parts = ((k, str(v)) for k, v in sizes.items() if v or k.isupper())
    return "x".join(k + ("" if v == "1" and not k.isupper() else v) for k, v in parts)
