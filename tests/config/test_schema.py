"""The schema: strict values, rules over several values, and what editors are told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipetrgl.config.explain import describe, section_in, section_of, show
from pipetrgl.config.load import dump, json_schema
from pipetrgl.config.schema import Config, DataConfig, RunConfig, Section, TrainConfig, TransportConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "studies"]


def sections(section: type[Section] = Config) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        inner = section_of(field) or section_in(field.annotation)
        if inner:
            yield from sections(inner)


def validate(content: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(content, json.loads(json_schema()), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_section_and_every_value_says_what_it_is(section: type[Section]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        holds_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        assert field.description or holds_section, f"{section.__name__}.{name}"


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_value_can_be_described_in_words(section: type[Section]) -> None:
    for field in section.model_fields.values():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            assert describe(field.annotation)


@pytest.mark.parametrize("epochs", ["3", 3.0, True, None, [3]])
def test_values_are_not_converted(epochs: object) -> None:
    with pytest.raises(ValidationError, match="epochs"):
        TrainConfig.model_validate({"epochs": epochs})


def test_an_integer_may_stand_for_a_number() -> None:
    assert TransportConfig.model_validate({"tau": [1, math.inf]}).tau == [1.0, math.inf]
    assert type(TransportConfig.model_validate({"tau": 1}).tau) is float


def test_only_tau_may_be_infinite() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Config.model_validate({"optim": {"lr": math.inf}})
    with pytest.raises(ValidationError, match="finite"):
        Config.model_validate({"channel": {"wait_timeout_s": math.inf}})


def test_values_never_change_once_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("value", [{}, {"stage": 0, "step": 1}, {"stage": "0", "step": 1, "action": "kill"}])
def test_a_fault_says_where_when_and_what(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="launcher.faults.0"):
        Config.model_validate({"launcher": {"faults": [value]}})


def test_a_rule_reports_every_fault_of_its_section() -> None:
    with pytest.raises(ValidationError, match=r"num_classes: only used[^\n]+\n[^\n]*samples: only used"):
        DataConfig.model_validate({"num_classes": 3, "samples": 4})


@pytest.mark.parametrize(
    ("train", "faults"),
    [
        ({"epochs_growth": 0}, ["epochs_growth"]),
        ({"laps": 1, "epochs_growth": 2, "order": "parallel"}, ["epochs_growth", "laps"]),
        ({"laps": 3, "epochs_growth": 2, "order": "sequential"}, ["laps"]),
        ({"schedule": "gpipe", "epochs_growth": 2, "order": "sequential"}, ["schedule"]),
        ({"epochs_growth": 2, "order": "end_to_end"}, ["epochs_growth"]),
        ({"schedule": "gpipe", "order": "end_to_end"}, []),
        ({"laps": 3, "epochs_growth": 2, "order": "multi_lap"}, []),
        ({"replay": {"size": 8, "max_reuse": 2}}, ["replay.max_reuse", "replay.size"]),
        ({"replay": {"size": 8}, "order": "multi_lap"}, ["replay.size"]),
        ({"replay": {"size": 8}, "laps": 2, "epochs_growth": 0, "order": "replay"}, ["epochs_growth", "laps"]),
        ({"replay": {"size": 8, "max_reuse": 2}, "order": "replay"}, []),
    ],
)
def test_options_of_an_order_are_refused_in_another(train: dict[str, Any], faults: list[str]) -> None:
    if not faults:
        TrainConfig.model_validate(train)
        return
    message = r"[^\n]*\n".join(f"{fault}: only used with train.order" for fault in faults)
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(train)


CACHED = {
    "train": {"order": "sequential", "epochs": 2, "cache": "memory"}, "pipeline": {"stages": 2},
    "data": {"name": "synthetic"},
}  # fmt: skip
EMULATED = {"device": "emulated", "emulated": {"forward_s": 0.0, "backward_s": 0.0}}


@pytest.mark.parametrize(
    ("sections", "faults"),
    [
        ({"train": {"order": "parallel"}}, [r"train\n.*cache: only used with train.order: sequential or multi_lap"]),
        ({"train": {"epochs": 1}}, ["cache: every stage learns for one epoch at a time"]),
        (
            {"data": {"crop_padding": 4, "flip": True}},
            ["data.crop_padding: not with train.cache: memory", "data.flip: not with train.cache: memory"],
        ),
        ({"pipeline": {"stages": 1}}, ["train.cache: memory needs a frozen stage before the learning one"]),
        ({"pipeline": {"replicas": [1, 2]}}, ["pipeline.replicas: not with train.cache: memory"]),
        ({"objective": {"name": "infopro"}}, ["train.cache: memory keeps no images; use objective.infopro.target"]),
        ({"pipeline": EMULATED}, ["train.cache: memory has nothing to keep; emulated stages"]),
        (
            {"launcher": {"faults": [{"stage": 1, "step": 3, "action": "nan"}]}},
            ["launcher.faults.0.action: nan not with train.cache: memory"],
        ),
    ],
)
def test_a_cache_is_refused_where_nothing_can_be_recalled(sections: dict[str, Any], faults: list[str]) -> None:
    content = {name: {**CACHED.get(name, {}), **sections.get(name, {})} for name in {**CACHED, **sections}}
    with pytest.raises(ValidationError, match=r"[^\n]*\n".join(faults)):
        Config.model_validate(content)


@pytest.mark.parametrize("train", [{}, {"epochs": 1, "epochs_growth": 1}, {"order": "multi_lap", "cache": "disk"}])
def test_a_cache_is_taken_where_a_frozen_stage_hands_on_the_same_twice(train: dict[str, Any]) -> None:
    config = Config.model_validate({**CACHED, "train": {**CACHED["train"], **train}})
    assert Config.model_validate(yaml.safe_load(dump(config))) == config


def test_replay_is_refused_where_no_micro_batch_could_be_reused_alone() -> None:
    TrainConfig.model_validate({"accumulate": 2})
    with pytest.raises(ValidationError, match="accumulate: train.order: replay makes an optimizer step of each"):
        TrainConfig.model_validate({"order": "replay", "accumulate": 2})
    content = {"train": {"order": "replay"}, "pipeline": {"replicas": [1, 2, 1, 1]}, "channel": {"capacity": 1}}
    with pytest.raises(ValidationError, match=r"replicas: not with[^\n]+\n[^\n]*capacity: train.order: replay needs 2"):
        Config.model_validate(content)


def test_a_dump_of_every_order_loads_again() -> None:
    for order in ("parallel", "sequential", "multi_lap", "replay", "end_to_end"):
        train = {"order": order, "drop_last": True} | ({"accumulate": 4} if order == "end_to_end" else {})
        config = Config.model_validate({"train": train, "objective": {"name": "vangl"}})
        assert Config.model_validate(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\nb", "/tmp/x"])
def test_a_run_name_cannot_leave_the_run_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot start a folder's name"):
        RunConfig(name=name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.inf, ".inf"),
        (True, "true"),
        (None, "null"),
        ([1, "a"], "[1, 'a']"),
        ({"a": 1}, "{...}"),
        ("x" * 99, "'" + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_as_yaml_and_not_too_long(value: Any, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_json_schema_accepts_every_config_of_ours(path: Path) -> None:
    validate(yaml.safe_load(path.read_text()))


def test_the_json_schema_accepts_defaults_and_dumps() -> None:
    validate({"defaults": "base.yaml", "seed": 3})
    validate({"defaults": ["base.yaml", "../other.yaml"]})
    validate(yaml.safe_load(dump(Config())))


@pytest.mark.parametrize(
    "content", [{"defaults": 3}, {"sed": 3}, {"train": {"epochs": 0}}, {"data": {"name": "cifar"}}]
)
def test_the_json_schema_rejects_what_the_loader_rejects(content: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError, match="."):
        validate(content)
    with pytest.raises(ValidationError, match="."):
        Config.model_validate(content)


def test_the_json_schema_is_plain_json_with_descriptions() -> None:
    schema = json.loads(json_schema(), parse_constant=pytest.fail)
    assert "relative to this one" in schema["properties"]["defaults"]["description"]
    assert schema["$defs"]["TransportConfig"]["properties"]["tau"]["description"].startswith("Step size")
    assert schema["additionalProperties"] is False
