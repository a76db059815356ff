"""rt-polarity v1.0: 5,331 favourable and 5,331 unfavourable sentences from film reviews.

B. Pang and L. Lee, "Seeing stars", ACL 2005. Licence: none is stated; it was published for research, so
neither the sentences nor what is trained on them is passed on here. There is no official split.
"""

from typing import Literal

from . import store

LICENCE = "for research use"
URL = "https://raw.githubusercontent.com/dennybritz/cnn-text-classification-tf/master/data/rt-polaritydata/"
CHECKSUMS = {
    "rt-polarity.pos": "4134882974a28d0c7b5151256f0e33a6169984ee7372c279e673f1114f475d58",
    "rt-polarity.neg": "2d11cfbc790f1cd96d78339f41ce53ced1efa83cd22d37d6788fa3fe3d17e2fd",
}


def sentences(opinion: Literal["pos", "neg"]) -> list[str]:
    """Return the sentences of one opinion in the file's order: lower case, words and marks apart."""
    name = f"rt-polarity.{opinion}"
    path = store.locate("rt_polarity", name, [URL + name])
    content = path.read_bytes()
    store.check("rt_polarity", store.sha256(content), CHECKSUMS[name], path)
    # Not splitlines(): to it some characters inside of sentences end a line.
    return [line.strip() for line in content.decode().split("\n") if line.strip()]
