"""The bytes that are accepted and not yet answered, over the whole process, and who waits for them to sink.

Above the limit no stream is read, so that HTTP/2's flow control holds the clients back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping


class PendingBytes:
    """A bounded count. Any thread."""

    __slots__ = ("__weakref__", "_lock", "_waiting", "_whole", "bytes", "full", "limit_bytes")

    def __init__(self, limit_bytes: int, whole: PendingBytes | None = None) -> None:
        """With a `whole` it is a part of that, which is told by `add_to_both`."""
        self.limit_bytes = limit_bytes
        self._whole = whole
        self.bytes = 0
        self.full = False  # whether there are more bytes than the limit; kept, since it is read so often
        self._lock: threading.Lock = threading.Lock() if whole is None else whole._lock
        self._waiting: dict[Callable[[], None], None] = {}  # in the order of their coming

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.bytes += nbytes
            self.full = self.bytes > self.limit_bytes

    def add_to_both(self, nbytes: int) -> None:
        """To this part and to the whole, at the price of one."""
        whole = self._whole
        assert whole is not None
        with self._lock:
            self.bytes += nbytes
            self.full = self.bytes > self.limit_bytes
            whole.bytes += nbytes
            whole.full = whole.bytes > whole.limit_bytes

    def remove(self, nbytes: int) -> None:
        with self._lock:
            self.bytes -= nbytes
            self.full = self.bytes > self.limit_bytes
            if not self._waiting or self.full:
                return
            waiting, self._waiting = self._waiting, {}
        for resume in waiting:
            resume()

    def settle(self, parts: Mapping[PendingBytes | None, int]) -> None:
        """Removes so many bytes of each part (None: of no part), and all of them from this whole, at the
        price of one."""
        waiting: list[Callable[[], None]] = []
        with self._lock:
            for part, nbytes in parts.items():
                self.bytes -= nbytes
                if part is not None:
                    part.bytes -= nbytes
                    part.full = part.bytes > part.limit_bytes
                    if part._waiting and not part.full:
                        waiting += part._waiting
                        part._waiting.clear()
            self.full = self.bytes > self.limit_bytes
            if self._waiting and not self.full:
                waiting += self._waiting
                self._waiting.clear()
        for resume in waiting:
            resume()

    def forget(self, resume: Callable[[], None]) -> None:
        """The waiter is gone; its `resume` is not called, unless that began already."""
        with self._lock:
            self._waiting.pop(resume, None)

    def wait(self, resume: Callable[[], None]) -> bool:
        """Whether the caller must wait; then `resume` is called once, on the thread that made room."""
        with self._lock:
            if not self.full:
                return False
            self._waiting[resume] = None
            return True
