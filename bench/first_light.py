"""Decoding and training on real SmolLM2-135M weights, beside transformers on the same device.

Decoding: greedy, one row, a 40-token prompt, 64 new tokens. Training: forward and backward of 8
sequences; transformers gets them padded to one batch, as its default collator does, and one at a
time.

    python -m s1fast.bench.first_light --weights .models/smollm2-135m
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

from s1fast.bench.environment import save
from s1fast.bench.roofs import roofs
from s1fast.bench.timing import measure
from s1fast.chat import Example
from s1fast.decoder import Engine, SamplingParams
from s1fast.packing import pack_batch
from s1fast.trainer import stream_loss

NEW_TOKENS = 64


def decode(engine: Engine, peer: Any) -> dict[str, float]:
    """Tokens a second of ours and of transformers' generate."""
    prompt = list(range(1000, 1040))
    params = SamplingParams(max_tokens=NEW_TOKENS)
    ids = torch.tensor([prompt], device=engine.device)
    # Every prompt begins otherwise: none takes over what was computed for another.
    prompts = iter([i, *prompt[1:]] for i in range(2000, 3000))
    ours = measure(lambda: engine.generate([next(prompts)], params), warmup=1, repeats=5)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    theirs = measure(lambda: peer.generate(ids, **options), warmup=1, repeats=5)
    produced = len(engine.generate([prompt], params)[0].token_ids)
    return {
        "s1fast_tok_s": produced / ours.median_ms * 1e3,
        "transformers_tok_s": NEW_TOKENS / theirs.median_ms * 1e3,
    }


def train(engine: Engine, peer: Any) -> dict[str, float]:
    """Real tokens a second through forward and backward, fp32."""
    rng = random.Random(0)
    lengths = [rng.randrange(60, 240) for _ in range(8)]
    device = engine.device
    rows = [[rng.randrange(1000, 20000) for _ in range(n)] for n in lengths]
    examples = [Example(tuple(r), (True,) * len(r), "bench") for r in rows]
    engine.model.requires_grad_(True)

    def ours() -> None:
        for stream in pack_batch(examples, "token", 1 << 20):
            stream_loss(engine.model, stream.to(device)).backward()
        engine.model.zero_grad()

    longest = max(lengths)
    ids = torch.tensor([r + [2] * (longest - len(r)) for r in rows], device=device)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], device=device)

    def padded() -> None:
        labels = ids.masked_fill(mask == 0, -100)
        peer(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        peer.zero_grad()

    def single() -> None:
        for row in rows:
            one = torch.tensor([row], device=device)
            peer(input_ids=one, labels=one).loss.backward()
        peer.zero_grad()

    calls = {"s1fast": ours, "transformers_padded": padded, "transformers_single": single}
    return {
        f"{name}_tok_s": sum(lengths) / measure(call, warmup=1, repeats=5).median_ms * 1e3
        for name, call in calls.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path(".models/smollm2-135m"))
    weights = parser.parse_args().weights
    from transformers import AutoModelForCausalLM

    engine = Engine(weights, dtype="float32")
    peer = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).to(engine.device)
    ceilings = roofs()
    values = {"decode": decode(engine, peer), "train": train(engine, peer)}
    for kind, found in {"roofs": ceilings.rates(), **values}.items():
        for name, value in found.items():
            print(f"{kind:8} {name:28} {value:10.2f}")
    print(save("first_light", {"roofs": dataclasses.asdict(ceilings), **values}))


if __name__ == "__main__":
    main()
