"""What /metrics tells, for Prometheus: vLLM's names below `s1fast:`, and what thinking is added.

Running are requests that have drawn a token, waiting those that have not yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from s1fast.decoder import Engine
from s1fast.replies import cached_prompt
from s1fast.request import Completion

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)


class ServerMetrics:
    """The counters of one server. Not thread-safe: the event loop's alone."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, help: str, **more: Any) -> Any:
            names = ["model_name", *more.pop("labels", ())]
            made = kind(f"s1fast:{name}", help, names, registry=self.registry, **more)
            return made if len(names) > 1 else made.labels(model)

        def gauge(name: str, help: str) -> Any:
            return make(Gauge, name, help)

        def counter(name: str, help: str, **more: Any) -> Any:
            return make(Counter, name, help, **more)

        def seconds(name: str, help: str) -> Any:
            return make(Histogram, name, help, buckets=SECONDS)

        def tokens(name: str, help: str) -> Any:
            return make(Histogram, name, help, buckets=TOKENS)

        self.model = model
        self.running = gauge("num_requests_running", "Requests that have drawn a token.")
        self.waiting = gauge("num_requests_waiting", "Requests that have not drawn a token yet.")
        usage = gauge("kv_cache_usage_perc", "Pages of the KV cache that are held; 1 is all.")
        usage.set_function(lambda: engine.pages.held / (engine.pages.count - 1))
        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.generated = counter("generation_tokens", "Tokens generated, appended ones included.")
        self.thinking = counter("thinking_tokens", "Tokens of thinking among them.")
        self.waits = counter("waits", "Ends of thinking that were ignored, a text appended.")
        self.forced = counter("forced_ends", "Times that thinking was cut at its maximum.")
        self.queries = counter("prefix_cache_queries", "Tokens that were looked for in the cache.")
        self.hits = counter("prefix_cache_hits", "Tokens that were found there.")
        self.success = counter(
            "request_success", "Finished choices by reason.", labels=["finished_reason"]
        )
        self.ended = counter("requests", "Requests by their HTTP status.", labels=["status"])
        self.ttft = seconds("time_to_first_token_seconds", "From the request to its first token.")
        self.itl = seconds("inter_token_latency_seconds", "Between pieces of one choice.")
        self.tpot = seconds(
            "request_time_per_output_token_seconds",
            "A choice's mean time a token, after its first.",
        )
        self.e2e = seconds("e2e_request_latency_seconds", "From the request to its last token.")
        self.request_prompt = tokens("request_prompt_tokens", "Tokens of a prompt.")
        self.request_generated = tokens("request_generation_tokens", "Tokens of a choice.")
        self.request_thinking = tokens("request_thinking_tokens", "Thinking tokens of a choice.")
        self.registry.register(_EngineStats(engine, model))

    def finished(self, done: Completion, spent_s: float) -> None:
        """Counts a choice that is complete, `spent_s` after its first token."""
        count = len(done.token_ids)
        self.generated.inc(count)
        self.thinking.inc(done.thinking_tokens)
        self.waits.inc(done.waits_used)
        self.forced.inc(done.thinking_end == "length")
        self.success.labels(self.model, done.finish_reason).inc()
        self.request_generated.observe(count)
        self.request_thinking.observe(done.thinking_tokens)
        if count > 1:
            self.tpot.observe(spent_s / (count - 1))

    def prompt_done(self, done: Sequence[Completion]) -> None:
        """Counts the prompt of a request whose choices are these."""
        count = len(done[0].prompt_ids)
        self.prompt.inc(count)
        self.request_prompt.observe(count)
        self.queries.inc(count)
        self.hits.inc(cached_prompt(done))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Timing:
    """When a request began, and when its pieces came."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self.began_s, self.first_s = time.perf_counter(), 0.0
        self._last_s: dict[int, float] = {}
        metrics.waiting.inc()

    def piece(self, index: int) -> None:
        """One of that choice came."""
        now_s = time.perf_counter()
        if not self.first_s:
            self.first_s = now_s
            self._metrics.waiting.dec()
            self._metrics.running.inc()
            self._metrics.ttft.observe(now_s - self.began_s)
        elif index in self._last_s:
            self._metrics.itl.observe(now_s - self._last_s[index])
        self._last_s[index] = now_s

    def since_first_s(self, index: int) -> float:
        """From the request's first piece to that choice's last one."""
        return self._last_s.get(index, self.first_s) - self.first_s

    def end(self, *, whole: bool) -> None:
        """The request is over."""
        (self._metrics.running if self.first_s else self._metrics.waiting).dec()
        if whole:
            self._metrics.e2e.observe(time.perf_counter() - self.began_s)


class _EngineStats:
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> list[CounterMetricFamily]:
        stats = self._engine.stats
        told = (
            ("engine_steps", "Forward passes.", stats.steps),
            ("iteration_tokens", "Tokens that went through the model.", stats.slots),
            ("num_preemptions", "Rows that gave their pages to an older one.", stats.preemptions),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.drafted),
            ("spec_decode_num_accepted_tokens", "Drafts that were right.", stats.accepted),
        )
        made = []
        for name, help, value in told:
            family = CounterMetricFamily(f"s1fast:{name}", help, labels=["model_name"])
            family.add_metric([self._model], value)
            made.append(family)
        return made
