"""What the load generator does to a server, and what it saw."""

from dataclasses import dataclass
from typing import Any, Self

CHANNELS = 16  # connections of a party, unless it says otherwise


@dataclass(frozen=True, slots=True)
class Party:
    """Streams that behave alike: each group of sequences has one message unanswered at any time.

    A group's messages go to its sequences in turn, `chunks_per_message` of them at once.
    """

    streams: int
    frames: int  # a chunk; with `ragged` the most
    tracks: str = "lstm"  # what is sent, to which model: "lstm", "ragged", "denormal" or "images"
    groups_per_stream: int = 1
    sequences_per_group: int = 1
    chunks_per_message: int = 1
    idle_per_stream: int = 0  # sequences that send one chunk before the run, and none during it
    # Of all streams together. Due times do not wait for a late server, and latency counts from them, so
    # that a stall cannot hide. 0: closed loop, latency from sending.
    messages_per_second: float = 0.0
    declared: bool = False  # Open tells the server the period
    checkpoint_every: int = 0  # as Open says it; 0: the server's default
    ramp_seconds: float = 0.0  # the streams open over that time, within the run, and may be refused
    visits: bool = False  # a new stream for each message: opened, one chunk, first reply, half-closed
    unary: bool = False  # Predict, one image a call
    dialect: str = ""  # speaks another protocol, see dialect.py: a sequence a stream, or unary calls
    reads: bool = True  # False: never gives way for replies, and sends for as long as the server reads
    channels: int = CHANNELS

    def __post_init__(self) -> None:
        if self.chunks_per_message > self.sequences_per_group:
            raise ValueError("a message carries at most one chunk of each sequence of its group")
        if self.dialect and (self.sequences_per_stream > 1 or self.visits or not self.reads):
            raise ValueError("in another protocol than ours only a sequence a stream, or unary calls")
        if not self.reads and not self.messages_per_second:
            raise ValueError("a party that takes no replies needs a pace")

    @property
    def groups(self) -> int:
        return self.streams * self.groups_per_stream

    @property
    def sequences_per_stream(self) -> int:
        return self.groups_per_stream * self.sequences_per_group + self.idle_per_stream


@dataclass(frozen=True, slots=True)
class Case:
    """One row of one table: parties that meet on one server. The first is the one whose cost counts."""

    table: str
    row: str
    server: str
    parties: tuple[Party, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one party saw within the window."""

    messages: int
    chunks: int
    p50_ms: float  # from sending, or from the due time, to having the answers to all chunks of the message
    p99_ms: float
    least: int  # messages of the group that was served least
    most: int
    late: int = 0  # messages answered later than a period after they were due
    opened: int = 0  # sequences, since the run began
    refused: int = 0
    held: int = 0  # streams that the windows hold back at the end; gRPC itself takes in 4 MiB a stream


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one case. CPU is user and system time."""

    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float
    checked: int  # replies compared with the reference, bit for bit
    parties: tuple[Seen, ...]
    engine_cpu_seconds: float = 0.0  # of the process that was started, without those that it started

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        return cls(**{**fields, "parties": tuple(Seen(**party) for party in fields["parties"])})

    @property
    def first(self) -> Seen:
        return self.parties[0]

    @property
    def server_us(self) -> float:
        """Server CPU-µs per message."""
        return 1e6 * self.server_cpu_seconds / self.first.messages

    @property
    def engine_us(self) -> float:
        """CPU-µs per message of the process that runs the model."""
        return 1e6 * self.engine_cpu_seconds / self.first.messages

    @property
    def server_us_per_chunk(self) -> float:
        return 1e6 * self.server_cpu_seconds / self.first.chunks

    @property
    def client_us(self) -> float:
        """Client CPU-µs per message."""
        return 1e6 * self.client_cpu_seconds / self.first.messages

    @property
    def messages_per_second(self) -> float:
        return self.first.messages / self.seconds


Taken = dict[Case, Measurement]  # one round
