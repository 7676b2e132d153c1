"""Going through all questions: what is answered already is not asked again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from tqdm import tqdm

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.answers import Answers
from loraweave.evaluation.judges.pictures import read_picture
from loraweave.evaluation.judges.question import Question, parse
from loraweave.evaluation.judges.server import Refused, Server, Unavailable

GIVE_UP = 3
"""Questions in a row without an answer after which a run stops: the server is down, or takes none of them."""


def judge(
    asked: Sequence[Question],
    server: Server,
    answers: Answers,
    *,
    attempts: int = 3,
    workers: int = 1,
    again: bool = False,
    progress: bool = True,
) -> int:
    """Ask whatever is not answered yet, and store every answer at once.

    An answer that cannot be read is asked for again, ``attempts`` times in all; then the question is stored as
    failed, with what was said. So is one that the server refuses. One that the server did not answer stays open, for
    another run.

    Args:
        asked: all questions.
        server: who answers.
        answers: where answers are kept.
        attempts: answers per question before it counts as failed.
        workers: questions at once.
        again: ask failed questions once more.
        progress: show a bar on stderr.

    Returns:
        How many questions are still open.

    Raises:
        LoraweaveError: the server refuses us, or gave no answer to three questions in a row.
    """
    for name, number in (("attempts", attempts), ("workers", workers)):
        if number < 1:
            raise LoraweaveError(f"{name}: expected at least 1, got {number}")
    todo = answers.open(asked, again=again)
    trouble = _Trouble(len(asked) - len(todo), len(asked))
    rest = iter(todo)
    waiting: set[Future[None]] = set()
    with tqdm(
        total=len(asked), initial=len(asked) - len(todo), desc="judging", unit="answer", disable=not progress
    ) as bar:
        pool = ThreadPoolExecutor(workers)
        try:
            while True:
                # As many as there are workers, not all: after an interruption nothing waits that would still be asked.
                for question in islice(rest, workers - len(waiting)):
                    waiting.add(pool.submit(_one, question, server, answers, attempts, trouble))
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bar.update()
        finally:
            # What is asked already may still be answered; what waits before another try does not.
            server.stop()
            pool.shutdown()
    return len(answers.open(asked))


class _Trouble:
    """Counts questions in a row that got no answer."""

    def __init__(self, answered: int, total: int) -> None:
        self.lock = threading.Lock()
        self.in_a_row, self.answered, self.total = 0, answered, total

    def good(self) -> None:
        with self.lock:
            self.in_a_row = 0
            self.answered += 1

    def bad(self, said: str) -> None:
        with self.lock:
            self.in_a_row += 1
            if self.in_a_row >= GIVE_UP:
                raise LoraweaveError(
                    f"no answer to {GIVE_UP} questions in a row, the last time: {said}; {self.answered} of "
                    f"{self.total} are answered and stored, the same command goes on from there"
                )


def _one(question: Question, server: Server, answers: Answers, attempts: int, trouble: _Trouble) -> None:
    pictures = [read_picture(question.pair.pictures[method]) for method in (question.first, question.second)]
    said: list[str] = []
    spent: dict[str, int] = {"tokens_in": 0, "tokens_out": 0}
    why: Any = None
    for _ in range(attempts):
        try:
            reply = server.ask(question.text, pictures)
        except Unavailable as error:
            return trouble.bad(str(error))
        except Refused as error:
            answers.put(question, {"failed": f"refused: {error}", "said": said, **spent})
            return trouble.bad(str(error))
        said.append(server.redact(reply.text))
        spent["tokens_in"] += reply.tokens_in or 0
        spent["tokens_out"] += reply.tokens_out or 0
        why = parse(reply.text)
        if not isinstance(why, str):
            answers.put(question, {"scores": why, "said": said, **spent})
            return trouble.good()
    answers.put(question, {"failed": f"cannot be read: {why}", "said": said, **spent})
    return trouble.good()
