"""Counted memory, on networks that can be counted by hand and on the paper's ResNet-110."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import Config, ObjectiveConfig
from pipetrgl.launchers.start import describe
from pipetrgl.studies.footprint import Footprint, count_at, count_saved, footprint
from pipetrgl.studies.footprint_table import table, to_dict
from pipetrgl.studies.saved import SavedBytes
from pipetrgl.worker import build_stage
from tests.equivalence.runs import TEXT

CPU = torch.device("cpu")
NO_EVALUATION = {"valid_every": 0.0, "test_at_end": False}


def mlp(**sections: Any) -> Config:
    """Two layers of 3 units on 4 features, two classes, one layer a stage."""
    content: dict[str, Any] = {
        "data": {"name": "synthetic", "shape": [1, 2, 2], "samples": 64, "num_classes": 2, "prefetch": 5},
        "model": {
            "name": "mlp", "depth": 2, "width": 3, "batch_norm": False, "head": {"name": "pool_linear"}
        },
        "pipeline": {"stages": 2},
        "train": {"batch": 8},
        "evaluate": NO_EVALUATION,
    }  # fmt: skip
    return Config.model_validate({**content, **sections})


def resnet(depth: int, cuts: list[int], size: int, **model: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"name": "synthetic", "shape": [3, size, size], "samples": 128},
            "model": {"depth": depth, "cuts": cuts, **model},
            "pipeline": {"stages": len(cuts)},
            "train": {"batch": 64},
            "evaluate": NO_EVALUATION,
        }
    )


def counted(config: Config, num_micro_batches: int | None = None) -> Footprint:
    return footprint(config, describe(config), num_micro_batches)


def test_a_storage_is_counted_once_and_whole_and_what_is_there_anyway_is_not() -> None:
    x, layer = torch.ones(2, 6), nn.Linear(6, 5)
    with SavedBytes([x, *layer.parameters()]) as saved:
        y = layer(x).exp()  # saves its output, 2 x 5
        assert saved.total == 40
        z = y[:, :2] * y[:, 2:4]  # saves two views of it
        assert saved.total == 40
        z.sigmoid()  # saves its output, 2 x 2
    assert saved.total == 56


def test_counting_lets_a_graph_be_freed_that_saves_its_own_output() -> None:
    x = torch.ones(2, requires_grad=True)
    with SavedBytes([x]):
        y = x.exp()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)


def test_an_mlp_keeps_what_one_counts_by_hand() -> None:
    #  8 rows. layer: linear and ReLU, whose output (8 x 3) is saved; the input is there anyway
    #  head: linear saves its input, which is the ReLU's output; log-softmax its output (8 x 2); the loss a total weight
    result = counted(mlp())
    stages = result.stages
    layer, head = 4 * 8 * 3, 4 * 8 * 2 + 4
    assert [stage.vangl for stage in stages] == [layer + head] * 2
    #  stage 0 turns 4 features into 3, so it has no residual; r = T(x) - x of stage 1 is kept for its square
    assert [stage.stored for stage in stages] == [layer + head, layer + head + 4 * 8 * 3]
    #  one loss, at the last head
    assert result.end_to_end.vangl == 2 * layer + head
    #  weights and biases of the layer and of the head; momentum remembers one number for each
    assert [stage.parameters for stage in stages] == [4 * (12 + 3 + 8), 4 * (9 + 3 + 8)]
    assert [stage.optimizer for stage in stages] == [stage.parameters for stage in stages]
    assert result.end_to_end.parameters == 4 * (12 + 3 + 9 + 3 + 8)


def test_gpipe_keeps_every_micro_batch_and_1f1b_one_for_each_stage_that_follows() -> None:
    #  8 rows in 4 micro-batches of 2. Stage 0: ReLU's output, 2 x 3. Stage 1: what it received, 2 x 3, its own ReLU's
    #  output and the head's 2 x 2 with the loss's 1. In flight under 1F1B: 2 on stage 0, 1 on stage 1
    first, last = counted(mlp(), num_micro_batches=4).stages
    assert (first.gpipe, first.one_f_one_b) == (4 * 24, 2 * 24)
    assert (last.gpipe, last.one_f_one_b) == (4 * (24 + 24 + 20), 24 + 24 + 20)


def test_adam_remembers_two_numbers_for_each_parameter_and_a_step_for_each_tensor() -> None:
    first, _ = counted(mlp(optim={"name": "adamw"})).stages
    assert first.optimizer == 2 * first.parameters + 4 * 4


@pytest.mark.parametrize(
    ("codec", "micro_batch", "decoded"), [("fp32", 8 * 3 * 4, 0), ("bf16", 8 * 3 * 2, 96), ("int8", 8 * (3 + 4), 96)]
)
def test_links_hold_their_slots_and_one_micro_batch_on_its_way(codec: str, micro_batch: int, decoded: int) -> None:
    #  stage 0: five prepared batches of 8 x 4, and one micro-batch on its way; stage 1: four slots
    first, last = counted(mlp(channel={"codec": codec})).stages
    assert first.links == 5 * 8 * 4 * 4 + micro_batch
    assert last.links == 4 * (micro_batch + decoded)


def test_links_hold_images_where_they_ride_along() -> None:
    #  three stages of 2 channels of 4 x 4 pixels, images 1 x 4 x 4, 8 rows: the image goes to stage 1, not to the last
    def links(target: str) -> list[int]:
        objective = {"name": "infopro", "infopro": {"target": target}}
        config = mlp(
            data={"name": "synthetic", "shape": [1, 4, 4], "samples": 64, "num_classes": 2},
            model={"name": "resnet_preact", "depth": 3, "width": 2, "head": {"name": "pool_linear"}},
            pipeline={"stages": 3},
            objective=objective,
        )
        return [stage.links for stage in counted(config).stages]

    image, slots = 8 * 16 * 4, 4
    more = [with_image - without for with_image, without in zip(links("image"), links("input"), strict=True)]
    assert more == [image, slots * image, 0]


def test_the_replay_order_also_holds_a_ring_of_activations_and_the_one_in_hand_behind_the_first_stage() -> None:
    plain, ring = counted(mlp()), counted(mlp(train={"batch": 8, "order": "replay", "replay": {"size": 5}}))
    more = [after.links - before.links for before, after in zip(plain.stages, ring.stages, strict=True)]
    assert more == [0, (5 + 1) * 8 * 3 * 4]


def test_a_slot_is_as_large_as_the_largest_micro_batch_of_an_evaluation() -> None:
    _, last = counted(mlp(evaluate={"batch": 250})).stages  # but there are only 6 validation and 8 test images
    assert last.links == 4 * 8 * 3 * 4
    _, last = counted(mlp(train={"batch": 2})).stages
    assert last.links == 4 * 2 * 3 * 4


def test_accumulating_gradients_keeps_one_micro_batch() -> None:
    whole, quarter = counted(mlp()), counted(mlp(train={"batch": 8, "accumulate": 4}))
    assert (whole.rows, quarter.rows) == (8, 2)
    assert quarter.stages[0].vangl - 4 == (whole.stages[0].vangl - 4) / 4


@pytest.mark.parametrize(
    "model",
    [
        {"name": "resnet", "depth": 14, "width": 4},
        {"name": "resnet", "depth": 18, "width": 4, "stem": "imagenet"},
        {"name": "vgg", "depth": 11, "width": 4},
        {"name": "vit", "depth": 2, "width": 8, "patch": 8, "dropout": 0.1, "head": {"name": "tokens"}},
        {"name": "gpt", "depth": 2, "width": 8, "dropout": 0.1},
    ],
)
def test_counts_of_few_rows_lie_on_the_line_of_the_whole_batch(model: dict[str, Any]) -> None:
    text = {"name": "text", "root": str(TEXT), "context": 5}
    config = Config.model_validate(
        {
            "data": text if model["name"] == "gpt" else {"name": "synthetic", "shape": [3, 32, 32], "samples": 64},
            "model": model,
            "pipeline": {"stages": 2},
        }
    )
    blueprint = draw_up(config, describe(config))
    for k in range(2):
        stage = build_stage(blueprint, k, CPU)
        assert count_saved(blueprint, k, 48) == count_at(stage, blueprint, 48)


def test_the_identity_keeps_what_plain_greedy_learning_keeps_and_stages_add_up_to_end_to_end() -> None:
    result = counted(resnet(14, [2, 2, 2], size=16), num_micro_batches=1)
    for stage in result.stages:
        assert stage.vangl == stage.identity < stage.stored
    #  each block closes with a ReLU that saves its output: without what the stages received, GPipe's are end-to-end's
    received = 64 * 4 * (16 * 16 * 16 + 32 * 8 * 8)
    assert sum(stage.gpipe for stage in result.stages) - received == result.end_to_end.vangl


def test_resnet_110_keeps_at_most_a_sixth_of_end_to_end_in_any_of_16_stages() -> None:
    #  the first stage is the largest, for its maps are; docs/memory.md has all stages, and 64 rows
    def saved(cuts: list[int], **options: Any) -> int:
        config = resnet(110, cuts, size=96).model_copy(update={"objective": ObjectiveConfig.model_validate(options)})
        blueprint = draw_up(config, describe(config))
        return count_at(build_stage(blueprint, 0, CPU), blueprint, rows=2).total

    whole = saved([54], name="vangl")
    for cuts, share in (([14, 40], 0.47), ([7, 47], 0.25), ([4, 50], 0.16)):  # K = 4, 8, 16, the rest as one stage
        assert saved(cuts, name="vangl") <= share * whole
    assert saved([4, 50], transport={"tau": 1.0}) == saved([4, 50], name="vangl")
    assert 0.16 * whole < saved([4, 50], transport={"tau": 1.0, "impl": "autograd"}) < 0.19 * whole


def test_the_table_names_every_stage_and_ends_in_the_largest_shares() -> None:
    lines = table(counted(mlp()), peaks=(2**20, 2 * 2**20, 3 * 2**20)).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["stage", "stage", "end-to-end"]
    assert [line.split()[-1] for line in lines[3:6]] == ["1.0", "2.0", "3.0"]
    assert lines[-1].startswith("largest stage's saved activations, of end-to-end's: VanGL 63.1 %, TRGL 100.0 %")


def test_the_json_holds_the_tables_numbers_in_bytes() -> None:
    result = counted(mlp())
    content = json.loads(json.dumps(to_dict(result, "a1b2", {"git_sha": None}, peaks=(1, 2, 3))))
    assert [stage["vangl_bytes"] for stage in content["stages"]] == [stage.vangl for stage in result.stages]
    assert [stage["peak_rss_bytes"] for stage in (*content["stages"], content["end_to_end"])] == [1, 2, 3]
    assert content["largest_share_of_end_to_end"]["VanGL"] == pytest.approx(0.631, abs=5e-4)
    assert (content["config_hash"], content["num_stages"]) == ("a1b2", 2)
    assert to_dict(result, "", {})["stages"][0]["peak_rss_bytes"] is None


@pytest.mark.parametrize(("cache", "column"), [("memory", "cache"), ("disk", "cache on disk")])
def test_a_cache_holds_the_input_of_a_stage_of_each_training_image(cache: str, column: str) -> None:
    #  64 samples, 6 of them for validation; stage 1 gets 3 features. Stage 0 gets the images themselves
    result = counted(mlp(train={"batch": 8, "order": "sequential", "epochs": 2, "cache": cache}))
    assert [stage.cache for stage in result.stages] == [0, 58 * 3 * 4]
    assert result.end_to_end.cache == 0
    assert table(result).splitlines()[2].rstrip().endswith(f"links{column:>15}")


def test_a_stage_that_learns_for_one_epoch_at_a_time_needs_no_cache() -> None:
    #  stage 1 learns for two epochs of 7 steps, but the run ends with its first
    train = {"batch": 8, "drop_last": True, "order": "sequential", "epochs": 1, "epochs_growth": 1, "cache": "memory"}
    assert [stage.cache for stage in counted(mlp(train=train)).stages] == [0, 58 * 3 * 4]
    assert [stage.cache for stage in counted(mlp(train={**train, "max_steps": 14})).stages] == [0, 0]
