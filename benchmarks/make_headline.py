"""The bundles that `headline.py` compares: the original network, and what the search chooses for each row, per precision.

`python benchmarks/make_headline.py --workdir W --original O --output B [--data_dir D] [--precisions fp32,int8] [--scales 1,0.75]` runs the
project's own commands on a trained WORKDIR, leaves out those whose files are there already, and writes B/PRECISION/:
  original/        the same network without early exits, from the WORKDIR O where it was trained plainly (`--set stage1.exits=none`);
                   its latency comes from W's submodels at the scale of O, which are made for that if `--scales` lacks it
  ROW.SETTING/     what the search chooses for each of `--rows` and `--settings`, one decision per image, beside its ROW.SETTING.json, the
                   best over all `--scales`
                   (`backbone.input_scale`, the weights of W for all of them). Rows: `no_loss` and `minus_1pp`: least latency at the
                   original's mIoU and one percentage point below; `equal_latency` and `share_X`: best mIoU at the original's latency
                   and at X of it
  ROW.regions/     the same with one decision per region, with `--regions`, at the first scale; not in int8
  anytime/         the best mean mIoU over the deadlines up to the original's latency, at the first scale
  exits.X/         the most accurate head of every exit at scale X, to be run alone
Everything is chosen on the calibration split (val), where the original's mIoU is measured on its bundle. The rows ask for `--margin_pp`
and `--margin_latency` more than their names say, so that they also hold on other images and days. A row without a folder has no
configuration that meets it; the search's words are printed.

Candidates and statistics lie in W/PRECISION-scaleX, the latencies of all scales, measured in turns, in W/PRECISION.latency.json: run it
on an idle machine.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from common import most_accurate, searched
from headline import BY_REGION, DROPS_PP, EQUAL_LATENCY, EXITS, ORIGINAL, ROWS

from mess_runtime.benchmark import LatencyTable
from mess_runtime.bundle import ANYTIME, BUDGETED, INPUT_DEPENDENT, Bundle, InputSpec, Predicted, read_json
from mess_tf import configs
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import WEIGHTS, calibration_images
from mess_tf.files import CANDIDATES, Configuration, Deployment, ExitChoice, Stats
from mess_tf.graph.conversion import FP32, INT8, PRECISIONS
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import FINAL, load_network
from mess_tf.network.regions import NEIGHBOURS
from mess_tf.optimise.space import arrival_costs, latency_costs
from mess_tf.region_candidates import NONE
from mess_tf.rescale import rescale
from mess_tf.search import table

SETTINGS = (INPUT_DEPENDENT, BUDGETED)


def command(*words: str) -> None:
    """Runs one of the project's commands."""
    print("$ python -m", *words, flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def prepare(precision: str, scale: float) -> Path:
    """The folder with candidates and statistics of a precision and an input scale; makes what is missing."""
    folder = Path(FLAGS.workdir) / f"{precision}-scale{scale:g}"
    if not folder.exists():
        rescale(Path(FLAGS.workdir), scale, folder)
    common = (f"--workdir={folder}", f"--data_dir={FLAGS.data_dir}")
    regions, chains = (f"--regions={NONE}",), ()
    if FLAGS.regions != NONE and precision != INT8 and scale == float(FLAGS.scales[0]):
        heads = ",".join(FLAGS.region_heads)
        regions = (f"--regions={FLAGS.regions}", f"--region_cell={FLAGS.region_cell}", f"--region_heads={heads}")
        regions += (f"--region_dense={','.join(FLAGS.region_dense)}",)
        chains = (f"--max_early={FLAGS.max_early}",)
    if not (folder / CANDIDATES / WEIGHTS).exists():
        command("mess_tf.export_tflite", *common, *regions, "--candidates", f"--precision={precision}")
    if not (folder / "stats.npz").exists():
        command("mess_tf.calibrate", *common, *regions, *chains)
    return folder


def constraint(row: str, original_miou: float, original_ms: float) -> str:
    """The flag of the search that a row stands for."""
    name, _, share = row.partition("_")
    if name == "share" or row == EQUAL_LATENCY:
        return f"--max_cost={original_ms * (float(share) if name == 'share' else 1.0) * (1 - FLAGS.margin_latency)}"
    if row not in DROPS_PP:
        raise app.UsageError(f"--rows: must be of {', '.join(ROWS)} and share_X, got {row!r}")
    return f"--min_miou={original_miou - (DROPS_PP[row] - FLAGS.margin_pp) / 100}"


def original_latency(folder: Path, latency: Path) -> float:
    """Milliseconds of the network without early exits, from the latencies of its submodels."""
    stats = Stats.load(folder / "stats.npz")
    rows = read_json(latency, LatencyTable.from_json).rows
    costs = latency_costs(stats, [dataclasses.asdict(row) for row in rows])
    return float(arrival_costs(stats, costs, [stats.candidates.index(FINAL)], None)[0])


def choose(folders: Sequence[Path], latency: Path, name: str, *words: str) -> tuple[int, Deployment] | None:
    """The best of what the search finds in each folder, and in which; None where it finds nothing."""
    found = [searched(folder, folder / f"{name}.json", f"--latency={latency}", *words) for folder in folders]
    found = [(at, deployment) for at, deployment in enumerate(found) if deployment]
    if not found:
        return None
    least = found[0][1].constraint.minimise is not None
    return min(found, key=lambda pair: pair[1].predicted.cost_mean if least else -pair[1].predicted.miou)


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config, plain = (configs.with_data_dir(configs.load_config(folder), FLAGS.data_dir) for folder in (FLAGS.workdir, FLAGS.original))
    examples = open_split(config.data, config.data.val_split)
    classes, size = examples.info.classes, config.data.input_size
    scales, spec = [float(scale) for scale in FLAGS.scales], InputSpec(*size, resize=config.data.resize)
    for row in FLAGS.rows:
        constraint(row, 1.0, 1.0)
    network, original = (load_network(path, each, len(classes)) for path, each in ((FLAGS.workdir, config), (FLAGS.original, plain)))
    shapes = [[weight.shape for weight in each.original.weights] for each in (network, original)]
    if shapes[0] != shapes[1] or plain.data.input_size != size:
        raise app.UsageError(f"--original: must be of the same network and input size as --workdir, got {FLAGS.original}")
    for precision in FLAGS.precisions:
        folders, whole = [prepare(precision, scale) for scale in scales], prepare(precision, plain.backbone.input_scale)
        latency = Path(FLAGS.workdir) / f"{precision}.latency.json"
        if not latency.exists():
            measured = [str(folder / CANDIDATES) for folder in dict.fromkeys([whole, *folders])]
            command("mess_runtime", "benchmark", *measured, f"--output={latency}", f"--threads={FLAGS.threads}", "--rounds=10")
        networks = [load_network(str(folder), configs.load_config(str(folder)), len(classes)) for folder in folders]
        samples = calibration_images(config) if precision == INT8 else ()
        exporters = [Exporter(network, size, precision=precision, samples=samples) for network in networks]
        output = Path(FLAGS.output) / precision
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)

        def export(name: str, configuration: Configuration, predicted: Predicted | None, exporter: Exporter, output=output) -> Bundle:
            exporter.bundle(output / name, configuration, predicted, classes, spec, examples)
            print(output / name, flush=True)
            return Bundle.load(output / name)

        alone = Configuration(BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
        bundle = export(ORIGINAL, alone, None, Exporter(original, size, precision=precision, samples=samples))
        reached, milliseconds = bundle.manifest.segments[-1].miou, original_latency(whole, latency)
        asked = {setting: (f"--setting={setting}", "--decide=image") for setting in FLAGS.settings}
        if FLAGS.regions != NONE and precision != INT8:
            asked[BY_REGION] = (f"--setting={INPUT_DEPENDENT}", "--decide=regions")
        wanted = {f"{row}.{kind}": (*words, constraint(row, reached, milliseconds)) for row in FLAGS.rows for kind, words in asked.items()}
        if FLAGS.anytime:
            wanted[ANYTIME] = (f"--setting={ANYTIME}", "--decide=image", f"--max_cost={milliseconds}")
        for name, words in wanted.items():
            searching = folders[:1] if name.endswith((ANYTIME, BY_REGION)) else folders
            if chosen := choose(searching, latency, name, *words):
                at, deployment = chosen
                deployment.save(output / f"{name}.json")
                print(f"{name}, scale {scales[at]:g}: {table(deployment)}")
                export(name, deployment, deployment.predicted.in_manifest(), exporters[at])
        if FLAGS.exits:
            for folder, scale, exporter in zip(folders, scales, exporters, strict=True):
                best = most_accurate(Stats.load(folder / "stats.npz"))
                export(f"{EXITS}.{scale:g}", Configuration(ANYTIME, False, tuple(best), 1.0), None, exporter)
    print(FLAGS.output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("original", None, "folder of the plain training", required=True)
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_list("precisions", [FP32, INT8], f"of {', '.join(PRECISIONS)}")
    flags.DEFINE_list("scales", ["1", "0.75"], "of the input inside the network")
    flags.DEFINE_list("rows", ["no_loss", "minus_1pp", "equal_latency", "share_0.3", "share_0.45", "share_0.6", "share_0.8"], "see above")
    flags.DEFINE_list("settings", list(SETTINGS), "of the rows")
    flags.register_validator("settings", lambda given: {*given} <= {*SETTINGS}, f"must be of {', '.join(SETTINGS)}")
    flags.DEFINE_enum("regions", NONE, [NONE, *NEIGHBOURS], "what regions see of those that left; none: no regions")
    flags.DEFINE_integer("region_cell", 32, "side of a region in pixels", lower_bound=1)
    flags.DEFINE_list("region_heads", [], "EXIT.HEAD of one per exit; default: every exit with the plain head")
    flags.DEFINE_list("region_dense", [], "exits that the whole image goes on to")
    flags.DEFINE_integer("max_early", 1, "largest number of early exits with regions", lower_bound=1, upper_bound=2)
    flags.DEFINE_bool("anytime", True, "write anytime/")
    flags.DEFINE_bool("exits", True, "write exits/")
    flags.DEFINE_float("margin_pp", 0.1, "percentage points of mIoU above what a row asks for")
    flags.DEFINE_float("margin_latency", 0.02, "share of the latency that a row leaves unused")
    flags.DEFINE_integer("threads", 1, "interpreter threads of the latencies")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
