"""Multi-Exit Semantic Segmentation networks for mobile, in Keras/TensorFlow."""

__version__ = "0.1.0"
