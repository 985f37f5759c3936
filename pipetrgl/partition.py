"""Cuts: which consecutive blocks make a stage.

    stem  b0  b1  b2 | b3  b4 | b5  b6  norm        cuts: [3, 2, 2], or even, or [b3, b5]
    └── stage 0 ───┘ └ stage 1┘ └── stage 2 ──┘

Only counted blocks can be cut between. What is not counted stays with a neighbour: a stem with the first counted block,
anything else with the counted block before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from pipetrgl.blocks import BlockSpec
from pipetrgl.errors import ModelError, nearest

Cuts = str | Sequence[int] | Sequence[str]


def partition(
    blocks: Sequence[BlockSpec], num_stages: int, cuts: Cuts, num_parameters: Sequence[int]
) -> tuple[range, ...]:
    """The block indices of each stage, consecutive and covering all blocks.

    Args:
        blocks: the network's blocks in order.
        num_stages: K, the number of ranges returned.
        cuts: "even", "parameters", K counts of counted blocks, or the names of the K - 1 later stages' first blocks.
        num_parameters: of each block, used by "parameters".
    Raises:
        ModelError: more stages than counted blocks, counts that do not add up, or a cut where none is legal; says why.
    """
    units = _units(blocks)
    if num_stages > len(units):
        raise ModelError(
            f"pipeline.stages: {num_stages} stages need at least {num_stages} blocks, but this network has "
            f"{len(units)} that a cut may separate; a residual block is never cut"
        )
    counts = _counts(blocks, units, num_stages, cuts, num_parameters)
    bounds = [0, *accumulate(counts)]
    return tuple(range(units[start].start, units[stop - 1].stop) for start, stop in pairwise(bounds))


def even_counts(total: int, num_stages: int) -> list[int]:
    """`total` blocks in `num_stages` portions that differ by at most one, the larger ones first.

    >>> even_counts(54, 4)
    [14, 14, 13, 13]
    """
    portion, rest = divmod(total, num_stages)
    return [portion + (stage < rest) for stage in range(num_stages)]


def balanced_counts(weights: Sequence[float], num_stages: int) -> list[int]:
    """Lengths of `num_stages` consecutive non-empty groups whose heaviest is as light as possible.

    Exact dynamic programming over (groups, first items), O(num_stages * n**2); ties take the earliest cut.
    """
    prefix = [0.0, *accumulate(weights)]
    n = len(weights)
    best = [prefix[:]]  # best[k][i]: heaviest group when the first i items make k + 1 groups
    choice: list[list[int]] = [[0] * (n + 1)]
    for k in range(1, num_stages):
        row, picks = [float("inf")] * (n + 1), [0] * (n + 1)
        for i in range(k + 1, n + 1):
            for j in range(k, i):
                heaviest = max(best[k - 1][j], prefix[i] - prefix[j])
                if heaviest < row[i]:
                    row[i], picks[i] = heaviest, j
        best.append(row)
        choice.append(picks)
    bounds = [n]
    for k in range(num_stages - 1, 0, -1):
        bounds.append(choice[k][bounds[-1]])
    bounds.append(0)
    return [stop - start for start, stop in pairwise(reversed(bounds))]


def _units(blocks: Sequence[BlockSpec]) -> list[range]:
    """Block ranges that must stay together, each around one counted block."""
    counted = [index for index, block in enumerate(blocks) if block.counted]
    starts = [0, *counted[1:]]
    return [range(start, stop) for start, stop in pairwise([*starts, len(blocks)])]


def _counts(
    blocks: Sequence[BlockSpec], units: list[range], num_stages: int, cuts: Cuts, num_parameters: Sequence[int]
) -> list[int]:
    if cuts == "even":
        return even_counts(len(units), num_stages)
    if cuts == "parameters":
        return balanced_counts([sum(num_parameters[i] for i in unit) for unit in units], num_stages)
    if isinstance(cuts, str):
        raise ModelError(f"model.cuts: '{cuts}' has not been planned yet; only the command line does that")
    counts = [cut for cut in cuts if isinstance(cut, int)]
    if len(counts) < len(cuts):
        return _counts_from_names(blocks, units, [str(cut) for cut in cuts])
    if sum(counts) != len(units):
        arithmetic = " + ".join(map(str, counts))
        raise ModelError(f"model.cuts: {arithmetic} = {sum(counts)} blocks, but this network has {len(units)}")
    return counts


def _counts_from_names(blocks: Sequence[BlockSpec], units: list[range], names: list[str]) -> list[int]:
    firsts = {blocks[unit.start].name: position for position, unit in enumerate(units) if position > 0}
    bounds = [0]
    for name in names:
        if name not in firsts:
            raise ModelError(f"model.cuts: {_why_illegal(blocks, name, list(firsts))}")
        if firsts[name] <= bounds[-1]:
            raise ModelError(f"model.cuts: '{name}' does not come after the cut before it; list the cuts in order")
        bounds.append(firsts[name])
    return [stop - start for start, stop in pairwise([*bounds, len(units)])]


def _why_illegal(blocks: Sequence[BlockSpec], name: str, legal: list[str]) -> str:
    for position, block in enumerate(blocks):
        if block.name == name:
            neighbour = "first block" if position == 0 else "block before it"
            if block.counted:
                return f"a cut before '{name}' would leave the first stage empty"
            return f"'{name}' cannot open a stage: it is no residual block and stays with the {neighbour}"
        if block.prefix and name.startswith(block.prefix):
            return f"'{name}' lies inside block '{block.name}', and a residual block is never cut"
    return f"no block is called '{name}'. {nearest(name, legal)}"
