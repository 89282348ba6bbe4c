import pytest

from sam_ext.training.choice import choose_method


@pytest.mark.parametrize(
    ("counts", "method"),
    [
        pytest.param((10, 0, 40, 0), "wesam", id="boxes alone"),
        pytest.param((10, 2, 40, 8), "wesam", id="few masks"),
        pytest.param((10, 10, 40, 40), "masks", id="masks alone"),
        pytest.param((10, 4, 40, 30), "masks", id="mostly masks"),
        pytest.param((1, 0, 0, 0), "wesam", id="nothing"),
    ],
)
def test_what_the_labels_are_decides(counts, method):
    names = ("images", "complete", "objects", "masks")
    chosen, sentence = choose_method(**dict(zip(names, counts, strict=True)))
    assert (chosen == "wesam") == (method == "wesam")
    assert sentence.startswith(f"{counts[3]} of {counts[2]} objects in {counts[0]} images")
