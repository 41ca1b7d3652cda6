"""Names of models and datasets to local files: a path as it is, a hub id downloaded once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from s1fast.errors import InputError


def find(name: str, kind: str = "model", files: Sequence[str] = ()) -> Path:
    """The local folder or file of that name, or a hub repository's files, downloaded once.

    Args:
        name: a path, or a Hugging Face id like Qwen/Qwen2.5-1.5B-Instruct.
        kind: "model" or "dataset".
        files: patterns of a dataset's files that are wanted; Parquet and JSONL if empty.

    Raises:
        InputError: neither exists, or the hub cannot be reached.
    """
    path = Path(os.path.expanduser(name))  # which leaves the home of an unknown user as it is
    if os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise InputError(f"{kind} {name!r}: no such path, and it has not the form of a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    if kind == "dataset":
        patterns = list(files) or ["*.parquet", "*.jsonl"]
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{kind} {name!r}: no such path below {Path.cwd()}, and the hub did not deliver it"
            f"{offline}: {reason}"
        ) from None
