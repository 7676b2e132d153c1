"""Waiting for a limited time, whatever arrives meanwhile.

Time-outs of HTTP clients begin anew with every byte, so a server that drips one now and then is never given up. Here a
call as a whole has its time, and is cut off when that is over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
_first_call = threading.Lock()


def within(seconds: float, call: Coroutine[Any, Any, T]) -> T:
    """What ``call`` returns; any thread may ask, and they wait side by side.

    Raises:
        TimeoutError: ``seconds`` are over; the call is cancelled, which closes its connection.
    """

    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await call

    with _first_call:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(limited(), loop).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all, in a thread of its own: callers may have a loop already, as notebooks do."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="loraweave judge", daemon=True).start()
    return loop
