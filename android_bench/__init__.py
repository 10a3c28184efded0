"""Latencies of submodels on Android phones, over adb, for the search."""

__version__ = "0.1.0"
