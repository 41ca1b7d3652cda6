"""Fixtures that several files use, and the account of what was skipped."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most tensors here are tiny: several threads would mostly wait for each other, badly so on a
# machine that does something else as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS asks for it where deterministic algorithms are demanded, as the fixture `poisoned` does.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# Without a GPU the whole process interprets Triton's kernels. The variable is read when a kernel is
# defined, and Triton's own are as soon as it is imported: nothing before this may import it.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / ".models" / "smollm2-135m"
DATA = ROOT.parent / "shared" / "data"
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_REQUIRED = set(filter(None, os.environ.get("S1FAST_REQUIRE", "").split(",")))
_UNPROVEN = {
    "weights": "parity, generation and fine-tuning on real SmolLM2 weights",
    "data": "Qwen2.5 token ids and recipes on real questions",
    "nvcc": "that csrc compiles for sm_90a",
}


def need(piece: str, there: bool, remedy: str) -> None:
    """Skips where a piece is missing, and fails where S1FAST_REQUIRE says that it must be there."""
    if there:
        return
    if piece in _REQUIRED:
        pytest.fail(f"S1FAST_REQUIRE names {piece}, but it is missing: {remedy}")
    pytest.skip(f"no {piece} ({remedy}); unproven: {_UNPROVEN[piece]}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct."""
    need("weights", (WEIGHTS / "config.json").exists(), "make weights")
    return WEIGHTS


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public questions and the Qwen2.5 tokenizer."""
    need("data", DATA.is_dir(), f"it lies at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def nvcc() -> str:
    """Path of the CUDA compiler."""
    path = shutil.which("nvcc")
    need("nvcc", path is not None, "install the CUDA toolkit")
    assert path is not None
    return path


@pytest.fixture(scope="session")
def csrc_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where csrc is compiled into, once for all tests, and not into the user's cache."""
    folder = tmp_path_factory.mktemp("csrc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S1FAST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def csrc_library(nvcc: str, csrc_cache: Path) -> Path:
    """csrc's shared object."""
    from s1fast.build import build

    assert nvcc and csrc_cache
    return build()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a byte-level BPE with ChatML's special tokens, about 400 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CHATML_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "think answer Wait Final Answer: the sum of the two numbers is assistant user system\n"
    ]
    tokenizer.train_from_iterator(corpus * 50, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> MakeModel:
    """Builds a random Hugging Face folder with transformers: make_model("qwen2", hidden_size=64).

    Weights are fp32 and large enough (std 0.2) that logits differ clearly between tokens; biases
    and norms are random too, so that a wrong one shows.
    """

    def make(model_type: str = "qwen2", *, seed: int = 0, std: float = 0.2, **fields: Any) -> Path:
        import transformers

        values = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            **fields,
        }
        name = {"qwen2": "Qwen2", "llama": "Llama"}[model_type]
        config = getattr(transformers, name + "Config")(**values)
        torch.manual_seed(seed)
        model = getattr(transformers, name + "ForCausalLM")(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                offset = 1.0 if parameter.ndim == 1 else 0.0
                parameter.copy_(
                    torch.randn_like(parameter) * std + offset * (parameter.mean() > 0.5)
                )
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        shutil.copyfile(tiny_tokenizer, folder / "tokenizer.json")
        return folder

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes rows as tmp_path/rows.jsonl."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills what torch.empty, new_empty, empty_like, ... return with NaN or the largest integer.

    So an element that nothing writes shows, also inside custom operations.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    demanded = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(demanded, warn_only=warn_only)


@pytest.fixture(autouse=True)
def _gpu_memory() -> Iterator[None]:
    """Gives back what a test took: several processes may share the device."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Last lines: what was skipped, and what that leaves unproven."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons: dict[str, int] = {}
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    terminalreporter.write_line(f"skipped: {len(skipped) or 'nothing'}")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"  {count} x {reason.removeprefix('Skipped: ')}")
    if not torch.cuda.is_available():
        terminalreporter.write_line("no GPU here: tests marked gpu did not run (make gpu)")
