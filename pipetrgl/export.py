"""Exports: a trained network up to one head as a single file, and that file as an ordinary `nn.Module`.

    run folder, checkpoint of a step ─▶ blocks of stages 0 .. k and the head of stage k ─▶ model.safetensors
                                                                                            │
                                        pipetrgl.export.load("model.safetensors")(images) ◀─┘

Weights are under the network's own names (torchvision's, where the network is one of its), the head's under `head.`.
The file also holds the config and the shapes that it needs: to load it takes no data set and no run folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.load import dump, undump
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import Checkpoint, write_atomically
from pipetrgl.errors import ConfigError

_FORMAT = "pipetrgl-export-1"
_HEAD = "head."


@dataclass(frozen=True)
class About:
    """What a file says of itself.

    Attributes:
        head: the stage whose head it ends in.
        step: optimizer steps of the run that it holds.
        mean, std: of each channel, of pixels scaled to [0, 1]: what the network takes is (x - mean) / std.
    """

    head: int
    step: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@final
class Classifier(nn.Module):
    """The blocks up to a stage's end, and its head: a normalised batch in, logits out.

    Attributes:
        about: where it comes from, and how its input is normalised.
    """

    def __init__(self, blueprint: Blueprint, about: About) -> None:
        super().__init__()
        specs = blueprint.network.blocks[: blueprint.ranges[about.head].stop]
        self.about = about
        self.blocks = nn.ModuleList(spec.build() for spec in specs)
        self.head = blueprint.head(about.head)
        self._prefixes = tuple(spec.prefix for spec in specs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) as the data set gives it, normalised, to (N, classes)."""
        for block in self.blocks:
            x = block(x).activation
        logits: Tensor = self.head(x)
        return logits

    def named_parts(self) -> list[tuple[str, nn.Module]]:
        """Blocks by their prefix in the network's state dict, then the head."""
        return [*zip(self._prefixes, self.blocks, strict=True), (_HEAD, self.head)]


def export(blueprint: Blueprint, checkpoint: Checkpoint, head: int, path: Path) -> int:
    """Write one file.

    Args:
        blueprint: of the run.
        checkpoint: of the run.
        head: the stage whose head to end in.
        path: of the file; replaced at once, or not at all.
    Returns:
        Its bytes.
    Raises:
        ConfigError: the checkpoint has not all of the weights.
        OSError: the file cannot be written.
    """
    about = About(head, checkpoint.step, blueprint.spec.mean, blueprint.spec.std)
    with torch.device("meta"):  # only the names
        parts = Classifier(blueprint, about).named_parts()
    last = [spec.name for spec in blueprint.blocks(head) if spec.counted][-1]
    stored = {_HEAD: f"heads.{last}."}
    wanted = {prefix + name: stored.get(prefix, prefix) + name for prefix, part in parts for name in part.state_dict()}
    found = checkpoint.tensors(set(wanted.values()).__contains__)
    if missing := wanted.values() - found.keys():
        raise ConfigError(f"{checkpoint.folder} lacks {', '.join(sorted(missing)[:3])}; is it of this run?")
    told = {"config": dump(blueprint.config), "spec": blueprint.spec.to_dict(), "head": head, "step": checkpoint.step}
    metadata = {"format": _FORMAT, "about": json.dumps(told)}
    content = safetensors.torch.save({name: found[there] for name, there in wanted.items()}, metadata)
    write_atomically(path, content)
    return len(content)


def load(path: str | Path) -> Classifier:
    """The network in a file, in eval mode, on the CPU.

    Raises:
        ConfigError: it is no such file; no code in it is run.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: no readable safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ConfigError(f"{path}: not written by pipetrgl export, or by another version of it")
    try:
        told = json.loads(metadata["about"])
        spec = DataSpec.from_dict(told["spec"])
        about = About(told["head"], told["step"], spec.mean, spec.std)
        model = Classifier(draw_up(undump(told["config"]), spec), about)
        for prefix, part in model.named_parts():
            part.load_state_dict({name: tensors[prefix + name] for name in part.state_dict()})
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: damaged, or of another version of pipetrgl ({error})") from error
    return model.eval()
