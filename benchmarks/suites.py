"""The scenarios by name, each a list of tables; a table is measured case after case within a round."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import dialect
from .scenario import Case, Party

FRONTED, ONE_BY_ONE = "tenuto, 2 front ends", "tenuto, one batch in flight"
OURS, NULL, LEAST, BARE = "tenuto", "null", "least_engine", "bare"
TRITON, TORCHSERVE, MLSERVER = "triton", "torchserve", "mlserver"  # see the modules in peers/
AIO, TUNED, THREADS, BATCHER = "naive_aio", "tuned_aio", "naive_threads", "micro_batcher"
SERVERS = (OURS, NULL, LEAST, AIO, TUNED, BATCHER, THREADS)
# One that serves sequences wakes a thousand times a second, on the account of its other models.
TORCHSERVE_IMAGES = "torchserve_images"
# Other people's, and what they speak.
PEERS = {TRITON: dialect.OIP, TORCHSERVE: dialect.TORCHSERVE, MLSERVER: dialect.MLSERVER}

# Of the engine without a server: the largest batch of the model, and none.
BARE_ROWS, BARE_ROW = "64 rows", "1 row"
PACED_MS = 20.0
ALONE_PACED = f"1 stream, a frame every {PACED_MS:g} ms"

BUSY = Party(64, 1)
LIVE = "live sequences"
LIVE_64, LIVE_IDLE = "64 live", "10,000 live, 64 of them busy"
LIVE_TURNS = "10,000 live, each in its turn"
PACED_64, PACED_IDLE = "64 live, paced", "10,000 live, 64 of them busy, paced"
PACE = 4_000.0  # messages per second: below what one core serves

PACKED = "chunks in a message"
ONE_EACH, TEN_EACH = "640 sequences, 1 chunk a message", "640 sequences, 10 chunks a message"
ONE_ALONE = "64 sequences, 1 chunk a message"

NEWCOMERS = "256 streams flat out, and newcomers"
FAIRNESS = "256 streams flat out, how evenly"
HALF = "256 paced streams at half of tenuto's capacity"
IMAGES, IMAGE_STREAM, IMAGE_UNARY = "images, one a message", "64 streams", "64 unary callers"
IMAGE_NULL, IMAGE_BARE = "64 streams, null", "bare session.run, 64 rows, one thread"
RAGGED = "chunks of 1 to 10 frames, 64 streams"
CHANNELS = "64 streams on 1, 16 and 64 connections"
MIXED = f"64 streams, 10 frames every {PACED_MS:g} ms, and images"
SLOW = "64 streams, and slow readers"
OVERLOAD = "streams that open until twice the capacity"
CHECKPOINTS = "a resume token every so many chunks, 64 streams"
OIP, OIP_ROW = "the Open Inference Protocol", "tenuto, OIP"
FRONT_ENDS = "with processes that receive"
CALLERS = (1, 16, 64)  # of images
DENORMALS = "denormal input, 64 streams, 10 frames a chunk"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was asked for, and the capacity that it measured first."""

    servers: tuple[str, ...]
    streams: tuple[int, ...]
    frames: tuple[int, ...]
    capacity: float  # messages per second of 256 streams in a closed loop, 1 frame a chunk
    others: tuple[str, ...] = ()  # of PEERS


def one(table: str, row: str, server: str, *parties: Party) -> Case:
    return Case(table, row, server, parties)


def peers_table(streams: int, frames: int) -> str:
    plural = "s" if streams > 1 else "", "s" if frames > 1 else ""
    return f"{streams} stream{plural[0]}, {frames} frame{plural[1]} a chunk"


def bare_table(frames: int) -> str:
    return f"bare session.run, {frames} frame{'s' if frames > 1 else ''}"


def peers(settings: Settings) -> list[list[Case]]:
    """The same load on each server; and what ONNX Runtime alone takes."""
    tables = []
    for frames in settings.frames:
        rows = {BARE_ROWS: Party(64, frames), BARE_ROW: Party(1, frames)}
        tables.append([one(bare_table(frames), row, BARE, party) for row, party in rows.items()])
        for streams in settings.streams:
            # A thread a stream: enough to see it at one frame.
            servers = [s for s in settings.servers if s != THREADS or frames == 1]
            table = peers_table(streams, frames)
            tables.append([one(table, server, server, Party(streams, frames)) for server in servers])
    return tables


def live(settings: Settings) -> list[list[Case]]:
    """64 messages in flight in every row, or `PACE` messages per second."""
    paced = replace(BUSY, messages_per_second=PACE)
    rows = {
        LIVE_64: BUSY,
        LIVE_IDLE: replace(BUSY, idle_per_stream=156),
        LIVE_TURNS: replace(BUSY, sequences_per_group=157),
        PACED_64: paced,
        PACED_IDLE: replace(paced, idle_per_stream=156),
    }
    least = [one(LIVE, row_of(row, LEAST), LEAST, rows[row]) for row in (LIVE_64, LIVE_IDLE, LIVE_TURNS)]
    return [
        [
            *(one(LIVE, row, OURS, party) for row, party in rows.items()),
            *(least if LEAST in settings.servers else ()),
        ]
    ]


def packed(settings: Settings) -> list[list[Case]]:
    """64 streams of 10 sequences, each with a chunk in flight; and of one, for comparison."""
    rows = {
        ONE_EACH: replace(BUSY, groups_per_stream=10),
        TEN_EACH: replace(BUSY, sequences_per_group=10, chunks_per_message=10),
        ONE_ALONE: BUSY,
    }
    servers = [s for s in settings.servers if s in (OURS, LEAST, NULL)]
    return [[one(PACKED, row_of(row, s), s, party) for s in servers for row, party in rows.items()]]


def row_of(row: str, server: str) -> str:
    """The same load on another server, in a table that is mostly of our own."""
    return row if server == OURS else f"{row}, {server}"


def newcomers(settings: Settings) -> list[list[Case]]:
    visits = Party(4, 1, visits=True, messages_per_second=100.0, channels=4)
    return [[one(NEWCOMERS, s, s, Party(256, 1), visits) for s in settings.servers if s != NULL]]


def fairness(settings: Settings) -> list[list[Case]]:
    return [[one(FAIRNESS, s, s, Party(256, 1)) for s in settings.servers if s not in (NULL, LEAST)]]


def paced(settings: Settings) -> list[list[Case]]:
    """Half of our own capacity, and one stream against the engine alone at the same pace.

    What the servers that do less have there as a tail is the machine's."""
    alone = Party(1, 1, messages_per_second=1e3 / PACED_MS)
    half = Party(256, 1, messages_per_second=settings.capacity / 2)
    return [
        [
            one(ALONE_PACED, BARE, BARE, alone),
            *(one(ALONE_PACED, s, s, alone) for s in settings.servers),
        ],
        [one(HALF, s, s, half) for s in settings.servers if s in (OURS, NULL, LEAST, BATCHER)],
    ]


def images(settings: Settings) -> list[list[Case]]:
    stream = Party(64, 1, tracks="images")
    return [
        [
            one(IMAGES, IMAGE_STREAM, OURS, stream),
            one(IMAGES, IMAGE_UNARY, OURS, replace(stream, unary=True)),
            *(one(IMAGES, IMAGE_NULL, NULL, stream) for s in settings.servers if s == NULL),
            one(IMAGES, IMAGE_BARE, BARE, stream),
        ]
    ]


def ragged(settings: Settings) -> list[list[Case]]:
    return [
        [one(RAGGED, s, s, Party(64, 10, tracks="ragged")) for s in settings.servers if s != THREADS],
    ]


def channels(_: Settings) -> list[list[Case]]:
    return [[one(CHANNELS, f"{n}", OURS, replace(BUSY, channels=n)) for n in (1, 16, 64)]]


def mixed(_: Settings) -> list[list[Case]]:
    sensors = Party(64, 10, messages_per_second=64 * 1e3 / PACED_MS)
    flood = Party(16, 1, tracks="images")
    return [
        [
            one(MIXED, "no images", OURS, sensors),
            one(MIXED, "16 streams flat out", OURS, sensors, flood),
            one(MIXED, "16 unary callers flat out", OURS, sensors, replace(flood, unary=True)),
        ]
    ]


def slow(_: Settings) -> list[list[Case]]:
    # Slow enough to keep to the window of 4 unanswered chunks, with replies of 1.6 KB.
    lazy = Party(16, 32, messages_per_second=2_400.0, reads=False, channels=16)
    return [[one(SLOW, "none", OURS, BUSY), one(SLOW, "16 that never read", OURS, BUSY, lazy)]]


def overload(settings: Settings) -> list[list[Case]]:
    streams = int(2 * settings.capacity / (1e3 / PACED_MS))
    crowd = Party(
        streams, 1, messages_per_second=streams * 1e3 / PACED_MS, declared=True, ramp_seconds=OVERLOAD_RAMP
    )
    return [[one(OVERLOAD, OURS, OURS, crowd)]]


OVERLOAD_RAMP = 8.0  # seconds, in which admission has time to see what it has let in


def denormals(settings: Settings) -> list[list[Case]]:
    strange = Party(64, 10, tracks="denormal")
    servers = [s for s in settings.servers if s in (OURS, BATCHER)]
    return [
        [
            one(DENORMALS, f"{s}, {name}", s, party)
            for s in servers
            for name, party in (("normal", Party(64, 10)), ("denormal", strange))
        ]
    ]


def checkpoints(_: Settings) -> list[list[Case]]:
    """What resume tokens cost: of 2.3 KB here, each so many chunks."""
    rows = {"1 chunk": 1, "10 chunks": 10, "50 chunks": 50, "1,000,000 chunks": 1_000_000}
    return [
        [one(CHECKPOINTS, row, OURS, Party(64, 1, checkpoint_every=every)) for row, every in rows.items()]
    ]


def front_ends(_: Settings) -> list[list[Case]]:
    """What the engine process is spared, and what all processes together cost."""
    crowd = Party(512, 1, channels=512)
    loads = {
        "64 streams, 16 connections": BUSY,
        "512 streams, 512 connections": crowd,
        "the same, 10 messages a second each": replace(crowd, messages_per_second=5_120.0),
    }
    return [
        [
            one(FRONT_ENDS, row_of(row, server), server, party)
            for row, party in loads.items()
            for server in (OURS, FRONTED)
        ]
    ]


def in_flight(settings: Settings) -> list[list[Case]]:
    """The same load with two batches of the model in flight, and with one."""
    return [
        [one(f"in flight: {table}", s, s, Party(streams, frames)) for s in (ONE_BY_ONE, OURS)]
        for frames in settings.frames
        for streams in settings.streams
        for table in [peers_table(streams, frames)]
    ]


def oip_table(streams: int, frames: int) -> str:
    return f"{OIP}: {peers_table(streams, frames)}"


def oip_images_table(callers: int) -> str:
    return f"{OIP}: images, {callers} at a time"


def unary(row: str) -> str:
    return f"unary, {row}"


def stream(row: str) -> str:
    return f"stream, {row}"


def open_inference(settings: Settings) -> list[list[Case]]:
    """Our own protocol and the Open Inference Protocol on the same server; and other people's servers."""
    tables = []
    others = {server: PEERS[server] for server in settings.others}
    for frames in settings.frames:
        for streams in settings.streams:
            party, table = Party(streams, frames), oip_table(streams, frames)
            cases = [
                one(table, OURS, OURS, party),
                one(table, OIP_ROW, OURS, replace(party, dialect=dialect.OIP)),
            ]
            cases += [one(table, s, s, replace(party, dialect=name)) for s, name in others.items()]
            cases += [one(table, s, s, party) for s in settings.servers if s in (BATCHER, LEAST)]
            tables.append(cases)
    for callers in CALLERS:
        images, table = Party(callers, 1, tracks="images"), oip_images_table(callers)
        asked = replace(images, dialect=dialect.OIP)
        cases = [
            one(table, stream(OURS), OURS, images),
            one(table, stream(OIP_ROW), OURS, asked),
            one(table, unary(OURS), OURS, replace(images, unary=True)),
            one(table, unary(OIP_ROW), OURS, replace(asked, unary=True)),
        ]
        for peer, name in others.items():
            server = TORCHSERVE_IMAGES if peer == TORCHSERVE else peer
            cases.append(one(table, unary(peer), server, replace(images, unary=True, dialect=name)))
        tables.append(cases)
    return tables


SUITES: dict[str, Callable[[Settings], list[list[Case]]]] = {
    "peers": peers,
    "live": live,
    "packed": packed,
    "newcomers": newcomers,
    "fairness": fairness,
    "paced": paced,
    "images": images,
    "ragged": ragged,
    "channels": channels,
    "mixed": mixed,
    "slow": slow,
    "overload": overload,
    "denormals": denormals,
    "checkpoints": checkpoints,
    "oip": open_inference,
    "front-ends": front_ends,
    "in-flight": in_flight,
}
