"""Saved activations of the stages of ResNet-110 on 96x96 images, as shares of end-to-end training's.

    python benchmarks/memory.py > benchmarks/memory.txt

The cuts are those of the paper's STL-10 configs, batch 64, counted on synthetic images of that shape. Bytes are
counted, not measured: the output is the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

from pipetrgl.config.load import load
from pipetrgl.launchers.start import describe
from pipetrgl.studies.footprint import footprint
from pipetrgl.studies.footprint_table import largest_shares

PAPER = Path(__file__).parents[1] / "configs" / "paper"
IMAGES = ["data.name=synthetic", "data.shape=[3,96,96]", "data.root=null"]


def main() -> None:
    print("largest stage's saved activations, of end-to-end's; ResNet-110, 3x96x96, batch 64")
    print(f"{'K':>3} {'end-to-end':>12} {'VanGL':>9} {'TRGL':>9} {'stored r':>9} {'1F1B, M = K':>12}")
    for num_stages in (2, 4, 8, 16):
        config = load(PAPER / f"stl10-k{num_stages}.yaml", IMAGES)
        counted = footprint(config, describe(config))
        shares = [f"{100 * share:7.1f} %" for share in largest_shares(counted).values()]
        whole = f"{counted.end_to_end.vangl / 2**20:,.0f} MiB"
        print(f"{num_stages:3} {whole:>12} {shares[0]} {shares[1]} {shares[2]} {shares[3]:>12}", flush=True)


if __name__ == "__main__":
    main()
