"""Where and with what a measurement was made, and where its raw result lies."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from s1fast.files import make_directory, write_atomic

RESULTS = Path(__file__).resolve().parent / "results"

_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
_THROTTLES = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


def environment() -> dict[str, Any]:
    """Device, versions, date and commit of this run; what is absent is None."""
    now = datetime.datetime.now(datetime.UTC)
    driver = _query_gpu(["driver_version"])
    return {
        "device": device_name(),
        "gpu": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
        "date": now.date().isoformat(),
        "timestamp": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver[0] if driver else None,
        "triton": version("triton"),
        "python": platform.python_version(),
    }


def version(distribution: str) -> str | None:
    """Of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """The GPU's name, or the CPU's model and how many cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


def gpu_state() -> dict[str, Any] | None:
    """Clocks, power, temperature and throttle reasons now; None where nvidia-smi tells nothing."""
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # new, old
        values = _query_gpu([*_STATE.values(), reasons])
        if values:
            state: dict[str, Any] = dict(zip(_STATE, map(_number, values), strict=False))
            bits = int(values[-1], 16) if values[-1].startswith("0x") else 0
            state["throttle_reasons"] = [name for bit, name in _THROTTLES.items() if bits & bit]
            return state
    return None


def result_path(folder: Path, env: dict[str, Any], kind: str = "") -> Path:
    """<folder>/[<kind>-]<device>-<date>-<commit>[-2].json: a name that no result has yet."""
    name = "-".join(filter(None, (kind, env["device"], env["date"], env["commit"])))
    stem = re.sub(r"[^\w.-]+", "_", name)
    names = (f"{stem}.json", *(f"{stem}-{number}.json" for number in range(2, 1000)))
    return next(path for path in map(folder.joinpath, names) if not path.exists())


def save(kind: str, values: dict[str, Any]) -> Path:
    """Writes bench/results/<kind>-<device>-<date>-<commit>[-2].json and returns its path."""
    env = environment()
    make_directory(RESULTS)
    path = result_path(RESULTS, env, kind)
    write_atomic(path, json.dumps({"environment": env, **values}, indent=2) + "\n")
    return path


def _commit() -> str:
    """S1FAST_COMMIT names it where the checkout travelled without its history."""
    if named := os.environ.get("S1FAST_COMMIT"):
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _query_gpu(fields: list[str]) -> list[str] | None:
    """nvidia-smi's answers about the current device, without units."""
    if not torch.cuda.is_available():
        return None
    uuid = torch.cuda.get_device_properties().uuid
    query = f"--query-gpu={','.join(fields)}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None
