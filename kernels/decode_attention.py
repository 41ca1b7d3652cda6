"""Attention of the token loop over pages of keys and values.

    out_c = sum_{s <= position_c} softmax_s(q_c . k_s * K^-0.5) v_s,  k and v of slot c's row

Position s of row r lies on page table_RP[r, s // S], at offset s % S. The floor is reading a row's
keys and values once: 4 N K bytes a position in bf16. Qwen2.5-32B, 8 heads of 128 in 64 layers,
256 KiB a token: one row of 8K positions is 34 MB a layer, 11.2 us at 3.0 TB/s, and 0.72 ms a step;
32K 134 MB, 44.7 us, and 2.9 ms. Prefill of T tokens from position start on: 4 H K T (start + T / 2)
FLOPs; 40 heads of 128, T 2,048, start 0: 43 GFLOP, 54 us at 800 TFLOP/s. Measured on an H100: not
yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s1fast.kernels import decode_attention_triton as kernels
from s1fast.kernels import prefill_attention_triton
from s1fast.kernels.arguments import expect, expect_unit_stride, floats, wide


@dataclass(frozen=True)
class Workspace:
    """What decode_attention's programs leave for each other: made once, by decode_workspace.

    partial, lse2: results of splits of rows, fp32. counter: of those that have arrived, all zero
    between launches. Launches that share a workspace must follow each other on one stream.
    """

    partial: Tensor
    lse2: Tensor
    counter: Tensor


def decode_workspace(
    max_slots: int, num_heads: int, num_kv_heads: int, width: int, device: torch.device
) -> Workspace:
    """For steps of up to max_slots slots, in all layers; 42 MB for 64 slots of Qwen2.5-32B."""
    if min(max_slots, num_heads, num_kv_heads, width) < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"max_slots {max_slots}, num_heads {num_heads}, num_kv_heads {num_kv_heads}, width "
            f"{width}: expected at least 1 of each, and heads that are a multiple of the kv heads"
        )
    rows = kernels.partial_rows(max_slots, num_heads // num_kv_heads, num_kv_heads)
    return Workspace(
        partial=torch.empty(rows * width, dtype=torch.float32, device=device),
        lse2=torch.empty(rows, dtype=torch.float32, device=device),
        counter=torch.zeros(max_slots * num_kv_heads, dtype=torch.int32, device=device),
    )


def decode_attention(
    q_CHK: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    table_RP: Tensor,
    line_C: Tensor,
    position_C: Tensor,
    *,
    workspace: Workspace,
    batch_invariant: bool = False,
) -> Tensor:
    """Each slot attends to positions 0 .. position_C[c] of row line_C[c]; no autograd.

    Nothing is read beyond the furthest position that a slot of the row asks for. A launch depends
    on the number of slots alone, so a captured one serves whatever line_C, position_C and table_RP
    hold when it is replayed; it gives the same bits every time.

    Args:
        q_CHK: queries of C slots, bf16 or fp32 (fp64 on CPU), unit stride along K, H a multiple of
            N. On CUDA K is at most 128 and H / N at most 32.
        k_PSNK, v_PSNK: one layer's pages, in q's dtype, unit stride along K.
        table_RP: int32 page table, unit stride along P; it covers every position.
        line_C, position_C: int32, contiguous; line -1 is an idle slot. Slots of a row may lie
            anywhere, those next to each other share loads.
        workspace: of decode_workspace, for so many slots and heads.
        batch_invariant: a slot's bits depend on its own row up to its own position and on nothing
            else, neither on C nor on the other slots. Slots of one row then share no loads.

    Returns:
        (C, H, K) in q's dtype, contiguous; zeros in idle slots.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, or too small a
            workspace, before any launch.
    """
    _check(q_CHK, k_PSNK, v_PSNK, "q_CHK")
    for name, x_C in (("line_C", line_C), ("position_C", position_C)):
        expect(name, x_C, (len(q_CHK),), (torch.int32,), q_CHK.device)
        if not x_C.is_contiguous():
            raise ValueError(f"{name} has strides {x_C.stride()}, pass {name}.contiguous()")
    expect("table_RP", table_RP, ("R", "P"), (torch.int32,), q_CHK.device)
    expect_unit_stride("table_RP", table_RP)
    _check_workspace(workspace, q_CHK, k_PSNK.shape[2])
    out_CHK = q_CHK.new_empty(q_CHK.shape)
    function = kernels.decode if q_CHK.is_cuda else reference_decode
    pages = k_PSNK, v_PSNK, table_RP, line_C, position_C
    left = workspace.partial, workspace.lse2, workspace.counter
    function(q_CHK, *pages, out_CHK, *left, batch_invariant)
    return out_CHK


def prefill_attention(
    q_THK: Tensor, k_PSNK: Tensor, v_PSNK: Tensor, table_P: Tensor, start: int
) -> Tensor:
    """T tokens of one row at positions start, start + 1, ... over its pages, theirs included.

    Args:
        q_THK, k_PSNK, v_PSNK: as for decode_attention, of T tokens.
        table_P: the row's pages, int32, contiguous, at least as many as start + T positions need.
        start: positions before the first token.

    Returns:
        (T, H, K) in q's dtype, contiguous; no autograd.

    Raises:
        ValueError: as decode_attention.
    """
    _check(q_THK, k_PSNK, v_PSNK, "q_THK")
    expect("table_P", table_P, ("P",), (torch.int32,), q_THK.device)
    if not table_P.is_contiguous():
        raise ValueError(f"table_P has strides {table_P.stride()}, pass table_P.contiguous()")
    needed = -(-(start + len(q_THK)) // k_PSNK.shape[1])
    if start < 0 or len(table_P) < needed:
        raise ValueError(
            f"table_P has {len(table_P)} pages of {k_PSNK.shape[1]}; start {start} and "
            f"{len(q_THK)} tokens need {needed}, and start at least 0"
        )
    out_THK = q_THK.new_empty(q_THK.shape)
    function = prefill_attention_triton.prefill if q_THK.is_cuda else reference_prefill
    function(q_THK, k_PSNK, v_PSNK, table_P, start, out_THK)
    return out_THK


# -- checks ------------------------------------------------------------------------------------


def _check(q_CHK: Tensor, k_PSNK: Tensor, v_PSNK: Tensor, name: str) -> None:
    """Queries and pages. Raises ValueError, naming what is wrong and what is accepted."""
    expect(name, q_CHK, ("slots", "H", "K"), floats(q_CHK, name), q_CHK.device)
    _, heads, width = q_CHK.shape
    expect("k_PSNK", k_PSNK, ("P", "S", "N", width), (q_CHK.dtype,), q_CHK.device)
    expect("v_PSNK", v_PSNK, tuple(k_PSNK.shape), (q_CHK.dtype,), q_CHK.device)
    if not k_PSNK.numel() or not heads or heads % k_PSNK.shape[2]:
        raise ValueError(
            f"{heads} query heads over pages of shape {tuple(k_PSNK.shape)}: expected a multiple "
            "of the kv heads, and no size of 0"
        )
    group = heads // k_PSNK.shape[2]
    if q_CHK.is_cuda and (width > kernels.MAX_WIDTH or group > kernels.MAX_GROUP):
        raise ValueError(
            f"{name} has heads {width} wide, {group} to a kv head; on CUDA at most "
            f"{kernels.MAX_WIDTH} wide and {kernels.MAX_GROUP} to a kv head"
        )
    for label, x in ((name, q_CHK), ("k_PSNK", k_PSNK), ("v_PSNK", v_PSNK)):
        expect_unit_stride(label, x)


def _check_workspace(workspace: Workspace, q_CHK: Tensor, kv_heads: int) -> None:
    num_slots, heads, width = q_CHK.shape
    rows = kernels.partial_rows(num_slots, heads // kv_heads, kv_heads)
    large = workspace.lse2.numel() >= rows and workspace.partial.numel() >= rows * width
    if not large or workspace.counter.numel() < num_slots * kv_heads:
        raise ValueError(
            f"workspace: too small for {num_slots} slots, {heads} and {kv_heads} heads of {width}; "
            "make it by decode_workspace of these"
        )
    if workspace.partial.device != q_CHK.device:
        raise ValueError(f"workspace is on {workspace.partial.device}, q_CHK on {q_CHK.device}")


# -- references --------------------------------------------------------------------------------


def reference_decode(
    q_CHK: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    table_RP: Tensor,
    line_C: Tensor,
    position_C: Tensor,
    out_CHK: Tensor,
    *_: object,
) -> None:
    """decode_attention in plain PyTorch, into out_CHK."""
    lines, positions = line_C.tolist(), position_C.tolist()
    for slot, (line, position) in enumerate(zip(lines, positions, strict=True)):
        if line < 0:
            out_CHK[slot] = 0.0
        else:
            one = slice(slot, slot + 1)
            row = k_PSNK, v_PSNK, table_RP[line], position
            reference_prefill(q_CHK[one], *row, out_CHK[one])


def reference_prefill(
    q_THK: Tensor, k_PSNK: Tensor, v_PSNK: Tensor, table_P: Tensor, start: int, out_THK: Tensor
) -> None:
    """prefill_attention in plain PyTorch, into out_THK."""
    num_tokens, _, width = q_THK.shape
    kv_heads = k_PSNK.shape[2]
    stop = start + num_tokens
    pages = table_P[: -(-stop // k_PSNK.shape[1])].long()
    k_NXK, v_NXK = (
        x_PSNK[pages].flatten(0, 1)[:stop].transpose(0, 1).to(wide(q_THK.dtype))
        for x_PSNK in (k_PSNK, v_PSNK)
    )
    q_NGTK = q_THK.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).to(k_NXK.dtype)
    score_NGTX = q_NGTK @ k_NXK[:, None].mT * width**-0.5
    hidden_TX = torch.ones(num_tokens, stop, dtype=torch.bool, device=q_THK.device)
    score_NGTX.masked_fill_(hidden_TX.triu_(start + 1), -torch.inf)
    out_NGTK = score_NGTX.softmax(-1) @ v_NXK[:, None]
    out_THK.copy_(out_NGTK.permute(2, 0, 1, 3).flatten(1, 2))
