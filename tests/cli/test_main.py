"""The command line itself: help, mistakes, exit codes."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from loraweave.cli import app, main
from loraweave.errors import LoraweaveError, LoraweaveWarning


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which ``arguments`` are refused."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "pydantic", "matplotlib", "rich", "numpy", "yaml"]
    code = (
        "import sys, runpy; sys.argv = ['loraweave', '--help']\n"
        "try: runpy.run_module('loraweave', run_name='__main__')\n"
        f"except SystemExit as end: print('LOADED', sorted(set({heavy}) & set(sys.modules)), end.code)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LOADED [] 0" in out
    # Beside the start of Python itself, which a busy machine makes slow.
    started = time.process_time()
    app.parser().format_help()
    assert time.process_time() - started < 0.3


def test_help_teaches_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, verb in app.VERBS.items():
        assert f"loraweave {name}" in shown
        assert verb.summary in shown
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    "command", [command for verb in app.VERBS.values() for command, _ in verb.examples], ids=lambda command: command
)
def test_examples_in_help_pages_parse(command: str) -> None:
    program, *arguments = shlex.split(command.partition(" > ")[0])
    assert program == "loraweave"
    options = app.parse(arguments)
    assert options.run is app.VERBS[arguments[0]].run


def test_fields_may_stand_behind_options() -> None:
    options = app.parse(["train", "r.yaml", "train.steps=1", "-o", "out", "method.scale=2", "--copy-experts", "a=b"])
    assert options.overrides == ["train.steps=1", "method.scale=2", "a=b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("inspct loras/qa", "unknown verb 'inspct'; did you mean 'inspect'?"),
        ("inspect", "the following arguments are required: PATH; see loraweave inspect --help"),
        ("inspect --jsn loras/qa", "argument '--jsn' is one too many; see loraweave inspect --help"),
        ("inspect loras/nowhere/at/all", "loras/nowhere/at/all: no such folder"),
        ("inspect zoo:nobody", "nobody"),
        ("train nowhere.yaml -o out", "no such recipe: 'nowhere.yaml'"),
        ("train nowhere.yaml -o out steps", "argument 'steps' is one too many"),
        ("generate nowhere --input x", "no mixture at 'nowhere'"),
        ("generate nowhere --input x --max-new-tokens 0", "expected a whole number of at least 1, got '0'"),
        ("generate nowhere --only a --without b", "argument --without: not allowed with argument --only"),
        ("evaluate nowhere", "no test data: give --data FILE"),
        ("evaluate nowhere --data nowhere.jsonl --metric exct_match", "did you mean 'exact_match'?"),
        ("evaluate nowhere --data nowhere.jsonl", "no such data file: 'nowhere.jsonl'"),
        ("demo --seeds none", "expected a whole number of at least 1, got 'none'"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where() -> None:
    with pytest.raises(LoraweaveError, match="no such recipe"):
        main(["train", "nowhere.yaml", "-o", "out", "--debug"])


def with_verb(monkeypatch: pytest.MonkeyPatch, does: object) -> None:
    """Let ``loraweave version`` do something else."""
    verb = app.VERBS["version"]
    monkeypatch.setitem(app.VERBS, "version", type(verb)(**(vars(verb) | {"run": does})))


def test_interruption_is_130_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    with_verb(monkeypatch, interrupted)
    assert main(["version"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_warnings_are_one_line_and_others_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(_: argparse.Namespace) -> None:
        warnings.simplefilter("always")
        warnings.warn("this works, but not as you think", LoraweaveWarning, stacklevel=1)
        warnings.warn("for programmers", FutureWarning, stacklevel=1)

    with_verb(monkeypatch, warned)
    assert main(["version"]) == 0
    assert capsys.readouterr().err == "warning: this works, but not as you think\n"


def test_other_exceptions_are_bugs_and_show_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: argparse.Namespace) -> None:
        raise ZeroDivisionError

    with_verb(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        main(["version"])


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from loraweave.cli import main; sys.exit(main(['version', '--json']))"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["version", "--json"]) == 0
    assert '"versions"' in capsys.readouterr().out
