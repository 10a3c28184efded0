"""One step of each stage: what is computed, what is learnt from it, and what is updated; see docs/how_it_works.md."""

import functools
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from mess_tf.configs import IGNORE, StageConfig
from mess_tf.learning import losses
from mess_tf.network.model import FINAL, MultiExitNetwork
from mess_tf.network.regions import ActiveSegment, segment_with_cells
from mess_tf.network.replicas import on_replicas, total

SURE_SHARE = 0.9  # share of a cell's pixels that must be confident
REGION_THETA = (0.5, 0.98)

# Images, labels and, with a teacher, its soft targets, of each replica; the number of the step. Returns the loss of each exit.
Step = Callable[[tuple[tf.Tensor, ...], int], dict[str, tf.Tensor]]


def learning_rate(stage: StageConfig, step: int, total_steps: int) -> float:
    """Polynomial schedule from `learning_rate` at step 0 to `final_learning_rate` at the end."""
    remaining = (1 - step / total_steps) ** stage.power
    return stage.final_learning_rate + (stage.learning_rate - stage.final_learning_rate) * remaining


def make_optimizer(stage: StageConfig, variables: list[keras.Variable]) -> keras.optimizers.Optimizer:
    """SGD with Nesterov momentum, built for all variables of a stage; biases and batch normalisation are not decayed.

    With float16, whose small gradients would be 0, the losses are scaled up by as much as keeps the gradients finite.
    """
    optimizer = keras.optimizers.SGD(
        stage.learning_rate, momentum=stage.momentum, nesterov=stage.momentum > 0, weight_decay=stage.weight_decay or None
    )
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    if stage.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(variables)
    return optimizer


def sampled_pixels(stage: StageConfig, size: tuple[int, int], step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the full-resolution output on which the loss of a step is taken, int32 [R] and [S]."""
    stride = min(stage.pixel_stride, *size)
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


def safe_convolutions(step: Callable) -> Callable:
    """Lets gradients pass 1x1 convolutions with strides through ones without, on every n-th pixel: the same values.

    oneDNN's kernel for the gradient of such a convolution of few channels writes behind its tensor on CPUs with AVX-512 (seen with
    TensorFlow 2.21: `add([relu(bn(conv)), Conv2D(filters, 1, 2)(x)])` of 16 channels ends the process). Everything else stays as it is.

    Args:
      step: function to be traced by a `tf.function`, whose gradients come from `gradients`.
    """

    @functools.wraps(step)
    def traced(*arguments):
        with tf.compat.v1.get_default_graph().gradient_override_map({"Conv2D": _SAFE_GRADIENT}):
            return step(*arguments)

    return traced


_SAFE_GRADIENT = "MessConv2D"


@tf.RegisterGradient(_SAFE_GRADIENT)
def _convolution_gradient(op: tf.Operation, slope: tf.Tensor) -> list[tf.Tensor]:
    """TensorFlow's own gradient of Conv2D, but for 1x1 kernels with strides."""
    x, kernel = op.inputs
    names = ("strides", "padding", "explicit_paddings", "use_cudnn_on_gpu", "data_format", "dilations")
    options = {name: op.get_attr(name) for name in names}
    strides, full = options["strides"], tf.shape(x)
    thinned = tuple(kernel.shape[:2]) == (1, 1) and max(strides) > 1
    if thinned:
        x = x[:, :: strides[1], :: strides[2]]
        options["strides"] = [1, 1, 1, 1]
    of_kernel = tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=tf.shape(kernel), out_backprop=slope, **options)
    of_input = tf.raw_ops.Conv2DBackpropInput(input_sizes=tf.shape(x), filter=kernel, out_backprop=slope, **options)
    if thinned:
        of_input = tf.raw_ops.StridedSliceGrad(shape=full, begin=[0, 0, 0, 0], end=full, strides=strides, dy=of_input)
    return [of_input, of_kernel]


def gradients(values: dict[str, tf.Tensor], variables: list[keras.Variable]) -> list[tf.Tensor]:
    """Gradients of the sum of some losses, inside a `tf.function`."""
    pairwise = tf.AggregationMethod.EXPERIMENTAL_TREE
    return tf.gradients(list(values.values()), [variable.value for variable in variables], aggregation_method=pairwise)


def update(optimizer: keras.optimizers.Optimizer, values: dict[str, tf.Tensor], variables: list[keras.Variable]) -> None:
    """One step of the optimizer down the sum of some losses, inside a `tf.function`."""
    slopes = gradients({name: optimizer.scale_loss(value) for name, value in values.items()}, variables)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # Keras leaves a step out if the gradients of the first replica are not finite: there, those of no other are then either.
        slopes[0] += total(tf.add_n([tf.reduce_sum(0 * slope) for slope in slopes]))
    optimizer.apply(slopes, variables)


def learning(step: Callable, stage: StageConfig) -> Callable[..., dict[str, tf.Tensor]]:
    """Makes one graph of a step that learns on every replica; it returns the losses over the whole batch."""
    strategy = tf.distribute.get_strategy()

    @tf.function(autograph=False, jit_compile=stage.jit_compile or None)
    @safe_convolutions
    def learnt(*arguments):
        shares = strategy.run(step, arguments)
        return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, share, axis=None) for name, share in shares.items()}

    return learnt


def exit_loss(stage: StageConfig, logits: tf.Tensor, teacher: tf.Tensor, target: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
    """Cross-entropy and, as the stage says, distillation (`losses.distillation`): float32 scalar.

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


def segments_behind(network: MultiExitNetwork, stage: StageConfig, size: tuple[int, int]) -> dict[str, ActiveSegment]:
    """The layers between each early exit and the final one at active cells, where they have a block that leaves positions out.

    Raises:
      ValueError: behind no exit they have.
    """
    segments, reasons = {}, []
    for name in network.heads:
        try:
            segments[name] = segment_with_cells(network, (name, FINAL), 1, size, stage.region_cell, stage.regions)
        except ValueError as error:
            reasons.append(f"behind {name}: {error}")
    if not segments:
        raise ValueError(f"stage1.regions: must be none with this network; {reasons[0]}")
    return segments


def drawn_cells(segment: ActiveSegment, logits: tf.Tensor, dice: tf.Tensor) -> tf.Tensor:
    """The cells that an exit is not sure of, as a batch draws them.

    Args:
      segment: behind the exit.
      logits: float32 [B, R, S, C] of the exit, at sampled pixels.
      dice: float32 [2] in [0, 1). One draws theta_pix from REGION_THETA, the other the largest share of the cells, the least sure ones.

    Returns:
      bool [B, rows, columns].
    """
    theta = REGION_THETA[0] + (REGION_THETA[1] - REGION_THETA[0]) * dice[0]
    sure = segment.sure(tf.reduce_max(tf.nn.softmax(logits), -1) >= theta)
    flat = tf.reshape(sure, (-1, sure.shape[1] * sure.shape[2]))
    rank = tf.cast(tf.reshape(tf.argsort(tf.argsort(flat, stable=True)), tf.shape(sure)), tf.float32)
    return (sure < SURE_SHARE) & (rank <= dice[1] * flat.shape[1])


def network_step(
    network: MultiExitNetwork, stage: StageConfig, optimizer: keras.optimizers.Optimizer, size: tuple[int, int], weights: np.ndarray
) -> Step:
    """Makes the step of stage 1: the whole network, the final exit and the early exits that the schedule names.

    With regions, the final exit's loss counts once more: of the cells that an early exit is not sure of, where the layers behind it work
    at these cells only; they learn from the final exit that saw everything as the early exits do. Batch normalisation keeps its moving
    statistics then, everywhere: a batch has none of a few cells, and weights that learn from both kinds of statistics at once ruin what
    the moving ones give.

    Departures: exits may learn from the final one or from a teacher here too (the paper distils in stage 2 only); the paper has no regions.
    """
    early = list(network.heads)

    segments = {} if stage.regions == "none" else segments_behind(network, stage, size)

    def compiled(candidates: tuple[str, ...], regions: bool) -> Callable:
        behind = {name: segments[name] for name in candidates if name in segments} if regions else {}
        features_of = network.features([*candidates, FINAL], [name for segment in behind.values() for name in segment.inputs])
        trained = list(network.original.trainable_variables)
        for name in candidates:
            trained += network.heads[name].trainable_variables

        def step(batch, rows, columns, dice):
            images, labels, *soft = batch
            target = pick(labels, rows, columns)
            features = features_of(images, training=not regions)
            final = losses.upsample_at(network.head_logits(FINAL, features, training=not regions), size, rows, columns)
            teacher = losses.upsample_at(soft[0], size, rows, columns) if soft else final
            values = {}
            for name in candidates:
                answer = network.head_logits(name, features, training=not regions)
                logits = losses.upsample_at(answer, size, rows, columns)
                values[name] = exit_loss(stage, logits, teacher, target, weights)
                if name in behind:
                    cells = drawn_cells(behind[name], tf.stop_gradient(logits), dice)
                    late = behind[name].answer(tf.stop_gradient(answer), behind[name].masked(features, cells)["logits"], cells)
                    late = losses.upsample_at(late, size, rows, columns)
                    there = behind[name].merged(tf.fill(tf.shape(target), IGNORE), tf.cast(target, tf.int32), cells)
                    values[f"{FINAL} behind {name}"] = exit_loss(stage, late, teacher, there, weights)
            if soft:
                values[FINAL] = exit_loss(stage, final, teacher, target, weights)
            else:
                values[FINAL] = losses.cross_entropy(final, target, weights, stage.label_smoothing)
            update(optimizer, values, trained)
            return values

        return learning(step, stage)

    def chosen(step: int) -> tuple[str, ...]:
        if stage.exits == "none":
            return ()
        return tuple(early) if stage.exits == "all" else (early[losses.round_robin(step, len(early)) - 1],)

    compiled = functools.cache(compiled)

    def run(batch, step):
        regions = stage.regions != "none" and step >= stage.region_warmup
        dice = np.random.default_rng([stage.seed, step, 1]).random(2, np.float32)
        return compiled(chosen(step), regions)(batch, *sampled_pixels(stage, size, step), dice)

    return run


def groups(stage: StageConfig, heads: Iterable[str]) -> list[list[str]]:
    """The heads that stage 2 trains in one call each."""
    names = list(heads)
    return [names[start : start + stage.group_size] for start in range(0, len(names), stage.group_size)]


def heads_step(
    network: MultiExitNetwork, stage: StageConfig, optimizer: keras.optimizers.Optimizer, size: tuple[int, int], weights: np.ndarray
) -> Step:
    """Makes the step of stage 2: the frozen original runs once, then the heads are trained on its features, one group after the other."""
    names = list(network.heads)
    features_of = network.features(names if stage.teacher else network.candidates)

    def frozen(batch, rows, columns):
        images, labels, *soft = batch
        features = features_of(images, training=False)
        teacher = soft[0] if soft else network.head_logits(FINAL, features)
        return features, pick(labels, rows, columns), losses.upsample_at(teacher, size, rows, columns)

    def compiled(group: list[str]) -> Callable:
        trained = [variable for name in group for variable in network.heads[name].trainable_variables]

        def step(features, target, teacher, rows, columns):
            values = {}
            for name in group:
                logits = losses.upsample_at(network.head_logits(name, features, training=True), size, rows, columns)
                values[name] = exit_loss(stage, logits, teacher, target, weights)
            update(optimizer, values, trained)
            return values

        return learning(step, stage)

    frozen = on_replicas(frozen, stage.jit_compile)
    steps = [compiled(group) for group in groups(stage, names)]

    def run(batch, step):
        rows, columns = sampled_pixels(stage, size, step)
        features, target, teacher = frozen(batch, rows, columns)
        values = {}
        for group in steps:
            values |= group(features, target, teacher, rows, columns)
        return values

    return run
