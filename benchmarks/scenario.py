"""What the load generator does to a server, and what it saw."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scenario:
    """Streams in a closed loop: each group of sequences has one message unanswered at any time.

    A group's messages go to its sequences in turn, `chunks_per_message` of them at once.
    """

    streams: int
    frames: int  # a chunk
    groups_per_stream: int = 1
    sequences_per_group: int = 1
    chunks_per_message: int = 1
    idle_per_stream: int = 0  # sequences that send one chunk before the run, and none during it
    messages_per_second: float = 0.0  # of all streams together; 0: closed loop, no pace

    def __post_init__(self) -> None:
        if self.chunks_per_message > self.sequences_per_group:
            raise ValueError("a message carries at most one chunk of each sequence of its group")

    @property
    def groups(self) -> int:
        return self.streams * self.groups_per_stream

    @property
    def sequences_per_stream(self) -> int:
        return self.groups_per_stream * self.sequences_per_group + self.idle_per_stream


@dataclass(frozen=True, slots=True)
class Case:
    """One row of one table: a scenario against a server."""

    table: str
    row: str
    server: str
    scenario: Scenario


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one case. CPU is user and system time."""

    messages: int
    chunks: int
    checked: int  # replies compared with the reference, bit for bit
    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float
    p50_ms: float  # from sending a message to having the answers to all of its chunks
    p99_ms: float

    @property
    def server_us(self) -> float:
        """Server CPU-µs per message."""
        return 1e6 * self.server_cpu_seconds / self.messages

    @property
    def server_us_per_chunk(self) -> float:
        return 1e6 * self.server_cpu_seconds / self.chunks

    @property
    def client_us(self) -> float:
        """Client CPU-µs per message."""
        return 1e6 * self.client_cpu_seconds / self.messages

    @property
    def messages_per_second(self) -> float:
        return self.messages / self.seconds


Round = dict[Case, Measurement]
SERVERS = ("tenuto", "null", "naive_aio", "micro_batcher")
LIVE = "live sequences"
PACKED = "chunks in a message"
LIVE_64 = "64 live"
LIVE_IDLE = "4,096 live, 64 of them busy"
LIVE_TURNS = "4,096 live, each in its turn"
PACED_64 = "64 live, paced"
PACED_IDLE = "4,096 live, 64 of them busy, paced"
ONE_EACH = "640 sequences, 1 chunk a message"
TEN_EACH = "640 sequences, 10 chunks a message"
ALONE = "64 sequences, 1 chunk a message"
PACE = 4_000.0  # messages per second: below what one core serves


def peers(servers: list[str], streams: int, frames: int) -> list[Case]:
    """The same load on each server."""
    plural = "s" if streams > 1 else "", "s" if frames > 1 else ""
    table = f"{streams} stream{plural[0]}, {frames} frame{plural[1]} a chunk"
    return [Case(table, server, server, Scenario(streams, frames)) for server in servers]


def live_sequences(server: str) -> list[Case]:
    """64 messages in flight in every row, or `PACE` messages per second."""
    rows = {
        LIVE_64: Scenario(64, 1),
        LIVE_IDLE: Scenario(64, 1, idle_per_stream=63),
        LIVE_TURNS: Scenario(64, 1, sequences_per_group=64),
        PACED_64: Scenario(64, 1, messages_per_second=PACE),
        PACED_IDLE: Scenario(64, 1, messages_per_second=PACE, idle_per_stream=63),
    }
    return [Case(LIVE, row, server, scenario) for row, scenario in rows.items()]


def chunks_in_a_message(server: str) -> list[Case]:
    """64 streams of 10 sequences, each with a chunk in flight; and of one, for comparison."""
    rows = {
        ONE_EACH: Scenario(64, 1, groups_per_stream=10),
        TEN_EACH: Scenario(64, 1, sequences_per_group=10, chunks_per_message=10),
        ALONE: Scenario(64, 1),
    }
    return [Case(PACKED, row, server, scenario) for row, scenario in rows.items()]
