"""Training: losses, the two steps, the stage loop, logs."""
