"""The capacity page: arithmetic and a simulation, fed with measured figures.

python -m benchmarks.capacity [--write docs/capacity.md]
python -m benchmarks.capacity --measure

Without `--measure` it prints the page from benchmarks/measured.json: the same page for the same file, in less
than a minute on one core. With it, it measures this machine (two to three minutes, two cores) and writes that
file.
"""

import argparse
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, isinf
from pathlib import Path
from typing import Any

from . import fleet, measured, model
from .fleet import Plan, Result
from .measured import Figures
from .report import aligned

BEGIN = "<!-- written by python -m benchmarks.capacity: begin -->"
END = "<!-- written by python -m benchmarks.capacity: end -->"
SIZES = (10_000, 100_000, 1_000_000)
USE = 0.6  # of what a process serves, in the tables
USES = (0.5, 0.7, 0.85)  # in the simulation
FULL = 0.95  # slots, of what a process serves: the rest is for catching up
POD_CORES = 2
POD_BYTES = 2 << 30  # deploy/kubernetes/base
RATE = 1 / measured.PERIOD_SECONDS  # chunks a second of one stream
CHECKPOINT_EVERY = 50
DEFAULT_SLOTS, DEFAULT_STREAMS = 4096, 8192  # --max-sequences, --max-streams
SEGMENT_BYTES = 66  # Ethernet, IP and TCP headers around a message, none of them measured
DNS_BYTES, ADDRESS_BYTES = 65_535, 16  # a DNS message over TCP; an A record in it (RFC 1035)
SEED = 1
NOT_MEASURED = "not measured"
FEW_STEPS = 50  # of a rolling update in the larger fleets


@dataclass(frozen=True, slots=True)
class Cost:
    """What one live stream of a model takes, as measured; the wire in bytes of TCP payload."""

    chunk_us: float  # of a process that is full: the least CPU of a chunk, the most of a process
    busiest_us: float  # of that, on the busiest thread
    chunk_up: float
    chunk_down: float
    token_down: float
    seal_us: float
    process_bytes: float
    stream_bytes: float  # a sequence alone on a stream and a connection, its state included
    pod_series: float

    @property
    def chunks_per_second(self) -> float:
        """Of one process, if its threads never run at once."""
        return 1e6 / self.chunk_us

    @property
    def streams(self) -> int:
        """That one process serves: full, but not late."""
        return int(self.chunks_per_second / RATE)

    @property
    def slots(self) -> int:
        """What `--max-sequences` should be for such streams."""
        return int(self.streams * FULL)

    @property
    def most_streams(self) -> int:
        """If its threads always ran at once: what no number of cores exceeds."""
        return int(1e6 / self.busiest_us / RATE)


@dataclass(frozen=True, slots=True)
class Size:
    """What so many live streams take."""

    streams: int
    pods: int
    cores_of_work: float
    cores: float  # at `USE`
    memory_bytes: float
    up_bits: float  # a second
    down_bits: float
    tokens_per_second: float
    token_bits: float
    series: float
    connections: int
    files: int  # of a pod


def cost(figures: Figures, name: str) -> Cost:
    """One model's, of the medians."""
    full = figures["chunks"][name]["flat out"]
    wire, bytes_ = figures["wire"][name], figures["bytes"]
    series = figures["series"]
    alone = bytes_["sequence alone on a stream, beyond an empty one"]
    return Cost(
        chunk_us=full["us_per_chunk"][0],
        busiest_us=full["busiest_us"][0],
        chunk_up=wire["chunk up"],
        chunk_down=wire["chunk down"],
        token_down=wire["token on the wire"],
        seal_us=figures["seal_us"],
        process_bytes=bytes_["process"],
        stream_bytes=bytes_["connection"] + bytes_["empty stream"] + alone + bytes_["state"],
        pod_series=series["total"] - (measured.SERVED - 1) * series["per model"],
    )


def pods_for(streams: int, full: int, use: float) -> int:
    """Pods, each with one process that serves `full` streams, used to that share."""
    return ceil(streams / int(full * use))


def size(of: Cost, streams: int) -> Size:
    """The table's row for so many live streams, at `USE`."""
    pods = pods_for(streams, of.streams, USE)
    work = streams * RATE * of.chunk_us / 1e6
    tokens = streams * RATE / CHECKPOINT_EVERY
    return Size(
        streams=streams,
        pods=pods,
        cores_of_work=work,
        cores=work / USE,
        memory_bytes=pods * of.process_bytes + streams * of.stream_bytes,
        up_bits=8 * streams * RATE * of.chunk_up,
        down_bits=8 * (streams * RATE * of.chunk_down + tokens * of.token_down),
        tokens_per_second=tokens,
        token_bits=8 * tokens * of.token_down,
        series=pods * of.pod_series,
        connections=streams,
        files=ceil(streams / pods),
    )


# -- text ----------------------------------------------------------------------------------------------


def shown(figure: list[float], digits: int = 1) -> str:
    middle, low, high = figure
    return f"{middle:,.{digits}f} ({low:,.{digits}f}..{high:,.{digits}f})"


def bits(value: float) -> str:
    for unit, scale in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value / 1e3:,.1f} kbit/s"


def gib(value: float) -> str:
    return f"{value / 2**30:,.1f} GiB"


def seconds(value: float, horizon: float) -> str:
    return f"not in {horizon:,.0f} s" if isinf(value) else f"{value:.2f} s"


def exponent(streams: int) -> str:
    return {10_000: "10⁴", 100_000: "10⁵", 1_000_000: "10⁶"}.get(streams, f"{streams:,}")


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def prose(text: str, mark: str = "") -> str:
    """Wrapped as the other documents are; `mark` begins an item of a list."""
    rest = " " * len(mark)
    kept = text.replace(" %", "\N{NO-BREAK SPACE}%")
    filled = textwrap.fill(
        kept, 110, initial_indent=mark, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def head(figures: Figures) -> str:
    facts = {**figures["machine"], **figures["versions"]}
    told = ", ".join(f"{key} {value}" for key, value in facts.items() if value)
    rounds = figures["rounds"]
    return prose(f"Measured {figures['date']}: {told}; {rounds} rounds, medians (lowest..highest).")


def measured_text(figures: Figures) -> str:
    """Everything that the rest is computed from."""
    rows = [["model, load", "CPU-µs/chunk", "busiest thread", "second", "chunks/s", "cores used", "p50 ms"]]
    for name, loads in figures["chunks"].items():
        for load, found in loads.items():
            rows.append(
                [
                    f"{name}, {load}",
                    shown(found["us_per_chunk"]),
                    f"{found['busiest_us'][0]:.1f}",
                    f"{found['second_us'][0]:.1f}",
                    f"{found['chunks_per_second'][0]:,.0f}",
                    shown(found["cores"], 2),
                    f"{found['p50_ms'][0]:.1f}",
                ]
            )
    opened = [["one Open, answered", "server CPU-µs"]]
    opened += [[name, shown(found)] for name, found in figures["opens_us"].items()]
    wires = [["TCP payload, bytes", "chunk up", "chunk down", "token on the wire", "token itself"]]
    for name, wire in figures["wire"].items():
        wires.append(
            [name, *(f"{wire[k]:,.0f}" for k in ("chunk up", "chunk down", "token on the wire", "token"))]
        )
    packed = figures["packed wire"]
    wires.append(
        [
            f"lstm, {measured.PACKED_EACH} chunks a message",
            f"{packed['chunk up']:,.0f}",
            f"{packed['chunk down']:,.0f}",
            "",
            "",
        ]
    )
    memory = [["resident bytes of the server", ""]]
    memory += [[name, f"{value:,}"] for name, value in figures["bytes"].items()]
    lost = [["a killed server: callers, of them lost", "noticed after, s", "open elsewhere after, s"]]
    lost += [
        [
            f"{found['sequences']} that send every {found['period_seconds']} s, {found['lost']}",
            shown(found["noticed_seconds"], 3),
            shown(found["resumed_seconds"], 3),
        ]
        for found in figures["loss"]
    ]
    series = figures["series"]
    return "\n\n".join(
        [
            "## What was measured",
            head(figures),
            aligned(rows),
            prose(
                f"A resume token costs {figures['seal_us']:.1f} CPU-µs to seal and send: the difference "
                f"between a token with every chunk and none. A pod is ready {figures['start_seconds']} s "
                f"after its start. Its metrics page has {series['total']} series with {measured.SERVED} "
                f"models, {series['per model']} of them a model's."
            ),
            aligned(opened),
            aligned(wires),
            aligned(memory),
            aligned(lost),
        ]
    )


def process_text(of: dict[str, Cost], figures: Figures) -> str:
    parts = ["## What one process serves"]
    for name, c in of.items():
        loads = figures["chunks"][name]
        full, few, more = loads["flat out"], loads["paced 16"], loads["paced 128"]
        _, low, high = full["us_per_chunk"]
        threads = (full["busiest_us"][0] + full["second_us"][0]) / c.chunk_us
        parts.append(
            prose(
                f"**{name}**: a chunk costs {c.chunk_us:.1f} CPU-µs when the process is full, "
                f"{c.busiest_us:.1f} of them on its busiest thread, and {percent(threads)} on its two "
                "busiest: the one that reads and the model's engine. If the two never ran at once, "
                f"one process would serve 10⁶ / {c.chunk_us:.1f} = {c.chunks_per_second:,.0f} chunks/s, at "
                f"{RATE:.0f} chunks/s a stream **{c.streams} streams**. If they always did, 10⁶ / "
                f"{c.busiest_us:.1f} = {1e6 / c.busiest_us:,.0f} chunks/s, {c.most_streams} streams: more "
                "cores do not get one process beyond that. Everything below takes the lower figure, of "
                f"the median round; the dearest ({high:.1f} µs) makes it {int(1e6 / high / RATE)} "
                f"streams, the cheapest ({low:.1f} µs) {int(1e6 / low / RATE)}, and all pods below change "
                f"by as much. Flat out it took {full['cores'][0]:.2f} cores here and answered "
                f"{full['chunks_per_second'][0]:,.0f} chunks/s beside the load generator and other work. At "
                f"{percent(USE)} it is {int(c.streams * USE)} streams a pod, or "
                f"{int(c.streams * USE) / POD_CORES:.0f} per core of a pod of {POD_CORES}; "
                f"{c.streams * USE:.0f} per core of work. CPU use does not show how full a process is: a "
                f"chunk costs {few['us_per_chunk'][0]:.0f} CPU-µs at 16 streams, where batches are small "
                f"({few['cores'][0]:.2f} cores), and {more['us_per_chunk'][0]:.0f} at 128; cores at "
                f"{percent(USE)} allow {c.chunk_us:.1f} / {USE} = {c.chunk_us / USE:.0f}."
            )
        )
    return "\n\n".join(parts)


def size_table(name: str, of: Cost) -> str:
    titles = [
        f"{name}, at {percent(USE)}", "cores of work", f"cores at {percent(USE)}",
        f"pods of {POD_CORES} cores", "GPUs", "memory",
        "in", "out, tokens included", "tokens/s", "tokens", "Prometheus series", "connections", "files a pod",
    ]  # fmt: skip
    rows = [titles]
    for streams in SIZES:
        s = size(of, streams)
        rows.append(
            [
                f"{exponent(streams)} streams", f"{s.cores_of_work:,.0f}", f"{s.cores:,.0f}", f"{s.pods:,}",
                NOT_MEASURED, gib(s.memory_bytes), bits(s.up_bits), bits(s.down_bits),
                f"{s.tokens_per_second:,.0f}", bits(s.token_bits), f"{s.series:,.0f}", f"{s.connections:,}",
                f"{s.files:,}",
            ]
        )  # fmt: skip
    return aligned(rows)


def formula_text(of: Cost) -> str:
    """Each formula with its numbers, for the middle size and the LSTM."""
    streams = SIZES[1]
    s = size(of, streams)
    full = int(of.streams * USE)
    tokens, rate = s.tokens_per_second, f"{RATE:.0f}"
    of_down = s.token_bits / s.down_bits
    heads = 8 * streams * RATE * SEGMENT_BYTES
    lines = [
        (
            f"cores of work = streams × chunks/s × CPU of a chunk = {streams:,} × {rate} × "
            f"{of.chunk_us:.1f} µs = {s.cores_of_work:,.0f}; / {USE} = {s.cores:,.0f}"
        ),
        (
            f"pods = ⌈streams / ⌊{USE} × {of.streams}⌋⌉ = ⌈{streams:,} / {full}⌉ = {s.pods:,}, which have "
            f"{s.pods * POD_CORES:,} cores: two threads want two, and use about one"
        ),
        (
            f"memory = pods × process + streams × (connection + stream + sequence + state) = {s.pods:,} × "
            f"{of.process_bytes / 2**20:,.0f} MiB + {streams:,} × {of.stream_bytes:,.0f} B = "
            f"{gib(s.memory_bytes)}"
        ),
        (
            f"in = streams × chunks/s × bytes = {streams:,} × {rate} × {of.chunk_up:,.0f} B × 8 = "
            f"{bits(s.up_bits)}"
        ),
        f"out = the same with {of.chunk_down:,.0f} B, and tokens = {bits(s.down_bits)}",
        (
            f"tokens/s = streams × chunks/s / {CHECKPOINT_EVERY} = {streams:,} × {rate} / "
            f"{CHECKPOINT_EVERY} = {tokens:,.0f}, each {of.token_down:,.0f} B: {bits(s.token_bits)}, "
            f"{percent(of_down)} of what goes out; sealing takes {tokens:,.0f} × {of.seal_us:.1f} µs = "
            f"{tokens * of.seal_us / 1e6:,.1f} cores, "
            f"{percent(of.seal_us / CHECKPOINT_EVERY / of.chunk_us, 1)} of "
            "the work and part of it"
        ),
        (
            f"headers, not measured: a segment of {SEGMENT_BYTES} B a message adds {bits(heads)} to either "
            "direction"
        ),
        f"Prometheus series = pods × {of.pod_series:,.0f} = {s.series:,.0f}",
        (
            f"connections = files = one a stream where each client has one stream: {streams:,} / {s.pods:,} "
            f"= {s.files:,} a pod"
        ),
    ]
    return f"With the LSTM's figures, {exponent(streams)} streams:\n\n" + "\n".join(
        prose(line, "- ") for line in lines
    )


def breaks_text(of: Cost, figures: Figures) -> str:
    """In the order in which it happens as streams grow."""
    full = int(of.streams * USE)
    reached = figures["connections of a name of two servers"]
    connection = figures["bytes"]["connection"]
    spare = POD_BYTES - of.process_bytes - full * of.stream_bytes
    by_name = int(spare / connection)
    step = figures["start_seconds"] + fleet.MIN_READY_SECONDS
    addresses = DNS_BYTES // ADDRESS_BYTES
    slots_bytes = of.process_bytes + DEFAULT_SLOTS * of.stream_bytes
    rows = [
        (
            f"**CPU of one process**, at {of.streams} streams a pod (10⁶ / {of.chunk_us:.1f} µs / "
            f"{RATE:.0f}). The default `--max-sequences` {DEFAULT_SLOTS:,} is "
            f"{DEFAULT_SLOTS / of.streams:.0f} times that and protects nobody: resumed sequences are "
            "never refused as OVERLOADED, so a pod that gets too many makes all of its streams late. "
            f"Set `--max-sequences` to {percent(FULL)} of what the pod serves, {of.slots} here, which "
            f"leaves time to catch up. Cores beyond {POD_CORES} a pod do not help ({of.most_streams} "
            "streams at the very most); pods do."
        ),
        (
            f"**One name for all pods**, at {min(by_name, addresses * full):,} streams. A client opens a "
            f"connection to every address of a name ({reached} for one stream and 2 servers): each pod has "
            f"a connection from every client: {connection:,} B each, and ({gib(POD_BYTES)} − process − "
            f"streams) / {connection:,} B = {by_name:,} clients fill a pod's memory. Files a pod are "
            "then clients, not streams: its limit of open files is next to look at. A DNS message "
            f"holds ⌊{DNS_BYTES:,} / {ADDRESS_BYTES}⌋ = {addresses:,} addresses: {addresses * full:,} "
            "streams. A list of some pods for each client, a proxy or a gateway has neither limit."
        ),
        (
            f"**A rolling update with surge 1** takes pods × (start + minReady) = pods × {step:.1f} s: "
            + ", ".join(f"{exponent(n)} {pods_for(n, of.streams, USE) * step / 3600:,.1f} h" for n in SIZES)
            + ". Take a share for `maxSurge`; the simulation below takes "
            + f"{percent(1 / FEW_STEPS)} from {exponent(SIZES[1])} on."
        ),
        (
            f"**Prometheus**: {of.pod_series:,.0f} series a pod with one model, "
            f"{size(of, SIZES[2]).series:,.0f} at {exponent(SIZES[2])}."
        ),
        (
            f"**Memory** does not: a pod of {full} streams takes "
            f"{(of.process_bytes + full * of.stream_bytes) / 2**20:,.0f} MiB, one of {DEFAULT_SLOTS:,} "
            f"{slots_bytes / 2**20:,.0f} MiB, of {gib(POD_BYTES)}. Nor does the **network** of a pod: "
            f"{bits(8 * full * RATE * of.chunk_up)} in. Nor `--max-streams` ({DEFAULT_STREAMS:,})."
        ),
    ]
    return "## What breaks first\n\n" + "\n".join(prose(row, f"{n}. ") for n, row in enumerate(rows, 1))


def gateway_text(of: Cost, figures: Figures) -> str:
    """The same sequences on few streams, one message for many chunks."""
    packed = figures["chunks"][model.NAME]["flat out, packed"]
    wire, bytes_ = figures["packed wire"], figures["bytes"]
    there = replace(
        of,
        chunk_us=packed["us_per_chunk"][0],
        busiest_us=packed["busiest_us"][0],
        chunk_up=wire["chunk up"],
        chunk_down=wire["chunk down"],
        stream_bytes=bytes_["sequence on a shared stream"] + bytes_["state"],
    )
    rows = [["", "a connection a stream", "packed by a gateway"]]
    pairs: list[tuple[str, Callable[[Cost], str]]] = [
        ("server CPU-µs/chunk", lambda c: f"{c.chunk_us:.1f}"),
        ("streams that a process serves", lambda c: f"{c.streams}"),
        ("bytes in a chunk", lambda c: f"{c.chunk_up:,.0f}"),
        ("bytes out a chunk, without tokens", lambda c: f"{c.chunk_down:,.0f}"),
        ("resident bytes a sequence", lambda c: f"{c.stream_bytes:,.0f}"),
    ]
    rows += [[text, figure(of), figure(there)] for text, figure in pairs]
    rows += [
        [f"pods for {exponent(n)} at {percent(USE)}", f"{size(of, n).pods:,}", f"{size(there, n).pods:,}"]
        for n in SIZES
    ]
    text = (
        f"{measured.PACKED_STREAMS} streams of {measured.PACKED_EACH} "
        f"sequences, {measured.PACKED_EACH} chunks a message: a gateway that holds the clients' "
        "connections and puts what comes within a period into one message a pod. Connections and files "
        "of a pod are then as many as there are gateways. What the gateway itself takes is "
        f"{NOT_MEASURED}, and it is on the way of every chunk."
    )
    return f"## What a gateway changes\n\n{prose(text)}\n\n{aligned(rows)}"


# -- the simulation ------------------------------------------------------------------------------------


def plan(of: Cost, figures: Figures, streams: int, use: float) -> Plan:
    """A fleet of that size and use, with what was measured."""
    few = figures["loss"][0]
    pods = pods_for(streams, of.streams, use)
    return Plan(
        pods=pods,
        sequences=streams,
        slots=of.slots,
        chunk_seconds=of.chunk_us / 1e6,
        open_seconds=figures["opens_us"]["resume, new connection"][0] / 1e6,
        notice_seconds=(few["noticed_seconds"][1], few["noticed_seconds"][2]),
        reopen_seconds=max(0.0, few["resumed_seconds"][0] - few["noticed_seconds"][0]),
        latency_seconds=figures["chunks"][model.NAME]["paced 64"]["p50_ms"][0] / 1e3,
        start_seconds=figures["start_seconds"],
        surge=1 if streams <= SIZES[0] else ceil(pods / FEW_STEPS),
        seed=SEED,
    )


POD, ZONE = "the fullest pod is killed", "a third of the pods is killed"
SILENT, ROLLING = "a third of the pods falls silent", "rolling update"
Event = Callable[[Plan], Result]
EVENTS: dict[str, tuple[dict[str, Any], Event]] = {
    POD: ({"tick_seconds": 0.01, "horizon_seconds": 60.0}, fleet.pod_lost),
    ZONE: (
        {"tick_seconds": 0.05, "horizon_seconds": 60.0},
        lambda p: fleet.zone_lost(p, silent=False),
    ),
    SILENT: (
        {"tick_seconds": 0.05, "horizon_seconds": 120.0},
        lambda p: fleet.zone_lost(p, silent=True),
    ),
    ROLLING: ({"tick_seconds": 0.1}, fleet.rolled),
}


def event_table(title: str, base: Callable[[int, float], Plan]) -> str:
    settings, run = EVENTS[title]
    titles = [
        title, "pods", "moved", "50 % run again", "99 %", "100 %", "99 % caught up", "longest backlog",
        "opens refused",
        "given up", "peak CPU", "CPU of the fullest after",
    ]  # fmt: skip
    rows = [titles]
    for streams in SIZES:
        for use in USES:
            p = replace(base(streams, use), **settings)
            r = run(p)
            horizon = r.seconds if title != ROLLING else p.resume_seconds
            rows.append(
                [
                    f"{exponent(streams)}, {percent(use)}", f"{p.pods:,}", f"{r.lost:,}",
                    *(seconds(value, horizon) for value in (r.half, r.most, r.every, r.whole)),
                    f"{r.longest_backlog:.1f} s", f"{r.refused:,}", f"{r.given_up:,}",
                    percent(r.peak_use), percent(min(1.0, r.settled_use)),
                ]
            )  # fmt: skip
    return aligned(rows)


def spare_table(base: Callable[[int, float], Plan]) -> str:
    """Slots at the fullest pod against the mean before, in fleets that refuse nobody and are never late."""
    rows = [
        [
            f"spare slots so that nothing is refused, at {percent(USE)}",
            "sequences a pod",
            POD,
            ZONE,
            ROLLING,
        ]
    ]
    for streams in SIZES:
        p = replace(
            base(streams, USE), slots=streams * 4, chunk_seconds=1e-9, open_seconds=0.0, tick_seconds=0.1,
            horizon_seconds=5.0,
        )  # fmt: skip
        mean = streams / p.pods
        peaks = [run(p).peak_live for run in (fleet.pod_lost, EVENTS[ZONE][1], fleet.rolled)]
        rows.append([exponent(streams), f"{mean:.0f}", *(f"+{percent(peak / mean - 1)}" for peak in peaks)])
    return aligned(rows)


def choice_table(base: Callable[[int, float], Plan]) -> str:
    """The fullest pod is killed, and all clients have the same list in the same order."""
    settings, run = EVENTS[POD]
    rows = [
        [
            "the fullest pod is killed, at 70 %",
            "99 % run again",
            "100 %",
            "opens refused",
            "given up",
            "peak CPU",
        ]
    ]
    for streams in SIZES:
        for choice, text in ((fleet.RANDOM, "any pod"), (fleet.NEXT, "the next of one list")):
            p = replace(base(streams, 0.7), choice=choice, **settings)
            r = run(p)
            told = [seconds(value, r.seconds) for value in (r.most, r.every)]
            rows.append(
                [
                    f"{exponent(streams)}, {text}",
                    *told,
                    f"{r.refused:,}",
                    f"{r.given_up:,}",
                    f"{percent(r.peak_use)}",
                ]
            )
    return aligned(rows)


def simulation_text(of: Cost, figures: Figures) -> str:
    def base(streams: int, use: float) -> Plan:
        return plan(of, figures, streams, use)

    p = base(SIZES[0], USE)
    facts = (
        f"Each pod serves {of.streams} streams ({of.chunk_us:.1f} µs a chunk) and has {of.slots} slots, of "
        f"which {percent(p.reserve)} are for sequences that resume; a resumed Open costs it "
        f"{1e6 * p.open_seconds:,.0f} µs. A client notices a killed pod after {p.notice_seconds[0]:.3f} "
        f"to {p.notice_seconds[1]:.3f} s and needs {p.reopen_seconds:.3f} s to be there with its Open, "
        f"as measured with {figures['loss'][0]['sequences']} callers; one that falls silent after "
        f"`reply_seconds` ({p.reply_seconds:.0f}). Seed {SEED}."
    )
    carried = ", ".join(f"{percent(use)} becomes {percent(use * 3 / 2)}" for use in USES)
    after = (
        f"Survivors of a lost third carry 3/2 of what they had: {carried}. Above 2/3, less what chance puts "
        "on the fullest pod, somebody is refused for good, and those who fit leave "
        f"{percent(1 - FULL)} of a full pod for opens, for refusals and to catch up."
    )
    return "\n\n".join(
        [
            "## The simulation",
            prose(facts),
            prose(after),
            *(event_table(title, base) for title in EVENTS),
            spare_table(base),
            choice_table(base),
        ]
    )


def page(figures: Figures) -> str:
    """All between the marks; the same for the same figures."""
    of = {name: cost(figures, name) for name in measured.MODELS}
    lstm = of[model.NAME]
    return "\n\n".join(
        [
            measured_text(figures),
            process_text(of, figures),
            "## 10⁴, 10⁵, 10⁶ live streams",
            *(size_table(name, c) for name, c in of.items()),
            formula_text(lstm),
            breaks_text(lstm, figures),
            gateway_text(lstm, figures),
            simulation_text(lstm, figures),
        ]
    )


def between(text: str) -> str | None:
    """What stands between the marks of a page; None without them."""
    _, begin, rest = text.partition(BEGIN)
    body, end, _ = rest.partition(END)
    return body.strip("\n") if begin and end else None


def write(path: Path, body: str) -> None:
    """Puts `body` between the two marks of the page. Ends the program if they are not there."""
    check(path)
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}")


def check(path: Path) -> None:
    if not path.exists() or between(path.read_text()) is None:
        raise SystemExit(f"{path} is not there, or has no {BEGIN!r} … {END!r}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--measure", action="store_true", help=f"measures, and writes {measured.FILE.name}")
    parser.add_argument(
        "--rounds", type=int, default=measured.ROUNDS, help=f"of --measure ({measured.ROUNDS})"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="puts the page between that file's marks")
    options = parser.parse_args(arguments)
    if options.write:
        check(options.write)
    if options.measure:
        with tempfile.TemporaryDirectory(prefix="tenuto-capacity-") as name:
            measured.write(measured.measure(Path(name), options.rounds))
    if options.write or not options.measure:
        body = page(measured.read())
        print(body)
        if options.write:
            write(options.write, body)


if __name__ == "__main__":
    main()
