"""The bench of packed_attention: causal attention with grouped heads over a packed stream.

Counted is the causal half, as FlashAttention counts it: 2 H K n^2 FLOPs forward for a sequence of n
tokens, 2.5 times that backward, for every provider: one that computes masked tiles, or products
twice, gets no credit for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s1fast import published
from s1fast.bench.op import Forward, MissingError, Op, Output, Problem, Provider
from s1fast.errors import InputError
from s1fast.kernels.packed_attention import check_backend, packed_attention

BINS = published.TRACES["simplescaling/s1K"]
SHORTEST, BIN_WIDTH = published.FIRST_BIN, published.BIN_WIDTH
MEAN = SHORTEST + BIN_WIDTH * sum((i + 0.5) * n for i, n in enumerate(BINS)) / sum(BINS)

CHUNK_ELEMENTS = 1 << 26
"""Scores that the reference holds at a time, in a few fp64 copies of 0.5 GB."""


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Standard normal inputs, bf16 on a GPU, fp32 on a CPU; B sequences of S tokens.

    With `ragged` their lengths are drawn from s1K's, scaled so that S is the mean to be expected.
    """
    heads, kv_heads, width = sizes["H"], sizes["N"], sizes["K"]
    if heads % kv_heads:
        raise InputError(f"--shape: H{heads} is no multiple of N{kv_heads}: heads share keys")
    length_B = torch.full((sizes["B"],), sizes["S"])
    if sizes["ragged"]:
        length_B = _draw(sizes["B"], sizes["S"])
    bounds = F.pad(length_B.cumsum(0), (1, 0)).to(torch.int32)
    num_tokens = int(bounds[-1])
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(count: int) -> Tensor:
        shape = (num_tokens, count, width)
        return torch.randn(shape, dtype=dtype, device=device, generator=random)

    q_THK, dout_THK = normal(heads), normal(heads)
    k_TNK, v_TNK = normal(kv_heads), normal(kv_heads)
    forward_flops = 2 * heads * width * int(length_B.square().sum())
    leaves = {"q": q_THK.requires_grad_(), "k": k_TNK.requires_grad_(), "v": v_TNK.requires_grad_()}
    return Problem(
        arguments=(q_THK, k_TNK, v_TNK, bounds, int(length_B.max())),
        leaves=leaves,
        upstream=dout_THK,
        forward_flops=forward_flops,
        flops=forward_flops * 7 // 2,
        num_bytes=4 * q_THK.nbytes + 4 * k_TNK.nbytes,  # q, out; k, v; the gradient of each
    )


def _draw(count: int, mean: int) -> Tensor:
    """Lengths spread as s1K's, the same on every device."""
    random = torch.Generator().manual_seed(0)
    weights = torch.tensor(BINS, dtype=torch.float64)
    bin_B = torch.multinomial(weights, count, replacement=True, generator=random)
    within_B = torch.rand(count, generator=random, dtype=torch.float64)
    length_B = SHORTEST + BIN_WIDTH * (bin_B + within_B)
    return (length_B * (mean / MEAN)).round().long().clamp(min=1)


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients in fp64, some rows of the heads of one group at a time; kept in fp32."""
    inputs = (*problem.arguments[:3], problem.upstream)
    q_THK, k_TNK, v_TNK, dout_THK = (x.detach() for x in inputs)
    bounds = problem.arguments[3].tolist()
    group = q_THK.shape[1] // k_TNK.shape[1]
    out, dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q_THK, *inputs[:3]))
    for start, stop in pairwise(bounds):
        here = slice(start, stop)
        for kv_head in range(k_TNK.shape[1]):
            members = slice(kv_head * group, (kv_head + 1) * group)
            q_GSK, dout_GSK = (x[here, members].transpose(0, 1) for x in (q_THK, dout_THK))
            k_SK, v_SK = (x[here, kv_head].double() for x in (k_TNK, v_TNK))
            found = _reference_group(q_GSK, k_SK, v_SK, dout_GSK)
            out[here, members], dq[here, members] = (x.transpose(0, 1) for x in found[:2])
            dk[here, kv_head], dv[here, kv_head] = found[2:]
    return out, {"q": dq, "k": dk, "v": dv}


def _reference_group(q_GSK: Tensor, k_SK: Tensor, v_SK: Tensor, dout_GSK: Tensor) -> list[Tensor]:
    """out, dq (G, S, K) and dk, dv (S, K) of one sequence and the G heads that share its keys."""
    group, length, width = q_GSK.shape
    scale = width**-0.5
    dk_SK, dv_SK = torch.zeros_like(k_SK), torch.zeros_like(v_SK)
    outs, dqs = [], []
    rows = max(1, CHUNK_ELEMENTS // (group * length))
    for start in range(0, length, rows):
        stop = min(start + rows, length)  # beyond it nothing is seen
        q_GCK, dout_GCK = (x[:, start:stop].double() for x in (q_GSK, dout_GSK))
        hidden_CS = torch.ones(stop - start, stop, dtype=torch.bool, device=q_GSK.device)
        p_GCS = scale * (q_GCK @ k_SK[:stop].T)
        p_GCS = p_GCS.masked_fill_(hidden_CS.triu_(start + 1), -torch.inf).softmax(-1)
        out_GCK = p_GCS @ v_SK[:stop]
        dv_SK[:stop].addmm_(p_GCS.flatten(0, 1).T, dout_GCK.flatten(0, 1))
        ds_GCS = dout_GCK @ v_SK[:stop].T
        ds_GCS.sub_((dout_GCK * out_GCK).sum(-1, keepdim=True)).mul_(p_GCS)
        dk_SK[:stop].addmm_(ds_GCS.flatten(0, 1).T, q_GCK.flatten(0, 1), alpha=scale)
        outs.append(out_GCK)
        dqs.append(scale * (ds_GCS @ k_SK[:stop]))
    return [torch.cat(outs, 1), torch.cat(dqs, 1), dk_SK, dv_SK]


# -- the peers ---------------------------------------------------------------------------------


def _on_gpu(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The arguments with the boundaries on the device: no peer waits for their copy."""
    q_THK, k_TNK, v_TNK, bounds, longest = problem.arguments
    if not q_THK.is_cuda:
        raise MissingError("timed on a GPU only")
    return q_THK, k_TNK, v_TNK, bounds.to(q_THK.device), longest


def _repeated(q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once for every query head, where grouped heads are not taken."""
    group = q_THK.shape[1] // k_TNK.shape[1]
    return k_TNK.repeat_interleave(group, dim=1), v_TNK.repeat_interleave(group, dim=1)


def varlen(problem: Problem, *, grouped: bool) -> Forward:
    """torch's variable-length attention; torch 2.11 cannot be told of grouped heads."""
    q_THK, k_TNK, v_TNK, bounds, longest = _on_gpu(problem)
    theirs: Any = importlib.import_module("torch.nn.attention.varlen")
    if grouped and "enable_gqa" not in theirs.varlen_attn.__annotations__:
        raise MissingError(f"torch {torch.__version__} takes no grouped heads here")
    options = {"window_size": (-1, 0)} | ({"enable_gqa": True} if grouped else {})
    boundaries = (bounds, bounds, longest, longest)

    def forward() -> Tensor:
        k, v = (k_TNK, v_TNK) if grouped else _repeated(q_THK, k_TNK, v_TNK)
        return theirs.varlen_attn(q_THK, k, v, *boundaries, **options)

    return forward


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic mode, without its filling of new memory, which would take time."""
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]


def gluon(problem: Problem) -> Forward:
    """Ours with the forward for Hopper; the backward is the same."""
    q_THK = problem.arguments[0]
    try:
        check_backend("gluon", q_THK.device, q_THK.dtype, q_THK.shape[2])
    except ValueError as error:
        raise MissingError(str(error)) from None
    return partial(packed_attention, *problem.arguments, backend="gluon")


def sdpa(problem: Problem) -> Forward:
    return partial(packed_attention, *problem.arguments, backend="reference")


def cudnn(problem: Problem) -> Forward:
    """As torch's nested tensors call cuDNN; there is no public function for it."""
    q_THK, k_TNK, v_TNK, bounds, longest = _on_gpu(problem)
    boundaries = (bounds, bounds, longest, longest)

    def forward() -> Tensor:
        k, v = _repeated(q_THK, k_TNK, v_TNK)
        options = (torch.is_grad_enabled(), 0.0, True)  # log-sum-exp, dropout, causal
        return torch.ops.aten._cudnn_attention_forward(q_THK, k, v, None, *boundaries, *options)[0]

    return forward


def cudnn_sequences(problem: Problem) -> Forward:
    _on_gpu(problem)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    forward = sdpa(problem)

    def only_cudnn() -> Output:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return forward()

    return only_cudnn


def flex(problem: Problem) -> Forward:
    """FlexAttention; which tiles see each other is found out once, untimed."""
    q_THK, k_TNK, v_TNK, bounds, _ = _on_gpu(problem)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sequences = torch.arange(len(bounds) - 1, device=bounds.device)
    sequence_T = sequences.repeat_interleave(bounds.diff())

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & (sequence_T[row] == sequence_T[column])

    torch.compiler.reset()  # each shape anew: none is measured with code made for several
    size = (None, None, len(q_THK), len(q_THK))
    mask = torch.compile(create_block_mask)(seen, *size, device=q_THK.device.type)

    def attend(*inputs: Tensor) -> Any:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return partial(torch.compile(attend, dynamic=False), q_THK, k_TNK, v_TNK)


def flash(problem: Problem, module: str) -> Forward:
    """flash-attn 4, 3 or 2: the same function in three homes."""
    theirs: Any = importlib.import_module(module)
    if not hasattr(theirs, "flash_attn_varlen_func"):  # a newer one's parts alone
        raise MissingError(f"{module} has no flash_attn_varlen_func")
    q_THK, k_TNK, v_TNK, bounds, longest = _on_gpu(problem)
    boundaries = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}

    def forward() -> Tensor:
        inputs = (q_THK, k_TNK, v_TNK)
        out = theirs.flash_attn_varlen_func(*inputs, **boundaries, **lengths, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return forward


OP = Op(
    name="packed_attention",
    gpu_sizes={"S": 4700, "B": 16, "H": 40, "N": 8, "K": 128, "ragged": 0},
    cpu_sizes={"S": 24, "B": 4, "H": 4, "N": 2, "K": 16, "ragged": 0},
    gpu_shapes=(
        "S4700xB16xragged",  # a batch of s1K
        "S4700xB16xK64xragged",
        "S4300xB8xH5xN1xragged",  # the heads that a GPU keeps of eight under Ulysses
        "S4096xB16",
        "S32768xB2",
    ),
    cpu_shapes=("S24xragged", "S24xH5xN1xragged", "S24"),
    make=make,
    reference=reference,
    ours=Provider("s1fast", lambda problem: lambda: packed_attention(*problem.arguments)),
    peers=(
        Provider("s1fast, forward in Gluon", gluon),
        Provider("torch varlen (FA2)", partial(varlen, grouped=True)),
        Provider("torch varlen (FA2), k/v repeated", partial(varlen, grouped=False)),
        Provider(
            "torch varlen (FA2), k/v repeated, deterministic",
            partial(varlen, grouped=False),
            context=deterministic,
        ),
        Provider("torch sdpa per sequence, k/v repeated", sdpa),
        Provider("cuDNN packed, k/v repeated", cudnn),
        Provider("cuDNN per sequence, k/v repeated", cudnn_sequences),
        Provider("FlexAttention, document mask", flex),
        Provider("flash-attn 4", partial(flash, module="flash_attn.cute"), "flash-attn-4"),
        Provider("flash-attn 3", partial(flash, module="flash_attn_interface"), "flash-attn-3"),
        Provider("flash-attn 2", partial(flash, module="flash_attn"), "flash-attn"),
    ),
)
