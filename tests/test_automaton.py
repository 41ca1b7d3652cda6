"""The automaton against its specification, restated over plain lists, on random programs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from playing import FORCED, NATURAL, NEWLINE, THINKS, WAIT, play
from s1fast.automaton import TABLE_SIZE, At, Automaton, Phase, Program
from s1fast.errors import InputError

WORDS = range(30, 36)
ENDS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((1,), (2,)),
    ((1,),),
    ((30, 31, 32),),
    ((30, 30, 31), (2,)),
    ((30, 31), (31, 32, 33), (32,)),
    ((31, 31, 31, 31),),
)
ALPHABET = (*WORDS, 1, 2, NEWLINE)


class Draws:
    """A sampler that depends on the position and what is masked, and likes some ids better."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.weights = [rng.choice((0, 1, 1, 5)) + 0.01 for _ in ALPHABET]
        self.seed = seed

    def __call__(self, position: int, masked: Sequence[int]) -> int:
        rng = random.Random(self.seed * 1000 + position)
        ids = [i for i in ALPHABET if i not in masked]
        weights = [w for i, w in zip(ALPHABET, self.weights, strict=True) if i not in masked]
        return rng.choices(ids, weights)[0]


@dataclass
class Case:
    """A program, what the prompt's thinking was, and the sampler."""

    program: Program
    thought: list[int]
    draw: Draws


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    ends = rng.choice(ENDS)
    maximum = rng.choice([None, rng.randrange(25), rng.randrange(25)])
    harness = maximum is not None and rng.random() < 0.3
    thought = [rng.choice(WORDS) for _ in range(rng.choice([0, 0, 0, 1, 2, 5, 20]))]
    while any(_completes(thought[:i], ends) for i in range(len(thought) + 1)):
        thought.pop()
    ignores = rng.choice([None, 0, 1, 2, 4])
    minimum = rng.choice([0, 0, 1, 4, 9]) if ignores is None or not harness else 0
    needed = 1 if maximum is None else max(0, maximum - len(thought)) + 1 + len(FORCED)
    max_tokens = needed + rng.randrange(20)
    texts = rng.choice([(WAIT,), ((),), ((10,), (11, 12, NEWLINE), ()), ((10, NEWLINE, 11, 12),)])
    program = replace(
        THINKS,
        max_tokens=max_tokens,
        room=max_tokens + rng.choice([0, 0, 30, 200]),
        stop_ids=frozenset({2, 34}),
        thought=len(thought),
        newline_ended=bool(thought) and thought[-1] == NEWLINE,
        half_end=tuple(thought[-16:]),
        max_thinking=maximum,
        min_thinking=minimum if maximum is None else min(minimum, maximum),
        num_ignore=ignores or 0,
        mask_first=ignores is not None,
        ends=ends,
        ignore_ids=texts,
        harness=harness,
    )
    return Case(program, thought, Draws(seed))


def _completes(ids: Sequence[int], ends: Sequence[Sequence[int]]) -> int:
    """Length of the longest delimiter that the ids end in."""
    return max((len(e) for e in ends if tuple(ids[-len(e) :]) == tuple(e)), default=0)


@dataclass
class Restated:
    """What a request gives, by the rules as they are written, looking back wherever it likes."""

    case: Case
    out: list[tuple[str, int]] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    """What a delimiter may be part of: the prompt's thinking, tokens since the last text."""
    sampled: int = 0
    """So many of the tail were sampled."""
    waits: int = 0
    end: str | None = None
    finish: str | None = None

    @property
    def thinking(self) -> int:
        return len(self.case.thought) + sum(k in ("thinking", "ignore") for k, _ in self.out)

    def sample(self, kind: str, masks: bool) -> int | None:
        """One token: kept under `kind`, or the length of the delimiter that it completed."""
        p = self.case.program
        first = p.mask_first and (self.waits > 0 or not self.case.thought)
        masked = []
        for token in ALPHABET if masks else ():
            length = _completes([*self.tail, token], p.ends)
            if length and (
                self.thinking - (length - 1) < p.min_thinking
                or (first and self.sampled - (length - 1) < 1)
            ):
                masked.append(token)
        token = self.case.draw(len(self.out), masked)
        length = _completes([*self.tail, token], p.ends)
        if length:
            gone = min(length - 1, self.sampled)
            del self.out[len(self.out) - gone :]
            return None
        if kind == "answer" and token in p.stop_ids:
            return None
        self.out.append((kind, token))
        self.tail.append(token)
        self.sampled += 1
        return token

    def append(self, kind: str, ids: Sequence[int]) -> None:
        self.out += [(kind, i) for i in ids]
        self.tail, self.sampled = [], 0

    def newline(self) -> bool:
        said = self.case.thought + [i for _, i in self.out]
        return bool(said) and said[-1] in self.case.program.newline_enders

    def run(self) -> Restated:
        p = self.case.program
        self.tail = list(self.case.thought)
        if p.max_thinking is not None and len(self.case.thought) >= p.max_thinking:
            self.close("length", self.newline())
        elif p.harness:
            self.rounds()
        else:
            self.total()
        while self.finish is None:
            if len(self.out) >= p.max_tokens:
                self.finish = "length"
            elif self.sample("answer", masks=False) is None:
                self.finish = "stop"
        return self

    def total(self) -> None:
        p = self.case.program
        while len(self.out) < p.max_tokens:
            if self.sample("thinking", masks=True) is None:
                if self.waits == p.num_ignore:
                    return self.close("natural", False)
                text = p.ignore_ids[self.waits % len(p.ignore_ids)]
                self.waits += 1
                room = p.max_tokens - len(self.out)
                if p.max_thinking is not None:
                    room = min(room, p.max_thinking - self.thinking)
                self.append("ignore", text[:room])
            if self.thinking == p.max_thinking:
                return self.close("length", self.newline())
        self.finish = "length"

    def rounds(self) -> None:
        """As the harness: whole rounds, then the cut."""
        p = self.case.program
        assert p.max_thinking is not None
        while True:
            reason = "length"
            while self.sampled < p.max_thinking and len(self.out) < p.room:
                if self.sample("thinking", masks=True) is None:
                    reason = "natural"
                    break
            if reason == "length" or self.waits == p.num_ignore:
                break
            text = p.ignore_ids[self.waits % len(p.ignore_ids)]
            self.waits += 1
            self.append("ignore", text[: p.room - len(self.out)])
        newline = self.newline()
        beyond = min(max(0, self.thinking - p.max_thinking), len(self.out))
        del self.out[len(self.out) - beyond :]
        self.close(reason, newline)

    def close(self, reason: str, newline: bool) -> None:
        p = self.case.program
        self.end = reason
        ids = NATURAL if reason == "natural" else FORCED if newline else (NEWLINE, *FORCED)
        if len(self.out) + len(ids) > p.max_tokens:
            self.finish = "length"
            return
        self.append("end", ids)


def check(seed: int) -> Restated:
    case = random_case(seed)
    p = case.program
    longest = [0]

    def watch(trace: object) -> None:
        automaton = trace.automaton  # type: ignore[attr-defined]
        longest[0] = max(longest[0], automaton.thinking)
        assert automaton.unsure <= automaton.generated

    trace = play(p, lambda a, _: case.draw(a.generated, tuple(a.masked)), watch)
    wanted = Restated(case).run()
    assert list(zip(trace.kinds, trace.ids, strict=True)) == wanted.out, seed
    a = trace.automaton
    found = (a.thinking, a.waits, a.thinking_end, a.finish_reason)
    assert found == (wanted.thinking, wanted.waits, wanted.end, wanted.finish), seed
    if not p.harness and p.max_thinking is not None:
        assert longest[0] <= max(p.max_thinking, p.thought)
    return wanted


MANY = 10_000


def test_random_programs_equal_the_specification() -> None:
    """10,000 of them; together they end in every way, by delimiters of one and of several ids."""
    seen = set()
    for seed in range(MANY):
        wanted = check(seed)
        seen.add((wanted.end, wanted.finish, wanted.waits > 0))
    assert {(e, f) for e, f, _ in seen} >= {
        ("natural", "stop"),
        ("natural", "length"),
        ("length", "stop"),
        ("length", "length"),
        (None, "length"),
    }
    assert {w for _, _, w in seen} == {False, True}


@pytest.mark.slow
def test_many_more_random_programs_equal_the_specification() -> None:
    for seed in range(MANY, 20 * MANY):
        check(seed)


def test_a_kernel_needs_the_table_and_the_newlines_alone() -> None:
    """An automaton that is handed nothing else does the same."""
    for seed in range(300):
        case = random_case(seed)
        p = case.program
        bare = Automaton(SimpleNamespace(table=p.table, newline_enders=p.newline_enders))  # type: ignore[arg-type]
        whole = Automaton(p)
        assert bare.begin() == whole.begin()
        while whole.phase is not Phase.DONE:
            assert list(bare.masked) == list(whole.masked)
            token = case.draw(whole.generated, tuple(whole.masked))
            assert bare.step(token) == whole.step(token)
        assert bare.phase is Phase.DONE


def test_the_table_is_of_small_integers() -> None:
    p = replace(THINKS, max_thinking=8, num_ignore=2)
    assert len(p.table) < 80
    assert all(type(i) is int and -1 <= i < 1 << 31 for i in p.table)
    assert (
        p.table[At.MAX_THINKING] == 8 and replace(p, max_thinking=None).table[At.MAX_THINKING] < 0
    )


def test_a_program_above_its_size_is_refused() -> None:
    longest = TABLE_SIZE - len(replace(THINKS, ignore_ids=((),)).table)
    assert len(replace(THINKS, ignore_ids=((7,) * longest,)).table) == TABLE_SIZE
    with pytest.raises(InputError, match=rf"take {TABLE_SIZE + 1} integers, at most {TABLE_SIZE}"):
        _ = replace(THINKS, ignore_ids=((7,) * (longest + 1),)).table


# -- delimiters of several ids --------------------------------------------------------------

LONG = replace(THINKS, ends=((30, 31, 32),))


def played(program: Program, tokens: Sequence[int]) -> list[int]:
    rest = list(tokens)
    return play(program, lambda *_: rest.pop(0) if rest else 2).ids


def test_a_long_delimiter_is_dropped_whole() -> None:
    assert played(LONG, [40, 30, 31, 32, 41]) == [40, *NATURAL, 41]
    ignoring = replace(LONG, num_ignore=1)
    assert played(ignoring, [40, 30, 31, 32, 41, 30, 31, 32]) == [40, *WAIT, 41, *NATURAL]


def test_a_false_start_stays_and_may_begin_the_delimiter_again() -> None:
    assert played(LONG, [30, 31, 30, 31, 32]) == [30, 31, *NATURAL]
    twice = replace(THINKS, ends=((30, 30, 31),))
    assert played(twice, [30, 30, 30, 31]) == [30, *NATURAL]


def test_a_delimiter_that_began_in_the_prompt_is_completed() -> None:
    begun = replace(LONG, thought=2, half_end=(30, 31))
    assert played(begun, [32, 41]) == [*NATURAL, 41]


def test_a_delimiter_never_spans_an_appended_text() -> None:
    spanning = replace(LONG, num_ignore=1, ignore_ids=((10, 30),))
    assert played(spanning, [30, 31, 32, 31, 32, 30, 31, 32]) == [10, 30, 31, 32, *NATURAL]


def test_a_budget_that_ends_within_a_delimiter_keeps_its_first_part() -> None:
    assert played(replace(LONG, max_thinking=2), [30, 31]) == [30, 31, NEWLINE, *FORCED]


def test_only_the_id_that_would_complete_it_is_masked() -> None:
    automaton = Automaton(replace(LONG, min_thinking=2))
    automaton.begin()
    for token, masked in [(30, []), (31, []), (30, [32]), (31, []), (32, [])]:
        assert list(automaton.masked) == masked
        automaton.step(token)
    assert (automaton.thinking, automaton.thinking_end) == (2, "natural")


def test_what_may_be_taken_back_is_unsure() -> None:
    automaton = Automaton(LONG)
    automaton.begin()
    for token, unsure in [(40, 0), (30, 1), (31, 2), (40, 0)]:
        automaton.step(token)
        assert automaton.unsure >= unsure and (automaton.unsure > 0) == (unsure > 0)


def test_masks_stay_away_until_the_next_ignored_end() -> None:
    """Of random programs: ids are masked only where `masks` says so, and once it does not, only a
    Wait brings it back."""
    over = 0
    for seed in range(300):
        case = random_case(seed)
        last: list[tuple[int, bool]] = []

        def watch(automaton: Automaton, last: list[tuple[int, bool]] = last) -> None:
            assert automaton.masks or not automaton.masked
            if last and last[-1][0] == automaton.waits:
                assert last[-1][1] or not automaton.masks
            last.append((automaton.waits, automaton.masks))

        play(
            case.program,
            lambda a, _, case=case: case.draw(a.generated, tuple(a.masked)),  # type: ignore[misc]
            lambda trace, watch=watch: watch(trace.automaton),  # type: ignore[misc]
        )
        over += any(before and not after for (_, before), (_, after) in pairwise(last))
    assert over > 30
