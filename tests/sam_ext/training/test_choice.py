import pytest

from sam_ext.training.choice import choose_method


@pytest.mark.parametrize(
    ("counts", "method"),
    [
        pytest.param((10, 40, 0), "wesam", id="boxes alone"),
        pytest.param((10, 40, 19), "wesam", id="few masks"),
        pytest.param((10, 40, 40), "lora", id="masks alone"),
        pytest.param((10, 40, 20), "lora", id="half masks"),
        pytest.param((1, 0, 0), "wesam", id="nothing"),
    ],
)
def test_what_the_labels_are_decides(counts, method):
    images, objects, masks = counts
    chosen, sentence = choose_method(images=images, objects=objects, masks=masks)
    assert chosen == method
    assert sentence.startswith(f"{masks} of {objects} objects in {images} images")
