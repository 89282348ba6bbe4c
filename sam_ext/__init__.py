"""SAM as a library: building, embedding, decoding, training and measuring it.

Notation used for tensor shapes, everywhere in this package:
    B images; P prompted objects of one image; T prompt tokens; M masks of one object;
    N image tokens = H * W; C channels; D channels of one head; H, W rows, columns;
    K neighbours or samples.

Sizes are (H, W), points are (x, y) in pixels, images are [H, W, 3] RGB uint8 in [0, 255].
Nothing here knows Label Studio, reads the environment, or touches the network at import.
"""
