"""From sources to a training set: collection, decontamination, features, selection, the whole."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import fake_gemini as fake
from s1fast.config import load_recipe
from s1fast.errors import InputError
from s1fast.grading import Graders
from s1fast.recipes import decontaminate as clean
from s1fast.recipes.asking import Pace
from s1fast.recipes.collect import SOURCES, collect, convert
from s1fast.recipes.distill import DistillConfig, distill
from s1fast.recipes.features import (
    FeatureConfig,
    featurise,
    final_result,
    read_subjects,
    subject_of,
    verify,
)
from s1fast.recipes.questions import question_hash
from s1fast.recipes.select import (
    AIME,
    GPQA,
    CurateConfig,
    _benchmark_weights,
    bad_format,
    curate,
    diversify,
    draw_rank,
    select,
)
from s1fast.trainer import train

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


# -- collection ---------------------------------------------------------------------------------

GPQA_ROW = {"Question": "Which?", "Explanation": "Because.", "Correct Answer": "right\n"}
YEARS = [{"ID": f"{y}-1", "Question": str(y), "Answer": 7} for y in (2022, 2023)]
GPQA_ROW |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}


def test_the_table_is_the_papers() -> None:
    assert len(SOURCES) == len({source.name for source in SOURCES}) == 16
    assert sum(source.paper for source in SOURCES) == 59029


def test_filters_and_mappings(tmp_path: Path) -> None:
    by_name = {source.name: source for source in SOURCES}
    nm = {"solution": "s", "source": "olympiads"}
    rows = [{**nm, "problem": "kept?"}, {**nm, "problem": "other?"}, {"problem": "x?"}]
    write(tmp_path / "numinamath.jsonl", [*rows, {**nm, "problem": "f?", "source": "aops_forum"}])
    write(tmp_path / "numinamath_500.jsonl", [{"problem": "kept?"}])
    found, skipped = convert(by_name["numinamath"], tmp_path)
    assert [row["question"] for row in found] == ["kept?", "f?"]
    assert found[1]["source_type"] == "AI-MO/NuminaMath-CoT/aops_forum"
    assert len(skipped) == 1 and "row 3: field source is missing" in skipped[0]
    write(tmp_path / "gpqa.jsonl", [GPQA_ROW, {**GPQA_ROW, "Question": "Diamond?"}])
    write(tmp_path / "gpqa_diamond.jsonl", [{"Question": "Diamond?"}])
    ((row,), _) = convert(by_name["gpqa"], tmp_path)
    letter = row["solution"][-1]
    assert f"({letter}) right" in row["question"] and row["question"].startswith("Which?\nAnswer C")
    clue = {"input": "x ### Clue: Feline (3)", "output": "CAT"}
    write(tmp_path / "xword.jsonl", [{**clue, "input": f"### Clue: {i}"} for i in range(1100)])
    assert len(convert(by_name["xword"], tmp_path)[0]) == 1000
    write(
        tmp_path / "aime.jsonl",
        [{"ID": f"{y}-1", "Question": str(y), "Answer": 7} for y in (2022, 2023)],
    )
    assert [r["question"] for r in convert(by_name["aime"], tmp_path)[0]] == ["2022"]


STREAMED = {
    "simplescaling/openaimath": {"problem": "P?", "solution": "s", "subject": "Algebra"},
    "daman1209arora/jeebench": {"question": "J?", "gold": "A", "subject": "phy"},
    "Idavidrein/gpqa": GPQA_ROW,
    "baber/agieval": {"question": "B?", "options": ["(A)x"], "passage": "", "solution": None},
}


def test_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub: its arguments, a break in the middle, and going on after it."""
    asked, broken = [], ["daman1209arora/jeebench"]

    def load_dataset(dataset: str, config: Any, *, split: str, streaming: bool) -> Any:
        asked.append((dataset, config, split, streaming))
        if config == "gpqa_diamond":
            yield {"Question": "Diamond?"}
            return
        yield STREAMED[dataset]
        if dataset in broken:
            raise ConnectionError("the network is gone")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    names = ("math", "jeebench", "agieval", "gpqa")
    with pytest.raises(InputError, match=r"jeebench.*network is gone.*--local"):
        collect(tmp_path, None, names, quiet())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["01-math.jsonl"]
    broken.clear()
    counts = collect(tmp_path, None, names, quiet())
    assert counts == {"math": 1, "jeebench": 1, "agieval": 16, "gpqa": 1}
    assert Counter(asked)["simplescaling/openaimath", None, "train", True] == 1
    assert ("baber/agieval", "sat_en", "few_shot", True) in asked
    assert asked[-2:] == [
        ("Idavidrein/gpqa", name, "train", True) for name in ("gpqa_diamond", "gpqa_extended")
    ]
    kinds = [r["source_type"] for r in read(tmp_path / "09-agieval.jsonl")]
    assert kinds[0] == "baber/agieval/sat_en"


def test_a_finished_source_is_not_read_again(tmp_path: Path) -> None:
    local, pool = tmp_path / "local", tmp_path / "pool"
    write(local / "s1-prob.jsonl", [{"question": "Q?", "solution": "A"}])
    with pytest.raises(InputError, match=r"no s1-teasers\.jsonl"):
        collect(pool, local, ("s1-prob", "s1-teasers"), quiet())
    (local / "s1-prob.jsonl").unlink()
    write(local / "s1-teasers.jsonl", [{"Question": "T?", "Answer": "B"}])
    counts = collect(pool, local, ("s1-prob", "s1-teasers"), quiet())
    assert counts == {"s1-prob": 1, "s1-teasers": 1}
    with pytest.raises(InputError, match="--only maths: no such source"):
        collect(pool, local, ("maths",), quiet())


# -- decontamination ----------------------------------------------------------------------------

PLANTED = "the quick brown fox jumps over the lazy dog today"


@pytest.mark.parametrize(
    "text",
    [
        f"Why does {PLANTED} again",
        f"WHY {PLANTED.upper()}",
        "so  the\tquick\nbrown fox\u00a0jumps over the lazy dog",
        "\uff54he quick brown \ufb01ne fox the quick brown fox jumps over the \uff4cazy ends",
    ],
)
def test_planted_words_are_found(text: str) -> None:
    tests = clean.ngrams(PLANTED)
    ((_, reason),) = clean.decontaminate([{"question": text}], tests)
    assert reason == "test"


def test_seven_words_and_short_questions() -> None:
    tests = clean.ngrams(PLANTED) | clean.ngrams("What is 2 + 2?")
    rows = [{"question": q} for q in ("the quick brown fox jumps over the hill", "WHAT is 2  + 2?")]
    assert [reason for _, reason in clean.decontaminate(rows, tests)] == ["", "test"]


def test_sources_among_each_other_and_exact_duplicates() -> None:
    a, b = {"source_type": "a/x/1"}, {"source_type": "a/x/2"}
    rows = [
        {"question": PLANTED, **a},
        {"question": f"And {PLANTED}", **b},  # the same source: may resemble
        {"question": PLANTED, **b},
        {"question": f"But {PLANTED}", "source_type": "c/d"},
        {"question": f"{PLANTED} if", "source_type": AIME},
    ]
    reasons = [reason for _, reason in clean.decontaminate(rows, set())]
    assert reasons == ["", "", "duplicate", "source", ""]
    mixed = [rows[0], rows[3], rows[1], rows[4]]  # the sources' rows need not stand together
    assert [reason for _, reason in clean.decontaminate(mixed, set())] == ["", "", "source", ""]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), min_size=1))
def test_no_false_positive_on_disjoint_words(texts: list[list[str]]) -> None:
    tests = set().union(*(clean.ngrams(" ".join(words)) for words in texts))
    rows = [{"question": " ".join(w.upper() + "x" for w in words)} for words in texts]
    assert "test" not in {reason for _, reason in clean.decontaminate(rows, tests)}


def test_s1k_against_the_benchmarks(shared_data: Path) -> None:
    """Reported in recipes/README.md: AIME questions, which s1 added after its filter, and 20."""
    tests = clean.read_ngrams([shared_data / "math500.jsonl", shared_data / "aime24.jsonl"])
    rows = read(shared_data / "s1k_released_questions.jsonl")
    flagged = [row for row in rows if not tests.isdisjoint(clean.ngrams(row["question"]))]
    aime = sum(row.get("source_type") == AIME for row in flagged)
    assert (aime, len(flagged)) == (74, 94)


def test_59k_questions_in_a_minute(shared_data: Path) -> None:
    rows = read(shared_data / "s1k_released_questions.jsonl")
    many = [
        {"question": f"{r['question']} {i}", "source_type": f"s/{i}"}
        for i in range(59)
        for r in rows
    ]
    began = time.perf_counter()
    assert sum(1 for _ in clean.decontaminate(many, set())) == 59000
    assert time.perf_counter() - began < 60


def test_ray_agrees(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token file in the home folder
    ray = pytest.importorskip("ray", reason="no ray; unproven: Ray Data's stage equals one process")
    rows = read(shared_data / "s1k_released_questions.jsonl")
    tests = clean.read_ngrams([shared_data / "math500.jsonl"])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        flags = clean.flag_with_ray(rows, tests, 2)
    finally:
        ray.shutdown()
    assert flags == [not tests.isdisjoint(clean.ngrams(row["question"])) for row in rows]
    assert 0 < sum(flags) < 100


# -- grading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders(1) as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", r"it is \boxed{0.5}", True),
        ("Answer: 12", "reasons\n#### 12", True),
        (r"\boxed{13}", "Answer: 12", False),
        ("The choice is (B)", "Because.\n\nAnswer: B", True),
        (r"\boxed{C}", "Because.\n\nAnswer: B", False),
        ("I think that a field A is there, so the answer is E.", "Answer: E", True),
        ("", "Answer: 12", False),
        ("anything", "A proof without a result. " * 9, None),
    ],
)
def test_verify(answer: str, solution: str, right: bool | None, graders: Graders) -> None:
    assert verify([answer], [solution], graders) == [right]


def test_final_result() -> None:
    assert final_result(r"\boxed{1} then \boxed{\sqrt{x^{2}}}.") == r"\sqrt{x^{2}}"


def test_gold_grades_itself(shared_data: Path, graders: Graders) -> None:
    rows = read(shared_data / "math500.jsonl")[:100]
    answers = [rf"\boxed{{{r['answer']}}}" for r in rows]
    right = verify(answers, [r["solution"] for r in rows], graders)
    assert sum(found is True for found in right) >= 97


@pytest.mark.parametrize(
    ("reply", "subject"),
    [
        ("It counts.\n05", "Combinatorics"),
        ("**51**.", "Geometry"),
        ("Of 51 it needs little; its code is 05 (Combinatorics)", None),  # two: which one?
        ("Not 51.\nCode: 05 (Combinatorics)", "Combinatorics"),
        ("As of MSC 2005", None),
        ("99", None),
        ("", None),
    ],
)
def test_a_classifiers_code(reply: str, subject: str | None) -> None:
    assert subject_of(reply, {"05": "Combinatorics", "51": "Geometry"}) == subject


# -- selection ----------------------------------------------------------------------------------


def row(
    i: int, subject: str = "a", length: int = 100, source: str = "x", **more: Any
) -> dict[str, Any]:
    question = f"Question {i}?"
    values = {"question": question, "question_hash": question_hash(question), "thinking": "t"}
    values |= {"answer": "a", "subject": subject, "length": length, "source_type": source}
    values |= {"teacher_correct": False, "solver_correct_0": False, "solver_correct_1": False}
    return {**values, **more}


def test_filters_by_hand() -> None:
    rows = [
        row(0, source=AIME, teacher_correct=True, question="[asy] draw p1. ![Image]"),
        row(1, solver_correct_0=True),
        row(2, solver_correct_1=True),
        row(3, question="see p12. there"),
        row(4, question="![Image](x)"),
        row(5, question="**3cm**"),
        row(6, question="[asy] draw"),
        row(7, subject=None),
        row(8, refused="RECITATION"),
        row(9, source="qfq/openaimath/Algebra", length=5601, teacher_correct=True),
        row(10, source="qfq/openaimath/Algebra", length=5600, teacher_correct=True),
        row(11, source=GPQA),
        row(12, source=GPQA, teacher_correct=True),
    ]
    assert [bad_format(r) for r in rows[:7]] == [False] * 3 + [True] * 4
    chosen, counts = select(rows, CurateConfig(size=3))
    assert {r["question_hash"] for r in chosen} == {rows[i]["question_hash"] for i in (0, 9, 12)}
    assert counts == {
        "featurised": 11, "quality": 7, "difficulty": 5, "pre-selected": 3, "selected": 3,
    }  # fmt: skip
    with pytest.raises(InputError, match="--size 6: only 5 questions are left after difficulty"):
        select(rows, CurateConfig(size=6))


def test_cut_and_empty_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [row(i) for i in range(3)] + [row(3, finish_reason="MAX_TOKENS")]
    rows += [row(4, finish_reason="length"), row(5, answer="", finish_reason="STOP")]
    console = quiet()
    source = write(tmp_path / "f.jsonl", rows)
    curate([source], tmp_path / "set", CurateConfig(size=3), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "left out: 2 cut by the token limit" in said and "1 without an answer" in said
    assert len((tmp_path / "set" / "skipped.txt").read_text().splitlines()) == 3
    chosen, _ = select(rows, CurateConfig(subset="all"))
    assert chosen == rows[:3]


def test_ranks_halve() -> None:
    """Of three: 4/7, 2/7, 1/7; 5 standard deviations of 7,000 draws."""
    import random

    rng = random.Random(1)
    counts = Counter(draw_rank(3, rng) for _ in range(7000))
    for rank, expected in ((0, 4000), (1, 2000), (2, 1000)):
        assert abs(counts[rank] - expected) < 5 * 42


def test_benchmark_weights_by_hand() -> None:
    pool = [row(i, "a", source=AIME) for i in range(6)] + [row(6, "b", source=AIME)]
    pool += [row(7, "b", source=GPQA), row(8, "c", source=GPQA), row(9, "d")]
    assert _benchmark_weights(pool) == {"a": 6, "b": 1 + int(0.5 * 7 / 2), "c": int(0.5 * 7 / 2)}


POOLS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans(), st.booleans()),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(POOLS, st.integers(0, 3), st.integers(1, 40), st.booleans())
def test_invariants(
    pool: list[tuple[str, int, bool, bool]], seed: int, size: int, notebook: bool
) -> None:
    rows = [
        row(i, subject, length, source=AIME if aime else "x", teacher_correct=right)
        for i, (subject, length, aime, right) in enumerate(pool)
    ]
    config = CurateConfig(size=min(size, len(rows)), seed=seed, notebook=notebook)
    chosen, _ = select(rows, config)
    hashes = [r["question_hash"] for r in chosen]
    assert len(set(hashes)) == len(hashes) == config.size
    assert all(r in rows for r in chosen)
    first = {r["question_hash"] for r in rows if r["source_type"] == AIME and r["teacher_correct"]}
    assert first <= set(hashes) or set(hashes) <= first
    assert [r["question_hash"] for r in select(rows[::-1], config)[0]] == hashes  # any file order
    longest, _ = select(rows, dataclasses.replace(config, subset="longest", notebook=False))
    left = sorted(r["length"] for r in rows)[: len(rows) - config.size]
    assert not left or min(r["length"] for r in longest) >= max(left)


def test_subjects_are_drawn_evenly_and_by_seed() -> None:
    import random

    pool = [row(i, "big", i) for i in range(900)] + [row(1000 + i, "small", i) for i in range(100)]
    draws = [diversify(pool, [], 100, random.Random(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    small = sum(r["subject"] == "small" for r in draws[0])
    assert 25 <= small <= 75
    assert sum(r["length"] > 800 for r in draws[0] if r["subject"] == "big") > 25


def test_the_notebook_draws_by_benchmark_after_700() -> None:
    import random

    pool = [row(i, "even", i) for i in range(900)]
    pool += [row(1000 + i, "aime", i, source=AIME) for i in range(900)]
    chosen = diversify(pool, [], 1000, random.Random(0), notebook=True)
    assert 280 < sum(r["subject"] == "even" for r in chosen[:700]) < 420
    assert {r["subject"] for r in chosen[700:]} == {"aime"}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_real_questions_with_synthetic_features(
    form: Any, shared_data: Path, tmp_path: Path
) -> None:
    rows = read(shared_data / "s1k_released_questions.jsonl")
    rows += read(shared_data / "s1k_filter_notebook_sample_questions.jsonl")
    rows.append({"question": 3})
    for i, r in enumerate(rows[:-1]):
        r.update(row(i, f"subject {i % 30}", 300 + i, r.get("source_type") or "x") | {
            "question": r["question"], "question_hash": r["question_hash"],
        })  # fmt: skip
    source, output = write(tmp_path / "f.jsonl", rows), tmp_path / "set"
    curate([source], output, CurateConfig(size=500, format=form), quiet())
    import datasets

    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 500 and set(loaded["thinking"]) == {"t"}
    counts = json.loads((output / "report.json").read_text())["counts"]
    assert counts["pool"] == 2001 and counts["featurised"] == 1234  # most are in both files
    skipped = (output / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 767 and "row 2001: field question is int" in skipped[-1]
    for name in ("subjects.png", "lengths.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="exists already"):
        curate([source], output, CurateConfig(size=500), quiet())
    mixed = write(tmp_path / "m.jsonl", [row(0, note=1), row(1, note="one")])
    if form == "parquet":
        with pytest.raises(InputError, match=r"--format parquet: .*take --format jsonl"):
            curate([mixed], tmp_path / "mixed", CurateConfig(size=2, format=form), quiet())


# -- the whole ----------------------------------------------------------------------------------


def test_from_sources_to_training(
    shared_data: Path, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 real questions: collected, cleaned, distilled, featurised, 10 chosen, 3 steps trained."""
    local, pool = tmp_path / "local", tmp_path / "pool"
    write(local / "math.jsonl", read(shared_data / "math500.jsonl")[:30])
    released = read(shared_data / "s1k_released_questions.jsonl")[:30]
    write(local / "s1-prob.jsonl", [{k: r[k] for k in ("question", "solution")} for r in released])
    assert sum(collect(pool, local, ("math", "s1-prob"), quiet()).values()) == 60
    arguments = [str(pool), str(tmp_path / "clean.jsonl"), "--against"]
    arguments.append(str(shared_data / "aime24.jsonl"))
    monkeypatch.setattr(sys, "argv", ["decontaminate", *arguments])
    clean.main()
    cleaned = read(tmp_path / "clean.jsonl")
    assert 50 <= len(cleaned) < 60
    listed = (tmp_path / "clean.jsonl.skipped.txt").read_text().splitlines()
    assert len(listed) == 60 - len(cleaned)
    assert all(": shares eight words with a test question: " in line for line in listed)
    arguments[1] = arguments[3]  # onto the test questions
    with pytest.raises(SystemExit, match="2"):
        monkeypatch.setattr(sys, "argv", ["decontaminate", *arguments])
        clean.main()

    monkeypatch.setenv("GEMINI_API_KEY", "right-key")
    server = fake.FakeGemini()
    pace = Pace(first_wait_seconds=0.02, longest_wait_seconds=0.2)
    config = DistillConfig(model="known", base_url=server.url, pace=pace)
    traces = distill([tmp_path / "clean.jsonl"], tmp_path / "t.sqlite", config, quiet())
    assert len(read(traces)) == len(cleaned) and set(server.paid.values()) == {1}
    teacher = f"gemini:known@{server.url}"
    features = FeatureConfig(
        work=tmp_path / "work",
        tokenizer=str(shared_data / "qwen2.5_tokenizer.json"),
        solvers=(teacher, teacher),
        classifier=teacher,
        subjects=shared_data / "msc.json",
        pace=pace,
    )
    with pytest.raises(InputError, match="--classifier 'typo': expected gemini:MODEL"):
        wrong = dataclasses.replace(features, classifier="typo")
        featurise([traces], tmp_path / "f.jsonl", wrong, quiet())
    assert not features.work.exists(), "told before the solvers answer"
    target = featurise([traces], tmp_path / "f.jsonl", features, quiet())
    asked = server.seen.total()
    again = featurise([traces], tmp_path / "again.jsonl", features, quiet())
    assert server.seen.total() == asked and read(again) == read(target)  # cached by hash
    graded = featurise(
        [traces],
        tmp_path / "g.jsonl",
        dataclasses.replace(features, grader=teacher),
        quiet(),
    )
    priced = dataclasses.replace(pace, input_price=1.0, output_price=1.0, max_dollars=1e-6)
    with pytest.raises(InputError, match="--max-dollars 1e-06: reached"):  # by all four stores
        new = write(tmp_path / "new.jsonl", [{"question": "New?", "solution": "1"}])
        paid = dataclasses.replace(features, pace=priced)
        featurise([new], tmp_path / "h.jsonl", paid, quiet())
    kinds = Counter(r["teacher_correct"] for r in read(graded))
    assert kinds[True] > 10 and kinds[False] > 10
    server.shutdown()
    server.server_close()
    assert len(read_subjects(features.subjects)) == 61
    curate([target], tmp_path / "set", CurateConfig(size=10), quiet())

    recipe = load_recipe(ROOT / "recipes" / "smollm2-gsm8k-cpu.toml")
    run = dataclasses.replace(
        recipe,
        model=str(make_model("qwen2", max_position_embeddings=4096)),
        output=tmp_path / "run",
        batch_size=2,
        max_steps=3,
        data=dataclasses.replace(recipe.data, path=str(tmp_path / "set"), drop_long=True),
        checkpoint=dataclasses.replace(recipe.checkpoint, every=0),
    )
    train(run, Console(quiet=True))
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 3
