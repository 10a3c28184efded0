"""Small re-buildings of the segmentation networks that people have: the graphs of the published ones, with few channels and blocks.

Each builder takes (height, width) in pixels and the number of classes, and returns a Keras model that is made as its author's code is:
nested models, custom layers, outputs in lists, several outputs, pixels in a row, probabilities.
"""

import dataclasses
from collections.abc import Callable

import keras

from networks import branches, encoders, transformers

Builder = Callable[[tuple[int, int], int], keras.Model]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network and what has to be said about it.

    Attributes:
      build: see the module.
      exits: number of exits that it has places for, the final one included.
      output: `backbone.output`.
      classes: that it has a fixed number of; None for any.
    """

    build: Builder
    exits: int = 4
    output: str = ""
    classes: int | None = None


KINDS = {
    "unet_xception": Kind(encoders.unet_xception),
    "unet_plus_plus": Kind(encoders.unet_plus_plus, output="output_final"),
    "u2net": Kind(encoders.u2net, output="fused", classes=2),
    "segnet": Kind(encoders.segnet, output="scores"),
    "fcn8": Kind(encoders.fcn8),
    "deeplab_v3_plus": Kind(encoders.deeplab_v3_plus),
    "deeplab_v3_hub": Kind(encoders.deeplab_v3_hub),
    "lraspp_mobilenet_v3": Kind(encoders.lraspp_mobilenet_v3),
    "segformer_hub": Kind(transformers.segformer_hub),
    "fast_scnn": Kind(branches.fast_scnn),
    "bisenet_v2": Kind(branches.bisenet_v2, output="main"),
    "ddrnet_23_slim": Kind(branches.ddrnet_23_slim),
    "pidnet": Kind(branches.pidnet, output="main"),
}
