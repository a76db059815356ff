"""Server CPU-µs per message: this server, its transport alone, and two written by hand.

python -m benchmarks [--seconds 2] [--rounds 3] [--streams 1,64,256] [--frames 1,10]
                     [--servers tenuto,null,naive_aio,micro_batcher] [--json FILE]

All servers run at once, idle but for the one under load. Each round goes through all of them, every
other round in the opposite order, and ratios are taken within a round. Figures are for reading,
never a gate: the exit status says only whether the run came to its end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from . import budgets, model, report, scenario, tracks
from .load import Job
from .scenario import SERVERS, Case, Measurement, Round
from .server_process import ServerProcess

TRACKS, CHUNKS = 256, 16  # different sequences, and how many chunks of each are checked
WARMUP_SECONDS = 0.3


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="tenuto-benchmarks-") as folder, ExitStack() as stack:
        path = model.write_repository(Path(folder) / "repository")
        for frames in {1, *options.frames}:
            record(path, Path(folder), frames)
        servers = {n: stack.enter_context(ServerProcess(n, path)) for n in options.servers}
        rounds: list[Round] = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            sets = case_sets(options)
            order = [case for cases in sets for case in (cases[::-1] if number % 2 else cases)]
            taken = {c: measure(c, servers[c.server], Path(folder), options.seconds) for c in order}
            rounds.append({case: taken[case] for cases in sets for case in cases})
    show(rounds, options)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(SERVERS):
            raise argparse.ArgumentTypeError(f"no such server: {', '.join(sorted(unknown))}")
        return chosen

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=2.0, help="a measurement (2)")
    parser.add_argument("--rounds", type=int, default=3, help="through all of them (3)")
    parser.add_argument("--streams", type=numbers, default=[1, 64, 256], help="(1,64,256)")
    parser.add_argument("--frames", type=numbers, default=[1, 10], help="a chunk (1,10)")
    parser.add_argument("--servers", type=names, default=list(SERVERS), help=",".join(SERVERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every measurement there")
    return parser.parse_args()


def case_sets(options: argparse.Namespace) -> list[list[Case]]:
    """What is compared within a set is measured one after the other."""
    sets = [
        scenario.peers(options.servers, streams, frames)
        for frames in options.frames
        for streams in options.streams
    ]
    if "tenuto" in options.servers:
        sets += [scenario.live_sequences("tenuto"), scenario.chunks_in_a_message("tenuto")]
    return sets


def record(path: Path, folder: Path, frames: int) -> None:
    """Random sequences, and what the model gives to each alone and whole."""
    rng = np.random.default_rng(model.SEED)
    shape = (TRACKS, CHUNKS * frames, model.INPUTS)
    inputs = rng.standard_normal(shape, np.float32)
    runner = model.session(path)
    answers = np.stack([model.alone(runner, sequence) for sequence in inputs])
    split = (TRACKS, CHUNKS, frames, -1)
    tracks.save(folder / f"{frames}.npz", inputs.reshape(split), answers.reshape(split))


def measure(case: Case, server: ServerProcess, folder: Path, seconds: float) -> Measurement:
    job = Job(
        pid=server.pid,
        port=server.port,
        model=model.NAME,
        tracks=str(folder / f"{case.scenario.frames}.npz"),
        check=case.server != "null",  # which computes nothing
        warmup_seconds=WARMUP_SECONDS,
        seconds=seconds,
        scenario=case.scenario,
    )
    command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the load generator failed at: {case.table}, {case.row}")
    return Measurement(**json.loads(done.stdout))


def show(rounds: list[Round], options: argparse.Namespace) -> None:
    machine, versions = report.machine(), report.versions()
    print(", ".join(f"{key} {value}" for key, value in {**machine, **versions}.items() if value))
    print(f"{options.rounds} rounds of {options.seconds} s; medians (lowest..highest)")
    for name in dict.fromkeys(case.table for case in rounds[0]):
        print("\n" + report.table(rounds, name))
    checked = sum(taken.checked for found in rounds for taken in found.values())
    print(f"\n{checked:,} replies compared with the sequence alone, bit for bit: no difference\n")
    verdicts = budgets.verdicts(rounds)
    for verdict in verdicts:
        print(report.verdict_line(verdict))
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        text = json.dumps(report.as_json(rounds, verdicts, settings), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
