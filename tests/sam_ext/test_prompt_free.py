import numpy as np
import pytest
import torch

from sam_ext.mask_decoder import decode_masks
from sam_ext.predictor import Crop, ObjectPrompt, Predictor
from sam_ext.prompt_encoder import dense_position_encoding, embed_dense
from sam_ext.prompt_free import answer_prompt_free
from sam_ext.resolution import ResolutionPolicy

NATIVE = ResolutionPolicy(mode="native", min_side=100, max_side=100)
IMAGE = np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8)


@pytest.fixture
def predictor(small_sam):
    return Predictor(small_sam, policy=NATIVE)


def answering(predictor, monkeypatch, drawn):
    """Make the predictor answer with a drawing [120, 200] of logits."""
    monkeypatch.setattr(predictor, "full_logits", lambda *_: drawn.astype(np.float32))
    return answer_prompt_free(predictor, predictor.embed(IMAGE))


def test_no_tokens_and_the_no_mask_embedding_are_decoded(predictor, small_sam):
    embedding = predictor.embed(IMAGE)
    grid = tuple(embedding.image_embeddings.shape[-2:])
    with torch.no_grad():
        wanted = decode_masks(
            small_sam.mask_decoder,
            embedding.image_embeddings,
            image_pe=dense_position_encoding(small_sam.prompt_encoder, grid),
            sparse_prompt_embeddings=torch.zeros(1, 0, 256),
            dense_prompt_embeddings=embed_dense(small_sam.prompt_encoder, None, grid_hw=grid),
        )
    got = answer_prompt_free(predictor, embedding)
    logits = predictor.full_logits(embedding, wanted.low_res_logits[0, 0])
    np.testing.assert_array_equal(got.mask, logits > 0)
    np.testing.assert_allclose(
        got.probabilities, torch.from_numpy(logits).sigmoid().numpy(), rtol=0, atol=1e-6
    )  # float32: another order of the same operations
    assert got.iou_prediction == float(wanted.iou_predictions[0, 0])
    assert got.mask.shape == (120, 200)
    assert got.mask.any()


def test_it_is_answered_beside_prompted_objects_as_if_alone(predictor):
    embedding = predictor.embed(IMAGE)
    box = np.array([20.0, 30, 90, 80])
    prompt = ObjectPrompt(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, int), box_xyxy=box
    )
    alone = [predictor.decode_low_res(embedding, [one])[0] for one in (None, prompt)]
    together = predictor.decode_low_res(embedding, [None, prompt])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_pieces_come_largest_first_each_with_its_mask_and_score(predictor, monkeypatch):
    drawn = np.full((120, 200), -3.0)
    drawn[10:14, 10:14] = 1.0  # 16 pixels
    drawn[14:18, 14:18] = 1.0  # joined to it by a corner
    drawn[50:60, 20:120] = 2.0
    drawn[100:103, 100:105] = 5.0  # 15 pixels
    got = answering(predictor, monkeypatch, drawn)
    assert [one.area_px for one in got.instances] == [1000, 32]
    np.testing.assert_array_equal(got.instances[0].mask, drawn == 2)
    np.testing.assert_array_equal(got.instances[1].mask, drawn == 1)
    sigmoid = {value: 1 / (1 + np.exp(-value)) for value in (1, 2, 5)}
    assert got.instances[0].score == pytest.approx(sigmoid[2], abs=1e-6)
    assert got.instances[1].score == pytest.approx(sigmoid[1], abs=1e-6)
    np.testing.assert_array_equal(got.mask, drawn > 0)
    mean = (1000 * sigmoid[2] + 32 * sigmoid[1] + 15 * sigmoid[5]) / 1047
    assert got.score == pytest.approx(mean, abs=1e-6)


def test_there_are_at_most_a_hundred_pieces(predictor, monkeypatch):
    drawn = np.full((120, 200), -1.0)
    for row in range(11):
        for column in range(11):
            drawn[10 * row : 10 * row + 5, 10 * column : 10 * column + 4 + (row == 7)] = 1.0
    got = answering(predictor, monkeypatch, drawn)
    assert len(got.instances) == 100
    assert [one.area_px for one in got.instances[:12]] == [25] * 11 + [20]


def test_nothing_found_is_an_answer(predictor, monkeypatch):
    got = answering(predictor, monkeypatch, np.full((120, 200), -200.0))
    assert got.score == 0
    assert got.instances == ()
    assert not got.mask.any()
    assert np.isfinite(got.probabilities).all()


def test_outside_a_crop_there_is_nothing(predictor):
    crop = Crop(40, 20, 140, 90)
    got = answer_prompt_free(predictor, predictor.embed(IMAGE, crop=crop))
    inside = np.zeros((120, 200), bool)
    inside[20:90, 40:140] = True
    assert got.mask.any()
    assert not got.mask[~inside].any()
    assert got.probabilities[~inside].max() < 1e-30
