"""`tenuto inspect FILE`, `tenuto check FILE|FOLDER` and `tenuto adopt FILE --name N`.

Exit codes: 0 a manifest could be proposed, all checks held, the model was adopted; 1 else; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tenuto.serving.errors import ManifestInvalid, TenutoError
from tenuto.serving.manifest import Exact, Manifest, Multiple
from tenuto.serving.repository import ModelFolder
from tenuto.serving.vetting import Limits

from . import report
from .adopting import adopt, copy
from .checking import TOLERANCE, Table, check
from .graph_facts import Facts, read
from .proposal import Proposal, default_name, propose
from .wishes import Axis, Chunk, Wishes

Value = TypeVar("Value")


def main(words: list[str]) -> int:
    """Runs one command, its name first, and returns the exit code."""
    options = _parser().parse_args(words)
    log = logging.getLogger("tenuto")
    level = log.level
    # What the modules of the server tell its log is not for whoever looks at a file.
    log.setLevel(logging.CRITICAL)
    try:
        return int(options.run(options))
    except TenutoError as error:
        print(f"tenuto {options.command}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"tenuto {options.command}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
    finally:
        log.setLevel(level)
    return 1


# -- arguments ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenuto", description="From an ONNX file to a model that is served."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = _command(
        commands, "inspect", _inspect, "say what an ONNX file is, and propose a manifest for it"
    )
    inspect.add_argument("file", type=Path, metavar="FILE.onnx")
    checked = _command(commands, "check", _check, "check that a model keeps what it is served for")
    checked.add_argument("file", type=Path, metavar="FILE.onnx|FOLDER", help="a file, or a version's folder")
    adopted = _command(commands, "adopt", _adopt, "check an ONNX file and put it into a model repository")
    adopted.add_argument("file", type=Path, metavar="FILE.onnx")
    adopted.add_argument("--name", required=True, help="the model's name, by which clients ask for it")
    adopted.add_argument(
        "--repository",
        type=Path,
        default=Path("exported"),
        metavar="DIR",
        help="gets NAME/VERSION (exported)",
    )
    adopted.add_argument(
        "--version", type=_positive, default=0, help="the model's version (the next free one)"
    )
    for one in (checked, adopted):
        one.add_argument(
            "--manifest", type=Path, metavar="FILE.json", help="the whole manifest; nothing is guessed"
        )
        one.add_argument(
            "--tolerance", type=float, default=TOLERANCE,
            help=f"by which answers may differ, as a share of the largest number in them ({TOLERANCE:g})",
        )  # fmt: skip
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=_above_0, default=60.0, help="that one run may take (60)")
    parser.add_argument(
        "--memory-bytes",
        type=_positive,
        default=4 << 30,
        help="that the process may take which runs it (4 GiB)",
    )
    wishes = parser.add_argument_group("what the file does not tell; each option may be given several times")
    for option, kind, metavar, text in (
        ("--time-axis", _axis, "TENSOR=AXIS|none", "the axis (of an output too) that is time"),
        ("--batch-axis", _axis, "TENSOR=AXIS|none", "the axis of an input or a state that holds the rows"),
        ("--chunk", _chunk, "INPUT=exact:N|multiple:N|free", "samples that a run takes along the time axis"),
        ("--left-context", _pair(_whole), "INPUT=N", "earlier samples that each run takes in front"),
        ("--length", _length, "TENSOR=AXIS:N", "the length of an axis that the graph leaves open"),
        ("--constant", _constant, "INPUT=VALUE[,VALUE…]", "what is fed; of several a client chooses"),
        ("--state", _pair(str), "INPUT=OUTPUT", "a state: the output's value is the input's at the next run"),
        ("--no-state", str, "INPUT", "it is no state, whatever it looks like"),
        ("--control", _control, "INPUT=start|end|ready|sequence_id|none", "it tells where a sequence stands"),
    ):  # fmt: skip
        wishes.add_argument(option, type=kind, action="append", default=[], metavar=metavar, help=text)
    return parser


def _pair(kind: Callable[[str], Value]) -> Callable[[str], tuple[str, Value]]:
    def parse(text: str) -> tuple[str, Value]:
        name, equals, value = text.rpartition("=")
        if not equals or not name or not value:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
        return name, kind(value)

    return parse


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _above_0(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _axis(text: str) -> tuple[str, Axis]:
    def parse(value: str) -> Axis:
        return None if value == "none" else _whole(value)

    return _pair(parse)(text)


def _chunk(text: str) -> tuple[str, Chunk]:
    def parse(value: str) -> Chunk:
        kind, _, number = value.partition(":")
        if kind == "exact":
            return Exact(exact=_positive(number))
        if kind == "multiple":
            return Multiple(multiple=_positive(number))
        if value == "free":
            return "free"
        raise argparse.ArgumentTypeError(f"expected exact:N, multiple:N or free, got {value!r}")

    return _pair(parse)(text)


def _length(text: str) -> tuple[tuple[str, int], int]:
    name, value = _pair(str)(text)
    axis, colon, length = value.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"expected TENSOR=AXIS:N, got {text!r}")
    return (name, _whole(axis)), _positive(length)


def _constant(text: str) -> tuple[str, tuple[float, ...]]:
    return _pair(lambda value: tuple(float(v) for v in value.split(",")))(text)


def _control(text: str) -> tuple[str, str]:
    def parse(value: str) -> str:
        if value not in ("start", "end", "ready", "sequence_id", "none"):
            raise argparse.ArgumentTypeError(
                f"expected start, end, ready, sequence_id or none, got {value!r}"
            )
        return value

    return _pair(parse)(text)


def _wishes(options: argparse.Namespace) -> Wishes:
    return Wishes(
        time_axes=dict(options.time_axis),
        batch_axes=dict(options.batch_axis),
        chunks=dict(options.chunk),
        left_context=dict(options.left_context),
        lengths=dict(options.length),
        constants=dict(options.constant),
        states=dict(options.state),
        no_states=frozenset(options.no_state),
        controls=dict(options.control),
    )


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(options.seconds, options.memory_bytes)


# -- the commands ------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    facts = read(options.file)
    found = report.Inspection(facts, _proposed(facts, options, default_name(options.file)))
    print(json.dumps(found.to_json()) if options.json else found.to_text())
    return 0 if found.proposal.manifest is not None else 1


def _check(options: argparse.Namespace) -> int:
    path: Path = options.file
    if path.is_dir():
        path /= "model.onnx"
    facts = read(path)
    manifest = _settled(facts, options, default_name(options.file))
    with tempfile.TemporaryDirectory(prefix="tenuto-check-") as folder:
        copy(facts, manifest, Path(folder))
        table = check(ModelFolder(manifest.name, 1, Path(folder)), _limits(options), options.tolerance)
    print(json.dumps({"checks": report.table_json(table)}) if options.json else report.table_text(table))
    return _code(table)


def _adopt(options: argparse.Namespace) -> int:
    facts = read(options.file)
    manifest = _settled(facts, options, options.name)
    manifest = Manifest.parse(json.dumps(json.loads(manifest.to_json()) | {"name": options.name}), "--name")
    adopted = adopt(facts, manifest, options.repository, options.version, _limits(options), options.tolerance)
    if options.json:
        print(json.dumps(report.adopted_json(adopted, manifest)))
    else:
        print(report.adopted_text(adopted, manifest, options.repository))
    return _code(adopted.table)


def _code(table: Table) -> int:
    return 1 if table.failed else 0


def _proposed(facts: Facts, options: argparse.Namespace, name: str) -> Proposal:
    return propose(facts, _wishes(options), name, _limits(options))


def _settled(facts: Facts, options: argparse.Namespace, name: str) -> Manifest:
    """What the model says of itself, unless options say more of it; else what is guessed.

    Raises: ManifestInvalid.
    """
    own = _manifest(facts, options) if options.manifest is not None or _wishes(options) == Wishes() else None
    return own or _guessed(facts, options, name)


def _manifest(facts: Facts, options: argparse.Namespace) -> Manifest | None:
    """The one that is given, else that beside the file, else the file's own.

    Raises: ManifestInvalid.
    """
    beside = facts.path.parent / "manifest.json"
    if options.manifest is not None:
        return Manifest.parse(options.manifest.read_bytes(), str(options.manifest))
    if facts.path.name == "model.onnx" and beside.is_file():
        return Manifest.parse(beside.read_bytes(), str(beside))
    if facts.manifest is not None:
        return Manifest.parse(facts.manifest, str(facts.path))
    return None


def _guessed(facts: Facts, options: argparse.Namespace, name: str) -> Manifest:
    """Raises: ManifestInvalid, with what the user has to say first."""
    proposal = _proposed(facts, options, name)
    if proposal.manifest is not None:
        return proposal.manifest
    lines = [
        *proposal.faults,
        *(f"{q.subject}: {q.asks}  ->  {q.option}" for q in proposal.questions if q.needed),
    ]
    told = "\n  ".join(lines)
    raise ManifestInvalid(
        f"no manifest can be proposed for {facts.path.name}, and nothing was written:\n  {told}\n"
        f"tenuto inspect {facts.path.name} tells more; --manifest FILE.json says it all"
    )
