"""Is the answer right? Found in the text by s1's rules, graded without an API key.

What counts as the answer (simplescaling/s1, lm_eval/tasks/openai_math/utils.py), after the last
marker of an answer where the model wrote one itself: the last \\boxed{} or \\fbox{}; else what
follows "Answer:", as a cut thought's forced "Final Answer:" does; else the whole text. s1's
pattern takes everything from the first "Answer:" and leaves the rest to gpt-4o-mini; without that,
the last one counts. Then

    integer   digits are compared as numbers; anything else as mathematics
    math      math-verify: equal as expressions, sets, intervals, matrices, words
    letter    the letter chosen; or the one choice whose text the answer repeats. s1 takes "A" where
              it finds none: here that is wrong

Grading runs in worker processes (`python -m s1fast.grading`, one JSON line each way). What a model
writes can keep computer algebra busy for ever, or fill the memory, in code that no signal
interrupts: a worker over its time limit is killed, and the answer is wrong. Where the run itself is
killed, its workers end by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s1fast.errors import InputError

LIMIT_S = 10.0
"""Longest time to grade one answer; the 500 of MATH500 take 4 ms each."""
START_S = 120.0
"""Longest time for a worker to import computer algebra."""
WORKER_BYTES = 4 << 30
"""Address space of a worker."""
LONGEST = 4000
"""Characters, from the end, that are searched where nothing marks the answer."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The verdict on one answer."""

    correct: bool
    extracted: str = ""
    """What was taken for the answer; empty if there was none."""
    vote: str = ""
    """The same for equal answers, as majority voting needs; empty if there was none."""
    why: str = ""
    decided: bool = True
    """False where a reader might still find it right: no digits or letter decided it."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answer to be graded."""

    kind: str
    """integer, math or letter, as in tasks.py."""
    gold: str
    answer: str
    choices: tuple[str, ...] = ()


def grade(item: Item) -> Grade:
    """Grades in this process, without time limit: Graders is what to use on a model's answers."""
    text, rule = extract(item.answer)
    if not text:
        return Grade(correct=False, why="no answer")
    if item.kind == "letter":
        return _grade_letter(item, text, rule)
    number = _whole_number(text)
    wanted = _whole_number(item.gold)
    if number is not None and wanted is not None:
        sign = "==" if number == wanted else "!="
        why = f"{rule}: {number} {sign} {wanted} as whole numbers"
        return Grade(correct=number == wanted, extracted=text, vote=str(number), why=why)
    return _grade_math(item.gold, text, rule)


def extract(answer: str) -> tuple[str, str]:
    """The part of an answer that states the result, and the rule that found it."""
    for marker in ("<|im_start|>answer\n", "</think>", "<|im_start|>"):
        if marker in answer:  # a model that was not made to think may do so by itself
            answer = answer.rpartition(marker)[2]
            break
    box = boxed(answer)
    if box is not None:
        return box, "boxed"
    marks = list(re.finditer(r"(?i)answer\**\s*:\s*", answer))
    if marks:
        return answer[marks[-1].end() :].strip("* \n\t"), "after the mark"
    return answer.strip()[-LONGEST:], "whole text"


_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(\{|(?<=\s)[^\s$]+)|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    """The content of the last whole \\boxed{} or \\fbox{}; `\\boxed 5` counts, too.

    Of nested boxes that is the inner one. Braces after a backslash are written, not grouping.
    """
    found, last = None, -1
    opened: list[int] = []  # where the content of a box begins; -1 for other braces
    for match in _BRACES.finditer(text):
        if match[1] and match[1] != "{":
            found, last = match[1], match.start()
        elif match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if match[1] else -1)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start > last:
                found, last = text[start : match.start()].strip(), start
    return found


def _whole_number(text: str) -> int | None:
    """The number that a text is, thousands apart or not; None where it is anything else."""
    bare = re.sub(r"\\text\{\s*\}|[$*]", "", text).strip().rstrip(".")
    bare = re.sub(r"(?<=\d)(?:,|\\[!,;]|\{,\}|\s)+(?=\d{3}(?!\d))", "", bare)
    bare = re.sub(r"^([+-])\s+", r"\1", bare)
    return int(bare) if re.fullmatch(r"[+-]?\d{1,1000}", bare) else None


# -- letters ------------------------------------------------------------------------------------


def _grade_letter(item: Item, text: str, rule: str) -> Grade:
    letter = _letter(text, item.choices)
    if letter is None:
        why = f"{rule}: no letter of a choice, nor the text of one"
        return Grade(correct=False, extracted=text[-500:], why=why, decided=False)
    right = letter == item.gold
    why = f"{rule}: {letter} {'==' if right else '!='} {item.gold}"
    return Grade(correct=right, extracted=letter, vote=letter, why=why)


def _letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter chosen: the text's only one, its first, or the last that it calls the answer; or
    that of the choice which it repeats. Without choices there may be up to eight."""
    one = f"([A-{'ABCDEFGH'[len(choices) - 1]}])"
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", "", text).strip()
    alone = re.fullmatch(rf"\W*{one}\W*", bare, re.IGNORECASE)
    if alone:
        return alone[1].upper()
    follows = r"(?:[\W_]*[).:,*]|\s*\n|\s*[-\u2013\u2014]\s|\s+(?:because|since)\b)"
    leading = re.match(rf"[\W_]*{one}{follows}", bare)
    if leading:
        return leading[1]
    named = r"(?i:answer|choice|option)(?i:\s+(?:is|must\s+be|should\s+be|therefore|thus))*"
    praised = r"(?i:\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b)"
    said = re.findall(rf"{named}[\s:*({{$]*{one}(?![\w'])|(?<![\w']){one}{praised}", bare)
    marked = re.findall(rf"\({one}\)|\*\*{one}\*\*|(?<!\w){one}\)", bare)
    if said or marked:
        return "".join((said or marked)[-1])
    same = [i for i, choice in enumerate(choices) if _folded(choice) == _folded(bare)]
    return "ABCD"[same[0]] if len(same) == 1 else None


def _folded(text: str) -> str:
    return re.sub(r"[\s$*.]+", "", text).lower()


# -- mathematics --------------------------------------------------------------------------------


def _grade_math(gold: str, text: str, rule: str) -> Grade:
    wanted = _parse(f"${gold}$")
    shown = text
    if rule == "boxed":
        given = _parse(f"\\boxed{{{text}}}")
    else:
        if rule == "after the mark":  # in its line, or below it
            shown = text.splitlines()[0].strip().rstrip(".").strip("*")
        given = _parse(f"\\boxed{{{shown}}}" if _is_bare_latex(shown) else shown)
        if not given and not _same_words(gold, shown):
            shown, given = text, _parse(text[-LONGEST:])
    vote = _vote(given[0]) if given else _folded(shown)
    correct = _same_words(gold, shown) or (bool(given) and _equal(wanted, given))
    why = f"{rule}: {'equal to' if correct else 'not equal to'} {gold} by math-verify"
    other = _other_base(gold, shown)
    if correct and other:
        correct, why = False, f"{rule}: {other}"
    return Grade(correct=correct, extracted=shown[-500:], vote=vote[:500], why=why, decided=correct)


def _is_bare_latex(text: str) -> bool:
    """Mathematics without its dollar signs, as a forced "Final Answer:" often gets it."""
    rest = re.sub(r"\\(?:begin|end|text|mbox|mathrm)\{[^{}]*\}|\\[A-Za-z]+|\\.", " ", text)
    return len(text) <= 200 and not re.search(r"[A-Za-z]{2,}|\$", rest)


def _vote(value: Any) -> str:
    """Numbers as decimals, so that 1/2 and 0.5 are one; the rest as computer algebra writes it."""
    value = getattr(value, "rhs", value)  # of x = 5
    try:
        return f"{float(value.doit().evalf()):.10g}"
    except (AttributeError, TypeError, ValueError, OverflowError):
        return str(value)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def _equal(wanted: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(wanted, given, timeout_seconds=None))


def _same_words(gold: str, text: str) -> bool:
    """A gold answer in words, as \\text{east} or \\text{(C)}, against plain words."""
    inner = re.fullmatch(r"\\(?:text|mbox)\{\(?([^{}]+?)\)?\}", gold.strip())
    if inner is None:
        return False
    plain = re.sub(r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}", r"\1", text)
    return _folded(plain.strip("() $*.")) == _folded(inner[1])


def _other_base(gold: str, text: str) -> str:
    """math-verify drops subscripts, so 52_8 would equal 52_9. No base at all is let pass."""
    base = re.compile(r"\d_\{?(\d+)\}?$")
    ours, theirs = base.search(gold.strip()), base.search(text.strip(" $."))
    if ours is None or theirs is None or ours[1] == theirs[1]:
        return ""
    return f"in base {theirs[1]}, not {ours[1]}"


# -- worker processes ---------------------------------------------------------------------------


class Graders:
    """Worker processes that grade; a context manager that ends them.

    Args:
        workers: processes; each holds computer algebra, about 100 MB.
        limit_s: longest time for one answer, after which it is wrong.

    Raises:
        InputError: math-verify is not installed.
    """

    def __init__(self, workers: int = 2, limit_s: float = LIMIT_S) -> None:
        from importlib.util import find_spec

        if find_spec("math_verify") is None:
            raise InputError("grading needs math-verify: pip install 's1fast[eval]'")
        self._limit_s, self._workers = limit_s, workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker() for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._all:
            worker.stop()

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """The verdicts, in the items' order."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(self._grade, items))

    def _grade(self, item: Item) -> Grade:
        worker = self._idle.get()
        try:
            reply = worker.ask(asdict(item), self._limit_s)
        finally:
            self._idle.put(worker)
        if reply is None:
            text, rule = extract(item.answer)
            why = f"{rule}: not graded within {self._limit_s:g} s"
            return Grade(correct=False, extracted=text[-500:], why=why, decided=False)
        return Grade(**reply)


class _Worker:
    """One process, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any] | None:
        """The reply; None if it did not come in time or the process died over it."""
        process = self._process
        if process is None or process.poll() is not None:  # killed from outside, for its memory
            self.stop()
            process = self._start(limit_s)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _line(process, limit_s)
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        self.stop()
        return None

    def _start(self, limit_s: float) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "s1fast.grading", str(2 * limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then ends its workers
        )
        if not _line(self._process, START_S):
            self.stop()
            raise InputError("grading: no worker process starts; see python -m s1fast.grading")
        return self._process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """The next line of its output; empty if there is none in time. A reply is one write."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], limit_s)
    return process.stdout.readline() if ready else b""


def serve(limit_s: float) -> None:
    """The worker: grades what comes on stdin, line by line, until it ends.

    An answer that takes longer than limit_s ends the process, by the signal's default action:
    nobody else may be left to do it.
    """
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever else prints does not mix with the replies
    grade(Item(kind="math", gold="1/2", answer="\\boxed{0.5}"))  # imports, and fills caches
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        item = Item(**json.loads(line))
        reply = Grade(correct=False, why="computer algebra failed on it", decided=False)
        with contextlib.suppress(Exception):
            reply = grade(item)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(asdict(reply)).encode() + b"\n")


if __name__ == "__main__":
    serve(float(sys.argv[1]))
