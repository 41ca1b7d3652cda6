"""The bench of linear_cross_entropy: mean cross-entropy of R labelled rows of T, head of V classes.

Counted are the three GEMMs over labelled rows, 6 R V D FLOPs, for every provider: one that computes
masked rows, or logits twice, gets no credit for it. The mean is what all peers offer; ours gets it
as loss weights of 1 / R.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from s1fast.bench.op import Forward, Op, Problem, Provider, compiled
from s1fast.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy

CHUNK_ROWS = 1024


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Random inputs, bf16 on a GPU, fp32 on a CPU; `masked` percent of the rows have no label.

    Logits are standard normal, so that no class is likely: implementations that skip negligible
    gradients then skip nearly all. With `peaked` they are as after training: some classes are
    frequent (Zipf: coordinate 0 acts as a bias of -log rank), the context makes others likely
    (standard deviation 3), and labels are drawn from the model's own distribution.
    """
    num_tokens, width, num_classes = sizes["T"], sizes["D"], sizes["V"]
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options: dict[str, Any] = {"generator": random, "device": device}
    hidden_TD = torch.randn(num_tokens, width, dtype=dtype, **options)
    weight_VD = torch.randn(num_classes, width, dtype=dtype, **options)
    weight_VD *= width**-0.5
    if sizes["peaked"]:
        hidden_TD *= 3
        hidden_TD[:, 0] = 1
        rank_V = 1 + torch.randperm(num_classes, **options)
        weight_VD[:, 0] = -rank_V.log().to(dtype)
        label_T = _draw(hidden_TD, weight_VD, random)
    else:
        label_T = torch.randint(num_classes, (num_tokens,), **options)
    masked_rows = torch.randperm(num_tokens, **options)[: num_tokens * sizes["masked"] // 100]
    label_T[masked_rows] = IGNORE
    valid_rows = (label_T != IGNORE).nonzero()[:, 0]
    num_rows = len(valid_rows)
    loss_weight_T = (label_T != IGNORE) / max(num_rows, 1)
    once = hidden_TD.nbytes + weight_VD.nbytes  # each is read for two of the products
    return Problem(
        arguments=(
            hidden_TD.requires_grad_(),
            weight_VD.requires_grad_(),
            label_T,
            loss_weight_T,
            valid_rows,
        ),
        leaves={"hidden": hidden_TD, "weight": weight_VD},
        forward_flops=2 * num_rows * num_classes * width,
        flops=6 * num_rows * num_classes * width,
        num_bytes=3 * once,
    )


def _draw(hidden_TD: Tensor, weight_VD: Tensor, random: torch.Generator) -> Tensor:
    """A class per row from the softmax of its logits (the largest, after Gumbel noise)."""
    labels = []
    for hidden_CD in hidden_TD.split(CHUNK_ROWS):
        logits_CV = (hidden_CD @ weight_VD.T).float()
        noise_CV = torch.empty_like(logits_CV).exponential_(generator=random)
        labels.append((logits_CV - noise_CV.log_()).argmax(-1))
    return torch.cat(labels)


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in fp64, chunk by chunk; gradients are handed over in fp32."""
    hidden_TD, weight_VD, label_T, loss_weight_T, _ = (x.detach() for x in problem.arguments)
    head_VD = weight_VD.double()
    loss = head_VD.new_zeros(())
    dhidden_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    dweight_VD = torch.zeros_like(head_VD)
    for rows in (label_T != IGNORE).nonzero()[:, 0].split(CHUNK_ROWS):
        hidden_CD, weight_C1 = hidden_TD[rows].double(), loss_weight_T[rows, None].double()
        logprob_CV = torch.log_softmax(hidden_CD @ head_VD.T, -1)
        label_C1 = label_T[rows, None]
        loss -= (weight_C1 * logprob_CV.gather(1, label_C1)).sum()
        grad_CV = logprob_CV.exp_().mul_(weight_C1).scatter_add_(1, label_C1, -weight_C1)
        dhidden_TD[rows] = (grad_CV @ head_VD).float()
        dweight_VD.addmm_(grad_CV.T, hidden_CD)
    return loss, {"hidden": dhidden_TD, "weight": dweight_VD.float()}


# -- the peers ---------------------------------------------------------------------------------


def _mean(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> Tensor:
    """As training scripts write it: all logits, widened to fp32 for the loss."""
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), label_T, ignore_index=IGNORE)


def plain(problem: Problem, *, compiling: bool = False) -> Forward:
    mean = compiled(problem, _mean, dynamic=False) if compiling else _mean
    return partial(mean, *problem.arguments[:3])


def liger(problem: Problem, **settings: object) -> Forward:
    theirs = importlib.import_module("liger_kernel.transformers.functional")
    return partial(theirs.liger_fused_linear_cross_entropy, *problem.arguments[:3], **settings)


def quack(problem: Problem) -> Forward:
    theirs = importlib.import_module("quack.linear_cross_entropy")
    return partial(theirs.chunked_linear_cross_entropy, *problem.arguments[:3])


def cut(problem: Problem) -> Forward:
    theirs = importlib.import_module("cut_cross_entropy")
    return partial(theirs.linear_cross_entropy, *problem.arguments[:3])


def _sum(hidden_CD: Tensor, weight_VD: Tensor, label_C: Tensor) -> Tensor:
    logits_CV = F.linear(hidden_CD, weight_VD).float()
    return F.cross_entropy(logits_CV, label_C, reduction="sum")


def chunked(problem: Problem) -> Forward:
    """As TRL does it: labelled rows only, 256 at a time, logits computed again in backward."""
    hidden_TD, weight_VD, label_T, _, _ = problem.arguments

    def forward() -> Tensor:
        labelled = label_T != IGNORE
        label_R = label_T[labelled]
        chunks = zip(hidden_TD[labelled].split(256), label_R.split(256), strict=True)
        losses = [checkpoint(_sum, x, weight_VD, y, use_reentrant=False) for x, y in chunks]
        return torch.stack(losses).sum() / len(label_R)

    return forward


OP = Op(
    name="linear_cross_entropy",
    gpu_sizes={"T": 4700, "D": 5120, "V": 152064, "masked": 0, "peaked": 0},
    cpu_sizes={"T": 96, "D": 32, "V": 500, "masked": 0, "peaked": 0},
    gpu_shapes=(
        "T4700",
        "T4700xmasked50",
        "T4700xpeaked",
        "T2048",
        "T4096xD4096xV128256",
        "T8192",
        "T32768",
    ),
    cpu_shapes=("T96", "T96xmasked50", "T96xpeaked"),
    make=make,
    reference=reference,
    ours=Provider("s1fast", lambda problem: lambda: linear_cross_entropy(*problem.arguments), None),
    peers=(
        Provider("torch eager", plain),
        Provider("torch.compile", partial(plain, compiling=True)),
        Provider("liger", liger, "liger-kernel"),
        Provider(
            "liger fp32, chunk_mem_const 8",
            partial(liger, accum_dtype=torch.float32, chunk_mem_const=8),
            "liger-kernel",
        ),
        Provider("quack", quack, "quack-kernels"),
        Provider("cut-cross-entropy", cut, "cut-cross-entropy"),
        Provider("trl-style 256-row chunks", chunked),
    ),
)
