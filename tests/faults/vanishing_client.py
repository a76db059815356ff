"""A client that opens sequences, says so, and is then killed. Run by test_vanished_clients.py."""

from __future__ import annotations

import sys

from tests.integration.wire import Conversation, chunk, connect, opening


def main(port: int, sequences: int) -> None:
    with connect(port) as channel, Conversation(channel) as conversation:
        conversation.send(*(opening("accumulator", n) for n in range(sequences)))
        conversation.send(*(chunk(1, [1.0], sequence=n) for n in range(sequences)))
        for _ in range(2 * sequences):
            conversation.read()
        print("open", flush=True)
        conversation.rest()  # nothing comes any more


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
