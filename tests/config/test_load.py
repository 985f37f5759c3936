"""Loading a config: inheritance, overrides, and every way in which a file can be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from pipetrgl.config.load import config_hash, dump, load
from pipetrgl.config.schema import Config
from pipetrgl.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def rows(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The rows of the error that loading `path` must end in, without their indentation."""
    with pytest.raises(ConfigError, match=r"^\d+ problems? in ") as caught:
        load(path, overrides)
    head, *found = str(caught.value).split("\n")
    assert head == f"{len(found)} problem{'s' if len(found) > 1 else ''} in {path}"
    assert not re.search(r"Value error|Input should|pydantic|Traceback|type=", str(caught.value))
    return [row.strip() for row in found]


@pytest.mark.parametrize("text", ["", "# nothing\n", "~", "---\n", "\ufeff", "train:\nmodel:\n  head:\n"])
def test_an_empty_file_or_section_means_every_default(write: Write, text: str) -> None:
    assert load(write(text)) == Config()


def test_all_problems_come_at_once_in_the_house_form(write: Write) -> None:
    path = write("data:\n\n  name: cifar\nobjective:\n  transport:\n\n    tua: 3\n\npipline: {stages: 3}\n")
    with pytest.raises(ConfigError, match="3 problems") as caught:
        load(path)
    assert str(caught.value) == (
        f"3 problems in {path}\n"
        "  line 3   data.name: 'cifar' is not allowed. Did you mean 'cifar10'? Allowed: cifar10, cifar100, "
        "fashion_mnist, fashion_mnist_mini, image_folder, mnist_idx, stl10, synthetic, text.\n"
        "  line 7   objective.transport.tua: unknown key. Did you mean 'tau'? "
        "Allowed: half_rule, impl, kind, multipliers, norm, tau.\n"
        "  line 9   pipline: unknown key. Did you mean 'pipeline'? Allowed: channel, checkpoint, data, defaults, "
        "evaluate, launcher, metrics, model, objective, optim, pipeline, plan, run, seed, trace, train."
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value", "row"),
    [
        ("train.epochs", "many", "'many' is a str; expected an integer greater than 0"),
        ("train.epochs", "'3'", "'3' is a str; expected an integer greater than 0"),
        ("train.epochs", "3.0", "3.0 is a float; expected an integer greater than 0"),
        ("train.epochs", "true", "true is a bool; expected an integer greater than 0"),
        ("train.epochs", "", "is empty; expected an integer greater than 0"),
        ("train.epochs", "{a: 1}", "is a mapping; expected an integer greater than 0"),
        ("train.max_steps", "[1]", "[1] is a list; expected an integer greater than 0, or null"),
        ("train.epochs", "0", "0 is out of range; expected an integer greater than 0"),
        ("launcher.port", "-1", "-1 is out of range; expected an integer of at least 0 and at most 65535"),
        ("optim.momentum", "1", "1 is out of range; expected a number of at least 0 and below 1"),
        ("optim.lr", ".inf", ".inf is not finite; expected a number greater than 0"),
        ("optim.lr", ".nan", ".nan is not a number; expected a number greater than 0"),
        ("data.flip", "yes", "'yes' is a str; expected true or false"),
        ("run.name", "2024", "2024 is an int; expected a string"),
        ("run.name", "a/b", "'a/b' cannot start a folder's name; expected printable text without / and \\"),
        ("data.root", "''", "'' is not allowed; expected a string that is not empty, or null"),
        ("optim.betas", "[0.9]", "[0.9] is not allowed; expected a list of 2 numbers of at least 0 and below 1"),
        ("optim.name", "3", "3 is an int; expected one of sgd, adam, adamw"),
        ("optim.name", "adm", "'adm' is not allowed. Did you mean 'adam'? Allowed: adam, adamw, sgd."),
        (
            "pipeline",
            "4",
            "4 is an int; expected a section with some of: stages, replicas, batch_norm, device, emulated",
        ),
    ],
)
def test_a_wrong_value_says_what_was_got_and_what_is_expected(write: Write, key: str, value: str, row: str) -> None:
    assert rows(write(""), [f"{key}={value}"]) == [f"override   {key}: {row}"]


@pytest.mark.parametrize("value", ["big", "[1, x]", "[1, -1]", "{a: 1}", "true", "", "inf", ".nan", "0", "[[1]]"])
def test_a_wrong_tau_is_one_row_that_names_both_forms(write: Write, value: str) -> None:
    (row,) = rows(write(f"objective:\n  transport:\n    tau: {value}\n"))
    assert row.startswith("line 3   objective.transport.tau: ")
    assert row.endswith("; expected a number greater than 0 (or .inf), or a list of numbers greater than 0 (or .inf)")


@pytest.mark.parametrize("value", ["[1, x]", "[0, 1]", "3", "", "{}", "[[1], 1]"])
def test_wrong_cuts_are_one_row_that_names_all_forms(write: Write, value: str) -> None:
    (row,) = rows(write(f"model: {{cuts: {value} }}"))
    assert row.endswith(
        "; expected one of even, parameters, auto, or a list of integers greater than 0, or a list of strings"
    )
    (row,) = rows(write("model: {cuts: evn}"))
    assert "'evn' is not allowed. Did you mean 'even'? Allowed: auto, even, parameters, or a list of integers" in row


def test_a_key_at_the_wrong_level_is_told_where_it_belongs(write: Write) -> None:
    found = rows(write("lr: 0.1\nbatch: 3\ntrain.epochs: 3\ndefault: base.yaml\n"))
    assert found[0].startswith("line 1   lr: unknown key. Did you mean 'optim.lr'? Allowed: channel, ")
    assert found[1].startswith("line 2   batch: unknown key. Did you mean 'train.batch' or 'evaluate.batch'?")
    assert found[2].endswith("Dotted keys are for overrides; in a file write 'train:' and the rest indented below.")
    assert found[3].startswith("line 4   default: unknown key. Did you mean 'defaults'?")


def test_rules_over_several_values_point_at_the_field_they_name(write: Write) -> None:
    text = "data:\n  shape: [3, 4, 5]\n  image_size: 3\nchannel:\n  heartbeat_s: 100\ntrain:\n  accumulate: 100\n"
    assert rows(write(text)) == [
        "line 2   data.shape: only used with data.name: synthetic",
        "line 3   data.image_size: only used with data.name: image_folder",
        "line 4   channel.heartbeat_timeout_s: 30 must be at least twice heartbeat_s (100)",
        "line 7   train.accumulate: 100 micro-batches cannot share 64 rows",
    ]


def test_rules_over_several_sections_point_at_the_field_they_name(write: Write) -> None:
    path = write("objective:\n  transport:\n    tau: [1, 2, 3]\n")
    assert rows(path, ["model.cuts=[layer2.0]"]) == [
        "line 3     objective.transport.tau: 3 given; pipeline.stages = 4 needs one a stage",
        "override   model.cuts: 1 given; pipeline.stages = 4 needs 3 first blocks, one of each later stage",
    ]


def test_problems_of_a_list_of_sections_name_the_item_and_its_line(write: Write) -> None:
    text = (
        "launcher:\n  faults:\n"
        "  - {stage: 0, step: 3, action: kil}\n"
        "  - {stage: 0, stp: 3, action: slow, seconds: 0}\n"
        "  - stage: 0\n    step: -1\n    action: nan\n"
        "  - 3\n"
    )
    assert rows(write(text)) == [
        "line 3   launcher.faults.0.action: 'kil' is not allowed. Did you mean 'kill'? "
        "Allowed: hang, kill, nan, raise, slow.",
        "line 4   launcher.faults.1.step: is missing; expected an integer of at least 0",
        "line 4   launcher.faults.1.seconds: 0 is out of range; expected a number greater than 0",
        "line 4   launcher.faults.1.stp: unknown key. Did you mean 'step'? Allowed: action, num_steps, seconds, stage, "
        "step.",
        "line 6   launcher.faults.2.step: -1 is out of range; expected an integer of at least 0",
        "line 8   launcher.faults.3: 3 is an int; expected a section with some of: stage, step, action, seconds, "
        "num_steps",
    ]
    assert rows(write(""), ["launcher.faults={stage: 0}"]) == [
        "override   launcher.faults: is a mapping; expected a list of sections with stage, step, action, seconds, "
        "num_steps"
    ]


def test_rules_over_a_list_of_sections_point_at_the_item(write: Write) -> None:
    text = (
        "launcher:\n  faults:\n"
        "  - {stage: 3, step: 0, action: kill, seconds: 1.0, num_steps: 1}\n"
        "  - {stage: 0, step: 0, action: nan, num_steps: 2}\n"
    )
    assert rows(write(text)) == [
        "line 3   launcher.faults.0.seconds: only used with action: slow",
        "line 3   launcher.faults.0.num_steps: only used with action: nan or slow",
    ]
    text = text.replace(", seconds: 1.0, num_steps: 1", "")
    assert rows(write(text), ["pipeline.stages=3"]) == [
        "line 3   launcher.faults.0.stage: there is no stage 3; pipeline.stages = 3 has stages 0 to 2"
    ]
    assert len(load(write(text)).launcher.faults) == 2


def test_no_replicas_at_all_are_no_list_of_replicas(write: Write) -> None:
    (row,) = rows(write("pipeline: {stages: 2, replicas: []}\n"))
    assert row.startswith("line 1   pipeline.replicas: [] is not allowed")


@pytest.mark.parametrize(
    ("pipeline", "found"),
    [
        ("emulated: {jitter: 0.1}", ["line 2   pipeline.emulated.jitter: only used with device: emulated"]),
        (
            "device: emulated",
            [
                "line 2   pipeline.emulated.forward_s: needed with device: emulated; or give a plan, which sets it",
                "line 2   pipeline.emulated.backward_s: needed with device: emulated; or give a plan, which sets it",
            ],
        ),
        (
            "stages: 3, device: emulated, emulated: {forward_s: [1, 2], backward_s: 1}",
            ["line 2   pipeline.emulated.forward_s: 2 given; stages = 3 needs one a stage"],
        ),
    ],
)
def test_emulated_stages_need_their_times_and_nobody_else_has_any(
    write: Write, pipeline: str, found: list[str]
) -> None:
    assert rows(write(f"seed: 1\npipeline: {{{pipeline}}}\n")) == found


def test_emulated_stages_save_nothing_and_skip_nothing(write: Write) -> None:
    text = """
        pipeline: {device: emulated, emulated: {forward_s: 1, backward_s: 2}}
        train: {on_nonfinite: skip}
        checkpoint: {every: 5, resume: auto}
        launcher: {faults: [{stage: 0, step: 1, action: slow}, {stage: 0, step: 1, action: nan}]}
    """
    assert rows(write(text)) == [
        "line 3   train.on_nonfinite: emulated stages compute nothing that could be skipped",
        "line 4   checkpoint.every: emulated stages learn nothing that could be saved",
        "line 4   checkpoint.resume: emulated stages save nothing to go on from",
        "line 5   launcher.faults.1.action: emulated stages do not read their input, so nan changes nothing",
    ]


def test_text_and_gpt_belong_together_and_what_has_no_meaning_for_them_is_refused(write: Write) -> None:
    assert load(write("data: {name: text}\nmodel: {name: gpt}")).model.head.name == "next_token"
    assert rows(write("model: {name: gpt}")) == [
        "line 1   model.name: 'gpt' with data.name: fashion_mnist_mini, which are images; gpt reads text"
    ]
    text = """
        data: {name: text, flip: true, crop_padding: 2}
        model: {name: gpt, head: {name: tokens}}
    """
    assert rows(write(text)) == [
        "line 2   data.crop_padding: text is not augmented",
        "line 2   data.flip: text is not augmented",
        "line 3   model.head.name: a gpt cannot have 'tokens'; next_token is for gpt alone, its only head",
    ]
    text = """
        data: {name: text}
        model: {name: vit, head: tokens}
        objective: infopro
        train: {channels_last: true}
        launcher: {faults: [{stage: 1, step: 1, action: nan}, {stage: 0, step: 1, action: nan}]}
    """
    assert rows(write(text.replace("tokens", "{name: tokens}").replace("infopro", "{name: infopro}"))) == [
        "line 3   model.name: 'vit' with data.name: text, which only gpt reads",
        "line 4   objective.name: 'infopro' is defined for images, not for text",
        "line 6   launcher.faults.1.action: stage 0 reads bytes, of which none is nan; poison a later stage",
    ]
    assert rows(write("data: {context: 5}\nmodel: {head: {name: next_token}}")) == [
        "line 1   data.context: only used with data.name: text",
        "line 2   model.head.name: a resnet cannot have 'next_token'; next_token is for gpt alone, its only head",
    ]


def test_rules_are_not_judged_while_values_are_missing(write: Write) -> None:
    write("train: {batch: 128", "base.yaml")
    (row,) = rows(write("defaults: base.yaml\ntrain: {accumulate: 100}\n"))
    assert row == "base.yaml:1   not valid YAML: expected ',' or '}', but got the end of the file"


def test_a_key_written_twice_names_both_lines(write: Write) -> None:
    assert rows(write("train:\n  epochs: 3\n  epochs: 4\nseed: 1\ntrain:\n")) == [
        "line 3   train.epochs: written twice, the first time on line 2",
        "line 5   train: written twice, the first time on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("seed: 1\ntrain:\n  epochs: 3: 4", "line 3   not valid YAML: a second ':' on the line"),
        ("train:\n\tepochs: 3", "line 2   not valid YAML: a tab; indent with spaces"),
        ("train:\n  epochs: 3\n batch: 4\n", "line 3   not valid YAML: the indentation fits no line above"),
        ("seed: 1\nmodel: [1, 2\n\n\n", "line 2   not valid YAML: expected ',' or ']', but got the end of the file"),
        ("seed: 1\nrun: 'b\nc: d\n", "line 2   not valid YAML: a quote that is not closed"),
        ("train:\n  epochs: 3\n  batch\n", "line 3   not valid YAML: a key without ':'"),
        ("train: {epochs: 3}}", "line 1   not valid YAML: a surplus '}'"),
        ("seed: *x", "line 1   not valid YAML: found undefined alias 'x'"),
        ("seed: @x", "line 1   not valid YAML: found character '@' that cannot start a value; quote it"),
        ("seed: 1\n---\nseed: 2", "line 2   not valid YAML: a second document (---); one file is one config"),
        ('run: {name: "\\U99999999"}', "line 1   not valid YAML: an escape or version number out of range"),
        (b"seed: 1\nx: \x00\x01", "line 2   not valid YAML: unprintable character 0x00; is this a text file?"),
        (b"\x89PNG\r\n\x1a\n", "line 1   not valid YAML: byte 0x89 is not UTF-8 text"),
        ("seed: 1".encode("utf-16"), "line 1   not valid YAML: byte 0xff is not UTF-8 text"),
        ("- 1\n- 2", "line 1   the file is a list; expected sections such as"),
        ("hello", "line 1   the file is a single value; expected sections such as"),
        ("1: x", "line 1   the key '1' is of type int; a key must be a name"),
        ("~: x", "line 1   the key '~' is of type null; a key must be a name"),
        ("train:\n  ? [a]\n  : 3", "line 2   train: a key must be a name, not a list"),
        ("data: {{name}: x}", "line 1   data: a key must be a name, not a mapping"),
        ("seed: !!python/object/apply:os.system [ls]", "line 1   seed: cannot read '!!python/object/apply:os.system'"),
        ("run: {name: !!binary aGk=}", "line 1   run.name: cannot read '!!binary aGk='; use plain values"),
        ("seed: " + "9" * 5000, "line 1   seed: cannot read '!!int 9999"),
        ("train: {<<: 3}", "line 1   train.<<: expected an alias of a mapping, such as *anchor"),
        ("[" * 3000, "line 1   nested deeper than 20 levels"),
        ("a: " + "[" * 30 + "]" * 30, "line 1   nested deeper than 20 levels"),
        ("a: &x [*x, *x]", "line 1   nested deeper than 20 levels; does an alias contain itself?"),
        ("a: &x {<<: [*x, *x]}", "line 1   nested deeper than 20 levels; does an alias contain itself?"),
        ("seed: 1\n" * 50_000, "the file is larger than 256 KiB; is this a config?"),
    ],
)
def test_a_broken_file_is_one_row_on_its_line(write: Write, text: str | bytes, row: str) -> None:
    (found,) = rows(write(text))
    assert found.startswith(row)


def test_aliases_of_aliases_end_at_a_limit(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    (row,) = rows(write("\n".join(lines)))
    assert row.endswith("more than 10000 values; aliases of aliases?")


def test_paths_that_are_no_file_are_named(tmp_path: Path, write: Write) -> None:
    write("", "mini.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert rows(tmp_path / "mni.yaml") == [f"the file does not exist. Did you mean '{tmp_path / 'mini.yaml'}'?"]
    assert rows(tmp_path / "no" / "x.yaml") == [f"the file does not exist; there is no folder '{tmp_path / 'no'}'"]
    assert rows(tmp_path) == ["the file cannot be read: is a directory"]
    assert rows(tmp_path / "a\0b") == ["the file cannot be read: embedded null byte"]
    assert rows(tmp_path / "loop.yaml") == ["the file cannot be read: too many levels of symbolic links"]


def test_numbers_and_words_are_read_as_in_yaml_1_2(write: Write) -> None:
    text = "optim: {lr: 3e-4, weight_decay: 1e-3}\nrun: {name: on, folder: 2024-01-01}\ntrain: {epochs: 010}\n"
    config = load(write(text + "objective: {transport: {tau: .inf, multipliers: {on: task_loss}}}\n"))
    assert (config.optim.lr, config.optim.weight_decay, config.objective.transport.tau) == (3e-4, 1e-3, math.inf)
    assert (config.run.name, config.run.folder, config.train.epochs) == ("on", "2024-01-01", 10)


def test_anchors_and_merge_keys_work_and_explicit_keys_win(write: Write) -> None:
    config = load(write("evaluate: &rows {batch: 5}\ntrain:\n  batch: 7\n  <<: [*rows, {epochs: 2, batch: 9}]\n"))
    assert (config.evaluate.batch, config.train.batch, config.train.epochs) == (5, 7, 2)


def test_mappings_merge_with_defaults_and_anything_else_replaces(write: Write) -> None:
    write("model: {depth: 20, cuts: [1, 1, 1, 3]}\ntrain: {epochs: 2, batch: 8}\n", "far/base.yaml")
    write("defaults: far/base.yaml\ntrain: {epochs: 3}\nseed: 3\n", "middle.yaml")
    path = write("defaults: [middle.yaml]\nmodel: {cuts: [2, 2, 1, 1]}\nseed: 4\ntrain:\n")
    config = load(path, ["train.threads=2", "seed=5", "seed=6"])
    assert (config.model.depth, config.model.cuts) == (20, [2, 2, 1, 1])
    assert (config.train.epochs, config.train.batch, config.train.threads, config.seed) == (3, 8, 2, 6)


def test_of_several_defaults_the_later_wins(write: Write) -> None:
    write("seed: 1\ntrain: {epochs: 1}\n", "one.yaml")
    write("seed: 2\n", "two.yaml")
    config = load(write("defaults: [one.yaml, two.yaml]\n"))
    assert (config.seed, config.train.epochs) == (2, 1)


def test_problems_of_inherited_files_name_file_and_line(write: Write) -> None:
    write("\n\ntrain:\n  epochs: x\n  bach: 3\n", "far/base.yaml")
    found = rows(write("defaults: far/base.yaml\nseed: x\n"), ["train.batch=y"])
    assert [re.split(r"  +", row)[0] for row in found] == [
        "line 2",
        "far/base.yaml:4",
        "far/base.yaml:5",
        "override",
    ]


@pytest.mark.parametrize(
    ("defaults", "row"),
    [
        ("bse.yaml", "line 2   defaults: 'bse.yaml' does not exist. Did you mean 'base.yaml'?"),
        ("no/base.yaml", "line 2   defaults: 'no/base.yaml' does not exist; there is no folder 'no'"),
        ("c.yaml", "line 2   defaults: the files include each other: c.yaml -> c.yaml"),
        ("around.yaml", "around.yaml:1   defaults: the files include each other: c.yaml -> around.yaml -> c.yaml"),
        (".", "line 2   defaults: '.' cannot be read: is a directory"),
        ("3", "line 2   defaults: expected a file name or a list of file names"),
        ("[base.yaml, ~]", "line 2   defaults: expected a file name or a list of file names"),
        ('"a\\0"', "line 2   defaults: 'a\\x00' is no file name"),
    ],
)
def test_defaults_that_cannot_be_read_name_the_line(write: Write, defaults: str, row: str) -> None:
    write("seed: 2", "base.yaml")
    write("defaults: c.yaml", "around.yaml")
    assert rows(write(f"seed: 1\ndefaults: {defaults}\n")) == [row]


def test_files_that_include_each_other_crosswise_are_read_once(write: Write) -> None:
    for i in range(18):  # read naively this is 2 ** 18 files
        write(f"defaults: [f{i + 1}.yaml, f{i + 1}.yaml]", f"f{i}.yaml")
    write("seed: 7", "f18.yaml")
    assert load(write("defaults: f0.yaml")).seed == 7
    write("defaults: c.yaml", "f18.yaml")
    assert len(rows(write("defaults: f0.yaml"))) == 1


def test_a_long_chain_of_defaults_ends_at_a_limit(write: Write) -> None:
    for i in range(30):
        write(f"defaults: f{i + 1}.yaml", f"f{i}.yaml")
    assert rows(write("defaults: f0.yaml")) == ["f18.yaml:1   defaults: more than 20 files deep"]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.epochs", "expected key=value, such as train.epochs=3"),
        ("", "expected key=value"),
        ("=3", "expected key=value"),
        ("train..epochs=3", "expected key=value"),
        ("--train.epochs=3", "expected key=value"),
        (".".join("a" * 29) + "=3", "expected key=value"),
        ("model.cuts=[2,2", "not valid YAML: expected ',' or ']'"),
        ("seed=!x 3", "cannot read '!x 3'; use plain values"),
        ("train={1: 2}", "the key '1' is of type int"),
        ("defaults=x.yaml", "only a file can name its defaults"),
    ],
)
def test_a_malformed_override_is_quoted(write: Write, override: str, fault: str) -> None:
    (row,) = rows(write(""), [override])
    assert row.startswith(f"override '{override}': {fault}")


def test_overrides_are_yaml_and_reach_every_level(write: Write) -> None:
    overrides = ["train.epochs=3", "objective.transport.tau=.inf", "model.cuts=[2,2]", "pipeline={stages: 2}"]
    config = load(write("seed: 4"), overrides)
    assert (config.train.epochs, config.objective.transport.tau, config.model.cuts) == (3, math.inf, [2, 2])
    assert (config.pipeline.stages, config.seed) == (2, 4)


def test_tau_beside_multipliers_is_no_silent_override(write: Write) -> None:
    write("seed: 1\nobjective:\n  transport: {tau: 3}\n", "base.yaml")
    path = write("defaults: base.yaml\nobjective: {transport: {multipliers: {enabled: true}}}\n")
    text = "base.yaml:3   objective.transport.tau: has no effect while multipliers.enabled is true; remove one of them"
    assert rows(path) == [text]


def test_root_is_read_from_where_it_is_written(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    write("data: {root: ../images}\n", "far/base.yaml")
    path = write("defaults: far/base.yaml\ndata: {crop_padding: 4}\n")
    assert load(path).data.root == str(tmp_path / "images")
    assert load(path, ["data.root=images"]).data.root == "/images"
    assert load(path, ["data.root=/mnt"]).data.root == "/mnt"


CONFIGS = [
    "",
    "objective: {transport: {tau: .inf}}",
    "objective: {transport: {tau: [1, .inf, 1.0e-5, 2]}}",
    "objective: {transport: {multipliers: {enabled: true, on: unsmoothed_task_loss}}}",
    "data: {name: synthetic, shape: [1, 4, 4], num_classes: 3, samples: 16}",
    "data: {name: image_folder, root: images, image_size: 8}",
    "data: {name: text, context: 16}\nmodel: {name: gpt, depth: 4}",
    "model: {cuts: [a, '1e-3', 'on']}",
    "model: {cuts: [1, 1, 1, 1]}\ntrain: {epochs: 2, max_steps: 3}\noptim: {betas: [0, 0.5]}",
    "run: {name: '1e-3', folder: 'yes: é # 0x1F'}",
    "run: {name: '010', folder: \"a\\tb\\u2028c \\U0001F600\"}",
    "run: {name: '2024-01-01', folder: '~'}",
    "launcher: {faults: [{stage: 0, step: 3, action: kill}, {stage: 1, step: 3, action: slow, seconds: 0.5}]}",
]


@pytest.mark.parametrize("text", CONFIGS)
def test_a_dump_loads_to_an_equal_config(write: Write, tmp_path: Path, text: str) -> None:
    config = load(write(text))
    again = load(write(dump(config), "far/away.yaml"))
    assert again == config
    assert dump(again) == dump(config)
    assert config_hash(again) == config_hash(config)
    assert yaml.safe_load(dump(config))["run"]["name"] == config.run.name


def test_a_dump_holds_every_value_but_a_plan_and_those_that_a_rule_forbids(write: Write) -> None:
    content = yaml.safe_load(dump(load(write("objective: {transport: {multipliers: {enabled: true}}}"))))
    assert set(content) == set(Config.model_fields) - {"plan"}
    assert set(Config().data.model_dump()) - set(content["data"]) == {"shape", "num_classes", "samples", "context"}
    assert set(Config().objective.transport.model_dump()) - set(content["objective"]["transport"]) == {"tau"}


def test_the_hash_ignores_what_does_not_change_the_algorithm(write: Write) -> None:
    path = write("")
    same = ["launcher.name=serial", "run.name=x", "metrics.every=3", "trace.num_steps=0", "channel.capacity=1"]
    assert config_hash(load(path, same)) == config_hash(Config())
    for change in ["seed=1", "channel.codec=bf16", "objective.transport.tau=.inf", "pipeline.stages=2"]:
        assert config_hash(load(path, [change])) != config_hash(Config())
    assert re.fullmatch("[0-9a-f]{64}", config_hash(Config()))
    assert config_hash(load(path, ["objective.transport.tau=1", "optim.lr=0.0030"])) == config_hash(Config())


def test_an_override_may_name_a_section_by_its_name_alone(write: Write) -> None:
    config = load(write(""), ["launcher=ray", "model=vit", "model.head=tokens"])
    assert (config.launcher.name, config.model.name, config.model.head.name) == ("ray", "vit", "tokens")
    (row,) = rows(write(""), ["launcher=rey"])
    assert row.startswith("override   launcher.name: 'rey' is not allowed. Did you mean 'ray'?")
    (row,) = rows(write(""), ["train=fast"])  # a section without a name
    assert row.startswith("override   train: 'fast' is a str; expected a section with some of: order, schedule, epochs")


def test_what_ray_gives_each_worker_may_be_one_value_or_one_a_stage(write: Write) -> None:
    ray = "{cpus: [0.5, 2], resources: {disk: 1}, labels: [{}, {a: b}]}"
    wants = load(write(f"pipeline: {{stages: 2}}\nlauncher: {{name: ray, ray: {ray}}}")).launcher.ray
    assert (wants.cpus, wants.resources, wants.labels) == ([0.5, 2.0], {"disk": 1.0}, [{}, {"a": "b"}])
    (row,) = rows(write("pipeline: {stages: 3}\nlauncher: {ray: {gpus: [1, 1]}}"))
    assert row == "line 2   launcher.ray.gpus: 2 given; pipeline.stages = 3 needs one a stage"
    (row,) = rows(write("launcher: {ray: {resources: 3}}"))
    assert row.startswith("line 1   launcher.ray.resources: 3 is an int; expected a section of names and numbers")
