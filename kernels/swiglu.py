"""The gated activation of the feed-forward block, from the fused gate-up projection.

    y_tf = silu(gate_tf) * up_tf

Two reads and one write: 6 T F bytes in bf16. Floor for T 4,700, F 27,648 at 3.0 TB/s: 780 MB,
260 us.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """Args: gate_up_TF2 (T, 2F), gate first. Returns (T, F) in the same dtype."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
