"""Where a network is trained and evaluated: on one device, or on several that share every batch, by `tf.distribute`.

The strategy in scope says which (`tf.distribute.get_strategy()`, by default one device); training and evaluation ask it, and are one code.
A step runs once on each replica with its part of the batch. What belongs to the whole batch is summed over the replicas: the counts that
losses are divided by, the statistics of batch normalisation, and, by Keras' optimizers, the gradients. So n replicas compute what one does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mess_tf.configs import check_strategy


def open_strategy(name: str) -> tf.distribute.Strategy:
    """Opens a strategy, before TensorFlow has computed anything.

    Args:
      name: `none`; `mirrored`: all GPUs of this machine, or else its (virtual) CPUs; `multi_worker`: all GPUs of the machines that
        TF_CONFIG names, each of which runs the same command; `tpu`: a TPU of this machine.

    Raises:
      ValueError: there is nothing of that kind.
    """
    check_strategy(name)
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError("--strategy: must be none or mirrored on a machine without a TPU, got 'tpu'") from error
    return tf.distribute.TPUStrategy(resolver)


def count() -> int:
    """How many replicas share a batch."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def own_replicas() -> list[int]:
    """The numbers of the replicas that this process drives, ascending: all of them, unless several processes train together."""
    strategy = tf.distribute.get_strategy()
    numbers = strategy.experimental_distribute_values_from_function(lambda context: context.replica_id_in_sync_group)
    return list(strategy.experimental_local_results(numbers))


def on_replicas(function: Callable, jit_compile: bool = False) -> Callable[..., Any]:
    """Makes one graph that calls a function on every replica, with its part of each argument that has parts."""
    strategy = tf.distribute.get_strategy()

    @tf.function(autograph=False, jit_compile=jit_compile or None)
    def run(*arguments):
        return strategy.run(function, arguments)

    return run


def total(value: tf.Tensor) -> tf.Tensor:
    """The sum of a tensor over all replicas, inside a function that runs on each."""
    context = tf.distribute.get_replica_context()
    return value if context.num_replicas_in_sync == 1 else context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def total_of_processes(value: np.ndarray) -> np.ndarray:
    """The sum of an array over the processes that train together, in each of them."""
    strategy, (first, *others) = tf.distribute.get_strategy(), own_replicas()
    if 1 + len(others) == count():
        return value
    parts = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(value if context.replica_id_in_sync_group == first else np.zeros_like(value))
    )
    return strategy.reduce(tf.distribute.ReduceOp.SUM, parts, axis=None).numpy()


def share_statistics(models: Iterable[keras.Model]) -> None:
    """Lets batch normalisation take its statistics over all replicas: their own would drift apart."""
    if count() > 1:
        for model in models:
            for layer in model._flatten_layers():
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.synchronized = True
