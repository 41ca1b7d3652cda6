"""Checks that several processes run together: `python tests/rank_checks.py OUT WORLD ...`.

One process imports torch and forks the ranks of each world. They run every check of CHECKS for that
world, of SLOW where the first of the worlds is "slow", and write OUT/<world>-<rank>.json: name ->
error, "" where it holds. test_parallel.py starts this once and reports every check as a test.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():  # as conftest.py does, before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

from s1fast import exposed
from s1fast.chat import Example
from s1fast.checkpoint import load_model, save_model
from s1fast.config import DataConfig, OptimConfig, TrainConfig
from s1fast.errors import InputError
from s1fast.gauges import Gauges
from s1fast.model import Model, ModelConfig
from s1fast.optimizer import local
from s1fast.packing import part_tokens
from s1fast.parallel import Layout, join, leave, shard_model, share_streams
from s1fast.step import Trainer
from s1fast.ulysses import _ToTokens, to_heads, ulysses_attention

CPU = torch.device("cpu")
LENGTHS = [40, 7, 23, 64, 2, 31, 12, 55]
TOLERANCE = 4e-6
"""Relative, in norm. fp32 sums of up to a few hundred terms, each rounded to 2^-24, in another
order: about 1e-6. A token left out or counted twice moves percents."""


def model_config(**changes) -> ModelConfig:
    fields = {
        "model_type": "qwen2",
        "vocab_size": 101,  # no multiple of any number of ranks
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": True,
    }
    return ModelConfig(**{**fields, **changes})


def recipe(**changes) -> TrainConfig:
    values = {
        "model": "none",
        "data": DataConfig(path="none"),
        "batch_size": 8,
        "epochs": 1,
        "recompute": "none",
        "attention": "reference",
        "optim": OptimConfig(lr=3e-3),
    }
    return TrainConfig(**{**values, **changes})


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Prompts of a third, without loss."""
    rng = random.Random(seed)
    made = []
    for n in lengths:
        ids = tuple(rng.randrange(101) for _ in range(n))
        made.append(Example(ids, tuple(i >= n // 3 for i in range(n)), "test"))
    return made


def make(
    config: ModelConfig,
    train: TrainConfig,
    rows: list[Example],
    layout: Layout,
    dtype=torch.float32,
) -> Trainer:
    """Weights large enough that every part of the model matters."""
    torch.manual_seed(0)
    model = Model(config, compute_dtype=dtype).init_random(0, std=0.15)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
    shard_model(model, layout, train.reduce_dtype)
    return Trainer(train, model, rows, layout)


def own_rows(whole: Tensor, parameter: Tensor, layout: Layout) -> Tensor:
    """What FSDP leaves to this rank: torch.chunk's part, maybe none."""
    size = -(-len(whole) // layout.world)
    part = whole[layout.rank * size : (layout.rank + 1) * size]
    assert local(parameter).shape == part.shape
    return part


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = local(parameter.grad)
    return found


def compare(
    world: Layout,
    degree: int,
    config: ModelConfig,
    train: TrainConfig | None = None,
    lengths: list[int] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Loss and every gradient of a step: this many ranks and one."""
    train = train or recipe()
    rows = examples(lengths or LENGTHS)
    alone = make(config, replace(train, microbatch_tokens=1 << 20), rows, Layout(CPU))
    many = make(config, train, rows, share_streams(world, degree))
    wanted_loss, _ = alone.backward(alone.plan(0))
    found_loss, bad = many.backward(many.plan(0))
    assert float(bad) == 0
    assert abs(float(found_loss / wanted_loss) - 1) <= tolerance
    wanted, found = gradients(alone), gradients(many)
    for name, parameter in many.model.named_parameters():
        whole = wanted[name]
        error = torch.zeros(())
        part = own_rows(whole, parameter, world)
        error = world.sum((found[name] - part).square().sum()).sqrt() / whole.norm()
        assert float(error) <= tolerance, f"{name}: {float(error)}"


def curve(trainer: Trainer) -> list[float]:
    return [float(trainer.step(i).loss) for i in range(trainer.num_steps)]


def compare_curves(world: Layout, degree: int, config: ModelConfig, train: TrainConfig) -> None:
    """Twenty steps: losses and, at the end, every weight."""
    rows = examples([random.Random(i).randrange(2, 60) for i in range(37)])
    train = replace(train, batch_size=4, epochs=100, max_steps=20)
    alone = make(config, train, rows, Layout(CPU))
    many = make(config, train, rows, share_streams(world, degree))
    wanted, found = curve(alone), curve(many)
    assert min(wanted) < 0.9 * wanted[0]  # it learns
    # A step hands its rounding on to the next, and Adam divides by gradients that are small.
    worst = max(abs(f / w - 1) for f, w in zip(found, wanted, strict=True))
    assert worst <= 2e-5, f"{worst}: {found} {wanted}"


# -- the checks ------------------------------------------------------------------------------------

UNTIED = model_config()
TIED = model_config(tie_word_embeddings=True, model_type="llama", attention_bias=False)
Check = Callable[[Layout], None]
CHECKS: dict[int, dict[str, Check]] = {1: {}, 2: {}, 3: {}, 4: {}}
SLOW: dict[int, dict[str, Check]] = {2: {}}


def check(*worlds: int, table: dict[int, dict[str, Check]] = CHECKS) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        for world in worlds:
            table[world][function.__name__] = function
        return function

    return register


@check(1)
def one_rank(world: Layout) -> None:
    """As a GPU alone is driven: nothing is summed, so not a bit differs."""
    for config in (UNTIED, TIED):
        compare(world, 1, config, tolerance=0.0)


@check(1)
def one_ranks_export(world: Layout) -> None:
    """It has every row, and what it saves is read by any process."""
    trainer = make(TIED, recipe(), examples(LENGTHS), world)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.mkdir()
        fields = {
            k: v for k, v in vars(TIED).items() if k not in ("attention_bias", "rope_scaling")
        }
        (source / "config.json").write_text(json.dumps(fields))
        save_model(trainer.model, source, target, torch.float32)
        loaded = dict(load_model(target, CPU, torch.float32).named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded[name], local(parameter)), name


@check(2)
def two_ranks_have_no_whole_model(world: Layout) -> None:
    trainer = make(TIED, recipe(), examples(LENGTHS), world)
    try:
        save_model(trainer.model, Path("none"), Path("none"), torch.float32)
    except ValueError as error:
        assert "this rank has 5" in str(error), error  # 50 or 51 rows of the embedding's 101
    else:
        raise AssertionError("saved what is not there")


@check(1, 3)
def loaded_onto_meta(world: Layout) -> None:
    """Sharded before there is memory, then drawn: the same weights as without sharding."""
    with torch.device("meta"):
        model = Model(UNTIED)
    shard_model(model, world)
    model.materialise(CPU, torch.float32).init_random(7)
    with torch.device("meta"):
        whole = Model(UNTIED)
    whole.materialise(CPU, torch.float32).init_random(7)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(local(ours), own_rows(theirs, ours, world)), name


@check(2, 3)
def fsdp(world: Layout) -> None:
    compare(world, 1, UNTIED)


@check(2, 4)
def fsdp_tied(world: Layout) -> None:
    compare(world, 1, TIED)


@check(2)
def ulysses(world: Layout) -> None:
    compare(world, 2, UNTIED)


@check(4)
def fsdp_and_ulysses(world: Layout) -> None:
    compare(world, 2, UNTIED)


@check(4)
def repeated_kv_heads(world: Layout) -> None:
    """Four ranks share a stream, two key-value heads."""
    compare(world, 4, TIED)


@check(3)
def three_share_a_stream(world: Layout) -> None:
    config = model_config(num_attention_heads=6, num_key_value_heads=3)
    compare(world, 3, config, lengths=[5, 1, 2, 3, 9, 70, 11, 2])


@check(2, 4)
def accumulation(world: Layout) -> None:
    """As many passes on every rank, some of them empty."""
    train = recipe(microbatch_tokens=40 // (world.world // 2))
    compare(world, world.world // 2, UNTIED, train)


@check(4)
def empty_group(world: Layout) -> None:
    compare(world, 2, UNTIED, recipe(batch_size=1), lengths=[33])


@check(4)
def fewer_tokens_than_ranks(world: Layout) -> None:
    compare(world, 4, UNTIED, recipe(batch_size=1), lengths=[3])


@check(4)
def token_weights(world: Layout) -> None:
    compare(world, 2, UNTIED, recipe(data=DataConfig(path="none", loss_weight="token")))


@check(2)
def recomputed(world: Layout) -> None:
    compare(world, 2, UNTIED, recipe(recompute="full"))


@check(2)
def partly_recomputed(world: Layout) -> None:
    """A budget between all and nothing gives a mixture, and the same gradients."""
    memory = make(UNTIED, recipe(), examples(LENGTHS), share_streams(world, 2)).memory
    tokens = part_tokens(sum(LENGTHS), 2)
    most, least = (memory.needed([kind] * 3, tokens) for kind in ("none", "gate_up"))
    train = recipe(recompute="auto", activation_gb=(most + least) / 2e9)
    trainer = make(UNTIED, train, examples(LENGTHS), share_streams(world, 2))
    assert set(trainer.recompute([sum(LENGTHS)], first_pass=True)) == {"none", "gate_up"}
    compare(world, 2, UNTIED, train)


@check(4)
def reduced_in_bf16(world: Layout) -> None:
    """Each rank's share of a gradient is rounded to bf16, and so is every partial sum: 2^-9 a
    rounding, three of them with four ranks."""
    train = recipe(reduce_dtype="bfloat16")
    compare(world, 2, UNTIED, train, tolerance=3 * 2.0**-9)
    try:
        compare(world, 2, UNTIED, train)
    except AssertionError:
        return
    raise AssertionError("nothing was rounded")


@check(4)
def curves(world: Layout) -> None:
    compare_curves(world, 2, UNTIED, recipe())


@check(3)
def curves_tied(world: Layout) -> None:
    compare_curves(world, 1, TIED, recipe(microbatch_tokens=50))


@check(2)
def heads_and_back(world: Layout) -> None:
    """Every token arrives, at its place, with the heads that are this rank's."""
    group = share_streams(world, 2).group
    assert group is not None
    whole_THK = torch.arange(6 * 4 * 3.0).view(6, 4, 3)
    mine = slice(3 * world.rank, 3 * world.rank + 3)
    for kv_heads in (2, 1):  # a head each, and one for both
        whole_TNK = whole_THK[:, :kv_heads] + 0.1
        q, k, v = to_heads(whole_THK[mine], whole_TNK[mine], 2 * whole_TNK[mine], group)
        assert torch.equal(q, whole_THK[:, 2 * world.rank : 2 * world.rank + 2])
        own = min(world.rank, kv_heads - 1)
        assert torch.equal(k, whole_TNK[:, own, None])
        assert torch.equal(v, 2 * whole_TNK[:, own, None])
        assert torch.equal(_ToTokens.apply(q, group), whole_THK[mine])


def attend(world: Layout, kv_heads: int, compiled: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Our kernels' output and gradients over the ranks, each beside those of the whole stream."""
    group = share_streams(world, world.world).group
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 41, 41, 83], dtype=torch.int32)  # 13 tokens are padding
    size = 96 // world.world
    mine = slice(size * world.rank, size * (world.rank + 1))
    heads = (4, kv_heads, kv_heads)
    inputs = [torch.randn(96, n, 64, generator=generator).bfloat16() for n in heads]
    upstream = torch.randn(96, 4, 64, generator=generator).bfloat16()
    call = torch.compile(ulysses_attention, backend="aot_eager", fullgraph=True)
    results = []
    for part, shared in ((slice(None), None), (mine, group)):
        leaves = [x[part].clone().requires_grad_() for x in inputs]
        function = call if compiled and shared else ulysses_attention
        out = function(*leaves, bounds, 42, backend="triton", group=shared)
        out.backward(upstream[part])
        results.append([out.detach(), *(x.grad for x in leaves)])
    whole, ours = results
    return [(found, wanted[mine]) for found, wanted in zip(ours, whole, strict=True)]


@check(2)
def triton_attention(world: Layout) -> None:
    """Bit for bit: a head's arithmetic does not know where its tokens live."""
    for compiled in (False, True):
        for found, wanted in attend(world, 2, compiled):
            assert torch.equal(found, wanted)


@check(2)
def triton_attention_repeated(world: Layout) -> None:
    """One key-value head for both ranks: each rounds its sum of d key to bf16, 2^-9, and so is
    the sum of the two."""
    for found, wanted in attend(world, 1):
        assert float((found - wanted).float().norm() / wanted.float().norm()) <= 2.0**-8


@check(2)
def output_is_kept_once(world: Layout) -> None:
    """Attention saves the very output that it returns, in the layout of tokens."""
    group = share_streams(world, 2).group
    q, k, v = (torch.randn(16, 2, 64).bfloat16().requires_grad_() for _ in range(3))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        bounds = torch.tensor([0, 32], dtype=torch.int32)
        out = ulysses_attention(q, k, v, bounds, 32, backend="triton", group=group)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert out.untyped_storage().data_ptr() in kept
    # The output; q, k and v of one head and all tokens; its log-sum-exp; the boundaries.
    assert sum(kept.values()) == out.nbytes + 3 * 32 * 64 * 2 + 32 * 4 + 2 * 4


class SpansKept(TorchDispatchMode):
    """Collectives only where a span is open, compute only where none is."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.collectives = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            assert exposed._spans.open is None, f"{name} within a span"
            self.products += 1
        return func(*args, **(kwargs or {}))

    def collective(self, function):
        def call(*arguments, **options):
            assert exposed._spans.open is not None, f"{function.__name__} outside of spans"
            self.collectives += 1
            return function(*arguments, **options)

        return call


PRODUCTS = ("mm", "addmm", "bmm", "feed_forward", "feed_forward_backward", "norm_qkv_backward")
PRODUCTS += ("embedding", "embedding_dense_backward", "linear_cross_entropy")


@check(2)
def spans_hold_all_communication(world: Layout) -> None:
    """And no compute, whatever is tied, recomputed or accumulated; what is gathered ahead too."""
    names = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    names += ("all_gather_single", "reduce_scatter_single")  # FSDP's names for them, torch 2.13
    layout = share_streams(world, 2)
    for config, changes in (
        (UNTIED, {}),
        (UNTIED, {"recompute": "full"}),
        (TIED, {"microbatch_tokens": 60}),
    ):
        trainer = make(config, recipe(**changes), examples(LENGTHS), layout)
        mode = SpansKept()
        with contextlib.ExitStack() as stack:
            stack.enter_context(exposed.collecting(CPU))
            stack.enter_context(mode)
            for name in set(names) & set(dir(dist)):
                wrapped = mode.collective(getattr(dist, name))
                stack.enter_context(patch.object(dist, name, wrapped))
            gauges = Gauges(layout)
            gauges.begin()
            measured = gauges.end(trainer.step(0)).wait()
            assert exposed._spans.open is None and exposed.take() == []
        # A layer is gathered twice and reduced, and deals its heads four times.
        assert mode.collectives >= 7 * config.num_hidden_layers, mode.collectives
        assert mode.products >= 3 * config.num_hidden_layers, mode.products
        assert measured.exposed_s is not None and measured.peak_bytes is None
        assert 0 < measured.exposed_s < measured.step_s


@check(2)
def waiting_for_a_slow_rank_is_exposed(world: Layout) -> None:
    """Rank 1 sleeps in each layer's forward: rank 0 waits as long, rank 1 does not."""
    nap_s, trainer = 0.05, make(UNTIED, recipe(), examples(LENGTHS), world)
    trainer.step(0)
    if world.rank:
        for layer in trainer.model.layers:
            layer.register_forward_hook(lambda *_: time.sleep(nap_s))
    with exposed.collecting(CPU):
        gauges = Gauges(world)
        gauges.begin()
        measured = gauges.end(trainer.step(0)).wait()
    naps_s = nap_s * len(trainer.model.layers)
    assert measured.exposed_s is not None and measured.step_s > naps_s
    theirs = [float(x) for x in world.ranks.exchange(str(measured.exposed_s))]
    assert theirs[0] > theirs[1] + 0.5 * naps_s, theirs


@check(2, 4)
def most(world: Layout) -> None:
    assert float(world.most(torch.tensor(float(world.rank)))) == world.world - 1


@check(2, table=SLOW)
def compiled(world: Layout) -> None:
    """Layers compiled beneath FSDP's hooks, around exchanged heads: the same bits, and no graph is
    built once training has begun."""
    config = model_config(hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    layout, rows = share_streams(world, 2), examples([40, 23, 30, 11, 90, 2])
    Model.compile_layers.__defaults__ = ("aot_eager_decomp_partition",)
    results = []
    for compile in (False, True):
        train = recipe(attention="triton", batch_size=2, compile=compile)
        trainer = make(config, train, rows, layout, torch.bfloat16)
        torch._dynamo.config.error_on_recompile = True
        with exposed.collecting(CPU):  # whose hooks the compiler sees
            results.append(curve(trainer))
        torch._dynamo.config.error_on_recompile = False
    assert len(results[0]) == 3 and results[0] == results[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@check(2, 3)
def texts_go_over_gloo(world: Layout) -> None:
    """Of different lengths, empty, with trailing blanks and more than a byte a character."""
    rank, everyone = world.rank, range(world.world)
    for text in ("", "0", "é ", "\n"):
        assert world.ranks.exchange(text * rank) == [text * other for other in everyone]
        back = [text * (world.world - other) for other in everyone]
        assert world.ranks.exchange(back[rank]) == back


@check(2, 4)
def smallest(world: Layout) -> None:
    assert world.smallest(100 - world.rank) == 101 - world.world


@check(3)
def ranks_that_disagree(world: Layout) -> None:
    world.agree({"seed": "1", "data": "abc"})
    try:
        world.agree({"seed": "1", "data": "abd" if world.rank == 2 else "abc"})
    except InputError as error:
        assert "disagree on data: abd on rank 2, abc on rank 0" in str(error)
    else:
        raise AssertionError("nobody noticed")


# -- running them ----------------------------------------------------------------------------------


def run(out: Path, checks: dict[str, Check], world: int, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    layout = join(CPU)
    results = {}
    for name, function in checks.items():
        began = time.perf_counter()
        error = ""
        try:
            function(layout)
        except BaseException:
            error = traceback.format_exc()
        results[name] = error
        if rank == 0:
            print(f"{world} ranks: {name} {time.perf_counter() - began:.2f} s", flush=True)
        # Before the next check may meet in a collective whoever is still in this one.
        (out / f"{world}-{rank}.json").write_text(json.dumps(results))
        if error:
            os._exit(1)
    layout.ranks.exchange("")
    leave()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    out, *words = sys.argv[1:]
    table = SLOW if words[0] == "slow" else CHECKS
    for size in [int(word) for word in words if word != "slow"]:
        arguments = (Path(out), table[size], size)
        port = free_port()
        ranks = [fork.Process(target=run, args=(*arguments, i, port)) for i in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            # Nobody answers the others once one has failed.
            if process.exitcode:
                print(f"{size} ranks: one ended with {process.exitcode}")
