"""Tiny Shakespeare: 40,000 lines from Shakespeare's plays, 1,115,394 characters of 65 kinds.

Licence: the text is in the public domain; A. Karpathy collected it (github.com/karpathy/char-rnn). The usual
split is nanoGPT's: the first 90 % to train on, the last 10 % to measure with.
"""

from . import store

LICENCE = "public domain"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FILENAME = "input.txt"
CHECKSUM = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Every character that occurs, in the order of their code points.
ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TRAIN = (0, 1003854)  # characters [start, stop)
TEST = (1003854, 1115394)


def text() -> str:
    """Return the whole text."""
    path = store.locate("tinyshakespeare", FILENAME, [URL])
    content = path.read_bytes()
    store.check("tinyshakespeare", store.sha256(content), CHECKSUM, path)
    return content.decode("ascii")
