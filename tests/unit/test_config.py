"""Settings: each a flag and a variable, and every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tenuto.serving import cli
from tenuto.serving.config import ServerConfig, flag_of, variable_of
from tenuto.serving.errors import ConfigInvalid

# A value of each setting that is not its default.
OTHER: dict[str, Any] = {
    "repository": Path("/models"), "host": "::1", "port": 1, "metrics_port": 2, "device": "cpu", "threads": 3,
    "max_sequences": 4, "max_state_bytes": 15, "max_streams": 5, "max_predicts": 6, "max_pending_bytes": 7,
    "max_message_bytes": 8, "window": 9, "idle_seconds": 10.5, "run_seconds": 11.5, "drain_seconds": 12.5,
    "vet_seconds": 13.5, "vet_memory_bytes": 14, "transport": "threads", "pool": "graph", "buffers": "kept",
    "log_level": "debug", "token_key_file": Path("/keys"), "token_seconds": 16.5, "max_token_bytes": 17,
    "large_states": "rarer", "checkpoint_every": 18, "resume_reserve": 0.25,
    "tls_cert": Path("/cert"), "tls_key": Path("/key"), "tls_client_ca": Path("/ca"), "insecure": True,
    "callers": Path("/callers"), "rebalance_above": 0.5, "rebalance_per_second": 22.5,
    "rebalance_age_seconds": 23.5, "log_format": "json",
    "otlp_endpoint": "http://collector:4318/v1/traces", "trace_chunks": 24,
    "drain_notice_seconds": 25.5, "model_control": True, "shared_memory": "/mine-",
    "front_ends": 26, "in_flight": 1, "poll_seconds": 19.5, "max_age_seconds": 20.5, "max_generate": 21,
}  # fmt: skip
FIELDS = sorted(ServerConfig.model_fields)
SECONDS = [name for name in FIELDS if name.endswith("_seconds")]


def parse_flags(*arguments: str) -> dict[str, Any]:
    return vars(cli._parser().parse_args(arguments))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_variable_and_a_flag(name: str) -> None:
    value = OTHER[name]
    assert value != getattr(ServerConfig(), name)
    from_variable = ServerConfig.build({}, {variable_of(name): str(value)})
    flag = [flag_of(name)] if value is True else [flag_of(name), str(value)]
    flag = [str(value)] if name == "repository" else flag
    from_flag = ServerConfig.build(parse_flags(*flag), {})
    assert getattr(from_variable, name) == getattr(from_flag, name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_help_text(name: str) -> None:
    assert ServerConfig.model_fields[name].description


def test_names_of_flags_and_variables() -> None:
    assert (flag_of("max_sequences"), variable_of("max_sequences")) == (
        "--max-sequences",
        "TENUTO_MAX_SEQUENCES",
    )


def test_nothing_set_is_the_defaults() -> None:
    assert ServerConfig.build(parse_flags(), {}) == ServerConfig()


def test_the_flag_wins() -> None:
    config = ServerConfig.build(parse_flags("--port", "5"), {"TENUTO_PORT": "6", "TENUTO_WINDOW": "7"})
    assert (config.port, config.window) == (5, 7)


@pytest.mark.parametrize("variable", ["TENUTO_PROT", "TENUTO_port", "TENUTO_", "TENUTO_MODEL_CONFIG"])
def test_an_unknown_variable_is_an_error_that_names_it_and_the_known_ones(variable: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"unknown setting {variable};.* known: .*TENUTO_PORT|{variable}"):
        ServerConfig.build({}, {variable: "1"})


def test_all_unknown_variables_are_named() -> None:
    with pytest.raises(ConfigInvalid, match="unknown setting TENUTO_A, TENUTO_B;"):
        ServerConfig.build({}, {"TENUTO_B": "1", "TENUTO_A": "1"})


def test_variables_of_others_are_left_alone() -> None:
    others = {"TENUTO_DATA": "/d", "TENUTO_MODELS": "/m", "TENUTO_SERVER": "h:1", "PATH": "/bin", "PORT": "x",
              "TENUTO_TIMEOUT_SECONDS": "1", "TENUTO_REPLY_SECONDS": "1"}  # fmt: skip
    assert ServerConfig.build({}, others) == ServerConfig()


WRONG = [("max_state_bytes", "-1"), ("port", "65536"), ("port", "abc"), ("device", "gpu"), ("window", "0"),
         ("max_sequences", "0"), ("host", ""), ("run_seconds", "0")]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG)
def test_a_wrong_value_names_flag_variable_and_value(name: str, value: str) -> None:
    for flags, environment in (({name: value}, {}), ({}, {variable_of(name): value})):
        with pytest.raises(ConfigInvalid) as caught:
            ServerConfig.build(flags, environment)
        text = str(caught.value)
        assert text.startswith(f"{flag_of(name)} ({variable_of(name)}) is {value!r}: ")


def test_all_wrong_values_are_named() -> None:
    with pytest.raises(ConfigInvalid, match=r"--port .*; --window "):
        ServerConfig.build({"port": "x", "window": "x"}, {})


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e300"])
def test_seconds_are_numbers_that_a_timer_can_wait(name: str, value: str) -> None:
    with pytest.raises(ConfigInvalid, match=flag_of(name)):
        ServerConfig.build({name: value}, {})


@pytest.mark.parametrize("name", ["idle_seconds", "drain_seconds", "poll_seconds", "max_age_seconds"])
def test_zero_seconds_are_allowed_where_they_mean_something(name: str) -> None:
    assert getattr(ServerConfig.build({name: "0"}, {}), name) == 0


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        ServerConfig().port = 1


def test_wrong_settings_end_with_status_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TENUTO_WINDOW", "many")
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tenuto serve: --window (TENUTO_WINDOW) is 'many': ")
    assert err.count("\n") == 1


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in set(FIELDS) - {"repository"}:
        assert flag_of(name) in text
