"""Looks for patterns across the bands of log-mel steps, wherever they are: a convolution along frequency.

What one voice has in some bands another has a few bands higher or lower, as its vocal tract is shorter or
longer. The largest answer of neighbouring places hides that (Abdel-Hamid 2014; LeCun 1998 for pictures).
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from .graph import Array, Graph
from .sound import BANDS

WIDTH, STRIDE = 6, 2  # bands that a filter sees, and from one of its places to the next
PLACES = (BANDS - WIDTH) // STRIDE + 1
POOL = 3  # neighbouring places of which the largest answer counts
GROUPS = PLACES // POOL
FILTERS, FEATURES = 48, 80


class BandConvolution(nn.Module):
    """Steps float32 [batch, time, 80], two frames of 40 bands each, to features [batch, time, 80]."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Linear(2 * WIDTH, FILTERS)
        self.features = nn.Linear(GROUPS * FILTERS, FEATURES)

    def forward(self, steps: Tensor) -> Tensor:
        """Return the features of each step, from that step alone."""
        places = steps.unflatten(2, (2, BANDS)).unfold(3, WIDTH, STRIDE).transpose(2, 3)
        answers = F.relu(self.filters(places.flatten(3)))  # [batch, time, places, filters]
        largest = answers.unflatten(2, (GROUPS, POOL)).amax(3)
        return F.relu(self.features(largest.flatten(2)))


def add_bands(graph: Graph, weights: Mapping[str, Array], steps: str) -> str:
    """Add a `BandConvolution` to steps float32 [time, batch, 80]; return its features, of that shape.

    As matrix products over rows, which do not depend on their neighbours.
    """
    node, ints = graph.node, graph.integers
    index = [[place * STRIDE + band for band in range(WIDTH)] for place in range(PLACES)]
    value = node("Reshape", [steps, ints(0, 0, 2, BANDS)], "band_pairs")
    value = node("Gather", [value, graph.constant("band_places", index, "int64")], "bands_by_place", axis=3)
    value = node("Transpose", [value], "places", perm=[0, 1, 3, 2, 4])
    value = node("Reshape", [value, ints(0, 0, PLACES, 2 * WIDTH)], "place_rows")
    value = _add_linear(graph, weights, "filters", value)
    value = node("Reshape", [value, ints(0, 0, GROUPS, POOL, FILTERS)], "groups")
    value = node("ReduceMax", [value], "largest", axes=[3], keepdims=0)
    value = node("Reshape", [value, ints(0, 0, GROUPS * FILTERS)], "largest_rows")
    return _add_linear(graph, weights, "features", value)


def _add_linear(graph: Graph, weights: Mapping[str, Array], name: str, rows: str) -> str:
    """Add a linear layer and its rectifier."""
    matrix = graph.constant(f"{name}_w", weights[f"{name}.weight"].T)
    value = graph.node("MatMul", [rows, matrix], f"{name}_product")
    value = graph.node("Add", [value, graph.constant(f"{name}_b", weights[f"{name}.bias"])], f"{name}_sum")
    return graph.node("Relu", [value], name)
