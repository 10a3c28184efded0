"""Images and labels: sources, checks on opening, `tf.data` pipelines."""

from mess_tf.data.examples import DataError as DataError
from mess_tf.data.sources import open_split as open_split
