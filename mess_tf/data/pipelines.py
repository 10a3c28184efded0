"""The `tf.data` pipelines of training and evaluation."""

import numpy as np
import tensorflow as tf

from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data.examples import Examples

PAD_COLOUR = 127.5
# Soft targets of a training image are made at this share of its size, per axis.
SOFT_STRIDE = 4


def training_batches(
    examples: Examples,
    config: DataConfig,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int,
    soft_targets: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Builds the augmented training batches number first_step .. first_step + steps - 1.

    Batch k depends on nothing but (seed, k, batch_size): a run resumed at step k sees what it would have seen without the break.
    Each epoch is one permutation of the split; its remainder runs on into the next epoch.

    Args:
      examples: the training split.
      config: size and augmentation.
      batch_size: images per batch.
      seed: not negative.
      first_step: absolute number of the first batch.
      steps: number of batches.
      soft_targets: float16 [N, h, w, C], of the whole images at any size, to be augmented with them.

    Returns:
      A data set of (image, label): float32 [B, h, w, 3] RGB 0..255 and uint8 [B, h, w], (h, w) = config.training_size; with soft
      targets (image, label, soft target), the last one float32 [B, h, w, C] at 1 / SOFT_STRIDE of the training size.
    """
    start, stop = first_step * batch_size, (first_step + steps) * batch_size
    count = len(examples)
    epochs = range(start // count, -(-stop // count))
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    indices = order[start - epochs[0] * count :][: stop - start]

    @tf.autograph.experimental.do_not_convert
    def prepare(position: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image, label = _load(examples, index)
        soft = None
        if soft_targets is not None:
            soft = tf.numpy_function(lambda i: soft_targets[i].astype(np.float32), [index], tf.float32, stateful=False)
            soft = tf.ensure_shape(soft, soft_targets.shape[1:])
        return augment(image, label, config, tf.stack([tf.constant(seed, tf.int64), position]), soft)

    dataset = tf.data.Dataset.from_tensor_slices((np.arange(start, stop), indices))
    dataset = dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return dataset.batch(batch_size, drop_remainder=True).prefetch(2)


def evaluation_batches(examples: Examples) -> tf.data.Dataset:
    """Builds batches of one, in order, at native size: float32 [1, H, W, 3] RGB 0..255 and uint8 [1, H, W]."""

    @tf.autograph.experimental.do_not_convert
    def prepare(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, label = _load(examples, index)
        return tf.cast(image, tf.float32), label

    dataset = tf.data.Dataset.range(len(examples))
    return dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(1).prefetch(2)


def _load(examples: Examples, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    image, label = tf.numpy_function(lambda i: examples.load(int(i)), [index], [tf.uint8, tf.uint8], stateful=False)
    return tf.ensure_shape(image, [None, None, 3]), tf.ensure_shape(label, [None, None])


def augment(
    image: tf.Tensor, label: tf.Tensor, config: DataConfig, seed: tf.Tensor, soft: tf.Tensor | None = None
) -> tuple[tf.Tensor, ...]:
    """Scales, crops, flips and recolours one example at random.

    Scale 1 is the image resized to the input size, as in evaluation. Image pixels are interpolated once, label pixels never.
    Where a scaled image does not fill the crop, the image is grey and the label IGNORE.

    Args:
      image: uint8 [H, W, 3].
      label: uint8 [H, W].
      config: size and ranges.
      seed: int64 [2]; the result depends on nothing else that is random.
      soft: float32 [h', w', C] of the whole image, if there are soft targets.

    Returns:
      float32 [h, w, 3] in 0..255 and uint8 [h, w]; with soft targets also these, float32 [h / SOFT_STRIDE, w / SOFT_STRIDE, C], 0
      where the image does not fill the crop.
    """
    dice = tf.unstack(tf.random.stateless_uniform([7], seed))

    def between(low: float | tf.Tensor, high: float | tf.Tensor) -> tf.Tensor:
        return low + (high - low) * dice.pop()

    target = tf.constant(config.training_size)
    scaled = tf.cast(tf.round(between(*config.scale_range) * tf.constant(config.input_size, tf.float32)), tf.int32)
    room = tf.cast(scaled - target, tf.float32)  # below zero where the scaled image does not fill the crop
    offset = tf.cast(tf.round([between(0.0, room[0]), between(0.0, room[1])]), tf.int32)
    start, extent = tf.maximum(offset, 0), tf.minimum(scaled, target)
    scale = tf.cast(scaled, tf.float32) / tf.cast(tf.shape(label), tf.float32)

    # One interpolation from native pixels to the crop, for the label the nearest pixel by the same rule.
    image = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=extent, scale=scale, translation=-tf.cast(start, tf.float32), kernel_type="triangle", antialias=False
    )[0]
    for axis in (0, 1):
        centres = tf.cast(start[axis] + tf.range(extent[axis]), tf.float32) + 0.5
        nearest = tf.cast(centres / scale[axis], tf.int32)
        label = tf.gather(label, tf.minimum(nearest, tf.shape(label)[axis] - 1), axis=axis)

    if config.brightness:
        image *= 1 + between(-config.brightness, config.brightness)
    if config.contrast:
        mean = tf.reduce_mean(image)
        image = mean + (image - mean) * (1 + between(-config.contrast, config.contrast))
    if config.saturation:
        grey = tf.reduce_mean(image, axis=-1, keepdims=True)
        image = grey + (image - grey) * (1 + between(-config.saturation, config.saturation))
    image = tf.clip_by_value(image, 0, 255)

    mirrored = dice.pop() < 0.5 if config.flip else tf.constant(False)
    before = tf.maximum(-offset, 0)
    margins = tf.stack([before, target - extent - before], axis=1)
    image = tf.pad(image, tf.concat([margins, [[0, 0]]], axis=0), constant_values=PAD_COLOUR)
    label = tf.pad(label, margins, constant_values=IGNORE)
    result = [tf.ensure_shape(image, [*config.training_size, 3]), tf.ensure_shape(label, config.training_size)]
    if soft is not None:
        size = [side // SOFT_STRIDE for side in config.training_size]
        scale = tf.cast(scaled, tf.float32) / SOFT_STRIDE / tf.cast(tf.shape(soft)[:2], tf.float32)
        translation = -tf.cast(offset, tf.float32) / SOFT_STRIDE
        soft = tf.raw_ops.ScaleAndTranslate(
            images=soft[None], size=size, scale=scale, translation=translation, kernel_type="triangle", antialias=False
        )[0]
        result.append(tf.ensure_shape(soft, [*size, soft.shape[2]]))
    return tuple(tf.cond(mirrored, lambda: [each[:, ::-1] for each in result], lambda: result))


def resize_image(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes [..., H, W, 3] bilinearly to float32 [..., h, w, 3], with half-pixel centres and no antialiasing."""
    return tf.image.resize(tf.cast(image, tf.float32), size, "bilinear", antialias=False)


def resize_label(label: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes [..., H, W] to [..., h, w] by taking the nearest pixel; keeps the dtype."""
    return tf.image.resize(label[..., None], size, "nearest")[..., 0]
