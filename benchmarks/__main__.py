"""Server CPU-µs per message and latency: this server, its transport alone, and three written by hand.

python -m benchmarks [SCENARIO…] [--seconds 1] [--rounds 3] [--streams 1,64,256,1024] [--frames 1,10]
                     [--servers …] [--no-memory] [--json FILE] [--write docs/performance.md]

All servers run at once, idle but for the one under load. Each round goes through all of them, every
other round in the opposite order, and ratios are taken within a round. Figures are for reading,
never a gate: the exit status says only whether the run came to its end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from . import budgets, memory, model, own_code, recording, report, suites
from .load import Job
from .scenario import Case, Measurement, Party, Taken
from .server_process import ServerProcess
from .suites import BARE, NULL, OURS, SERVERS, SUITES, TRITON, Settings

WARMUP_SECONDS = 0.3
BARE_SECONDS = 0.5
FAIRNESS_SECONDS = 3.0
PACED_SECONDS = 3.0  # 150 messages of the one stream
SLOW_SECONDS = 3.5  # those that never read are read no more after 1.4, when their outboxes are full
OVERLOADED_SECONDS = 3.0  # until a server forgets that it refused newcomers
TURNS_SECONDS = 4.0  # until each sequence had its first answers, with a resume token, and its form is known
CALIBRATION = Party(256, 1)


class Benchmark:
    """The servers of a run and what is measured on them."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self.seconds: float = options.seconds
        self.folder = folder
        self.repository = model.write_repository(folder / "repository")
        names = dict.fromkeys([OURS, *options.servers])
        self.servers = {n: stack.enter_context(ServerProcess(n, self.repository)) for n in names}

    def measure(self, case: Case) -> Measurement:
        if case.server == BARE:
            return self._bare(case.parties[0])
        for party in case.parties:
            recording.record(party, self.repository, self.folder)
        server = self.servers[case.server]
        job = Job(
            pid=server.pid,
            port=server.port,
            tracks=str(self.folder),
            check=case.server != NULL,  # which computes nothing
            warmup_seconds=self._warmup_seconds(case),
            seconds=self._seconds(case),
            parties=case.parties,
        )
        words = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
        # gRPC cancels some of 1,024 streams that open at once (docs/decisions.md): a baseline may try again.
        return _run(words, f"{case.table}, {case.row}", attempts=1 if case.server == OURS else 3)

    def _bare(self, party: Party) -> Measurement:
        paced = party.messages_per_second
        numbers = [party.streams, party.frames, PACED_SECONDS if paced else BARE_SECONDS]
        numbers.append(1 / paced if paced else 0.0)
        file = self.repository.images if party.tracks == "images" else self.repository.lstm
        words = [sys.executable, "-m", "benchmarks.bare_engine", str(file)]
        return _run([*words, *map(str, numbers)], "bare session.run")

    def _seconds(self, case: Case) -> float:
        if case.table == suites.FAIRNESS:
            return FAIRNESS_SECONDS
        if case.table == suites.ALONE_PACED:
            return PACED_SECONDS
        return self.seconds

    def _warmup_seconds(self, case: Case) -> float:
        if case.table == suites.SLOW:
            return SLOW_SECONDS
        if case.row == suites.LIVE_TURNS:
            return TURNS_SECONDS
        return WARMUP_SECONDS + case.parties[0].ramp_seconds

    def capacity(self) -> float:
        """Messages per second of 256 streams in a closed loop."""
        return self.measure(Case("capacity", OURS, OURS, (CALIBRATION,))).messages_per_second


def _run(words: list[str], what: str, attempts: int = 1) -> Measurement:
    for _ in range(attempts):
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if not done.returncode:
            return Measurement.parse(json.loads(done.stdout))
        print(f"the measurement failed: {what}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def main() -> None:
    options = parse()
    rounds: list[Taken] = []
    with tempfile.TemporaryDirectory(prefix="tenuto-benchmarks-") as name, ExitStack() as stack:
        benchmark = Benchmark(options, Path(name), stack)
        settings = Settings(
            tuple(options.servers), tuple(options.streams), tuple(options.frames), benchmark.capacity()
        )
        tables = [table for name in options.scenarios for table in SUITES[name](settings) if table]
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            order = [case for table in tables for case in (table[::-1] if number % 2 else table)]
            taken: Taken = {}
            for case in order:
                taken[case] = benchmark.measure(case)
                if case.table == suites.OVERLOAD:
                    time.sleep(OVERLOADED_SECONDS)
            rounds.append({case: taken[case] for table in tables for case in table})
        bytes_each = memory.measure(benchmark.repository) if options.memory else {}
        own = own_code.tables(benchmark.repository.lstm) if options.all else ""
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


def parse() -> argparse.Namespace:
    def numbers(words: str) -> list[int]:
        return [int(part) for part in words.split(",")]

    def names(words: str) -> list[str]:
        chosen = words.split(",")
        if unknown := set(chosen) - {*SERVERS, TRITON}:
            raise argparse.ArgumentTypeError(f"no such server: {', '.join(sorted(unknown))}")
        return chosen

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SUITES)} (all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="a measurement (1)")
    parser.add_argument("--rounds", type=int, default=3, help="through all of them (3)")
    parser.add_argument("--streams", type=numbers, default=[1, 64, 256, 1024], help="(1,64,256,1024)")
    parser.add_argument("--frames", type=numbers, default=[1, 10], help="a chunk (1,10)")
    parser.add_argument("--servers", type=names, default=list(SERVERS), help=",".join((*SERVERS, TRITON)))
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
