"""A trained network at another input size: `python -m mess_tf.rescale --workdir=W --input_scale=0.75 --output=W0.75`.

The new work folder has the weights of W and its copy of the user's own network, by symbolic links, and `backbone.input_scale`; all that
follows training is done in it as in W.
Which size is best for a device is then a matter of searching each folder with the same --min_miou or --max_cost.
"""

from absl import flags

from mess_tf import configs, terminal
from mess_tf.files import trained_weights


def check_flags() -> None:
    """Raises FileNotFoundError, ValueError where --workdir is not trained."""
    configs.load_config(flags.FLAGS.workdir)
    trained_weights(flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_float("input_scale", None, "share of the input size", required=True)
    flags.DEFINE_string("output", None, "folder to make", required=True)
    terminal.run("mess_tf.rescale", __doc__, check_flags)

import os
from pathlib import Path

from mess_runtime.bundle import check, check_writable
from mess_runtime.files import write_atomically

FLAGS = flags.FLAGS
CHECKPOINTS = "checkpoints"


def rescale(workdir: Path, input_scale: float, output: Path) -> None:
    """Makes a work folder with the weights of another.

    Args:
      workdir: of a training.
      input_scale: share of the input size at which the network works, see `configs.BackboneConfig`.
      output: the new folder.

    Raises:
      FileNotFoundError: nothing was trained in `workdir`.
      ValueError: `output` exists, or the scale is out of range.
    """
    config = configs.load_config(str(workdir))
    rescaled = configs.with_input_scale(config, input_scale)
    trained_weights(workdir)
    check(not output.exists(), "output", "a folder that does not exist yet", str(output))
    check_writable("output", output, folder=True)
    output.mkdir(parents=True)
    for name in (CHECKPOINTS, configs.ORIGINAL):
        if (workdir / name).exists():
            (output / name).symlink_to(os.path.relpath(workdir / name, output))
    write_atomically(output / "config.json", lambda temporary: temporary.write_text(configs.to_json(rescaled)))


def main() -> None:
    rescale(Path(FLAGS.workdir), FLAGS.input_scale, Path(FLAGS.output))
    print(FLAGS.output)
