"""A folder for MediaPipe's ImageSegmenter: a file per exit of a bundle, and the scores from which on an image leaves there.

MediaPipe runs files with one graph, from the image on. So each file is an exit alone: an image that goes on begins anew at the next one.
A file takes uint8 RGB and makes `confidence`, the share of confident pixels, which MediaPipe hands out as quality score, where the exit
decides, and `logits`, as large as the image that goes in. Class names and softmax are in its metadata
(mediapipe/tasks/metadata/metadata_schema.fbs and image_segmenter_metadata_schema.fbs).
"""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import flatbuffers
import numpy as np
import tensorflow as tf

from mess_runtime import bundle as bundles
from mess_runtime.files import replace_folder
from mess_runtime.runner import needed_pixels
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import FP32, TOLERANCE, convert, pixels, run_signature
from mess_tf.targets import check_output, opened

DESCRIPTION = "early_exit.json"
CONFIDENCE, LOGITS = "confidence", "logits"
LABELS = "labels.txt"
# Numbers of the two schemas.
TENSOR_AXIS_LABELS, SOFTMAX = 2, 2


def write(bundle: bundles.Bundle, output: Path) -> None:
    """Writes the folder; an earlier one is replaced as a whole.

    Args:
      bundle: to take apart.
      output: a folder that is new, empty, or was written by this function. It gets EXIT.tflite for every exit, and `early_exit.json`:
        size of the input, colours of the classes, and by exit the file and the score from which on an image leaves there. It is half a
        pixel below the threshold, so that no rounding decides; 0 where there is no decision.

    Raises:
      ValueError: the output is something else, the bundle has regions or values that are not finite, or a file differs from the bundle:
        in its confidence, or in the mask beyond ties.
    """
    check_whole_images(bundle.manifest.regions)
    check(output)
    runner, manifest = opened(bundle), bundle.manifest
    count = manifest.input.height * manifest.input.width
    leave = [0.0 if needed is None else max(needed - 0.5, 0) / count for needed in needed_pixels(manifest)]
    exits = [{"exit": name, "file": f"{name}.tflite", "leave_from": score} for name, score in zip(manifest.exits, leave, strict=True)]
    fitted = {name: getattr(manifest.input, name) for name in ("height", "width", "resize")}
    noise = np.random.default_rng(0).integers(0, 256, (manifest.input.height, manifest.input.width, 3), np.uint8)

    def fill(folder: Path) -> None:
        for (name, graph), expected in zip(alone(bundle).items(), runner.refine(noise), strict=True):
            metadata = {"TFLITE_METADATA": metadata_of(graph)}
            content = flatbuffer.write({bundles.SIGNATURE: graph}, manifest.precision != FP32, metadata)
            made = run_signature(content, {bundles.IMAGE: noise[None]})
            best = np.sort(made[LOGITS][0], -1)[..., -2:]
            tie = np.diff(best)[..., 0] <= TOLERANCE[FP32] * max(1.0, np.abs(best).max())
            same = ((made[LOGITS][0].argmax(-1) == expected.mask) | tie).all()
            if CONFIDENCE in made:
                same = same and round(float(made[CONFIDENCE][0]) * count) == round(expected.trace[-1].confidence * count)
            bundles.check(same, f"{bundle.path}: {name}", "the same on its own", "another mask or confidence")
            (folder / f"{name}.tflite").write_bytes(with_labels(content, manifest.classes))
        bundles.write_json(folder / DESCRIPTION, {"input": fitted, "palette": manifest.palette, "exits": exits})

    replace_folder(output, fill)


def check_whole_images(regions: bundles.Regions | None) -> None:
    """Raises ValueError where cells leave each for itself."""
    bundles.check(regions is None, "--target", "web or android for a deployment with regions", regions)


def check(output: Path) -> None:
    """Raises what `write` would raise of its argument."""
    check_output(output, DESCRIPTION)


def alone(bundle: bundles.Bundle) -> dict[str, flatbuffer.Graph]:
    """By exit: uint8 `image` [1, H, W, 3] to float32 `confidence` [1], where the exit decides, and `logits` [1, H, W, C]."""
    manifest = bundle.manifest
    size, classes = (manifest.input.height, manifest.input.width), len(manifest.classes)
    graphs = {}
    for name, whole in _chain(bundle):
        found = _logits(whole, classes)
        method = "nearest" if manifest.fidelity == policy.LOW else "bilinear"
        upsampled = convert(lambda logits, method=method: {LOGITS: tf.image.resize(logits, size, method)}, {LOGITS: found.shape})
        outputs = {}
        if bundles.CONFIDENT_PIXELS in whole.outputs:
            share = convert(
                lambda count: {CONFIDENCE: tf.cast(count, tf.float32) / (size[0] * size[1])}, {"count": tf.TensorSpec((1,), tf.int32)}
            )
            whole = flatbuffer.join(whole, share, {"count": bundles.CONFIDENT_PIXELS})
            outputs[CONFIDENCE] = whole.outputs[CONFIDENCE]
        whole = flatbuffer.Graph(whole.inputs, whole.outputs | {LOGITS: found}, whole.operations)
        whole = flatbuffer.join(whole, upsampled, {LOGITS: LOGITS})
        outputs[LOGITS] = whole.outputs[LOGITS]  # MediaPipe takes the last one for the logits
        graphs[name] = flatbuffer.cut(whole, whole.inputs, outputs)
    return graphs


def _chain(bundle: bundles.Bundle) -> Iterator[tuple[str, flatbuffer.Graph]]:
    """By exit, from the uint8 image: all segments up to there as one graph, with what the last of them makes."""
    graphs = flatbuffer.read_signatures(bundle.path.read_bytes())
    taken = bundle.manifest.input
    whole = pixels((1, taken.height, taken.width, 3), tf.as_dtype(taken.dtype))
    for name in bundle.manifest.exits:
        segment = graphs[bundles.segment_signature(name)]
        whole = flatbuffer.join(whole, segment, {each: each for each in segment.inputs})
        yield name, whole
        features = {each: tensor for each, tensor in whole.outputs.items() if each not in (bundles.MASK, bundles.CONFIDENT_PIXELS)}
        whole = flatbuffer.Graph(whole.inputs, features, whole.operations)


def _logits(graph: flatbuffer.Graph, classes: int) -> flatbuffer.Tensor:
    """The logits behind a mask: the policy begins with the largest of each place, see `policy.decide`."""
    behind = flatbuffer.cut(graph, graph.inputs, {bundles.MASK: graph.outputs[bundles.MASK]})
    (*_, last) = [
        operation.inputs[0]
        for operation in behind.operations
        if operation.builtin == flatbuffer.OPERATORS.REDUCE_MAX
        and operation.inputs[0].shape[-1] == classes
        and operation.outputs[0].shape == (*operation.inputs[0].shape[:-1], 1)
    ]
    return last


# === Metadata ===


def metadata_of(graph: flatbuffer.Graph) -> bytes:
    """The metadata of a file, a flatbuffer: names of the tensors, the file with the class names, softmax."""
    builder = flatbuffers.Builder(1024)
    options = flatbuffers.Builder(64)
    options.Finish(_table(options, {0: (options.PrependInt8Slot, SOFTMAX)}), b"V001")
    names = builder.CreateString(LABELS)
    labels = _table(builder, {0: names, 2: (builder.PrependInt8Slot, TENSOR_AXIS_LABELS)})
    inputs = [_table(builder, {0: builder.CreateString(name)}) for name in graph.inputs]
    outputs = []
    for name in graph.outputs:
        fields = {0: builder.CreateString(name)}
        if name == LOGITS:
            fields[6] = _vector(builder, [labels])
        outputs.append(_table(builder, fields))
    data = builder.CreateByteVector(bytes(options.Output()))
    custom = _table(builder, {0: builder.CreateString("SEGMENTER_METADATA"), 1: data})
    subgraph = _table(builder, {2: _vector(builder, inputs), 3: _vector(builder, outputs), 9: _vector(builder, [custom])})
    builder.Finish(_table(builder, {0: builder.CreateString("mess_tf"), 3: _vector(builder, [subgraph])}), b"M001")
    return bytes(builder.Output())


def _table(builder: flatbuffers.Builder, fields: Mapping) -> int:
    """A table of a flatbuffer, by number of the field: the offset of what it holds, or how a number is put there, and the number."""
    builder.StartObject(max(fields) + 1)
    for number, value in fields.items():
        put, value = value if isinstance(value, tuple) else (builder.PrependUOffsetTRelativeSlot, value)
        put(number, value, 0)
    return builder.EndObject()


def _vector(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def with_labels(content: bytes, classes: Sequence[str]) -> bytes:
    """A .tflite with the class names behind it, as a zip archive that is not compressed, where MediaPipe looks for them."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(zipfile.ZipInfo(LABELS), "\n".join(classes))
    return file.getvalue()
