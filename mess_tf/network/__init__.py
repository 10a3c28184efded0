"""The multi-exit network: backbones, exits, layers, costs, accuracy."""
