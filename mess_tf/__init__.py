"""Multi-Exit Semantic Segmentation networks for mobile, in Keras/TensorFlow."""

import os

import mess_runtime.terminal

__version__ = "0.1.0"

mess_runtime.terminal.begin()
# TensorFlow reads this when it is imported. Of itself it uses oneDNN on processors with AVX-512 only; others train faster with it too.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
