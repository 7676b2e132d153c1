"""A browser shows the page, says nothing on its console, and asks nobody for anything."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_runs import EVIL, Reader, judged_folder, painted_folder, run_folder, scored

from loraweave.reporting.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; on Debian and Ubuntu: apt-get install chromium"
)


class Shown:
    """A page as Chromium has it: its markup once parsed, what the console said, and what was asked for."""

    def __init__(self, page: Path, place: Path, *extra: str) -> None:
        log = place / "net.json"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        # What the browser wants for itself goes nowhere: nobody listens at port 9.
        net = [f"--user-data-dir={place / 'profile'}", f"--log-net-log={log}", "--proxy-server=127.0.0.1:9"]
        command = [str(BROWSER), *flags, *net, *(extra or ["--dump-dom"]), page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        self.markup = done.stdout
        self.console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        self.requests = asked(json.loads(log.read_text()))


def asked(log: dict[str, Any]) -> list[str]:
    """Addresses that the page asked for; those without an origin are the browser's own."""
    kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event["params"] for event in log["events"] if event["type"] == kind and "url" in event.get("params", {})]
    return [job["url"] for job in jobs if job["initiator"] != "not an origin"]


def test_a_page_that_does_what_ours_must_not_is_noticed(tmp_path: Path) -> None:
    """Else the other tests would say nothing."""
    page = tmp_path / "page.html"
    page.write_text('<img src="http://elsewhere.invalid/x.png"><script>console.log("said")</script>')
    shown = Shown(page, tmp_path)
    assert shown.requests == ["http://elsewhere.invalid/x.png"]
    assert len(shown.console) == 1


def test_a_browser_shows_a_comparison(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path / "run", names=("mole", EVIL[0], EVIL[1])))
    check(page, tmp_path)


def test_a_browser_shows_pictures_and_a_judgement(tmp_path: Path) -> None:
    run = painted_folder(tmp_path / "run", ("merge", EVIL[1]), side=200, prompt=EVIL[0])
    scored(run, {"merge": {"text_alignment": 0.3}, EVIL[1]: {"text_alignment": 0.2}})
    judged_folder(run / "judged", b=EVIL[1])
    check(write_report(run), tmp_path)


def check(page: Path, place: Path) -> None:
    shown = Shown(page, place)
    assert shown.console == []
    assert shown.requests == []
    written, parsed = Reader(page.read_text(encoding="utf-8")), Reader(shown.markup)
    assert parsed.text == written.text
    assert parsed.tables == written.tables
    picture = place / "shot.png"
    Shown(page, place, f"--screenshot={picture}", "--window-size=800,900", "--hide-scrollbars")
    assert len(set(Image.open(picture).convert("RGB").resize((80, 90)).tobytes())) > 30, "the page is blank"
