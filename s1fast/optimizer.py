"""AdamW, its schedule and the gradient clip, as s1's run had them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from s1fast.config import OptimConfig


def make_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; norms and biases, the vectors, do not decay."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, foreach=False, fused=True
    )


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Rate of optimizer step 0, 1, ...: linear from 0 over the warm-up, then a cosine to 0.

    As transformers' get_cosine_schedule_with_warmup; the warm-up has ceil(ratio * num_steps) steps.
    """
    num_warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < num_warmup:
        return config.lr * step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, largest_norm: float) -> Tensor:
    """Scales all gradients so that their global L2 norm is at most the given one.

    Returns:
        The norm before clipping, a device scalar: nothing waits for it.
    """
    return nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
