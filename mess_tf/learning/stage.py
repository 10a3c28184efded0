"""The loop of one stage: batches, evaluations, checkpoints."""

import itertools
import os
import time

import numpy as np
import tensorflow as tf

from mess_runtime import terminal
from mess_runtime.bundle import check
from mess_tf.configs import Config, StageConfig
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import evaluation_batches, training_batches
from mess_tf.files import best_weights
from mess_tf.learning.logs import Log
from mess_tf.learning.losses import class_weights
from mess_tf.learning.soft_targets import SoftTargets
from mess_tf.learning.steps import heads_step, learning_rate, make_optimizer, network_step
from mess_tf.network.evaluation import accuracies, confusion_matrices, keras_predictor
from mess_tf.network.model import FINAL, MultiExitNetwork
from mess_tf.network.replicas import count, share_statistics

LOG_STEPS = 10
# Of the logarithm of the class weights, tried on the validation split.
LOGIT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLE_MASKS = 3


def _folder(workdir: str, name: str) -> str:
    return os.path.join(workdir, "checkpoints", name)


def evaluated_weights(workdir: str | os.PathLike, name: str, step: int) -> str:
    """Path of the heads' weights at an evaluation of a part of a stage."""
    return os.path.join(_folder(workdir, name), f"{step}.npz")


def check_start(name: str, stage: StageConfig, network: MultiExitNetwork, train: Examples, workdir: str) -> None:
    """Checks that batches can be shared, and the files that a stage starts from, unless it goes on from a checkpoint.

    Raises:
      FileNotFoundError, ValueError: `initial` or `teacher` is not there, or of another network or other images.
    """
    replicas = count()
    check(stage.batch_size % replicas == 0, f"{name}.batch_size", f"a multiple of {replicas}, one part for each replica", stage.batch_size)
    check(replicas == 1 or not stage.jit_compile, f"{name}.jit_compile", f"false on {replicas} replicas", stage.jit_compile)
    if tf.train.latest_checkpoint(_folder(workdir, name)):
        return
    if stage.teacher:
        SoftTargets.load(stage.teacher, train)
    if stage.initial:
        if not os.path.isfile(stage.initial):
            raise FileNotFoundError(f"{name}.initial: must be an existing file, got {stage.initial!r}")
        network.check_weights(stage.initial, other_heads=True)


def number_of_steps(stage: StageConfig, train: Examples) -> tuple[int, int]:
    """Steps of a stage: of an epoch, and in all."""
    of_epoch = max(1, len(train) // stage.batch_size)
    return of_epoch, stage.epochs * of_epoch


def train_stage(
    name: str,
    stage: StageConfig,
    network: MultiExitNetwork,
    config: Config,
    train: Examples,
    val: Examples,
    workdir: str,
    keep_all: bool = False,
) -> None:
    """Trains one stage to its end, from its last checkpoint if there is one, and leaves `network` with the best evaluation's weights.

    The `tf.distribute` strategy in scope, in which `network` was built, says on how many devices; a checkpoint serves any number.

    Args:
      name: of the stage and of its folders in WORKDIR/checkpoints and WORKDIR/logs; of a part of it, STAGE/PART.
      stage: its values.
      network: what is trained.
      config: the whole run.
      train, val: the data.
      workdir: the work folder.
      keep_all: of a part: the heads' weights of every evaluation are kept, in `evaluated_weights`, and which is the best is left open.

    Raises:
      FileNotFoundError, ValueError: see `check_start`.
      FloatingPointError: if a loss is not finite; names the steps in question.
    """
    check_start(name, stage, network, train, workdir)
    folder = _folder(workdir, name)
    os.makedirs(folder, exist_ok=True)
    steps_per_epoch, total_steps = number_of_steps(stage, train)
    parts = ([] if stage.trains == "heads" else [network.original]) + list(network.heads.values())
    share_statistics(parts)
    optimizer = make_optimizer(stage, [variable for part in parts for variable in part.trainable_variables])
    weights = class_weights(train.class_pixels(), stage.class_weights)
    make_step = heads_step if stage.trains == "heads" else network_step
    train_step = make_step(network, stage, optimizer, config.data.training_size, weights)

    # ---- Restore policy: (1) the stage's last checkpoint, so that a stopped run ends as an unbroken one; (2) `initial`; (3) the network
    # as it comes. A checkpoint of heads has no weights of the original, so these are those of `initial` in (1) too.
    step_variable, best_variable = tf.Variable(0, dtype=tf.int64), tf.Variable(-1.0)
    checkpoint = tf.train.Checkpoint(parts=parts, optimizer=optimizer, step=step_variable, best=best_variable)
    manager = tf.train.CheckpointManager(checkpoint, folder, max_to_keep=2)
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        print(f"{name}: resumed at step {step_variable.numpy()} of {total_steps} from {manager.latest_checkpoint}", flush=True)
        if stage.initial and stage.trains == "heads" and step_variable.numpy() < total_steps:
            MultiExitNetwork(network.original, network.exit_points).load_weights(stage.initial, other_heads=True)
    elif stage.initial:
        network.load_weights(stage.initial, other_heads=True)
    first_step = int(step_variable.numpy())
    log = Log(os.path.join(workdir, "logs", name), first_step)

    # ---- Evaluation of what this stage trains. Best weights are written before the checkpoint, so a kill in between only repeats work.
    candidates = list(network.heads) if stage.trains == "heads" else [FINAL] if stage.exits == "none" else network.candidates
    biases = {key: network.logit_bias(key) for key in candidates}
    log_weights = np.log(np.where(weights > 0, weights, 1))
    shifts = {share: share * log_weights for share in (LOGIT_SHARES if log_weights.any() else LOGIT_SHARES[:1])}
    tried = {key: list(shifts) if biases[key] is not None else LOGIT_SHARES[:1] for key in candidates}
    predict = keras_predictor(network, candidates, config.data.input_size, shifts, config.data.resize)
    examples = list(zip(val.names, evaluation_batches(val).take(EXAMPLE_MASKS).as_numpy_iterator(), strict=False))

    def evaluate(done: int) -> None:
        """Evaluates, and keeps the weights if they are the best, with the logits moved back by the best share of the class weights'
        logarithm, by which training has moved them (logit adjustment, Menon et al., ICLR 2021). Departure: the paper says nothing of it."""
        found = accuracies(confusion_matrices(predict, val))
        best_share = {key: max(tried[key], key=lambda share, key=key: found[key, share].miou) for key in candidates}
        result = {key: found[key, share].miou for key, share in best_share.items()}
        mean = float(np.mean(list(result.values())))
        best_of_exit = [max(keys, key=result.get) for _, keys in itertools.groupby(result, lambda key: key.split(".")[0])]
        shown = " ".join(f"{key} {100 * result[key]:.2f}" for key in best_of_exit)
        print(f"{name}: step {done} val mIoU mean {100 * mean:.2f} best {shown}", flush=True)
        log.write(done, epoch=done / steps_per_epoch, miou=result, logit_share=best_share)
        for example, (image, _) in examples:
            masks = predict(image)
            best = {key: masks[key, best_share[key]][0][None] for key in best_of_exit}
            log.masks(done, example, image, best, val.info.num_classes)
        better = mean > float(best_variable.numpy())
        if better:
            best_variable.assign(mean)
        if better or keep_all:
            trained = {key: bias.numpy() for key, bias in biases.items() if bias is not None}
            for key, bias in trained.items():
                biases[key].assign(bias - shifts[best_share[key]])
            path = evaluated_weights(workdir, name, done) if keep_all else best_weights(workdir, name)
            network.save_weights(path, original=not keep_all)
            for key, bias in trained.items():
                biases[key].assign(bias)

    # ---- Loop. A reported interval ends at every checkpoint: resumed and unbroken runs report the same, and no checkpoint follows a NaN.
    batches = ()
    if first_step < total_steps:
        print(f"{name}: {len(train)} images, {total_steps} steps of {stage.batch_size} images, {len(network.heads)} heads", flush=True)
        soft = SoftTargets.load(stage.teacher, train).log_probability if stage.teacher else None
        batches = tf.distribute.get_strategy().distribute_datasets_from_function(
            lambda process: training_batches(
                train,
                config.data,
                stage.batch_size,
                stage.seed,
                first_step,
                total_steps - first_step,
                soft,
                process.num_replicas_in_sync,
                (process.input_pipeline_id, process.num_input_pipelines),
            )
        )
    interval: list[dict[str, tf.Tensor]] = []
    pace: list[float] = []  # seconds per step of each interval; the first one compiles
    started = time.perf_counter()
    with terminal.Bar(name, total_steps, "step", first_step) as bar:
        for step, batch in enumerate(batches, first_step):
            rate = learning_rate(stage, step, total_steps)
            optimizer.learning_rate.assign(rate)
            interval.append(train_step(batch, step))
            done = step + 1
            evaluate_now = done % (stage.eval_epochs * steps_per_epoch) == 0 or done == total_steps
            save_now = evaluate_now or done % stage.checkpoint_steps == 0
            if save_now or done % LOG_STEPS == 0:
                keys = dict.fromkeys(key for values in interval for key in values)
                means = {key: float(np.mean([values[key] for values in interval if key in values])) for key in keys}
                if bad := [key for key, value in means.items() if not np.isfinite(value)]:
                    steps = f"{done - len(interval) + 1} to {done}"
                    section = name.partition("/")[0]
                    raise FloatingPointError(f"{name}: the loss of {bad} is not finite in steps {steps}; lower {section}.learning_rate")
                pace.append((time.perf_counter() - started) / len(interval))
                seconds = float(np.median(pace[1:][-20:] or pace))
                log.write(done, epoch=done / steps_per_epoch, learning_rate=rate, loss=means)
                eta = (total_steps - done) * seconds / 60
                note = f"epoch {done / steps_per_epoch:.2f} lr {rate:.4f} loss {np.mean(list(means.values())):.4f} {seconds:.2f} s/step"
                bar.advance(note, f"{name} step {done}/{total_steps} {note} eta {eta:.1f} min")
                if evaluate_now:
                    evaluate(done)
                if save_now:
                    step_variable.assign(done)
                    manager.save(checkpoint_number=done)
                interval, started = [], time.perf_counter()
            else:
                bar.advance(line="")
    if not keep_all:
        network.load_weights(best_weights(workdir, name))
