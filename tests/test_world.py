"""Ranks and seeds."""

from __future__ import annotations

import pytest

from pipetrgl.errors import LaunchError, nearest
from pipetrgl.seeds import derive, numpy_stream, torch_stream
from pipetrgl.world import Place, World


def test_ranks_run_through_replicas_of_each_stage() -> None:
    world = World((1, 2, 1))
    assert [world.place(rank) for rank in range(4)] == [Place(0, 0, 0), Place(1, 1, 0), Place(2, 1, 1), Place(3, 2, 0)]
    assert [world.rank(place.stage, place.replica) for place in map(world.place, range(4))] == [0, 1, 2, 3]


def test_a_world_is_drawn_as_a_grid() -> None:
    assert World((1, 2, 1)).draw().splitlines() == [
        "            stage 0    stage 1    stage 2",
        "replica 0   rank 0     rank 1     rank 3",
        "replica 1              rank 2",
    ]


def test_a_wrong_world_size_shows_the_arithmetic() -> None:
    with pytest.raises(LaunchError, match=r"started with 3 workers, but 3 stages need 1 \+ 2 \+ 1 = 4"):
        World((1, 2, 1)).require_size(3)
    World((1, 2, 1)).require_size(4)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(LaunchError, match="rank 4 is outside a world of 4"):
        World((1, 2, 1)).place(4)


def test_streams_are_functions_of_seed_and_purpose_alone() -> None:
    assert derive(0, "weights", "layer1.0") == derive(0, "weights", "layer1.0")
    assert len({derive(0, "a", 1), derive(0, "a", "1"), derive(1, "a", 1), derive(0, "a1"), derive(0, "a", 1, 2)}) == 5
    assert torch_stream(3, "x").initial_seed() == derive(3, "x")
    assert numpy_stream(3, "x").integers(1 << 30) == numpy_stream(3, "x").integers(1 << 30)


def test_an_unknown_name_gets_its_nearest_match_and_all_allowed_ones() -> None:
    assert nearest("cifar", ["stl10", "cifar10"]) == "Did you mean 'cifar10'? Allowed: cifar10, stl10."
    assert nearest("zzz", ["b", "a"]) == "Allowed: a, b."
