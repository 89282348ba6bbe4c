from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.prompt_encoder import NOT_A_POINT
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam_adapter import SamAdapterConfig, attach_sam_adapter, sam_adapter_parameters
from sam_ext.stable_sam import StableSam
from sam_ext.training.branch import Branch, pixels_of, token_groups

POINT = ObjectPrompt(point_coords=np.array([[20.0, 20]]), point_labels=np.ones(1, int))
BOX = ObjectPrompt(
    point_coords=np.zeros((0, 2)),
    point_labels=np.zeros(0, int),
    box_xyxy=np.array([8.0, 8, 40, 32]),
)


def test_prompts_of_equally_many_tokens_are_together_and_none_has_no_token():
    groups = token_groups([None, BOX, POINT, None], torch.device("cpu"))
    assert [group.places.tolist() for group in groups] == [[0, 3], [1, 2]]
    assert [tuple(group.coords.shape) for group in groups] == [(2, 0, 2), (2, 2, 2)]
    assert groups[1].labels.tolist() == [[2, 3], [1, NOT_A_POINT]]


def test_a_branch_sees_what_the_predictor_answers(small_sam):
    """Also with an adapter, of an image that is padded, whose frequencies are its own."""
    attach_sam_adapter(small_sam.image_encoder, SamAdapterConfig(reduction=8))
    with torch.no_grad():
        for parameter in sam_adapter_parameters(small_sam):
            nn.init.normal_(parameter, std=0.2)
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    policy = ResolutionPolicy(mode="native", min_side=90, max_side=90)
    predictor = Predictor(small_sam, policy=policy)
    prompts = [None, POINT, BOX]
    wanted = predictor.decode_low_res(predictor.embed(image), prompts)
    branch = Branch(small_sam, None, ba_sam=None, checkpointing=False)
    device = torch.device("cpu")
    with torch.no_grad():
        seen = branch(
            pixels_of(image, device),
            token_groups(prompts, device),
            predictor.padded_size(image.shape[:2]),
        )
    assert seen.logits.shape == (3, 4, 13, 23)
    assert seen.embeddings.shape == (256, 4, 6)
    for index, (low_res, ious, _) in enumerate(wanted):
        # float32: windows and attention are computed in other pieces
        torch.testing.assert_close(seen.logits[index], low_res[:, :13, :23], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(seen.ious[index], ious, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [ResolutionPolicy(), ResolutionPolicy(mode="native", min_side=90, max_side=90, pad_to=64)],
)
def test_a_branch_pads_as_the_model_is_served(small_sam, policy):
    predictor = Predictor(small_sam, policy=policy)
    size = predictor.input_size((50, 90))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    [(wanted, _, _)] = predictor.decode_low_res(predictor.embed(image), [BOX])
    branch = Branch(small_sam, None, ba_sam=None, checkpointing=False)
    device = torch.device("cpu")
    with torch.no_grad():
        seen = branch(
            pixels_of(image, device), token_groups([BOX], device), predictor.padded_size(size)
        )
    height, width = seen.logits.shape[-2:]
    assert (height, width) < wanted.shape[-2:]
    torch.testing.assert_close(seen.logits[0], wanted[:, :height, :width], rtol=1e-3, atol=1e-4)


def test_a_plugin_takes_part_in_the_prompts_that_it_is_for(small_sam):
    plugin = StableSam(scope="points")
    torch.manual_seed(0)
    for parameter in plugin.parameters():
        nn.init.normal_(parameter, std=0.05)
    several = ObjectPrompt(
        point_coords=np.array([[20.0, 20], [30, 9]]), point_labels=np.array([1, 0])
    )
    both = replace(BOX, point_coords=POINT.point_coords, point_labels=POINT.point_labels)
    prompts = [several, both, POINT, several, None]
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    policy = ResolutionPolicy(mode="native", min_side=96, max_side=96)
    predictor = Predictor(small_sam, policy=policy, stable_sam=plugin.eval())
    wanted = predictor.decode_low_res(predictor.embed(image), prompts)
    branch = Branch(small_sam, plugin, ba_sam=None, checkpointing=False)
    device = torch.device("cpu")
    with torch.no_grad():
        seen = branch(
            pixels_of(image, device),
            token_groups(prompts, device),
            predictor.padded_size(image.shape[:2]),
        )
    assert [routing is not None for _, _, routing in wanted] == [True, False, False, True, False]
    for index, (low_res, _, _) in enumerate(wanted):
        torch.testing.assert_close(seen.logits[index], low_res, rtol=1e-3, atol=1e-4)
