"""Two ranks over gloo decode what one does; and what does not divide is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_checks import run_ranks
from s1fast.budget import Budget
from s1fast.checkpoint import read_config
from s1fast.decoder import Completion, Engine, SamplingParams
from s1fast.errors import InputError
from s1fast.tensor_parallel import Ranks, shard_config
from writers import Ascii, check_equal

MakeModel = Callable[..., Path]

RANK = """
import json, sys, dataclasses, torch, torch.distributed as dist
from s1fast import Budget, Engine, Ranks, SamplingParams
from s1fast.request import Request
from s1fast.errors import InputError
folder, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
engine = Engine(folder, ranks=Ranks(), speculate=2, cache_tokens=1200, loop=sys.argv[4])
sizes = {name: list(p.shape) for name, p in engine.model.named_parameters()}
if dist.get_rank():
    try:
        engine.generate(prompts)
    except InputError as error:
        assert "rank 0" in str(error)
    engine.follow()
    assert engine.pages.held == 0 and engine.stats.steps > 50
    dist.destroy_process_group()
    sys.exit()
found = []
for params in (SamplingParams(max_tokens=45), SamplingParams(max_tokens=45, temperature=0.6, n=2)):
    found += engine.generate(prompts, params, Budget(max_thinking_tokens=30, num_ignore=2))
found += engine.generate(
    prompts, SamplingParams(max_tokens=45), Budget(), budgets=[7, 30], num_ignores=[0, 2, None]
)
handle = engine.submit(Request(prompt=prompts[0], params=SamplingParams(max_tokens=900)))
next(iter(handle))
handle.cancel()
engine.close()
engine.close()
assert engine.pages.held == 0
try:
    engine.generate(prompts)
except InputError as error:
    assert "closed" in str(error)
else:
    raise AssertionError("a closed engine was asked")
with open(out, "w") as file:
    json.dump({"sizes": sizes, "found": [dataclasses.asdict(c) for c in found]}, file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("loop", "tied", "vocab_size"),
    [("host", False, 512), ("device", False, 512), ("device", True, 512), ("host", False, 511)],
    ids=["host", "device", "tied", "odd"],
)
def test_two_ranks_equal_one(
    make_model: MakeModel, tmp_path: Path, loop: str, tied: bool, vocab_size: int
) -> None:
    """Greedy, sampled, a tree, drafts, a cancellation; each rank holds half of every layer, and of
    the head where that divides, and is ahead of its own device."""
    folder = make_model("qwen2", seed=3, tie_word_embeddings=tied, vocab_size=vocab_size)
    writer = Ascii(folder, end=1.8)
    prompts, out = writer.prompts(3, 30, 11), tmp_path / "found.json"
    run_ranks(RANK, [str(writer.folder), json.dumps(prompts), str(out), loop])
    written = json.loads(out.read_text())
    config = read_config(writer.folder)
    sizes, half = written["sizes"], config.intermediate_size // 2
    assert sizes["layers.0.gate_up_weight"] == [2 * half, config.hidden_size]
    assert sizes["layers.0.down_weight"] == [config.hidden_size, half]
    width = config.num_attention_heads // 2 * config.head_dim
    assert sizes["layers.0.o_weight"] == [config.hidden_size, width]
    rows = vocab_size if vocab_size % 2 else vocab_size // 2
    assert sizes["head.weight"] == [rows, config.hidden_size]
    assert sizes["embed.weight"] == [vocab_size, config.hidden_size]
    budget, wanted = Budget(max_thinking_tokens=30, num_ignore=2), []
    given = [SamplingParams(max_tokens=45), SamplingParams(max_tokens=45, temperature=0.6, n=2)]
    for params in given:
        wanted += [(params, c) for c in writer.engine.generate(prompts, params, budget)]
    axes: dict[str, Any] = {"budgets": [7, 30], "num_ignores": [0, 2, None]}
    tree = writer.engine.generate(prompts, given[0], Budget(), **axes)
    wanted += [(given[0], c) for c in tree]
    assert len(written["found"]) == len(wanted)
    equal = 0
    for (params, one), values in zip(wanted, written["found"], strict=True):
        pieces = [dataclasses.replace(p) for p in one.pieces]
        same = values["token_ids"] == one.token_ids
        two = Completion(**values | {"pieces": pieces, "budget": one.budget})
        if not same:
            assert not check_equal(writer, one, two, params)
            continue
        equal += 1
        assert dataclasses.replace(two, logprobs=None) == one
    assert equal >= 0.9 * len(wanted)


def test_heads_that_do_not_divide_are_refused(make_model: MakeModel) -> None:
    config = read_config(make_model("qwen2"))
    local = shard_config(config, 2, "here")
    assert (local.num_attention_heads, local.num_key_value_heads) == (2, 1)
    assert (local.head_dim, local.hidden_size) == (config.head_dim, config.hidden_size)
    for count, field in ((3, "num_attention_heads 4"), (4, "num_key_value_heads 2")):
        with pytest.raises(InputError, match=f"here: {field} does not divide by {count} ranks"):
            shard_config(config, count, "here")


def test_ranks_need_a_process_group(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match=r"torch\.distributed is not set up"):
        Ranks()
    engine = Engine(make_model("qwen2"))
    with pytest.raises(InputError, match="follow is for the ranks above 0"):
        engine.follow()
    engine.close()
