"""`discopt llm` and `discopt resume`, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from discopt.cli import app

STAGES = ["--stage", "2@32", "--stage", "1@64"]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["llm", *map(str, words)])


def resume(*words: object) -> Result:
    return CliRunner().invoke(app, ["resume", *map(str, words)])


def refusal(result: Result, code: int = 1) -> str:
    """The one line of a refused command; of a wrong option, all that is said."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    if code == 1:
        *_, line = result.stderr.strip().splitlines()
        assert line.startswith("error: ")
        return line
    return " ".join(result.stderr.replace("│", " ").split())
