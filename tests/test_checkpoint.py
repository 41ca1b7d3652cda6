"""Hugging Face folders in and out: bit for bit, whole or not at all, every mistake named."""

from __future__ import annotations

import json
import re
import resource
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rank_threads import all_ranks, on_ranks
from s1fast import checkpoint
from s1fast.checkpoint import (
    CARRIED,
    Reader,
    layout,
    load_model,
    read_config,
    save_model,
    save_weights,
)
from s1fast.errors import InputError
from s1fast.model import Model
from s1fast.ranks import Ranks
from s1fast.slices import Slice
from s1fast.tensor_files import write_tensors

CPU = torch.device("cpu")
MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def source(make_model: MakeModel) -> Path:
    return make_model("qwen2")


def bits(x: Tensor) -> Tensor:
    """The tensor as integers: equal where every bit is, -0 and NaN included."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_bit_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and torch.equal(bits(found[name]), bits(x)), name


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever files they lie in."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def their_logits(folder: Path) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def copy_with(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder whose tensors were changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_bytes((source / name).read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


EXPORTS = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 10, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000, 1])
@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_loads_what_save_model_wrote(
    name: str, shard_bytes: int, make_model: MakeModel, tmp_path: Path
) -> None:
    """Equal logits in fp32, equal weights; one file, several, one for each tensor."""
    model_type, fields = EXPORTS[name]
    source = make_model(model_type, **fields)
    target = tmp_path / "out"
    save_model(load_model(source, CPU, torch.float32), source, target, torch.float32, shard_bytes)
    assert torch.equal(their_logits(target), their_logits(source))
    assert_bit_equal(stored(target), stored(source))
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"


def test_smollm2_survives_a_round_trip(smollm2: Path, tmp_path: Path) -> None:
    """Real weights through our stacked parameters and back, sharded."""
    model = load_model(smollm2, CPU, torch.float32)
    save_model(model, smollm2, tmp_path / "out", torch.float32, 200 << 20)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert_bit_equal(stored(tmp_path / "out"), stored(smollm2))


def test_bf16_weights_are_rounded_once(source: Path, tmp_path: Path) -> None:
    save_model(
        load_model(source, CPU, torch.float32), source, tmp_path / "out", torch.bfloat16, 50_000
    )
    wanted = {name: x.bfloat16() for name, x in stored(source).items()}
    assert_bit_equal(stored(tmp_path / "out"), wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_round_trip_is_bit_identical(source: Path, tmp_path: Path) -> None:
    """Folder -> model -> folder -> model, special values included."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        flat = tensors["model.layers.1.mlp.down_proj.weight"].view(-1)
        flat[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])

    odd = copy_with(source, tmp_path / "odd", spoil)
    model = load_model(odd, CPU, torch.float32)
    save_model(model, odd, tmp_path / "out", torch.float32)
    again = load_model(tmp_path / "out", CPU, torch.float32)
    assert read_config(tmp_path / "out") == read_config(odd)
    assert_bit_equal(again.state_dict(), model.state_dict())


def test_layout_covers_every_parameter_once(make_model: MakeModel) -> None:
    for model_type, fields in EXPORTS.values():
        folder = make_model(model_type, **fields)
        model, table = load_model(folder, CPU, torch.float32), layout(read_config(folder))
        parameters = dict(model.named_parameters())
        assert table.keys() == parameters.keys()
        for name, parts in table.items():
            edges = [0, *(part.stop for part in parts)]
            assert [part.start for part in parts] == edges[:-1]
            assert edges[-1] == len(parameters[name])


def test_shards_and_index(source: Path, tmp_path: Path) -> None:
    """Files no larger than asked unless a single tensor is; the index names each tensor's file."""
    target, limit = tmp_path / "out", 60_000
    save_model(load_model(source, CPU, torch.float32), source, target, torch.float32, limit)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    total = 0
    for path in files:
        tensors = load_file(path)
        sizes = [x.numel() * x.itemsize for x in tensors.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(
            tensors
        )
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == stored(source).keys()


@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("shard_bytes", [60_000, 1 << 30])
def test_many_ranks_write_the_same_folder(
    world: int, shard_bytes: int, source: Path, tmp_path: Path
) -> None:
    """File by file, also where there are fewer files than ranks."""
    model = load_model(source, CPU, torch.float32)
    save_model(model, source, tmp_path / "one", torch.bfloat16, shard_bytes)
    all_ranks(world, lambda ranks: save_on(ranks, model, tmp_path / "many", shard_bytes))
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


def save_on(ranks: Ranks, model: Model, target: Path, shard_bytes: int) -> None:
    def read(name: str, part: Slice) -> None:
        whole = model.get_parameter(name).detach()
        part.fill(0, len(whole), lambda start, stop: whole[start:stop])

    source = target.parent / "one"
    dtype = torch.bfloat16
    save_weights(model.config, read, source, target, dtype, ranks, shard_bytes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_rank_that_cannot_write_ends_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(source, CPU, torch.float32)
    save_model(model, source, tmp_path / "one", torch.float32)

    def failing(path: Path, *arguments: Any) -> None:
        if "00002-of" in path.name:
            raise OSError(28, "No space left on device")
        write_tensors(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", failing)
    target = tmp_path / "many"
    for error in on_ranks(3, lambda ranks: save_on(ranks, model, target, 60_000)):
        assert isinstance(error, InputError)
        assert str(error) == f"rank 1: {target}: cannot be written: No space left on device"
    (tmp_path / "many").mkdir()
    for error in on_ranks(3, lambda ranks: save_on(ranks, model, target, 60_000)):
        assert isinstance(error, InputError) and f"{target}: exists already" in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


def test_an_export_holds_a_piece_at_a_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of files and tensors; rows wider than a piece come one by one."""
    model = load_model(source, CPU, torch.float32)
    save_model(model, source, tmp_path / "whole", torch.float32)
    real, alive, most = write_tensors, 0, 0

    def counted(path: Path, tensors: Any, pieces: Iterable[Tensor], *rest: Any) -> str:
        def gone(size: int) -> None:
            nonlocal alive
            alive -= size

        def watched() -> Iterator[Tensor]:
            nonlocal alive, most
            for piece in pieces:
                alive, most = alive + piece.nbytes, max(most, alive + piece.nbytes)
                weakref.finalize(piece, gone, piece.nbytes)
                yield piece

        return real(path, tensors, watched(), *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", counted)
    for size in (1000, 1):
        monkeypatch.setattr(checkpoint, "PIECE_BYTES", size)
        most = 0
        save_model(model, source, tmp_path / f"in {size}", torch.float32)
        assert files(tmp_path / f"in {size}") == files(tmp_path / "whole")
        widest = 4 * 96  # a row of down_proj
        assert 0 < most <= 3 * max(size, widest)


def test_files_that_travel_with_the_weights(source: Path, tmp_path: Path) -> None:
    rich = copy_with(source, tmp_path / "rich", lambda tensors: None)
    for name in CARRIED:
        (rich / name).write_bytes(f"content of {name}".encode())
    (rich / "optimizer.pt").write_bytes(b"not to be carried")
    (rich / "pytorch_model.bin").write_bytes(b"not to be carried")
    model = load_model(rich, CPU, torch.float32)
    save_model(model, rich, tmp_path / "out", torch.float32)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", *CARRIED}
    for name in CARRIED:
        assert (tmp_path / "out" / name).read_bytes() == (rich / name).read_bytes()
    changed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert changed == json.loads((rich / "config.json").read_text()) | {"dtype": "float32"}


def test_existing_target_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    model = load_model(source, CPU, torch.float32)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("folder", "empty", "file"):
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: exists already")):
            save_model(model, source, tmp_path / name, torch.float32)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "folder" / "notes").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after the first shard."""
    written = []

    def failing(path: Path, *arguments: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        write_tensors(path, *arguments)
        written.append(path)

    monkeypatch.setattr(checkpoint, "write_tensors", failing)
    model = load_model(source, CPU, torch.float32)
    target = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match=rf"{re.escape(str(target))}: .*No space left"):
        save_model(model, source, target, torch.float32, 60_000)
    assert written and not any(target.parent.iterdir())


def test_a_real_full_disk_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """The system refuses to let a file grow."""
    model = load_model(source, CPU, torch.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'out'}: cannot be written")):
            save_model(model, source, tmp_path / "out", torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
def test_an_interruption_while_writing_leaves_nothing(
    error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "write_tensors", failing)
    with pytest.raises(type(error)):
        save_model(load_model(source, CPU, torch.float32), source, tmp_path / "out", torch.float32)
    assert not any(tmp_path.iterdir())


# -- what cannot be loaded -----------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensors_are_named(source: Path, tmp_path: Path) -> None:
    folder = copy_with(source, tmp_path / "bad", lambda tensors: tensors.pop(Q))
    with pytest.raises(InputError, match=rf"{folder}: 1 tensors are missing .*: {re.escape(Q)}$"):
        load_model(folder, CPU, torch.float32)


def test_tensors_that_do_not_belong_are_named(source: Path, tmp_path: Path) -> None:
    extra = "model.layers.2.self_attn.q_proj.weight"
    folder = copy_with(source, tmp_path / "bad", lambda tensors: tensors.update({extra: zeros(2)}))
    with pytest.raises(InputError, match=rf"{folder}: 1 tensors are not part .*: {extra}$"):
        load_model(folder, CPU, torch.float32)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize("shape", [(64, 63), (63, 64), (64,), (64, 64, 1)], ids=str)
def test_misshaped_tensors_are_named(shape: tuple[int, ...], source: Path, tmp_path: Path) -> None:
    folder = copy_with(source, tmp_path / "bad", lambda tensors: tensors.update({Q: zeros(*shape)}))
    message = f"{folder / 'model.safetensors'}: {Q} has shape {list(shape)}, "
    with pytest.raises(InputError, match=re.escape(message) + r".*\[64, 64\]"):
        load_model(folder, CPU, torch.float32)


def test_what_can_be_derived_is_accepted(make_model: MakeModel, tmp_path: Path) -> None:
    """A tied model that also stores its head, and rotary frequencies, as older exports do."""
    tied = make_model("llama", tie_word_embeddings=True)

    def add(tensors: dict[str, Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = zeros(8)

    folder = copy_with(tied, tmp_path / "old", add)
    found, wanted = (load_model(f, CPU, torch.float32).state_dict() for f in (folder, tied))
    assert_bit_equal(found, wanted)


def test_an_untied_model_needs_its_head(source: Path, tmp_path: Path) -> None:
    folder = copy_with(source, tmp_path / "bad", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"missing .*: lm_head\.weight$"):
        load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    folder = copy_with(
        source, tmp_path / "bad", lambda tensors: tensors.update({Q: tensors[Q].to(dtype)})
    )
    message = f"{folder / 'model.safetensors'}: {Q} is stored as "
    with pytest.raises(InputError, match=re.escape(message)):
        load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floating_dtypes_are_cast(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    folder = copy_with(
        source, tmp_path / "cast", lambda tensors: tensors.update({Q: tensors[Q].to(dtype)})
    )
    model = load_model(folder, CPU, torch.float32)
    found = model.get_parameter("layers.1.qkv_weight")[:64]
    assert torch.equal(found, stored(source)[Q].to(dtype).float())


@pytest.fixture
def sharded(source: Path, tmp_path: Path) -> Path:
    target = tmp_path / "sharded"
    save_model(load_model(source, CPU, torch.float32), source, target, torch.float32, 60_000)
    return target


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "model.bin", "", 7],
)
def test_index_outside_the_folder_is_refused(file: Any, sharded: Path) -> None:
    """Even where the named file exists and holds the tensor."""
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    tensors = stored(sharded)
    (sharded / "sub").mkdir()
    for name in ("../model.safetensors", "sub/model.safetensors"):
        save_file({Q: tensors[Q]}, sharded / name)
    (sharded / "model.bin").write_bytes(b"")
    values["weight_map"][Q] = file
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=re.escape(f"{index}: {Q} lies in {file!r}")):
        load_model(sharded, CPU, torch.float32)


def test_index_mistakes_are_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    files = sorted(set(good["weight_map"].values()))
    other = next(file for file in files if file != good["weight_map"][Q])
    for values, message in (
        ({"weight_map": []}, f"{index}: weight_map must be an object"),
        ({"weight_map": {}}, f"{index}: weight_map must be an object"),
        ({}, f"{index}: weight_map must be an object"),
        ({"weight_map": good["weight_map"] | {Q: other}}, f"{sharded / other}: no tensor {Q}"),
        (
            {"weight_map": good["weight_map"] | {Q: "model-9.safetensors"}},
            f"{sharded / 'model-9.safetensors'}: missing",
        ),
    ):
        index.write_text(json.dumps(values))
        with pytest.raises(InputError, match=re.escape(message)):
            load_model(sharded, CPU, torch.float32)


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "pickle"])
def test_damaged_weight_files_are_named(damage: str, source: Path, tmp_path: Path) -> None:
    folder = copy_with(source, tmp_path / "bad", lambda tensors: None)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    broken = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "header": b"\xff" * 8 + data[8:],
        "pickle": b"\x80\x04K\x01.",
    }
    path.write_bytes(broken[damage])
    with pytest.raises(InputError, match=re.escape(f"{path}: not a usable safetensors file")):
        load_model(folder, CPU, torch.float32)


def test_folders_without_a_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: no config.json")):
        load_model(tmp_path, CPU, torch.float32)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: neither model.safetensors nor")):
        load_model(tmp_path, CPU, torch.float32)


def test_reader_reads_rows_alone(sharded: Path) -> None:
    """Rows of a tensor in its stored dtype, which is how a rank will read its share."""
    reader, whole = Reader(sharded), stored(sharded)[Q]
    assert reader.shape(Q) == (64, 64)
    assert torch.equal(reader.rows(Q), whole)
    assert torch.equal(reader.rows(Q, 7, 9), whole[7:9])
    assert torch.equal(reader.rows(Q, 60), whole[60:])
