"""Multi-Exit Semantic Segmentation networks for mobile, in Keras/TensorFlow."""

import mess_runtime.terminal

__version__ = "0.1.0"

mess_runtime.terminal.begin()
