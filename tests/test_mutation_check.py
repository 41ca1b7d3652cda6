"""The check that breaks the code on purpose: it tells what was noticed from what was not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from mutation_check import MUTATIONS, ROOT, Mutation, check, mutated, python

TOY = {
    "s1fast/__init__.py": "def area(a, b):\n    unused = 1\n    return a * b\n",
    "tests/test_toy.py": """
import pytest, s1fast

def test_area():
    assert s1fast.area(2, 2) == 4

def test_other_area():
    assert s1fast.area(2, 3) == 6

@pytest.mark.slow
def test_slow():
    assert False
""",
    "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow: longer"]\n',
}
SUM = Mutation("sum", "s1fast/__init__.py", "a * b", "a + b", ("tests/test_toy.py",))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_tells_what_was_noticed(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutations = [
        SUM,
        dataclasses.replace(SUM, name="unused", old="unused = 1", new="unused = 2"),
        dataclasses.replace(SUM, name="absent", old="no such text"),
        dataclasses.replace(SUM, name="twice", old="a"),
        dataclasses.replace(SUM, name="syntax", new="a *"),
    ]
    assert check(toy, mutations) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "sum"],
        ["MISS", "unused"],
        ["MISS", "absent"],
        ["MISS", "twice"],
        ["MISS", "syntax"],
        ["1", "of"],
    ]
    accounts = ("test_other_area", "SURVIVED", "occurs 0 times", "occurs 4 times", "did not run")
    for line, account in zip(lines, accounts, strict=False):
        assert account in line
    assert (toy / "s1fast" / "__init__.py").read_text() == TOY["s1fast/__init__.py"]


def test_tests_must_pass_without_a_mutation(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "s1fast" / "__init__.py").write_text("def area(a, b):\n    return a * b + 1\n")
    assert check(toy, [SUM]) == 1
    assert "without a mutation the tests do not pass: test_area" in capsys.readouterr().out


def test_python_imports_the_copy(toy: Path) -> None:
    """From a folder that holds the package, that one is imported, not what is installed."""
    assert python(toy, "-c", "import s1fast; print(s1fast.area(3, 5))").stdout == "15\n"
    shown = python(toy, "-m", "pytest", "-q", "--co", "tests/test_toy.py").stdout
    assert "test_other_area" in shown


def test_mutations_fit_the_code() -> None:
    """Each text occurs exactly once, so none was left behind when the code changed."""
    texts = {mutation.file: (ROOT / mutation.file).read_text() for mutation in MUTATIONS}
    for mutation in MUTATIONS:
        assert mutated(texts[mutation.file], mutation) != texts[mutation.file]
    assert not [name for name, n in Counter(m.name for m in MUTATIONS).items() if n > 1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_suite_notices_every_mutation() -> None:
    assert check(ROOT, MUTATIONS) == 0
