"""Ratios are taken within a round, a verdict goes by their median, and a limit says what could be had."""

import pytest

from benchmarks import budgets, suites
from benchmarks.budgets import Spread, Verdict
from benchmarks.scenario import Case, Measurement, Party, Seen, Taken
from benchmarks.suites import Settings

SETTINGS = Settings(suites.SERVERS, (1, 64), (1, 10), capacity=20_000.0)


def seen(
    messages: int = 1_000, chunks_per_message: int = 1, p50_ms: float = 1.0, p99_ms: float = 2.0
) -> Seen:
    return Seen(messages, messages * chunks_per_message, p50_ms, p99_ms, least=10, most=10)


def measured(server_us: float, *parties: Seen) -> Measurement:
    return Measurement(2.0, server_us / 1e3, 0.01, 0, parties or (seen(),))


def peers(streams: int, frames: int, **server_us: float) -> Taken:
    tables = suites.peers(Settings(tuple(server_us), (streams,), (frames,), 0.0))
    cases = [case for table in tables for case in table]
    return {case: measured(server_us[case.server]) for case in cases if case.server in server_us}


def verdict(taken: Taken, start: str) -> Verdict:
    (found,) = [v for v in budgets.verdicts([taken]) if v.text.startswith(start)]
    return found


def table_of(cases: list[Case], cost: dict[str, float]) -> Taken:
    return {c: measured(cost[c.row], seen(1_000, c.parties[0].chunks_per_message)) for c in cases}


def test_costs_are_cpu_microseconds_per_message_and_per_chunk() -> None:
    measurement = measured(30.0, seen(chunks_per_message=10))
    assert measurement.server_us == pytest.approx(30.0)
    assert measurement.server_us_per_chunk == pytest.approx(3.0)
    assert measurement.client_us == pytest.approx(10.0)
    assert measurement.messages_per_second == pytest.approx(500.0)


def test_a_ratio_pairs_what_one_round_measured() -> None:
    rounds = [peers(64, 1, tenuto=a, naive_aio=b) for a, b in ((10, 50), (100, 400), (10, 30))]
    (found,) = budgets.verdicts(rounds)
    assert (found.found.median, found.found.low, found.found.high) == pytest.approx((4.0, 3.0, 5.0))


@pytest.mark.parametrize(
    "frames, naive, reached, holds",
    [(1, 6.1, True, True), (1, 5.9, False, True), (1, 3.9, False, False), (10, 2.6, False, True)],
)
def test_the_naive_server_must_cost_so_many_times_more(
    frames: int, naive: float, reached: bool, holds: bool
) -> None:
    found = verdict(peers(64, frames, tenuto=10.0, naive_aio=10.0 * naive), "naive_aio / tenuto")
    assert (found.reached, found.holds) == (reached, holds)
    assert found.found.median == pytest.approx(naive)


def test_a_limit_is_the_same_figure_of_the_least_engine() -> None:
    taken = peers(64, 1, tenuto=50.0, null=20.0, least_engine=40.0, naive_aio=100.0, micro_batcher=80.0)
    many, _ = suites.peers(SETTINGS)[0]
    taken[many] = measured(5.0)
    found = [verdict(taken, start) for start in ("naive_aio /", "tenuto / micro_batcher", "(null engine")]
    assert [v.found.median for v in found] == pytest.approx([2.0, 50 / 80, 25 / 50])
    assert [v.limit.median for v in found if v.limit] == pytest.approx([2.5, 40 / 80, 25 / 40])


def test_a_line_has_no_limit_where_the_least_engine_was_not_measured() -> None:
    assert verdict(peers(64, 1, tenuto=50.0, naive_aio=100.0), "naive_aio / tenuto").limit is None


def test_one_stream_has_goals_of_its_own() -> None:
    taken = peers(1, 1, tenuto=70.0, naive_aio=100.0)
    assert [v.reached for v in budgets.verdicts([taken])] == [True, True]


def test_what_was_not_measured_has_no_verdict() -> None:
    assert budgets.verdicts([peers(256, 1, naive_aio=20.0, micro_batcher=20.0)]) == []


def test_live_sequences_may_cost_so_much_more_at_most() -> None:
    cost = {suites.LIVE_64: 10.0, suites.LIVE_IDLE: 12.0, suites.LIVE_TURNS: 14.0}
    cost |= {suites.PACED_64: 20.0, suites.PACED_IDLE: 20.0}
    cost |= {suites.row_of(row, suites.LEAST): cost[row] / 2 for row in (suites.LIVE_64, suites.LIVE_IDLE)}
    cost[suites.row_of(suites.LIVE_TURNS, suites.LEAST)] = 5.5
    (table,) = suites.live(SETTINGS)
    found = budgets.verdicts([table_of(table, cost)])
    assert [(v.reached, v.holds) for v in found] == [(False, True), (False, False), (True, True)]
    assert [v.limit.median for v in found if v.limit] == pytest.approx([1.2, 1.1])


def test_chunks_in_one_message_are_compared_by_the_chunk() -> None:
    (table,) = suites.packed(SETTINGS)
    found = budgets.verdicts([table_of(table, dict.fromkeys([c.row for c in table], 30.0))])
    assert [v.found.median for v in found] == pytest.approx([10.0, 10.0])
    assert [v.limit.median for v in found if v.limit] == pytest.approx([10.0, 10.0])


def test_a_newcomer_is_compared_with_the_residents() -> None:
    cases = [c for table in suites.newcomers(SETTINGS) for c in table if c.server == suites.OURS]
    taken = {c: measured(10.0, seen(p50_ms=5.0), seen(p50_ms=6.0, p99_ms=9.0)) for c in cases}
    (found,) = budgets.verdicts([taken])
    assert found.found.median == pytest.approx(9 / 5)


def test_images_are_limited_by_the_transport_and_onnx_runtime() -> None:
    (table,) = suites.images(SETTINGS)
    cost = {
        suites.IMAGE_STREAM: 40.0,
        suites.IMAGE_UNARY: 80.0,
        suites.IMAGE_NULL: 4.0,
        suites.IMAGE_BARE: 20.0,
    }
    (found,) = budgets.verdicts([table_of(table, cost)])
    assert found.found.median == pytest.approx(0.5)
    assert found.limit is not None
    assert found.limit.median == pytest.approx(0.3)


def test_memory_is_judged_in_kibibytes() -> None:
    found = budgets.of_memory({"sequence on a shared stream": 2049.0, "empty stream": 1e6})
    assert [(v.goal, v.reached) for v in found] == [("at most 2", False), ("", True)]


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.parametrize("name", list(suites.SUITES))
def test_a_suite_names_known_servers_and_each_row_once(name: str) -> None:
    tables = suites.SUITES[name](SETTINGS)
    cases = [case for table in tables for case in table]
    assert cases
    known = {*suites.SERVERS, suites.BARE, suites.FRONTED, suites.ONE_BY_ONE}
    assert {case.server for case in cases} <= known
    assert len({(case.table, case.row) for case in cases}) == len(cases)
    for table in tables:
        assert len({case.table for case in table}) == 1


def test_a_party_says_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at most one chunk of each"):
        Party(1, 1, chunks_per_message=2)
    with pytest.raises(ValueError, match="needs a pace"):
        Party(1, 1, reads=False)
