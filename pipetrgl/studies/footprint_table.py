"""A footprint as a table for readers, and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipetrgl.studies.footprint import Footprint

SCHEMA = 1
_WIDTH = 15
_SAVED = {"VanGL": "vangl", "TRGL": "identity", "stored r": "stored", "1F1B": "one_f_one_b"}


def table(counted: Footprint, peaks: tuple[int, ...] | None = None) -> str:
    """The footprint as text, in MiB; with `peaks`, measured peak RSS of every stage and then of end-to-end training."""
    columns = ["VanGL", "TRGL", "stored r", "GPipe", "1F1B", "parameters", "optimizer", "links"]
    columns += {"none": [], "memory": ["cache"], "disk": ["cache on disk"]}[counted.cache]
    whole = counted.end_to_end
    lines = [
        f"{counted.network}, {counted.rows} rows a micro-batch; GPipe and 1F1B: M = {counted.num_micro_batches}; MiB",
        f"{'':12}{'saved activations (% of end-to-end)':^55}",
        f"{'':12}" + "".join(f"{name:>{_WIDTH}}" for name in columns) + (f"{'peak RSS':>{_WIDTH}}" if peaks else ""),
    ]
    rows = [*((f"stage {k}", stage) for k, stage in enumerate(counted.stages)), ("end-to-end", whole)]
    for position, (name, row) in enumerate(rows):
        saved = (row.vangl, row.identity, row.stored, row.gpipe, row.one_f_one_b)
        cells = [f"{_mib(value)} {100 * value / whole.vangl:3.0f} %" for value in saved]
        cells += [_mib(value) for value in (row.parameters, row.optimizer, row.links)]
        cells += [_mib(row.cache)] if counted.cache != "none" else []
        cells += [_mib(peaks[position])] if peaks else []
        lines.append(f"{name:12}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in largest_shares(counted).items())
    return "\n".join([*lines, f"largest stage's saved activations, of end-to-end's: {shares}"])


def largest_shares(counted: Footprint) -> dict[str, float]:
    """Saved activations of the largest stage, as a share of end-to-end training's."""
    whole = counted.end_to_end.vangl
    return {name: max(getattr(stage, field) for stage in counted.stages) / whole for name, field in _SAVED.items()}


def to_dict(
    counted: Footprint, config_hash: str, environment: Mapping[str, Any], peaks: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The content of the file that `pipetrgl memory --out` writes; docs/memory.md."""
    rows = [*counted.stages, counted.end_to_end]
    measured = peaks or (None,) * len(rows)
    *stages, whole = (
        {
            **{f"{name}_bytes" if name != "span" else name: value for name, value in dataclasses.asdict(row).items()},
            "peak_rss_bytes": peak,
        }
        for row, peak in zip(rows, measured, strict=True)
    )
    return {
        "schema": SCHEMA,
        "command": "memory",
        "config_hash": config_hash,
        "model": counted.network,
        "rows": counted.rows,
        "num_micro_batches": counted.num_micro_batches,
        "num_stages": len(counted.stages),
        "stages": [{"stage": number, **stage} for number, stage in enumerate(stages)],
        "end_to_end": whole,
        "largest_share_of_end_to_end": largest_shares(counted),
        "environment": dict(environment),
    }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"
