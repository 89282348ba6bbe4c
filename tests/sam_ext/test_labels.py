import numpy as np
import pytest

from sam_ext.errors import DataError
from sam_ext.labels import LabelledObject

MASK = np.zeros((4, 6), bool)
MASK[1, 2] = True


def weak(**changes):
    values = {
        "label": "cell",
        "box_xyxy": None,
        "point_coords": np.zeros((0, 2)),
        "point_labels": np.zeros(0, int),
        "mask": None,
    }
    return LabelledObject(**(values | changes))


def test_any_one_of_box_point_and_mask_is_enough():
    weak(box_xyxy=np.array([0.0, 1, 2.5, 3]))
    weak(point_coords=np.array([[1.5, 2.0]]), point_labels=np.array([1]))
    weak(mask=MASK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({}, "got none of them", id="nothing"),
        pytest.param(
            {"point_coords": np.zeros((1, 2)), "point_labels": np.zeros(1, int)},
            "got none of them",
            id="only what it is not",
        ),
        pytest.param({"box_xyxy": np.array([2.0, 1, 2, 3])}, "with a size", id="flat box"),
        pytest.param({"box_xyxy": np.array([0, 0, np.nan, 3])}, "finite", id="box of NaN"),
        pytest.param({"mask": np.zeros((4, 6), bool)}, "hold a pixel", id="empty mask"),
        pytest.param({"mask": MASK.astype(np.uint8)}, r"\[4, 6\] uint8", id="mask of numbers"),
        pytest.param({"point_labels": np.ones(2, int)}, r"\[0, 2\] and \[2\]", id="no coordinates"),
        pytest.param(
            {"point_coords": np.zeros((1, 2)), "point_labels": np.array([2])},
            "labels 0 or 1",
            id="label",
        ),
    ],
)
def test_what_does_not_describe_an_object_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        weak(**changes)
