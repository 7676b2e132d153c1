"""Threads on one mixture: each gets its own answer, or a clear error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import loraweave as lw
import tiny
from loraweave.mixing.exclusion import Exclusion
from loraweave.mixture import Mixture

PROMPT = tiny.batch("llama", (6, 4), side="left")


def answer(mixture: Mixture) -> Tensor:
    asked = {key: PROMPT[key] for key in ("input_ids", "attention_mask")}
    made: Tensor = mixture.model.generate(
        **asked, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD
    )
    return made


def masked(*names: str) -> Callable[[Mixture], Tensor]:
    def ask(mixture: Mixture) -> Tensor:
        with mixture.only(*names):
            return answer(mixture)

    return ask


def by_rows(mixture: Mixture) -> Tensor:
    with mixture.rows([{"ant": 2.0}, {"cat": -2.0}]):
        return answer(mixture)


def by_policy(policy: Any) -> Callable[[Mixture], Tensor]:
    def ask(mixture: Mixture) -> Tensor:
        with mixture.exclusive():
            before, mixture.policy = mixture.policy, policy
            try:
                return answer(mixture)
            finally:
                mixture.policy = before

    return ask


def plain(mixture: Mixture) -> Tensor:
    with mixture.exclusive():
        return answer(mixture)


def test_every_thread_gets_its_own_answer() -> None:
    mixture = tiny.attached("llama", lw.Linear({"ant": 3.0, "bee": 2.0, "cat": -2.0}))
    askers = [masked("ant"), masked("bee"), masked("ant", "cat"), by_rows, by_policy(lw.Sum(2.0)), plain]
    askers += [by_policy(lw.Sum(-1.5)), by_policy(lw.Arrow(k=1))]
    expected = [ask(mixture) for ask in askers]
    assert len({str(made.tolist()) for made in expected}) > 5, "they differ, so that mixing them up would show"
    start = threading.Barrier(len(askers))

    def work(number: int) -> bool:
        start.wait()
        return all(torch.equal(askers[number](mixture), expected[number]) for _ in range(4))

    with ThreadPoolExecutor(len(askers)) as pool:
        assert list(pool.map(work, range(len(askers)))) == [True] * len(askers)


@pytest.mark.parametrize("pooling", ["prompt", "token"])
def test_gates_without_any_context(pooling: Any) -> None:
    """Passes of two generations alternate: what gates decided for one must not reach the other."""
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE(pooling=pooling, temperature=0.2)))
    prompts = [tiny.batch("llama", (length,), seed=length)["input_ids"] for length in (3, 5, 6, 8)]

    def ask(prompt: Tensor) -> Tensor:
        made: Tensor = mixture.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            eos_token_id=None, pad_token_id=tiny.PAD,
        )  # fmt: skip
        return made

    expected = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for made in (list(pool.map(ask, prompts)) for _ in range(4)):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(made, expected, strict=True))


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(work).result()


def test_a_call_beside_the_context_of_another_thread_is_an_error() -> None:
    mixture = tiny.attached("llama", lw.Sum())
    expected = answer(mixture)
    for context in (mixture.only("ant"), mixture.rows([None, None]), mixture.exclusive(), mixture.record()):
        with context, pytest.raises(lw.LoraweaveError, match=r"thread 'other_0' calls the model while thread 'Main"):
            in_thread(lambda: answer(mixture))
        assert torch.equal(in_thread(lambda: answer(mixture)), expected)


def test_a_pass_that_ends_does_not_touch_the_one_that_waits() -> None:
    """The second thread enters as early as it can: while the first is still giving the lock back."""
    exclusion = Exclusion()
    entered, lock = threading.Event(), exclusion._lock

    class Handover:
        acquire = staticmethod(lock.acquire)

        @staticmethod
        def release() -> None:
            lock.release()
            if not entered.is_set():
                assert entered.wait(10)

    exclusion._lock = Handover()  # type: ignore[assignment]

    def second() -> None:
        exclusion.enter("door")
        entered.set()
        done.wait(10)
        exclusion.leave("door")

    done = threading.Event()
    exclusion.enter("door")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        exclusion.leave("door")
        done.set()
        waiting.result(10)
    assert lock.acquire(timeout=10), "the second pass never gave the lock back"


def test_failed_and_interrupted_passes_leave_nothing_locked() -> None:
    mixture = tiny.attached("llama", lw.Sum())
    expected = answer(mixture)
    with pytest.raises(IndexError):
        mixture.model(input_ids=torch.tensor([[10_000]]))
    assert torch.equal(in_thread(lambda: answer(mixture)), expected)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = mixture.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer(mixture)
    handle.remove()
    assert torch.equal(answer(mixture), expected)
    assert torch.equal(in_thread(lambda: answer(mixture)), expected)


def test_copies_have_threads_of_their_own_and_detaching_ends_the_watch() -> None:
    mixture = tiny.attached("llama", lw.Sum())
    expected = answer(mixture)
    twin = copy.deepcopy(mixture)
    with mixture.only("ant"):
        assert torch.equal(in_thread(lambda: answer(twin)), expected)
        with twin.only("bee"), pytest.raises(lw.LoraweaveError, match="calls the model while"):
            in_thread(lambda: answer(twin))
    with mixture.exclusive():
        mixture.detach()
        in_thread(lambda: answer(mixture))
    assert not mixture.model._forward_pre_hooks
    assert not mixture.model._forward_hooks
