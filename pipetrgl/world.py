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

    @property
    def places(self) -> tuple[Place, ...]:
        """Of all workers, by rank."""
        return tuple(self.place(rank) for rank in range(self.size))

    def rank(self, stage: int, replica: int = 0) -> int:
        return sum(self.replicas[:stage]) + replica

    def place(self, rank: int) -> Place:
        """The stage and replica of a rank; `rank` is below `size`."""
        for stage, count in enumerate(self.replicas):
            first = self.rank(stage)
            if rank < first + count:
                return Place(rank, stage, rank - first)
        raise LaunchError(f"rank {rank} is outside a world of {self.size} workers")

    def share(self, place: Place, rows: range) -> range:
        """The rows of a micro-batch that are this replica's: the j-th of R intervals whose sizes differ by at most one.

        rows 0 .. 7     stage 1, R = 2    0 1 2 3 │ 4 5 6 7
                        stage 2, R = 3    0 1 │ 2 3 4 │ 5 6 7       links: 0-0, 0-1, 1-1, 1-2
        """
        count = self.replicas[place.stage]
        start, stop = (rows.start + len(rows) * edge // count for edge in (place.replica, place.replica + 1))
        return range(start, stop)

    def senders(self, place: Place) -> tuple[Place, ...]:
        """The replicas of the stage before whose shares overlap this one's, in order; none for stage 0."""
        return self._overlapping(place, place.stage - 1) if place.stage > 0 else ()

    def receivers(self, place: Place) -> tuple[Place, ...]:
        """The replicas of the stage behind whose shares overlap this one's, in order; none for the last stage."""
        return self._overlapping(place, place.stage + 1) if place.stage < self.num_stages - 1 else ()

    def group(self, place: Place) -> tuple[Place, ...]:
        """All replicas of the stage, in order, this one included."""
        return tuple(other for other in self.places if other.stage == place.stage)

    def _overlapping(self, place: Place, stage: int) -> tuple[Place, ...]:
        """By the real intervals [j / R, (j + 1) / R); those of any number of rows overlap only where these do."""
        mine, theirs, j = self.replicas[place.stage], self.replicas[stage], place.replica
        return tuple(
            self.place(self.rank(stage, i))
            for i in range(theirs)
            if i * mine < (j + 1) * theirs and j * theirs < (i + 1) * mine
        )

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
