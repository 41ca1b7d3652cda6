"""The bench of decode_attention: the newest tokens of some rows over pages of keys and values.

B rows of L positions, whose pages of 16 lie anywhere; `spread` draws their lengths evenly from
L / 2 .. 3 L / 2, `string8` gives each row eight slots, `idle7` adds seven that carry nothing,
`invariant` asks for bits that depend on nothing but the row. What is timed is a CUDA graph of
several launches over caches of their own, together four times as large as L2, as layer follows
layer in the loop.

Counted are the keys and values of every row once, queries and outputs: the share of the floor is
the share of the read roof. The error is that of the last launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s1fast.bench.gemv import ROTATED_BYTES, replay
from s1fast.bench.op import Forward, MissingError, Normal, Op, Problem, Provider
from s1fast.errors import InputError
from s1fast.kernels.decode_attention import decode_attention, decode_workspace

PAGE = 16


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Standard normal queries and caches, bf16 on a GPU, fp32 on a CPU."""
    rows, heads, kv_heads, width = (sizes[x] for x in "BHNK")
    queries = max(1, sizes["string"])
    if heads % kv_heads:
        raise InputError(f"--shape: H{heads} is no multiple of N{kv_heads}: heads share keys")
    if sizes["L"] < 2 * queries:
        raise InputError(f"--shape: L{sizes['L']} is too short for string{queries}")
    length_B = torch.full((rows,), sizes["L"])
    if sizes["spread"]:
        spread = torch.rand(rows, generator=torch.Generator().manual_seed(0))
        length_B = (sizes["L"] * (0.5 + spread)).long()
    counts = (-(-length_B // PAGE)).tolist()
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int() + 1
    table_RP = torch.zeros(rows, max(counts), dtype=torch.int32)
    for line, pages in enumerate(order.split(counts)):
        table_RP[line, : len(pages)] = pages
    slots = [
        (line, n - i) for line, n in enumerate(length_B.tolist()) for i in range(queries, 0, -1)
    ]
    slots += [(-1, 0)] * sizes["idle"]
    line_C, position_C = torch.tensor(slots, dtype=torch.int32, device=device).T.contiguous()

    normal = Normal(device)
    q_CHK = normal(len(slots), heads, width)
    read = 2 * int(length_B.sum()) * kv_heads * width * normal.dtype.itemsize
    copies = max(2, -(-ROTATED_BYTES[device.type] // read))
    caches = [normal(2, sum(counts) + 1, PAGE, kv_heads, width) for _ in range(copies)]
    flops = copies * 4 * heads * width * queries * int(length_B.sum())
    return Problem(
        arguments=(q_CHK, caches, table_RP.to(device), line_C, position_C, sizes, length_B),
        num_bytes=copies * (read + 2 * q_CHK.nbytes),
        forward_flops=flops,
        flops=flops,
        backward=False,
    )


def ours(problem: Problem) -> Forward:
    q_CHK, caches, *where, sizes, _ = problem.arguments
    heads, kv_heads, width = (sizes[x] for x in "HNK")
    workspace = decode_workspace(len(q_CHK), heads, kv_heads, width, q_CHK.device)
    options: dict[str, Any] = {"batch_invariant": bool(sizes["invariant"])}

    def attend(cache: Tensor) -> Tensor:
        return decode_attention(q_CHK, *cache, *where, workspace=workspace, **options)

    return replay(attend, caches, len(q_CHK))


def _queries(problem: Problem) -> tuple[Tensor, int]:
    """(B, queries of a row, H, K), without the idle slots; and how many those are."""
    q_CHK, *_, sizes, _ = problem.arguments
    live = len(q_CHK) - sizes["idle"]
    return q_CHK[:live].unflatten(0, (sizes["B"], -1)), sizes["idle"]


def _with_idle(out_BQHK: Tensor, idle: int) -> Tensor:
    return F.pad(out_BQHK.flatten(0, 1), (0, 0, 0, 0, 0, idle))


def gathering(problem: Problem) -> Forward:
    """torch's attention over each row's pages, copied into one tensor first."""
    return _sdpa(problem, lambda cache, table_RP: cache[:, table_RP].flatten(2, 3))


def gathered(problem: Problem) -> Forward:
    """torch's attention over keys and values that lie in one tensor already, without pages."""
    _, caches, table_RP, *_ = problem.arguments
    ready = {id(cache): cache[:, table_RP].flatten(2, 3) for cache in caches}
    return _sdpa(problem, lambda cache, _: ready[id(cache)])


def _sdpa(problem: Problem, rows: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """`rows` gives keys and values, (2, B, positions, N, K), of a cache."""
    _, caches, table_RP, *_, sizes, length_B = problem.arguments
    q_BQHK, idle = _queries(problem)
    num_queries = q_BQHK.shape[1]
    # The query heads of a group are rows of queries beside those of its further slots.
    q_BNQK = q_BQHK.unflatten(2, (sizes["N"], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    last_BQ = length_B[:, None] - torch.arange(num_queries, 0, -1)
    seen_BQX = torch.arange(table_RP.shape[1] * PAGE) <= last_BQ[..., None]
    seen = None if bool(seen_BQX.all()) else seen_BQX.to(q_BQHK.device)
    if seen is not None:
        seen = seen.repeat(1, sizes["H"] // sizes["N"], 1)[:, None]

    def attend(cache: Tensor) -> Tensor:
        k_BNXK, v_BNXK = rows(cache, table_RP).transpose(2, 3)
        out_BNQK = F.scaled_dot_product_attention(q_BNQK, k_BNXK, v_BNXK, attn_mask=seen)
        out_BQHK = out_BNQK.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return _with_idle(out_BQHK, idle)

    return replay(attend, caches, len(problem.arguments[0]))


def flash(problem: Problem) -> Forward:
    """flash-attn 3, the version that takes pages as small as ours."""
    q_CHK, caches, table_RP, *_, length_B = problem.arguments
    if not q_CHK.is_cuda:
        raise MissingError("timed on a GPU only")
    try:
        theirs: Any = importlib.import_module("flash_attn_interface")
    except ImportError:
        raise MissingError("flash-attn 3 is not installed") from None
    q_BQHK, idle = _queries(problem)
    seqlens = length_B.to(q_CHK.device, torch.int32)

    def attend(cache: Tensor) -> Tensor:
        options = {"cache_seqlens": seqlens, "page_table": table_RP, "causal": True}
        out = theirs.flash_attn_with_kvcache(q_BQHK, *cache, **options)
        return _with_idle(out[0] if isinstance(out, tuple) else out, idle)

    return replay(attend, caches, len(q_CHK))


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The last launch in fp64, a slot at a time."""
    q_CHK, caches, table_RP, line_C, position_C, sizes, _ = problem.arguments
    out_CHK = torch.zeros_like(q_CHK, dtype=torch.float64)
    for slot, (line, last) in enumerate(zip(line_C.tolist(), position_C.tolist(), strict=True)):
        if line >= 0:
            rows = caches[-1][:, table_RP[line]].flatten(1, 2)[:, : last + 1].double()
            k_NXK, v_NXK = rows.transpose(1, 2)
            q_NGK = q_CHK[slot].double().unflatten(0, (sizes["N"], -1))
            p_NGX = (q_NGK @ k_NXK.mT * sizes["K"] ** -0.5).softmax(-1)
            out_CHK[slot] = (p_NGX @ v_NXK).flatten(0, 1)
    return out_CHK, {}


_WORDS = dict.fromkeys(("spread", "string", "idle", "invariant"), 0)

OP = Op(
    name="decode_attention",
    gpu_sizes={"L": 8192, "B": 1, "H": 40, "N": 8, "K": 128, **_WORDS},
    cpu_sizes={"L": 40, "B": 2, "H": 4, "N": 2, "K": 16, **_WORDS},
    gpu_shapes=(  # Qwen2.5-32B: one row alone, with idle slots, a string; many; a rank of eight
        *("L8192", "L32768", "L8192xidle7", "L8192xstring8", "L8192xinvariant"),
        *("L8192xB8", "L4096xB64xspread", "L4096xB64xspreadxinvariant"),
        "L32768xH5xN1",
    ),
    cpu_shapes=("L40xspreadxstring3xidle2", "L40xB1"),
    make=make,
    reference=reference,
    ours=Provider("s1fast", ours),
    peers=(
        Provider("torch sdpa, pages gathered by torch", gathering),
        Provider("torch sdpa, without pages", gathered),
        Provider("flash-attn 3, pages", flash, "flash-attn-3"),
    ),
)
