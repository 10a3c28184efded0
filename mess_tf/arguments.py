"""Flags that several commands share, and what they ask for, read without TensorFlow: see `terminal.run`."""

import dataclasses
import math
import os
from collections.abc import Sequence

from absl import flags

from mess_runtime.bundle import BUDGETED, INPUT_DEPENDENT, NEIGHBOURS, SETTINGS, check
from mess_tf import configs, terminal
from mess_tf.files import COSTS, DECIDES, RISKS, Asked, trained_weights

TARGETS = ("web", "mediapipe", "android")  # modules of `mess_tf.targets`
CONSTRAINTS = ("min_miou", "max_drop_pp", "max_cost", "cost_share")


# === Networks ===


def define_network_flags() -> None:
    """Defines the flags of every command that may load a network of custom classes; see `originals.allow_flags`."""
    flags.DEFINE_multi_string("import", [], "module to import first, which registers the custom classes of a .keras file")
    flags.DEFINE_bool(
        "unsafe_loading", False, "run the Python code that a .keras file carries in Lambda layers; only for files that you trust"
    )


def _check_network_flags(*trainings: configs.Config) -> None:
    needless = all(config.backbone.name != "keras_file" for config in trainings)
    terminal.check_left_out(needless, "import unsafe_loading", "without backbone.name=keras_file")


# === Work folders and their data ===


def check_trained(*workdirs: str) -> None:
    """Checks folders of trainings, by default --workdir, and what the flags say of their networks and of the data of the first.

    Raises:
      FileNotFoundError, ValueError: one is not trained, or a flag is wrong.
    """
    workdirs = workdirs or (flags.FLAGS.workdir,)
    trainings = [configs.load_config(workdir) for workdir in workdirs]
    _check_network_flags(*trainings)
    _check_data_dir(trainings[0])
    for workdir in workdirs:
        trained_weights(workdir)


def _check_data_dir(config: configs.Config, needed: bool = True) -> None:
    """`needed`: whether the data are needed although --data_dir does not name them."""
    data = configs.with_data_dir(config, flags.FLAGS.data_dir).data
    there = data.source not in configs.FILE_SOURCES or os.path.isdir(data.data_dir)
    check(there or not (needed or flags.FLAGS.data_dir), "--data_dir", f"the existing root folder of {data.source!r} data", data.data_dir)


# === Training ===


def define_training_flags() -> None:
    """Defines the flags that say what to train on what."""
    flags.DEFINE_string("workdir", None, "folder for everything that this run makes", required=True)
    flags.DEFINE_string("recipe", "", f"one of {sorted(configs.RECIPES)}")
    flags.DEFINE_string("data", "", f"data source, in place of the recipe's: synthetic, {', '.join(configs.FILE_SOURCES)} or tfds:NAME")
    flags.DEFINE_string("data_dir", "", "root folder of the data")
    flags.DEFINE_multi_string("set", [], "section.field=value, e.g. stage1.epochs=30; may be given several times")


def check_training() -> None:
    """Raises ValueError where the flags of `define_training_flags` ask for no configuration, or for data that are not there."""
    values = flags.FLAGS
    config = configs.of_recipe(values.recipe, values.data, values.set)
    if not (values.recipe or values.data or values.set) and os.path.exists(os.path.join(values.workdir, "config.json")):
        config = configs.load_config(values.workdir)
    _check_network_flags(config)
    _check_data_dir(config, not os.path.isdir(os.path.join(values.workdir, "checkpoints")))  # what is trained needs them no more


# === Regions ===


def define_region_flags() -> None:
    """Defines the flags that say which pairs of exits regions can take."""
    flags.DEFINE_enum(
        "regions", None, ["none", *NEIGHBOURS], "what regions see of those that left; default: stage1.regions of the training"
    )
    flags.DEFINE_integer("region_cell", None, "side of a region in pixels; default: stage1.region_cell of the training", lower_bound=1)
    flags.DEFINE_list("region_heads", [], "EXIT.HEAD of one per exit; default: every exit with the plain head")
    flags.DEFINE_list("region_dense", [], "exits that the whole image goes on to: the layers before them were not trained for regions")


# === Search ===


def check_latency() -> None:
    """Raises ValueError where --latency names something else than a latency.json."""
    if flags.FLAGS.latency:
        from mess_runtime.benchmark import LatencyTable  # needs an interpreter

        LatencyTable.load(flags.FLAGS.latency)


def define_question_flags() -> None:
    """Defines the flags that say what to search for."""
    flags.DEFINE_string("device", None, "Whose latencies count, where the file has several devices.")
    flags.DEFINE_integer("threads", None, "Latencies at how many threads count, where the file has several.")
    flags.DEFINE_list("backends", [], "Of which the best is taken, such as xnnpack,gpu; default: all that the device was measured on.")
    flags.DEFINE_list(
        "precisions", [], "Of which the best is taken, such as fp16,int8, each with stats.PRECISION.npz; default: what stats.npz is of."
    )
    flags.DEFINE_enum(
        "decide",
        None,
        DECIDES,
        "Who decides where to leave: the image, its regions each for itself, or the best of both; default: best with a regions.npz.",
    )
    flags.DEFINE_list(
        "min_miou",
        None,
        "Least cost with at least this mIoU, 0..1. Of this and the next three one is given; several values, with commas, make a table.",
    )
    flags.DEFINE_list("max_drop_pp", None, "Least cost with an mIoU at most so many percentage points below the original's.")
    flags.DEFINE_list("max_cost", None, "Best mIoU with at most this mean cost, in MACs or ms.")
    flags.DEFINE_list("cost_share", None, "Best mIoU with at most this share of the original's cost.")
    flags.DEFINE_multi_string(
        "limit", [], f"Further limits, NAME=NUMBER: {', '.join(COSTS)}; means or p90 of the images, memory the most alive at once."
    )
    flags.DEFINE_string("minimise", None, "Cost that is minimised with --min_miou or --max_drop_pp; default: the mean cost of an image.")
    flags.DEFINE_enum("setting", INPUT_DEPENDENT, SETTINGS, "How the network will run.")
    flags.DEFINE_integer("max_early_exits", 2, "Largest number of exits in front of the last one.", lower_bound=0)
    flags.DEFINE_integer(
        "quantiles", None, "Values of theta_img per exit and theta_pix where several early exits decide; default: all.", lower_bound=2
    )
    flags.DEFINE_float("time_limit", 600.0, "Seconds after which the best found is taken, with a proven bound.")
    flags.DEFINE_float("check_share", None, "Share of the images that have no part in choosing; the predictions are of them.")
    flags.DEFINE_float("max_risk", None, "Least cost with a risk of at most this, guaranteed with --confidence; see --risk.")
    flags.DEFINE_float("confidence", 0.95, "Of the guarantee, for images drawn like those of the calibration.")
    flags.DEFINE_enum(
        "risk", "labels", RISKS, "final: share of pixels that differ from the original's; labels: pixel accuracy lost against it."
    )


def _limits(limits: Sequence[str]) -> dict[str, float]:
    """NAME=NUMBER, several."""
    result = {}
    for text in limits:
        name, _, number = text.partition("=")
        check(name not in result, "limit", f"given once for {name}", list(limits))
        try:
            result[name] = float(number)
        except ValueError:
            raise ValueError(f"limit: must be NAME=NUMBER, got {text!r}") from None
        check(0 < result[name] < math.inf, f"limit: {name}", "above 0 and finite", number)
    return result


def questions() -> list[Asked]:
    """What the flags of `define_question_flags` ask for; several where a constraint has several values."""
    values = flags.FLAGS
    terminal.check_left_out(values.max_risk is None, "confidence risk", "without --max_risk")
    terminal.check_left_out(values.max_risk is not None, "minimise setting", "with --max_risk")
    terminal.check_left_out(values.setting == BUDGETED, "max_early_exits", f"with --setting={BUDGETED}")
    terminal.check_left_out(values.setting != INPUT_DEPENDENT, "quantiles", f"with --setting={values.setting}")
    given = [(name, value) for name in CONSTRAINTS for value in terminal.numbers(name)]
    names = [*dict(given)]
    check(len(names) <= 1, "constraint", f"one of {', '.join(CONSTRAINTS)}", names)
    if values.max_risk is not None:
        check(not given, "max_risk", "given for one device, without another constraint", given)
        given = [("max_risk", values.max_risk)]
    others = [field.name for field in dataclasses.fields(Asked) if field.name not in (*CONSTRAINTS, "max_risk", "limits")]
    common = {name: values[name].value for name in others} | {"limits": _limits(values.limit)}
    common |= {name: tuple(values[name].value) for name in ("backends", "precisions")}
    return [Asked(**{name: value}, **common) for name, value in given] or [Asked(**common)]
