"""Folders of COCO format with one object an image."""

import json

import cv2
import numpy as np
from pycocotools import mask as coco_mask

OBJECT = np.zeros((48, 72), bool)
OBJECT[8:40, 10:30] = True
OBJECT[30:40, 30:60] = True  # an L: its box is not its mask


def image_of(mask):
    return np.where(mask[..., None], 220, 40).astype(np.uint8).repeat(3, axis=2)


def write_folder(root, masks, splits):
    (root / "images").mkdir(parents=True)
    annotations, images = [], []
    for number, (mask, split) in enumerate(zip(masks, splits, strict=True)):
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        name = f"{number}.png"
        cv2.imwrite(str(root / "images" / name), image_of(mask))
        sides = {"height": mask.shape[0], "width": mask.shape[1]}
        images.append({"id": number, "file_name": name, "split": split} | sides)
        annotations.append({"image_id": number, "segmentation": rle, "primary": number})
    content = {"images": images, "annotations": annotations}
    (root / "annotations.json").write_text(json.dumps(content))
    return root
