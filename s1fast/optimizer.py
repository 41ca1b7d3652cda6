"""AdamW, its schedule and the gradient clip, as s1's run had them; nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from s1fast.config import OptimConfig
from s1fast.kernels.adamw import Shards, adamw_, gradients, sum_of_squares


class AdamW:
    """AdamW over a model's parameters, clipped by their global norm, in place.

    exp_avg, exp_avg_sq: the moments by the parameter's name, this rank's part where it is sharded.
    steps: how many were taken. Whoever restores a run writes into all three. Norms and biases, the
    vectors, do not decay; at s1's rate and decay nothing does, for 1 - 1e-9 is 1 in fp32.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: OptimConfig,
        all_reduce: Callable[[Tensor], object] | None = None,
    ) -> None:
        """Args:
            named_parameters: fp32; a DTensor is updated by its local part.
            all_reduce: sums a tensor over all ranks in place, where parameters are sharded.

        Raises:
            ValueError: a parameter that the kernel cannot take.
        """
        self.config, self.all_reduce = config, all_reduce
        self.parameters = dict(named_parameters)
        dtype = getattr(torch, config.moments)
        parts = {name: local(p.detach()) for name, p in self.parameters.items()}
        self.exp_avg = {name: torch.zeros_like(x, dtype=dtype) for name, x in parts.items()}
        self.exp_avg_sq = {name: torch.zeros_like(x, dtype=dtype) for name, x in parts.items()}
        self.steps = 0
        decays = [config.weight_decay if p.ndim > 1 else 0.0 for p in self.parameters.values()]
        moments = [*self.exp_avg.values()], [*self.exp_avg_sq.values()]
        self._shards = Shards([*parts.values()], *moments, decays)

    @torch.no_grad()
    def step(self, lr: Tensor, max_norm: float) -> Tensor:
        """Clips the gradients, which stay as they are, and updates weights and moments.

        Args:
            lr: 0-d fp32 tensor on the parameters' device.
            max_norm: largest global L2 norm; above it all gradients are scaled down to it.

        Returns:
            The norm before clipping, over all ranks; a 0-d tensor on the device.

        Raises:
            ValueError: a parameter without gradient, or one that was moved since this was made.
        """
        found = gradients(self._shards, self._gradients())
        squares = sum_of_squares(self._shards, found)
        if self.all_reduce is not None:
            self.all_reduce(squares)
        norm = squares.sqrt()
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        self.steps += 1
        adamw_(self._shards, found, lr, clip, self.steps, self.config.betas, self.config.eps)
        return norm

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        grads = []
        for (name, parameter), part in zip(
            self.parameters.items(), self._shards.params, strict=True
        ):
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient; every parameter must be used in a step")
            if local(parameter).data_ptr() != part.data_ptr():
                raise ValueError(f"{name} was moved in memory; make the optimizer after that")
            grads.append(local(parameter.grad))
        return grads


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Rate of optimizer step 0, 1, ...: linear from 0 over the warm-up, then a cosine to 0.

    As transformers' get_cosine_schedule_with_warmup; the warm-up has ceil(ratio * num_steps) steps.
    """
    num_warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < num_warmup:
        return config.lr * step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def learning_rates(num_steps: int, config: OptimConfig, device: torch.device) -> Tensor:
    """The rates of all steps, (num_steps,) fp32 on the device: a step's is a view, not a copy."""
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    return torch.tensor(rates, dtype=torch.float32).to(device)
