"""The `tf.data` pipelines of training and evaluation."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from mess_runtime.images import GREY, fit, nearest, placed
from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data.examples import Examples

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
    replicas: int = 1,
    part: tuple[int, int] = (0, 1),
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
      replicas: that share a batch, of which each gets so many images in turn.
      part: which of how many processes this is; only the images of its own replicas are read.

    Returns:
      A data set of (image, label): float32 [B, h, w, 3] RGB 0..255 and uint8 [B, h, w], B = batch_size / replicas and (h, w) =
      config.training_size; with soft targets (image, label, soft target), the last one float32 [B, h, w, C] at 1 / SOFT_STRIDE of the
      training size.
    """
    start, stop = first_step * batch_size, (first_step + steps) * batch_size
    count = len(examples)
    epochs = range(start // count, -(-stop // count))
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    positions = np.arange(start, stop).reshape(steps, part[1], -1)[:, part[0]].ravel()

    @tf.autograph.experimental.do_not_convert
    def prepare(position: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image, label = _load(examples, index)
        soft = None
        if soft_targets is not None:
            soft = tf.numpy_function(lambda i: soft_targets[i].astype(np.float32), [index], tf.float32, stateful=False)
            soft = tf.ensure_shape(soft, soft_targets.shape[1:])
        return augment(image, label, config, tf.stack([tf.constant(seed, tf.int64), position]), soft)

    dataset = tf.data.Dataset.from_tensor_slices((positions, order[positions - epochs[0] * count]))
    dataset = dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return dataset.batch(batch_size // replicas, drop_remainder=True).prefetch(2)


def evaluation_batches(examples: Examples, images: Sequence[int] | None = None) -> tf.data.Dataset:
    """Builds batches of one, in order, at native size: uint8 [1, H, W, 3] RGB and uint8 [1, H, W]; of some images, or all."""
    dataset = tf.data.Dataset.from_tensor_slices(np.array(range(len(examples)) if images is None else images, np.int64))
    load = tf.autograph.experimental.do_not_convert(lambda index: _load(examples, index))
    return dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(1).prefetch(2)


def network_input(image: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """The image uint8 [1, H, W, 3] or [H, W, 3] as a network of this input size gets it, float32 [1, h, w, 3]; see `images.fit`."""
    return fit(np.asarray(image).reshape(image.shape[-3:]), size, resize)[None].astype(np.float32)


def _load(examples: Examples, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    image, label = tf.numpy_function(lambda i: examples.load(int(i)), [index], [tf.uint8, tf.uint8], stateful=False)
    return tf.ensure_shape(image, [None, None, 3]), tf.ensure_shape(label, [None, None])


def augment(
    image: tf.Tensor, label: tf.Tensor, config: DataConfig, seed: tf.Tensor, soft: tf.Tensor | None = None
) -> tuple[tf.Tensor, ...]:
    """Scales, crops, flips and recolours one example at random.

    Scale 1 is the image fitted to the input size, as in evaluation: by the same antialiased interpolation, here without rounding to whole
    values, so at most 1 of 255 apart. Image pixels are interpolated once, label pixels never. Where a scaled image does not fill the
    crop, the image is grey and the label IGNORE.

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

    def inside(height: int, width: int) -> np.ndarray:
        return np.array([part.stop - part.start for part in placed((height, width), config.input_size, config.resize)], np.int32)

    target, native = tf.constant(config.training_size), tf.shape(label)
    at_scale_one = tf.ensure_shape(tf.numpy_function(inside, [native[0], native[1]], tf.int32, stateful=False), [2])
    scaled = tf.cast(tf.round(between(*config.scale_range) * tf.cast(at_scale_one, tf.float32)), tf.int32)
    room = tf.cast(scaled - target, tf.float32)  # below zero where the scaled image does not fill the crop
    offset = tf.cast(tf.round([between(0.0, room[0]), between(0.0, room[1])]), tf.int32)
    start, extent = tf.maximum(offset, 0), tf.minimum(scaled, target)
    scale = tf.cast(scaled, tf.float32) / tf.cast(native, tf.float32)

    # One interpolation from native pixels to the crop, for the label the nearest pixel.
    image = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=extent, scale=scale, translation=-tf.cast(start, tf.float32), kernel_type="triangle", antialias=True
    )[0]
    for axis in (0, 1):
        label = tf.gather(label, nearest(native[axis], scaled[axis], start[axis] + tf.range(extent[axis])), axis=axis)

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
    image = tf.pad(image, tf.concat([margins, [[0, 0]]], axis=0), constant_values=GREY)
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
