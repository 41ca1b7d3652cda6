"""Two toy tasks whose reasoning can stop early or go on, and the words to write them with.

In both, a round of thinking gives up after three steps and the model ends its thinking; "Wait"
makes it go on where it stopped. The early stop is planted by the training traces: after a round,
stopping is their likeliest next word. So what the demo shows is thinking continued under a budget,
not mistakes repaired.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from s1fast.files import make_directory, write_atomic

STEPS_PER_ROUND = 3
STOP_PROBABILITY = 0.3
MOST_ROUNDS = 8
GO_ON = ("Wait", "Hmm", "Alternatively", "But", "Again", "So")
"""How training traces go on after a round. Together they are likelier than stopping, each alone is
less likely, so greedy decoding stops."""


@dataclass(frozen=True)
class IteratedMap:
    """Apply x -> (5 x + 7) mod 97 up to twelve times: serial work that cannot be skipped."""

    width: int = 64
    num_layers: int = 2
    num_steps: int = 1200
    """Optimizer steps of 16 sequences that teach it."""
    title: str = "apply x -> (5x + 7) mod 97 up to 12 times"
    budgets: tuple[int, ...] = (0, 3, 6)
    """Thinking budgets below the natural length."""
    modulus: int = 97
    most: int = 12

    def words(self) -> list[str]:
        numbers = [f" {i}" for i in range(self.modulus)]
        return ["Apply", " times", " to", *numbers, *(f"{i}:" for i in range(self.most + 1))]

    def split(self, rng: random.Random) -> tuple[list[Any], list[Any]]:
        """Problems to train on and, disjoint, to evaluate on."""
        pairs = [(x, n) for x in range(self.modulus) for n in range(1, self.most + 1)]
        rng.shuffle(pairs)
        return pairs[240:], pairs[:240]

    def question(self, problem: Any) -> str:
        x, times = problem
        return f"Apply {times} times to {x}"

    def trace(self, problem: Any, go_ons: Sequence[str]) -> tuple[str, str]:
        """Thinking over a round and one more for each go-on, and the answer it leads to."""
        x, left = problem
        lines = []
        for word in ("", *go_ons):
            if word:
                lines.append(word)
            if not left:
                lines.append(f"0: {x}")
            for _ in range(min(STEPS_PER_ROUND, left)):
                x, left = (5 * x + 7) % self.modulus, left - 1
                lines.append(f"{left}: {x}")
        return "\n".join(lines), str(x)

    def solution(self, problem: Any) -> str:
        return self.trace(problem, ["Wait"] * self.most)[1]


@dataclass(frozen=True)
class PairSearch:
    """Find the two of six numbers that sum to a target, by trying pairs in order."""

    width: int = 128
    num_layers: int = 3
    num_steps: int = 3000
    title: str = "find the pair of six numbers that sums to a target"
    budgets: tuple[int, ...] = (0, 5, 10)
    largest: int = 20

    def words(self) -> list[str]:
        numbers = range(-2 * self.largest, 2 * self.largest + 1)
        forms = ("{}", " {}", " = {}", " off {}")
        return ["Pair", " of", " for", *(form.format(i) for form in forms for i in numbers)]

    def split(self, rng: random.Random) -> tuple[list[Any], list[Any]]:
        drawn = {self._problem(rng) for _ in range(60_000)}
        problems = sorted(drawn)
        rng.shuffle(problems)
        return problems[240:], problems[:240]

    def _problem(self, rng: random.Random) -> tuple[tuple[int, ...], int]:
        while True:
            numbers = tuple(rng.sample(range(1, self.largest + 1), 6))
            target = sum(rng.sample(numbers, 2))
            if sum(a + b == target for a, b in combinations(numbers, 2)) == 1:
                return numbers, target

    def question(self, problem: Any) -> str:
        numbers, target = problem
        return f"Pair of {' '.join(map(str, numbers))} for {target}"

    def trace(self, problem: Any, go_ons: Sequence[str]) -> tuple[str, str]:
        numbers, target = problem
        pairs = list(combinations(numbers, 2))
        lines: list[str] = []
        tried, found = 0, False
        for word in ("", *go_ons):
            if word:
                lines.append(word)
            if found:  # asked to go on after success: check the same pair again
                lines.append(lines[-2])
            for _ in range(0 if found else STEPS_PER_ROUND):
                a, b = pairs[min(tried, len(pairs) - 1)]
                lines.append(f"{a} {b} = {a + b} off {target - a - b}")
                tried, found = tried + 1, a + b == target
                if found:
                    break
        a, b = pairs[min(tried, len(pairs)) - 1] if found else pairs[min(tried, len(pairs) - 1)]
        return "\n".join(lines), f"{a} {b}"

    def solution(self, problem: Any) -> str:
        numbers, target = problem
        a, b = next(p for p in combinations(numbers, 2) if sum(p) == target)
        return f"{a} {b}"


Task = IteratedMap | PairSearch
TASKS: dict[str, Task] = {"map": IteratedMap(), "search": PairSearch()}


def write_rows(task: Task, problems: list[Any], num_rows: int, seed: int, path: Path) -> None:
    """Training rows {question, thinking, answer}; after a round a trace stops with
    STOP_PROBABILITY, and goes on with one of GO_ON otherwise."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_rows):
        problem = rng.choice(problems)
        go_ons: list[str] = []
        while rng.random() > STOP_PROBABILITY and len(go_ons) < MOST_ROUNDS - 1:
            go_ons.append(rng.choice(GO_ON))
        thinking, answer = task.trace(problem, go_ons)
        row = {
            "question": task.question(problem),
            "thinking": thinking,
            "answer": f"Final Answer: {answer}",
        }
        lines.append(json.dumps(row) + "\n")
    write_atomic(path, "".join(lines))


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(task: Task, folder: Path) -> None:
    """A model folder without weights: config, word-level tokenizer and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|im_start|>", "<|im_end|>"]
    words = ["\n", "user", "assistant", "think", "answer", *GO_ON, "Final", " Answer:"]
    vocabulary = [*special, *words, *task.words()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" (?:=|off) -?\d+| ?[^\s]+|\n"), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(vocabulary),
        "hidden_size": task.width,
        "intermediate_size": 4 * task.width,
        "num_hidden_layers": task.num_layers,
        "num_attention_heads": task.width // 32,
        "num_key_value_heads": task.width // 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    make_directory(folder)
    write_atomic(folder / "config.json", json.dumps(config, indent=2))
    write_atomic(folder / "tokenizer.json", tokenizer.to_str())
    write_atomic(folder / "tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}))
