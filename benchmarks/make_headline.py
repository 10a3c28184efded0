"""The bundles that `headline.py` compares: the original network, and what the search chooses for each row, per precision.

`python benchmarks/make_headline.py --workdir W --original O --output B [--data_dir D] [--precisions fp32,int8]` runs the project's own
commands on a trained WORKDIR, leaves out those whose files are there already, and writes B/PRECISION/:
  original/        the same network without early exits, from the WORKDIR O where it was trained plainly (`--set stage1.exits=none`)
  ROW.SETTING/     what the search chooses for each of `--rows` and `--settings`, beside its ROW.SETTING.json. Rows: `no_loss` and
                   `minus_1pp`: least latency at the original's mIoU and one percentage point below; `equal_latency` and `share_X`: best
                   mIoU at the original's latency and at X of it
  anytime/         the best mean mIoU over the deadlines up to the original's latency
  exits/           the most accurate head of every exit, to be run alone
Everything is chosen on the calibration split (val), where the original's mIoU is measured on its bundle. The rows ask for `--margin_pp`
and `--margin_latency` more than their names say, so that they also hold on other images and days. A row without a folder has no
configuration that meets it; the search's words are printed.

Candidates, statistics and latencies lie in W for fp32, in W/PRECISION for the others; the latencies are those of an idle machine only
if `python -m mess_runtime benchmark DIR/candidates --output=DIR/latency.json` was run on one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from absl import app, flags, logging
from common import most_accurate, searched
from headline import DROPS_PP, EQUAL_LATENCY, EXITS, ORIGINAL, ROWS

from mess_runtime.bundle import ANYTIME, BUDGETED, INPUT_DEPENDENT, Bundle, Cost, Predicted
from mess_tf import configs
from mess_tf.data import open_split
from mess_tf.export_tflite import CANDIDATES, FP32, INT8, PRECISIONS, Exporter, calibration_images
from mess_tf.files import Configuration, ExitChoice, Stats
from mess_tf.model import FINAL, load_network
from mess_tf.search import table

SETTINGS = (INPUT_DEPENDENT, BUDGETED)


def command(*words: str) -> None:
    """Runs one of the project's commands."""
    print("$ python -m", *words, flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def prepare(precision: str) -> Path:
    """The folder with candidates, statistics and latencies of a precision; makes what is missing."""
    workdir = Path(FLAGS.workdir)
    folder = workdir if precision == FP32 else workdir / precision
    if folder != workdir:
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "checkpoints"):
            if not (folder / name).exists():
                (folder / name).symlink_to(Path("..") / name)
    common = (f"--workdir={folder}", f"--data_dir={FLAGS.data_dir}")
    if not (folder / CANDIDATES).exists():
        command("mess_tf.export_tflite", *common, "--candidates", f"--precision={precision}")
    if not (folder / "stats.npz").exists():
        command("mess_tf.calibrate", *common)
    if not (folder / "latency.json").exists():
        threads = f"--threads={FLAGS.threads}"
        command("mess_runtime", "benchmark", str(folder / CANDIDATES), f"--output={folder / 'latency.json'}", threads)
    return folder


def constraint(row: str, original_miou: float) -> str:
    """The flag of the search that a row stands for."""
    name, _, share = row.partition("_")
    if name == "share" or row == EQUAL_LATENCY:
        return f"--cost_share={(float(share) if name == 'share' else 1.0) * (1 - FLAGS.margin_latency)}"
    if row not in DROPS_PP:
        raise app.UsageError(f"--rows: must be of {', '.join(ROWS)} and share_X, got {row!r}")
    return f"--min_miou={original_miou - (DROPS_PP[row] - FLAGS.margin_pp) / 100}"


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config, plain = (configs.with_data_dir(configs.load_config(folder), FLAGS.data_dir) for folder in (FLAGS.workdir, FLAGS.original))
    examples = open_split(config.data, config.data.val_split)
    classes, size = examples.info.classes, config.data.input_size
    network, original = (load_network(path, each, len(classes)) for path, each in ((FLAGS.workdir, config), (FLAGS.original, plain)))
    shapes = [[weight.shape for weight in each.original.weights] for each in (network, original)]
    if shapes[0] != shapes[1] or plain.data.input_size != size:
        raise app.UsageError(f"--original: must be of the same network and input size as --workdir, got {FLAGS.original}")
    for precision in FLAGS.precisions:
        folder = prepare(precision)
        samples = calibration_images(config) if precision == INT8 else ()
        output = Path(FLAGS.output) / precision
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)

        def export(name: str, configuration: Configuration, predicted: Predicted | None, exporter: Exporter, output=output) -> Bundle:
            exporter.bundle(output / name, configuration, predicted, classes, examples=examples)
            print(output / name, flush=True)
            return Bundle.load(output / name)

        alone = Configuration(BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
        bundle = export(ORIGINAL, alone, None, Exporter(original, size, precision=precision, samples=samples))
        reached = bundle.manifest.segments[-1].miou
        wanted = {f"{row}.{setting}": (setting, constraint(row, reached)) for row in FLAGS.rows for setting in FLAGS.settings}
        if FLAGS.anytime:
            wanted[ANYTIME] = (ANYTIME, "--cost_share=1")
        exporter = Exporter(network, size, precision=precision, samples=samples)
        for name, (setting, flag) in wanted.items():
            words = (f"--latency={folder / 'latency.json'}", f"--setting={setting}", flag)
            if deployment := searched(folder, output / f"{name}.json", *words):
                print(f"{name}: {table(deployment)}")
                cost = Cost(deployment.predicted.cost_name, deployment.predicted.cost_mean)
                export(name, deployment, Predicted(deployment.predicted.miou, cost), exporter)
        if FLAGS.exits:
            best = most_accurate(Stats.load(folder / "stats.npz"))
            export(EXITS, Configuration(ANYTIME, False, tuple(best), 1.0), None, exporter)
    print(FLAGS.output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("original", None, "folder of the plain training", required=True)
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_list("precisions", [FP32, INT8], f"of {', '.join(PRECISIONS)}")
    flags.DEFINE_list("rows", ["no_loss", "minus_1pp", "equal_latency", "share_0.3", "share_0.45", "share_0.6", "share_0.8"], "see above")
    flags.DEFINE_list("settings", list(SETTINGS), "of the rows")
    flags.DEFINE_bool("anytime", True, "write anytime/")
    flags.DEFINE_bool("exits", True, "write exits/")
    flags.DEFINE_float("margin_pp", 0.1, "percentage points of mIoU above what a row asks for")
    flags.DEFINE_float("margin_latency", 0.02, "share of the latency that a row leaves unused")
    flags.DEFINE_integer("threads", 1, "interpreter threads of the latencies")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
