"""Two-stage training of a multi-exit network (mess.md, section 4).

`python -m mess_tf.train --workdir=W --recipe=camvid_lite0 --data_dir=D [--set section.field=value ...]` trains both stages, each from its
last checkpoint if there is one. WORKDIR/config.json keeps the resolved configuration; a later start must ask for the same or nothing.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Literal

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

from mess_runtime.bundle import write_atomically
from mess_tf import configs, losses
from mess_tf.configs import Config, HeadSpec, StageConfig
from mess_tf.data import Examples, class_weights, evaluation_batches, open_split, palette, training_batches
from mess_tf.evaluate import accuracies, confusion_matrices, keras_predictor
from mess_tf.model import FINAL, MultiExitNetwork, best_weights, build_network
from mess_tf.teacher import SoftTargets

LOG_STEPS = 10
# Of the logarithm of the class weights, tried on the validation split.
LOGIT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLE_MASKS = 3

# Images, labels and, with a teacher, its soft targets; the number of the step. Returns the loss of each exit.
Step = Callable[[tuple[tf.Tensor, ...], int], dict[str, tf.Tensor]]


def learning_rate(stage: StageConfig, step: int, total_steps: int) -> float:
    """Polynomial schedule from `learning_rate` at step 0 to `final_learning_rate` at the end."""
    remaining = (1 - step / total_steps) ** stage.power
    return stage.final_learning_rate + (stage.learning_rate - stage.final_learning_rate) * remaining


def make_optimizer(stage: StageConfig, variables: list[keras.Variable]) -> keras.optimizers.Optimizer:
    """SGD with Nesterov momentum, built for all variables of a stage; biases and batch normalisation are not decayed."""
    optimizer = keras.optimizers.SGD(
        stage.learning_rate, momentum=stage.momentum, nesterov=stage.momentum > 0, weight_decay=stage.weight_decay or None
    )
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    optimizer.build(variables)
    return optimizer


def sampled_pixels(stage: StageConfig, size: tuple[int, int], step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the full-resolution output on which the loss of a step is taken, int32 [R] and [S]."""
    stride = stage.pixel_stride
    first = np.random.default_rng([stage.seed, step]).integers(stride, size=2).tolist()
    rows, columns = (np.arange(side // stride, dtype=np.int32) * stride + start for side, start in zip(size, first, strict=True))
    return rows, columns


def pick(labels: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Labels [B, H, W] at the sampled rows and columns: [B, R, S]."""
    return tf.gather(tf.gather(labels, rows, axis=1), columns, axis=2)


def fix_summation_order() -> None:
    """Makes every later step give the same bits each time on a CPU, at no cost, as long as its gradients come from `gradients`.

    `AddN` sums three or more tensors in an order that depends on which of them is free first. `gradients` adds two at a time; TensorFlow's
    graph rewriting would join these sums again. (`enable_op_determinism` leaves that order open.)
    """
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})


def gradients(values: dict[str, tf.Tensor], variables: list[keras.Variable]) -> list[tf.Tensor]:
    """Gradients of the sum of some losses, inside a `tf.function`."""
    pairwise = tf.AggregationMethod.EXPERIMENTAL_TREE
    return tf.gradients(list(values.values()), [variable.value for variable in variables], aggregation_method=pairwise)


def exit_loss(stage: StageConfig, logits: tf.Tensor, teacher: tf.Tensor, target: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
    """Cross-entropy and, as the stage says, distillation (mess.md, section 4): float32 scalar.

    Args:
      stage: says which, and how they are mixed.
      logits, teacher: float32 [..., C] of the exit, and of the final exit or of the stage's teacher.
      target: integers [...], 0..C-1 or 255 for pixels that do not count.
      weights: float32 [C], of the classes in the cross-entropy.
    """
    loss = losses.cross_entropy(logits, target, weights, stage.label_smoothing)
    if stage.distillation == "none":
        return loss
    distilled = losses.distillation(logits, teacher, target, stage.distillation == "filtered", stage.temperature)
    return stage.alpha * distilled + (1 - stage.alpha) * loss


def network_step(
    network: MultiExitNetwork, stage: StageConfig, optimizer: keras.optimizers.Optimizer, size: tuple[int, int], weights: np.ndarray
) -> Step:
    """Makes the step of stage 1: the whole network, the final exit and the early exits that the schedule names.

    Departure: exits may learn from the final one or from a teacher here too (the paper distils in stage 2 only).
    """
    early = list(network.heads)

    def compiled(candidates: tuple[str, ...]) -> Callable:
        features_of = network.features([*candidates, FINAL])
        trained = list(network.original.trainable_variables)
        for name in candidates:
            trained += network.heads[name].trainable_variables

        @tf.function(autograph=False)
        def step(batch, rows, columns):
            images, labels, *soft = batch
            target = pick(labels, rows, columns)
            features = features_of(images, training=True)
            final = losses.upsample_at(network.head_logits(FINAL, features, training=True), size, rows, columns)
            teacher = losses.upsample_at(soft[0], size, rows, columns) if soft else final
            values = {}
            for name in candidates:
                logits = losses.upsample_at(network.head_logits(name, features, training=True), size, rows, columns)
                values[name] = exit_loss(stage, logits, teacher, target, weights)
            if soft:
                values[FINAL] = exit_loss(stage, final, teacher, target, weights)
            else:
                values[FINAL] = losses.cross_entropy(final, target, weights, stage.label_smoothing)
            optimizer.apply(gradients(values, trained), trained)
            return values

        return step

    def chosen(step: int) -> tuple[str, ...]:
        if stage.exits == "none":
            return ()
        return tuple(early) if stage.exits == "all" else (early[losses.round_robin(step, len(early)) - 1],)

    steps: dict[tuple[str, ...], Callable] = {}

    def run(batch, step):
        candidates = chosen(step)
        if candidates not in steps:
            steps[candidates] = compiled(candidates)
        return steps[candidates](batch, *sampled_pixels(stage, size, step))

    return run


def heads_step(
    network: MultiExitNetwork, stage: StageConfig, optimizer: keras.optimizers.Optimizer, size: tuple[int, int], weights: np.ndarray
) -> Step:
    """Makes the step of stage 2: the frozen original runs once, then the heads are trained on its features, one group after the other."""
    names = list(network.heads)
    features_of = network.features(names if stage.teacher else network.candidates)

    @tf.function(autograph=False)
    def frozen(batch, rows, columns):
        images, labels, *soft = batch
        features = features_of(images, training=False)
        teacher = soft[0] if soft else network.head_logits(FINAL, features)
        return features, pick(labels, rows, columns), losses.upsample_at(teacher, size, rows, columns)

    def compiled(group: list[str]) -> Callable:
        trained = [variable for name in group for variable in network.heads[name].trainable_variables]

        @tf.function(autograph=False)
        def step(features, target, teacher, rows, columns):
            values = {}
            for name in group:
                logits = losses.upsample_at(network.head_logits(name, features, training=True), size, rows, columns)
                values[name] = exit_loss(stage, logits, teacher, target, weights)
            optimizer.apply(gradients(values, trained), trained)
            return values

        return step

    steps = [compiled(names[start : start + stage.group_size]) for start in range(0, len(names), stage.group_size)]

    def run(batch, step):
        rows, columns = sampled_pixels(stage, size, step)
        features, target, teacher = frozen(batch, rows, columns)
        values = {}
        for group in steps:
            values |= group(features, target, teacher, rows, columns)
        return values

    return run


class Log:
    """The same fields in metrics.jsonl and as TensorBoard scalars, and example masks in TensorBoard."""

    def __init__(self, folder: str, last_step: int):
        """Goes on with the log in `folder`; rows after `last_step`, whose work is lost and done again, are dropped."""
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "metrics.jsonl")
        rows = []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                rows = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= last_step]
        write_atomically(self.path, lambda temporary: temporary.write_text("".join(rows), encoding="utf-8"))
        self.summaries = tf.summary.create_file_writer(os.path.join(folder, "tensorboard"))

    def write(self, step: int, **fields) -> None:
        """Writes one row; a field is a number or a dict of them."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | fields) + "\n")
        with self.summaries.as_default(step=step):
            for name, value in fields.items():
                scalars = {f"{name}/{key}": number for key, number in value.items()} if isinstance(value, dict) else {name: value}
                for tag, number in scalars.items():
                    tf.summary.scalar(tag, number)
        self.summaries.flush()

    def masks(self, step: int, name: str, image: np.ndarray, masks: dict[str, np.ndarray], num_classes: int) -> None:
        """Shows an image, float32 [1, H, W, 3], and masks of it, uint8 [1, H, W] each, side by side."""
        pictures = [image.astype(np.uint8)] + [palette(num_classes)[mask] for mask in masks.values()]
        with self.summaries.as_default(step=step):
            tf.summary.image(f"examples/{name}", np.concatenate(pictures, axis=2), description=f"image, {', '.join(masks)}")


def train_stage(
    name: str, stage: StageConfig, network: MultiExitNetwork, config: Config, train: Examples, val: Examples, workdir: str
) -> None:
    """Trains one stage to its end, from its last checkpoint if there is one, and leaves `network` with the best evaluation's weights.

    Raises:
      FileNotFoundError, ValueError: for initial weights that are not there or of another network.
      FloatingPointError: if a loss is not finite; names the steps in question.
    """
    folder = os.path.join(workdir, "checkpoints", name)
    os.makedirs(folder, exist_ok=True)
    steps_per_epoch = max(1, len(train) // stage.batch_size)
    total_steps = stage.epochs * steps_per_epoch
    parts = ([] if stage.trains == "heads" else [network.original]) + list(network.heads.values())
    optimizer = make_optimizer(stage, [variable for part in parts for variable in part.trainable_variables])
    weights = class_weights(train.class_pixels(), stage.class_weights)
    make_step = heads_step if stage.trains == "heads" else network_step
    train_step = make_step(network, stage, optimizer, config.data.training_size, weights)

    # ---- Restore policy: (1) the stage's last checkpoint, so that a stopped run ends as an unbroken one; (2) `initial`; (3) the network
    # as it comes.
    step_variable, best_variable = tf.Variable(0, dtype=tf.int64), tf.Variable(-1.0)
    checkpoint = tf.train.Checkpoint(parts=parts, optimizer=optimizer, step=step_variable, best=best_variable)
    manager = tf.train.CheckpointManager(checkpoint, folder, max_to_keep=2)
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        logging.info("%s: resumed at step %d of %d from %s", name, step_variable.numpy(), total_steps, manager.latest_checkpoint)
    elif stage.initial:
        if not os.path.exists(stage.initial):
            raise FileNotFoundError(f"{name}.initial: there is no file {stage.initial!r}")
        network.load_weights(stage.initial, other_heads=True)
    first_step = int(step_variable.numpy())
    log = Log(os.path.join(workdir, "logs", name), first_step)

    # ---- Evaluation of what this stage trains. Best weights are written before the checkpoint, so a kill in between only repeats work.
    candidates = list(network.heads) if stage.trains == "heads" else [FINAL] if stage.exits == "none" else network.candidates
    biases = {key: network.logit_bias(key) for key in candidates}
    log_weights = np.log(np.where(weights > 0, weights, 1))
    shifts = {share: share * log_weights for share in (LOGIT_SHARES if log_weights.any() else LOGIT_SHARES[:1])}
    tried = {key: list(shifts) if biases[key] is not None else LOGIT_SHARES[:1] for key in candidates}
    predict = keras_predictor(network, candidates, config.data.input_size, shifts)
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
        logging.info("%s: step %d val mIoU mean %.2f best %s", name, done, 100 * mean, shown)
        log.write(done, epoch=done / steps_per_epoch, miou=result, logit_share=best_share)
        for example, (image, _) in examples:
            masks = predict(image)
            log.masks(done, example, image, {key: masks[key, best_share[key]] for key in best_of_exit}, val.info.num_classes)
        if mean > float(best_variable.numpy()):
            best_variable.assign(mean)
            trained = {key: bias.numpy() for key, bias in biases.items() if bias is not None}
            for key, bias in trained.items():
                biases[key].assign(bias - shifts[best_share[key]])
            network.save_weights(best_weights(workdir, name))
            for key, bias in trained.items():
                biases[key].assign(bias)

    # ---- Loop. A reported interval ends at every checkpoint: resumed and unbroken runs report the same, and no checkpoint follows a NaN.
    batches = ()
    if first_step < total_steps:
        logging.info("%s: %d images, %d steps of %d images, %d heads", name, len(train), total_steps, stage.batch_size, len(network.heads))
        soft = SoftTargets.load(stage.teacher, train).log_probability if stage.teacher else None
        batches = training_batches(train, config.data, stage.batch_size, stage.seed, first_step, total_steps - first_step, soft)
    interval: list[dict[str, tf.Tensor]] = []
    pace: list[float] = []  # seconds per step of each interval; the first one compiles
    started = time.perf_counter()
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
                raise FloatingPointError(f"{name}: the loss of {bad} is not finite in steps {steps}; lower {name}.learning_rate")
            pace.append((time.perf_counter() - started) / len(interval))
            seconds = float(np.median(pace[1:][-20:] or pace))
            log.write(done, epoch=done / steps_per_epoch, learning_rate=rate, loss=means)
            print(
                f"{name} step {done}/{total_steps} epoch {done / steps_per_epoch:.2f} lr {rate:.4f} "
                f"loss {np.mean(list(means.values())):.4f} {seconds:.2f} s/step eta {(total_steps - done) * seconds / 60:.1f} min",
                flush=True,
            )
            if evaluate_now:
                evaluate(done)
            if save_now:
                step_variable.assign(done)
                manager.save(checkpoint_number=done)
            interval, started = [], time.perf_counter()
    network.load_weights(best_weights(workdir, name))


def train(config: Config, workdir: str, stages: Literal["stage1", "both"] = "both") -> MultiExitNetwork:
    """Runs the stages of a configuration in WORKDIR, each from its last checkpoint if there is one, and returns the trained network.

    A stage of 0 epochs is left out.

    Sets Keras' random seed and precision policy and TensorFlow's summation order (`fix_summation_order`) for the whole process.
    """
    fix_summation_order()
    keras.mixed_precision.set_global_policy(config.stage1.precision)
    keras.utils.set_random_seed(config.stage1.seed)
    train_examples, val_examples = open_split(config.data, config.data.train_split), open_split(config.data, config.data.val_split)
    network = build_network(config, train_examples.info.num_classes)
    momentum = config.backbone.batch_norm_momentum
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], momentum)
    if config.stage1.epochs:
        train_stage("stage1", config.stage1, network, config, train_examples, val_examples, workdir)
    if stages == "both" and config.stage2.epochs:
        keras.mixed_precision.set_global_policy(config.stage2.precision)
        keras.utils.set_random_seed(config.stage2.seed)
        network.add_heads(config.exits.head_specs, momentum)
        train_stage("stage2", config.stage2, network, config, train_examples, val_examples, workdir)
    return network


def resolve_config(workdir: str, recipe: str, data: str, data_dir: str, overrides: Sequence[str]) -> Config:
    """The configuration of WORKDIR if it has one, else that of the recipe and flags, which is written there.

    Raises:
      ValueError: for an unknown recipe or override, or if WORKDIR was made with other values than the flags ask for; they are named.
    """
    configs.check_recipe(recipe)
    config = configs.RECIPES[recipe or "default"]
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=data))
    config = configs.apply_overrides(configs.with_data_dir(config, data_dir), overrides)
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        kept = configs.load_config(workdir)
        old, new = dataclasses.asdict(kept), dataclasses.asdict(configs.with_data_dir(config, kept.data.data_dir))
        fields = [(section, field) for section in old for field in old[section] if old[section][field] != new[section][field]]
        if (recipe or data or overrides) and fields:
            other = "; ".join(f"{section}.{field} {old[section][field]!r}, not {new[section][field]!r}" for section, field in fields)
            raise ValueError(f"workdir: {path} was made with {other}; leave the flags out to go on with it, or choose another folder")
        return configs.with_data_dir(kept, data_dir)
    os.makedirs(workdir, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(configs.to_json(config), encoding="utf-8"))
    return config


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    tf.get_logger().setLevel("ERROR")  # no remarks on tracing one function per head
    config = resolve_config(FLAGS.workdir, FLAGS.recipe, FLAGS.data, FLAGS.data_dir, FLAGS.set)
    train(config, FLAGS.workdir, FLAGS.stages)
    print(os.path.join(FLAGS.workdir, "checkpoints"))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder for everything that this run makes", required=True)
    flags.DEFINE_string("recipe", "", f"one of {sorted(configs.RECIPES)}")
    flags.DEFINE_string("data", "", "data source, in place of the recipe's: synthetic, folder, voc or tfds:NAME")
    flags.DEFINE_string("data_dir", "", "root folder of the data")
    flags.DEFINE_multi_string("set", [], "section.field=value, e.g. stage1.epochs=30; may be given several times")
    flags.DEFINE_enum("stages", "both", ["stage1", "both"], "stages to run")
    app.run(main)
