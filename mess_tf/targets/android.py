"""A bundle for Android apps, to lie among their assets: what LiteRT's CompiledModel in Kotlin runs, and the names that it does not tell.

`tflite/examples/android` is an app that runs it.
"""

from pathlib import Path

from mess_runtime import bundle as bundles
from mess_runtime.files import replace_folder
from mess_tf.targets import check_output, write_segments

SIGNATURES = "signatures.json"


def write(bundle: bundles.Bundle, output: Path) -> None:
    """Writes the folder; an earlier one is replaced as a whole.

    Args:
      bundle: to run. Of its signatures only the segments are kept, since LiteRT compiles all of a file.
      output: a folder that is new, empty, or was written by this function. It gets a bundle, which `mess_runtime` runs too, and
        `signatures.json`: by signature the names of inputs and outputs.

    Raises:
      ValueError: the output is something else, or see `write_segments`.
    """
    check(output)

    def fill(folder: Path) -> None:
        graphs = write_segments(bundle, folder)
        names = {name: {"inputs": list(graph.inputs), "outputs": list(graph.outputs)} for name, graph in graphs.items()}
        bundles.write_json(folder / SIGNATURES, names)

    replace_folder(output, fill)


def check(output: Path) -> None:
    """Raises what `write` would raise of its argument."""
    check_output(output, SIGNATURES)
