"""A rank's rows: FSDP2's cut found out right, and nothing else read from a model's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from s1fast.checkpoint import Reader, load_model, load_weights, read_config
from s1fast.errors import InputError
from s1fast.model import Model
from s1fast.slices import Slice, slice_of

CPU = torch.device("cpu")
MakeModel = Callable[..., Path]


@contextmanager
def mesh_of(rank: int, world: int) -> Iterator[Any]:
    """The mesh as one of many ranks sees it; there are no others, so nothing may be exchanged."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def sharded(folder: Path, mesh: Any) -> Model:
    with torch.device("meta"):
        model = Model(read_config(folder))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.materialise(CPU, torch.float32)


def test_a_plain_tensor_is_all_ours() -> None:
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    rows = slice_of(x)
    assert (rows.start, rows.stop, rows.shape) == (0, 3, (3, 2))
    assert rows.tensor.data_ptr() == x.data_ptr() and not rows.tensor.requires_grad


@pytest.mark.parametrize("world", [1, 2, 3, 5, 16])
def test_fsdp_cuts_as_we_think(world: int, make_model: MakeModel) -> None:
    """Every row of every parameter belongs to one rank; its memory is FSDP's own."""
    folder = make_model("qwen2", intermediate_size=50, vocab_size=403)
    edges: dict[str, int] = {}
    for rank in range(world):
        with mesh_of(rank, world) as mesh:
            model = sharded(folder, mesh)
            for name, parameter in model.named_parameters():
                rows = slice_of(parameter)
                assert rows.shape == tuple(parameter.shape)
                assert rows.start == edges.get(name, 0), name
                edges[name] = rows.stop
                rows.tensor.fill_(rank + 1)
                assert isinstance(parameter, DTensor)
                assert (parameter._local_tensor == rank + 1).all()
    for name, parameter in load_model(folder, CPU, torch.float32).named_parameters():
        assert edges[name] == len(parameter), name


def test_other_cuts_are_refused() -> None:
    with mesh_of(1, 2) as mesh:
        for placement in (Shard(1), Replicate()):
            x = DTensor.from_local(torch.ones(2, 2), mesh, [placement], run_check=False)
            with pytest.raises(ValueError, match="expected one mesh dimension and Shard"):
                slice_of(x)
        odd = DTensor.from_local(
            torch.ones(1, 2), mesh, [Shard(0)], run_check=False, shape=(4, 2), stride=(2, 1)
        )
        with pytest.raises(ValueError, match=r"holds 1 rows of \(4, 2\), expected 2"):
            slice_of(odd)


def test_fill_takes_what_is_ours() -> None:
    """Every place that a source may have beside, around or within ours; cast to our dtype."""
    whole = torch.arange(10).double() / 4
    for start in range(10):
        for stop in range(start, 11):
            for first in range(10):
                for last in range(first + 1, 11):
                    rows = Slice(torch.full((stop - start,), -1.0), start, (10,))
                    asked: list[tuple[int, int]] = []

                    def read(a: int, b: int, first: int = first, asked: Any = asked) -> Any:
                        asked.append((a, b))
                        return whole[first + a : first + b]

                    rows.fill(first, last, read)
                    wanted = torch.full((10,), -1.0)
                    wanted[first:last] = whole[first:last].float()
                    assert rows.tensor.equal(wanted[start:stop])
                    meet = sorted(set(range(start, stop)) & set(range(first, last)))
                    assert asked == ([(meet[0] - first, meet[-1] + 1 - first)] if meet else [])


@pytest.mark.parametrize("world", [1, 2, 3, 8, 70])
def test_each_rank_reads_its_own_rows(
    world: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they read every byte once, through stacked q, k, v and gate, up."""
    folder = make_model("qwen2", tie_word_embeddings=True)
    whole = load_model(folder, CPU, torch.float32)
    read: list[int] = []
    rows = Reader.rows

    def spy(self: Reader, *arguments: Any) -> Any:
        found = rows(self, *arguments)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(Reader, "rows", spy)
    # With 70 ranks the last ones have no row of a 64 row matrix.
    chosen = range(world) if world < 70 else (0, 1, 63, 64, 69)
    for rank in chosen:
        with mesh_of(rank, world) as mesh:
            model = sharded(folder, mesh)
            for parameter in model.parameters():
                slice_of(parameter).tensor.fill_(float("nan"))
            before = sum(read)
            load_weights(model, folder)
            ours = 0
            for name, parameter in model.named_parameters():
                part = slice_of(parameter)
                wanted = whole.get_parameter(name)[part.start : part.stop]
                assert part.tensor.equal(wanted), (rank, name)
                ours += part.tensor.nbytes
            assert sum(read) - before == ours
    if world < 70:
        assert sum(read) == sum(p.nbytes for p in whole.parameters())


def test_what_is_wrong_is_found_on_every_rank(make_model: MakeModel) -> None:
    """Also on those that read none of the tensor, which else would wait for the others."""
    from safetensors.torch import load_file, save_file

    folder = make_model("qwen2")
    path, name = folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    for spoilt in (tensors[name].to(torch.int8), tensors[name][:-1].clone()):
        save_file(tensors | {name: spoilt}, path)
        for rank in (0, 1, 69):
            with mesh_of(rank, 70) as mesh, pytest.raises(InputError, match=f"{path}: {name} "):
                load_weights(sharded(folder, mesh), folder)
