"""Compiles csrc/ into a shared object that torch loads: on first use, or ahead by `s1fast build`.

It lies in a cache, in a folder named by a hash of everything that it is made of: sources, flags,
the versions of nvcc and torch. So nothing stale is ever loaded, and machines may share a cache: a
lock lets one process compile while the others wait, and the folder appears whole, by a rename.

The torch interface is the stable one of torch 2.11, CUDA's runtime is linked in, and the kernels
are machine code for compute capability 9.0a: a GPU is needed to run them, not to build them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s1fast.errors import InputError
from s1fast.files import make_directory, new_directory, read_bytes, remove_leftovers

SOURCES = Path(__file__).with_name("csrc")
LIBRARY = "libs1fast.so"
OLDEST_NVCC = (12, 4)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # what torch 2.11 has and nothing later
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-shared",
    "-cudart=static",
)


def build() -> Path:
    """The shared object, compiled unless the cache has it; says so on stderr when it compiles.

    Raises:
        InputError: no compiler, one that is too old, one that fails (its output is printed), or a
            cache that cannot be written.
    """
    sources = {path.name: read_bytes(path) for path in _sources()}
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    target = cache_folder() / "csrc" / _key(sources, version)
    library = target / LIBRARY
    if library.exists():
        return library
    make_directory(target.parent)
    with _locked(target.parent):
        if not library.exists():  # nobody has built it while we waited
            remove_leftovers(target.parent)
            _compile(nvcc, version, target)
    return library


def cache_folder() -> Path:
    """$S1FAST_CACHE, or s1fast in $XDG_CACHE_HOME, by default ~/.cache."""
    own = os.environ.get("S1FAST_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "s1fast"


def find_nvcc() -> str:
    """$CUDA_HOME's compiler, else the one on the PATH, else the usual place's."""
    home = os.environ.get("CUDA_HOME")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if path.exists():
            return str(path)
        raise InputError(f"CUDA_HOME: {home} has no bin/nvcc; correct or unset it")
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise InputError(
            'matmul = "cuda" needs nvcc, once, to compile csrc, and there is none on the PATH: '
            "install the CUDA toolkit and set CUDA_HOME if it is not in /usr/local/cuda, or take "
            'matmul = "torch"'
        )
    return found


def nvcc_version(nvcc: str) -> str:
    """As 13.0.88. Raises an InputError when it is too old or says nothing."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise InputError(f"{nvcc}: cannot be run: {error.strerror or error}") from None
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", done.stdout)
    if not found:
        raise InputError(f"{nvcc}: --version names no version")
    if (int(found[1]), int(found[2])) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise InputError(f"{nvcc} is version {found[0][1:]}; csrc needs {oldest} or later")
    return found[0][1:]


def command(nvcc: str, output: Path, *extra: str) -> list[str]:
    """What compiles csrc into `output`."""
    torch = _torch_folder()
    return [
        *(nvcc, *FLAGS, *extra, f"-I{torch / 'include'}", str(SOURCES / "ops.cu")),
        *("-o", str(output), f"-L{torch / 'lib'}", "-ltorch_cpu"),
    ]


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh"))


def _key(sources: dict[str, bytes], nvcc: str) -> str:
    versions = f"nvcc {nvcc}, torch {importlib.metadata.version('torch')}"
    digest = hashlib.sha256(f"{versions}\n{FLAGS}\n".encode())
    for name, data in sources.items():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:20]


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")  # its place, without the seconds that importing takes
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however that ends."""
    try:
        with open(folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"another process compiles csrc into {folder}: waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be locked: {error.strerror or error}") from None


def _compile(nvcc: str, version: str, target: Path) -> None:
    _say(f"compiling csrc with nvcc {version}: half a minute, once")
    began = time.perf_counter()
    with new_directory(target) as folder:
        done = subprocess.run(command(nvcc, folder / LIBRARY), capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr, end="", flush=True)
            raise InputError(
                f"csrc: {nvcc} failed with code {done.returncode}, its output stands above; mend "
                'the toolchain, or take matmul = "torch"'
            )
    _say(f"compiled csrc in {time.perf_counter() - began:.0f} s: {target / LIBRARY}")


def _say(line: str) -> None:
    print(f"s1fast: {line}", file=sys.stderr, flush=True)
