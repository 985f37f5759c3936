"""The diagnostics on values that can be counted by hand."""

from __future__ import annotations

from pipetrgl.studies.diagnostics import energy_rises, stagnation


def test_energy_rises_where_loss_and_cost_together_exceed_the_loss_before() -> None:
    #  1.0 -> 0.6 + 0.3 falls; 0.6 -> 0.5 + 0.2 rises by its cost; 0.5 -> 0.4 + 0.1 is equal, which is no rise
    assert energy_rises([1.0, 0.6, 0.5, 0.25], [9.0, 0.3, 0.2, 0.25]) == [False, True, False]
    assert energy_rises([1.0], [0.5]) == []


def test_stagnation_is_what_the_last_head_lacks_to_the_best() -> None:
    assert stagnation([0.5, 0.75, 0.625]) == 0.125
    assert stagnation([0.5, 0.75]) == 0
