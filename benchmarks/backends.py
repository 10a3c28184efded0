"""Bundles against backends in the runtimes people have: is every output that of the CPU? `mess_runtime verify`, file by file and version by
version, each version in an environment of its own (`.ci/run` makes them in .venv-runtimes).

The last line of the output is JSON: `wrong`, how many pairs of bundle and runtime differ beyond the file's precision or do not run, and
`rows`, a report of `mess_runtime verify` for each.

    python benchmarks/backends.py --bundles=models/camvid_lite0/int8/minus_1pp.input-dependent --images=photo.jpg --pythons=.venv/bin/python
"""

import json
import os
import subprocess
from pathlib import Path

from absl import app, flags

import mess_runtime
from mess_runtime.engines import BACKENDS, GPU


def report(python: str, bundle: str) -> dict:
    """What `mess_runtime verify` says of a bundle in an environment, {"error": line} where it says nothing."""
    words = [python, "-m", "mess_runtime", "verify", bundle, *FLAGS.images, f"--backend={FLAGS.backend}", f"--runs={FLAGS.runs}"]
    environment = os.environ | {"PYTHONPATH": str(Path(mess_runtime.__file__).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {"error": done.stderr.strip().splitlines()[-1], "ok": False}


def cell(row: dict) -> str:
    """Share of the pixels that differ, of the mask where it is largest, and what failed."""
    if "error" in row:
        return row["error"]
    if not row["differences"]:
        return f"does not run: {row['faults'][-1]}"
    masks = [each["worst"] for each in row["differences"] if each["output"].endswith("mask")]
    text = f"{100 * max(masks):.2f} %" + (f", decisions {row['decisions']} of {row['images']}" if row["decisions"] is not None else "")
    text += "" if row["accelerated"] == 1 else f", {100 * row['accelerated']:.0f} % accelerated"
    return text + ("" if row["ok"] else " **wrong**")


def main(argv) -> None:
    del argv
    rows = {}
    for bundle in FLAGS.bundles:
        for python in FLAGS.pythons:
            rows[bundle, python] = report(python, bundle)
            print(f"{bundle} {rows[bundle, python].get('runtime', python)}: {cell(rows[bundle, python])}", flush=True)
    runtimes = [
        next((rows[bundle, python]["runtime"] for bundle in FLAGS.bundles if "runtime" in rows[bundle, python]), python)
        for python in FLAGS.pythons
    ]
    print("\n| bundle | " + " | ".join(runtimes) + " |\n" + "|---" * (1 + len(runtimes)) + "|")
    for bundle in FLAGS.bundles:
        print(f"| {bundle} | " + " | ".join(cell(rows[bundle, python]) for python in FLAGS.pythons) + " |")
    wrong = sum(not row["ok"] for row in rows.values())
    print(json.dumps({"wrong": wrong, "rows": [{"bundle": key[0], **row} for key, row in rows.items()]}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_list("bundles", None, "folders", required=True)
    flags.DEFINE_list("images", [], "files; images/NAME.jpg may have labels/NAME.png; default: noise")
    flags.DEFINE_list("pythons", None, "of the environments, one of each runtime", required=True)
    flags.DEFINE_enum("backend", GPU, BACKENDS, "to run on")
    flags.DEFINE_integer("runs", 3, "of the first image")
    app.run(main)
