"""Compiling csrc: once, whole, never stale; what is said when it cannot be. nvcc is a script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s1fast import build as module
from s1fast.build import build
from s1fast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release {release}, V{release}.88"; exit; fi
echo "$@" >> {log}
{body}
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a compiler of some version that does `body` first; returns the log of its calls."""
    monkeypatch.setenv("S1FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    def install(release: str = "13.0", body: str = "") -> Path:
        log = tmp_path / "log"
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(NVCC.format(release=release, log=log, body=body))
        nvcc.chmod(0o755)
        return log

    return install


def calls(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_once(install: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    log = install()
    path = build()
    assert path.read_text() == "compiled\n" and path.is_relative_to(module.cache_folder())
    first, last = capsys.readouterr().err.splitlines()
    assert first == "s1fast: compiling csrc with nvcc 13.0.88: half a minute, once"
    assert last.startswith("s1fast: compiled csrc in ") and last.endswith(str(path))
    assert build() == path and calls(log) == 1 and not capsys.readouterr().err
    (line,) = log.read_text().splitlines()
    for flag in ("arch=compute_90a,code=sm_90a", "-DTORCH_TARGET_VERSION=0x020b000000000000"):
        assert flag in line


def test_several_processes_compile_once(install: Callable[..., Path]) -> None:
    log = install(body="sleep 0.5")
    code = "from s1fast.build import build; print(build())"
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) for _ in range(4)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert not any(process.returncode for process in started), outputs
    assert len({out for out, _ in outputs}) == 1 and calls(log) == 1
    assert sum("compiling" in error for _, error in outputs) == 1


def test_what_changes_the_result_changes_its_place(
    install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install()
    paths = [build()]
    install("13.1")
    paths.append(build())
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-g"))
    paths.append(build())
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(module, "SOURCES", tmp_path / "csrc")
    assert build() == paths[-1], "the sources' place is of no consequence"
    with open(tmp_path / "csrc" / "gemv.cuh", "a") as file:
        file.write("\n")
    paths.append(build())
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "99.0")
    paths.append(build())
    assert len(set(paths)) == len(paths) == calls(log)
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("body", ["echo 'ops.cu(7): error: no' >&2; exit 2", "kill -9 $$"])
def test_failure_is_shown_and_leaves_nothing(
    body: str, install: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    install(body=body)
    with pytest.raises(InputError, match=r'failed with code .*matmul = "torch"'):
        build()
    if "error" in body:
        assert "ops.cu(7): error: no" in capfd.readouterr().err
    assert [p.name for p in (module.cache_folder() / "csrc").iterdir()] == [".lock"]
    log = install()
    assert build().exists() and calls(log) == 2


def test_what_a_killed_process_left_is_removed(install: Callable[..., Path]) -> None:
    install()
    leftover = module.cache_folder() / "csrc" / ".abc.xyz.tmp"
    leftover.mkdir(parents=True)
    build()
    assert not leftover.exists()


def test_no_compiler(install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"CUDA_HOME: .* has no bin/nvcc"):
        build()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)
    with pytest.raises(InputError, match=r'needs nvcc.*CUDA toolkit.*matmul = "torch"'):
        build()


def test_unfit_compilers(install: Callable[..., Path], tmp_path: Path) -> None:
    install("12.3")
    with pytest.raises(InputError, match=r"is version 12\.3\.88; csrc needs 12\.4 or later"):
        build()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    with pytest.raises(InputError, match="--version names no version"):
        build()
    nvcc.chmod(0o644)
    with pytest.raises(InputError, match="cannot be run: Permission denied"):
        build()


def test_unusable_cache(install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    log = install()
    monkeypatch.setenv("S1FAST_CACHE", str(log.parent / "cuda" / "bin" / "nvcc"))
    with pytest.raises(InputError, match="cannot be created: Not a directory"):
        build()
    assert calls(log) == 0


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S1FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert module.cache_folder() == Path("/there/s1fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert module.cache_folder() == Path("/home/me/.cache/s1fast")


def test_command(install: Callable[..., Path]) -> None:
    install()
    done = subprocess.run(
        [sys.executable, "-m", "s1fast", "build"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == f"{build()}\n"
