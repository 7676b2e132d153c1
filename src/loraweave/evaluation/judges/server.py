"""Asking a vision-language model over any server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import base64
import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.deadline import within

URL, MODEL, KEY = "LORAWEAVE_JUDGE_URL", "LORAWEAVE_JUDGE_MODEL", "LORAWEAVE_JUDGE_KEY"
_OTHER_URL, _OTHER_KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
_OFFICIAL = "api.openai.com"
_PASSING = frozenset({408, 409, 425, 429})


class Unavailable(Exception):
    """The server did not answer, however often it was asked; later it may."""


class Refused(Exception):
    """The server answers, but not this question (bad request, too large)."""


@dataclass(frozen=True)
class Access:
    """Which server and model. The key is shown nowhere: it is no part of the representation and of no message."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def from_environment(
        cls, url: str | None = None, model: str | None = None, environment: Mapping[str, str] = os.environ
    ) -> Access:
        """``LORAWEAVE_JUDGE_URL``, ``_MODEL`` and ``_KEY``; else ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``.

        ``OPENAI_API_KEY`` goes to the server of ``OPENAI_BASE_URL`` and to api.openai.com alone, never to another that
        ``LORAWEAVE_JUDGE_URL`` or ``url`` names. Servers on one's own machine need no key.

        Raises:
            LoraweaveError: no URL, one that is not http(s), or no model.
        """
        openai = environment.get(_OTHER_URL)
        place = url or environment.get(URL) or openai
        if not place:
            raise LoraweaveError(f"no judge: set {URL} (or {_OTHER_URL}), e.g. http://localhost:8000/v1, or give --url")
        parts = urlsplit(place)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoraweaveError(f"{URL}: expected http://HOST/v1 or https://HOST/v1, got {parts.scheme or place!r}")
        if parts.username or parts.password:
            raise LoraweaveError(f"{URL}: expected no user and password in it; put the key into {KEY}")
        name = model or environment.get(MODEL)
        if not name:
            raise LoraweaveError(f"which model shall judge? Set {MODEL}, or give --model")
        trusted = place == openai or (parts.hostname == _OFFICIAL and parts.scheme == "https")
        return cls(place, name, environment.get(KEY) or (environment.get(_OTHER_KEY, "") if trusted else ""))


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to try again.

    Attributes:
        timeout: seconds within which the whole answer to a request must be there; then it is given up, even if the
            server still sends something now and then.
        tries: requests per question before it is left for a later run.
        first_wait: seconds before the second try; each further wait is twice as long, up to ``longest_wait``, less a
            random quarter. A server's ``Retry-After`` takes its place.
        longest_wait: seconds; a longer ``Retry-After`` is cut to ``longest_retry_after``.
        longest_retry_after: seconds.
    """

    timeout: float = 120.0
    tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_retry_after: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("timeout", "first_wait", "longest_wait", "longest_retry_after"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise LoraweaveError(f"{name}: expected a number of seconds above 0, got {value!r}")
        if self.tries < 1:
            raise LoraweaveError(f"tries: expected at least 1, got {self.tries!r}")

    def wait(self, tried: int, retry_after: float | None) -> float:
        """Seconds to wait after ``tried`` requests."""
        if retry_after is not None:
            return min(retry_after, self.longest_retry_after)
        # The exponent is bounded, or a float would overflow after a thousand tries.
        full = min(self.longest_wait, self.first_wait * 2.0 ** min(tried - 1, 60))
        return full * (1 - 0.25 * random.random())


@dataclass(frozen=True)
class Reply:
    """What came back: the text, and the tokens that the server says it counted (None where it does not say)."""

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None


class Server:
    """A judge's server. May be used by several threads.

    Args:
        access: which one.
        patience: with trouble.
        temperature: of the answer; None sends none, for models that refuse one.
    """

    def __init__(
        self,
        access: Access,
        patience: Patience = Patience(),
        temperature: float | None = 0.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise LoraweaveError("a judge needs the openai client: pip install 'loraweave[judge]'") from error
        self.access, self.patience, self.temperature = access, patience, temperature
        self._stopped = threading.Event()
        # Its own retries stop at waits of 8 s and ignore a Retry-After above a minute: too short for a busy server. Its
        # own time-out begins anew with every byte.
        self.client: Any = openai.AsyncOpenAI(
            base_url=access.url, api_key=access.key or "none", timeout=None, max_retries=0
        )

    def ask(self, text: str, pictures: Sequence[tuple[bytes, str]]) -> Reply:
        """One answer; waits and tries again on time-outs, broken connections, 408, 409, 425, 429 and 5xx.

        Args:
            text: the question.
            pictures: each one's bytes and kind, in the order in which the model sees them.

        Raises:
            Unavailable: all tries failed.
            Refused: the server does not take this question.
            LoraweaveError: it refuses us (401, 403) or knows no such model or address (404).
        """
        import openai

        options: dict[str, Any] = {} if self.temperature is None else {"temperature": self.temperature}
        messages = [{"role": "user", "content": [{"type": "text", "text": text}, *map(_shown, pictures)]}]
        said = ""
        for tried in range(1, self.patience.tries + 1):
            retry_after = None
            try:
                call = self.client.chat.completions.create(model=self.access.model, messages=messages, **options)
                return _reply(within(self.patience.timeout, call))
            except openai.APIStatusError as error:
                self._raise_if_lasting(error.status_code, str(error))
                said, retry_after = f"HTTP {error.status_code}", _retry_after(error.response.headers)
            except TimeoutError:
                said = f"no answer within {self.patience.timeout:g} s"
            except openai.APIConnectionError as error:
                said = f"no connection ({self.redact(str(error.__cause__ or error))})"
            except (openai.APIError, json.JSONDecodeError) as error:
                # A body that is no JSON, or not of the protocol's shape: what a proxy says in a server's place.
                said = f"not an answer in OpenAI's form ({self.redact(str(error))})"
            except _NoAnswer as error:
                said = str(error)
            if tried < self.patience.tries and self._stopped.wait(self.patience.wait(tried, retry_after)):
                break
        raise Unavailable(f"{self.access.url}: {said}, at the last of {tried} tries")

    def stop(self) -> None:
        """Wait no longer: threads that would try again give up. For good."""
        self._stopped.set()

    def redact(self, text: str) -> str:
        """``text`` without the key, should a server have repeated it."""
        return text.replace(self.access.key, "***") if self.access.key else text

    def _raise_if_lasting(self, status: int, message: str) -> None:
        if status in _PASSING or status >= 500:
            return
        if status in (401, 403):
            # The message may hold parts of the key.
            raise LoraweaveError(f"{self.access.url} refuses access (HTTP {status}); check {KEY}") from None
        if status == 404:
            raise LoraweaveError(
                f"{self.access.url}: no such address or model {self.access.model!r} (HTTP 404); check {URL} and {MODEL}"
            ) from None
        raise Refused(f"HTTP {status}: {self.redact(' '.join(message.split()))[:300]}") from None


class _NoAnswer(Exception):
    """A well-formed reply without any text."""


def _shown(picture: tuple[bytes, str]) -> dict[str, Any]:
    content, kind = picture
    url = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _reply(completion: Any) -> Reply:
    """The text of a completion. The client does not check what servers send, so every step may be missing."""
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    text = getattr(message, "content", None)
    if not isinstance(text, str):
        raise _NoAnswer("an answer without text")
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (count if isinstance(count, int) else None for count in counts)
    return Reply(text, tokens_in, tokens_out)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks for, given as a number or as a date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        date = email.utils.parsedate_tz(text)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else None
