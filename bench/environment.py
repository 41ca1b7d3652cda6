"""Where and with what a measurement was made, and where its raw result lies."""

from __future__ import annotations

import datetime
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


def environment() -> dict[str, Any]:
    """Device, versions, date and commit of this run."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name() -> str:
    """The GPU's name, or the CPU's model and how many cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


def save(kind: str, values: dict[str, Any]) -> Path:
    """Writes bench/results/<kind>-<device>-<date>-<commit>.json and returns its path."""
    env = environment()
    name = "-".join((kind, env["device"], env["date"], env["commit"]))
    make_directory(RESULTS)
    path = RESULTS / (re.sub(r"[^\w.-]+", "_", name) + ".json")
    write_atomic(path, json.dumps({"environment": env, **values}, indent=2) + "\n")
    return path
