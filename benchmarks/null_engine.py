"""Our transport without an engine: each chunk is answered by zeros, at once, on the thread that read it.

It shows what the transport and the messages cost; the rest of what the whole server costs is the
engine's. Its frames are as long as what came in, so that its replies have the size of the others'.
"""

import json
import threading
from collections.abc import Callable

from tenuto.serving import reply as wire
from tenuto.serving.call import Call, Opener
from tenuto.serving.manifest import Manifest
from tenuto.serving.sequence import Opened, Output
from tenuto.serving.transport import StreamPlaces, Terms, Transport, transport
from tenuto.v1 import tenuto_pb2 as pb

from . import model
from .model import OUTPUTS

FLOAT_BYTES = 4
OPENED = Opened(id="", version=1, next_step=1, window=4)
WRITER = wire.OutputWriter(Manifest.parse(json.dumps(model.manifest()), model.NAME))
MAX_STREAMS = 10_000


class Zeros:
    """The listener of one stream."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def received(self, message: bytes) -> None:
        replies = [reply(event) for event in pb.StreamRequest.FromString(message).events]
        for joined in wire.joined(replies):
            self._call.send(joined)

    def half_closed(self) -> None:
        self._call.finish()

    def terminated(self) -> None:
        pass

    def wait(self, resume: Callable[[], None]) -> bool:
        return False


def reply(event: pb.Event) -> bytes:
    if event.HasField("open"):
        return wire.opened(event.sequence, OPENED)
    frames = event.chunk.inputs[0].shape[0]
    tensors = (((frames, OUTPUTS), bytes(frames * OUTPUTS * FLOAT_BYTES)),)
    return WRITER.write(event.sequence, Output(event.chunk.step, 0, True, tensors, 0.0, 0.0, 1))


def serve(transport: Transport) -> None:
    """Serves on a free port of 127.0.0.1, which it prints, until ended."""
    port = transport.bind("127.0.0.1", 0)
    transport.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    threading.Event().wait()


def our_transport(opener: Opener) -> Transport:
    """With no method but the stream."""
    service = "tenuto.v1.Tenuto"
    terms = Terms((service,), threads=1, max_message_bytes=4 << 20, max_pending_bytes=1 << 28)
    ours = transport(StreamPlaces(mode="http2", max_streams=MAX_STREAMS), terms)
    ours.listen_to_streams(f"/{service}/Stream", opener)
    return ours


if __name__ == "__main__":
    serve(our_transport(Zeros))
