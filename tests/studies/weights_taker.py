"""One worker of a crew that trains every contender for a few batches and leaves the weights in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.launchers.crew import serve
from pipetrgl.launchers.membership import Membership
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.studies.turn_taker import assemble, seat_of


def leave_weights(member: Membership, board: Board, environ: Mapping[str, str]) -> None:
    note = board.read("case", 60, Alarm(), "the test")
    contenders = assemble(note["contenders"], seat_of(note, member, board, environ))
    for name, contender in contenders.items():
        contender.train(note["batches"], Stopwatch(0))
        if hasattr(contender, "state"):  # else it has no part in this contender
            file = Path(note["folder"], name.replace("/", "-"), f"stage-{member.place.rank}.safetensors")
            file.parent.mkdir(exist_ok=True)
            state = {key: tensor.detach().clone() for key, tensor in contender.state().items()}
            safetensors.torch.save_file(state, file)
    board.post(f"left/{member.place.rank}", {})
    board.read("never", 60, Alarm(), "the test to end this process")


if __name__ == "__main__":
    serve(leave_weights)
