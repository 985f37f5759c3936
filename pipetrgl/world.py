"""Who is who: a worker's rank is the place of one replica of one stage on a grid."""

from __future__ import annotations

from dataclasses import dataclass

from pipetrgl.errors import LaunchError


@dataclass(frozen=True)
class Place:
    """One worker: replica `replica` of stage `stage`."""

    rank: int
    stage: int
    replica: int


@dataclass(frozen=True)
class World:
    """Ranks run through the replicas of stage 0, then of stage 1, and so on.

    World((1, 2, 1)):    stage 0    stage 1    stage 2
            replica 0    rank 0     rank 1     rank 3
            replica 1               rank 2
    """

    replicas: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.replicas)

    @property
    def size(self) -> int:
        return sum(self.replicas)

    def rank(self, stage: int, replica: int = 0) -> int:
        return sum(self.replicas[:stage]) + replica

    def place(self, rank: int) -> Place:
        """The stage and replica of a rank; `rank` is below `size`."""
        for stage, count in enumerate(self.replicas):
            first = self.rank(stage)
            if rank < first + count:
                return Place(rank, stage, rank - first)
        raise LaunchError(f"rank {rank} is outside a world of {self.size} workers")

    def require_size(self, size: int) -> None:
        """Compare with the number of workers that a launcher was started with.

        Raises:
            LaunchError: they differ; the message shows the arithmetic.
        """
        if size != self.size:
            terms = " + ".join(map(str, self.replicas))
            raise LaunchError(
                f"started with {size} workers, but {self.num_stages} stages need {terms} = {self.size} "
                f"(replicas of each stage, summed); set --nproc-per-node so that nodes x processes = {self.size}, "
                f"or pipeline.stages={size}"
            )

    def draw(self) -> str:
        """The grid as text, one column a stage."""
        header = "            " + "".join(f"stage {stage:<5}" for stage in range(self.num_stages))
        rows = [
            f"replica {replica:<4}"
            + "".join(
                f"rank {self.rank(stage, replica):<6}" if replica < count else " " * 11
                for stage, count in enumerate(self.replicas)
            )
            for replica in range(max(self.replicas))
        ]
        return "\n".join(line.rstrip() for line in [header, *rows])
