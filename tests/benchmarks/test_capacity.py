"""The capacity page: arithmetic by hand, a simulation that loses nobody, a page that is the command's."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import capacity, fleet, measured, model
from benchmarks.capacity import Cost
from benchmarks.fleet import GIVEN_UP, Fleet, Plan
from benchmarks.scenario import Party
from tenuto.backoff import Backoff

ROOT = Path(__file__).parents[2]
COST = Cost(
    chunk_us=100.0,
    busiest_us=50.0,
    chunk_up=200.0,
    chunk_down=100.0,
    token_down=2_000.0,
    seal_us=20.0,
    process_bytes=100e6,
    stream_bytes=10_000.0,
    pod_series=250.0,
)
# 200 streams a pod when full; 20 pods of 100.
PLAN = Plan(20, 2_000, 200, 100e-6, 300e-6, notice_seconds=(0.01, 0.02), reopen_seconds=0.05, seed=7)
EVENTS = {
    "pod": fleet.pod_lost,
    "zone": lambda plan: fleet.zone_lost(plan, silent=False),
    "silent": lambda plan: fleet.zone_lost(plan, silent=True),
    "rolled": fleet.rolled,
}


@pytest.fixture(scope="module")
def figures() -> measured.Figures:
    return measured.read()


# -- arithmetic ----------------------------------------------------------------------------------------


def test_one_process_serves_what_its_cpu_allows() -> None:
    assert COST.chunks_per_second == 10_000  # 10⁶ / 100 µs
    assert COST.streams == 200  # / 50 a second
    assert COST.most_streams == 400
    assert COST.slots == 190  # 95 %


def test_a_size_is_what_one_computes_by_hand() -> None:
    found = capacity.size(COST, 10_000)
    assert found.pods == 84  # 10,000 / (0.6 × 200), upwards
    assert found.cores_of_work == pytest.approx(50.0)  # 500,000 chunks/s × 100 µs
    assert found.cores == pytest.approx(50 / 0.6)
    assert found.memory_bytes == pytest.approx(84 * 100e6 + 10_000 * 10_000)
    assert found.up_bits == pytest.approx(800e6)  # 500,000 × 200 B × 8
    assert found.tokens_per_second == pytest.approx(10_000)  # 500,000 / 50
    assert found.token_bits == pytest.approx(160e6)
    assert found.down_bits == pytest.approx(400e6 + 160e6)
    assert found.series == pytest.approx(84 * 250)
    assert found.files == 120  # 10,000 / 84, upwards


def test_the_measured_figures_become_a_cost(figures: measured.Figures) -> None:
    found = capacity.cost(figures, model.NAME)
    parts = figures["bytes"]
    named = ("connection", "empty stream", "sequence alone on a stream, beyond an empty one", "state")
    assert found.stream_bytes == sum(parts[name] for name in named)
    assert found.chunk_us == figures["chunks"][model.NAME]["flat out"]["us_per_chunk"][0]
    assert 0 < found.busiest_us < found.chunk_us
    assert found.streams < found.most_streams


@pytest.mark.parametrize(
    "bits, shown", [(1.5e9, "1.5 Gbit/s"), (2.34e6, "2.3 Mbit/s"), (999.0, "1.0 kbit/s")]
)
def test_a_rate_has_its_unit(bits: float, shown: str) -> None:
    assert capacity.bits(bits) == shown


# -- simulation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [112, 150, 10_000])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("choice", [fleet.RANDOM, fleet.NEXT])
def test_no_sequence_is_lost_or_doubled(event: str, slots: int, choice: str) -> None:
    plan = replace(PLAN, slots=slots, choice=choice, tick_seconds=0.05)
    found = EVENTS[event](plan)
    assert sum(found.counts) == plan.sequences
    assert found.counts[2] == found.given_up
    assert found.peak_live <= slots


def test_every_move_ends_in_one_state_and_pods_hold_what_they_took() -> None:
    plan = replace(PLAN, slots=115)
    found = Fleet(plan)
    found.kill(np.arange(0, plan.pods, 3))
    for until in np.arange(0.5, 40.0, 0.5):
        found.env.run(until=until)
        live, waiting, given_up = found.counts()
        assert live + waiting + given_up == plan.sequences
        assert (found.live <= plan.slots).all()
        assert (found.live >= 0).all()
        assert found.replaying.sum() == len(found.active)
    assert set(np.unique(found.lost.state[: found.lost.count])) <= {fleet.REPLAYING, fleet.RUNNING, GIVEN_UP}


@pytest.mark.parametrize("event", EVENTS)
def test_a_run_is_the_same_for_the_same_seed_alone(event: str) -> None:
    plan = replace(PLAN, tick_seconds=0.05)
    first = EVENTS[event](plan)
    assert EVENTS[event](plan) == first
    assert EVENTS[event](replace(plan, seed=8)) != first


def test_a_lost_pod_with_ample_slots_refuses_nobody_and_all_run_again() -> None:
    found = fleet.pod_lost(replace(PLAN, slots=10_000))
    assert found.lost > 0
    assert (found.refused, found.given_up) == (0, 0)
    assert 0.06 <= found.half <= found.most <= found.every <= found.whole + 1.0 < 10.0
    assert found.longest_backlog >= found.every
    assert found.peak_use < 1.0


def test_a_lost_pod_without_spare_slots_has_somebody_refused() -> None:
    full = replace(PLAN, slots=100, reserve=0.0, chunk_seconds=10e-6)  # every slot is taken
    found = fleet.pod_lost(full)
    assert found.lost == 100
    assert found.refused >= 100
    assert found.given_up == 100
    assert found.every == float("inf")


def test_clients_of_one_list_meet_at_the_next_pod() -> None:
    plan = replace(PLAN, slots=10_000)
    apart, together = (fleet.pod_lost(replace(plan, choice=c)) for c in (fleet.RANDOM, fleet.NEXT))
    assert together.peak_live >= apart.peak_live + apart.lost // 2


def test_a_zone_that_falls_silent_is_noticed_when_an_answer_is_overdue() -> None:
    found = fleet.zone_lost(replace(PLAN, tick_seconds=0.05), silent=True)
    assert found.half >= PLAN.reply_seconds
    assert found.every >= PLAN.reply_seconds + PLAN.timeout_seconds  # some asked another silent pod first


def test_a_pod_above_its_capacity_is_late() -> None:
    plan = replace(PLAN, slots=10_000, chunk_seconds=190e-6)  # 100 streams take 95 %
    found = fleet.zone_lost(plan, silent=False)
    assert found.peak_use == 1.0
    assert found.settled_use > 1.0
    assert found.longest_backlog > 10.0


def test_a_rolling_update_moves_each_sequence_and_leaves_all_live() -> None:
    found = fleet.rolled(replace(PLAN, slots=10_000, chunk_seconds=1e-6, tick_seconds=0.05))
    assert found.lost >= PLAN.sequences
    assert found.counts == (PLAN.sequences, 0, 0)
    assert found.every < 1.0
    step = PLAN.start_seconds + PLAN.min_ready_seconds
    assert found.seconds >= PLAN.pods * step


def test_clients_wait_as_the_client_does() -> None:
    for jitter in (0.5, 1.0, 1.5):
        theirs = Backoff(1e9, lambda: jitter)  # noqa: B023 - used within the turn
        for tries in range(12):
            theirs.again(0.0)
            ours = fleet.wait_seconds(np.array([tries]), np.array([jitter]))
            assert ours[0] == pytest.approx(theirs.due)


def test_a_fleet_that_cannot_hold_its_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Fleet(replace(PLAN, slots=105))  # 95 of each for new ones


# -- the page ------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)  # half a minute of CPU, and the machine may be shared
def test_the_page_is_what_the_command_prints(figures: measured.Figures) -> None:
    text = (ROOT / "docs/capacity.md").read_text(encoding="utf-8")
    assert capacity.between(text) == capacity.page(figures)


def test_no_figure_is_stated_for_a_gpu() -> None:
    table = capacity.size_table("any", COST)
    at = [cell.strip() for cell in table.splitlines()[0].split("|")].index("GPUs")
    cells = [line.split("|")[at].strip() for line in table.splitlines()[2:]]
    assert cells == [capacity.NOT_MEASURED] * len(capacity.SIZES)


def test_a_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{capacity.BEGIN}\nold\n{capacity.END}\nafter\n")
    capacity.write(page, "new")
    capacity.write(page, "newer")
    assert page.read_text() == f"before\n{capacity.BEGIN}\n\nnewer\n\n{capacity.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="is not there, or has no"):
        capacity.write(page, "new")


# -- what is measured ----------------------------------------------------------------------------------


def test_the_cpu_of_a_process_is_counted_by_thread() -> None:
    cpu = measured.Cpu(os.getpid())
    cpu.begin()
    sum(range(300_000))
    threads = cpu.end()
    assert threads[0] > 0
    assert threads == sorted(threads, reverse=True)


def test_each_kind_of_figure_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(measured, "WINDOW_SECONDS", 0.2)
    monkeypatch.setattr(measured, "OPENS", 8)
    monkeypatch.setattr(measured, "WIRE_CHUNKS", 120)
    repository = measured.repository(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("ab" * 32 + "\n")
    with measured.Pod(repository.folder, "--token-key-file", str(keys)) as pod:
        measured.record_spoken(tmp_path)
        party = Party(4, measured.SAMPLES, tracks=measured.SPOKEN)
        run = measured.run_case(measured.Case(measured.SPOKEN, "a few", party), pod, tmp_path)
        opened = measured.opens(pod, pod, rounds=1)
        wire = measured.wire(pod)
        packed = measured.packed_wire(pod)
        series = measured.series(pod)
    assert run["us_per_chunk"] >= run["busiest_us"] >= run["second_us"] > 0
    assert all(low > 0 for _, low, _ in opened.values())
    for name, sent in ((model.NAME, 160), (measured.SPOKEN, 320)):  # bytes of a chunk's values
        assert sent < wire[name]["chunk up"] < 2 * sent
        assert wire[name]["token on the wire"] == pytest.approx(wire[name]["token"], rel=0.1)
    assert 160 < packed["chunk up"] < wire[model.NAME]["chunk up"]
    assert series["per model"] < series["total"]
