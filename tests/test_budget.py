"""Budget forcing: one example per rule, the harness's round loop, and what always holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from playing import DOT_NEWLINE, END, FORCED, NATURAL, NEWLINE, START, THINKS, WAIT, Trace, play
from s1fast.automaton import Automaton, Phase, Program


def play_tokens(tokens: Sequence[int], **fields: Any) -> Trace:
    """Plays a written-out list of sampled tokens, then END until the row is done."""
    rest = list(tokens)
    return play(replace(THINKS, **fields), lambda *_: rest.pop(0) if rest else END)


# -- rules, on hand-made programs -----------------------------------------------------------


@pytest.mark.parametrize("end", [START, END])
def test_natural_end_drops_the_end_id_and_opens_the_answer(end: int) -> None:
    trace = play_tokens([30, 31, end, 40, END])
    assert trace.ids == [30, 31, *NATURAL, 40]
    assert trace.kinds == ["thinking"] * 2 + ["end"] * 2 + ["answer"]
    automaton = trace.automaton
    assert (automaton.thinking, automaton.waits, automaton.thinking_end) == (2, 0, "natural")
    assert automaton.finish_reason == "stop"


def test_an_ignored_end_is_dropped_and_the_text_appended() -> None:
    trace = play_tokens([30, START, 31, END, 32, START, 40, END], num_ignore=2)
    assert trace.ids == [30, *WAIT, 31, *WAIT, 32, *NATURAL, 40]
    assert trace.of("ignore") == WAIT * 2
    assert (trace.automaton.waits, trace.automaton.thinking) == (2, 7)


def test_several_ignore_texts_are_used_in_turn() -> None:
    trace = play_tokens(
        [30, END, 31, END, 32, END, 33, END, END],
        num_ignore=3,
        ignore_ids=((10, 11), (12,)),
    )
    assert trace.thinking == (30, 10, 11, 31, 12, 32, 10, 11, 33)


@pytest.mark.parametrize(("last", "newline"), [(31, (NEWLINE,)), (NEWLINE, ()), (DOT_NEWLINE, ())])
def test_the_maximum_forces_the_answer_on_its_own_line(last: int, newline: tuple[int, ...]) -> None:
    trace = play_tokens([30, last, 40, END], max_thinking=2)
    assert trace.ids == [30, last, *newline, *FORCED, 40]
    assert trace.of("end") == newline + FORCED
    assert (trace.automaton.thinking, trace.automaton.thinking_end) == (2, "length")


def test_an_end_right_before_the_maximum_is_natural() -> None:
    """A maximum of 3 leaves room for a third sample, and that one may be END."""
    assert play_tokens([30, 31, END, END], max_thinking=3).of("end") == NATURAL


def test_end_is_masked_below_the_minimum() -> None:
    trace = play_tokens([30, 31, 32, END, END], min_thinking=3)
    assert trace.masked == [True, True, True, False, False]


def test_end_is_masked_for_one_token_where_ignores_are_counted() -> None:
    """After the start marker and after every ignore text, as min_tokens 1 per round does."""
    trace = play_tokens(
        [30, 31, END, 32, END, 33, END, END], num_ignore=2, mask_first=True, max_thinking=50
    )
    assert trace.masked == [True, False, False, True, False, True, False, False]


def test_the_minimum_counts_ignore_texts() -> None:
    trace = play_tokens([30, 31, END, 32, 33, END, END], num_ignore=1, min_thinking=2)
    assert trace.masked == [True, True, False, False, False, False, False]


def test_without_counted_ignores_thinking_may_be_empty() -> None:
    trace = play_tokens([START, 40, END])
    assert trace.ids == [*NATURAL, 40]
    assert trace.masked[0] is False


def test_an_empty_ignore_text_samples_again_at_the_same_place() -> None:
    trace = play_tokens([30, END, 31, END, END], num_ignore=1, mask_first=True, ignore_ids=((),))
    assert trace.ids == [30, 31, *NATURAL]
    assert trace.masked[:4] == [True, False, True, False]
    assert trace.automaton.waits == 1


@pytest.mark.parametrize("token", [START, END])
def test_an_end_id_in_the_answer_ends_it(token: int) -> None:
    """Thinking is not entered again, ignores left or not."""
    trace = play_tokens([30, START, 40, token], num_ignore=0, stop_ids=frozenset())
    assert trace.ids == [30, *NATURAL, 40]
    assert (trace.automaton.phase, trace.automaton.finish_reason) == (Phase.DONE, "stop")


def test_a_stop_id_ends_the_answer_but_not_thinking() -> None:
    trace = play_tokens([50, START, 40, 50], stop_ids=frozenset({50}))
    assert trace.ids == [50, *NATURAL, 40]
    assert trace.automaton.finish_reason == "stop"


def test_end_is_not_masked_in_the_answer() -> None:
    """Its first token may end it, whatever the minimum of thinking."""
    trace = play_tokens([30, START, START], num_ignore=0, mask_first=True, min_thinking=1)
    assert trace.ids == [30, *NATURAL]
    assert trace.masked == [True, False, False]


def test_max_tokens_ends_the_answer() -> None:
    trace = play_tokens([30, START, 40, 41, 42], max_tokens=5)
    assert trace.ids == [30, *NATURAL, 40, 41]
    assert trace.automaton.finish_reason == "length"


def test_max_tokens_ends_thinking_that_has_no_maximum() -> None:
    trace = play_tokens([30, 31, 32, 33], max_tokens=3)
    assert trace.ids == [30, 31, 32]
    assert (trace.automaton.thinking_end, trace.automaton.finish_reason) == (None, "length")


def test_forced_strings_are_whole_or_absent() -> None:
    """Without a maximum nothing was reserved: an end string that does not fit is left out."""
    trace = play_tokens([30, START], max_tokens=2)
    assert trace.ids == [30]
    assert trace.automaton.finish_reason == "length"
    assert play_tokens([30, 31, 32], max_thinking=2, max_tokens=7).ids == [30, 31, NEWLINE, *FORCED]


@pytest.mark.parametrize(
    ("maximum", "kept", "forced"),
    [(2, (10,), (NEWLINE,)), (3, (10, 11), (NEWLINE,)), (4, (10, 11, NEWLINE), ())],
)
def test_an_ignore_text_is_cut_at_the_maximum(
    maximum: int, kept: tuple[int, ...], forced: tuple[int, ...]
) -> None:
    """The newline rule looks at what is left of it."""
    trace = play_tokens(
        [30, END, END], num_ignore=1, max_thinking=maximum, ignore_ids=((10, 11, NEWLINE, 12),)
    )
    assert trace.ids == [30, *kept, *forced, *FORCED]
    assert (trace.automaton.waits, trace.automaton.thinking_end) == (1, "length")


def test_an_ignore_text_is_cut_at_max_tokens() -> None:
    trace = play_tokens([30, END], num_ignore=1, max_tokens=2)
    assert trace.ids == [30, 10]
    assert trace.automaton.finish_reason == "length"


@pytest.mark.parametrize("harness", [False, True])
def test_maximum_zero_forces_at_once(harness: bool) -> None:
    trace = play_tokens([40, END], max_thinking=0, num_ignore=3, mask_first=True, harness=harness)
    assert trace.ids == [NEWLINE, *FORCED, 40]
    assert (trace.automaton.thinking, trace.automaton.thinking_end) == (0, "length")


def test_thinking_of_the_prompt_counts() -> None:
    trace = play_tokens([30, 31, END], thought=3, max_thinking=5, min_thinking=4)
    assert trace.ids == [30, 31, NEWLINE, *FORCED]
    assert trace.masked == [True, False, False]
    assert trace.automaton.thinking == 5


def test_the_first_token_after_the_prompts_thinking_may_be_end() -> None:
    """The mask of counted ignores is for the token after the start marker, which is past."""
    trace = play_tokens([END, END], thought=3, num_ignore=0, mask_first=True)
    assert trace.masked == [False, False]
    assert trace.ids == [*NATURAL]


@pytest.mark.parametrize("harness", [False, True])
@pytest.mark.parametrize(("ended", "newline"), [(True, ()), (False, (NEWLINE,))])
def test_a_prompt_beyond_the_maximum_is_forced_but_not_cut(
    harness: bool, ended: bool, newline: tuple[int, ...]
) -> None:
    trace = play_tokens([END], thought=7, newline_ended=ended, max_thinking=5, harness=harness)
    assert trace.ids == [*newline, *FORCED]


def test_a_row_outside_thinking_only_answers() -> None:
    trace = play_tokens([START, 40, END], think=False, ends=(), num_ignore=2)
    assert trace.ids == [START, 40]
    assert trace.automaton.thinking_end is None


def test_a_stop_string_finishes_from_outside() -> None:
    automaton = Automaton(THINKS)
    automaton.begin()
    automaton.step(START)
    automaton.finish()
    assert (automaton.phase, automaton.finish_reason) == (Phase.DONE, "stop")


# -- the harness's rounds -------------------------------------------------------------------


def test_harness_rounds_each_use_the_full_maximum_and_are_cut_together() -> None:
    """Rounds of 3, then a natural end beyond the cut: the end string is the natural one."""
    trace = play_tokens(
        [30, 31, START, 32, END, END], max_thinking=3, num_ignore=1, mask_first=True, harness=True
    )
    assert trace.ids == [30, 31, 10, *NATURAL]
    assert (trace.automaton.thinking, trace.automaton.thinking_end) == (3, "natural")


def test_harness_round_that_ends_by_length_is_the_last() -> None:
    """Its last character, which the cut removes, decides about the newline."""
    trace = play_tokens(
        [30, START, 31, 32, DOT_NEWLINE, END], max_thinking=3, num_ignore=9, harness=True
    )
    assert trace.ids == [30, *WAIT, *FORCED]
    assert (trace.automaton.waits, trace.automaton.thinking_end) == (1, "length")


def test_harness_rounds_may_pass_max_tokens_but_not_the_context() -> None:
    fields: dict[str, Any] = {"max_thinking": 4, "num_ignore": 5, "max_tokens": 9, "harness": True}
    tokens = [30, 31, 32, START] * 3
    assert play_tokens(tokens, room=1000, **fields).automaton.waits == 5
    trace = play_tokens(tokens, room=12, **fields)  # 3 + 2, 3 + 2, and 2 of the third round
    assert trace.automaton.waits == 2
    assert trace.automaton.thinking_end == "length"
    assert trace.ids == [30, 31, 32, 10, NEWLINE, *FORCED]
    # Now the context ends inside the second ignore text, before the newline in it.
    trace = play_tokens(tokens, room=9, ignore_ids=((10, NEWLINE),), **fields)
    assert (trace.automaton.waits, trace.automaton.thinking_end) == (2, "length")
    assert trace.ids == [30, 31, 32, 10, NEWLINE, *FORCED]


@dataclass(frozen=True)
class Stream:
    """A sampler by position and round: END or not, and what is drawn where END is masked."""

    tokens: tuple[int, ...]
    words: tuple[int, ...]

    def __call__(self, position: int, round_: int, masked: bool) -> int:
        token = self.tokens[(position + 7 * round_) % len(self.tokens)]
        if masked and token in (START, END):
            return self.words[(position + 3 * round_) % len(self.words)]
        return token


def harness_rounds(
    stream: Stream, maximum: int, num_ignore: int | None, minimum: int
) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """The evaluation harness, stated again: thinking, end string, finish reason.

    A round is one call of vLLM: at most `maximum` sampled tokens, of which the last may be the stop
    token that ends it; no stop token among the first `least`.
    """
    rounds = 1 if num_ignore is None else num_ignore + 1
    least = minimum if num_ignore is None else 1
    thinking: list[int] = []
    for i in range(rounds):
        before, reason = len(thinking), "length"
        for sampled in range(maximum):
            token = stream(before + sampled, i, sampled < least)
            thinking.append(token)
            if token in (START, END):
                reason = "stop"
                break
        text_ends_in_newline = thinking[-1] in (NEWLINE, DOT_NEWLINE)
        if reason == "length" or i == rounds - 1:
            break
        thinking.pop()  # the stop token
        thinking += WAIT
    cut = thinking[:maximum]
    if reason == "length":
        end = FORCED if text_ends_in_newline else (NEWLINE, *FORCED)
    else:
        end = NATURAL
        if cut[-1] in (START, END):
            cut.pop()
    return tuple(cut), end, "length" if reason == "length" else "natural"


TOKENS = (30, 31, 32, 33, 34, 35, START, END, NEWLINE, DOT_NEWLINE)
WORDS = (36, 37, NEWLINE)
# Bytes that are mapped to ids: drawing lists of ids would take most of the time.
streams_st = st.builds(
    lambda tokens, words: Stream(
        tuple(TOKENS[byte % len(TOKENS)] for byte in tokens),
        tuple(WORDS[byte % len(WORDS)] for byte in words),
    ),
    st.binary(min_size=1, max_size=23),
    st.binary(min_size=1, max_size=3),
)

CASES, MANY = 2_000, 10_000


def cases(count: int) -> settings:
    """The same cases in every run: a failure here is a failure everywhere."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def check_harness(
    stream: Stream, maximum: int, num_ignore: int | None, minimum: int, answer: int
) -> None:
    minimum = min(minimum, maximum) if num_ignore is None else 0
    program = replace(
        THINKS,
        max_thinking=maximum,
        min_thinking=minimum,
        num_ignore=num_ignore or 0,
        mask_first=num_ignore is not None,
        max_tokens=maximum + 1 + len(FORCED) + answer,
        harness=True,
    )

    def draw(automaton: Automaton, masked: bool) -> int:
        if automaton.phase is Phase.ANSWER:
            return 40
        return stream(automaton.thinking, automaton.waits, masked)

    trace = play(program, draw)
    thinking, end, reason = harness_rounds(stream, maximum, num_ignore, minimum)
    assert trace.thinking == thinking
    assert trace.of("end") == end
    assert trace.automaton.thinking_end == reason
    assert trace.automaton.thinking == len(thinking)
    assert trace.kinds[len(thinking) :] == ["end"] * len(end) + ["answer"] * (
        program.max_tokens - len(thinking) - len(end)
    )


harness_st = given(
    streams_st,
    st.integers(1, 24),
    st.none() | st.integers(0, 4),
    st.integers(0, 5),
    st.integers(0, 3),
)
test_harness_equals_the_round_loop = cases(CASES)(harness_st(check_harness))
test_harness_equals_the_round_loop_at_length = pytest.mark.slow(
    cases(MANY)(harness_st(check_harness))
)


def test_round_loop_reaches_every_kind_of_end() -> None:
    """The comparison above is not empty: its streams end in all four ways."""
    seen = set()
    for at in range(1, 12):
        stream = Stream((30,) * at + (START,), (36,))
        for maximum in range(1, 20):
            thinking, _, reason = harness_rounds(stream, maximum, 2, 0)
            seen.add((reason, len(thinking) == maximum))
    assert seen == {("natural", False), ("natural", True), ("length", True)}
    # Cut, though the last round stopped by itself: natural, at the maximum, with a longer trace.
    stream = Stream((30, 30, 30, START), (36,))
    assert len(harness_rounds(stream, 100, 2, 0)[0]) > 5
    assert harness_rounds(stream, 5, 2, 0)[1:] == (NATURAL, "natural")


# -- total accounting: what always holds ----------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A random program under total accounting, with its sampler."""

    program: Program
    stream: Stream

    def draw(self, automaton: Automaton, masked: bool) -> int:
        return self.stream(automaton.generated, automaton.waits, masked)


IGNORE_TEXTS: tuple[tuple[tuple[int, ...], ...], ...] = (
    (WAIT,),
    ((),),
    ((10,), (11, 12, NEWLINE), ()),
    ((10, NEWLINE, 11, 12), (12,)),
)


@st.composite
def setting_st(draw: st.DrawFn) -> Setting:
    maximum = draw(st.none() | st.integers(0, 24))
    thought = draw(st.sampled_from([0, 0, 0, 1, 5, 30]))
    needed = 1 if maximum is None else max(0, maximum - thought) + 1 + len(FORCED)
    num_ignore = draw(st.none() | st.integers(0, 4))
    program = replace(
        THINKS,
        max_thinking=maximum,
        min_thinking=draw(st.integers(0, 10 if maximum is None else maximum)),
        thought=thought,
        newline_ended=bool(thought) and draw(st.booleans()),
        num_ignore=num_ignore or 0,
        mask_first=num_ignore is not None,
        max_tokens=needed + draw(st.integers(0, 20)),
        ignore_ids=draw(st.sampled_from(IGNORE_TEXTS)),
        stop_ids=frozenset({END, 34}),
    )
    return Setting(program, draw(streams_st))


def check_total(setting: Setting) -> None:
    p = setting.program
    ceiling = p.max_tokens if p.max_thinking is None else max(0, p.max_thinking - p.thought)

    def at_every_moment(trace: Trace) -> None:
        assert len(trace.thinking) <= ceiling
        assert trace.automaton.thinking == p.thought + len(trace.thinking)
        assert len(trace.ids) <= p.max_tokens
        assert not {START, END} & set(trace.thinking)
        assert trace.automaton.waits <= p.num_ignore

    trace = play(p, setting.draw, at_every_moment)
    automaton, end = trace.automaton, trace.of("end")
    assert automaton.finish_reason in ("stop", "length")
    if automaton.finish_reason == "length" and automaton.thinking_end != "natural":
        assert len(trace.ids) == p.max_tokens
    # The kinds come in order: thinking and ignore texts, one end, one answer.
    order = {"thinking": 0, "ignore": 0, "end": 1, "answer": 2}
    ranks = [order[kind] for kind in trace.kinds]
    assert ranks == sorted(ranks)
    if automaton.thinking_end == "length":
        assert len(trace.thinking) == ceiling
        last = trace.thinking[-1] in p.newline_enders if trace.thinking else p.newline_ended
        assert end == (FORCED if last else (NEWLINE, *FORCED))
    elif automaton.thinking_end == "natural":
        assert automaton.waits == p.num_ignore
        assert automaton.thinking >= p.min_thinking
        if p.mask_first and not p.thought:
            assert trace.thinking
        assert end in (NATURAL, ())
        assert end or len(trace.ids) + len(NATURAL) > p.max_tokens
    else:
        assert not end and "answer" not in trace.kinds
    assert not (p.stop_ids | {START, END}) & set(trace.of("answer"))


test_total_keeps_its_promises = cases(CASES)(given(setting_st())(check_total))
test_total_keeps_its_promises_at_length = pytest.mark.slow(
    cases(MANY)(given(setting_st())(check_total))
)


@given(st.integers(0, 6), st.integers(1, 5), st.integers(0, 30), st.booleans())
@cases(500)
def test_a_model_that_always_stops_is_ignored_exactly_n_times(
    num_ignore: int, every: int, spare: int, mask_first: bool
) -> None:
    """Where the budget suffices: N ignores of two tokens after stretches of `every`."""
    enough = num_ignore * (every + len(WAIT)) + every + 1
    program = replace(
        THINKS,
        max_thinking=enough + spare,
        num_ignore=num_ignore,
        mask_first=mask_first,
        max_tokens=enough + spare + 10,
    )
    stretch = every + len(WAIT)

    def draw(automaton: Automaton, _: bool) -> int:
        done = automaton.thinking - automaton.waits * stretch
        return END if automaton.phase is Phase.ANSWER or done == every else 30

    trace = play(program, draw)
    assert trace.automaton.waits == num_ignore
    assert trace.automaton.thinking_end == "natural"
    assert trace.thinking == ((30,) * every + WAIT) * num_ignore + (30,) * every


@given(setting_st(), st.integers(0, 24), st.integers(0, 4))
@cases(500)
def test_shorter_budgets_think_a_prefix(setting: Setting, smaller: int, fewer: int) -> None:
    """Under one sampler by position, the trace cut at b is a prefix of the trace cut at b' > b, and
    the trace with N ignores one of that with N' > N."""
    p = replace(
        setting.program,
        max_thinking=24,
        min_thinking=0,
        thought=0,
        newline_ended=False,
        max_tokens=40,
        mask_first=True,
    )

    def thinking(program: Program) -> tuple[int, ...]:
        def draw(automaton: Automaton, masked: bool) -> int:
            return setting.stream(automaton.generated, 0, masked)

        return play(program, draw).thinking

    whole = thinking(p)
    assert thinking(replace(p, max_thinking=smaller)) == whole[:smaller]
    part = thinking(replace(p, num_ignore=min(fewer, p.num_ignore)))
    assert part == whole[: len(part)]
