"""Grading: which part of an answer counts, whether it is right, and nothing that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from s1fast.grading import Grade, Graders, Item, _Worker, boxed, extract, grade
from s1fast.tasks import Problem, load

pytest.importorskip("math_verify", reason="no math-verify; unproven: grading")


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders(2) as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "text", "rule"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", "boxed"),
        (r"\boxed{3}, no: \boxed{ 7 }", "7", "boxed"),
        (r"\fbox{5} it is", "5", "boxed"),
        (r"$\boxed 5$", "5", "boxed"),
        (r"Answer: 4, that is \boxed{4}", "4", "boxed"),  # a box goes before the mark
        (r"\boxed{3} and cut in \boxed{4", "3", "boxed"),
        ("\nFinal Answer: 42", "42", "after the mark"),
        ("**Final Answer:** 42", "42", "after the mark"),
        ("**Answer**: 42", "42", "after the mark"),
        ("ANSWER :42", "42", "after the mark"),
        ("Answer: 1\nNo. Answer: 2", "2", "after the mark"),
        ("Answer: Here it is:\n\n10", "Here it is:\n\n10", "after the mark"),
        ("I get \\boxed{3}<|im_start|>answer\nAnswer: 4", "4", "after the mark"),
        ("\\boxed{3}?</think>\nIt is 4", "It is 4", "whole text"),
        ("<|im_start|>think\n3<|im_start|>answer\n4<|im_start|>5", "4<|im_start|>5", "whole text"),
        ("The result is 9.", "The result is 9.", "whole text"),
        (" \n", "", "whole text"),
    ],
)
def test_extraction(answer: str, text: str, rule: str) -> None:
    assert extract(answer) == (text, rule)


def test_boxes_nest() -> None:
    assert boxed(r"\boxed{\{1\pm\sqrt{5},-2\}}") == r"\{1\pm\sqrt{5},-2\}"
    assert boxed(r"\boxed{\boxed{4}}") == "4"
    assert boxed(r"\boxed{4} \fbox{\boxed{5} 6}") == "5", "the last that begins"
    cases = r"f(x) = \left\{\begin{array}{l} 1 \\ 2 \end{array}\right."
    assert boxed(rf"\boxed{{{cases}}}") == cases, "a written brace needs no second"
    assert boxed("no box") is None and boxed(r"\boxed{open") is None


def test_a_loop_of_boxes_takes_no_time() -> None:
    """A model repeats itself until it is cut. Where a worker gives up, the run itself extracts."""
    began = time.monotonic()
    assert boxed("\\boxed{" * 20_000 + "1") is None
    assert time.monotonic() - began < 2


MATH = [
    # gold, answer, right
    ("18", "Final Answer: 18 dollars", True),
    ("18", "Final Answer: $18.00", True),
    ("18", "Final Answer: She makes 9 * 2 = $18 every day.", True),
    ("18", "Answer: 18\n\nJanet sells 16 - 3", True),
    ("18", "Final Answer: 17\n\nor 18?", False),
    ("64", "Final Answer: 8 * 8 = 64", True),
    ("1800", "Final Answer: 1,800", True),
    ("5", "Final Answer: x = 5", True),
    ("10", "Answer: Here is the solution:\n\n10", True),
    ("0.5", "Answer: 50%", True),
    (r"\frac12", "so it is 1/2", True),
    (r"\frac{1}{3}", r"\boxed{0.33}", False),
    ("p - q", r"\boxed{-q + p}", True),
    ("p - q", r"\boxed{q - p}", False),
    ("1,-2", r"\boxed{-2, 1}", True),
    ("1,-2", r"\boxed{-2}", False),
    ("1,2", r"\boxed{2,1}", True),  # a list, not the number 12
    ("12", r"\boxed{1,2}", False),
    ("3,5,7", "Answer: 7, 5, 3", True),
    ("58,500", r"\boxed{58500}", True),
    ("11111", r"\boxed{11{,}111}", True),
    ("(3,4]", r"\boxed{(3,4]}", True),
    ("(3,4]", r"\boxed{(3,4)}", False),
    ("52_8", r"\boxed{52_{8}}", True),
    ("52_8", r"\boxed{52_9}", False),  # math-verify alone would take it
    ("52_8", r"\boxed{52}", True),  # the question names the base
    (r"\text{east}", "Answer: East.", True),
    (r"\text{even}", "Answer: odd", False),
    (r"\text{(C)}", r"\boxed{\text{C}}", True),
    (r"864 \mbox{ inches}^2", r"\boxed{864}", True),  # units are not compared
    (r"90^\circ", r"\boxed{90}", True),
    ("5", "", False),
    ("5", "I do not know", False),
]


@pytest.mark.parametrize(("gold", "answer", "right"), MATH)
def test_mathematics(gold: str, answer: str, right: bool) -> None:
    found = grade(Item(kind="math", gold=gold, answer=answer))
    assert found.correct is right, found
    assert found.why


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("033", r"\boxed{33}", True),
        ("33", "Final Answer: $033$.", True),
        ("33", r"\boxed{\frac{66}{2}}", True),
        ("33", r"\boxed{m+n=33}", True),
        ("33", r"\boxed{34}", False),
        ("33", r"\boxed{-33}", False),
        ("33", r"\boxed{3 3 0}", False),
        ("33", r"\boxed{3,3}", False),
        ("330", r"\boxed{- 330}", False),
    ],
)
def test_whole_numbers(gold: str, answer: str, right: bool) -> None:
    assert grade(Item(kind="integer", gold=gold, answer=answer)).correct is right


CHOICES = ("proton decay", "electron", "A neutron", "muon")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        (r"\boxed{A}", "A"),
        (r"\boxed{\text{B}}", "B"),
        ("Answer: (A)", "A"),
        ("Answer: B) electron", "B"),
        ("**A** - because", "A"),
        ("b", "B"),
        ("I think the answer is **D**", "D"),
        ("So choice D is right, not A.", "D"),
        ("The correct option is (C), since (A) fails.", "C"),
        ("Final Answer: electron.", "B"),
        ("A neutron", "C"),
        ("Final Answer: C because muons decay", "C"),
        ("Since A fails, B is correct.", "B"),
        ("So the answer must be D.", "D"),
        ("Answer: The answer is therefore B, since A is false", "B"),
        ("A proton is it", ""),
        ("none of them", ""),
        ("", ""),
    ],
)
def test_letters(answer: str, letter: str) -> None:
    for gold in "ABCD":
        item = Item(kind="letter", gold=gold, answer=answer, choices=CHOICES)
        assert grade(item).correct is (gold == letter)  # s1 takes A where there is no letter


def test_votes_agree_where_answers_do() -> None:
    def vote(answer: str) -> str:
        return grade(Item(kind="math", gold="1", answer=answer)).vote

    halves = (r"\boxed{\frac{1}{2}}", "Answer: 0.5", "Answer: 50%", r"\boxed{x=\frac24}")
    assert {vote(answer) for answer in halves} == {"0.5"}
    assert vote(r"\boxed{5}") == vote("Answer: 5.0") == "5"
    assert vote(r"\boxed{\sqrt{2}}") != vote(r"\boxed{\sqrt{3}}")
    assert vote("") == ""


# -- real gold answers --------------------------------------------------------------------------


def perturbed(gold: str) -> Iterator[str]:
    """Other values, never another way of writing this one; units, which are ignored, stay."""
    plain = re.sub(r"\\(?:text|mbox)\{ [^}]*\}(?:\^\d)?", "", gold)
    for number in re.finditer(r"\d+", plain):
        yield plain[: number.start()] + str(int(number[0]) + 1) + plain[number.end() :]
    if re.fullmatch(r"-?[\d.]+", plain) and float(plain):
        yield plain[1:] if plain[0] == "-" else "-" + plain
    for old, new in ((r"\sqrt", ""), (r"\pi", "e"), ("+", "-"), (r"\cot", r"\tan")):
        if old in plain:
            yield plain.replace(old, new, 1)
    for word in re.finditer(r"\\text\{(\(?)(\w)", plain):
        other = "x" if word[2] != "x" else "y"
        yield plain[: word.start(2)] + other + plain[word.end(2) :]
    if re.fullmatch(r"\(.*\]", plain):
        yield plain[:-1] + ")"


def math500(shared_data: Path) -> list[Problem]:
    problems = load(f"math500={shared_data / 'math500.jsonl'}")
    assert len(problems) == 500
    return problems


def grade_all(graders: Graders, problems: list[Problem], form: str) -> list[Grade]:
    items = [Item(kind=p.kind, gold=p.gold, answer=form % p.gold) for p in problems]
    return graders.grade(items)


def test_math500_agrees_with_itself(shared_data: Path, graders: Graders) -> None:
    problems = math500(shared_data)
    grades = grade_all(graders, problems, r"Thus we get $\boxed{%s}$.")
    assert [p.gold for p, g in zip(problems, grades, strict=True) if not g.correct] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    ["\nFinal Answer: %s", "**Final Answer:** $%s$.", "So we get $$%s$$", "Answer: it is $%s$\n"],
)
def test_math500_in_other_words(form: str, shared_data: Path, graders: Graders) -> None:
    problems = math500(shared_data)
    grades = grade_all(graders, problems, form)
    assert [p.gold for p, g in zip(problems, grades, strict=True) if not g.correct] == []


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_math500_rejects_other_values(every: int, shared_data: Path, graders: Graders) -> None:
    """Every number changed in turn, signs, roots, words, brackets: none may pass."""
    pairs = [(p, other) for p in math500(shared_data) for other in perturbed(p.gold)]
    assert len(pairs) > 1000 and len({p.id for p, _ in pairs}) > 490
    pairs = pairs[::every]
    items = [Item(kind="math", gold=p.gold, answer=rf"\boxed{{{o}}}") for p, o in pairs]
    grades = graders.grade(items)
    wrong = [(p.gold, o) for (p, o), g in zip(pairs, grades, strict=True) if g.correct]
    assert wrong == []


def test_aime_and_gsm8k_agree_with_themselves(shared_data: Path) -> None:
    problems = load(f"aime24={shared_data / 'aime24.jsonl'}")
    problems += load(f"gsm8k={shared_data / 'gsm8k_test.jsonl'}")
    assert len(problems) == 30 + 1319
    for p in problems:
        right = grade(Item(kind=p.kind, gold=p.gold, answer=f"\nFinal Answer: {p.gold}"))
        wrong = grade(Item(kind=p.kind, gold=p.gold, answer=rf"\boxed{{{int(p.gold) + 1}}}"))
        assert right.correct and not wrong.correct


# -- workers ------------------------------------------------------------------------------------


def test_what_never_ends_is_wrong_and_stops_nobody() -> None:
    endless = Item(kind="math", gold="5", answer=r"\boxed{10^{10^{10^{10}}}}")
    fine = Item(kind="math", gold="5", answer=r"\boxed{\frac{10}{2}}")
    with Graders(1, limit_s=1.5) as graders:
        graders.grade([fine])  # the worker is up
        began = time.monotonic()
        grades = graders.grade([fine, endless, fine])
        assert time.monotonic() - began < 30
    assert [g.correct for g in grades] == [True, False, True]
    assert "not graded within 1.5 s" in grades[1].why and not grades[1].decided


def test_a_killed_worker_is_replaced() -> None:
    item = Item(kind="math", gold="0.5", answer=r"\boxed{\frac12}")
    with Graders(1) as graders:
        assert graders.grade([item])[0].correct
        (worker,) = graders._all
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        assert graders.grade([item])[0].correct
        process = worker._process
    assert process.poll() is not None, "a worker outlives its grader"


def test_a_worker_outlives_nobody_for_long() -> None:
    """Its run was killed while it was at what never ends: it ends itself."""
    endless = Item(kind="math", gold="5", answer=r"\boxed{10^{10^{10^{10}}}}")
    worker = _Worker()
    process = worker._start(1.0)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(endless)).encode() + b"\n")
    process.stdin.flush()
    assert process.wait(timeout=20) == -signal.SIGALRM
    worker.stop()


@pytest.mark.parametrize("text", ["{" * 30, "9" * 5000, r"\frac" * 500, "\x00\ud800", "$" * 999])
def test_garbage_is_wrong(text: str, graders: Graders) -> None:
    for kind in ("integer", "math", "letter"):
        (found,) = graders.grade([Item(kind=kind, gold="5", answer=rf"\boxed{{{text}}}")])
        assert not found.correct
