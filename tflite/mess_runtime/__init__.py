"""Device side of mess_tf: runs and times exported bundles with NumPy, Pillow and a TFLite interpreter, without TensorFlow."""

from mess_runtime import terminal

__version__ = "0.1.0"

terminal.begin()
