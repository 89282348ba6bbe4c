from typing import get_args

import pytest
import torch

from sam_ext.errors import ConfigError
from sam_ext.prompt_encoder import NOT_A_POINT
from sam_ext.stable_sam import StableSam
from sam_ext.training import robust as module
from sam_ext.training.data import MixedSamples, SyntheticSource
from sam_ext.training.robust import (
    PROMPT_KINDS,
    PromptKind,
    RobustConfig,
    _prompt,
    coarse_masks,
    noisy_boxes,
    random_points,
    robust_loss,
    train_stable,
)
from sam_ext.training.supervised import collate
from sam_ext.training.synthetic import SyntheticConfig
from tests.conftest import build_small_sam


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sources():
    return [(SyntheticSource(SyntheticConfig(size=64, objects=(2, 3)), count=4), 1.0)]


def config(**changes):
    values = {"image_size": 64, "steps": 4, "batch_size": 2, "prompts": 4, "precision": "fp32"}
    return RobustConfig(**(values | changes))


def iou(first, second):
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    overlap = sides.clamp(min=0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap)


def test_noisy_boxes_are_as_far_off_as_the_source_says():
    tight = torch.tensor([[400.0, 300.0, 500.0, 350.0]]).expand(20_000, 4)
    free = {"image_hw": (1024, 1024), "min_iou": 0.0}
    at_02 = iou(noisy_boxes(tight, scale=0.2, generator=generator(), **free), tight)
    assert at_02.mean().item() == pytest.approx(0.772, abs=0.005)
    assert at_02.min() >= 0.64 - 1e-4
    at_04 = iou(noisy_boxes(tight, scale=0.4, generator=generator(), **free), tight)
    assert at_04.mean().item() == pytest.approx(0.601, abs=0.005)
    assert (at_04 < 0.5).float().mean().item() == pytest.approx(0.095, abs=0.01)
    kept = noisy_boxes(tight, image_hw=(1024, 1024), scale=0.4, generator=generator())
    assert iou(kept, tight).min() >= 0.5
    assert iou(kept, tight).mean().item() == pytest.approx(0.615, abs=0.01)


def test_noisy_boxes_stay_in_the_image():
    tight = torch.tensor([[0.0, 0.0, 60.0, 30.0]]).expand(500, 4)
    noisy = noisy_boxes(tight, image_hw=(32, 64), scale=0.4, generator=generator())
    assert noisy.min() >= 0
    assert (noisy <= torch.tensor([64.0, 32.0, 64.0, 32.0])).all()
    assert (noisy[:, 2:] > noisy[:, :2]).all()


def test_random_points_lie_in_their_objects():
    targets = torch.zeros(2, 16, 16)
    targets[0, 2:5, 8:12] = 1
    targets[1, 9, 9] = 0.2  # thinner than a pixel
    points = random_points(targets, 50, stride=4, generator=generator())
    assert points.shape == (2, 50, 2)
    for target, xy in zip(targets, points, strict=True):
        columns, rows = ((xy + 0.5) / 4).floor().long().unbind(1)
        assert (target[rows, columns] > 0).all()
    assert len(points[0].unique(dim=0)) > 40


def test_coarse_masks_are_rough_copies():
    targets = torch.zeros(40, 64, 64)
    targets[:, 16:48, 20:50] = 1
    drawn = coarse_masks(targets, generator=generator())
    assert drawn.shape == (40, 1, 64, 64)
    assert set(drawn.unique().tolist()) == {-6.0, 6.0}
    wanted, got = targets > 0.5, drawn[:, 0] > 0
    overlap = (wanted & got).sum((1, 2)) / (wanted | got).sum((1, 2))
    assert 0.75 < overlap.mean() < 0.98
    assert (got[:, 24:40, 28:42]).all()
    assert not got[:, :8].any()


def test_every_kind_of_prompt_trains_every_parameter_of_the_plugin_and_nothing_else():
    sam, plugin = build_small_sam(), StableSam()
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sam.requires_grad_(False)
    batch = batch_of(prompts=1)
    losses = {}
    for kind in get_args(PromptKind):
        plugin.zero_grad()
        loss = robust_loss(sam, plugin, batch, config(), kinds=[kind], generator=generator())
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in plugin.parameters()), kind
        losses[kind] = loss.item()
    assert len(set(losses.values())) == 10
    together = robust_loss(
        sam, plugin, batch_of(prompts=2), config(), kinds=["box", "box"], generator=generator()
    )
    assert torch.isfinite(together)


def test_points_on_objects_and_beside_them_are_drawn_and_labelled():
    targets = torch.zeros(2, 32, 48)
    targets[0, 10:20, 10:20] = 1
    targets[1] = 1  # beside which there is nothing
    targets[1, 0, 0] = 0
    kept = []
    for seed in range(20):
        coords, labels, mask = _prompt(
            "2 + 2 points", torch.zeros(2, 4), targets, (128, 192), config(), generator(seed)
        )
        assert mask is None
        assert labels.tolist() == [[1, 1, 0, 0, NOT_A_POINT]] * 2
        cells = ((coords[:, :4] + 0.5) / 4).floor().long()
        for points in cells[:, :2]:
            kept += points.tolist()
        x, y = cells[0, 2:].T
        assert not targets[0, y, x].any()
        assert ((x <= 31) & (y <= 31)).all()  # 12 pixels away at most
        assert cells[1, 2:].tolist() == [[0, 0]] * 2
    assert len({tuple(point) for point in kept}) > 40


@pytest.mark.parametrize("scope", ["all", "points"])
def test_a_plugin_is_trained_on_the_prompts_that_it_is_for(monkeypatch, scope):
    seen = set()
    original = module.robust_loss

    def spy(*given, kinds, **options):
        seen.update(kinds)
        return original(*given, kinds=kinds, **options)

    monkeypatch.setattr(module, "robust_loss", spy)
    plugin = StableSam(scope=scope)
    settings = config(steps=20, prompts=4)
    train_stable(build_small_sam(), plugin, sources(), settings, num_workers=0)
    assert seen == set(PROMPT_KINDS[scope])
    assert {"box", "1 point"} & seen == ({"box", "1 point"} if scope == "all" else set())


def batch_of(prompts):
    samples = MixedSamples(sources(), size=64, prompts=prompts, seed=0)
    return collate([samples[0], samples[1]])


def test_training_changes_the_plugin_alone_and_lowers_the_loss():
    sam, plugin = build_small_sam(), StableSam()
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    lines = []
    train_stable(
        sam,
        plugin,
        sources(),
        config(steps=100, warmup_steps=5),
        num_workers=0,
        on_progress=lines.append,
    )
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
    assert all(p.requires_grad for p in sam.parameters())
    assert not plugin.training
    assert lines[1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines] == [50, 100]


def test_the_same_seed_trains_the_same_plugin():
    def trained(seed):
        torch.manual_seed(0)  # the plugin's start
        settings = config(seed=seed)
        return train_stable(build_small_sam(), StableSam(), sources(), settings, num_workers=0)

    first, again, other = (trained(seed) for seed in (1, 1, 2))
    assert torch.equal(first.transform.weight, again.transform.weight)
    assert not torch.equal(first.transform.weight, other.transform.weight)


def test_an_impossible_run_is_refused():
    with pytest.raises(ConfigError, match="must be >= 0"):
        config(noise=-1.0)
    with pytest.raises(ConfigError, match="multiples of 16"):
        config(image_size=70)
