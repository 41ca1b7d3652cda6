"""Whoever answers questions: Gemini, any OpenAI-compatible server, and our own engine.

A teacher has `identity`, which its answers are stored under, and `ask`, one attempt without any
retry. What an attempt may end in besides a Reply:

    Unavailable   worth another attempt: a limit, a server's error, a broken or late answer
    Rejected      this question cannot be asked so, as when it is too long; others may be
    InputError    no attempt can work: the key or the model is wrong
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any, Protocol

from s1fast.errors import InputError

NO_MONEY = ("insufficient_quota", "insufficient balance")
"""In a provider's error: no attempt can work until the account is filled."""
REFUSALS = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE"}
"""Gemini's finish reasons after which asking again would be refused again; s1 met RECITATION."""
CUT = {"MAX_TOKENS", "length"}
"""Finish reasons of an answer that the token limit cut: Gemini's; OpenAI's and our engine's."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, with what it cost in tokens."""

    thinking: str = ""
    answer: str = ""
    finish_reason: str = ""
    refused: str = ""
    """Why there is no answer, where the teacher declined to give one."""
    prompt_tokens: int = 0
    thoughts_tokens: int | None = None
    """Thinking tokens as the teacher counts and bills them; None where it does not tell."""
    answer_tokens: int = 0


class Unavailable(Exception):
    """This attempt failed, the next may not.

    Args:
        retry_after_s: how long the server asked to be left alone; 0 if it did not say.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Rejected(Exception):
    """The server takes this question for invalid; another attempt would end alike."""


class Teacher(Protocol):
    identity: dict[str, Any]

    async def ask(self, question: str, system: str = "") -> Reply:
        """One attempt to answer. Raises Unavailable, Rejected or InputError."""

    async def aclose(self) -> None:
        """Closes its connections."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is asked of a teacher; None leaves a value to it, as s1 did throughout."""

    temperature: float | None = None
    max_tokens: int | None = None
    """Most tokens of an answer, thinking included."""
    thinking_budget: int | None = None
    """Gemini's bound on thinking tokens."""


def make_teacher(
    name: str, model: str, base_url: str, sampling: Sampling, *, think: bool = True
) -> Teacher:
    """The teacher of that name: gemini, openai or engine.

    Args:
        think: thoughts are wanted; without, gemini is not asked to show any, which some of its
            models cannot, and our engine answers at once.

    Raises:
        InputError: no model, a missing key or package, a model folder that cannot be loaded.
    """
    if not model:
        raise InputError("--model: name the teacher's model; there is no default")
    if name == "gemini":
        return Gemini(model, base_url, sampling, think=think)
    if name == "openai":
        return OpenAICompatible(model, base_url, sampling)
    if name == "engine":
        return OurEngine(model, sampling, think=think)
    raise InputError(f"teacher {name!r}: expected gemini, openai or engine")


def _key(*names: str, needed: bool = True) -> str:
    """The API key in the first of these environment variables; it is kept nowhere else."""
    for name in names:
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    if not needed:  # a server of one's own may want none, but the client insists on some text
        return "no-key-is-set"
    raise InputError(f"no API key: set the environment variable {' or '.join(names)}")


def _fail(code: int, message: str, model: str, key: str, headers: Any) -> Exception:
    """What an HTTP error means: another attempt, the end of the question, or of the run."""
    whole = " ".join(message.replace(key, "***").split())
    message = whole[:300]
    if code == 402 or any(words in whole.lower() for words in NO_MONEY):
        return InputError(f"the account has no credit left (HTTP {code}): {message}")
    if code in (408, 409, 425, 429) or code >= 500:
        return Unavailable(f"HTTP {code}: {message}", _retry_after(headers, whole))
    if code in (401, 403) or re.search("api[ _]key", message, re.IGNORECASE):
        return InputError(f"the API key was refused (HTTP {code}): {message}")
    if code == 404:
        return InputError(f"--model {model!r}: unknown to the server (HTTP 404): {message}")
    return Rejected(f"the server rejects the request (HTTP {code}): {message}")


def _retry_after(headers: Any, message: str) -> float:
    """Seconds that the server asks for, in a header or in words; 0 if it does not."""
    told = re.search(r"try (?:again )?in (\d+(?:\.\d+)?)\s?s", message, re.IGNORECASE)
    try:
        return max(0.0, float((headers or {}).get("retry-after") or (told[1] if told else 0)))
    except ValueError:  # a date, which providers do not send
        return 0.0


class Gemini:
    """Google's models through google-genai, thoughts included, which s1 distilled from."""

    def __init__(self, model: str, base_url: str, sampling: Sampling, *, think: bool) -> None:
        try:
            import httpx2
            from google import genai
            from google.genai import types
        except ImportError:
            raise InputError("gemini needs google-genai: pip install 's1fast[data]'") from None
        self._key = _key("GEMINI_API_KEY", "GOOGLE_API_KEY")
        self._types, self._model = types, model
        self._http = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), timeout=None)
        self._broken = httpx2.RequestError
        # Without retry options the client has an implicit retry after a broken connection, which
        # would pay again unseen; one attempt turns it off. Time limits are the caller's.
        options = types.HttpOptions(
            base_url=base_url or None,
            httpx_async_client=self._http,
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self.identity = {"teacher": "gemini", "model": model, "base_url": base_url}
        self.identity |= _given(sampling)
        thoughts = types.ThinkingConfig(
            include_thoughts=True, thinking_budget=sampling.thinking_budget
        )
        self._config: dict[str, Any] = {
            "thinking_config": thoughts if think else None,
            "temperature": sampling.temperature,
            "max_output_tokens": sampling.max_tokens,
        }

    async def ask(self, question: str, system: str = "") -> Reply:
        from google.genai import errors

        config = self._types.GenerateContentConfig(
            **self._config, system_instruction=system or None
        )
        try:
            response = await self._client.aio.models.generate_content(
                model=self._model, contents=question, config=config
            )
        except errors.APIError as error:
            headers = getattr(error.response, "headers", None)
            raise _fail(error.code, str(error.message), self._model, self._key, headers) from None
        except (self._broken, ValueError) as error:  # ValueError: a body that is no JSON
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        return _gemini_reply(response)

    async def aclose(self) -> None:
        await self._http.aclose()


def _gemini_reply(response: Any) -> Reply:
    usage = response.usage_metadata
    counts: dict[str, Any] = {
        "prompt_tokens": (usage and usage.prompt_token_count) or 0,
        "thoughts_tokens": usage and usage.thoughts_token_count,
        "answer_tokens": (usage and usage.candidates_token_count) or 0,
    }
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        return Reply(refused=f"prompt blocked: {feedback.block_reason.name}", **counts)
    if not response.candidates:
        raise Unavailable("no candidate in the answer")
    candidate = response.candidates[0]
    reason = candidate.finish_reason.name if candidate.finish_reason else ""
    parts = (candidate.content and candidate.content.parts) or []
    thinking = "\n".join(part.text for part in parts if part.text and part.thought)
    answer = "".join(part.text for part in parts if part.text and not part.thought)
    return Reply(
        thinking=_whole(thinking),
        answer=_whole(answer),
        finish_reason=reason,
        refused=reason if reason in REFUSALS else "",
        **counts,
    )


def _whole(text: str) -> str:
    """The text with U+FFFD for half a character, which JSON can hold and no file of ours."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class OpenAICompatible:
    """Any server with /chat/completions: DeepSeek, vLLM, our own."""

    def __init__(self, model: str, base_url: str, sampling: Sampling) -> None:
        try:
            import openai
        except ImportError:
            raise InputError("openai needs its package: pip install 's1fast[data]'") from None
        if sampling.thinking_budget is not None:
            raise InputError("--thinking-budget: only gemini takes one; --max-tokens bounds all")
        self._key, self._model = _key("OPENAI_API_KEY", needed=not base_url), model
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=base_url or None, max_retries=0, timeout=None
        )
        self.identity = {"teacher": "openai", "model": model, "base_url": base_url}
        self.identity |= _given(sampling)
        self._given = {k: v for k, v in _given(sampling).items() if k != "thinking_budget"}

    async def ask(self, question: str, system: str = "") -> Reply:
        return openai_reply(await self.complete(_messages(question, system), **self._given))

    async def complete(self, messages: list[dict[str, str]], **fields: Any) -> Any:
        """The server's ChatCompletion, with at least one choice; `fields` as the client names them.

        Raises:
            Unavailable, Rejected, InputError: see above.
        """
        try:
            done = await self._client.chat.completions.create(
                model=self._model,
                messages=messages,  # type: ignore[arg-type]
                **fields,
            )
        except self._openai.APIStatusError as error:
            headers = error.response.headers
            raise _fail(error.status_code, error.message, self._model, self._key, headers) from None
        except (self._openai.APIError, ValueError) as error:
            reason = error.__cause__ or error  # of a connection error, what went wrong
            raise Unavailable(f"{type(error).__name__}: {reason}") from None
        if not getattr(done, "choices", None) or not done.choices[0].message:
            raise Unavailable("no choice with a message in the answer")
        return done

    async def reach(self) -> None:
        """Raises an InputError when no server listens there or it refuses the key."""
        try:
            await self._client.models.list(timeout=30.0)
        except self._openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise InputError(
                f"{self._client.base_url}: cannot be reached ({reason}); start the server, or "
                "correct the URL"
            ) from None
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):
                message = " ".join(str(error.message).replace(self._key, "***").split())[:300]
                raise InputError(
                    f"the API key was refused (HTTP {error.status_code}): {message}"
                ) from None
        except (self._openai.APIError, ValueError):  # a list is not what it is asked for
            pass

    async def aclose(self) -> None:
        await self._client.close()


def openai_reply(done: Any) -> Reply:
    """The Reply of a ChatCompletion."""
    choice = done.choices[0]
    answer = choice.message.content or ""
    extra = choice.message.model_extra or {}
    thinking = extra.get("reasoning_content") or extra.get("reasoning") or ""
    if not thinking and ("</think>" in answer or answer.lstrip().startswith("<think>")):
        # R1-style models behind a server that does not part them; the prompt may hold the opening
        # marker, and the token limit cut the closing one.
        thinking, _, answer = answer.lstrip().removeprefix("<think>").partition("</think>")
    usage = done.usage
    output = (usage and usage.completion_tokens) or 0
    details = usage and usage.completion_tokens_details
    thoughts = details.reasoning_tokens if details else None
    reason = choice.finish_reason or ""
    refused = choice.message.refusal or ("content_filter" if reason == "content_filter" else "")
    return Reply(
        thinking=_whole(thinking).strip(),
        answer=_whole(answer).strip(),
        finish_reason=reason,
        refused=refused,
        prompt_tokens=(usage and usage.prompt_tokens) or 0,
        thoughts_tokens=thoughts,
        answer_tokens=max(0, output - (thoughts or 0)),
    )


class OurEngine:
    """A model folder in this process; questions under way at the same time share its batch."""

    def __init__(self, model: str, sampling: Sampling, *, think: bool) -> None:
        from s1fast.budget import Budget
        from s1fast.decoder import Engine, SamplingParams

        if sampling.thinking_budget is not None:
            raise InputError("--thinking-budget: only gemini takes one; --max-tokens bounds all")
        self._engine = Engine(model)
        self._params = SamplingParams(
            temperature=sampling.temperature or 0.0, max_tokens=sampling.max_tokens
        )
        self._budget = Budget() if think else None
        self.identity = {"teacher": "engine", "model": model, "think": think} | _given(sampling)

    async def ask(self, question: str, system: str = "") -> Reply:
        messages, params = _messages(question, system), self._params
        try:
            ids = self._engine.chat.prompt_ids(messages, think=self._budget is not None)
            if (params.max_tokens or 0) > self._engine.context - len(ids):
                params = replace(params, max_tokens=None)  # whatever the context leaves
            (done,) = await self._engine.generate_async([ids], params, self._budget)
        except InputError as error:
            raise Rejected(str(error)) from None
        return Reply(
            thinking=done.thinking.strip(),
            answer=done.answer.strip(),
            finish_reason=done.finish_reason or "",
            prompt_tokens=len(done.prompt_ids),
            thoughts_tokens=done.thinking_tokens,
            answer_tokens=len(done.token_ids) - done.thinking_tokens,
        )

    async def aclose(self) -> None:
        pass


def _messages(question: str, system: str) -> list[dict[str, str]]:
    instructed = [{"role": "system", "content": system}] if system else []
    return [*instructed, {"role": "user", "content": question}]


def _given(sampling: Sampling) -> dict[str, Any]:
    return {name: value for name, value in vars(sampling).items() if value is not None}
