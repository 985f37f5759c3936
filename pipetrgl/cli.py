"""The command line, one function a command: train, evaluate, export, plan, simulate, bench, study, memory and more."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.bench import load_bench
from pipetrgl.config.load import config_hash, json_schema, load
from pipetrgl.config.study import load_study
from pipetrgl.console import Progress, print_result
from pipetrgl.engine.checkpoint import write_atomically
from pipetrgl.errors import ConfigError, Interrupted, PipetrglError
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.scoring import checkpoint_of, export_run
from pipetrgl.launchers.scoring import score as score_heads
from pipetrgl.launchers.signals import stop_on_signals
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.start import train as start_training
from pipetrgl.studies import what_if
from pipetrgl.studies.bench import run_bench
from pipetrgl.studies.bench_report import findings, write_bench_report
from pipetrgl.studies.footprint import footprint
from pipetrgl.studies.footprint_table import table
from pipetrgl.studies.footprint_table import to_dict as footprint_dict
from pipetrgl.studies.peaks import peak_rss, peak_rss_end_to_end
from pipetrgl.studies.planning import plan_for, planned, summary, to_dict
from pipetrgl.studies.planning import read as read_plan
from pipetrgl.studies.report import write_report
from pipetrgl.studies.study import run_study
from pipetrgl.studies.study_report import write_answer
from pipetrgl.studies.turns import measure as take_turns
from pipetrgl.studies.wording import size

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pipelined greedy training with a transport regulariser (TRGL).",
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.epochs=3 model.cuts=[2,2]")]


RunPath = Annotated[Path, typer.Argument(help="Folder of a run.")]
Step = Annotated[int | None, typer.Option(min=0, help="Of which checkpoint; unset: the newest.")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a network in stages, each on its own worker."""
    stop = threading.Event()
    stop_on_signals(stop, say=_say)
    console = Console()
    settings = load(config, overrides or [])
    with Progress(console) as progress:
        result = start_training(settings, progress.open, stop, functools.partial(planned, say=print))
    if result is None:
        return
    print_result(console, result)
    run = Path(result["run"])
    if settings.run.report:
        console.print(f"report: {_report_or_reason(run)}", highlight=False, soft_wrap=True)


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config, its data set and its cuts without training; print the stages, and the phases of their order."""
    settings = planned(load(config, overrides or []), print)
    blueprint = draw_up(settings, describe(settings))
    print(outline(blueprint))


@app.command()
def memory(
    config: ConfigPath,
    overrides: Overrides = None,
    micro_batches: Annotated[int | None, typer.Option(min=1, help="M of GPipe and 1F1B; unset: K.")] = None,
    measure: Annotated[bool, typer.Option(help="Also start the workers, and print the peak RSS of each.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of --measure.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Also write the numbers there, as JSON.")] = None,
) -> None:
    """Count the bytes of every stage against end-to-end training, GPipe and 1F1B; see docs/memory.md."""
    settings = planned(load(config, overrides or []), print)
    counted = footprint(settings, describe(settings), micro_batches)
    peaks = (*peak_rss(settings, steps), peak_rss_end_to_end(settings, steps)) if measure else None
    print(table(counted, peaks))
    if out is not None:
        _write_json(out, footprint_dict(counted, config_hash(settings), environment(), peaks))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    workers: Annotated[int, typer.Option(min=1, help="Use at most so many.")],
    out: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    memory_mib: Annotated[float | None, typer.Option(min=1, help="Limit of each worker.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Of a stage; unset: as many as help.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each block and head.")] = 10,
) -> None:
    """Profile blocks, heads and link on this machine; find the cuts and replicas whose slowest stage is fastest."""
    memory_bytes = None if memory_mib is None else int(memory_mib * 2**20)
    made = plan_for(load(config, overrides or []), workers, max_replicas or workers, memory_bytes, repeats)
    print(summary(made))
    _write_json(out, to_dict(made, environment()))
    print(f"plan: {out}")


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(help="A plan.json.")],
    *,
    workers: Annotated[int | None, typer.Option(min=1, help="Plan anew for so many, from the plan's profile.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="The stages so many times in a row: a deeper network.")] = 1,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a micro-batch; costs in proportion.")] = None,
    speed: Annotated[float, typer.Option(min=1e-6, help="Of every device, times that of the profiled one.")] = 1.0,
    capacity: Annotated[int | None, typer.Option(min=1, help="Slots of each link.")] = None,
    batches: Annotated[int, typer.Option(min=2, help="Micro-batches.")] = 1000,
    link_gbps: Annotated[
        float | None, typer.Option(min=1e-6, help="Bandwidth of each link, gigabits a second.")
    ] = None,
    jitter: Annotated[float, typer.Option(min=0, max=0.99, help="Times vary by this share, evenly drawn.")] = 0.0,
    straggler: Annotated[list[str] | None, typer.Option(help="stage:factor, 3:1.5 makes stage 3 slower.")] = None,
) -> None:
    """Say what the stages of a plan would give on other links or with other workers; trains nothing."""
    changes = what_if.Changes(workers, repeat, batch, speed, capacity, link_gbps, jitter, tuple(straggler or ()))
    print(what_if.answer(read_plan(plan), batches, changes))


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML file, see configs/studies/.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Its folder; unset: runs/NAME of the study.")] = None,
) -> None:
    """Train variants with several seeds each, and compare them pair by pair; goes on where it was ended."""
    stop = threading.Event()
    stop_on_signals(stop, say=_say)
    described = load_study(file)
    folder = out or Path("runs") / described.name
    outcomes, chosen = run_study(described, folder, lambda line: print(line, flush=True), stop)
    for line in write_answer(described, outcomes, chosen, folder):
        print(line)


@app.command()
def bench(file: Annotated[Path, typer.Argument(help="YAML file, see benchmarks/.")]) -> None:
    """Measure a network on more and more workers, in turns with its peers; see docs/performance.md."""
    run = run_bench(load_bench(file), take_turns, lambda line: print(line, flush=True))
    for sentence in findings(json.loads((run / "result.json").read_text(encoding="utf-8"))):
        print(sentence)
    print(f"report: {_report_or_reason(run)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    print(json_schema())


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run or a bench.")]) -> None:
    """Write report.html of a run or a bench, finished or not."""
    print(_write_report(run))


@app.command()
def evaluate(
    run: RunPath,
    *,
    step: Step = None,
    split: Annotated[Literal["test", "valid"], typer.Option(help="Which images.")] = "test",
) -> None:
    """Score every head of a run's checkpoint, in this process; trains nothing."""
    checkpoint = checkpoint_of(run, step)
    print(f"{run}, step {checkpoint.step}, {split} split")
    for stage, score in enumerate(score_heads(run, checkpoint, split)):
        answer = f"accuracy {100 * score.accuracy:.2f} %, cross-entropy {score.loss:.4f}" if score else "no head"
        print(f"stage {stage}: {answer}")


@app.command()
def export(
    run: RunPath,
    *,
    head: Annotated[str, typer.Option(help="best (on the validation split), last, or the number of a stage.")] = "best",
    step: Step = None,
    out: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("model.safetensors"),
) -> None:
    """Write a run's network up to one head as one file; `pipetrgl.export.load` gives it back as an nn.Module."""
    done = export_run(run, step, head, out)
    print(f"blocks of stages 0 to {done.head} and the head of stage {done.head}, step {done.step}")
    print(f"{done.path}: {size(done.num_bytes)}")


def outline(blueprint: Blueprint) -> str:
    """The stages of a run as text, one line each, and its phases where not all stages learn at the same time."""
    itinerary, spec = blueprint.itinerary, blueprint.spec
    lines = [
        f"{blueprint.network.name} on {spec.name}: {spec.num_train:,} train, {spec.num_valid:,} valid, "
        f"{spec.num_test:,} test {spec.samples} of {spec.sample_shape}, {spec.num_classes} classes",
        f"{itinerary.total_steps} steps, {itinerary.steps_per_epoch} an epoch",
    ]
    for stage in range(blueprint.num_stages):
        blocks, head = blueprint.stage_parameters(stage)
        names = [block.name for block in blueprint.blocks(stage)]
        image = "" if (shape := blueprint.image_shape(stage)) is None else f" and the image {shape}"
        lines.append(
            f"stage {stage}: {names[0]} .. {names[-1]} | {blueprint.input_shape(stage)}{image} -> "
            f"{blueprint.output_shape(stage)} | {blocks:,} parameters, head {head:,} | tau {blueprint.taus[stage]:g}"
        )
    if blueprint.config.train.one_by_one:
        lines += [
            f"lap {phase.lap}, stage {phase.learners[0]} learns: {phase.epochs} epochs, "
            f"steps {phase.steps[0] + 1:,} to {phase.steps.stop:,}"
            for phase in itinerary.sweep.phases
        ]
    return "\n".join([*lines, blueprint.world.draw()])


def main() -> None:
    """Run the command line; every deliberate error is one message on stderr and an exit code."""
    code = _exit_code(app)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # without waiting for threads that a failed run may have left in a broken link
        os._exit(code)


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except PipetrglError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # a handler may interrupt a print, and must not print itself


def _write_json(out: Path, content: Mapping[str, Any]) -> None:
    try:
        write_atomically(out, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{out}': {error.strerror}") from error


def _write_report(folder: Path) -> Path:
    return write_bench_report(folder) if (folder / "bench.yaml").is_file() else write_report(folder)


def _report_or_reason(run: Path) -> str:
    """A missing plotting library is no reason for a finished training to fail."""
    try:
        return str(_write_report(run))
    except ConfigError as error:
        return f"not written, {error}"
