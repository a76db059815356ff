"""What an idle live sequence takes beyond its state, in a server that is fresh for each figure."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from tenuto.v1 import tenuto_pb2 as pb

from . import model
from .http2 import Connection
from .load import STREAM
from .server_process import ServerProcess

SEQUENCES = 4_000
SHARED_STREAMS = 10
# Of the LSTM, in a pool that touches a page when a slot is first written.
STATE_BYTES = len(model.STATES) * model.LAYERS * model.WIDTH * 4
CONNECTIONS = 16
WARMING = 50  # sequences on each of as many streams, before
CHUNK = pb.Chunk(step=1, inputs=[pb.Tensor(dtype="float32", shape=[1, model.INPUTS], data=bytes(160))])


def resident_bytes(pid: int) -> int:
    """The private and shared pages that a process has in memory."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no Rss in /proc/{pid}/smaps_rollup")


def measure(repository: model.Repository) -> dict[str, float]:
    """Bytes: an empty stream; a sequence on a shared stream, and alone on one, beyond its state."""
    empty = _grown(repository, lambda connections: _streams(connections, SEQUENCES, 0))
    alone = _grown(repository, lambda connections: _streams(connections, SEQUENCES, 1))
    each = SEQUENCES // SHARED_STREAMS
    shared = _grown(repository, lambda connections: _streams(connections, SHARED_STREAMS, each))
    return {
        "empty stream": empty / SEQUENCES,
        "sequence on a shared stream": shared / SEQUENCES - STATE_BYTES,
        "sequence alone on a stream, beyond an empty one": (alone - empty) / SEQUENCES - STATE_BYTES,
    }


def _grown(repository: model.Repository, use: Callable[[list[Connection]], None]) -> int:
    """How much larger the server is after `use` than before, bytes."""
    with ServerProcess("tenuto", repository) as server, ExitStack() as stack:
        connections = [stack.enter_context(closing(Connection(server.port))) for _ in range(CONNECTIONS)]
        # What the first full batches and messages leave behind belongs to no sequence.
        _streams(connections, CONNECTIONS, WARMING)
        before = resident_bytes(server.pid)
        use(connections)
        return resident_bytes(server.pid) - before


def _streams(connections: list[Connection], streams: int, sequences: int) -> None:
    """Opens them all, sends each sequence's first chunk, and waits for its answer."""
    for index in range(streams):
        connection = connections[index % len(connections)]
        number = connection.open(STREAM)
        for first in range(0, sequences, 50):
            events: list[pb.Event] = []
            for key in range(first, min(first + 50, sequences)):
                events.append(pb.Event(sequence=key, open=pb.Open(model=model.NAME)))
                events.append(pb.Event(sequence=key, chunk=CHUNK))
            connection.send(number, pb.StreamRequest(events=events).SerializeToString())
            _answers(connection, min(50, sequences - first))
        if not sequences:
            # An empty message is answered by nothing; a wrong number tells that the stream is open.
            stray = pb.Event(sequence=1, end=pb.End())
            connection.send(number, pb.StreamRequest(events=[stray]).SerializeToString())
            _answers(connection, 1)


def _answers(connection: Connection, count: int) -> None:
    while count:
        for _, message in connection.receive():
            replies = pb.StreamResponse.FromString(message).replies
            count -= sum(reply.WhichOneof("reply") in ("output", "failed") for reply in replies)
