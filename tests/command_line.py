"""The command line run in the process of a test."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pvcore.__main__ import main

Run = Callable[..., tuple[int, str, str]]


def in_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str
) -> Run:
    """A call of `pvcore` with these words first: `(status, standard output, standard error)`."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pvcore", *words, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run
