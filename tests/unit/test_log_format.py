"""One event, one line: whatever is in it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import PurePath
from types import TracebackType

import pytest

from tenuto.serving.log_format import formatter

Raised = tuple[type[BaseException], BaseException, TracebackType | None]


def record(text: str, *arguments: object, error: Raised | None = None) -> logging.LogRecord:
    made = logging.LogRecord("tenuto.engine", logging.WARNING, "f.py", 1, text, arguments, error)
    made.created, made.msecs = 1_764_300_000.042, 42.0
    return made


def test_json_says_when_who_and_what() -> None:
    line = formatter("json").format(record("%s ended %s", "toy/1: 0a1b", "END"))
    assert json.loads(line) == {
        "time": "2025-11-28T03:20:00.042Z",
        "level": "warning",
        "logger": "tenuto.engine",
        "message": "toy/1: 0a1b ended END",
    }


def test_json_is_one_line_with_whatever_a_client_sent() -> None:
    line = formatter("json").format(record("%s", 'a "label"\nlevel=error \u2028 €'))
    assert "\n" not in line
    assert json.loads(line)["message"] == 'a "label"\nlevel=error \u2028 €'


def test_json_holds_the_stack_of_an_error() -> None:
    try:
        raise ValueError("a bug")
    except ValueError:
        raised = sys.exc_info()
    assert raised[0] is not None
    line = formatter("json").format(record("met a bug", error=raised))
    assert "\n" not in line
    assert json.loads(line)["error"].endswith("ValueError: a bug")


def test_json_has_a_field_for_each_thing_that_a_line_brings_along() -> None:
    one = record("%s ended %s", "0a1b", "END")
    vars(one).update(model="toy", version=1, seconds=0.25, caller="", level="none", kept=PurePath("a"))
    assert json.loads(formatter("json").format(one)) == {
        "time": "2025-11-28T03:20:00.042Z",
        "level": "warning",  # no field takes the place of what every line has
        "logger": "tenuto.engine",
        "message": "0a1b ended END",
        "model": "toy",
        "version": 1,
        "seconds": 0.25,
        "caller": "",
        "kept": "a",
    }


def test_what_a_logger_is_given_as_extra_is_such_a_thing(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("tenuto.engine").warning("%d models", 2, extra={"models": 2})
    formatter("console").format(caplog.records[0])  # adds what it has made to the record
    line = json.loads(formatter("json").format(caplog.records[0]))
    assert sorted(line) == ["level", "logger", "message", "models", "time"]


def test_the_console_is_for_people() -> None:
    line = formatter("console").format(record("%d models", 2))
    assert line.endswith("WARNING tenuto.engine: 2 models")


def test_the_console_has_one_line_for_a_text_of_several() -> None:
    text = (
        "toy/1 is not served: the manifest disagrees:\n  input 'x'\n  input 'y'\x1b[2J\u2028\r\nERROR forged"
    )
    line = formatter("console").format(record("%s", text))
    assert line.isprintable()
    assert line.endswith("manifest disagrees: input 'x'; input 'y'\\x1b[2J; ; ERROR forged")


def test_the_console_has_the_stack_of_an_error_below_its_line() -> None:
    try:
        raise ValueError("a bug")
    except ValueError:
        raised = sys.exc_info()
    assert raised[0] is not None
    line, *stack = formatter("console").format(record("met\na bug", error=raised)).splitlines()
    assert line.endswith("met a bug")
    assert (stack[0], stack[-1]) == ("Traceback (most recent call last):", "ValueError: a bug")
