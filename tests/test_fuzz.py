"""Damaged files of every kind: read as they are, or refused by name. Never another exception."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from s1fast.chat import Chat, TextStream
from s1fast.checkpoint import Reader, layout, load_weights, read_config
from s1fast.config import TrainConfig, check, field_names, load_recipe, to_toml
from s1fast.errors import InputError
from s1fast.model import Model, ModelConfig
from s1fast.rows import read_rows

TEXT = "Hello <|im_start|>think\n 12 + 30 = 42, naïve 🍓\n\t<|im_end|>"
CONFIGS: list[dict[str, Any]] = [
    {
        "model_type": "qwen2",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "layer_types": ["full_attention"],
        "eos_token_id": 2,
    },
    {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "quantization_config": None,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "eos_token_id": [1, 2],
    },
]

# Parts that other tokenizers have, and some that they must not have.
TOKENIZER_PARTS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x" * 100},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    ],
    "pre_tokenizer": [
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": "(?=x)"}, "behavior": "Isolated", "invert": True},
        {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Removed", "invert": False},
        {"type": "FixedLength", "length": 0},
    ],
    "decoder": [
        {"type": "Strip", "content": " ", "start": 2**62, "stop": 2**62},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "ByteFallback"},
    ],
    "model": [
        {"type": "WordPiece", "unk_token": "?", "prefix": "##", "vocab": {"a": 0}}
        | {"max_input_chars_per_word": 2},
        {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"},
        {"type": "WordLevel", "vocab": {}, "unk_token": "none"},
        {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]], "byte_fallback": True},
        {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False},
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["H", 1e308]]},
        {"type": "BPE", "vocab": {"H": 0, "e": 1, "He": 9}, "merges": ["H e"]},
        {"type": "BPE", "vocab": {"H": 0}, "merges": [], "unk_token": "none", "fuse_unk": True},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
        | {"continuing_subword_prefix": "a long one"},
    ],
    "padding": [
        {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
        | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
        {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 0}
        | {"pad_id": 2**32 - 1, "pad_type_id": 0, "pad_token": ""},
    ],
    "truncation": [
        {"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Left"},
        {"max_length": 3, "strategy": "OnlySecond", "stride": 0, "direction": "Right"},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}]}
        | {"pair": [], "special_tokens": {}},
        {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": True, "use_regex": True},
    ],
    "added_tokens": [
        [
            {"id": 2**32 - 1, "content": "", "single_word": True, "lstrip": True, "rstrip": True}
            | {"normalized": True, "special": False}
        ],
        [
            {"id": 0, "content": " ", "single_word": True, "lstrip": True, "rstrip": True}
            | {"normalized": True, "special": False}
        ],
        [],
    ],
}


# Stands for so many lists inside each other, which cannot be drawn: copying one would overflow.
NESTED = {f"<nested {depth}>": depth for depth in (10, 150, 600, 5000, 100_000)}
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 7, 2**24, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1e308, 1e-320, -0.0, 2.5])
    | st.text(max_size=8)
    | st.sampled_from(["", "\ud800", "\0", "x" * 2000, "a\nb", "default", "silu", "🍓"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
) | st.sampled_from(list(NESTED))


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


@st.composite
def changed_json(draw: st.DrawFn, seeds: list[Any], new: st.SearchStrategy[Any] = values) -> bytes:
    """One of the seeds with a few values anywhere in it replaced, removed or put elsewhere."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = sorted(paths(value), key=len)
        if not places:
            break
        # Short paths first: whole parts of the file are hit as often as single entries.
        end = draw(st.sampled_from([len(places), min(24, len(places))]))
        path = places[draw(st.integers(0, end - 1))]
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "swap"]))
        if action == "remove":
            del parent[path[-1]]
        elif action == "swap":
            other = places[draw(st.integers(0, end - 1))]
            source = value
            for key in other:
                source = source[key]
            parent[path[-1]] = copy.deepcopy(source)
        else:
            parent[path[-1]] = copy.deepcopy(draw(new))  # not to change what is drawn from
    text = json.dumps(value)
    for name, depth in NESTED.items():
        text = text.replace(json.dumps(name), "[" * depth + "]" * depth)
    return text.encode()


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Random bytes, or a seed cut off or with bytes changed in a few places."""
    seed = draw(st.sampled_from(seeds))
    kind = draw(st.sampled_from(["random", "cut", "edit", "edit", "edit"]))
    if kind == "random":
        return draw(st.binary(max_size=100))
    if kind == "cut":
        return seed[: draw(st.integers(0, len(seed)))]
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


# Mistakes that are a folder's: the index and the weights disagree, or a text shows what is wrong.
OF_THE_FOLDER = (
    "tensors are",
    "no tensor",
    "missing, but",
    "config.json implies",
    "the chat template failed",
    "the tokenizer failed on",
)


@dataclass(frozen=True)
class Target:
    """A kind of file: what may lie in it, and what reads it."""

    contents: st.SearchStrategy[tuple[str, bytes]]
    """File name and contents."""
    use: Callable[[Path], object]
    """Reads the file as the commands do."""


# -- targets ------------------------------------------------------------------------------------


def weights_target(folder: Path) -> Target:
    config = ModelConfig.from_json(CONFIGS[0], "")
    model = Model(config).init_random(0)
    parameters = dict(model.named_parameters())
    tensors = {
        part.name: parameters[ours].detach()[part.start : part.stop].clone()
        for ours, parts in layout(config).items()
        for part in parts
    }
    data = save(tensors)
    header_size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + header_size]), data[8 + header_size :]
    dtypes = st.sampled_from(["F64", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "U16", "C64"])
    sizes = st.lists(st.sampled_from([0, 1, 8, 2**31, 2**61, 2**64 - 1]), max_size=3)

    def packed(changed: bytes) -> bytes:
        return struct.pack("<Q", len(changed)) + changed + body

    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    files = st.sampled_from(["../x.safetensors", "/etc/passwd", "model.bin", "a.safetensors"])
    header_sizes = st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n) + data[8:])

    def use(path: Path) -> None:
        if path.name != "model.safetensors":
            (path.parent / "model.safetensors").write_bytes(data)
        reader = Reader(path.parent)
        for name in list(reader.file_of)[:50]:
            reader.shape(name)
        load_weights(model, path.parent)

    single = changed_json([header], values | dtypes | sizes).map(packed)
    values_only = st.binary(min_size=8, max_size=8).map(lambda tail: data[:-8] + tail)
    contents = single | values_only | header_sizes | damaged([data, data[: header_size + 8]])
    indices = changed_json([index], values | files) | damaged([json.dumps(index).encode()])
    return Target(
        st.tuples(st.just("model.safetensors"), contents)
        | st.tuples(st.just("model.safetensors.index.json"), indices),
        use,
    )


def config_target(folder: Path) -> Target:
    def use(path: Path) -> None:
        config = read_config(path.parent)
        if config.num_hidden_layers <= 8:
            with torch.device("meta"):  # shapes that do not overflow
                Model(config)

    raw = [json.dumps(config).encode() for config in CONFIGS]
    rope = [{"rope_parameters": CONFIGS[1]["rope_parameters"]}]
    roped = changed_json(rope).map(lambda found: raw[1][:-1] + b", " + found[1:])
    contents = changed_json(CONFIGS) | changed_json(CONFIGS, scalars) | roped | damaged(raw)
    return Target(st.tuples(st.just("config.json"), contents), use)


def tokenizer_target(folder: Path) -> Target:
    seed = (folder / "tokenizer.json").read_bytes()
    whole = json.loads(seed)
    kinds = st.sampled_from(
        [(name, part) for name, parts in TOKENIZER_PARTS.items() for part in parts]
    )
    other = st.lists(kinds, min_size=1, max_size=2).map(lambda found: whole | dict(found))

    def use(path: Path) -> None:
        chat = Chat.load(path.parent)
        ids = chat.encode(TEXT)
        assert all(0 <= i < chat.vocab_size for i in ids)
        assert len(ids) < 10_000
        chat.encode("")
        chat.decode(ids)
        TextStream(chat).push(ids)
        if chat.vocab_size < 10_000:
            assert len(chat.ends_in_newline) <= chat.vocab_size

    changed = other.flatmap(lambda value: changed_json([value]))
    dumped = other.map(lambda value: json.dumps(value).encode())
    contents = changed_json([whole]) | changed | dumped | damaged([seed])
    return Target(st.tuples(st.just("tokenizer.json"), contents), use)


def recipe_target(folder: Path) -> Target:
    seed = to_toml(TrainConfig(model="m", output=Path("o"))).encode()
    names = st.sampled_from(field_names(TrainConfig))
    keys = names | st.sampled_from(["lr", "optim", "data", "log", "data.x", "a.b", "optim.betas"])
    literals = (
        st.integers().map(str)
        | st.floats().map(repr)
        | st.sampled_from(["true", "inf", "-nan", "0x10", "1_000", "9" * 5000, "1979-05-27"])
        | st.sampled_from(['""', "'x'", '"a\\nb"', '"\\u0000"', "[]", "[0.9, 0.95]", "{}", "{a=1}"])
        | st.sampled_from([10, 400, 100_000]).map(lambda n: "[" * n + "]" * n)
        | st.text(max_size=6)
    )
    valid, table = [], ""
    for line in seed.decode().splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        elif line:
            valid.append(table + line)
    other = st.tuples(keys, literals).map(" = ".join) | keys.map("[{}]".format)
    lines = st.lists(st.sampled_from(valid) | st.sampled_from(valid) | other, max_size=3)

    def use(path: Path) -> None:
        config = load_recipe(path)
        try:
            check(config)
        except InputError:  # names the field; the command names the file
            return
        path.write_text(to_toml(config))
        assert load_recipe(path) == config

    texts = lines.map(lambda found: "\n".join(found).encode("utf-8", "surrogatepass"))
    contents = texts | damaged([seed])
    return Target(st.tuples(st.just("recipe.toml"), contents), use)


def rows_target(folder: Path) -> Target:
    chat = Chat.load(folder)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "s"}, *turns, *turns]},
        {"text": chat.render(turns)},
        {"question": "q", "thinking": "t", "answer": "a"},
        {"question": "q", "thinking_trajectories": ["t", "u"], "attempt": "a"},
        {"question": "q", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "a"},
    ]
    seed = "\n".join(json.dumps(row) for row in rows).encode()

    def use(path: Path) -> None:
        for where, row in read_rows(path, "train"):
            example = chat.example(row, where)
            assert len(example.ids) == len(example.labelled) and any(example.labelled)

    tables = []
    for row in rows:
        file = io.BytesIO()
        columns = {name: [value, value] for name, value in row.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        tables.append(file.getvalue())
    lines = changed_json(rows) | changed_json(rows, scalars) | damaged([seed])
    return Target(
        st.tuples(st.just("rows.jsonl"), lines)
        | st.tuples(st.just("rows.parquet"), damaged(tables)),
        use,
    )


def settings_target(folder: Path) -> Target:
    """generation_config.json, tokenizer_config.json and the template itself."""
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    named = [{"name": "default", "template": template}, {"name": "tools", "template": "x"}]
    tokenizer = [
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template},
        {"chat_template": named},
    ]
    generation = [{"eos_token_id": [1, 2], "bos_token_id": 0}, {"eos_token_id": 2}]

    def use(path: Path) -> None:
        chat = Chat.load(path.parent)
        chat.prompt_ids("Hi", think=True)

    def contents(seeds: list[Any]) -> st.SearchStrategy[bytes]:
        raw = [json.dumps(seed).encode() for seed in seeds]
        return changed_json(seeds) | changed_json(seeds, scalars) | damaged(raw)

    return Target(
        st.tuples(st.just("generation_config.json"), contents(generation))
        | st.tuples(st.just("tokenizer_config.json"), contents(tokenizer))
        | st.tuples(st.just("chat_template.jinja"), damaged([template.encode()])),
        use,
    )


TARGETS: dict[str, Callable[[Path], Target]] = {
    "weights": weights_target,
    "config": config_target,
    "tokenizer": tokenizer_target,
    "recipe": recipe_target,
    "rows": rows_target,
    "settings": settings_target,
}


@pytest.fixture
def folder(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(tiny_tokenizer, model / "tokenizer.json")
    return model


@pytest.fixture
def little_memory() -> Iterator[None]:
    """2 GiB above what is in use: sizes that a file only claims show as a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(target: Target, folder: Path, file: str, data: bytes) -> str:
    """Lets the target read the file: "read" or "refused", and anything else is raised."""
    path = folder / file
    path.write_bytes(data)
    try:
        target.use(path)
    except InputError as error:
        wanted = folder if any(part in str(error) for part in OF_THE_FOLDER) else path
        assert str(wanted) in str(error), "the message does not name the file"
        return "refused"
    return "read"


def fuzz(name: str, folder: Path, max_examples: int, *, same_each_time: bool) -> None:
    target = TARGETS[name](folder)
    outcomes: list[str] = []
    original = {path.name: path.read_bytes() for path in folder.iterdir()}

    @settings(
        max_examples=max_examples,
        deadline=20_000,  # ms: thousands of times what a case takes, so only a hang is above
        derandomize=same_each_time,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.contents)
    def run(case: tuple[str, bytes]) -> None:
        for path in folder.iterdir():
            path.unlink()
        for file, data in original.items():
            (folder / file).write_bytes(data)
        outcomes.append(outcome(target, folder, *case))

    run()
    # Files that are always refused at the door, or never, test little.
    assert 0.05 < outcomes.count("read") / len(outcomes) < 0.95


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_files(name: str, folder: Path, little_memory: None) -> None:
    """2,400 cases, the same in every run."""
    fuzz(name, folder, 400, same_each_time=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_files_at_length(name: str, folder: Path, little_memory: None) -> None:
    """10,000 cases, others in every run."""
    fuzz(name, folder, 10_000 // len(TARGETS) + 1, same_each_time=False)


class Trap:
    """Unpickling one makes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


FILES = {
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "config": ("config.json",),
    "tokenizer": ("tokenizer.json",),
    "recipe": ("recipe.toml",),
    "rows": ("rows.jsonl", "rows.parquet"),
    "settings": ("generation_config.json", "tokenizer_config.json"),
}
HOSTILE = [b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"1" * 5000, b"\0" * 64]
NAMED = [(name, file) for name, files in FILES.items() for file in files]


@pytest.mark.parametrize(("name", "file"), NAMED)
def test_hostile_files(name: str, file: str, folder: Path, little_memory: None) -> None:
    target = TARGETS[name](folder)
    for data in HOSTILE:
        assert outcome(target, folder, file, data) == "refused", data[:20]


@pytest.mark.parametrize(("name", "file"), NAMED)
def test_nothing_is_unpickled(name: str, file: str, folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    buffer = io.BytesIO()
    torch.save({"model.embed_tokens.weight": Trap(sprung)}, buffer)
    target = TARGETS[name](folder)
    for data in (pickle.dumps(Trap(sprung)), pickle.dumps(Trap(sprung), 0), buffer.getvalue()):
        assert outcome(target, folder, file, data) == "refused"
        assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap does not work, so it proves nothing"
