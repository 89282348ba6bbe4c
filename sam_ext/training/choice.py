"""Which way of training suits the labels that are there."""

from __future__ import annotations

from sam_ext.adapters import AdapterMethod

__all__ = ["choose_method"]

_LEAST_SHARE = 0.5


def choose_method(*, images: int, objects: int, masks: int) -> tuple[AdapterMethod, str]:
    """Choose how to learn from labels.

    Masks are learnt from alone, by LoRA, where at least half of the objects have one. Measured with
    `tiny` on 10 images of a train split (mt_defect: 30), and 20 to 40 others of it, mean IoU by
    box, by one point and by five and five points, and of all objects without a prompt:

    =========  ===================  ==========================  ==========================
    set        wesam, from boxes    lora, from masks            sam-adapter, from masks
    =========  ===================  ==========================  ==========================
    dsb2018    0.848, 0.705, 0.580  0.853, 0.757, 0.714; 0.701  0.853, 0.758, 0.710; 0.704
    wbc        0.729, 0.579, 0.604  0.752, 0.583, 0.629; 0.931  0.751, 0.581, 0.613; 0.916
    mt_defect  0.761, 0.478, 0.461  0.760, 0.512, 0.504; 0.246  0.764, 0.569, 0.485; 0.250
    cwfid      0.684, 0.381, 0.336  0.735, 0.513, 0.498; 0.609  0.728, 0.505, 0.486; 0.594
    =========  ===================  ==========================  ==========================

    Args:
        images: Those with labels, to learn from.
        objects: In all images.
        masks: Those of them that have a full mask.

    Returns:
        The method, and why, in a sentence for a person.
    """
    counts = f"{masks} of {objects} objects in {images} images have a full mask"
    if masks < _LEAST_SHARE * objects or not masks:
        return "wesam", f"{counts}: too few to leave the others out"
    return "lora", f"{counts}: enough to learn from them alone"
