"""TFLite graphs: flatbuffers, the exit policy, conversion and its checks, submodels and bundles."""
