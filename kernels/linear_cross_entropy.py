"""Cross-entropy of a linear head without ever holding all logits.

    loss = sum_t weight_t * (logsumexp_v(hidden_t . W_v) - hidden_t . W_label_t)

Three GEMMs of 2 R V D FLOPs (logits, d hidden, d weight) for R rows that carry a label. Floor for
R 4,700, D 5,120, V 152,064: 22.0 TFLOP, 29.6 ms at 742 TFLOP/s.

The gradient is formed while the logits of a chunk exist, in forward, so that a chunk is computed
once; backward only scales it.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Memory for one chunk of fp32 logits."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, label_T, loss_weight_T, valid_rows, needs_grad):
        hidden_RD = hidden_TD[valid_rows]
        head_VD = weight_VD.to(hidden_TD.dtype)
        # One rounding at the end: the weight gradient is summed over chunks in fp32 or wider.
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else None
        dhidden_RD = torch.empty_like(hidden_RD) if needs_grad else None
        loss = hidden_TD.new_zeros((), dtype=wide)
        num_rows = max(1, CHUNK_BYTES // (weight_VD.shape[0] * wide.itemsize))
        for start in range(0, len(valid_rows), num_rows):
            rows = slice(start, start + num_rows)
            label_C = label_T[valid_rows[rows]]
            weight_C = loss_weight_T[valid_rows[rows]].to(wide)
            logits_CV = (hidden_RD[rows] @ head_VD.T).to(wide)
            lse_C = logits_CV.logsumexp(-1)
            true_C = logits_CV.gather(1, label_C[:, None])[:, 0]
            loss += (weight_C * (lse_C - true_C)).sum()
            if dweight_VD is None or dhidden_RD is None:
                continue
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_()
            grad_CV.scatter_add_(1, label_C[:, None], -torch.ones_like(true_C)[:, None])
            grad_CV.mul_(weight_C[:, None])
            low_CV = grad_CV.to(hidden_TD.dtype)
            dhidden_RD[rows] = low_CV @ head_VD
            dweight_VD += (low_CV.T @ hidden_RD[rows]).to(wide)
        if dweight_VD is not None and dhidden_RD is not None:
            dhidden_TD = torch.zeros_like(hidden_TD).index_copy_(0, valid_rows, dhidden_RD)
            ctx.save_for_backward(dhidden_TD, dweight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD * dloss.to(dhidden_TD.dtype), dweight_VD * dloss, *[None] * 4


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, loss_weight_T: Tensor, valid_rows: Tensor
) -> Tensor:
    """Weighted sum of the cross-entropies of the rows that carry a label.

    Args:
        hidden_TD: final hidden states, fp32, bf16 or fp64.
        weight_VD: head, any floating dtype; used in hidden's dtype, its gradient in its own.
        label_T: int64 class per row; read only at valid_rows.
        loss_weight_T: fp32 weight per row: mask and normalisation in one.
        valid_rows: (R,) int64 indices of the rows to use, ascending, built on the host when the
            batch was packed, so that nothing here waits to learn R.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 weights). No rows give 0 and zero gradients.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden (T, D) and weight (V, D) disagree: {tuple(hidden_TD.shape)}, "
            f"{tuple(weight_VD.shape)}"
        )
    for name, x in (("label_T", label_T), ("loss_weight_T", loss_weight_T)):
        if x.shape != hidden_TD.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({len(hidden_TD)},)")
    for name, x in (("label_T", label_T), ("valid_rows", valid_rows)):
        if x.dtype != torch.int64:
            raise ValueError(f"{name} is {x.dtype}, expected torch.int64")
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, label_T, loss_weight_T, valid_rows, needs_grad
    )
