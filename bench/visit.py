"""A visit to a GPU: what QUEUE.md asks of one GPU, in the order of worth, in the time there is.

    python -m s1fast.bench.visit --list
    python -m s1fast.bench.visit --seconds 560 --output out/visit
    python -m s1fast.bench.visit --seconds 280 --only ncu sanitizer

Every item is a process of its own. One that is not expected to end in the time left is passed over;
one that takes twice what is expected is interrupted, at which pytest still names what failed, and
then killed. A line tells of each as it ends, and one more of each test that failed. The output
folder gets two files, whatever was run: `visit.log`, written as it comes, and `results.tar`, to
which every item adds what it left in bench/results. To be run in the checkout's folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s1fast.bench.environment import RESULTS

TESTS = "python -m pytest -v -rf --tb short -W default -p no:benchmark -m gpu"
KERNELS = "python -m s1fast.bench.kernels"
DECODE = "python -m s1fast.bench.decode"
SFT = "python -m s1fast.bench.single_gpu_sft"
FIRST = "tests/test_gpu_advance.py", "tests/test_gpu_decode.py"
SMALL = (
    f"{KERNELS} --once --shape R37 R37xD5120xresidual T70xD256xV1100xmasked50 P1 P1xnarrowxclip "
    "S100xB3xH5xN1xragged S100xB3xH6xN2xK64xragged"
)
LOOP = (
    f"{TESTS} tests/test_decode_attention.py tests/test_page_append.py tests/test_gpu_csrc.py "
    "tests/test_gpu_advance.py -k 'test_heads or test_append or ragged or captured_step'"
)
CHECK = (
    "compute-sanitizer --target-processes application-only --launch-timeout 0 --error-exitcode 9 "
    "--print-limit 20 --tool"
)
ALONE = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"  # every tensor is an allocation, with an end to run over
MEMORY = "memcheck --report-api-errors no"
OURS = "--kernel-name 'regex=^_[a-z_]+_kernel$' --kernel-name kns=6s1fast"
NCU = (
    "ncu --clock-control none --target-processes application-only --profile-from-start off "
    "--launch-count 12 --section SpeedOfLight --section WarpStateStats --section Occupancy "
    "--section MemoryWorkloadAnalysis --metrics dram__bytes_read.sum,dram__bytes_write.sum "
    f"{KERNELS} --once"
)
FAILED = re.compile(r"tests/\S+(?= FAILED| ERROR)|(?:(?<=FAILED )|(?<=ERROR ))tests/\S+")
"""Tests, as pytest names them when they fail and when it sums up."""
TEST_FILES = RESULTS.parent.parent / "tests"
TEST_MIB = 34_000
"""Of the GPU's memory, that one process of tests may take."""


@dataclass(frozen=True)
class Item:
    """A command, variables before it as in a shell, and the seconds it is expected to take."""

    name: str
    seconds: int
    command: str


def table(workers: int) -> tuple[Item, ...]:
    """All items, the most wanted first; tests in so many processes."""
    of_gpus = [p for p in sorted(TEST_FILES.glob("test_*.py")) if "mark.gpu" in p.read_text()]
    rest = " ".join(name for p in of_gpus if (name := f"tests/{p.name}") not in FIRST)
    return (
        Item("tests never passed", 90, f"{TESTS} {' '.join(FIRST)}"),
        Item("tests", 270, f"{TESTS} {f'-n {workers}' if workers > 1 else ''} {rest}"),
        Item(
            "tests of Gluon", 30, f"{TESTS} tests/test_gpu_packed_attention.py -k 'gluon and edges'"
        ),
        Item(
            "kernels Gluon",
            60,
            f"{KERNELS} --shape S4700xB16xragged S4300xB8xH5xN1xragged S4700xB16xK64xragged "
            "--peers Gluon 'torch varlen' flash-attn",
        ),
        Item(
            "decode step",
            120,
            f"{DECODE} --only step --batch 1 8 64 --context 1024 8192 --matmul torch cuda",
        ),
        Item(
            "decode cases",
            150,
            f"{DECODE} --only intervention forced tree latency --context 8192 --matmul cuda "
            "--batch 1 --fraction 0.05",
        ),
        Item(
            "decode parallel",
            90,
            f"{DECODE} --only parallel --batch 1 8 --context 8192 --matmul cuda",
        ),
        Item("kernels advance", 30, f"{KERNELS} --op advance"),
        Item("kernels decode_attention", 60, f"{KERNELS} --op decode_attention"),
        Item("kernels gemv", 60, f"{KERNELS} --op gemv --peers torch torch.mm"),
        Item("kernels memory", 120, f"{KERNELS} --shape R4700 R4700xresidual R32768xresidual"),
        Item("kernels adamw", 60, f"{KERNELS} --shape P2000 P2000xnarrow P2000xnarrowxclip"),
        Item(
            "kernels attention",
            120,
            f"{KERNELS} --shape S1024xB64 S2048xB32 S4096xB16 S8192xB8 S16384xB4 S32768xB2 "
            "--peers Gluon 'torch varlen' cuDNN flash-attn",
        ),
        Item("kernels loss", 120, f"{KERNELS} --shape T4700 T4700xpeaked T32768"),
        Item("single_gpu_sft", 90, f"{SFT} --only"),
        Item("layer_step", 90, "python -m s1fast.bench.layer_step"),
        Item("sanitizer memory", 60, f"{ALONE} {CHECK} {MEMORY} {OURS} {SMALL}"),
        Item("sanitizer races", 60, f"{ALONE} {CHECK} racecheck {OURS} {SMALL}"),
        # Of all kernels: a tensor that torch's have written is no error of ours.
        Item("sanitizer unwritten", 60, f"{ALONE} {CHECK} initcheck {SMALL}"),
        Item("sanitizer loop, memory", 60, f"{CHECK} {MEMORY} {OURS} {LOOP}"),
        Item("sanitizer loop, races", 60, f"{CHECK} racecheck {OURS} {LOOP}"),
        Item("ncu memory", 60, f"{NCU} --shape R4700 R4700xresidual"),
        Item("ncu attention", 45, f"{NCU} --shape S4700xB16xragged"),
        Item("ncu loss", 45, f"{NCU} --shape T4700"),
        Item("ncu gemv", 45, f"{NCU} --shape N27648xnormxswiglu"),
        Item("ncu decode_attention", 45, f"{NCU} --shape L32768"),
        Item("kernels layer", 150, f"{KERNELS} --op layer"),
        Item("single_gpu_sft peers", 240, f"{SFT} --only 'varlen, one sequence'"),
        Item("decode peers", 240, f"{DECODE} --only step peers --batch 1 --context 8192"),
    )


def run(
    items: Sequence[Item], seconds: float, output: Path, results: Path = RESULTS
) -> dict[str, str]:
    """Runs what there is time for; what became of each item, by name."""
    output.mkdir(parents=True, exist_ok=True)
    stop, found = time.monotonic() + seconds, {}
    with open(output / "visit.log", "a+b", buffering=0) as log:
        for item in items:
            began, stamp = time.monotonic(), time.time_ns()
            log.write(f"\n=== {item.name}: {item.command}\n".encode())
            here = log.tell()
            status = found[item.name] = _run(item, stop - began, log.fileno())
            fresh = [p for p in results.iterdir() if p.is_file() and p.stat().st_mtime_ns >= stamp]
            with tarfile.open(output / "results.tar", "a") as tar:
                for path in fresh:
                    tar.add(path, path.name)
            names = " ".join(sorted(path.name for path in fresh))
            line = f"{item.name}: {status}, {time.monotonic() - began:.0f} s {names}".rstrip()
            print(line, flush=True)
            log.seek(here)
            for test in sorted({*FAILED.findall(log.read().decode(errors="replace"))}):
                print(f"  failed: {test}", flush=True)
            log.write(f"=== {line}\n".encode())
    return found


def _run(item: Item, left: float, log: int) -> str:
    """The command in a session of its own, so that what it started ends with it."""
    words = [sys.executable if w == "python" else w for w in shlex.split(item.command)]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    while "=" in words[0]:
        name, _, env[name] = words.pop(0).partition("=")
    if shutil.which(words[0]) is None:
        return f"missing, there is no {words[0]} on the PATH"
    if left < item.seconds:
        return "no time"
    limit = min(2 * item.seconds, left)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
    )
    try:
        code = process.wait(limit)
        return f"failed with {code}" if code else "ok"
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _workers() -> int:
    """Processes that tests may run in: as the GPU's memory has room for."""
    smi = shutil.which("nvidia-smi")
    if smi is None or importlib.util.find_spec("xdist") is None:
        return 1
    query = [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return max(1, int(subprocess.check_output(query).split()[0]) // TEST_MIB)


def main() -> None:
    parser = argparse.ArgumentParser("s1fast.bench.visit", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the items and run none")
    parser.add_argument("--only", nargs="+", help="items with one of these in their name")
    parser.add_argument("--seconds", type=float, default=560, help="that there are, by default 560")
    parser.add_argument("--output", type=Path, default=Path("out/visit"), help="folder")
    given = parser.parse_args()
    os.environ["PATH"] += ":/usr/local/cuda/bin"
    items = table(_workers())
    if given.only:
        items = tuple(i for i in items if any(word in i.name for word in given.only))
    if not items:
        parser.error(f"--only: no item's name has any of {given.only}; --list names them")
    if given.list:
        for item in items:
            print(f"{item.seconds:4} s  {item.name:25} {item.command}")
    elif set(run(items, given.seconds, given.output).values()) - {"ok", "no time"}:
        sys.exit(1)


if __name__ == "__main__":
    main()
