"""Requests that are refused: why, by which HTTP status, and which field it is about.

Errors have OpenAI's form, so that its clients raise what they document. A message may quote a name
that the client gave, never a text that it wants completed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from s1fast.chat import Chat
from s1fast.errors import InputError
from s1fast.protocol import (
    BUDGET_FIELDS,
    NEUTRAL,
    NEUTRAL_IN_MESSAGE,
    Asked,
    ChatMessage,
    StreamOptions,
    TextPart,
)


class Refused(Exception):
    """A request that gets an error of HTTP instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kinds |= {429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused_fields(errors: Sequence[Any], asked: type[Asked]) -> Refused:
    """What pydantic found, the first field's; values are not repeated."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not valid JSON: {first['ctx']['error']}")
    if len(first["loc"]) < 2:
        if first["type"] == "value_error":  # from the checks above, which begin with the field
            message = first["msg"].removeprefix("Value error, ")
            name = message.split()[0]
            return Refused(400, message, name if name in asked.model_fields else None)
        return Refused(400, "the body must be a JSON object, sent as application/json")
    # Of what may be a text or a list, the errors within the list say more.
    within = [error for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    first = max(within, key=lambda error: _path(error["loc"][1:]).count("["))
    path = _path(first["loc"][1:])
    if first["type"] == "extra_forbidden":
        *place, name = first["loc"][1:]
        name = str(name)[:100]
        path = f"{_path(place)}.{name}" if place else name
        names = [*asked.model_fields, *ChatMessage.model_fields]
        nearest = difflib.get_close_matches(name, names, 1, 0.7)
        hint = f"; is {nearest[0]} meant?" if nearest else "; leave it out"
        if path in NEUTRAL:
            hint = "; leave it out"
        return Refused(400, f"{path}: this server does not honour it{hint}", path)
    said = [e["msg"].removeprefix("Value error, ") for e in errors if _path(e["loc"][1:]) == path]
    reasons = list(dict.fromkeys(said))
    return Refused(400, f"{path}: {' or: '.join(reasons[:4])}", path)


_INNER = {*ChatMessage.model_fields, *TextPart.model_fields, *StreamOptions.model_fields}
_INNER |= set(NEUTRAL_IN_MESSAGE)


def _path(loc: Sequence[Any]) -> str:
    """A place as messages[0].content; pydantic's names for a union's branches are left out."""
    path = str(loc[0])[:100]
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _INNER:
            path += f".{part}"
    return path


_NAMES: tuple[str, ...] = (
    *BUDGET_FIELDS,
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "stop"),
    *("max_tokens", "max_completion_tokens"),
)


def refused_input(error: InputError, asked: Asked, chat: Chat) -> Refused:
    """An InputError of the engine, under the names that the request used."""
    message = str(error).removeprefix(f"{chat.where}: ")
    names = {"max_thinking_tokens": "thinking_token_budget", "max_tokens": "max_completion_tokens"}
    for ours, theirs in names.items():
        if asked.given([theirs]):
            message = re.sub(rf"\b{ours}\b", theirs, message)
    said = set(re.findall(r"\w+", message))
    found = [name for name in _NAMES if name in said]
    if asked.is_tree and "max_thinking_tokens" in said:
        found.insert(0, "budgets")
    param = next(iter(asked.given(found)), asked.prompt_field)
    code = "context_length_exceeded" if "context" in message else None
    return Refused(400, message, param, code)
