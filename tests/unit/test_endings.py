"""Every sequence ends with exactly one reason: its client is told it, the log has it, a metric counts it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest

from tenuto.serving.log_format import formatter
from tenuto.serving.population import Population
from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.sequence import Closed, Ending, Failed, Sequence
from tenuto.serving.snapshot import Checkpoints

from .fakes import EXPLODES, FAILS, Bench

SEALER = TokenSealer()


def supersede(bench: Bench, one: Sequence) -> None:
    bench.engine.checkpoint(one)
    bench.settle()
    token = bench.replies(one)[-1].token  # type: ignore[union-attr]
    bench.engine.open(Sequence(bench.sink, bench.manifest), SEALER.unseal(token, one.caller))


def grow_old(bench: Bench, _: Sequence) -> None:
    bench.engine.retire(5.0)
    bench.settle()
    bench.now += 6


def wait(bench: Bench, _: Sequence) -> None:
    bench.now += 61


def overrun(bench: Bench, one: Sequence) -> None:
    for step in range(2, 9):
        bench.send(one, step, [1])


WAYS: dict[Ending, Callable[[Bench, Sequence], object]] = {
    Ending.END: lambda bench, one: bench.engine.finish(one, Ending.END),
    Ending.STREAM_ENDED: lambda bench, one: bench.engine.finish(one, Ending.STREAM_ENDED),
    Ending.CANCELLED: lambda bench, one: bench.engine.close(one, Ending.CANCELLED),
    Ending.IDLE_EXPIRED: wait,
    Ending.EVICTED: lambda bench, one: bench.engine.close_by_id(one.id, Ending.EVICTED),
    Ending.DRAINING: lambda bench, _: bench.engine.drain(),
    Ending.MAX_AGE: grow_old,
    Ending.REBALANCE: lambda bench, _: bench.engine.rebalance(0.0, 1, 0.0),
    Ending.SUPERSEDED: supersede,
    Ending.WINDOW_EXCEEDED: overrun,
    Ending.STATE_NOT_FINITE: lambda bench, one: bench.send(one, 2, [EXPLODES]),
    Ending.FAILED: lambda bench, one: bench.send(one, 2, [FAILS]),
}


def test_every_ending_has_its_way() -> None:
    assert set(Ending) == set(WAYS)


@pytest.mark.parametrize("reason", WAYS, ids=lambda reason: reason.name)
def test_an_ending_is_told_logged_and_counted_once(reason: Ending, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tenuto")
    bench = Bench(checkpoints=Checkpoints(SEALER.seal, "", "", 0))
    one = bench.open(idle_seconds=60, caller="alice")
    bench.send(one, 1, [1])
    bench.settle()
    WAYS[reason](bench, one)
    bench.settle()
    bench.engine.close(one, Ending.CANCELLED)  # too late: it has its reason
    bench.settle()
    endings = [r for r in bench.replies(one) if isinstance(r, Closed | Failed)]
    assert len(endings) == 1
    if isinstance(endings[0], Closed):
        assert endings[0].reason is reason
    else:
        assert reason in (Ending.STATE_NOT_FINITE, Ending.FAILED)
    assert bench.engine.metrics.ended == {reason.name: 1}
    (line,) = [r for r in caplog.records if f"{one.id} ended" in r.getMessage()]
    error = ", RUN_FAILED," if reason is Ending.FAILED else ""
    seconds = bench.now - one.begun
    steps = one.answered
    assert line.getMessage() == (
        f"accumulator/3: {one.id} ended {reason.name}{error} after step {steps}, {seconds:.1f} s"
    )
    fields = json.loads(formatter("json").format(line))
    assert {k: v for k, v in fields.items() if k not in ("time", "message")} == {
        "level": "info",
        "logger": "tenuto.population",
        "model": "accumulator",
        "version": 3,
        "sequence": one.id,
        "caller": "alice",
        "ending": reason.name,
        "reason": "RUN_FAILED" if error else reason.name,
        "steps": steps,
        "seconds": seconds,
    }


def test_an_ending_costs_nothing_where_no_line_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "tenuto")
    bench = Bench()
    one = bench.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Population, "_log", lambda *_: pytest.fail("a line was made"))
        bench.engine.finish(one, Ending.END)
        bench.settle()
    assert bench.ending(one) is Ending.END
