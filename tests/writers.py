"""Random models that write, and transformers beside them: what tests of the engine compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from s1fast.budget import Budget
from s1fast.chat import Chat
from s1fast.decoder import Completion, Engine, Piece, SamplingParams
from s1fast.kernels.sample import gumbel

NEVER = 511
"""An id beyond the tokenizer: as eos_token_id it ends nothing."""


class Theirs:
    """transformers' model, greedy, without the ids that the tokenizer does not have."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.vocab_size = vocab_size

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Its own loop, with its own cache."""
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(self.vocab_size, self.model.config.vocab_size)) or None,
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def greedy_after_each(self, prompt: list[int], ids: list[int]) -> list[int]:
        """Its likeliest token at the place of every one of ids, from one pass over all of them: ids
        equals this exactly where ids is what it generates."""
        logits_TV = self.model(torch.tensor([prompt + ids])).logits[0, :, : self.vocab_size]
        return logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of the token after ids, computed from nothing."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    @torch.inference_mode()
    def next(self, ids: list[int], masked: set[int]) -> int:
        """The likeliest token after ids, computed from nothing."""
        logits_V = self.logits(ids)
        logits_V[self.vocab_size :] = -torch.inf
        logits_V[list(masked)] = -torch.inf
        return int(logits_V.argmax())


def prompts_of(chat: Chat, *lengths: int, seed: int = 0) -> list[list[int]]:
    """Random ids; no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, chat.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@dataclass
class ByHand:
    """What a request should give, as (kind, id)."""

    prompt: list[int]
    output: list[tuple[str, int]] = field(default_factory=list)
    waits: int = 0
    thinking_end: str | None = None
    finish_reason: str = "length"
    cut: int = 0

    def add(self, kind: str, ids: list[int]) -> None:
        self.output += [(kind, i) for i in ids]

    @property
    def ids(self) -> list[int]:
        return self.prompt + [i for _, i in self.output]


class Ascii:
    """A random model that writes ASCII alone, so that every token is text at once.

    Logits of ids that are not ASCII are 0, so they are never the largest. Those of END ids are
    scaled by `end`: with 1.8 the model keeps wanting to end its thinking, with 0 it never does.
    With `pairs` it writes no more than twice as many letters, and so repeats itself: one letter's
    logit is the other's negative, so one of them is above 0 always.
    """

    def __init__(self, folder: Path, end: float, pairs: int = 0) -> None:
        from safetensors.torch import load_file, save_file

        chat = Chat.load(folder)
        self.end = {chat.marker_id("<|im_start|>"), chat.marker_id("<|im_end|>")}
        weights = load_file(folder / "model.safetensors")
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        for i in range(chat.vocab_size):
            if not chat.decode([i]).isascii():
                head[i] = 0
        if pairs:
            letters = [i for i in range(20, chat.vocab_size) if chat.decode([i]).isalpha()]
            kept = [i for i in letters if chat.decode([i]).isascii()][: 2 * pairs]
            head[[i for i in range(chat.vocab_size) if i not in self.end and i not in kept]] = 0
            head[kept[pairs:]] = -head[kept[:pairs]]
        head[list(self.end)] *= end
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        self.folder, self.chat, self.engine = folder, chat, Engine(folder, device="cpu")
        self.theirs = Theirs(folder, chat.vocab_size)

    def prompts(self, *lengths: int) -> list[list[int]]:
        start = self.chat.encode("<|im_start|>think")
        return [ids + start for ids in prompts_of(self.chat, *lengths)]

    def by_hand(self, prompt: list[int], budget: Budget, max_tokens: int) -> ByHand:
        """Forces the budget token by token, each from a pass over all that stands before."""
        think = self._rounds if budget.accounting == "harness" else self._total
        hand = ByHand(prompt)
        newline = think(hand, budget)
        if hand.thinking_end == "natural":
            hand.add("end", self.chat.encode("<|im_start|>answer"))
        else:
            hand.add("end", [] if newline else self.chat.encode("\n"))
            hand.add("end", self.chat.encode("<|im_start|>answer\n" + budget.final_text))
        while len(hand.output) < max_tokens:
            token = self.theirs.next(hand.ids, set())
            if token in self.end | self.chat.stop_ids:
                hand.finish_reason = "stop"
                break
            hand.add("answer", [token])
        return hand

    def _total(self, hand: ByHand, budget: Budget) -> bool:
        left = budget.num_ignore or 0
        first = budget.num_ignore is not None
        while len(hand.output) < budget.max_thinking_tokens:
            masked = first or len(hand.output) < budget.min_thinking_tokens
            token = self.theirs.next(hand.ids, self.end if masked else set())
            first = False
            if token not in self.end:
                hand.add("thinking", [token])
            elif left:
                text = budget.ignore_texts[hand.waits % len(budget.ignore_texts)]
                hand.add("ignore", self.chat.encode(text))
                del hand.output[budget.max_thinking_tokens :]
                left, hand.waits, first = left - 1, hand.waits + 1, True
            else:
                hand.thinking_end = "natural"
                return False
        hand.thinking_end = "length"
        return self._newline(hand)

    def _rounds(self, hand: ByHand, budget: Budget) -> bool:
        """As the evaluation harness: whole rounds first, then the cut."""
        for i in range((budget.num_ignore or 0) + 1):
            hand.thinking_end = "length"
            for sampled in range(budget.max_thinking_tokens):
                masked = sampled == 0 and budget.num_ignore is not None
                token = self.theirs.next(hand.ids, self.end if masked else set())
                if token in self.end:
                    hand.thinking_end = "natural"
                    break
                hand.add("thinking", [token])
            if hand.thinking_end == "length" or i == (budget.num_ignore or 0):
                break
            hand.waits += 1
            hand.add("ignore", self.chat.encode(budget.ignore_texts[i % len(budget.ignore_texts)]))
        newline = self._newline(hand)
        hand.cut = max(0, len(hand.output) - budget.max_thinking_tokens)
        del hand.output[budget.max_thinking_tokens :]
        return newline

    def _newline(self, hand: ByHand) -> bool:
        return bool(hand.output) and self.chat.decode([hand.output[-1][1]]).endswith("\n")

    def check(self, done: Completion, hand: ByHand) -> None:
        """Everything a completion tells, against what was forced by hand."""
        assert done.token_ids == [i for _, i in hand.output]
        assert kinds_of(done.pieces) == hand.output
        thinking = [i for kind, i in hand.output if kind in ("thinking", "ignore")]
        assert done.thinking_tokens == len(thinking)
        assert done.thinking == self.chat.decode(thinking)
        text = self.chat.decode([i for kind, i in hand.output if kind in ("end", "answer")])
        assert done.answer == text.partition("<|im_start|>answer")[2]
        assert "".join(piece.text for piece in done.pieces) == done.thinking + text
        assert done.waits_used == hand.waits
        assert (done.thinking_end, done.finish_reason) == (hand.thinking_end, hand.finish_reason)


def kinds_of(pieces: list[Piece]) -> list[tuple[str, int]]:
    return [(piece.kind, i) for piece in pieces for i in piece.ids]


def sampled(**fields: Any) -> SamplingParams:
    """Varied text, the same every time, and too cool for what is not ASCII."""
    return SamplingParams(**{"temperature": 0.3, "seed": 11, "max_tokens": 60, **fields})


TIE = 1e-3
"""A tie: two ids whose scores differ by less. Logits here are of size 10 and fp32 sums of 100
products, so other shapes of the same step move them by some 1e-5."""
BF16_TIE = 0.5
"""The same in bf16: some ten roundings of 2^-9 each lie between two orders of summing; scores are
looked up in fp32."""


def check_equal(
    writer: Ascii, a: Completion, b: Completion, params: SamplingParams, tie: float = TIE
) -> bool:
    """Two runs of the same request are equal, or differ first where the sampler had a tie. Returns
    whether they are equal."""
    runs = [kinds_of(c.pieces) for c in (a, b)]
    first = next((i for i, (x, y) in enumerate(zip_longest(*runs)) if x != y), None)
    if first is None:
        same = []
        for c in (a, b):
            said = (c.token_ids, c.thinking, c.answer, "".join(p.text for p in c.pieces))
            ended = (c.thinking_tokens, c.waits_used, c.thinking_end, c.finish_reason)
            same.append((*said, *ended))
        assert same[0] == same[1]
        return True
    ids = a.prompt_ids + a.token_ids[:first]
    score_V = writer.theirs.logits(ids)
    if params.temperature:
        noise_V = gumbel(params.seed, a.sample, len(ids), torch.arange(len(score_V)))
        score_V = score_V / params.temperature + noise_V
    drawn = [_drawn(writer, run, first) for run in runs]
    scores = [float(score_V[candidates].max()) for candidates in drawn]
    assert abs(scores[0] - scores[1]) < tie, f"token {first}: {drawn}, {scores}"
    return False


def _drawn(writer: Ascii, run: list[tuple[str, int]], at: int) -> list[int]:
    """The ids of which one was drawn at a place: that which stands there, or an end, where a text
    was appended or nothing follows."""
    if at < len(run) and run[at][0] in ("thinking", "answer"):
        return [run[at][1]]
    return sorted(writer.end | writer.chat.stop_ids)
