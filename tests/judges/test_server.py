"""Asking a real server that answers, fails in every way, or hangs."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from judging_server import KEY, QUICK, Judge, completion

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges import server as module
from loraweave.evaluation.judges.server import Access, Patience, Refused, Reply, Server, Unavailable

PICTURES = [(b"\x89PNG one", "image/png"), (b"\xff\xd8\xff two", "image/jpeg")]
Connect = Callable[..., Server]


def test_one_request_holds_the_text_then_the_pictures(served: Judge, connect: Connect) -> None:
    served.replies = ["fine"]
    assert connect().ask("what is it?", PICTURES) == Reply("fine", 100, 7)
    (request,) = served.requests
    (message,) = request["messages"]
    assert request["model"] == "model"
    assert request["temperature"] == 0.0
    assert message["content"][0] == {"type": "text", "text": "what is it?"}
    urls = [part["image_url"]["url"] for part in message["content"][1:]]
    sent = [(base64.b64decode(url.partition(",")[2]), url.partition(";")[0]) for url in urls]
    assert sent == [(content, f"data:{kind}") for content, kind in PICTURES]
    assert served.keys == [f"Bearer {KEY}"]


def test_no_temperature_is_sent_where_none_is_wanted(served: Judge, connect: Connect) -> None:
    connect(temperature=None).ask("?", PICTURES)
    assert "temperature" not in served.requests[0]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"retry-after": "0.01"}, "{}"),
        (500, {}, "broken"),
        (503, {}, json.dumps({"error": {"message": "busy"}})),
        (408, {}, ""),
        "HANG",
        "DRIP",
        "CLOSE",
        (200, {}, "this is not JSON"),
        (200, {"content-type": "text/html"}, "<html>a proxy</html>"),
        (200, {}, "{}"),
        (200, {}, json.dumps({"choices": []})),
        (200, {}, json.dumps(completion(None))),
    ],
    ids=str,
)
def test_trouble_that_passes_costs_nothing_but_time(served: Judge, connect: Connect, trouble: Any) -> None:
    served.replies = [trouble, trouble, "fine"]
    assert connect().ask("?", PICTURES).text == "fine"
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ((500, {}, f"echo {KEY}"), "HTTP 500"),
        ("HANG", "no answer within 0.3 s"),
        ("CLOSE", "no connection"),
        ((200, {}, f"no JSON but {KEY}"), "not an answer"),
    ],
    ids=str,
)
def test_trouble_that_stays_is_told_without_the_key(served: Judge, connect: Connect, trouble: Any, said: str) -> None:
    served.usual = lambda request: trouble
    with pytest.raises(Unavailable, match=said) as raised:
        connect().ask("?", PICTURES)
    assert len(served.requests) == 3
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("trouble", ["DRIP", "DRIP HEAD"])
def test_the_time_is_for_the_whole_answer_whatever_arrives_meanwhile(
    served: Judge, connect: Connect, trouble: str
) -> None:
    served.usual = lambda request: trouble
    started = time.perf_counter()
    with pytest.raises(Unavailable, match=r"no answer within 0.3 s, at the last of 3 tries"):
        connect().ask("?", PICTURES)
    assert 3 * 0.3 <= time.perf_counter() - started < 5


def test_threads_wait_side_by_side(served: Judge, connect: Connect) -> None:
    served.replies = ["HANG"] * 4
    client, started = connect(Patience(timeout=1, tries=1)), time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(client.ask, "?", PICTURES) for _ in range(4)]
        assert all(isinstance(one.exception(), Unavailable) for one in found)
    assert time.perf_counter() - started < 3
    assert client.ask("?", PICTURES).text.startswith("I see")


def test_a_running_loop_is_no_hindrance(served: Judge, connect: Connect) -> None:
    """As in notebooks."""

    async def inside() -> Reply:
        return connect().ask("?", PICTURES)

    served.replies = ["fine"]
    assert asyncio.run(inside()).text == "fine"


def test_nobody_listens() -> None:
    with pytest.raises(Unavailable, match="no connection"):
        Server(Access("http://127.0.0.1:9/v1", "model"), QUICK).ask("?", PICTURES)


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, LoraweaveError, r"refuses access \(HTTP 401\); check LORAWEAVE_JUDGE_KEY"),
        (403, LoraweaveError, "refuses access"),
        (404, LoraweaveError, "no such address or model 'model'"),
        (400, Refused, "HTTP 400: .*no pictures please"),
        (413, Refused, "HTTP 413"),
    ],
)
def test_what_stays_wrong_is_not_tried_again(
    served: Judge, connect: Connect, status: int, kind: type[Exception], said: str
) -> None:
    body = json.dumps({"error": {"message": f"no pictures please, {KEY}"}})
    served.usual = lambda request: (status, {}, body)
    with pytest.raises(kind, match=said) as raised:
        connect().ask("?", PICTURES)
    assert len(served.requests) == 1
    assert KEY not in str(raised.value)


def test_retry_after_takes_the_place_of_our_own_wait() -> None:
    patience = Patience(first_wait=1, longest_wait=8, longest_retry_after=100)
    assert patience.wait(1, 7.5) == 7.5
    assert patience.wait(1, 0.0) == 0.0
    assert patience.wait(1, 1e9) == 100
    for tried, full in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (5000, 8)):
        assert all(0.75 * full <= patience.wait(tried, None) <= full for _ in range(20))


@pytest.mark.parametrize("date", [False, True])
def test_what_the_server_asks_for_is_waited(served: Judge, connect: Connect, date: bool) -> None:
    """Longer than our own waits of 0.02 s; dates have whole seconds."""
    text = email.utils.formatdate(time.time() + 2, usegmt=True) if date else "0.7"
    served.replies = [(429, {"retry-after": text}, "{}"), "fine"]
    started = time.perf_counter()
    assert connect().ask("?", PICTURES).text == "fine"
    assert time.perf_counter() - started > 0.6


def test_a_server_that_is_ready_at_once_is_not_kept_waiting(served: Judge, connect: Connect) -> None:
    served.replies = [(503, {"retry-after": "0"}, "{}"), "fine"]
    started = time.perf_counter()
    assert connect(Patience(timeout=5, tries=2, first_wait=30)).ask("?", PICTURES).text == "fine"
    assert time.perf_counter() - started < 10


def test_retry_after_in_seconds_and_as_a_date() -> None:
    assert module._retry_after({"retry-after": "12"}) == 12
    assert module._retry_after({"retry-after": "-3"}) == 0
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert module._retry_after({"retry-after": in_a_minute}) == pytest.approx(60, abs=5)
    for nonsense in ("soon", "nan", "inf", ""):
        assert module._retry_after({"retry-after": nonsense}) is None
    assert module._retry_after({}) is None


def test_a_stopped_server_waits_no_more(served: Judge, connect: Connect) -> None:
    served.usual = lambda request: (429, {"retry-after": "3000"}, "{}")
    client = connect()
    client.stop()
    with pytest.raises(Unavailable, match="HTTP 429, at the last of 1 tries"):
        client.ask("?", PICTURES)


OURS, OPENAI = "http://localhost:8000/v1", "https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("environment", "url", "key"),
    [
        ({"LORAWEAVE_JUDGE_URL": OURS, "LORAWEAVE_JUDGE_KEY": "sk-k"}, OURS, "sk-k"),
        ({"OPENAI_BASE_URL": OURS, "OPENAI_API_KEY": "sk-o"}, OURS, "sk-o"),
        ({"LORAWEAVE_JUDGE_URL": OPENAI, "OPENAI_API_KEY": "sk-o"}, OPENAI, "sk-o"),
        # OpenAI's key is nobody else's business.
        ({"LORAWEAVE_JUDGE_URL": OURS, "OPENAI_API_KEY": "sk-o"}, OURS, ""),
        ({"LORAWEAVE_JUDGE_URL": OURS, "OPENAI_BASE_URL": OPENAI, "OPENAI_API_KEY": "sk-o"}, OURS, ""),
        ({"LORAWEAVE_JUDGE_URL": "http://api.openai.com/v1", "OPENAI_API_KEY": "sk-o"}, "http://api.openai.com/v1", ""),
    ],
)
def test_access_from_the_environment(environment: dict[str, str], url: str, key: str) -> None:
    access = Access.from_environment(environment={"LORAWEAVE_JUDGE_MODEL": "m", **environment})
    assert (access.url, access.model, access.key) == (url, "m", key)
    assert "sk-" not in repr(access)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "set LORAWEAVE_JUDGE_URL"),
        ({"LORAWEAVE_JUDGE_URL": "localhost:8000"}, "expected http://HOST/v1"),
        ({"LORAWEAVE_JUDGE_URL": "file:///etc"}, "expected http://HOST/v1"),
        ({"LORAWEAVE_JUDGE_URL": "http://me:secret@host/v1"}, "no user and password"),
        ({"LORAWEAVE_JUDGE_URL": OURS}, "Set LORAWEAVE_JUDGE_MODEL"),
    ],
)
def test_access_that_is_not_whole(environment: dict[str, str], said: str) -> None:
    with pytest.raises(LoraweaveError, match=said) as raised:
        Access.from_environment(environment=environment)
    assert "secret" not in str(raised.value)


def test_patience_is_checked() -> None:
    with pytest.raises(LoraweaveError, match="timeout: expected a number of seconds above 0, got 0"):
        Patience(timeout=0)
    with pytest.raises(LoraweaveError, match="tries: expected at least 1"):
        Patience(tries=0)
