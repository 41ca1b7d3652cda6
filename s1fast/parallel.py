"""Ranks: who they are, and how a model is sharded over them.

Parameters, gradients and optimizer state are sharded over all ranks, a unit a layer (FSDP2). A
stream of tokens is sharded over the u ranks of a group (ulysses.py). A rank is part of the one
world mesh and of one such group.

    rank       0 1 2 3 | 4 5 6 7       world 8, u 4: two groups
    stream     a a a a | b b b b       a quarter of the tokens each; in attention, of the heads
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from s1fast import exposed
from s1fast.errors import InputError
from s1fast.heartbeat import Heartbeat
from s1fast.model import Model
from s1fast.ranks import ALONE, Ranks, process_group
from s1fast.ulysses import Group

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the last rank: longer than one may take to load or to save. One
that died is noticed sooner, by torchrun or by its heartbeat."""


@dataclass(frozen=True)
class Layout:
    """This process among the others."""

    device: torch.device
    ranks: Ranks = ALONE
    ulysses: int = 1
    """Ranks that share a stream, all on one node and consecutive."""
    mesh: DeviceMesh | None = None
    """All ranks, for FSDP. None: one process whose weights are whole."""
    group: Group | None = None
    """The ranks that share this one's stream; None where it has none to share with."""

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world(self) -> int:
        return self.ranks.world

    @property
    def num_groups(self) -> int:
        return self.world // self.ulysses

    @property
    def group_index(self) -> int:
        """Which of a pass's streams is this rank's."""
        return self.rank // self.ulysses

    @property
    def part(self) -> int:
        """Which part of its stream is this rank's."""
        return self.rank % self.ulysses

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place; the host does not wait for a GPU."""
        if self.world > 1:
            with exposed.span():
                dist.all_reduce(values)
        return values

    def most(self, values: Tensor) -> Tensor:
        """The largest of all ranks', in place; the host does not wait for a GPU."""
        if self.world > 1:
            with exposed.span():
                dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def smallest(self, value: int) -> int:
        """The least of all ranks' values."""
        return min(map(int, self.ranks.exchange(str(value))))

    def agree(self, facts: dict[str, str]) -> None:
        """Raises InputError on every rank where one has other facts, by the same names, than 0."""
        everyone = [json.loads(text) for text in self.ranks.exchange(json.dumps(facts))]
        for rank, theirs in enumerate(everyone):
            for name, first in everyone[0].items():
                if theirs[name] != first:
                    raise InputError(
                        f"the ranks disagree on {name}: {theirs[name]} on rank {rank}, {first} on "
                        "rank 0; start all of them with the same"
                    )


def gpus_per_node(layout: Layout) -> int:
    """How many ranks torchrun started on each node; InputError where nodes differ."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1") if launched() else "1"
    layout.agree({"the number of processes on a node": here})
    return int(here)


def ulysses_degree(gpus_per_node: int, heads: int, kv_heads: int) -> int:
    """How many ranks share a stream: the most of a node that the heads can be dealt to evenly.

    The largest divisor of gpus_per_node that divides the query heads and divides, or is a multiple
    of, the key-value heads, which then are repeated.
    """
    return max(
        u
        for u in range(1, gpus_per_node + 1)
        if gpus_per_node % u == 0 and heads % u == 0 and (kv_heads % u == 0 or u % kv_heads == 0)
    )


# -- processes -------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(device: torch.device) -> Layout:
    """Meets the ranks that torchrun started; without it, the one process is the world.

    A GPU is always driven by FSDP, a world of one included, which needs no launcher; a lone CPU
    process keeps its weights whole.

    Raises:
        InputError: a world that does not come together.
    """
    if not launched() and device.type == "cpu":
        return Layout(device)
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    bound: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        bound["device_id"] = device
    # gloo beside NCCL carries what the host has to say
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = _connection()
        part = own_part(store, rank, world)
        found: dict[str, Any] = {"store": dist.PrefixStore(part, store), "timeout": TIMEOUT}
        dist.init_process_group(backend, rank=rank, world_size=world, **found, **bound)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"rank {rank} of {world} cannot meet the others: {reason}") from None
    if world > 1:
        _heartbeats.append(Heartbeat(dist.PrefixStore(part, _connection()), rank, world))
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("world",))
    return Layout(device, process_group(), mesh=mesh)


_heartbeats: list[Heartbeat] = []
"""Of this process, at most one: it belongs to the process as torch's default group does."""


def _connection() -> dist.Store:
    """To where the ranks find each other: torchrun's store, or one of this process's own."""
    if not launched():
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return store


def own_part(store: dist.Store, rank: int, world: int) -> str:
    """Name of a part of a store that is this life's alone; all ranks call it.

    torchrun may start all anew on the same store, where the dead ones' addresses still stand, and
    its count of restarts is not the same on all nodes. So every other rank asks by a word of its
    own, and rank 0 answers whatever it finds asked, until all have found their answer.

    Raises:
        RuntimeError: some did not come within TIMEOUT.
    """
    word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asked/{rank}", word)
        word = store.get(f"answer/{word}").decode()
        store.set(f"found/{word}/{rank}", "")
        return word
    waiting, give_up = set(range(1, world)), time.monotonic() + TIMEOUT.total_seconds()
    while waiting:
        for other in list(waiting):
            if store.check([f"asked/{other}"]):  # perhaps by one that is dead
                store.set("answer/" + store.get(f"asked/{other}").decode(), word)
            if store.check([f"found/{word}/{other}"]):
                waiting.remove(other)
        if time.monotonic() > give_up:
            late = ", ".join(map(str, sorted(waiting)))
            raise RuntimeError(f"rank {late} did not come within {TIMEOUT}")
        time.sleep(0.01)
    return word


def share_streams(layout: Layout, degree: int) -> Layout:
    """The layout with streams shared by `degree` consecutive ranks; all ranks call it.

    Raises:
        ValueError: degree does not divide the number of ranks.
    """
    if layout.world % degree:
        raise ValueError(f"{layout.world} ranks cannot be dealt to groups of {degree}")
    if degree == 1:
        return layout
    # A communicator of its own, also where it spans the world: FSDP's is busy.
    group, _ = dist.new_subgroups(degree)
    return replace(layout, ulysses=degree, group=Group(group.group_name, degree))


def leave() -> None:
    """Ends what join began; all ranks call it, soon after each other."""
    if dist.is_initialized():
        if _heartbeats:
            _heartbeats.pop().stop()
        gc.collect()  # before the groups that tensors and modules still refer to
        dist.destroy_process_group()


# -- sharding --------------------------------------------------------------------------------------


def shard_model(
    model: Model, layout: Layout, reduce_dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Shards parameters and gradients over all ranks in place; the model may be on meta still.

    A layer is gathered in compute_dtype two layers ahead, freed after use, and gathered again for
    backward. Every backward sums gradients over the ranks into fp32 shards: loss weights carry the
    normalisation, so nothing is averaged.
    """
    if layout.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype,
        reduce_dtype=getattr(torch, reduce_dtype),
        cast_forward_inputs=False,
    )
    layers: list[Any] = list(model.layers)
    first: list[Any] = []
    last: list[Any] = []
    if model.head.weight is not None:
        first, last = [model.embed], [model.head]
    # Backward begins with the head, so it stays; the embedding's backward needs no weight.
    for unit in [*first, *layers]:
        fully_shard(unit, mesh=layout.mesh, mp_policy=policy)
    for unit in last:
        fully_shard(unit, mesh=layout.mesh, mp_policy=policy, reshard_after_forward=False)
    # With tied weights embedding, final norm and head are what is left for the root, which stays
    # gathered until its backward.
    root: Any = fully_shard(model, mesh=layout.mesh, mp_policy=policy)
    for unit in first:
        unit.set_unshard_in_backward(False)
    order = [first[0] if first else root, *layers, *last]
    for i, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(order[i + 1 : i + 3])
    sharded: list[Any] = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    for unit in sharded:
        if layout.world > 1:
            # Summed by force: a factor of 1 alone would be a reduction that only NCCL has.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        exposed.watch(unit)
    separable = hasattr(root, "set_separate_reduce_scatter_group")
    if layout.device.type == "cuda" and layout.world > 1 and separable:
        # torch 2.13: in backward, reduce-scatter and all-gather run side by side.
        root.set_separate_reduce_scatter_group()
