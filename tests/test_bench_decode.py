"""bench/decode.py runs, and what it sets up is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from s1fast.bench import advance, decode, decode_peers
from s1fast.bench.decode_setup import (
    Setup,
    config_of,
    made_up_chat,
    plain,
    random_ids,
    random_model,
    setup,
    step_bytes,
)
from s1fast.bench.op import parse_shape
from s1fast.model import Model
from s1fast.published import qwen
from s1fast.request import SamplingParams
from s1fast.tensor_parallel import shard_model

CPU = torch.device("cpu")


@pytest.fixture
def small() -> Iterator[Setup]:
    config = config_of("small")
    with torch.inference_mode():
        model, chat = random_model(config, CPU), made_up_chat(config.vocab_size)
        yield setup(model, chat, max_rows=8, positions=4096, choice="torch", reuse=True)


def test_every_case_but_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "read_gb_s", lambda: 20.0)
    words = "--only step intervention forced tree latency --batch 1 3 --context 128 256"
    results: dict[str, Any] = {}
    options = decode.parse([*words.split(), "--small", "--fraction", "0.005"])
    with torch.inference_mode():
        decode.run(options, results)
    found = {(row["case"], row.get("batch")): row for row in results["rows"]}
    assert results["not_fitting"] == [] and found["step", 3]["context"] == 256
    assert found["intervention", None]["interventions"] > 16
    forced = found["forced", None]
    assert forced["long_steps"] == forced["short_steps"] + 3  # 24 tokens in eight slots
    assert found["latency", None]["waits"] == 2 and found["latency", None]["client_rounds"] == 4
    assert len(found["tree", None]["budgets"]) == 6


def test_ranks_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them alone, as there are two key-value heads."""
    monkeypatch.setattr(decode, "read_gb_s", lambda: 20.0)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        words = "--small --only parallel --batch 3 --context 128"
        decode.run(decode.parse(words.split()), results)
    (rank,) = results["rows"]
    assert rank["ranks"] == 2 and rank["all_reduce_us"] == 7.0
    sums_ms = 2 * 2 * 7e-3  # two a layer
    assert rank["projected_step_ms"] == pytest.approx(rank["rank_ms"] + sums_ms)
    assert rank["projected_tokens_s"] == pytest.approx(3e3 / rank["projected_step_ms"])


def test_what_was_measured_is_kept_when_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(decode, "read_gb_s", lambda: 20.0)
    monkeypatch.setattr(decode, "save", lambda kind, values: kept.update(values))
    monkeypatch.setattr(decode, "forced", lambda s, context: 1 // 0)
    words = "decode --small --only step forced --batch 1 --context 128"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(ZeroDivisionError):
        decode.main()
    assert [row["case"] for row in kept["rows"]] == ["step"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model 5B", "--model: there is no Qwen2.5 of size '5B'"),
        ("--small --batch 1 65", "--batch: expected 1 to 64, got 1 65"),
        ("--small --context 5", "--context: expected 128 to"),
        ("--small --fraction 0", "--fraction: expected 0.001 to 1.0, got 0.0"),
        ("--small --all-reduce-us -3", "--all-reduce-us: expected 0.0 to"),
    ],
)
def test_bad_flags_are_named(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.parse(words.split())
    assert said in capsys.readouterr().err


def test_rows_stand_at_their_context(small: Setup) -> None:
    row = small.add(random_ids(100, 512, 0), [plain(5, 5)], SamplingParams())
    small.loop.step()
    assert small.loop.stats.steps == 1  # no chunk was computed
    (done,) = small.run()
    assert len(done.token_ids) == 5 and row.done
    assert small.pages.held == 0


def test_bytes_of_a_step() -> None:
    """Of Qwen2.5-32B: all weights but the embedding table in bf16, and 256 KiB a position; a rank
    of eight reads an eighth of both."""
    config = qwen("32B")
    with torch.device("meta"):
        whole = Model(config, compute_dtype=torch.bfloat16)
    weights = step_bytes(whole, 1, 0)
    assert weights == pytest.approx(63.97e9, rel=1e-3)
    assert step_bytes(whole, 2, 10) - weights == 20 * 256 * 1024
    part = shard_model(config, 8, "here", torch.bfloat16)
    assert step_bytes(part, 1, 0) == pytest.approx(weights / 8, rel=1e-3)
    assert step_bytes(part, 2, 10) - step_bytes(part, 1, 0) == 20 * 32 * 1024


@pytest.mark.parametrize("shape", advance.OP.cpu_shapes)
def test_steps_draw_what_the_reference_draws(shape: str) -> None:
    """From the same beginning every time, each row its own."""
    problem = advance.OP.make(parse_shape(shape, advance.OP.cpu_sizes), CPU)
    wanted, _ = advance.reference(problem)
    run = advance.ours(problem)
    for _ in range(2):
        assert torch.equal(run(), wanted)
    different = len(wanted.unique(dim=0))
    assert wanted.shape == (2, advance.STEPS) and different == 2
    assert (wanted[0] == wanted[0, 0]).all() == ("greedy" in shape)


def test_peers_take_our_weights(small: Setup) -> None:
    """The plain loop draws what ours would, from the same state; both peers take a step."""
    peer = decode_peers.PlainLoop(small.model, 1, 40)
    ids = random_ids(41, 512, 3)
    peer.token_B.fill_(ids[0])
    peer.position.zero_()
    for token in ids[1:]:
        peer.step()
        peer.token_B.fill_(token)
    peer.step()
    small.add(ids, [plain(1, 1)], SamplingParams(), cached=False)
    (done,) = small.run()
    assert peer.token_B.tolist() == done.token_ids
    for run in (decode_peers.plain_captured, decode_peers.transformers_static):
        assert run(small.model, 2, 30)["step_ms"] > 0
