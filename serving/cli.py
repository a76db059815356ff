"""`tenuto serve`: flags and environment to a running server."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

from .config import ServerConfig, flag_of, variable_of
from .errors import ConfigInvalid, TenutoError
from .log_format import formatter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenuto serve",
        description="Serve the models of a repository over gRPC.",
        epilog="Every flag is also an environment variable, e.g. TENUTO_MAX_SEQUENCES; the flag wins.",
    )
    for name, field in ServerConfig.model_fields.items():
        text = f"{field.description} (default {field.default}, {variable_of(name)})".replace("%", "%%")
        if name == "repository":
            parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=text)
        elif field.annotation is bool:
            parser.add_argument(
                flag_of(name), dest=name, default=argparse.SUPPRESS, action="store_true", help=text
            )
        else:
            parser.add_argument(
                flag_of(name), dest=name, default=argparse.SUPPRESS, metavar="VALUE", help=text
            )
    return parser


def _version() -> str:
    try:
        return version("tenuto")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "0+unknown"


def _leave(number: int, _frame: FrameType | None) -> None:
    """At once: nothing is served yet. The process that checks models ends with this one."""
    os._exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Serves until a signal.

    Exit status 0 after an orderly stop, 2 for wrong settings, 1 for what else is named.
    """
    flags = vars(_parser().parse_args(arguments))
    try:
        config = ServerConfig.build(flags, os.environ)
    except TenutoError as error:
        print(f"tenuto serve: {error}", file=sys.stderr)
        return 2
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(config.log_format))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
    # Until the server can end in order. As the first process of a container it would not get a signal that it
    # does not handle at all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    # Before gRPC is loaded. Its notes on every closed connection are not for an operator's log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from .server import Server

    try:
        server = Server(config, _version())
    except TenutoError as error:
        print(f"tenuto serve: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigInvalid) else 1
    try:
        server.start()
    except TenutoError as error:
        print(f"tenuto serve: {error}", file=sys.stderr)
        return 1
    server.catch_signals()
    print(server.ready_line, flush=True)
    server.serve_until_signal()
    if server.lingers:  # a run that comes back to an interpreter that ends would abort the process
        logging.shutdown()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
