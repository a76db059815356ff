"""This server beside other people's, under one load generator: two tables, and docs/oip.md.

python -m benchmarks.peers [FOLDER] [--rounds 3] [--seconds 1] [--streams 1,16,64,256] [--frames 1,10]
                           [--servers …] [--json FILE] [--write docs/oip.md]
python -m benchmarks.peers [FOLDER] --perf-analyzer [--rounds 3] [--seconds 1] [--streams …] [--frames …]

FOLDER is what `python -m benchmarks.peers.setup FOLDER` made. Without it, and before it, the variables
PYTRITON, TORCHSERVE and MLSERVER count. Every reply is compared bit for bit, but not by perf_analyzer:
NVIDIA's load generator, which is for this server and Triton alone.
"""

import argparse
import json
from pathlib import Path

from benchmarks import benchmark, report, suites
from benchmarks.__main__ import numbers
from benchmarks.scenario import Taken
from benchmarks.suites import BATCHER, CALLERS, LEAST, OURS, TRITON, Settings

from . import analyzer, comparison, setup


def main() -> None:
    options = parse()
    if options.perf_analyzer:
        print(analyze(options))
        return
    with benchmark.running(options.seconds) as running:
        settings = Settings((BATCHER, LEAST), options.streams, options.frames, 0.0, options.servers)
        rounds = running.rounds(suites.open_inference(settings), options.rounds)
    show(rounds, options)


def analyze(options: argparse.Namespace) -> str:
    rounds = []
    with benchmark.running(options.seconds) as running:
        servers = {name: running.start(name) for name in (OURS, TRITON)}
        for number in range(options.rounds):
            taken = {}
            for load in analyzer.loads(options.streams, options.frames, CALLERS):
                for name in reversed(servers) if number % 2 else servers:
                    taken[load.name, name] = analyzer.measure(load, servers[name], options.seconds)
            rounds.append(taken)
    return f"{report.head(options.rounds, options.seconds)}\n\n{analyzer.table(rounds)}"


def show(rounds: list[Taken], options: argparse.Namespace) -> None:
    body = f"{report.head(options.rounds, options.seconds)}\n\n{comparison.text(rounds)}"
    print(body)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key in ("rounds", "seconds")}
        options.json.write_text(json.dumps(report.as_json(rounds, [], settings), indent=1) + "\n")
    if options.write:
        from . import comparison_chart  # matplotlib is slow to import

        picture = options.write.with_suffix(".svg")
        comparison_chart.draw(rounds, picture)
        report.write(options.write, f"![server CPU per message]({picture.name})\n\n{body}", comparison.MARKS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, help="made by benchmarks.peers.setup")
    parser.add_argument("--seconds", type=float, default=1.0, help="a measurement (1)")
    parser.add_argument("--rounds", type=int, default=3, help="through all of them (3)")
    parser.add_argument("--streams", type=numbers, default=[1, 16, 64, 256], help="(1,16,64,256)")
    parser.add_argument("--frames", type=numbers, default=[1, 10], help="a chunk (1,10)")
    parser.add_argument("--servers", help=f"of {','.join(suites.PEERS)} (those that are set up)")
    parser.add_argument("--perf-analyzer", action="store_true", help="is the load generator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every measurement there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="puts tables and chart into that page")
    options = parser.parse_args()
    found = setup.find(options.folder)
    options.servers = tuple(
        options.servers.split(",") if options.servers else [s for s in suites.PEERS if s in found]
    )
    needed = {TRITON, setup.ANALYZER} if options.perf_analyzer else set(options.servers)
    if missing := needed - set(found):
        parser.error(f"{', '.join(sorted(missing))}: not set up; python -m benchmarks.peers.setup FOLDER")
    if options.write:
        report.check(options.write, comparison.MARKS)
    return options


if __name__ == "__main__":
    main()
