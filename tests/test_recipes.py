"""The recipes for data of others, each from its data set in its own layout to a deployment, small."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_datasets import coco_config, coco_document, filled, make_ade20k, make_cityscapes, write

from mess_tf import calibrate, search, train
from mess_tf.configs import RECIPES, Config
from mess_tf.files import Asked, Deployment, Stats

SMALL = (
    *("backbone.weights=none", "data.input_size=[64, 64]", "data.crop_size=[0, 0]", 'exits.heads=["fcn-r8-b0"]'),
    *(f"{stage}.{value}" for stage in ("stage1", "stage2") for value in ("epochs=1", "batch_size=2", "eval_epochs=1")),
)


def make_voc(root: Path) -> None:
    """SBD's labels lie beside VOC's own; a list of `train_aug` holds paths."""
    year, shape = root / "VOCdevkit" / "VOC2012", (375, 500)
    for name in ("2007_000032", "2008_000002", "2007_000033"):
        write(year / "JPEGImages" / f"{name}.jpg", np.zeros((*shape, 3), np.uint8))
        folder = "SegmentationClassAug" if name.startswith("2008") else "SegmentationClass"
        write(year / folder / f"{name}.png", filled(shape, 0, 1, 15, 255))
    lists = year / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    names = (("/JPEGImages/2007_000032.jpg", "/SegmentationClass/2007_000032.png"),)
    names += (("/JPEGImages/2008_000002.jpg", "/SegmentationClassAug/2008_000002.png"),)
    (lists / "train_aug.txt").write_text("".join(f"{image} {label}\n" for image, label in names))
    (lists / "val.txt").write_text("2007_000033\n")


def make_coco(root: Path) -> None:
    for split in ("train2017", "val2017"):
        coco_config(root, coco_document(), split)


def make_photos(root: Path) -> None:
    for split in ("train", "train", "val"):
        name, shape = f"{len([*root.rglob('*.jpg')])}", (60, 80)
        write(root / split / "images" / f"{name}.jpg", np.zeros((*shape, 3), np.uint8))
        write(root / split / "labels" / f"{name}.png", filled(shape, 0, 1, 2, 255))
    (root / "classes.txt").write_text("background\ncat\ndog\n")


# With fewer exits than the recipe, or none fewer where it names their layers.
DATA: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "voc_mobilenet_v2": (make_voc, ("exits.count=2", "backbone.width=0.35")),
    "coco21_resnet50": (make_coco, ("exits.count=2",)),
    "cityscapes_lite0": (functools.partial(make_cityscapes, shape=(128, 256)), ()),
    "ade20k_mobilenet_v3": (make_ade20k, ("exits.count=2",)),
    "photos_lite0": (make_photos, ()),
}
PAPERS_SIZE = [name for name in DATA if name != "photos_lite0"]


IMAGES = {
    "voc_mobilenet_v2": {"train": 2, "val": 1},
    "coco21_resnet50": {"train": 1, "val": 3},
    "cityscapes_lite0": {"train": 2, "val": 1},
    "ade20k_mobilenet_v3": {"train": 2, "val": 2},
    "photos_lite0": {"train": 2, "val": 1},
}
CLASSES = {"folder": 3, "voc": 21, "coco21": 21, "cityscapes": 19, "ade20k": 150}


@pytest.fixture
def small(tmp_path) -> Callable[[str], Config]:
    """The configuration of a recipe, small, and its data."""

    def of(name: str) -> Config:
        make, overrides = DATA[name]
        make(tmp_path / "data")
        return train.resolve_config(str(tmp_path / "work"), name, "", str(tmp_path / "data"), [*SMALL, *overrides])

    return of


@pytest.mark.parametrize("name", DATA)
def test_a_recipe_gets_ready_to_train_on_its_data(name, small, tmp_path):
    config = small(name)
    network, data = train.prepare(config, str(tmp_path / "work"), "both")
    assert {split: len(examples) for split, examples in data.items()} == IMAGES[name]
    assert network.num_classes == data["val"].info.num_classes == CLASSES[config.data.source]
    exits = [f"exit{k}.{config.exits.plain_head}" for k in range(1, 1 + len(config.exits.layers or "1"))]
    assert network.candidates == [*exits, "final.original"]


@pytest.mark.full
@pytest.mark.parametrize("name", DATA)
def test_a_recipe_runs_from_its_data_to_a_deployment(name, small, tmp_path):
    workdir, config = tmp_path / "work", small(name)
    train.run(workdir, config)
    (path,) = calibrate.run(str(workdir), theta_pix=(0.5, 0.9))
    stats = Stats.load(path)
    assert stats.candidates == (*(f"exit{k}.fcn-r8-b0" for k in range(1, 1 + len(config.exits.layers or "1"))), "final.original")
    assert len(stats.classes) == CLASSES[config.data.source]
    search.run(workdir, Asked(min_miou=0.0))
    assert Deployment.load(workdir / "deployment.json").exits


def test_recipes_of_the_papers_size_have_commands_and_hyperparameters():
    """What the page says of each stands in its configuration."""
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    for name in PAPERS_SIZE:
        config = RECIPES[name]
        assert f"--recipe={name} " in page
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | {config.backbone.name}"))
        height, width = config.data.input_size
        assert (
            f"{height}×{width}" in row
            and f"{config.stage1.epochs} + {config.stage2.epochs}" in row
            and f"| {config.stage1.batch_size} |" in row
        )
