"""The gated activation of the feed-forward block, from the fused gate-up projection.

    s = 1 / (1 + exp(-gate)),  y = gate s up
    dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s

The kernel computes in fp32 and rounds once. Plain PyTorch rounds gate s to the tensor's dtype
before the product, and so does the reference's y: its error in bf16 is the larger one.

Bytes, each tensor being read or written once, and the floor at 3.0 TB/s for T 4,700, F 27,648 in
bf16. Measured on an H100: not yet.

    forward            gate, up -> y                        6 T F    780 MB   260 us
    backward           dy, gate, up -> dgate, dup, y       12 T F   1.56 GB   520 us
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels.arguments import expect, expect_unit_stride, floats, wide


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up; differentiable. Saves its argument alone, and computes the rest again.

    Args:
        gate_up_TF2: (T, 2F), gate first, bf16 or fp32 (fp64 on CPU), unit stride along 2F.

    Returns:
        (T, F) in the same dtype, contiguous.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, before any launch.
    """
    _check(gate_up_TF2)
    return _op(gate_up_TF2)


def forward(gate_up_TF2: Tensor) -> Tensor:
    """swiglu without autograd."""
    _check(gate_up_TF2)
    return _forward(gate_up_TF2)


def backward(
    dy_TF: Tensor, gate_up_TF2: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of forward and its result again, in one pass; no autograd.

    Args:
        dy_TF: gradient of y_TF, in the same dtype, unit stride along F.
        out: where the gradient goes, of gate_up's shape and dtype; it may be gate_up_TF2 itself,
            which is then overwritten. None: a fresh tensor.

    Returns:
        (dgate_up_TF2, y_TF); y_TF is forward's, bit for bit.

    Raises:
        ValueError: as swiglu.
    """
    _check(gate_up_TF2)
    num_tokens, double = gate_up_TF2.shape
    dtypes = (gate_up_TF2.dtype,)
    expect("dy_TF", dy_TF, (num_tokens, double // 2), dtypes, gate_up_TF2.device)
    expect_unit_stride("dy_TF", dy_TF)
    if out is not None:
        expect("out", out, (num_tokens, double), dtypes, gate_up_TF2.device)
        expect_unit_stride("out", out)
    return _backward(dy_TF, gate_up_TF2, out)


def _check(gate_up_TF2: Tensor) -> None:
    """Raises ValueError, naming what it is and what is accepted."""
    dtypes = floats(gate_up_TF2, "gate_up_TF2")
    expect("gate_up_TF2", gate_up_TF2, ("T", "2F"), dtypes, gate_up_TF2.device)
    if gate_up_TF2.shape[1] % 2 or not gate_up_TF2.shape[1]:
        raise ValueError(f"gate_up_TF2 has shape {tuple(gate_up_TF2.shape)}, expected (T, 2F)")
    expect_unit_stride("gate_up_TF2", gate_up_TF2)


def _forward(gate_up_TF2: Tensor) -> Tensor:
    return (triton_forward if gate_up_TF2.is_cuda else reference_forward)(gate_up_TF2)


def _backward(dy_TF: Tensor, gate_up_TF2: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    out = gate_up_TF2.new_empty(gate_up_TF2.shape) if out is None else out
    function = triton_backward if gate_up_TF2.is_cuda else reference_backward
    return out, function(dy_TF, gate_up_TF2, out)


# -- plain PyTorch -----------------------------------------------------------------------------


def reference_forward(gate_up_TF2: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=1)
    return F.silu(gate_TF) * up_TF


def reference_backward(dy_TF: Tensor, gate_up_TF2: Tensor, out: Tensor) -> Tensor:
    """Writes the gradient, returns y_TF."""
    y_TF = reference_forward(gate_up_TF2)
    gate_TF, up_TF = gate_up_TF2.to(wide(gate_up_TF2.dtype)).chunk(2, dim=1)
    dgate_TF, dup_TF = out.chunk(2, dim=1)
    s_TF = gate_TF.sigmoid()
    dgate = dy_TF * up_TF * s_TF * (1 + gate_TF * (1 - s_TF))
    dup = dy_TF * gate_TF * s_TF
    dgate_TF.copy_(dgate)
    dup_TF.copy_(dup)
    return y_TF


def triton_forward(*args):
    raise NotImplementedError


triton_backward = triton_forward


# -- registration ------------------------------------------------------------------------------


@torch.library.custom_op("s1fast::swiglu", mutates_args=())
def _op(gate_up_TF2: Tensor) -> Tensor:
    return _forward(gate_up_TF2)


@torch.library.custom_op("s1fast::swiglu_backward", mutates_args=())
def _backward_op(dy_TF: Tensor, gate_up_TF2: Tensor) -> Tensor:
    return _backward(dy_TF, gate_up_TF2, None)[0]


@_op.register_fake
def _(gate_up_TF2: Tensor) -> Tensor:
    num_tokens, double = gate_up_TF2.shape
    return gate_up_TF2.new_empty(num_tokens, double // 2)


@_backward_op.register_fake
def _(dy_TF: Tensor, gate_up_TF2: Tensor) -> Tensor:
    return gate_up_TF2.new_empty(gate_up_TF2.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy_TF):
    return _backward_op(dy_TF.contiguous(), *ctx.saved_tensors)


_op.register_autograd(_gradient, setup_context=_setup_context)
