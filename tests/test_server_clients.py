"""Clients as they are published: the openai package, lm-eval, and evaluate --endpoint."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no fastapi; unproven: s1fast serve")
pytest.importorskip("prometheus_client", reason="no prometheus_client; unproven: s1fast serve")
pytest.importorskip("openai", reason="no openai; unproven: clients of s1fast serve")

import openai

from s1fast.decoder import Engine
from s1fast.protocol import Defaults
from serving import PATIENCE_S, InProcess, in_process, wait_until
from writers import Ascii

MakeModel = Callable[..., Path]
ASK: list[Any] = [{"role": "user", "content": "1 + 1?"}]


@pytest.fixture(scope="module")
def restless(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=3, max_position_embeddings=4096), end=1.8)


@pytest.fixture(scope="module")
def served(restless: Ascii) -> Iterator[InProcess]:
    with in_process(restless.engine, keys=["sk-right"], queue=16) as server:
        yield server
        server.idle()


@pytest.fixture(scope="module")
def client(served: InProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.url, api_key="sk-right", max_retries=0) as client:
        yield client


def ask(client: Any, **fields: Any) -> Any:
    known = {"model": "tiny", "messages": ASK, "max_tokens": 80}
    return client.chat.completions.create(**{**known, **fields})


BUDGET = {"thinking_token_budget": 20, "num_ignore": 2, "ignore_text": "Wait"}


# -- the openai package ---------------------------------------------------------------------------


def test_openai_sync(client: Any, restless: Ascii) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    done = ask(client, extra_body=BUDGET)
    message, usage = done.choices[0].message, done.usage
    assert message.reasoning == message.reasoning_content and "Wait" in message.reasoning
    assert message.content and done.choices[0].finish_reason in ("stop", "length")
    assert usage.completion_tokens_details.reasoning_tokens <= 20
    assert usage.s1["waits_used"] == message.reasoning.count("Wait") > 0
    assert usage.s1["thinking_tokens"] == usage.completion_tokens_details.reasoning_tokens
    assert done._request_id in done.id
    turns = [*ASK, message, {"role": "user", "content": "Sure?"}]  # as people write it
    assert ask(client, messages=turns).usage.prompt_tokens > usage.prompt_tokens
    text = client.completions.create(model="tiny", prompt="the sum", max_tokens=9).choices[0].text
    ids = restless.chat.encode("the sum")
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=9).choices[0].text
    assert text == again and text


def test_openai_stream(client: Any) -> None:
    whole = ask(client, extra_body=BUDGET)
    options = {"include_usage": True}
    with ask(client, extra_body=BUDGET, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    wanted = whole.choices[0].message
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == wanted.content
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == wanted.reasoning
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_streams_every_cell_of_a_tree(client: Any) -> None:
    """Each is a choice of its own: its pieces come as they are drawn, its end when it is done."""
    tree = {"budgets": [3, 9, 60], "num_ignores": [0, 2]}
    asked = {"extra_body": tree, "max_tokens": 120, "temperature": 0.7, "seed": 3, "n": 2}
    whole = ask(client, **asked).choices
    with ask(client, **asked, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert [choice.index for choice in whole] == list(range(12))
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        for name in ("content", "reasoning"):
            text = "".join(getattr(chunk.delta, name, None) or "" for chunk in mine)
            assert text == (getattr(choice.message, name) or "")
        *before, last = mine
        assert last.finish_reason == choice.finish_reason and last.s1 == choice.s1
        assert not any(chunk.finish_reason for chunk in before)
        tokens = sum(chunk.s1["tokens"] for chunk in before if chunk.model_extra)
        assert tokens > 0 and len(before) > 2
    ends = [at for at, chunk in enumerate(chunks) if chunk.finish_reason]
    assert len({chunk.index for chunk in chunks[ends[0] :]}) > 6, "all ended together"
    answers = [
        c.index for c in chunks if (c.model_extra or {}).get("s1", {}).get("kind") == "answer"
    ]
    turns = sum(a != b for a, b in pairwise(answers))
    assert turns > 2 * len(set(answers)), "cells came one after the other"


def test_openai_async_and_whoever_breaks_off(served: InProcess) -> None:
    async def go() -> None:
        known = {"base_url": served.url, "api_key": "sk-right", "max_retries": 0}
        async with openai.AsyncOpenAI(**known) as client:
            alone = await ask(client, extra_body=BUDGET)
            many = await asyncio.gather(*(ask(client, extra_body=BUDGET) for _ in range(8)))
            assert all(done.usage.s1["waits_used"] for done in many)
            assert sum(done.choices == alone.choices for done in many) >= 6  # the rest are ties
            async with await ask(client, stream=True, max_tokens=3000, n=2) as stream:
                async for chunk in stream:
                    assert chunk.choices
                    break
            task = asyncio.create_task(ask(client, max_tokens=3000, n=2))
            await asyncio.sleep(0.1)
            task.cancel()

    asyncio.run(go())
    served.idle()


def test_openai_errors(served: InProcess, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=-1)
    error = caught.value
    assert error.param == "temperature" and error.type == "invalid_request_error"
    assert "must be 0 or" in error.message and error.request_id
    with pytest.raises(openai.BadRequestError, match="extra_field: this server does not honour"):
        ask(client, extra_body={"extra_field": 1})
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-9")
    assert caught.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=served.url, api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        ask(stranger)


def test_openai_is_told_of_a_failure_in_the_middle(
    served: InProcess, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, count = served.engine._loop._draw, 0

    def fails(row: Any, *rest: Any) -> int:
        nonlocal count
        count += row.params.seed == 99
        if row.params.seed == 99 and count > 5:
            raise RuntimeError("broken")
        return take(row, *rest)

    monkeypatch.setattr(served.engine._loop, "_draw", fails)
    with (
        pytest.raises(openai.APIError, match="the server failed on this request"),
        ask(client, stream=True, seed=99, temperature=1.0) as stream,
    ):
        for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError):
        ask(client, seed=99, temperature=1.0)
    assert ask(client).choices


def test_openai_comes_again_when_the_queue_was_full(
    served: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s1fast.service.RETRY_AFTER_S", 1)
    held = served.begin(n=16, max_tokens=3000, temperature=1.0)
    wait_until(lambda: served.engine.pages.held > 0)
    with openai.OpenAI(base_url=served.url, api_key="sk-right", max_retries=0) as hasty:
        with pytest.raises(openai.RateLimitError) as caught:
            ask(hasty)
        assert caught.value.response.headers["retry-after"] == "1"
    threading.Timer(0.3, held.close).start()
    began = time.monotonic()
    with openai.OpenAI(base_url=served.url, api_key="sk-right", max_retries=3) as patient:
        assert ask(patient, max_tokens=5).choices
    assert time.monotonic() - began > 0.9, "it came again before the time it was told"


# -- lm-eval --------------------------------------------------------------------------------------

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 70
  do_sample: false
  thinking_token_budget: 15
  num_ignore: 1
metric_list: [{{metric: exact_match}}]
"""
RUN = """\
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, url = sys.argv[1:]
done = lm_eval.simple_evaluate(
    model="local-chat-completions",
    model_args=f"model=tiny,base_url={url}/chat/completions,num_concurrent=4,max_retries=1",
    tasks=["sums"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    apply_chat_template=True,
    bootstrap_iters=0,
)
print(json.dumps([sample["resps"][0][0] for sample in done["samples"]["sums"]]))
"""


def test_lm_eval_passes_budgets_on(served: InProcess, tmp_path: Path) -> None:
    """Its answers are the server's under that budget."""
    pytest.importorskip("lm_eval", reason="no lm_eval; unproven: lm-eval on s1fast serve")
    questions = [f"{i} + {i}?" for i in range(6)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in questions))
    (tmp_path / "sums.yaml").write_text(TASK.format(rows=rows))
    before = served.metric("waits_total")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), served.url],
        env={**os.environ, "OPENAI_API_KEY": "sk-right", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert served.metric("waits_total") > before
    fields = {"max_tokens": 70, "thinking_token_budget": 15, "num_ignore": 1}
    wanted = [served.chat(q, **fields).json["choices"][0]["message"]["content"] for q in questions]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 5  # the rest are ties
    assert any("Final Answer:" in text for text in found)


# -- our own --------------------------------------------------------------------------------------


def test_evaluate_endpoint(
    restless: Ascii, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid over HTTP is what the engine gives here, cell by cell."""
    pytest.importorskip("math_verify", reason="no math-verify; unproven: evaluation")
    from rich.console import Console

    from s1fast.answers import How
    from s1fast.evaluate import EvaluateConfig, evaluate

    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    rows = tmp_path / "gsm8k.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": f"{i} + {i}?", "answer": f"#### {2 * i}"}) + "\n"
            for i in range(3)
        )
    )
    known: dict[str, Any] = {"tasks": f"gsm8k={rows}", "grading_workers": 1}
    known |= {"budgets": "4,20", "num_ignores": "none,2", "how": How(max_tokens=60)}

    def go(model: str, name: str, **values: Any) -> dict[tuple[str, str], dict[str, Any]]:
        config = EvaluateConfig(output=tmp_path / name, **known, **values)
        evaluate(model, config, Console(file=io.StringIO()))
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        made = [json.loads(line) for line in lines]
        return {(row["problem"], row["cell"]): row for row in made}

    with in_process(Engine(restless.folder), keys=["sk-right"], defaults=Defaults()) as server:
        over_http = go("tiny", "endpoint", endpoint=server.url)
    here = go(str(restless.folder), "local", separate=True)
    assert over_http.keys() == here.keys() and len(here) == 3 * 4

    def told(row: dict[str, Any]) -> list[Any]:
        counts = ("thoughts_tokens", "waits_used", "thinking_end", "finish_reason")
        return [row["thinking"].strip(), row["answer"].strip(), *(row[name] for name in counts)]

    equal = [told(over_http[key]) == told(here[key]) for key in here]
    assert sum(equal) >= 10, "more than ties can explain"
    assert any(row["waits_used"] for row in over_http.values())
