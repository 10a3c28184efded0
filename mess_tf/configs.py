"""Every value of a run: frozen dataclasses, recipes, strict overrides and the JSON round trip.

This module imports no TensorFlow, so that the search and the device side can read a configuration.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mess_runtime.bundle import RESIZES, check
from mess_runtime.files import parse_json

FORMAT = 1
WIDE = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
LITES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
BACKBONES = (
    *WIDE,
    *LITES,
    *(f"efficientnet_v2_b{number}" for number in range(4)),
    "convnext_tiny",
    "resnet50",
    "resnet101",
)
ORIGINAL = "original.keras"  # in a work folder: the copy of the user's network
IGNORE = 255
# Fields of the data section that older files lack, with what was done then.
_ADDED_TO_DATA = {"resize": "stretch", "label_values": ""}
PCI, GOOGLE = "/sys/bus/pci/devices", "0x1ae0"  # where Linux lists devices, and who makes TPUs
STRATEGIES = ("none", "mirrored", "multi_worker", "tpu")  # of `tf.distribute`
_ADDED_TO_STAGES = {"regions": "none", "region_cell": 16, "region_warmup": 0, "jit_compile": False}

# Sources of the user's own files, whose labels `data.label_values` may explain, and all that read files below `data.data_dir`.
OWN_LABELS = ("folder", "voc")
FILE_SOURCES = (*OWN_LABELS, "coco21", "ade20k", "cityscapes", "oxford_iiit_pet")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABEL_VALUES = {
    "cityscapes": {str(value): CITYSCAPES_IDS.index(value) if value in CITYSCAPES_IDS else IGNORE for value in (*range(34), 255)},
    "ade20k": {"0": IGNORE} | {str(value): value - 1 for value in range(1, 151)},
}


# Of an image: up to this size `theta_img * pixels` is off by less than the 1e-9 that the exit rule allows for rounding.
MAX_PIXELS = 2**22


def _check_seed(seed: int) -> None:
    check(0 <= seed < 2**32, "seed", f"0 to {2**32 - 1}", seed)


def check_strategy(name: str) -> None:
    """Checks what can be known of a strategy, see `replicas.open_strategy`, without TensorFlow.

    Raises:
      ValueError: there is no such one, or this machine has nothing of the kind.
    """
    check(name in STRATEGIES, "--strategy", f"one of {', '.join(STRATEGIES)}", name)
    if name == "multi_worker":
        required = '{"cluster":{"worker":["HOST:PORT",...]},"task":{"type":"worker","index":0}}, with at least two workers and the place '
        required += "of this one among them, with --strategy=multi_worker"
        text = os.environ.get("TF_CONFIG", "")
        try:
            workers, task = json.loads(text)["cluster"]["worker"], json.loads(text)["task"]
            listed = isinstance(workers, list) and all(re.fullmatch(r".+:\d+", worker) for worker in workers)
            named = listed and len(workers) > 1 and task["type"] == "worker" and type(task["index"]) is int
            named = named and 0 <= task["index"] < len(workers)
        except (ValueError, KeyError, TypeError):
            named = False
        check(named, "TF_CONFIG", required, text)
    if name == "tpu":
        there = any(path.read_text().strip() == GOOGLE for path in pathlib.Path(PCI).glob("*/vendor"))
        check(there, "--strategy", "none or mirrored on a machine without a TPU", name)


def parse_label_values(label_values: str | Mapping[str, int]) -> dict[int | tuple[int, int, int], int]:
    """Reads `data.label_values`: stored value or RGB colour to class; empty where the stored values are the classes.

    Raises:
      ValueError: unknown name, a key that is neither value nor colour, both kinds together, one twice, or a class out of range.
    """
    where = "label_values"
    if isinstance(label_values, str):
        check(label_values in ("", *LABEL_VALUES), where, f"a table or one of {', '.join(LABEL_VALUES)}", label_values)
        label_values = LABEL_VALUES.get(label_values, {})
    check(isinstance(label_values, Mapping), where, "a table or the name of one", label_values)
    parsed: dict[int | tuple[int, int, int], int] = {}
    for key, value in label_values.items():
        check(isinstance(key, str), where, 'with keys like "7" (a value), "#804080" or "128,64,128" (a colour), as text', key)
        if re.fullmatch(r"#[0-9A-Fa-f]{6}", key):
            stored = tuple(bytes.fromhex(key[1:]))
        else:
            numbers = [int(part) for part in key.split(",")] if re.fullmatch(r"\d{1,5}|\d{1,3}(,\s*\d{1,3}){2}", key) else [-1]
            known = numbers != [-1] and max(numbers) <= (255 if len(numbers) == 3 else 65535)
            check(known, where, "with keys like 7 (a value), #804080 or 128,64,128 (a colour)", key)
            stored = tuple(numbers) if len(numbers) == 3 else numbers[0]
        check(type(value) is int and 0 <= value <= IGNORE, where, f"with classes from 0 on, {IGNORE} for none", value)
        check(stored not in parsed, where, "without a value or colour twice", key)
        parsed[stored] = value
    check(len({type(stored) for stored in parsed}) < 2, where, "of values or of colours, not of both", label_values)
    return parsed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where images come from and how training augments them.

    Attributes:
      source: `synthetic`, one of `FILE_SOURCES`, or `tfds:NAME`.
      data_dir: root folder of the source; unused by `synthetic`.
      train_split, val_split: names of the splits: folders, lists, or what the source calls them.
      input_size: (height, width) in pixels of the exported network; scale 1 of training images.
      crop_size: (height, width) of training crops; (0, 0) for the input size.
      ignore_value: label value of pixels without a class as stored in the files; 255 inside the project.
      scale_range: random rescaling of training images, uniform in this range.
      flip: random horizontal flips.
      brightness, contrast, saturation: largest relative change of training colours, 0 = off.
      synthetic_train, synthetic_val: number of synthetic scenes.
      synthetic_hard: share of hard scenes in them.
      seed: of the synthetic scenes.
      resize: how images of another size are fitted to the input, in training, evaluation, calibration and the bundle: `stretch`, or
        `letterbox`, which keeps the aspect ratio and fills up with grey.
      label_values: of `folder` and `voc`: which value or colour in the label files is which class, as {"0": 0, "255": 1} or
        {"#804080": 0, "70,70,70": 1}; class 255 stands for pixels without a class. Or the name of such a table: `cityscapes` (labelIds to
        the 19 train ids), `ade20k` (0 is unlabelled, 1..150). Empty: the values are the classes. `ignore_value` goes on to be ignored
        unless it is in the table; other values are errors.
    """

    source: str = "synthetic"
    data_dir: str = ""
    train_split: str = "train"
    val_split: str = "val"
    input_size: tuple[int, int] = (96, 128)
    crop_size: tuple[int, int] = (0, 0)
    ignore_value: int = 255
    scale_range: tuple[float, float] = (0.75, 1.75)
    flip: bool = True
    brightness: float = 0.3
    contrast: float = 0.0
    saturation: float = 0.0
    synthetic_train: int = 512
    synthetic_val: int = 128
    synthetic_hard: float = 0.5
    seed: int = 0
    resize: Literal["stretch", "letterbox"] = "stretch"
    label_values: str | dict[str, int] = ""

    def __post_init__(self):
        check(all(side >= 16 for side in self.input_size), "input_size", "two sides of at least 16 pixels", self.input_size)
        check(math.prod(self.input_size) <= MAX_PIXELS, "input_size", f"of at most {MAX_PIXELS} pixels in all", self.input_size)
        crop_ok = self.crop_size == (0, 0) or all(side >= 16 for side in self.crop_size)
        check(crop_ok, "crop_size", "two sides of at least 16 pixels, or (0, 0)", self.crop_size)
        check(self.resize in RESIZES, "resize", f"one of {RESIZES}", self.resize)
        parse_label_values(self.label_values)
        explained = self.source in OWN_LABELS or not self.label_values
        check(explained, "label_values", f"left out unless data.source is {' or '.join(OWN_LABELS)}", self.label_values)
        low, high = self.scale_range
        check(0 < low <= high < math.inf, "scale_range", "two positive factors, the smaller first", self.scale_range)
        for name in ("brightness", "contrast", "saturation"):
            check(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        check(0 <= self.synthetic_hard <= 1, "synthetic_hard", "a share in [0, 1]", self.synthetic_hard)
        _check_seed(self.seed)

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) in pixels of training crops."""
        return self.input_size if self.crop_size == (0, 0) else self.crop_size


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A feature extractor.

    Attributes:
      name: one of `BACKBONES` (`resnet50` with output_stride 8 is the paper's DRN-50), or `keras_file`: a whole
        segmentation network of your own, saved by Keras; `exits.final_head` is not used then.
      width: channel multiplier of the networks in `WIDE`.
      output_stride: image size over feature size at the end; lost strides become dilation.
      weights: `none` (random), `imagenet` (download by keras.applications) or a file; of `keras_file`, the .keras file.
      batch_norm_momentum: of the moving statistics, in the backbone and in all heads.
      input_scale: the network resizes its image to this share of `data.input_size` before the first layer, its logits straight to the
        image's size: cheaper, and coarser. The scaled sides are rounded to multiples of 32, so that no stride meets an odd side and moves
        its features by half a pixel; 1 leaves the image as it is. The same weights fit every scale, and serve best near their own.
      output: of `keras_file`, which of several outputs is the map of classes: its key, or the name of any layer that makes such a map.
    """

    name: str = "mobilenet_v2"
    width: float = 1.0
    output_stride: int = 16
    weights: str = "none"
    batch_norm_momentum: float = 0.95
    input_scale: float = 1.0
    output: str = ""

    def __post_init__(self):
        names = (*BACKBONES, "keras_file")
        check(self.name in names, "name", f"one of {names}", self.name)
        is_file = self.name != "keras_file" or self.weights.endswith(".keras")
        check(is_file, "weights", "a .keras file with backbone.name=keras_file", self.weights)
        check(self.output_stride in (8, 16, 32), "output_stride", "8, 16 or 32", self.output_stride)
        check(
            self.width > 0 and (self.width == 1 or self.name in WIDE),
            "width",
            f"positive, and 1 unless one of {WIDE}",
            self.width,
        )
        check(0 < self.batch_norm_momentum < 1, "batch_norm_momentum", "in (0, 1)", self.batch_norm_momentum)
        check(0 < self.input_scale <= 4, "input_scale", "in (0, 4]", self.input_scale)
        check(not self.output or self.name == "keras_file", "output", "empty unless backbone.name=keras_file", self.output)


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """One point of the head space. Its name is the word used in files, tables and flags, e.g. `decoder-r4-b1-d2`.

    Attributes:
      kind: `fcn`, `deeplab` (ASPP), `decoder` (ASPP and a shallower tap), or `rest` (the rest of the original network at half the
        resolution, see `exits.build_rest`; it has none of the other knobs).
      reduction: the tap's channels are divided by this.
      blocks: extra trainable blocks.
      dilation: block j of 1..blocks is dilated by dilation**j; 1 without blocks, since there it means nothing.
    """

    kind: str = "fcn"
    reduction: int = 1
    blocks: int = 0
    dilation: int = 1

    def __post_init__(self):
        check(self.kind in ("fcn", "deeplab", "decoder", "rest"), "kind", "fcn, deeplab, decoder or rest", self.kind)
        check(self.reduction in (1, 2, 4, 8), "reduction", "1, 2, 4 or 8", self.reduction)
        check(self.blocks in (0, 1, 2, 3), "blocks", "0, 1, 2 or 3", self.blocks)
        check(self.dilation in ((1, 2, 4) if self.blocks else (1,)), "dilation", "1, 2 or 4, and 1 without blocks", self.dilation)
        plain = self.kind != "rest" or (self.reduction, self.blocks) == (1, 0)
        check(plain, "head", "without reduction and blocks if its kind is rest", (self.reduction, self.blocks))

    @property
    def name(self) -> str:
        if self.kind == "rest":
            return self.kind
        return f"{self.kind}-r{self.reduction}-b{self.blocks}" + (f"-d{self.dilation}" if self.blocks else "")

    @classmethod
    def parse(cls, name: str, where: str = "head") -> "HeadSpec":
        """Reads a name back; an unknown one raises a ValueError that begins with `where` and lists the nearest."""
        specs = {spec.name: spec for spec in (*HEAD_SPACE, HeadSpec("rest"))}
        if name not in specs:
            nearest = ", ".join(difflib.get_close_matches(name, specs, 3, 0))
            form = "KIND-rREDUCTION-bBLOCKS, with blocks also -dDILATION"
            raise ValueError(f"{where}: must be rest or {form}, such as {nearest}, got {name!r}")
        return specs[name]


# The heads that start from random weights. `rest`, which starts from the original's, is one more.
HEAD_SPACE = tuple(
    HeadSpec(kind, reduction, blocks, dilation)
    for kind in ("fcn", "deeplab", "decoder")
    for reduction in (1, 2, 4, 8)
    for blocks in (0, 1, 2, 3)
    for dilation in ((1, 2, 4) if blocks else (1,))
)


@dataclasses.dataclass(frozen=True)
class ExitsConfig:
    """The exits of a network.

    Attributes:
      count: number of exits, the final one included (the paper's N); early exits are put at equal workload.
      layers: names of the backbone's layers to put early exits at instead, shallow to deep; count means nothing then.
      final_head: the original network's own head; not `rest`.
      plain_head: the head of every early exit in stage 1.
      heads: the candidate heads of stage 2 at every exit point; empty for the whole space of 120.
    """

    count: int = 6
    layers: tuple[str, ...] = ()
    final_head: str = "decoder-r1-b0"
    plain_head: str = "decoder-r1-b0"
    heads: tuple[str, ...] = ()

    def __post_init__(self):
        check(self.count >= 2, "count", "at least 2", self.count)
        HeadSpec.parse(self.final_head, "final_head")
        HeadSpec.parse(self.plain_head, "plain_head")
        for name in self.heads:
            HeadSpec.parse(name, "heads")
        check(self.final_head != "rest", "final_head", "a head with weights of its own", self.final_head)

    @property
    def head_specs(self) -> tuple[HeadSpec, ...]:
        return tuple(HeadSpec.parse(name) for name in self.heads) or HEAD_SPACE


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
      trains: `network` (everything, batch-norm statistics too) or `heads` (the original network is frozen, statistics too).
      exits: which early exits a batch updates besides the final one: `round_robin` (exit dropout), `all` (joint deep supervision),
        `none` (plain training). With trains=`heads`: always all candidates.
      distillation: of early exits from the final one: `none`, `all` (everywhere) or `filtered` (where the final exit is right).
      teacher: file of `mess_tf.teacher` whose soft targets every exit learns from in place of the final exit; the final one too with
        trains=`network`. Empty: no such file.
      initial: weights to start from, checkpoints/STAGE/best.npz of another run of this network with the same first exits; heads that it
        lacks start anew. Empty for the weights that the network comes with.
      regions: with trains=`network`: whether the layers behind the early exits of a batch also learn to work at cells alone that such an
        exit is not sure of, and what they see of the others: `none` (they do not), or one of `network.regions.NEIGHBOURS`. The threshold of
        the confidence and the largest share of the cells are drawn for each batch. Batch normalisation keeps its moving statistics, so
        this goes on from a trained network (`initial`, or `region_warmup`), with a small learning rate.
      region_cell: side of a cell in pixels, rounded to whole positions of the map that the layers behind the exit work on.
      region_warmup: steps without regions at the start.
      alpha: weight of distillation against cross-entropy.
      temperature: of both softmaxes in distillation.
      epochs: 0 leaves the stage out, as for a network that comes trained.
      batch_size, learning_rate, final_learning_rate, power, momentum, weight_decay: SGD with Nesterov momentum, polynomial
        schedule, decoupled decay.
      label_smoothing: share of the target spread over all classes.
      class_weights: `none` or `sqrt_median_frequency`. Weights move the logits towards rare classes, further than is good for mIoU: the
        best evaluation's are moved back, as far as is best on the validation split.
      pixel_stride: the loss is taken on every n-th row and column of the full-resolution output, from a random first one each step.
      group_size: heads trained in one call with trains=`heads`; memory grows with this number, not with that of all heads.
      eval_epochs: epochs between evaluations on the validation split.
      checkpoint_steps: steps between checkpoints.
      precision: `float32`, `mixed_bfloat16`, or `mixed_float16` with losses scaled up so that small gradients are not lost.
      seed: of initial weights, batches and sampled pixels.
      jit_compile: whether XLA compiles the steps; on one replica only.
    """

    trains: Literal["network", "heads"] = "network"
    exits: Literal["round_robin", "all", "none"] = "round_robin"
    distillation: Literal["none", "all", "filtered"] = "none"
    teacher: str = ""
    initial: str = ""
    regions: Literal["none", "stale", "nearest", "zeros"] = "none"
    region_cell: int = 16
    region_warmup: int = 0
    alpha: float = 0.5
    temperature: float = 1.0
    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 0.05
    final_learning_rate: float = 1e-4
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "sqrt_median_frequency"] = "sqrt_median_frequency"
    pixel_stride: int = 2
    group_size: int = 8
    eval_epochs: int = 4
    checkpoint_steps: int = 100
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    seed: int = 0
    jit_compile: bool = False

    def __post_init__(self):
        for name, options in (
            ("trains", ("network", "heads")),
            ("exits", ("round_robin", "all", "none")),
            ("distillation", ("none", "all", "filtered")),
            ("regions", ("none", "stale", "nearest", "zeros")),
            ("class_weights", ("none", "sqrt_median_frequency")),
            ("precision", ("float32", "mixed_bfloat16", "mixed_float16")),
        ):
            check(getattr(self, name) in options, name, f"one of {options}", getattr(self, name))
        check(not self.teacher or self.distillation != "none", "teacher", "empty without distillation", self.teacher)
        check(self.epochs >= 0, "epochs", "at least 0", self.epochs)
        check(self.region_warmup >= 0, "region_warmup", "at least 0", self.region_warmup)
        early = self.trains == "network" and self.exits != "none"
        check(self.regions == "none" or early, "regions", "none where no network is trained with early exits", self.regions)
        for name in ("batch_size", "pixel_stride", "group_size", "eval_epochs", "checkpoint_steps", "region_cell"):
            check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("alpha", "label_smoothing", "momentum"):
            check(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        for name in ("temperature", "learning_rate"):
            check(0 < getattr(self, name) < math.inf, name, "positive and finite", getattr(self, name))
        for name in ("final_learning_rate", "power", "weight_decay"):
            check(0 <= getattr(self, name) < math.inf, name, "finite and at least 0", getattr(self, name))
        _check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run, as WORKDIR/config.json keeps it."""

    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    exits: ExitsConfig = ExitsConfig()
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig(trains="heads", distillation="filtered", pixel_stride=4)


# Twelve heads per exit point, all kinds, reductions and depths among them: the candidates of the quick recipes.
TWELVE_HEADS = (
    "fcn-r1-b0",
    "fcn-r1-b2-d2",
    "fcn-r2-b3-d2",
    "fcn-r4-b0",
    "deeplab-r1-b0",
    "deeplab-r1-b2-d2",
    "deeplab-r4-b0",
    "decoder-r1-b0",
    "decoder-r1-b1-d2",
    "decoder-r1-b3-d2",
    "decoder-r2-b2-d2",
    "decoder-r4-b0",
)

RECIPES = {
    "default": Config(),
    # Every command on a few tiny scenes: does it run here? Under a minute, and the masks mean nothing.
    "smoke": Config(
        data=DataConfig(input_size=(48, 64), synthetic_train=16, synthetic_val=8),
        backbone=BackboneConfig(width=0.35),
        exits=ExitsConfig(count=3, heads=("fcn-r2-b0", "decoder-r1-b0")),
        stage1=StageConfig(epochs=2, eval_epochs=2),
        stage2=StageConfig(trains="heads", distillation="filtered", epochs=1, eval_epochs=1),
    ),
    # `make demo`: synthetic streets at 96x128, a thin MobileNetV2 from scratch; minutes on 2 cores. Search with --max_drop_pp=0.
    # Exit 1 stands where the features are still fine (stride 4) but see little of the street (27 pixels): enough for the easy scenes,
    # where colours tell classes, and too little for the hard ones. Heads and original as in the paper: FCN and DeepLabV3, dilated backbone.
    "demo": Config(
        data=DataConfig(scale_range=(0.9, 1.2)),
        backbone=BackboneConfig(width=0.5, output_stride=8),
        exits=ExitsConfig(
            layers=("block_2_add", "block_13_project_BN"),
            final_head="deeplab-r1-b0",
            plain_head="fcn-r1-b0",
            heads=("fcn-r1-b0", "fcn-r1-b1-d1", "deeplab-r1-b0", "deeplab-r2-b0"),
        ),
        stage1=StageConfig(epochs=12, learning_rate=0.2, eval_epochs=6),
        stage2=StageConfig(trains="heads", distillation="filtered", epochs=3, learning_rate=0.1, pixel_stride=4, eval_epochs=3),
    ),
    # Photographs of objects, EfficientNet-Lite0 from ImageNet:
    # `--recipe=photos_lite0 --data_dir=DATA --set backbone.weights=FILE`.
    "photos_lite0": Config(
        data=DataConfig(source="folder", input_size=(256, 256), crop_size=(192, 192), scale_range=(0.5, 1.3), contrast=0.3, saturation=0.3),
        backbone=BackboneConfig(name="efficientnet_lite0"),
        exits=ExitsConfig(layers=("block4c_add", "block5c_add", "block6b_add"), heads=("decoder-r1-b0", "decoder-r4-b0", "rest")),
        stage1=StageConfig(distillation="filtered", epochs=12, eval_epochs=3, weight_decay=1e-4, class_weights="none"),
        stage2=StageConfig(
            trains="heads",
            distillation="filtered",
            epochs=4,
            learning_rate=0.02,
            eval_epochs=2,
            weight_decay=1e-4,
            class_weights="none",
        ),
    ),
    # 480x360 street scenes, 11 classes, EfficientNet-Lite0 from ImageNet:
    # `--recipe=camvid_lite0 --data_dir=CAMVID --set backbone.weights=FILE`.
    "camvid_lite0": Config(
        data=DataConfig(
            source="folder",
            input_size=(360, 480),
            crop_size=(288, 384),
            ignore_value=11,
            scale_range=(0.6, 2.0),
            contrast=0.3,
            saturation=0.3,
        ),
        backbone=BackboneConfig(name="efficientnet_lite0"),
        exits=ExitsConfig(layers=("block5a_project_bn", "block6b_add"), heads=TWELVE_HEADS),
        stage1=StageConfig(distillation="filtered", epochs=36, eval_epochs=6, weight_decay=1e-4),
        stage2=StageConfig(trains="heads", distillation="filtered", epochs=16, pixel_stride=4, eval_epochs=8),
    ),
    # The same scenes at 180x240, MobileNetV2 from scratch, all 120 heads at five exit points:
    # `--recipe=camvid_mobilenet_v2 --data_dir=CAMVID`.
    "camvid_mobilenet_v2": Config(
        data=DataConfig(source="folder", input_size=(180, 240), ignore_value=11, scale_range=(0.7, 1.6), contrast=0.3, saturation=0.3),
        stage1=StageConfig(distillation="filtered", epochs=120, eval_epochs=10, weight_decay=1e-4),
        stage2=StageConfig(trains="heads", distillation="filtered", epochs=4, pixel_stride=4, eval_epochs=4),
    ),
    # The next four are for GPUs, of the paper's size, and not run here to their end; docs/recipes.md holds their commands and times.
    # VOC 2012 with SBD's labels, 10,582 images: MobileNetV2 from ImageNet, a decoder as in DeepLabv3+. Others report 70.8 % for that
    # network (pytorch-deeplab-xception).
    "voc_mobilenet_v2": Config(
        data=DataConfig(source="voc", train_split="train_aug", input_size=(512, 512), resize="letterbox", scale_range=(0.5, 2.0)),
        backbone=BackboneConfig(weights="imagenet"),
        exits=ExitsConfig(heads=TWELVE_HEADS),
        stage1=StageConfig(distillation="filtered", epochs=60, batch_size=16, eval_epochs=5, weight_decay=1e-4, class_weights="none"),
        stage2=StageConfig(
            trains="heads", distillation="filtered", epochs=8, batch_size=16, pixel_stride=4, eval_epochs=4, class_weights="none"
        ),
    ),
    # The paper's network and data: DRN-50, which is ResNet-50 at output stride 8, with an FCN head, on COCO's objects of VOC's classes,
    # some 92,500 images; 5 early exits, all FCN and DeepLab heads. torchvision reports 60.5 % for that network, with crops of 480 pixels.
    "coco21_resnet50": Config(
        data=DataConfig(source="coco21", input_size=(512, 512), resize="letterbox", scale_range=(0.5, 2.0), brightness=0.0),
        backbone=BackboneConfig(name="resnet50", output_stride=8, weights="imagenet"),
        exits=ExitsConfig(
            final_head="fcn-r1-b0", plain_head="fcn-r1-b0", heads=tuple(spec.name for spec in HEAD_SPACE if spec.kind != "decoder")
        ),
        stage1=StageConfig(epochs=30, batch_size=32, learning_rate=0.02, eval_epochs=3, weight_decay=1e-4, class_weights="none"),
        stage2=StageConfig(
            trains="heads",
            distillation="filtered",
            epochs=3,
            batch_size=32,
            learning_rate=0.02,
            pixel_stride=4,
            eval_epochs=1,
            class_weights="none",
        ),
    ),
    # 2,975 street scenes at half of their size: EfficientNet-Lite0, with the exits of camvid_lite0. At the whole size others report 70.7 %
    # for MobileNetV2 (DeepLab's model zoo, trained on COCO before): expect less.
    "cityscapes_lite0": Config(
        data=DataConfig(
            source="cityscapes", input_size=(512, 1024), crop_size=(512, 512), scale_range=(0.5, 2.0), contrast=0.3, saturation=0.3
        ),
        backbone=BackboneConfig(name="efficientnet_lite0"),
        exits=ExitsConfig(layers=("block5a_project_bn", "block6b_add"), heads=TWELVE_HEADS),
        stage1=StageConfig(distillation="filtered", epochs=240, batch_size=16, eval_epochs=20, weight_decay=1e-4),
        stage2=StageConfig(trains="heads", distillation="filtered", epochs=40, batch_size=16, pixel_stride=4, eval_epochs=20),
    ),
    # 20,210 photos, 150 classes: MobileNetV3-Large from ImageNet. Others report 32.0 % for MobileNetV2 with a longest side of 257 pixels
    # (DeepLab's model zoo).
    "ade20k_mobilenet_v3": Config(
        data=DataConfig(source="ade20k", input_size=(512, 512), resize="letterbox", scale_range=(0.5, 2.0)),
        backbone=BackboneConfig(name="mobilenet_v3_large", weights="imagenet"),
        exits=ExitsConfig(count=4, heads=TWELVE_HEADS),
        stage1=StageConfig(
            distillation="filtered", epochs=64, batch_size=16, learning_rate=0.02, eval_epochs=8, weight_decay=1e-4, class_weights="none"
        ),
        stage2=StageConfig(
            trains="heads",
            distillation="filtered",
            epochs=8,
            batch_size=16,
            learning_rate=0.02,
            pixel_stride=4,
            eval_epochs=4,
            class_weights="none",
        ),
    ),
}


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Applies `section.field=value` strings, values in JSON (a bare word is a string).

    With another backbone, what was chosen for the first one and does not fit it goes: layers of exits, and a width that it does not have.

    Raises:
      ValueError: for an unknown section or field (the nearest names are listed) or a value of another type.
    """
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    documents = {name: dataclasses.asdict(section) for name, section in sections.items()}
    for override in overrides:
        path, separator, text = override.partition("=")
        section, _, field = path.partition(".")
        check(bool(separator and field), "--set", "section.field=value", override)
        _known(section, documents, "--set")
        _known(field, documents[section], f"--set {section}")
        try:
            documents[section][field] = json.loads(text)
        except json.JSONDecodeError:
            documents[section][field] = text
    given, backbone = {override.partition("=")[0] for override in overrides}, documents["backbone"]
    if backbone["name"] != config.backbone.name:
        if backbone["name"] not in WIDE and "backbone.width" not in given:
            backbone["width"] = BackboneConfig().width
        if "exits.layers" not in given:
            documents["exits"]["layers"] = ExitsConfig().layers
    return dataclasses.replace(config, **{name: _from_dict(type(sections[name]), documents[name], name) for name in sections})


def of_recipe(name: str, data: str, overrides: Sequence[str]) -> Config:
    """A recipe ('' is the default) with another data source, if that is not empty, and overrides.

    Raises:
      ValueError: there is no such recipe or override, or a value is not allowed; the nearest names are given.
    """
    _known(name or "default", RECIPES, "--recipe")
    config = RECIPES[name or "default"]
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=data))
    return apply_overrides(config, overrides)


def with_data_dir(config: Config, data_dir: str) -> Config:
    """The same configuration, with the data looked for elsewhere if `data_dir` is not empty.

    Raises:
      ValueError: the data are made up, and are nowhere.
    """
    check(not data_dir or config.data.source != "synthetic", "--data_dir", "left out with synthetic data", data_dir)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir)) if data_dir else config


def with_input_scale(config: Config, input_scale: float) -> Config:
    """The same configuration for a network at another input size; without crops, which were of the size that training saw."""
    data = dataclasses.replace(config.data, crop_size=(0, 0))
    return dataclasses.replace(config, data=data, backbone=dataclasses.replace(config.backbone, input_scale=input_scale))


def with_own_original(config: Config, workdir: str) -> Config:
    """The same configuration, with the work folder's copy of the user's network in the place of the file, once there is one."""
    copy = os.path.join(workdir, ORIGINAL)
    if config.backbone.name != "keras_file" or not os.path.exists(copy):
        return config
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=copy))


def to_json(config: Config) -> str:
    return json.dumps({"format": FORMAT} | dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str | bytes) -> Config:
    """Reads a configuration back; unknown or missing keys, other formats and values of another type raise a ValueError."""
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ValueError(f"config.json: must be JSON, got {error}") from error
    check(isinstance(document, dict), "config.json", "an object", document)
    received = document.pop("format", None)
    check(received == FORMAT, "config.json: format", str(FORMAT), received)
    if isinstance(document.get("data"), dict):
        document["data"] = _ADDED_TO_DATA | document["data"]
    for name in ("stage1", "stage2"):
        if isinstance(document.get(name), dict):
            document[name] = _ADDED_TO_STAGES | document[name]
    return _from_dict(Config, document, "config.json")


def load_config(workdir: str | os.PathLike) -> Config:
    """Reads WORKDIR/config.json; an error names it."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"workdir: must hold config.json, which `python -m mess_tf.train` makes, got {str(workdir)!r}")
    with open(path, "rb") as file:
        content = file.read()
    try:
        return from_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _known(name: str, names: Mapping[str, Any], where: str) -> None:
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 3, 0.3) or sorted(names)
        raise ValueError(f"{where}: must be a known name, nearest {nearest}, got {name!r}")


def _from_dict(cls: type, document: Any, where: str) -> Any:
    """Builds a dataclass from parsed JSON, checking names and types."""
    check(isinstance(document, dict), where, "an object", document)
    hints = typing.get_type_hints(cls)
    for name in document:
        _known(name, hints, where)
    missing = sorted(set(hints) - set(document))
    check(not missing, where, "complete", f"nothing for {missing}")
    values = {name: _value(hints[name], document[name], f"{where}.{name}") for name in hints}
    try:
        return cls(**values)
    except ValueError as error:  # begins with the field
        raise ValueError(f"{where}.{error}") from error


_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        kind = next((kind for kind in arguments if isinstance(value, typing.get_origin(kind) or kind)), arguments[0])
        return _value(kind, value, where)
    if origin is dict:
        check(isinstance(value, dict), where, "an object", value)
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        check(value in arguments, where, f"one of {arguments}", value)
        return value
    if origin is tuple:
        example = "[1,2]" if arguments[0] in (int, float) else '["a","b"]'
        check(isinstance(value, list | tuple), where, f"a list, written like {example}", value)
        variadic = arguments[-1] is Ellipsis
        check(variadic or len(value) == len(arguments), where, f"a list of {len(arguments)}", value)
        kinds = (arguments[0],) * len(value) if variadic else arguments
        return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if hint is float and type(value) is int:
        value = float(value)
    check(type(value) is hint, where, _KINDS[hint], value)
    return value
