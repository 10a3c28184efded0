"""Targets: what other runtimes than `mess_runtime` take, made of a bundle."""
