"""The chunks that no resume token covers yet: what a lost sequence is sent again."""

from .v1 import tenuto_pb2 as pb

# What a chunk takes in memory besides its data, roughly.
_CHUNK_BYTES = 512


class Replay:
    """Chunks in the order of their steps, each kept until a token covers it.

    `first` is the oldest step that is, or would be, kept; `nbytes` is what all take in memory.
    """

    def __init__(self) -> None:
        self.first = 1
        self.nbytes = 0
        self._requests: dict[int, pb.StreamRequest] = {}  # by step, without a gap

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, step: int) -> pb.StreamRequest:
        return self._requests[step]

    def add(self, step: int, request: pb.StreamRequest) -> None:
        """Keep the chunk of the next step."""
        self._requests[step] = request
        self.nbytes += _size(request)

    def drop_through(self, step: int) -> None:
        """Forget the chunks up to `step`: they are never sent again."""
        while self.first <= step:
            request = self._requests.pop(self.first, None)
            if request is None:  # nothing is kept: a sequence that begins at a later step
                self.first = step + 1
                return
            self.nbytes -= _size(request)
            self.first += 1


def _size(request: pb.StreamRequest) -> int:
    return request.ByteSize() + _CHUNK_BYTES
