"""What an engine gives back after a batch: replies to their sinks, bytes to the counts that hold readers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .pending import PendingBytes
from .sequence import Reply, Sequence, Sink

log = logging.getLogger("tenuto.delivery")


class Delivery:
    """Collects, then hands over, one call a sink. Owned by the engine thread."""

    def __init__(self, pending: PendingBytes, flush: Callable[[], None], where: str) -> None:
        self._pending = pending
        self._flush = flush  # called after the replies were handed over
        self._where = where
        self._replies: dict[Sink, list[tuple[Sequence, Reply]]] = {}
        self._settled: dict[PendingBytes | None, int] = {}  # bytes dealt with, by whose they are

    def send(self, sequence: Sequence, reply: Reply, nbytes: int = 0) -> None:
        """A reply; and so many bytes that this sequence's caller sent are dealt with by it."""
        sink = sequence.sink
        replies = self._replies.get(sink)
        if replies is None:
            self._replies[sink] = [(sequence, reply)]
        else:
            replies.append((sequence, reply))
        if nbytes:
            share = sink.share
            self._settled[share] = self._settled.get(share, 0) + nbytes

    def settle(self, sequence: Sequence, nbytes: int) -> None:
        """So many bytes that this sequence's caller sent are dealt with."""
        share = sequence.sink.share
        self._settled[share] = self._settled.get(share, 0) + nbytes

    @property
    def is_empty(self) -> bool:
        return not self._replies and not self._settled

    def flush_nothing(self) -> Callable[[], None]:
        """From here on replies are handed over by threads that hold nothing back. What flushed until now."""
        flush, self._flush = self._flush, lambda: None
        return flush

    def hand_over(self) -> None:
        """Everything collected goes out. The replies first: once its bytes are settled a stream is read on,
        and that should find its outbox as full as it is."""
        if self._replies:
            replies, self._replies = self._replies, {}
            for sink, own in replies.items():
                try:
                    sink.deliver(own)
                except Exception:  # the other sinks' replies must not be lost with these
                    log.exception("%s: replies could not be handed over", self._where)
            self._flush()
        if self._settled:
            settled, self._settled = self._settled, {}
            self._pending.settle(settled)
