"""From rows to token ids and loss mask: s1's format to the id, schemas, templates, the hub."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from s1fast.chat import Chat, Example, TextStream
from s1fast.config import DataConfig, TrainConfig
from s1fast.errors import InputError
from s1fast.hub import find
from s1fast.rows import load_examples, read_rows
from s1fast.trainer import preview, train

Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]

IM_START, IM_END, THINK, ANSWER, NEWLINE = 151644, 151645, 26865, 9217, 198

QUESTION = "How many r's are in naïve raspberry 🍓?"
THINKING = "Spell it: r-a-s-p.\n\nWait, go on: b-e-r-r-y."
REPLY = "Answer: 3"
PROMPT = (
    "<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LABELLED = f"<|im_start|>think\n{THINKING}\n<|im_start|>answer\n{REPLY}<|im_end|>\n"  # with loss
CONTENT = LABELLED.removesuffix("<|im_end|>\n")

SCHEMAS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": CONTENT},
        ]
    },
    "text": {"text": PROMPT + LABELLED},
    "plain": {"question": QUESTION, "thinking": f" {THINKING}\n", "answer": f"{REPLY}\n"},
    "s1K": {
        "solution": "3",
        "question": QUESTION,
        "cot_type": "math",
        "metadata": "{}",
        "cot": None,
        "thinking_trajectories": THINKING.split("\n"),  # joined with newlines
        "attempt": "3",
    },
    "s1K-1.1 deepseek": {
        "question": QUESTION,
        "deepseek_thinking_trajectory": THINKING,
        "deepseek_attempt": "3",
        "gemini_thinking_trajectory": "of the other teacher",
        "gemini_attempt": "of the other teacher",
    },
    "s1K-1.1 gemini": {
        "question": QUESTION,
        "deepseek_thinking_trajectory": "of the other teacher",
        "deepseek_attempt": "of the other teacher",
        "gemini_thinking_trajectory": THINKING,
        "gemini_attempt": "Answer: 3",
    },
}

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="module")
def qwen_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5's tokenizer alone: no template, so ChatML."""
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copyfile(shared_data / "qwen2.5_tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> Chat:
    return Chat.load(qwen_folder)


@pytest.fixture
def folder(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """A model folder with a tiny ChatML tokenizer and nothing else."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(tiny_tokenizer, model / "tokenizer.json")
    return model


def labelled_texts(chat: Chat, example: Example) -> list[str]:
    """Text of every run of tokens with loss."""
    runs = itertools.groupby(zip(example.ids, example.labelled, strict=True), lambda pair: pair[1])
    return [chat.decode([i for i, _ in run]) for with_loss, run in runs if with_loss]


def write_parquet(rows: Rows, path: Path) -> Path:
    """Every row gets every column; what it lacks is null."""
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# -- s1's format --------------------------------------------------------------------------------


def test_s1_text_ids_and_mask(qwen: Chat, qwen_folder: Path) -> None:
    row = {"question": QUESTION, "thinking": THINKING, "answer": "3"}
    example = qwen.example(row, "rows.jsonl: row 1")
    wanted = Tokenizer.from_file(str(qwen_folder / "tokenizer.json")).encode(PROMPT + LABELLED)
    assert list(example.ids) == wanted.ids
    assert qwen.decode(example.ids) == PROMPT + LABELLED
    first = example.labelled.index(True)
    assert example.labelled == (False,) * first + (True,) * (len(example.ids) - first)
    assert qwen.decode(example.ids[:first]) == PROMPT
    assert qwen.decode(example.ids[first:]) == LABELLED
    assert example.ids[first : first + 3] == (IM_START, THINK, NEWLINE)
    assert example.ids[-2:] == (IM_END, NEWLINE)
    # Five markers in all: three turns, think and answer.
    assert example.ids.count(IM_START) == 5 and example.ids.count(IM_END) == 3
    assert example.where == "rows.jsonl: row 1"


def test_marker_ids(qwen: Chat) -> None:
    assert qwen.marker_id("<|im_start|>") == IM_START
    assert qwen.marker_id("<|im_end|>") == IM_END
    assert qwen.encode("think") == [THINK]
    assert qwen.encode("answer") == [ANSWER]
    assert qwen.encode("\n") == [NEWLINE]
    assert qwen.encode("Wait") == [14190]
    final = qwen.encode("<|im_start|>answer\nFinal Answer:")
    assert final == [IM_START, ANSWER, NEWLINE, 19357, 21806, 25]
    assert qwen.stop_ids == {IM_END}
    # The embedding has 152,064 rows; ids from 151,665 on are padding.
    assert qwen.vocab_size == 151665
    assert NEWLINE in qwen.ends_in_newline and THINK not in qwen.ends_in_newline
    with pytest.raises(InputError, match="is not a single token"):
        qwen.marker_id("<|no_marker|>")


def test_prompt_ends_in_the_start_of_thinking(qwen: Chat) -> None:
    ids = qwen.prompt_ids(QUESTION, think=True)
    assert ids[-2:] == [IM_START, THINK]
    assert qwen.decode(ids) == PROMPT + "<|im_start|>think"
    plain = qwen.prompt_ids([{"role": "user", "content": QUESTION}], think=False)
    assert plain == ids[:-2] and qwen.decode(plain) == PROMPT


def test_a_prompt_begins_its_training_example(qwen: Chat) -> None:
    """What decoding feeds is what training saw."""
    ids = qwen.prompt_ids(QUESTION, think=True)
    assert list(qwen.example(SCHEMAS["plain"], "").ids[: len(ids)]) == ids


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("42", "Answer: 42"),
        ("Answer: 42", "Answer: 42"),
        ("So.\nFinal Answer: 42\n", "So.\nFinal Answer: 42"),
        ("the answer: 42", "Answer: the answer: 42"),  # s1 looks for the capital
        ("Answer 42", "Answer: Answer 42"),
    ],
)
def test_answer_is_marked_once(answer: str, written: str, qwen: Chat) -> None:
    example = qwen.example({"question": "q", "thinking": "t", "answer": answer}, "")
    text = qwen.decode(example.ids).rpartition("<|im_start|>answer\n")[2]
    assert text == f"{written}<|im_end|>\n"


words = st.text("ab 1.\n\tß中🍓<|>", min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(question=words, thinking=words, answer=words)
def test_any_text_is_labelled_exactly(
    question: str, thinking: str, answer: str, qwen: Chat
) -> None:
    row = {"question": question, "thinking": thinking, "answer": answer}
    example = qwen.example(row, "")
    content = f"{thinking.strip()}\n<|im_start|>answer\nAnswer: {answer}".rstrip()
    assert labelled_texts(qwen, example) == [f"<|im_start|>think\n{content}<|im_end|>\n"]
    assert qwen.decode(example.ids) == PROMPT.replace(QUESTION, question) + "".join(
        labelled_texts(qwen, example)
    )


# -- schemas and files --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_schema_gives_the_same_example(
    name: str, kind: str, qwen: Chat, tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = [SCHEMAS[name]]
    path = write_rows(rows) if kind == "jsonl" else write_parquet(rows, tmp_path / "rows.parquet")
    teacher: Any = name.partition(" ")[2] or "deepseek"
    examples, num_dropped = load_examples(DataConfig(path=str(path), teacher=teacher), qwen, 4096)
    wanted = qwen.encode(PROMPT), qwen.encode(LABELLED)
    assert num_dropped == 0 and len(examples) == 1
    assert list(examples[0].ids) == wanted[0] + wanted[1]
    assert list(examples[0].labelled) == [False] * len(wanted[0]) + [True] * len(wanted[1])
    assert examples[0].where == f"{path}: row 1"


def test_schemas_mixed_in_one_parquet_file(qwen: Chat, tmp_path: Path) -> None:
    path = write_parquet(list(SCHEMAS.values())[:5], tmp_path / "rows.parquet")
    examples, _ = load_examples(DataConfig(path=str(path)), qwen, 4096)
    assert [e.where for e in examples] == [f"{path}: row {i}" for i in range(1, 6)]
    assert {(e.ids, e.labelled) for e in examples} == {(examples[0].ids, examples[0].labelled)}


def test_messages_win_over_text(qwen: Chat) -> None:
    row = SCHEMAS["messages"] | {"text": "<|im_start|>assistant\nother<|im_end|>\n"}
    assert qwen.example(row, "") == qwen.example(SCHEMAS["messages"], "")


def test_all_assistant_turns_and_only_those_are_labelled(qwen: Chat) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The assistant\nis not me: assistant"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Two."},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Enough, without an answer."},
    ]
    example = qwen.example({"messages": messages}, "")
    # After the first assistant turn of two, the header of the next is in between without loss.
    wanted = ["One.<|im_end|>\n", "Two.<|im_end|>\n", "Three.<|im_end|>\n"]
    assert labelled_texts(qwen, example) == wanted


def test_rendered_text_is_masked_as_messages_are(qwen: Chat) -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Two."},
    ]
    from_messages = qwen.example({"messages": messages}, "")
    assert qwen.example({"text": qwen.render(messages)}, "") == from_messages
    assert labelled_texts(qwen, from_messages) == ["One.<|im_end|>\n", "Two.<|im_end|>\n"]


def test_folder_and_split(qwen: Chat, tmp_path: Path, write_rows: WriteRows) -> None:
    data = tmp_path / "data"
    (data / "nested").mkdir(parents=True)
    for name in ("train-00001.jsonl", "train-00000.jsonl", "test.jsonl"):
        write_rows([{"name": name}, {"name": name}], f"data/{name}")
    write_parquet([{"name": "nested"}], data / "nested" / "train.parquet")
    (data / "README.md").write_text("no data")

    def found(split: str) -> list[tuple[str, str]]:
        return [
            (str(Path(where.rpartition(": row ")[0]).relative_to(data)), row["name"])
            for where, row in read_rows(data, split)
        ]

    assert found("train") == [
        ("nested/train.parquet", "nested"),
        *[("train-00000.jsonl", "train-00000.jsonl")] * 2,
        *[("train-00001.jsonl", "train-00001.jsonl")] * 2,
    ]
    assert found("test") == [("test.jsonl", "test.jsonl")] * 2
    with pytest.raises(InputError, match=r"data.split 'validation' names none of its files"):
        found("validation")
    # Names that do not tell splits apart: all of them.
    write_rows([{"name": "a"}], "plain-a.jsonl")
    write_rows([{"name": "b"}, {"name": "c"}], "plain-b.jsonl")
    shutil.rmtree(data)
    assert [row["name"] for _, row in read_rows(tmp_path, "validation")] == ["a", "b", "c"]
    assert [where for where, _ in read_rows(tmp_path / "plain-b.jsonl", "")] == [
        f"{tmp_path / 'plain-b.jsonl'}: row {i}" for i in (1, 2)
    ]


def test_blank_lines_keep_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n\n{"a": 2}')
    assert list(read_rows(path, "")) == [(f"{path}: row 2", {"a": 1}), (f"{path}: row 4", {"a": 2})]


def test_paths_without_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: no .jsonl or .parquet files")):
        list(read_rows(tmp_path, "train"))
    csv = tmp_path / "rows.csv"
    csv.write_text("question,answer")
    with pytest.raises(InputError, match=re.escape(f"{csv}: expected a .jsonl or .parquet")):
        list(read_rows(csv, "train"))
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(InputError, match=re.escape(f"{broken}: not a usable Parquet file")):
        list(read_rows(broken, "train"))


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_hub_id_that_cannot_be_reached(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "s1fast-tests/never-published"
    with pytest.raises(InputError, match=rf"^{kind} '{name}': .*HF_HUB_OFFLINE is set"):
        find(name, kind)


@pytest.mark.parametrize("name", ["no/such/folder", "../x", "~nobody-here/x", "a" * 500, "x y"])
def test_names_that_are_neither_path_nor_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="no such path"):
        find(name)


# -- templates ----------------------------------------------------------------------------------

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n{{ no }} "}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Two 🍓."},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("opening", [False, True])
def test_smollm2_is_rendered_as_transformers_does(
    messages: list[dict[str, str]], opening: bool, smollm2: Path
) -> None:
    from transformers import AutoTokenizer

    chat, theirs = Chat.load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    assert chat.render(messages, add_generation_prompt=opening) == text
    assert chat.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_smollm2_text_round_trip(smollm2: Path) -> None:
    """Special tokens are ids, not text, and everything decodes to itself."""
    chat = Chat.load(smollm2)
    text = chat.render(CONVERSATIONS[-1])
    ids = chat.encode(text)
    assert chat.decode(ids) == text
    assert ids.count(chat.marker_id("<|im_start|>")) == 5
    assert chat.stop_ids == {chat.marker_id("<|im_end|>")}


@pytest.mark.parametrize("form", ["jinja", "config", "named", "both"])
def test_the_models_own_template(form: str, folder: Path) -> None:
    template = TURNS + OPENING
    config: dict[str, Any] = {}
    if form in ("jinja", "both"):
        (folder / "chat_template.jinja").write_text(template)
    if form == "both":
        config["chat_template"] = "the file goes before this"
    if form == "config":
        config["chat_template"] = template
    if form == "named":
        other = {"name": "tool_use", "template": "not for chat"}
        config["chat_template"] = [other, {"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    chat = Chat.load(folder)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert chat.render(messages) == "[user] Hi\n[assistant] Ho\n"
    assert chat.render(messages[:1], add_generation_prompt=True) == "[user] Hi\n[assistant] "
    assert labelled_texts(chat, chat.example({"messages": messages}, "")) == ["Ho\n"]


@pytest.mark.parametrize("written_as", ["text", "object"])
def test_templates_that_name_special_tokens(written_as: str, folder: Path) -> None:
    """Llama's templates write bos_token and eos_token by name."""
    from transformers import PreTrainedTokenizerFast

    named = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    template = "{{ bos_token }}" + TURNS.replace("\n", "{{ eos_token }}") + OPENING
    entries: dict[str, Any] = dict(named)
    if written_as == "object":
        entries = {name: {"content": text, "lstrip": False} for name, text in named.items()}
    config = {"chat_template": template, "add_bos_token": True, **entries}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **named
    )
    chat = Chat.load(folder)
    for messages in CONVERSATIONS:
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert text.startswith("<|endoftext|>[") and text.endswith("<|im_end|>")
        assert chat.render(messages) == text
    example = chat.example({"messages": CONVERSATIONS[-1]}, "")
    assert labelled_texts(chat, example) == ["One.<|im_end|>", "Two 🍓.<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for message in messages %}",
        "{{ messages[0].nothing.at_all }}",
        "{{ 1 // 0 }}",
        "{{ messages | no_such_filter }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_template_that_fails(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=re.escape(f"{folder}: the chat template failed: ")):
        Chat.load(folder).prompt_ids("Hi", think=True)


def test_template_that_rewrites_earlier_turns(folder: Path) -> None:
    """Some drop the thinking of all turns but the last: then a prefix is no prefix."""
    last = "{% if loop.last %}{{ m['content'] }}{% else %}short{% endif %}"
    template = TURNS.replace("{{ m['content'] }}", last) + OPENING
    (folder / "chat_template.jinja").write_text(template)
    chat = Chat.load(folder)
    with pytest.raises(
        InputError, match=r"rows: row 7: the chat template .* changes earlier turns"
    ):
        chat.example({"messages": CONVERSATIONS[-1]}, "rows: row 7")


@pytest.mark.parametrize("value", [5, {"default": "x"}, [{"name": "default", "template": 7}], True])
def test_template_must_be_text(value: Any, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": value}))
    with pytest.raises(InputError, match=re.escape(f"{path}: chat_template must be text")):
        Chat.load(folder)


def test_named_templates_without_a_default(folder: Path) -> None:
    """ChatML then; entries with unusable names are passed over."""
    value = [{"name": ["x"], "template": "?"}, {"name": "tool_use", "template": "?"}, 5]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert Chat.load(folder).render(CONVERSATIONS[0]).startswith("<|im_start|>system\nYou are Qwen")


# -- tokenizer ----------------------------------------------------------------------------------


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path) -> None:
    """Some tokenizer.json keep both from another training; s1 needs the text, whole."""
    row = {"question": "q", "thinking": "think " * 40, "answer": "a"}
    wanted = Chat.load(folder).example(row, "")
    for name in ("truncation", "padding"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if name == "truncation":
            tokenizer.enable_truncation(8)
        else:
            tokenizer.enable_padding(length=1000)
        tokenizer.save(str(folder / "tokenizer.json"))
        assert Chat.load(folder).example(row, "") == wanted


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, {2}),  # <|im_end|>
        ({"config.json": 5}, {5}),
        ({"config.json": 5, "generation_config.json": [7, 8]}, {7, 8}),
        ({"config.json": 5, "generation_config.json": None}, {5}),
    ],
)
def test_stop_ids(files: dict[str, Any], wanted: set[int], folder: Path) -> None:
    for name, value in files.items():
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
    assert Chat.load(folder).stop_ids == wanted


@pytest.mark.parametrize("value", ["2", -1, [], [1, "x"], True, 2.0, {"id": 2}])
def test_bad_stop_ids(value: Any, folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match=re.escape(f"{path}: eos_token_id must be")):
        Chat.load(folder)


def test_text_is_streamed_whole_characters_at_a_time(qwen: Chat) -> None:
    text = "naïve 🍓🍓 中文 Wait"
    ids = qwen.encode(text)
    stream = TextStream(qwen)
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) == text
    assert "" in pieces, "no character here is made of several tokens, so nothing was tested"
    assert not any("�" in piece for piece in pieces)


# -- preview ------------------------------------------------------------------------------------


def styled(output: str) -> list[tuple[str, str]]:
    """(style, text) of a terminal's output."""
    pieces = re.split(r"\x1b\[([\d;]*)m", output)
    return [("", pieces[0]), *zip(pieces[1::2], pieces[2::2], strict=True)]


def shown(output: str, style: Sequence[str]) -> str:
    """All text of a style, without line breaks."""
    return "".join(text for s, text in styled(output) if s in style).replace("\n", "")


def test_preview_dims_what_has_no_loss(qwen: Chat) -> None:
    row = {"question": "[bold]q[/]", "thinking": "[/t] :smile:", "answer": "3"}
    example = qwen.example(row, "data[/x].jsonl: row 4")
    first = example.labelled.index(True)
    console = Console(
        force_terminal=True, record=True, width=200, file=io.StringIO(), _environ={"TERM": "xterm"}
    )
    preview([example], qwen, console)
    counts = f"{len(example.ids)} tokens, {len(example.ids) - first} with loss"
    assert counts in console.export_text(clear=False)
    output = console.export_text(styles=True)
    assert shown(output, ["2"]) == qwen.decode(example.ids[:first]).replace("\n", "")
    plain = shown(output, ["", "0"])
    assert qwen.decode(example.ids[first:]).replace("\n", "") in plain
    assert "data[/x].jsonl: row 4" in output


def test_preview_command_writes_nothing(
    make_model: Callable[..., Path], write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"question": f"q{i}", "thinking": "t", "answer": "a"} for i in range(3)]
    config = TrainConfig(model=str(make_model("qwen2")), output=tmp_path / "run")
    config = replace(config, data=DataConfig(path=str(write_rows(rows)), preview=2))
    console = Console(record=True, width=200, file=io.StringIO())
    train(config, console)
    output = console.export_text()
    assert output.count("with loss") == 2 and "q1<|im_end|>" in output and "q2" not in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
