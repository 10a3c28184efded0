"""The recipes of the paper's size and the page that describes them."""

from pathlib import Path

from mess_tf.configs import RECIPES

NAMES = ("voc_mobilenet_v2", "coco21_resnet50", "cityscapes_lite0", "ade20k_mobilenet_v3")


def test_recipes_of_the_papers_size_have_commands_and_hyperparameters():
    """What the page says of each stands in its configuration."""
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    for name in NAMES:
        config = RECIPES[name]
        assert f"--recipe={name} " in page
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | {config.backbone.name}"))
        height, width = config.data.input_size
        assert (
            f"{height}×{width}" in row
            and f"{config.stage1.epochs} + {config.stage2.epochs}" in row
            and f"| {config.stage1.batch_size} |" in row
        )
