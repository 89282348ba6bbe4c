import dataclasses
import json

import pytest
import torch

from sam_ext.ba_sam import BaSamConfig, attach_coefficients
from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.training import supervised
from sam_ext.training.data import MixedSamples, SyntheticSource
from sam_ext.training.losses import dice_loss, focal_loss, mask_iou
from sam_ext.training.supervised import (
    Stage,
    SupervisedConfig,
    collate,
    evaluate_held_out,
    train,
    training_loss,
)
from sam_ext.training.synthetic import SyntheticConfig
from tests.conftest import build_small_sam


def stage(**changes):
    values = {"image_size": 64, "batch_size": 2, "steps": 3, "prompts": 2}
    return Stage(**(values | changes))


def config(*stages, **changes):
    values = {"precision": "fp32", "warmup_steps": 2, "seed": 5}
    return SupervisedConfig(stages=stages or (stage(),), **(values | changes))


def sources(seed=0):
    scenes = SyntheticConfig(size=64, objects=(2, 3))
    return [(SyntheticSource(scenes, count=4, seed=seed), 1.0)]


def batch(prompts=3):
    samples = MixedSamples(sources(), size=64, prompts=prompts, seed=0)
    return collate([samples[0], samples[1]])


def run(tmp_path, settings, sam=None):
    sam = build_small_sam() if sam is None else sam
    return train(sam, sources(), settings, run_dir=tmp_path, num_workers=0)


def test_a_point_counts_its_best_mask_and_a_box_the_single_mask(small_sam):
    """Against the recipe written out for one object at a time, with SAM's own forward passes."""
    objects, settings = batch(), config(focal_weight=3.0, dice_weight=2.0, iou_weight=0.5)
    is_box = torch.tensor([True, False, False, False, True, False])
    got = training_loss(
        small_sam, objects, settings, clicks=0, is_box=is_box, generator=torch.Generator()
    )
    mask_losses, iou_errors = [], []
    images = (objects.images.float() - small_sam.pixel_mean) / small_sam.pixel_std
    for index in range(6):
        embedding = small_sam.image_encoder(images[index // 3][None])
        point = (objects.points[index][None, None], torch.ones(1, 1))
        sparse, dense = small_sam.prompt_encoder(
            points=None if is_box[index] else point,
            boxes=objects.boxes_xyxy[index][None] if is_box[index] else None,
            masks=None,
        )
        masks, predicted = small_sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=small_sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=not is_box[index],
        )
        target = objects.targets[index][None, None].float() / 255
        each = 3.0 * focal_loss(masks, target) + 2.0 * dice_loss(masks, target)
        mask_losses.append(each.min())
        iou_errors += (predicted - mask_iou(masks, target)).square().flatten().tolist()
    wanted = torch.stack(mask_losses).mean() + 0.5 * torch.tensor(iou_errors).mean()
    torch.testing.assert_close(got.loss, wanted, rtol=1e-4, atol=1e-5)  # float32, batched sums


def test_clicks_add_prompts_and_are_answered_by_the_single_mask(small_sam):
    objects, settings = batch(), config()
    is_box = torch.tensor([True, False] * 3)

    def loss(clicks, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return training_loss(
            small_sam, objects, settings, clicks=clicks, is_box=is_box, generator=generator
        )

    assert loss(2).loss != loss(0).loss
    assert loss(2, seed=1).loss != loss(2).loss  # the clicks are drawn
    loss(1).loss.backward()
    decoder = small_sam.mask_decoder.output_hypernetworks_mlps[0].layers[0].weight.grad
    downscaling = small_sam.prompt_encoder.mask_downscaling[0].weight.grad
    assert decoder.abs().sum() > 0
    assert downscaling.abs().sum() > 0  # the first answer went in as mask input


def test_training_learns_and_leaves_a_curve(tmp_path):
    settings = config(stage(steps=80, batch_size=4), learning_rate=2e-3)
    seen = []
    sam = train(
        build_small_sam(),
        sources(),
        settings,
        run_dir=tmp_path,
        held_out=sources(),
        held_out_images=8,
        evaluate_every=40,
        num_workers=0,
        on_progress=seen.append,
    )
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [40, 50, 80]
    assert len(seen) == 3
    assert lines[1]["images_per_s"] > 0
    assert lines[1]["eta_s"] >= 0
    assert lines[2]["loss"] < 0.95 * lines[1]["loss"]
    assert lines[2]["held_out_box_iou"] == measured(sam, settings)["held_out_box_iou"]
    assert 0.3 < lines[2]["held_out_rectangle_iou"] <= 1
    assert not sam.training


def measured(sam, settings):
    values = evaluate_held_out(sam, sources(), settings, image_size=64, images=8)
    return {name: round(value, 6) for name, value in values.items()}


def test_the_moving_average_of_the_weights_is_what_is_kept(tmp_path):
    """With decay d, after two steps it is d times the first weights and 1 - d times the second."""
    name = "mask_decoder.mask_tokens.weight"

    def kept(decay):
        settings = config(stage(steps=2), average_decay=decay, warmup_steps=0)
        return run(tmp_path / str(decay), settings).state_dict()[name]

    second, averaged, first = kept(0.0), kept(0.75), kept(1 - 1e-12)
    assert not torch.equal(first, second)
    torch.testing.assert_close(averaged, 0.75 * first + 0.25 * second)
    trained = torch.load(tmp_path / "0.75" / "last.pt", weights_only=True)["model"][name]
    assert torch.equal(trained, second)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_interrupted_ends_where_an_uninterrupted_one_does(tmp_path, optimizer):
    stages = (stage(steps=2), stage(steps=2, image_size=48, clicks=1))
    whole = run(tmp_path / "whole", config(*stages, optimizer=optimizer, warmup_steps=0))
    parts = tmp_path / "parts"

    class StopError(Exception):
        pass

    class Interrupted(SyntheticSource):
        def scene(self, index):
            if (parts / "last.pt").exists() and saved_step(parts) >= 3:
                raise StopError
            return super().scene(index)

    broken = [(Interrupted(SyntheticConfig(size=64, objects=(2, 3)), count=4), 1.0)]
    settings = config(*stages, optimizer=optimizer, warmup_steps=0)
    with pytest.raises(StopError):
        train(build_small_sam(), broken, settings, run_dir=parts, num_workers=0, save_every=3)
    resumed = run(parts, settings, sam=build_small_sam(seed=9))
    for name, wanted in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], wanted), name


def saved_step(run_dir):
    return torch.load(run_dir / "last.pt", weights_only=True)["step"]


def test_the_same_seed_trains_the_same_model_and_another_seed_another(tmp_path):
    first, again, other = (
        run(tmp_path / str(i), config(seed=seed)).state_dict() for i, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_resuming_with_other_settings_is_refused(tmp_path):
    run(tmp_path, config())
    with pytest.raises(CheckpointError, match="must be of the same run"):
        run(tmp_path, config(learning_rate=1e-5))
    longer = run(tmp_path, config(stage(steps=4)))  # more steps are not another run
    assert saved_step(tmp_path) == 4
    assert not longer.training


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    sam = build_small_sam()
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="must be finite, got nan at step 0"):
        run(tmp_path, config(), sam=sam)
    assert not (tmp_path / "last.pt").exists()


def test_bf16_trains_the_same_parameters(tmp_path):
    before = build_small_sam().state_dict()
    after = run(tmp_path, config(precision="bf16")).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    never = {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"}
    assert never.isdisjoint(changed)
    assert {n.split(".")[0] for n in changed} == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert all(tensor.dtype == torch.float32 for tensor in after.values())


def test_a_stage_of_several_sizes_trains_at_each_of_them(tmp_path, monkeypatch):
    sizes = []

    def watched(sam, batch, *arguments, **options):
        sizes.append(tuple(batch.images.shape[-2:]))
        return training_loss(sam, batch, *arguments, **options)

    monkeypatch.setattr(supervised, "training_loss", watched)
    run(tmp_path, config(stage(steps=12, other_sizes=(48, 96))))
    assert set(sizes) == {(48, 48), (64, 64), (96, 96)}
    first, sizes[:] = list(sizes), []
    run(tmp_path / "again", config(stage(steps=12, other_sizes=(48, 96))))
    assert sizes == first


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_coefficients_of_ba_sam_can_be_trained_and_saved(tmp_path, optimizer):
    sam = build_small_sam()
    attach_coefficients(sam.image_encoder)
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    settings = config(
        stage(image_size=96),
        ba_sam=BaSamConfig(scaling_factor=True, bias="official"),
        trained="ba_sam",
        optimizer=optimizer,
    )
    after = run(tmp_path, settings, sam=sam).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"image_encoder.blocks.1.attn.ba_sam_coefficient"}
    save_checkpoint(sam, tmp_path / "small.safetensors", dtype=torch.float32)
    loaded = load_sam(str(tmp_path / "small.safetensors"), weights_dir=tmp_path).state_dict()
    assert all(torch.equal(loaded[name], after[name]) for name in after)


def test_training_the_coefficients_wants_a_model_that_has_them(tmp_path):
    settings = config(ba_sam=BaSamConfig(bias="official"), trained="ba_sam")
    with pytest.raises(ConfigError, match="attach_coefficients"):
        run(tmp_path, settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: config(trained="ba_sam"), "wants ba_sam", id="no coefficients"),
        pytest.param(lambda: stage(image_size=70), "multiples of 16", id="size"),
        pytest.param(lambda: stage(clicks=-1), "must be >= 0", id="clicks"),
        pytest.param(lambda: SupervisedConfig(stages=()), "at least one stage", id="no stage"),
        pytest.param(lambda: config(box_chance=1.5), "in 0..1", id="chance"),
    ],
)
def test_an_impossible_run_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage().steps = 5
