"""Images and labels: sources, checks on opening, `tf.data` pipelines."""
