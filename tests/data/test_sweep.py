"""The phases of each training order, counted by hand."""

from pipetrgl.config.schema import TrainConfig
from pipetrgl.data.sweep import Sweep


def sweep(num_stages: int = 3, steps_per_epoch: int = 1, **train: object) -> Sweep:
    return Sweep(TrainConfig(**train), num_stages, steps_per_epoch)


def staircase(plan: Sweep, num_stages: int = 3) -> list[str]:
    """A row a stage, a column an optimizer step: `#` learns, `-` hands on, `.` idle."""
    rows = []
    for stage in range(num_stages):
        phases = [plan.phase_of(step) for step in range(plan.total_steps)]
        rows.append("".join("#" if stage in p.learners else "-" if stage < p.learners.start else "." for p in phases))
    return rows


def test_in_the_parallel_order_all_stages_learn_in_one_phase() -> None:
    plan = sweep(epochs=4)
    assert staircase(plan) == [
        "####",
        "####",
        "####",
    ]
    (only,) = plan.phases
    assert (only.lap, only.steps, only.reached) == (0, range(4), range(3))


def test_in_the_sequential_order_later_stages_learn_later_and_longer() -> None:
    assert staircase(sweep(order="sequential", epochs=2, epochs_growth=1)) == [
        "##-------",
        "..###----",
        ".....####",
    ]


def test_an_epoch_of_several_steps_stretches_the_staircase() -> None:
    assert staircase(sweep(order="sequential", epochs=1, steps_per_epoch=3)) == [
        "###------",
        "...###---",
        "......###",
    ]


def test_multi_lap_climbs_the_staircase_again() -> None:
    plan = sweep(order="multi_lap", epochs=1, epochs_growth=1, laps=2)
    assert staircase(plan) == [
        "#-----#-----",
        ".##---.##---",
        "...###...###",
    ]
    assert [phase.lap for phase in plan.phases] == [0, 0, 0, 1, 1, 1]
    assert [phase.steps for phase in plan.phases] == [
        range(1), range(1, 3), range(3, 6), range(6, 7), range(7, 9), range(9, 12),
    ]  # fmt: skip
    assert plan.num_epochs == 12


def test_max_steps_cuts_the_whole_staircase() -> None:
    plan = sweep(order="sequential", epochs=2, max_steps=3)
    assert staircase(plan) == [
        "##-",
        "..#",
        "...",
    ]
    assert len(plan.phases) == 2
    assert plan.num_updates(2, 3) == 0


def test_an_evaluation_belongs_to_the_phase_that_took_the_last_step_before_it() -> None:
    plan = sweep(order="multi_lap", epochs=2, laps=2)
    #  steps taken        0  1  2  3  4  5  6  7  ..
    #  learner           (0) 0  0  1  1  2  2  0  ..
    reached = [list(plan.phase_after(taken).reached) for taken in range(9)]
    assert reached == [[0], [0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_a_phase_closes_with_its_last_step() -> None:
    plan = sweep(order="sequential", epochs=1, epochs_growth=1, steps_per_epoch=2, num_stages=2)
    #  stage 0  ##----
    #  stage 1  ..####
    assert [step for step in range(plan.total_steps) if plan.closes_phase(step)] == [1, 5]
    cut = sweep(order="sequential", epochs=2, steps_per_epoch=2, num_stages=2, max_steps=5)
    assert [step for step in range(cut.total_steps) if cut.closes_phase(step)] == [3, 4]


def test_a_stage_counts_its_own_updates_over_all_laps() -> None:
    plan = sweep(order="multi_lap", epochs=1, epochs_growth=1, laps=2, num_stages=2)
    #  steps taken       0 1 2 3 4 5 6
    #  stage 0           # - - # - -
    #  stage 1           . # # . # #
    assert [plan.num_updates(0, taken) for taken in range(7)] == [0, 1, 1, 1, 2, 2, 2]
    assert [plan.num_updates(1, taken) for taken in range(7)] == [0, 0, 1, 2, 2, 3, 4]
    parallel = sweep(epochs=3)
    assert [parallel.num_updates(2, taken) for taken in range(4)] == [0, 1, 2, 3]
