import numpy as np

from sam_ext.evaluate.common import center_point
from sam_ext.metrics import tight_box
from tests.sam_ext.evaluate.folders import OBJECT


def test_the_tight_box_is_in_pixel_edges():
    assert tight_box(OBJECT).tolist() == [10, 8, 60, 40]


def test_the_centre_lies_farthest_from_the_outline_and_the_image_border():
    x, y = center_point(OBJECT)
    assert OBJECT[int(y), int(x)]
    assert 18 <= x <= 21
    assert 17 <= y <= 31
    full = np.ones((21, 31), bool)
    assert center_point(full)[1] == 10
