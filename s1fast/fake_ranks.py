"""Peak memory of a rank, found by running a step that computes nothing on ranks that do not exist.

The real sharded model runs forward and backward on tensors without data, under a process group
whose collectives do nothing, while torch's FSDP memory tracker adds up what is alive. A few layers
are enough: every further layer adds the same. Not seen by the tracker and added by hand: moments
(its own figure for sharded ones is wrong), what our operations take inside themselves, the
communicators' buffers, and what the allocator cannot use.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from s1fast.errors import InputError
from s1fast.model import Model, ModelConfig, Recompute

FEW, MORE = 2, 4
"""Layers of the two runs that all others are extrapolated from."""

Peak = dict[str, float]
"""Bytes by category of torch's tracker, at the moment when their sum is largest."""


def peak(
    config: ModelConfig, world: int, ulysses: int, num_tokens: int, what: Sequence[Recompute]
) -> Peak:
    """The tracked peak of forward and backward of a stream with num_tokens tokens on each rank.

    Runs FEW layers of each policy in `what`, and for each policy MORE of it, in a process of their
    own: a process group that is no real one must not meet one that is.
    """
    kinds = sorted(set(what))
    runs = [[kind for kind in kinds for _ in range(FEW)]]
    for grown in kinds:
        runs.append([kind for kind in kinds for _ in range(MORE if kind == grown else FEW)])
    small, *larger = in_process(config, world, ulysses, num_tokens, runs)
    return _extrapolate(small, larger, [list(what).count(kind) for kind in kinds])


def _extrapolate(small: Peak, grown: Sequence[Peak], counts: Sequence[int]) -> Peak:
    """small has FEW layers of each kind, grown[i] MORE of kind i; linear in each kind's count."""
    found = dict(small)
    for larger, count in zip(grown, counts, strict=True):
        for name, value in larger.items():
            slope = (value - small.get(name, 0.0)) / (MORE - FEW)
            found[name] = found.get(name, 0.0) + slope * (count - FEW)
    return found


def in_process(
    config: ModelConfig,
    world: int,
    ulysses: int,
    num_tokens: int,
    runs: Sequence[Sequence[Recompute]],
) -> list[Peak]:
    """simulate() for models of as many layers as each run names policies, in another process."""
    asked = [dataclasses.asdict(config), world, ulysses, num_tokens, list(map(list, runs))]
    done = subprocess.run(
        [sys.executable, "-m", "s1fast.fake_ranks", json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise InputError(f"the memory of {world} ranks could not be simulated: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def simulate(
    config: ModelConfig, world: int, ulysses: int, num_tokens: int, what: Sequence[Recompute]
) -> Peak:
    """One forward and backward of a sharded model in bf16 with fp32 weights, in this process.

    Only in a process that has no process group and needs none afterwards.
    """
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from s1fast.parallel import Layout, shard_model
    from s1fast.ranks import Ranks
    from s1fast.ulysses import Group

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("world",))
    group = None
    if ulysses > 1:
        group = Group(dist.new_group(list(range(ulysses))).group_name, ulysses)
    layout = Layout(torch.device("cpu"), Ranks(0, world), ulysses, mesh, group)
    cu_seqlens = torch.tensor([0, num_tokens * ulysses], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            model = Model(config, compute_dtype=torch.bfloat16)
        shard_model(model, layout)
        model.to_empty(device="cpu")
        ids_T = torch.zeros(num_tokens, dtype=torch.int64)
        weight_T = torch.ones(num_tokens)
        tracker = FSDPMemTracker(model)
        tracker.track_inputs((ids_T, weight_T))
        with tracker:
            attend = _attention(cu_seqlens, num_tokens * ulysses, group)
            hidden_TD = model(ids_T, ids_T, attend, recompute=what)
            model.loss(hidden_TD, ids_T, weight_T, ids_T).backward()
            del hidden_TD
        found = tracker.get_tracker_snapshot("peak")
    dist.destroy_process_group()
    ((_, categories),) = found.items()
    names = {name: str(name).rpartition(".")[2].lower() for name in categories}
    return {
        names[name]: float(value) for name, value in categories.items() if names[name] != "total"
    }


def _attention(cu_seqlens: torch.Tensor, longest: int, group: Any) -> Any:
    """Our attention as it is on a GPU: a CPU's would keep other things for backward."""
    from s1fast.ulysses import ulysses_attention

    def attend(
        layer: int, q_THK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor
    ) -> torch.Tensor:
        qkv = (q_THK, k_TNK, v_TNK)
        if group is None:  # past the check that a CPU does not pass
            return torch.ops.s1fast.packed_attention(*qkv, cu_seqlens, True, 1.0)[0]
        return ulysses_attention(*qkv, cu_seqlens, longest, backend="triton", group=group)

    return attend


def main() -> None:
    fields, world, ulysses, num_tokens, runs = json.loads(sys.argv[1])
    config = ModelConfig(**fields)
    found = [
        simulate(
            dataclasses.replace(config, num_hidden_layers=len(what)),
            world,
            ulysses,
            num_tokens,
            what,
        )
        for what in runs
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
