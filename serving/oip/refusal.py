"""What a client is told that gets no answer: a status, words that it may know from Triton, and our reason."""

from __future__ import annotations

import grpc

from tenuto.serving.errors import RunFailed, TenutoError, TooLarge
from tenuto.serving.status import code_of

Code = grpc.StatusCode
# What Triton says to nobody, and its clients do not expect.
_CODES = {
    Code.RESOURCE_EXHAUSTED: Code.UNAVAILABLE,
    Code.FAILED_PRECONDITION: Code.INVALID_ARGUMENT,
    Code.OUT_OF_RANGE: Code.INVALID_ARGUMENT,
    Code.PERMISSION_DENIED: Code.UNAVAILABLE,
}
_LONGEST_TEXT = 1000  # a text may quote what a client sent, and has to fit into gRPC's 8 KiB of metadata
LEAVING = "GRPC server is shutting down and has stopped accepting new requests."


class Refusal(Exception):
    """Ends one request. `reason` is what a program reads; empty where the status says all."""

    def __init__(self, text: str, code: Code = Code.INVALID_ARGUMENT, reason: str = "WRONG_REQUEST") -> None:
        super().__init__(text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …")
        self.code = code
        self.reason = reason
        self.retry_after_ms = 0
        self.counted = False  # among the metrics of a model

    @classmethod
    def of(cls, error: TenutoError) -> Refusal:
        """The same in this protocol's statuses."""
        code = Code.INVALID_ARGUMENT if isinstance(error, TooLarge) else code_of(error)
        refusal = cls(str(error), _CODES.get(code, code), error.reason)
        refusal.retry_after_ms = error.retry_after_ms
        return refusal

    @classmethod
    def of_bug(cls) -> Refusal:
        """For what the server itself did wrong."""
        return cls("an error inside the server; its log says more", Code.INTERNAL, RunFailed.reason)

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What goes behind the status of a unary call."""
        if not self.reason:
            return ()
        plain: tuple[tuple[str, str | bytes], ...] = (("tenuto-reason", self.reason),)
        if self.retry_after_ms:
            plain += (("tenuto-retry-after-ms", str(self.retry_after_ms)),)
        return plain

    def about(self, request_id: str) -> Refusal:
        """The same, naming the request, as Triton does."""
        if not request_id:
            return self
        refusal = Refusal(f"[request id: {request_id}] {self}", self.code, self.reason)
        refusal.retry_after_ms = self.retry_after_ms
        return refusal
