"""Server CPU-µs per message and latency: this server, its transport alone, and three written by hand.

python -m benchmarks [SCENARIO…] [--seconds 1] [--rounds 3] [--streams 1,64,256,1024] [--frames 1,10]
                     [--servers …] [--no-memory] [--json FILE] [--write docs/performance.md]

All servers run at once, idle but for the one under load. Each round goes through all of them, every
other round in the opposite order, and ratios are taken within a round. Figures are for reading,
never a gate: the exit status says only whether the run came to its end.
"""

import argparse
import json
from pathlib import Path

from . import benchmark, budgets, memory, own_code, report
from .scenario import Taken
from .suites import PEERS, SERVERS, SUITES, Settings


def main() -> None:
    options = parse()
    with benchmark.running(options.seconds) as running:
        settings = Settings(
            tuple(name for name in options.servers if name not in PEERS),
            tuple(options.streams),
            tuple(options.frames),
            running.capacity(),
            tuple(name for name in options.servers if name in PEERS),
        )
        tables = [table for name in options.scenarios for table in SUITES[name](settings) if table]
        rounds = running.rounds(tables, options.rounds)
        bytes_each = memory.measure(running.repository) if options.memory else {}
        own = own_code.tables(running.repository.lstm) if options.all else ""
    show(rounds, bytes_each, own, options)


def show(rounds: list[Taken], bytes_each: dict[str, float], own: str, options: argparse.Namespace) -> None:
    verdicts = [*budgets.verdicts(rounds), *budgets.of_memory(bytes_each)]
    body = report.text(rounds, verdicts, report.head(options.rounds, options.seconds), own)
    print(body)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "write")}
        document = report.as_json(rounds, verdicts, settings)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.write:
        from . import chart  # matplotlib is slow to import

        picture = options.write.with_suffix(".svg")
        chart.draw(rounds, picture)
        report.write(options.write, f"![server CPU per message]({picture.name})\n\n{body}")


def numbers(words: str) -> list[int]:
    return [int(part) for part in words.split(",")]


def parse() -> argparse.Namespace:
    def names(words: str) -> list[str]:
        chosen = words.split(",")
        if unknown := set(chosen) - {*SERVERS, *PEERS}:
            raise argparse.ArgumentTypeError(f"no such server: {', '.join(sorted(unknown))}")
        return chosen

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SUITES)} (all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="a measurement (1)")
    parser.add_argument("--rounds", type=int, default=3, help="through all of them (3)")
    parser.add_argument("--streams", type=numbers, default=[1, 64, 256, 1024], help="(1,64,256,1024)")
    parser.add_argument("--frames", type=numbers, default=[1, 10], help="a chunk (1,10)")
    parser.add_argument("--servers", type=names, default=list(SERVERS), help=",".join((*SERVERS, *PEERS)))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip that part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every measurement there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="puts tables and chart into that page")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(SUITES):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if options.write:
        report.check(options.write)
    options.all = not options.scenarios
    options.memory = options.memory and options.all
    options.scenarios = options.scenarios or list(SUITES)
    return options


if __name__ == "__main__":
    main()
