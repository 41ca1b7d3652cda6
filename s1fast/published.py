"""What is published of the models and data of s1, so that a plan needs no download.

Configs: the config.json files of Qwen/Qwen2.5-*-Instruct on the Hugging Face hub (Apache-2.0).
Lengths: the bars of visuals/s11/traces.pdf in simplescaling/s1 (Apache-2.0), a histogram of trace
lengths in tokens of Qwen2.5-32B-Instruct.
"""

from __future__ import annotations

from s1fast.model import ModelConfig

_QWEN = {  # size: hidden, intermediate, layers, heads, kv heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}

FIRST_BIN = 356.0
BIN_WIDTH = 517.64
TRACES = {
    "simplescaling/s1K": (14, 42, 23, 20, 16, 34, 72, 136, 159, 197, 167, 53, 49, 14, 4),
    "simplescaling/s1K-1.1": (
        *(1, 14, 9, 21, 20, 29, 41, 30, 41, 30, 46, 38, 31, 46, 40, 44, 39, 48, 24, 30, 48, 22),
        *(28, 34, 27, 23, 20, 37, 28, 21, 32, 26, 7, 5, 6, 3, 3, 1, 0, 2, 1, 0, 1, 1, 0, 0, 0, 0),
        *(0, 2),
    ),
}
"""Dataset: traces in each bin of BIN_WIDTH tokens from FIRST_BIN on, 1,000 in all."""

AROUND_A_TRACE = 800
"""Tokens of question (127 in the mean), answer (about 650, by the dataset's size) and template."""


def known_models() -> list[str]:
    return [f"Qwen/Qwen2.5-{size}-Instruct" for size in _QWEN]


def model_config(name: str) -> ModelConfig | None:
    """Of a known hub id, also of its base model; None for any other."""
    size = name.removeprefix("Qwen/Qwen2.5-").removesuffix("-Instruct")
    known = size in _QWEN and name.startswith("Qwen/Qwen2.5-")
    return qwen(size) if known else None


def qwen(size: str) -> ModelConfig:
    """Qwen2.5 of a size as "32B"; KeyError for one that does not exist."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = _QWEN[size]
    return ModelConfig(
        model_type="qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        tie_word_embeddings=tied,
        attention_bias=True,
    )


def sequence_lengths(dataset: str) -> list[int] | None:
    """Tokens of each of a known dataset's 1,000 sequences, ascending; None for any other.

    The traces of a bin are spread evenly over it; each gets AROUND_A_TRACE tokens more.
    """
    counts = TRACES.get(dataset.removesuffix("_tokenized"))
    if counts is None:
        return None
    lengths = []
    for number, count in enumerate(counts):
        for i in range(count):
            trace = FIRST_BIN + BIN_WIDTH * (number + (i + 0.5) / count)
            lengths.append(round(trace) + AROUND_A_TRACE)
    return lengths
