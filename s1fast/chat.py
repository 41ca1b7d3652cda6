"""Text to token ids: the tokenizer, the chat template, and s1's thinking format.

A training example of s1 is, in Qwen's ChatML, exactly (no other line breaks)

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n
    <|im_start|>assistant\\n<|im_start|>think\\n{trace}\\n<|im_start|>answer\\n{answer}<|im_end|>\\n

with loss on all after `<|im_start|>assistant\\n`, the markers included (simplescaling/s1,
data/tokenization.py and train/sft.py). A prompt ends with
`<|im_start|>assistant\\n<|im_start|>think`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from s1fast.errors import InputError
from s1fast.files import read_bytes, read_json_object
from s1fast.markers import S1, choose

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5's template without tools: for a folder that brings none of its own."""

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One training sequence: ids[t] is predicted, with loss, where labelled[t]."""

    ids: tuple[int, ...]
    labelled: tuple[bool, ...]
    where: str
    """File and row that it came from."""


class Chat:
    """The tokenizer of a model folder with the model's own chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        stop_ids: Sequence[int],
        where: str,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        self.tokenizer, self.template, self.where = tokenizer, template, where
        self.special_tokens = special_tokens or {}
        """Name -> text, as bos_token -> <s>: templates write them by name."""
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        """Ids from here on are padding of the embedding: never valid, never sampled."""
        self.stop_ids = frozenset(stop_ids)
        self.markers = S1
        """Between which the model thinks."""
        self.choose_markers("auto")

    @staticmethod
    def load(folder: Path) -> Chat:
        """Reads tokenizer.json, the chat template and the stop ids of a model folder."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{folder}: no tokenizer.json there")
        tokenizer = load_tokenizer(path)
        stop_ids, named = _stop_ids(folder, tokenizer), _special_tokens(folder)
        return Chat(tokenizer, _template(folder), stop_ids, str(folder), named)

    def choose_markers(self, name: str) -> None:
        """Takes the markers of that name (markers.py), or for "auto" those of the vocabulary."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.markers = choose(name, frozenset(token.content for token in added))

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens written out in it become their ids."""
        with _named(self.where, "the tokenizer failed on a text"):  # a batch lets others run
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encoding(self, text: str) -> Encoding:
        with _named(self.where, "the tokenizer failed on a text"):
            return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        with _named(self.where, "the tokenizer failed on ids"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, by the model's own template.

        Raises:
            InputError: a template that fails, with its reason.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program: what it raises is its own
            raise InputError(f"{self.where}: the chat template failed: {error}") from None
        return rendered[0]

    def prompt_ids(self, prompt: str | Sequence[Message], *, think: bool) -> list[int]:
        """Ids of a question or conversation up to where the model goes on: see prompt_text."""
        return self.encode(self.prompt_text(prompt, think=think))

    def prompt_text(self, prompt: str | Sequence[Message], *, think: bool) -> str:
        """A question or conversation, rendered, up to where the model goes on.

        Args:
            prompt: the user's question, or messages of {"role", "content"}.
            think: end with the start-of-thinking marker, as s1 does; some templates write it.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.render(messages, add_generation_prompt=True)
        if think and not text.rstrip().endswith(self.markers.start):
            text += self.markers.opening
        return text

    def marker_id(self, token: str) -> int:
        """Id of a marker that must be one token of the vocabulary."""
        found = self.tokenizer.token_to_id(token)
        if found is None or self.encode(token) != [found]:
            raise InputError(f"{self.where}: {token} is not a single token of this tokenizer")
        return found

    @cached_property
    def ends_in_newline(self) -> frozenset[int]:
        """Ids whose text ends in a newline."""
        each = [[i] for i in range(self.vocab_size)]
        with _named(self.where, "the tokenizer failed on ids"):
            texts = self.tokenizer.decode_batch(each, skip_special_tokens=False)
        return frozenset(i for i, text in enumerate(texts) if text.endswith("\n"))

    # -- training examples ------------------------------------------------------------------

    def example(self, row: dict[str, Any], where: str, teacher: str = "deepseek") -> Example:
        """The ids and loss mask of a data row; `where` names its file and row number.

        Schemas, the first that fits: {messages}; {text}, rendered already, as s1K_tokenized;
        {question, thinking, answer}; {question, thinking_trajectories, attempt}, as s1K;
        {question, <teacher>_thinking_trajectory, <teacher>_attempt}, as s1K-1.1.

        Raises:
            InputError: a missing or ill-typed field, or a row without an assistant turn.
        """
        if row.get("messages") is not None:
            text, spans = self._render_turns(_messages(row["messages"], where), where)
        elif row.get("text") is not None:
            text = _string(row, "text", where)
            spans = _assistant_spans(text)
        else:
            text, spans = self._render_turns(_s1_messages(row, where, teacher), where)
        encoding = self._encoding(text)
        labelled = _labelled(encoding.offsets, spans)
        if not any(labelled[1:]):
            raise InputError(f"{where}: no token of an assistant turn, so nothing to learn from")
        return Example(tuple(encoding.ids), tuple(labelled), where)

    def _render_turns(
        self, messages: list[Message], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole text and the character spans that the assistant wrote in it."""
        text = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = text if i == len(messages) - 1 else self.render(messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise InputError(
                    f"{where}: the chat template of {self.where} changes earlier turns when later "
                    "ones are added, so the assistant's turns cannot be told apart"
                )
            spans.append((len(before), len(after)))
        return text, spans


class TextStream:
    """Turns ids into text as they come, holding back bytes that do not end a character."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._stream = DecodeStream(skip_special_tokens=False)
        self._shown: list[int] = []  # the ids of the last text that was handed out
        self._held: list[int] = []  # those after it

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(self._step, ids))

    def flush(self) -> str:
        """The text of bytes held back, which nothing that follows may complete: what comes next
        begins a character of its own."""
        if not self._held:
            return ""
        text = self._chat.decode(self._held)
        self._stream, self._held = DecodeStream(skip_special_tokens=False), []
        self.push(self._shown)  # some decoders drop the space before a text's first word
        return text

    def _step(self, i: int) -> str:
        with _named(self._chat.where, "the tokenizer failed on ids"):
            text = self._stream.step(self._chat.tokenizer, i)
        self._held.append(i)
        if text:
            self._shown, self._held = self._held, []
        return text or ""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; an InputError that names the file when it is broken."""
    data = read_bytes(path)
    with _named(str(path), "not a usable tokenizer"):
        tokenizer = Tokenizer.from_buffer(data)
        if not tokenizer.get_vocab_size(with_added_tokens=True):
            raise ValueError("its vocabulary is empty")
        tokenizer.no_padding()  # both may be left from another training: text is encoded whole
        tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def _named(where: str, what: str) -> Iterator[None]:
    """What the Rust side raises, even a panic, which is a BaseException, as an InputError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{where}: {what}: {reason}") from None


def _template(folder: Path) -> str:
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            return read_bytes(jinja).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{jinja}: not UTF-8: {error}") from None
    path = folder / "tokenizer_config.json"
    template = read_json_object(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):  # several named ones: "default" is what chat uses
        entries = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    if template is None:
        return CHATML
    if not isinstance(template, str):
        raise InputError(f"{path}: chat_template must be text")
    return template


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and the like of tokenizer_config.json: texts, or objects of them."""
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.exists() else {}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, else <|im_end|>."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json_object(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"{path}: eos_token_id must be an id or a list of ids")
        return ids
    end = tokenizer.token_to_id("<|im_end|>")
    return [] if end is None else [end]


def _string(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if value is None:
        raise InputError(f"{where}: field {field} is missing; the row has {_listed(row)}")
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field} must be text, found {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{where}: field {field} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {field} is not valid Unicode") from None
    return value


def _listed(row: dict[str, Any]) -> str:
    names = ", ".join(str(name)[:40] for name in list(row)[:12])
    return f"fields {names}" if names else "no fields"


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: field messages must be a list of messages")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict) or item.get("role") not in ("system", "user", "assistant"):
            raise InputError(
                f"{where}: messages[{i}] must have a role of system, user or assistant"
            )
        content = _string(item, "content", f"{where}: messages[{i}]")
        messages.append({"role": item["role"], "content": content})
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: messages[0] is the assistant's, but nothing was asked yet")
    return messages


def _s1_messages(row: dict[str, Any], where: str, teacher: str) -> list[Message]:
    if row.get("thinking") is not None:
        thinking, answer = _string(row, "thinking", where), _string(row, "answer", where)
    elif row.get("thinking_trajectories") is not None:
        traces = row["thinking_trajectories"]
        if not isinstance(traces, list) or not all(isinstance(t, str) for t in traces):
            raise InputError(f"{where}: field thinking_trajectories must be a list of texts")
        thinking, answer = "\n".join(traces), _string(row, "attempt", where)
        thinking = _string({"thinking_trajectories": thinking}, "thinking_trajectories", where)
    elif row.get(f"{teacher}_thinking_trajectory") is not None:
        thinking = _string(row, f"{teacher}_thinking_trajectory", where)
        answer = _string(row, f"{teacher}_attempt", where)
    else:
        raise InputError(
            f"{where}: fits no known schema (messages; text; question, thinking, answer; "
            f"question, thinking_trajectories, attempt; question, {teacher}_thinking_trajectory, "
            f"{teacher}_attempt): it has {_listed(row)}"
        )
    question = _string(row, "question", where)
    answer = answer if "Answer:" in answer else "Answer: " + answer
    content = f"{S1.start}\n{thinking.strip()}\n{S1.answer}\n{answer.strip()}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": content}]


def _assistant_spans(text: str) -> list[tuple[int, int]]:
    """Spans after `<|im_start|>assistant\\n` up to the next user turn, as s1's collator masks."""
    starts = [m.end() for m in re.finditer(re.escape("<|im_start|>assistant\n"), text)]
    users = [m.start() for m in re.finditer(re.escape("<|im_start|>user\n"), text)]
    return [(s, next((u for u in users if u > s), len(text))) for s in starts]


def _labelled(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Per token: does it start inside a span? Both lists ascend, so one pass."""
    labelled, i = [], 0
    for start, _ in offsets:
        while i < len(spans) and start >= spans[i][1]:
            i += 1
        labelled.append(i < len(spans) and start >= spans[i][0])
    return labelled
