"""bench/visit.py: order, limits of time, failures, and what is left behind."""

from __future__ import annotations

import shlex
import tarfile
import time
from pathlib import Path

import pytest
import torch

from s1fast.bench import decode, kernels, visit
from s1fast.bench.visit import Item, run, table

ROOT = Path(__file__).resolve().parent.parent


FAILURES = """
tests/a.py::test_b[c] FAILED [  3%]
[gw1] [ 50%] FAILED tests/d.py::test_e
tests/d.py::test_f PASSED
FAILED tests/a.py::test_b[c] - assert 0
ERROR tests/d.py::test_e
"""


def script(name: str, seconds: int, code: str) -> Item:
    return Item(name, seconds, f"WORD=there python -c {shlex.quote(code)}")


def test_goes_on_whatever_becomes_of_an_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails, hangs in a child that ignores the interrupt, wants more time than there is, or a tool
    that is not there; all say what became of them, and what they wrote comes back."""
    results, output = tmp_path / "results", tmp_path / "output"
    results.mkdir()
    (results / "old.json").write_text("old")
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    hangs = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('child', child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('summed up')"
    )
    items = [
        script("good", 1, f"import os; open({str(results / 'new.json')!r}, 'w').write('new')"),
        script(
            "bad", 1, f"import os; print(os.environ['WORD'], {FAILURES!r}); raise SystemExit(3)"
        ),
        script("slow", 1, hangs),
        script("long", 600, "print('never')"),
        Item("tool", 1, "no-such-tool --flag"),
        script("last", 1, "print('the last one')"),
    ]
    found = run(items, 30, output, results)
    assert list(found.items()) == [
        ("good", "ok"),
        ("bad", "failed with 3"),
        ("slow", "ended after 2 s"),
        ("long", "no time"),
        ("tool", "missing, there is no no-such-tool on the PATH"),
        ("last", "ok"),
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[2:4] == ["  failed: tests/a.py::test_b[c]", "  failed: tests/d.py::test_e"]
    del said[2:4]
    assert [line.partition(":")[0] for line in said] == list(found)
    assert said[0].endswith(" s new.json") and "failed with 3, " in said[1]
    log = (output / "visit.log").read_text()
    assert "\nthere \n" in log and "summed up" in log and "the last one" in log
    assert "\nnever\n" not in log
    pid = int(log.split("child ")[-1].split()[0])
    assert not alive(pid), "a process was left behind"
    with tarfile.open(output / "results.tar") as tar:
        assert tar.getnames() == ["new.json"]
    run(items[-1:], 30, output, results)
    assert (output / "visit.log").read_text().startswith(log)


def alive(pid: int) -> bool:
    """Whether a process still runs after a second; one that waits to be asked for has ended."""
    for _ in range(100):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.01)
    return True


def test_commands_are_ones_that_the_benches_take() -> None:
    """Flags, shapes of our kernels, and files of tests."""
    items = table(workers=3)
    assert len({item.name for item in items}) == len(items)
    assert "-n 3" in items[1].command and "-n" not in table(workers=1)[1].command
    for item in items:
        words = shlex.split(item.command)
        for word in words:
            if word.startswith("tests"):
                assert (ROOT / word).exists(), f"{item.name}: {word}"
        for module, check in (
            ("s1fast.bench.kernels", check_kernels),
            ("s1fast.bench.decode", decode.parse),
        ):
            if module in words:
                check(words[words.index(module) + 1 :])


def check_kernels(words: list[str]) -> None:
    config = kernels.parse(words)
    ops = kernels._chosen(config.op)
    assert len(kernels._given(config.shape, ops, torch.device("cuda"))) >= len(config.shape)


def test_only_and_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["visit", "--list", "--only", "ncu", "layer_step"])
    visit.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("ncu" in line or "layer_step" in line for line in lines)
    monkeypatch.setattr("sys.argv", ["visit", "--only", "nothing"])
    with pytest.raises(SystemExit):
        visit.main()
    assert "--only: no item's name has any of ['nothing']" in capsys.readouterr().err
