"""Who answers the problems of an evaluation: our engine here, or any OpenAI-compatible server.

A `Cell` is one way of asking: how much thinking, how many ignored ends, which words below the
problem. A problem's sample in a cell becomes a record, which is stored as soon as it is finished.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from s1fast.errors import InputError
from s1fast.hub import find
from s1fast.recipes.features import token_counter
from s1fast.recipes.teachers import OpenAICompatible, Reply, Sampling, openai_reply
from s1fast.tasks import STYLES, Problem

Record = dict[str, Any]
Limit = int | Literal["auto"] | None


@dataclass(frozen=True)
class Cell:
    """One way of asking, and so one run over a task in the paper's sense."""

    style: str = "plain"
    """Of STYLES."""
    budget: Limit = "auto"
    """Most thinking tokens; None for no limit of its own."""
    ignores: int | None = None
    """Ends of thinking that are ignored; 0 differs from None in that thinking cannot be empty."""
    reject: int | None = None
    """Rejection sampling: draw until thinking ends by itself within so many tokens."""
    think: bool = True
    """False for a plain answer, without markers."""

    @property
    def label(self) -> str:
        """Names the cell in tables, files and compare."""
        parts = ["none" if self.budget is None else str(self.budget)]
        if not self.think:
            parts = ["no-thinking"]
        if self.reject is not None:
            parts = [f"reject>{self.reject}"]
        parts += [] if self.ignores is None else [f"ignore={self.ignores}"]
        return " ".join([*parts, *([] if self.style == "plain" else [self.style])])

    def accepts(self, record: Record) -> bool:
        """Whether rejection sampling takes a draw: thinking ended by itself, within the limit."""
        assert self.reject is not None
        return record["thinking_end"] == "natural" and record["thoughts_tokens"] <= self.reject


@dataclass(frozen=True)
class Ask:
    """One sample of one problem in one cell."""

    problem: Problem
    cell: Cell
    sample: int

    @property
    def key(self) -> str:
        return key_of(self.problem.task, self.problem.id, self.cell.label, self.sample)

    @property
    def prompt(self) -> str:
        return self.problem.question + STYLES[self.cell.style]

    def record(self, reply: Record) -> Record:
        """What is stored: where it belongs, what was asked, what came back."""
        problem = self.problem
        return {
            "task": problem.task,
            "problem": problem.id,
            "cell": self.cell.label,
            "sample": self.sample,
            "prompt": self.prompt,
            **reply,
        }


def key_of(task: str, problem: str, cell: str, sample: int) -> str:
    return f"{task}/{problem}/{cell}/{sample}"


@dataclass(frozen=True, kw_only=True)
class How:
    """How all cells are decoded."""

    ignore_text: tuple[str, ...] = ("Wait",)
    """Appended for each ignored end; several are used in turn."""
    final_text: str = "Final Answer:"
    """Appended after the answer marker when thinking is cut."""
    accounting: Literal["total", "harness"] = "total"
    """Whether a budget holds for all thinking, or for each round as in s1's harness."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Seed of the draws."""
    max_tokens: int | None = None
    """Most tokens generated in all; the whole context unless given."""

    def params(self, n: int, seed: int) -> Any:
        """The SamplingParams of n samples. Raises an InputError naming a bad field."""
        from s1fast.request import SamplingParams

        names = ("temperature", "top_k", "top_p", "min_p", "max_tokens")
        return SamplingParams(n=n, seed=seed, **{name: getattr(self, name) for name in names})


Finished = Callable[[str, Record], None]
"""Takes a key and its finished record."""


class Local:
    """Our engine in this process.

    Args:
        engine: a decoder.Engine.
        cells: all of the run's; those of one style are decoded together, as one budget tree.
        samples: of each problem, drawn by one request.
        separate: decode every cell from its prompt instead.
    """

    def __init__(
        self, engine: Any, how: How, cells: Sequence[Cell], *, samples: int, separate: bool
    ) -> None:
        self._engine, self._how, self._cells = engine, how, cells
        self._samples, self._separate = samples, separate
        # Requests under way: a batch full of rows, and as many waiting for their places.
        rows = engine.max_batch
        self._window = max(2, 2 * rows // samples) if rows > 1 else 1
        self.drawn = self.drawn_separately = 0
        """Tokens drawn so far, and how many it would have been cell by cell."""

    def answer(self, asks: Sequence[Ask], finished: Finished) -> None:
        """Answers them all; what is lost when the process dies are the problems under way.

        The longest questions come first, so that what does not fit the context shows at once.

        Raises:
            InputError: a budget that a prompt leaves no room for.
        """
        units: dict[tuple[str, str, tuple[Cell, ...]], Problem] = {}
        for ask in asks:
            cells = [cell for cell in self._cells if cell.style == ask.cell.style]
            together = (ask.cell,) if self._separate else tuple(cells)
            units[ask.problem.task, ask.problem.id, together] = ask.problem

        async def one(problem: Problem, cells: Sequence[Cell]) -> None:
            done = await self._generate(problem, cells, self._samples, self._how.seed)
            for i, completion in enumerate(done):
                ask = Ask(problem, cells[i % len(cells)], completion.sample)
                finished(ask.key, ask.record(_reply(completion)))

        ordered = sorted(units.items(), key=lambda unit: -len(unit[1].question))
        self._all([lambda p=p, c=key[2]: one(p, c) for key, p in ordered])  # type: ignore[misc]

    def draw(
        self,
        problems: Sequence[Problem],
        cell: Cell,
        known: dict[str, Record],
        max_tries: int,
        finished: Finished,
    ) -> None:
        """Rejection sampling: every problem is drawn until the cell accepts, known draws first."""
        assert cell.reject is not None
        limit = Cell(cell.style, cell.reject + 1)  # one more: an end right at the limit is seen

        async def one(problem: Problem) -> None:
            for attempt in range(max_tries):
                ask = Ask(problem, cell, attempt)
                if ask.key not in known:
                    seed = self._how.seed + attempt
                    (done,) = await self._generate(problem, [limit], 1, seed)
                    finished(ask.key, ask.record(_reply(done)))
                if cell.accepts(known[ask.key]):
                    return

        self._all([lambda p=p: one(p) for p in problems])  # type: ignore[misc]

    def _all(self, works: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        """Runs them in order, a window at a time; the first error ends them all."""

        async def run() -> None:
            gate = asyncio.Semaphore(self._window)

            async def enter(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
                async with gate:
                    await work()

            async with asyncio.TaskGroup() as group:
                for work in works:
                    group.create_task(enter(work))

        try:
            asyncio.run(run())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _generate(
        self, problem: Problem, cells: Sequence[Cell], n: int, seed: int
    ) -> list[Any]:
        """Completions in the order (sample, cell)."""
        from s1fast.budget import Budget
        from s1fast.request import cost

        how = self._how
        budget = Budget(
            max_thinking_tokens=cells[0].budget,
            num_ignore=cells[0].ignores,
            ignore_text=how.ignore_text,
            final_text=how.final_text,
            accounting=how.accounting,
        )
        grid: dict[str, Any] = {}
        if len(cells) > 1:
            grid["budgets"] = list(dict.fromkeys(cell.budget for cell in cells))
            grid["num_ignores"] = list(dict.fromkeys(cell.ignores for cell in cells))
        prompts = [problem.question + STYLES[cells[0].style]]
        thinks = budget if cells[0].think else None
        done = await self._engine.generate_async(prompts, how.params(n, seed), thinks, **grid)
        spent = cost(done)
        self.drawn += spent.steps
        self.drawn_separately += spent.separate_steps
        return done


def _reply(done: Any) -> Record:
    """A Completion under the names that servers' replies have."""
    return {
        "thinking": done.thinking,
        "answer": done.answer,
        "finish_reason": done.finish_reason or "",
        "refused": "",
        "prompt_tokens": len(done.prompt_ids),
        "thoughts_tokens": done.thinking_tokens,
        "answer_tokens": len(done.token_ids) - done.thinking_tokens,
        "waits_used": done.waits_used,
        "thinking_end": done.thinking_end,
    }


def weights_digest(model: str) -> str:
    """16 hex digits that change with a model's files: sizes, heads and tails of the weights."""
    folder = find(model)
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        if not path.exists():
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size} ".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


# -- any server ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Forced(Reply):
    """A server's reply with its interventions, where it tells them; ours does, in usage.s1."""

    waits_used: int | None = None
    thinking_end: str | None = None


class Endpoint:
    """A server with /chat/completions, as a teacher whose questions are the keys of `asks`: each
    has its own budget. Budgets go as thinking_token_budget, num_ignore, ...

    A server that ignores those fields would be graded for what it was not asked, so a reply that
    thought longer than its budget, or does not tell its waits, ends the run.

    Args:
        tokenizer: counts thinking where the server does not; empty if it always does.
    """

    def __init__(self, model: str, url: str, how: How, tokenizer: str, asks: Sequence[Ask]) -> None:
        if how.accounting != "total":
            raise InputError("--accounting harness: no server takes it; leave --endpoint out")
        self._url, self._how = url, how
        self._count = token_counter(tokenizer) if tokenizer else None
        self._server = OpenAICompatible(model, url, Sampling())
        self.identity = self._server.identity
        self._asks = {ask.key: ask for ask in asks}
        self._reached, self._lock = False, asyncio.Lock()

    async def ask(self, question: str, system: str = "") -> Forced:
        """One attempt at the ask of that key."""
        async with self._lock:  # once, before anything is asked
            if not self._reached:
                await self._server.reach()
                self._reached = True
        ask = self._asks[question]
        messages = [{"role": "user", "content": ask.prompt}]
        return self._reply(ask, await self._server.complete(messages, **self._fields(ask)))

    async def aclose(self) -> None:
        await self._server.aclose()

    def _fields(self, ask: Ask) -> dict[str, Any]:
        """A request's fields beside its messages."""
        how, cell = self._how, ask.cell
        budget = cell.budget if cell.reject is None else cell.reject + 1
        body: dict[str, Any] = {}
        if isinstance(budget, int):
            body["thinking_token_budget"] = budget
        if cell.ignores is not None:
            body |= {"num_ignore": cell.ignores, "ignore_text": list(how.ignore_text)}
        if how.final_text != How.final_text:
            body["final_text"] = how.final_text
        body |= {name: value for name in ("top_k", "min_p") if (value := getattr(how, name))}
        fields: dict[str, Any] = {"temperature": how.temperature, "seed": how.seed + ask.sample}
        fields |= {} if how.top_p == 1.0 else {"top_p": how.top_p}
        fields |= {} if how.max_tokens is None else {"max_tokens": how.max_tokens}
        return {**fields, "extra_body": body}

    def _reply(self, ask: Ask, done: Any) -> Forced:
        """The reply, once it is clear that the budget was kept."""
        reply = openai_reply(done)
        told = ((done.usage and done.usage.model_extra) or {}).get("s1") or {}
        thoughts = told.get("thinking_tokens", reply.thoughts_tokens)
        if thoughts is None and self._count is not None:
            thoughts = self._count(reply.thinking)
        total = reply.answer_tokens + (reply.thoughts_tokens or 0)
        values = {**vars(reply), "thoughts_tokens": thoughts}
        values["answer_tokens"] = max(0, total - (thoughts or 0))
        ended = None
        if "forced_end" in told:
            ended = "length" if told["forced_end"] else "natural"
        forced = Forced(**values, waits_used=told.get("waits_used"), thinking_end=ended)
        self._check(ask, forced)
        return forced

    def _check(self, ask: Ask, reply: Forced) -> None:
        budget = self._fields(ask)["extra_body"].get("thinking_token_budget")
        if budget is not None and reply.thoughts_tokens is None:
            raise InputError(
                f"{self._url}: does not count thinking tokens, so the budget of {budget} cannot be "
                "checked; --tokenizer MODEL counts them here"
            )
        if budget is not None and (reply.thoughts_tokens or 0) > budget:
            raise InputError(
                f"{self._url}: thought {reply.thoughts_tokens} tokens where thinking_token_budget "
                f"was {budget}: it does not honour the field; leave --budgets at auto"
            )
        if (ask.cell.ignores or ask.cell.reject is not None) and reply.waits_used is None:
            raise InputError(
                f"{self._url}: its replies have no usage.s1 that tells waits and forced ends, so "
                "num_ignore and --reject-above cannot be checked; leave them out"
            )
