"""Ratios are taken within a round, and a verdict goes by their median."""

import pytest

from benchmarks import budgets, scenario
from benchmarks.budgets import Spread
from benchmarks.scenario import Case, Measurement, Round, Scenario


def measured(server_us: float, chunks_per_message: int = 1) -> Measurement:
    return Measurement(
        messages=1_000,
        chunks=1_000 * chunks_per_message,
        checked=0,
        seconds=2.0,
        server_cpu_seconds=server_us / 1e3,
        client_cpu_seconds=0.01,
        p50_ms=1.0,
        p99_ms=2.0,
    )


def peers(streams: int, frames: int, **server_us: float) -> Round:
    cases = scenario.peers(list(server_us), streams, frames)
    return {case: measured(server_us[case.server]) for case in cases}


def test_costs_are_cpu_microseconds_per_message_and_per_chunk() -> None:
    measurement = measured(30.0, chunks_per_message=10)
    assert measurement.server_us == pytest.approx(30.0)
    assert measurement.server_us_per_chunk == pytest.approx(3.0)
    assert measurement.client_us == pytest.approx(10.0)
    assert measurement.messages_per_second == pytest.approx(500.0)


def test_a_ratio_pairs_what_one_round_measured() -> None:
    ours, other = (Case("table", row, row, Scenario(64, 1)) for row in ("tenuto", "naive_aio"))
    rounds = [{ours: measured(a), other: measured(b)} for a, b in ((10, 50), (100, 400), (10, 30))]
    found = budgets.ratio(rounds, other, ours)
    assert (found.median, found.low, found.high) == pytest.approx((4.0, 3.0, 5.0))


@pytest.mark.parametrize("frames, naive, holds", [(1, 4.1, True), (1, 3.9, False), (10, 2.6, True)])
def test_the_naive_server_must_cost_so_many_times_more(frames: int, naive: float, holds: bool) -> None:
    taken = peers(64, frames, tenuto=10.0, naive_aio=10.0 * naive)
    (verdict,) = budgets.verdicts([taken])
    assert verdict.holds is holds
    assert verdict.ratio.median == pytest.approx(naive)


def test_few_streams_and_other_servers_have_no_budget() -> None:
    taken = peers(1, 1, tenuto=10.0, naive_aio=5.0, micro_batcher=5.0)
    taken |= peers(64, 1, tenuto=10.0, null=20.0)
    taken |= peers(256, 1, naive_aio=20.0, micro_batcher=20.0)  # nothing of ours to compare with
    assert budgets.verdicts([taken]) == []


def test_live_sequences_may_cost_a_third_more_at_most() -> None:
    cost = {scenario.LIVE_64: 10.0, scenario.LIVE_IDLE: 12.0, scenario.LIVE_TURNS: 14.0}
    cost |= {scenario.PACED_64: 20.0, scenario.PACED_IDLE: 20.0}
    taken = {case: measured(cost[case.row]) for case in scenario.live_sequences("tenuto")}
    assert [verdict.holds for verdict in budgets.verdicts([taken])] == [True, False, True]


def test_chunks_in_one_message_are_compared_by_the_chunk() -> None:
    taken = {
        case: measured(30.0, case.scenario.chunks_per_message)
        for case in scenario.chunks_in_a_message("tenuto")
    }
    found = [verdict.ratio.median for verdict in budgets.verdicts([taken])]
    assert found == pytest.approx([10.0, 10.0])


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
