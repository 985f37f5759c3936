"""Cuts, drawn: uncounted blocks in brackets stay with their neighbour."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from pipetrgl.blocks import BlockSpec
from pipetrgl.errors import ModelError
from pipetrgl.partition import balanced_counts, even_counts, partition


def network(drawing: str) -> list[BlockSpec]:
    """ "(stem) a b c (norm)" as blocks."""
    names = drawing.split()
    return [
        BlockSpec(name.strip("()"), f"body.{name.strip('()')}.", nn.Identity, counted=not name.startswith("("))
        for name in names
    ]


BLOCKS = network("(stem) a b c d e (norm)")


def cut(cuts: object, num_stages: int, weights: list[int] | None = None) -> list[tuple[int, int]]:
    ranges = partition(BLOCKS, num_stages, cuts, weights or [1] * len(BLOCKS))  # type: ignore[arg-type]
    return [(stage.start, stage.stop) for stage in ranges]


@pytest.mark.parametrize("cuts", ["even", [3, 2], ["d"]])
def test_stem_goes_with_the_first_block_and_norm_with_the_last(cuts: object) -> None:
    #  (stem) a b c | d e (norm)
    assert cut(cuts, 2) == [(0, 4), (4, 7)]


def test_a_merge_goes_with_the_block_before_it() -> None:
    blocks = network("a b (merge) c")
    #  a b (merge) | c
    assert [tuple(r) for r in partition(blocks, 2, [2, 1], [1] * 4)] == [(0, 1, 2), (3,)]


def test_even_counts_differ_by_at_most_one_and_give_the_papers_splits() -> None:
    assert even_counts(54, 2) == [27, 27]
    assert even_counts(54, 4) == [14, 14, 13, 13]
    assert even_counts(54, 16) == [4] * 6 + [3] * 10


def test_parameters_make_the_heaviest_stage_as_light_as_possible() -> None:
    #  weights 1 1 1 | 3 (of a b c d), e 1
    assert cut("parameters", 2, [0, 1, 1, 1, 3, 1, 0]) == [(0, 4), (4, 7)]


def test_balanced_counts_equal_brute_force() -> None:
    weights = [3, 1, 4, 1, 5, 9, 2, 6]
    for num_groups in range(1, 9):
        best = min(
            max(sum(weights[i:j]) for i, j in itertools.pairwise([0, *cuts, 8]))
            for cuts in itertools.combinations(range(1, 8), num_groups - 1)
        )
        counts = balanced_counts(weights, num_groups)
        bounds = [0, *itertools.accumulate(counts)]
        assert max(sum(weights[i:j]) for i, j in itertools.pairwise(bounds)) == best
        assert len(counts) == num_groups


@pytest.mark.parametrize(
    ("cuts", "num_stages", "message"),
    [
        ("even", 6, "6 stages need at least 6 blocks, but this network has 5"),
        ([3, 3], 2, "3 \\+ 3 = 6 blocks, but this network has 5"),
        (["body.b.conv1"], 2, "'body.b.conv1' lies inside block 'b', and a residual block is never cut"),
        (["norm"], 2, "'norm' cannot open a stage: it is no residual block and stays with the block before it"),
        (["stem"], 2, "'stem' cannot open a stage: .* stays with the first block"),
        (["a"], 2, "a cut before 'a' would leave the first stage empty"),
        (["bb"], 2, "no block is called 'bb'. Did you mean 'b'"),
        (["d", "c"], 3, "'c' does not come after the cut before it"),
    ],
)
def test_an_illegal_cut_says_why(cuts: object, num_stages: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        cut(cuts, num_stages)
