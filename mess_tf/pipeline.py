"""From images to a bundle in one command: train, export the candidates, calibrate, measure, search, export the bundle, report.

`python -m mess_tf.pipeline --workdir=W --recipe=R [--data=S] [--data_dir=D] CONSTRAINT [--set section.field=value ...]
[--latency=FILE | --android]` calls what the commands of these names call, in this order, and prints what the search promises, where the
report is, and the command that runs the bundle.

What is there and made from what is there now is left as it is, so that the same command goes on where it was stopped, and with another
constraint does only what depends on it. What that means is said by hashes in the files, never by times:

* train: WORKDIR/training.json: of the configuration and of the files that it names; all stages have ended; data.json: of the data
* candidates: candidates/weights.sha256: of the trained weights
* calibrate: stats.npz, and regions.npz where regions may decide: of the candidates' files
* measure: latency.json: a row for the hash of every candidate's file, of this machine or of the phones
* search: deployment.json: what was asked, and hashes of stats.npz and of the costs
* bundle: bundle/deployment.json: the same as deployment.json
* report: report/deployment.json: likewise

Each of them is written last. --from=STEP makes that step and all after it anew. Regions may decide where stage 1 trained for them and
--decide is not image.

All steps run in one process, but with --ray the groups of heads of stage 2 and the shards of calibration, see `tasks`. Keras names what it
builds by counters, which each step finds as a new process does: otherwise the bits of what it writes would depend on the steps before it.
"""

from absl import flags

from mess_tf import arguments, tasks, terminal

STEPS = ("train", "candidates", "calibrate", "measure", "search", "bundle", "report")


def check_flags() -> None:
    """Raises ValueError where the flags ask for no training or for no search, or for machines without Ray."""
    arguments.check_training()
    arguments.questions()
    arguments.check_latency()
    tasks.check_installed(flags.FLAGS.ray)


if __name__ == "__main__":
    arguments.define_network_flags()
    arguments.define_training_flags()
    arguments.define_question_flags()
    flags.DEFINE_string("latency", "", "latency.json to search with, in place of a measurement")
    flags.DEFINE_bool("android", False, "measure on the phones that adb sees, instead of this machine; see android_bench")
    flags.DEFINE_multi_string("android_flag", [], "a flag of `android_bench run`, such as --android_flag=--backend=gpu; several times")
    tasks.define_flag()
    flags.DEFINE_enum("from", None, STEPS, "make this step and all after it anew, even where they are up to date")
    terminal.run("mess_tf.pipeline", __doc__, check_flags)

import argparse
import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import keras

from android_bench import __main__ as android
from mess_runtime import benchmark
from mess_runtime.bundle import check, check_writable, file_sha256
from mess_runtime.engines import MAX_THREADS
from mess_runtime.files import locked
from mess_runtime.terminal import is_answer, one_line
from mess_tf import calibrate, configs, export_tflite, report, search, train
from mess_tf.files import DEPLOYMENT, IMAGE_DECIDES, REGIONS_DECIDE, Asked, Deployment, candidate_files
from mess_tf.network import originals
from mess_tf.optimise import kernels
from mess_tf.optimise.space import matching
from mess_tf.region_candidates import BY_TRAINING, NONE, WITHOUT

FLAGS = flags.FLAGS


class StepError(ValueError):
    """A step could not be done; the message begins with its name."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The steps of one work folder.

    Attributes:
      workdir: the folder.
      config: of the training.
      data_dir: where the data is; empty for where training found it.
      asked: what to search for.
      latency: the latency.json to search with; None to measure.
      phones: arguments of `android_bench run`, to measure on phones instead of this machine; None otherwise.
      unsafe_loading: see `originals.allow`.
      ray: see `tasks.run`, of the steps that are made of tasks: stage 2 of the training, and the calibration.
    """

    workdir: Path
    config: configs.Config
    data_dir: str
    asked: Asked
    latency: Path | None = None
    phones: argparse.Namespace | None = None
    unsafe_loading: bool = False
    ray: str = ""

    def run(self, first: str | None = None) -> Deployment:
        """Does what is not up to date, one line each, and returns what was chosen.

        Args:
          first: the step from which on all is made anew.

        Raises:
          StepError: a step could not be done, for a reason that its message gives.
          AdbError, BenchmarkError, ValueError: see `check`, or another pipeline is at work in the folder.
        """
        forced = STEPS[STEPS.index(first) :] if first else ()
        self.check(forced)
        self.workdir.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.workdir / "pipeline", wait=False):
                return self._run(forced)
        except BlockingIOError:
            raise ValueError(f"workdir: must be no other pipeline's, which is still running, got {str(self.workdir)!r}") from None

    def check(self, forced: Collection[str] = ()) -> None:
        """Checks before work starts what is needed after it: phones and their tool, and latencies of the device that is asked for.

        Args:
          forced: the steps that are made anew, even where they are up to date.

        Raises:
          AdbError, BenchmarkError, ValueError: a later step could not be done.
        """
        check_writable("workdir", self.workdir, folder=True)
        able = self.config.stage1.regions != NONE or self.asked.decide != REGIONS_DECIDE
        check(able, "--decide", f"{IMAGE_DECIDES} without stage1.regions", self.asked.decide)
        asked, rows = self.question(), [dataclasses.asdict(row) for row in self.rows()]
        if self.latency is not None:
            matching(rows, device=asked.device, threads=asked.threads)
        elif self.phones is None:
            check(1 <= asked.threads <= MAX_THREADS, "--threads", f"between 1 and {MAX_THREADS}", asked.threads)
            ours = asked.device == benchmark.device_name() or self.is_measured()
            check(ours, "--device", f"{benchmark.device_name()}, this machine, without --latency and --android", asked.device)
        elif "measure" in forced or not self.is_measured():
            names, threads, backends = android.check_phones(self.phones), self.phones.threads, self.phones.backend
            check(asked.device in (None, *names), "--device", f"one of the phones, {', '.join(names)}", asked.device)
            check(asked.threads in (None, threads), "--threads", f"{threads}, as --android_flag=--threads has it", asked.threads)
            measured = {*asked.backends} <= {*backends.split(",")}
            check(measured, "--backends", f"{backends}, as --android_flag=--backend has it", ",".join(asked.backends))
            matching([*rows, *({"device": name, "threads": threads} for name in names)], device=asked.device, threads=asked.threads)

    def _run(self, forced: Collection[str]) -> Deployment:
        for name, (is_made, make) in self.steps(forced).items():
            try:
                if name not in forced and is_made():
                    print(f"{name}: up to date", flush=True)
                    continue
                keras.utils.clear_session()
                originals.allow(originals.allowed()[0], self.unsafe_loading)
                print(f"{name}: {make()}", flush=True)
            except Exception as error:
                if is_answer(error):
                    raise StepError(f"{name}: {one_line(error)}") from error
                error.add_note(f"in the step {name}")
                raise
        return Deployment.load(self.workdir / DEPLOYMENT)

    def steps(self, forced: Collection[str] = ()) -> dict[str, tuple[Callable[[], bool], Callable[[], object]]]:
        """By name and in order: whether a step's result is up to date, and what makes it and returns where it is."""
        workdir, data_dir, deployment = self.workdir, self.data_dir, self.workdir / DEPLOYMENT
        precisions, split = self.asked.precisions, self.config.data.val_split
        # Without a word of it, a search that regions cannot be asked leaves them out.
        decide = REGIONS_DECIDE in self.asked.deciders(True) and self.config.stage1.regions != NONE
        regions = BY_TRAINING if decide else WITHOUT
        ray_of_heads = self.ray if train.trains_heads(self.config) else ""

        def is_calibrated(precision: str | None) -> bool:
            whole = calibrate.is_calibrated(workdir, split, precision)
            return whole and (not decide or calibrate.is_calibrated_with_regions(workdir, self.config, precision))

        steps = (
            (
                lambda: train.is_trained(workdir, self.config) and train.has_its_data(workdir, self.config),
                lambda: train.run(workdir, self.config, anew="train" in forced, ray=ray_of_heads),
            ),
            (
                lambda: all(export_tflite.are_exported(workdir, precision, decide) for precision in precisions or (None,)),
                lambda: _listed(export_tflite.run_candidates(workdir, data_dir, precisions=precisions, regions=regions)),
            ),
            (
                lambda: all(map(is_calibrated, precisions or (None,))),
                lambda: _listed(calibrate.run(workdir, data_dir, precisions=precisions, regions=regions, ray=self.ray)),
            ),
            (self.is_measured, self.measure),
            (lambda: search.is_searched(workdir, self.question(), self.table), self.search),
            (
                lambda: export_tflite.is_bundled(workdir, deployment),
                lambda: export_tflite.run_deployment(workdir, deployment, data_dir),
            ),
            (lambda: report.is_reported(workdir), lambda: report.run(workdir, data_dir, self.table)),
        )
        return dict(zip(STEPS, steps, strict=True))

    @property
    def table(self) -> Path:
        """The latency.json to search with."""
        return self.latency or self.workdir / "latency.json"

    def question(self) -> Asked:
        """What to search for: of what is measured here, this machine, in a table that may hold others too."""
        if self.latency is not None or self.phones is not None:
            return self.asked
        device, threads = self.asked.device or benchmark.device_name(), 1 if self.asked.threads is None else self.asked.threads
        return dataclasses.replace(self.asked, device=device, threads=threads)

    def rows(self) -> tuple[benchmark.LatencyRow, ...]:
        """Of the table, none if there is no such file yet."""
        return benchmark.LatencyTable.load(self.table).rows if self.latency or self.table.exists() else ()

    def is_measured(self) -> bool:
        """Whether there are candidates, and the table has a row for each on all backends that are asked for.

        Of the device that is asked for, or of any phone.
        """
        if self.latency is not None:
            return True
        asked, found = self.question(), {}
        for row in self.rows():
            if asked.threads in (None, row.threads):
                found.setdefault(row.device, {}).setdefault(row.backend_requested, set()).add(row.sha256)
        wanted = {file_sha256(path) for path in self.candidates()}
        devices = {asked.device} if asked.device else found.keys() - {benchmark.device_name()}

        def complete(backends: dict[str, set[str]]) -> bool:
            if asked.backends:
                return all(wanted <= backends.get(name, set()) for name in asked.backends)
            return any(wanted <= measured for measured in backends.values())

        return any(wanted and complete(found.get(device, {})) for device in devices)

    def candidates(self) -> list[Path]:
        """The files to measure."""
        return candidate_files(self.workdir, self.asked.precisions or (None,))

    def measure(self) -> Path:
        """Measures the candidates here or on the phones."""
        if self.latency is not None:
            return self.latency
        if self.phones is not None:
            problems = android.measure(self.phones)
            check(not problems, "phones", "without problems, of which each is a line above", problems)
        else:
            benchmark.measure(self.candidates(), self.table, self.question().threads)
        return self.table

    def search(self) -> Path:
        """See `search.run`."""
        search.run(self.workdir, self.question(), self.table)
        return self.workdir / DEPLOYMENT


def _listed(paths: Sequence[Path]) -> str:
    return " ".join(map(str, paths))


def summary(workdir: Path, deployment: Deployment) -> str:
    """What was chosen, and what to do with it."""
    return "\n".join(
        [
            search.table(deployment, kernels.compiled_s()),
            f"report: {report.page_path(workdir)}",
            f"run: python -m mess_runtime run {workdir / 'bundle'} PHOTO --output={workdir / 'masks'}",
        ]
    )


def main() -> None:
    asked = arguments.questions()
    check(len(asked) == 1, "constraint", "one with one value; `python -m mess_tf.search` makes tables of several", len(asked))
    check(not (FLAGS.latency and FLAGS.android), "--latency", "left out with --android", FLAGS.latency)
    check(not FLAGS.android_flag or FLAGS.android, "--android_flag", "left out without --android", FLAGS.android_flag)
    here = not FLAGS.latency and not FLAGS.android
    required = f"{benchmark.BACKEND} or left out on this machine; --latency and --android know others"
    check(not here or {*asked[0].backends} <= {benchmark.BACKEND}, "--backends", required, ",".join(asked[0].backends))
    kept = ("--workdir", "--output")
    own = [flag for flag in FLAGS.android_flag if flag.partition("=")[0] in kept]
    check(not own, "--android_flag", f"without {' and '.join(kept)}, which the pipeline gives", own)
    words = [f"--backend={','.join(asked[0].backends)}"] if asked[0].backends else []
    phones = android.parse(["run", f"--workdir={FLAGS.workdir}", *words, *FLAGS.android_flag]) if FLAGS.android else None
    config = train.resolve_config(FLAGS.workdir, FLAGS.recipe, FLAGS.data, FLAGS.data_dir, FLAGS.set)
    originals.allow_flags()
    workdir, latency = Path(FLAGS.workdir), Path(FLAGS.latency) if FLAGS.latency else None
    pipeline = Pipeline(workdir, config, FLAGS.data_dir, asked[0], latency, phones, FLAGS.unsafe_loading, FLAGS.ray)
    deployment = pipeline.run(FLAGS["from"].value)
    print(summary(workdir, deployment))
