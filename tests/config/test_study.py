"""Study files: what they describe, and every fault of one at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipetrgl.config.study import Study, load_study
from pipetrgl.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> Study:
    return load_study(written(folder, text))


def refused(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError, match="problem") as caught:
        read(folder, text)
    return str(caught.value).splitlines()[1:]


def test_variants_are_the_base_with_their_options_dotted_or_nested(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 3, batch: 16}\n")
    study = read(
        tmp_path,
        "config: base.yaml\nseeds: 2\nvariants:\n  vangl: {objective.name: vangl}\n"
        "  long: {train: {epochs: 5}, objective.transport.tau: 2}\n",
    )
    vangl, long = (arm.config for arm in study.arms)
    assert (study.name, study.seeds, study.baselines, study.jobs) == ("s", (0, 1), ("vangl",), 1)
    assert (vangl.objective.name, vangl.train.epochs, vangl.train.batch) == ("vangl", 3, 16)
    assert (long.objective.name, long.train.epochs, long.train.batch, long.objective.transport.tau) == (
        "trgl",
        5,
        16,
        2,
    )


def test_cases_times_variants_times_candidates(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "config: {}\nseeds: [3, 5]\ncases: {k2: {pipeline.stages: 2}, k4: }\nvariants:\n  a: \n"
        "  b: {choose: {objective.transport.tau: [0.5, .inf], optim.lr: [0.1]}}\n",
    )
    b = ["b/tau=0.5,lr=0.1", "b/tau=.inf,lr=0.1"]
    assert [arm.place for arm in study.arms] == [f"{case}/{name}" for case in ("k2", "k4") for name in ["a", *b]]
    assert [arm.config.pipeline.stages for arm in study.arms] == [2] * 3 + [4] * 3
    assert study.arms[2].config.objective.transport.tau == float("inf")
    assert study.arms[2].config.optim.lr == 0.1


def test_a_study_inherits_from_another_and_so_does_an_inline_config(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 3, batch: 16}\n")
    (tmp_path / "first.yaml").write_text(
        "config: {defaults: base.yaml, train: {epochs: 4}}\nseeds: 2\nvariants: {a: , b: }\n"
    )
    study = read(tmp_path, "defaults: first.yaml\nconfig: {train: {order: sequential}}\nbaseline: b\nseeds: 3\n")
    train = study.arms[0].config.train
    assert (train.epochs, train.batch, train.order) == (4, 16, "sequential")
    assert (study.seeds, study.baselines) == ((0, 1, 2), ("b",))


def test_every_fault_is_told_at_once_with_its_line_and_the_nearest_match(tmp_path: Path) -> None:
    lines = refused(
        tmp_path,
        "config: {train: {epochz: 3}}\nseedz: 2\nvariants:\n  a: {objective.name: vangll}\n  b: {seed: 4}\n"
        "  c/d: \n  e: {choose: {objective.transport.tau: 3}}\nbaseline: bb\njobs: 0\n",
    )
    assert [line.strip().split("  ")[0] for line in lines] == [
        *(f"line {n}" for n in (1, 2, 4, 5, 6, 7, 8, 9)),
        lines[-1].strip(),
    ]
    text = "\n".join(lines)
    assert "train.epochz: unknown key. Did you mean 'epochs'?" in text
    assert "seedz: unknown key. Did you mean 'seeds'?" in text
    assert "objective.name: 'vangll' is not allowed. Did you mean 'vangl'?" in text
    assert "variants.b: seed is the study's to set" in text
    assert "variants.c/d: a name holds letters" in text
    assert "variants.e.choose.objective.transport.tau: expected a list of single values" in text
    assert "baseline: 'bb' is no variant. Did you mean 'b'?" in text
    assert "jobs: 0 is out of range" in text
    assert "seeds: is missing" in text


def test_a_rule_broken_by_one_variant_names_it(tmp_path: Path) -> None:
    lines = refused(
        tmp_path,
        "config: {objective: {transport: {tau: [1, 2]}}, pipeline: {stages: 2}}\nseeds: 1\nvariants:\n"
        "  a: \n  b: {pipeline.stages: 3}\n",
    )
    assert lines == ["  line 1   objective.transport.tau: 2 given; pipeline.stages = 3 needs one a stage (in b)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 1\nvariants: {a: }\n", "config: expected a file name"),
        (
            "config: nothing.yaml\nseeds: 1\nvariants: {a: }\n",
            "line 1   config: 'nothing.yaml': the file does not",
        ),
        ("config: {}\nseeds: 1\n", "variants: is missing"),
        ("config: {}\nseeds: 1\nvariants: [a]\n", "line 3   variants: expected a section with a name for each"),
        ("config: {}\nseeds: 1\nvariants: {a: 3}\n", "variants.a: expected a section of options"),
        ("config: {}\nseeds: [1, 1]\nvariants: {a: }\n", "line 2   seeds: [1, 1] names one twice"),
        ("config: {}\nseeds: 1\nvariants: {a: {choose: }}\n", "variants.a.choose: expected options"),
        ("config: {}\nseeds: 1\nvariants: {a: {choose: {optim.lr: [1, 1]}}}\n", "names one value twice"),
        ("config: {}\nseeds: 1\nvariants: {a: {evaluate.test_at_end: true}}\n", "evaluate.test_at_end is the study's"),
        ("config: {evaluate: {valid_every: 0.5}}\nseeds: 1\nvariants: {a: }\n", "0.5 is not allowed in a study"),
        ("config: {data: {valid_fraction: 0.0}}\nseeds: 1\nvariants: {a: }\n", "0 is not allowed in a study"),
        ("train: {epochs: 3}\nconfig: {}\nseeds: 1\nvariants: {a: }\n", "write it below 'config'"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(refused(tmp_path, text))
