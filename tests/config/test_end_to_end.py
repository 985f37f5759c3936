"""What the end-to-end order refuses, all at once and before any worker starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipetrgl.config.load import config_hash
from pipetrgl.config.schema import Config


def whole(train: dict[str, Any] | None = None, stages: int = 4, **sections: Any) -> Config:
    """A config that is right but for what it is given."""
    order = {"order": "end_to_end", "accumulate": 4, "drop_last": True}
    content: dict[str, Any] = {"objective": {"name": "vangl"}, **sections}
    content["pipeline"] = {"stages": stages, **sections.get("pipeline", {})}
    return Config.model_validate({**content, "train": {**order, **(train or {})}})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"objective": {"name": "trgl"}}, "objective.name: 'trgl' is a loss of every stage"),
    ({"plan": "plan.json"}, "plan: plan.json is for stages that do not wait"),
    ({"model": {"cuts": "auto"}}, "model.cuts: auto measures stages"),
    ({"train": {"precision": "fp16"}}, "train.precision: fp16 needs one loss scale"),
    ({"train": {"on_nonfinite": "skip"}}, "train.on_nonfinite: skip leaves out the update of one stage"),
    ({"pipeline": {"replicas": 2}}, "pipeline.replicas: 2; a stage of end_to_end has one"),
    (
        {"pipeline": {"device": "emulated", "emulated": {"forward_s": 1.0, "backward_s": 1.0}}},
        "pipeline.device: emulated has no gradients",
    ),
    ({"channel": {"codec": "int8"}}, "channel.codec: int8 rounds activations"),
    ({"channel": {"delay_s": 1.0}}, "channel.delay_s: torch's schedules have links of their own"),
    ({"launcher": {"faults": [{"stage": 0, "step": 1, "action": "kill"}]}}, "launcher.faults: no failure is rehearsed"),
    ({"launcher": {"name": "threads"}}, "launcher.name: 'threads' cannot run end_to_end over workers"),
    ({"launcher": {"name": "ray"}}, "launcher.name: 'ray' cannot run end_to_end over workers"),
    ({"pipeline": {"device": "cuda"}}, "pipeline.device: end_to_end over workers runs on the CPU"),
    ({"train": {"batch": 65}}, "train.batch: 65 rows do not make 4 equal micro-batches"),
    ({"train": {"drop_last": False}}, "train.drop_last: torch's schedules take whole batches"),
    ({"train": {"accumulate": 2}}, "train.accumulate: 2 given; 1f1b over 4 stages needs at least 4"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_cannot_be_trained_end_to_end_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        whole(**sections)


def test_all_of_it_is_said_at_once() -> None:
    with pytest.raises(ValidationError, match=r"codec: fp16[^\n]+\n[^\n]*batch: 63[^\n]+\ntrain.drop_last"):
        whole({"batch": 63, "drop_last": False}, channel={"codec": "fp16"})


def test_gpipe_takes_fewer_micro_batches_and_one_process_any_steps() -> None:
    assert whole({"accumulate": 1, "schedule": "gpipe"}).train.accumulate == 1
    for launcher, stages in (("serial", 4), ("threads", 1), ("ray", 1)):
        one_process = whole({"accumulate": 3, "drop_last": False}, stages, launcher={"name": launcher})
        assert one_process.train.batch % 3 == 1


def test_the_schedule_belongs_to_what_the_workers_compare() -> None:
    assert config_hash(whole({"schedule": "gpipe"})) != config_hash(whole())
