"""The ONNX graph and manifest of `sentiment`: hashed words in, a running answer out."""

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .graph import Array, Graph, add_lstm
from .sentiment import PAIR_FACTOR, UNIT

NAME = "sentiment"
LABELS = ["unfavourable", "favourable"]


def manifest(buckets: int, hidden: int) -> Manifest:
    """Describe a model whose words are hashed into `buckets`."""

    def state(name: str, dtype: str, shape: list[object], batch_axis: int = 0) -> dict[str, object]:
        axes = {"shape": shape, "batch_axis": batch_axis, "init": "zeros"}
        return {"input": name, "output": f"{name}_next", "dtype": dtype, **axes}

    return Manifest.model_validate(
        {
            "format": 1,
            "name": NAME,
            "description": "Whether an English sentence about a film is favourable, word by word: after each "
            "word comes the answer for all words so far. Send UTF-8 text, or the words' hashes.",
            "licence": "research use",
            "inputs": [
                {
                    "name": "words",
                    "dtype": "int64",
                    "shape": ["batch", "time"],
                    "batch_axis": 0,
                    "time_axis": 1,
                    "chunk": {"multiple": 1},
                    "lengths": "lengths",
                    "range": [0, buckets - 1],
                    "wire": [{"encoding": "utf8", "tokens": "words", "buckets": buckets, "lower": True}],
                }
            ],
            "states": [
                state("before", "int64", ["batch", 1]),
                state("sums", "int64", ["batch", 2 + hidden]),
                state("h", "float32", [1, "batch", hidden], 1),
                state("c", "float32", [1, "batch", hidden], 1),
            ],
            "outputs": [
                {
                    "name": "log_probabilities",
                    "dtype": "float32",
                    "shape": ["batch", "time", 2],
                    "batch_axis": 0,
                    "time_axis": 1,
                    "labels": LABELS,
                    "activation": "log_softmax",
                }
            ],
            "max_batch": 64,
            "max_frames": 32,
        }
    )


def build(weights: dict[str, Array], rows: Array, described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `SentimentNetwork`, with its manifest inside.

    `rows` is the network's buffer of that name, integers.
    """
    graph = Graph(NAME)
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input("words", "int64", ["batch", "time"])
    graph.input("lengths", "int32", ["batch"])
    hidden = _read(graph, weights, rows)
    sums = _sums(graph, _votes(graph, weights), hidden)
    _answer(graph, weights, sums)
    for out in described.outputs:
        graph.output(out.name, out.dtype, out.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _read(graph: Graph, weights: dict[str, Array], rows: Array) -> str:
    """Add the words' vectors and the LSTM; return its outputs [batch, time, hidden]."""
    node = graph.node
    places = node("Gather", [graph.constant("rows", rows, "int32"), "words"], "places", axis=0)
    table = graph.constant("embedding", weights["embedding.weight"])
    vectors = node("Gather", [table, places], "vectors", axis=0)
    vectors = node("Transpose", [vectors], "vectors_by_time", perm=[1, 0, 2])
    lstm = {key.removeprefix("lstm."): w for key, w in weights.items() if key.startswith("lstm.")}
    hidden = add_lstm(graph, "lstm", lstm, vectors, "lengths", ("h", "c"), ("h_next", "c_next"))
    return node("Transpose", [hidden], "hidden", perm=[1, 0, 2])


def _votes(graph: Graph, weights: dict[str, Array]) -> str:
    """Add what each word and its pair with the word before say, as double [batch, time, 1]."""
    node, ints = graph.node, graph.integers
    followed = node("Add", ["words", ints(1)], "words_after")
    known = node("Concat", ["before", followed], "known", axis=1)  # [batch, 1 + time]
    earlier = node("Slice", [known, ints(0), ints(-1), ints(1)], "earlier")
    pair = node("Mul", [earlier, ints(PAIR_FACTOR)], "pair_scaled")
    pair = node("Add", [pair, "words"], "pair_sum")
    pair = node("Mod", [pair, ints(len(weights["pair"]))], "pair_id")
    ends = node("Cast", ["lengths"], "ends", to=7)
    ends = node("Unsqueeze", [ends, ints(1)], "ends_column")
    # What is there after each row's own last word, not at the padded end; place 0 is what was there before.
    node("GatherND", [known, node("Unsqueeze", [ends, ints(2)], "ends_index")], "before_next", batch_dims=1)
    votes = []
    for name, ids in (("single", "words"), ("pair", pair)):
        vote = node("Gather", [graph.constant(name, weights[name]), ids], f"{name}_vote", axis=0)
        votes.append(node("Cast", [vote], f"{name}_vote_double", to=11))
    return node("Unsqueeze", [node("Add", votes, "vote"), ints(2)], "vote_column")


def _sums(graph: Graph, votes: str, hidden: str) -> str:
    """Add the running sums, int64 [batch, time, 2 + hidden].

    Integers: a sum of floats would depend on where a chunk ends.
    """
    node, ints = graph.node, graph.integers
    per_unit = graph.constant("units", 1 / UNIT, "float64")
    said = node("Concat", [votes, node("Cast", [hidden], "hidden_double", to=11)], "said", axis=2)
    said = node("Round", [node("Mul", [said, per_unit], "said_units")], "said_rounded")
    said = node("Cast", [said], "said_integers", to=7)
    one = node("Mul", [node("Unsqueeze", ["words", ints(2)], "word_column"), ints(0)], "no_units")
    one = node("Add", [one, ints(round(1 / UNIT))], "one")
    news = node("Concat", [one, said], "news", axis=2)
    # The sums so far come first, so that place n holds those after n words.
    before = node("Unsqueeze", ["sums", ints(1)], "sums_before")
    sums = node("CumSum", [node("Concat", [before, news], "all_news", axis=1), ints(1)], "all_sums")
    node("GatherND", [sums, "ends_column"], "sums_next", batch_dims=1)
    last = graph.constant("int64_max", [2**63 - 1], "int64")
    return node("Slice", [sums, ints(1), last, ints(1)], "running")


def _answer(graph: Graph, weights: dict[str, Array], sums: str) -> None:
    """Add the mean of the LSTM's opinion and the count's, as log-probabilities [batch, time, 2]."""
    node, ints = graph.node, graph.integers
    hidden = weights["head.weight"].shape[1]
    double = node("Cast", [sums], "running_double", to=11)
    parts = ["count", "side_sum", "hidden_sum"]
    graph.nodes("Split", [double, ints(1, 1, hidden)], parts, axis=2)
    mean = node("Cast", [node("Div", ["hidden_sum", "count"], "mean_double")], "mean", to=1)
    value = node("MatMul", [mean, graph.constant("head_w", weights["head.weight"].T)], "head_product")
    heard = node("Add", [value, graph.constant("head_b", weights["head.bias"])], "heard")
    side = node("Mul", ["side_sum", graph.constant("half_unit", UNIT / 2, "float64")], "side_double")
    side = node("Cast", [side], "side", to=1)
    counted = node("Concat", [node("Neg", [side], "other_side"), side], "counted", axis=2)
    both = node("Add", [heard, counted], "both")
    mean_opinion = node("Mul", [both, graph.constant("half", 0.5)], "mean_opinion")
    node("LogSoftmax", [mean_opinion], "log_probabilities", axis=-1)
