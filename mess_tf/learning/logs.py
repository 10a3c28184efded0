"""The log of a stage: metrics.jsonl and TensorBoard."""

import json
import os

import numpy as np
import tensorflow as tf

from mess_runtime.files import write_atomically
from mess_tf.data.examples import palette


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
        """Shows an image, uint8 [1, H, W, 3], and masks of it, uint8 [1, H, W] each, side by side."""
        pictures = [image] + [palette(num_classes)[mask] for mask in masks.values()]
        with self.summaries.as_default(step=step):
            tf.summary.image(f"examples/{name}", np.concatenate(pictures, axis=2), description=f"image, {', '.join(masks)}")
