"""Latencies of submodels on Android phones, over adb, for the search."""

import mess_runtime.terminal

__version__ = "0.1.0"

mess_runtime.terminal.begin()
