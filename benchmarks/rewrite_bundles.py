"""Writes bundles again as the exporter writes them today, with the same network: the policy is replaced, weights and scales are kept.

For bundles whose working folder is gone. What a file computes on the CPU stays the same bit by bit, or nothing is written: every output of
every segment is compared on the images. The last line of the output is JSON: bytes before and after, by bundle.

    python benchmarks/rewrite_bundles.py --bundles=models/camvid_lite0/int8/minus_1pp.input-dependent --images=photos
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import app, flags

from mess_runtime import bundle as bundles
from mess_runtime.engines import InterpreterEngine
from mess_runtime.files import write_atomically
from mess_runtime.frames import expand
from mess_runtime.images import SUFFIXES, fit, read_photo
from mess_tf.files import made_by
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import FP32, ExportError, convert


def rewritten(graph: flatbuffer.Graph, manifest: bundles.Manifest, segment: bundles.Segment) -> flatbuffer.Graph:
    """A signature that ends at an exit, with the policy of today behind its logits."""
    (logits,) = {
        operation.inputs[0]: None
        for operation in graph.operations
        if operation.builtin == flatbuffer.OPERATORS.REDUCE_MAX
        and operation.inputs[0].shape[3:] == (len(manifest.classes),)
        and operation.outputs[0].shape == (*operation.inputs[0].shape[:3], 1)
    }
    thresholds = ((segment.theta_pix, segment.edge_aware),) if bundles.CONFIDENT_PIXELS in graph.outputs else ()
    size = manifest.input.height, manifest.input.width
    decision = convert(lambda logits: policy.decide(logits, size, thresholds, manifest.fidelity), {"logits": logits.shape})
    features = {name: tensor for name, tensor in graph.outputs.items() if name not in decision.outputs}
    network = flatbuffer.cut(graph, graph.inputs, features | {"logits": logits})
    whole = flatbuffer.join(flatbuffer.with_broadcasts(network), decision, {"logits": "logits"})
    return whole.renamed({name: name for name in graph.outputs})


def outputs(path: Path, manifest: bundles.Manifest, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Everything that the segments of a file make of some images, one after another, on the CPU."""
    engine, made = InterpreterEngine(path, os.cpu_count()), []
    for image in images:
        tensors = {
            bundles.IMAGE: fit(image, (manifest.input.height, manifest.input.width), manifest.input.resize)[None].astype(
                manifest.input.dtype
            )
        }
        for exit in manifest.exits:
            signature = bundles.segment_signature(exit)
            engine.prepare(signature)
            results = engine.run(signature, {name: tensors[name] for name in engine.inputs[signature]})
            tensors |= results
            made += [results[name] for name in sorted(results)]
    return made


def rewrite(folder: Path, images: Sequence[np.ndarray]) -> tuple[int, int]:
    """Rewrites a bundle in place, the manifest's hashes with it; bytes of the file before and after."""
    bundle = bundles.Bundle.load(folder)
    manifest, half_precision = bundle.manifest, bundle.manifest.precision != FP32
    graphs = flatbuffer.read_signatures(bundle.path.read_bytes())
    signatures, segments = {}, []
    for segment in manifest.segments:
        alone = rewritten(
            graphs.get(bundles.alone_signature(segment.exit), graphs[bundles.segment_signature(segment.exit)]), manifest, segment
        )
        signatures[bundles.segment_signature(segment.exit)] = rewritten(graphs[bundles.segment_signature(segment.exit)], manifest, segment)
        content = flatbuffer.write({bundles.SIGNATURE: alone.renamed({bundles.MASK: bundles.MASK})}, half_precision)
        segments.append(dataclasses.replace(segment, alone_sha256=bundles.sha256(content)))
    content = flatbuffer.write(signatures, half_precision)
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / bundles.MODEL).write_bytes(content)
        pairs = zip(outputs(bundle.path, manifest, images), outputs(Path(temporary) / bundles.MODEL, manifest, images), strict=True)
        if differing := sum(not np.array_equal(*pair) for pair in pairs):
            raise ExportError(f"{folder}: {differing} outputs differ on the CPU, nothing was written")
    maker = made_by()
    fresh = dataclasses.replace(
        manifest,
        created_by=bundles.CreatedBy(maker["mess_tf"], tf.__version__, maker["git_commit"] or "unknown"),
        sha256=bundles.sha256(content),
        size_bytes=len(content),
        segments=tuple(segments),
        verified=(),
    )
    write_atomically(bundle.path.resolve(), lambda path: path.write_bytes(content))
    bundles.write_manifest(folder, fresh)
    return manifest.size_bytes, len(content)


def follow(folder: Path) -> None:
    """Brings the manifest of a bundle whose file is a link up to date with that of the file's own bundle, which has been rewritten."""
    old = bundles.read_json(folder / bundles.MANIFEST, bundles.Manifest.from_json)
    new = bundles.Bundle.load((folder / bundles.MODEL).resolve().parent).manifest
    bundles.write_manifest(folder, dataclasses.replace(new, setting=old.setting, predicted=old.predicted))


def main(argv) -> None:
    del argv
    images, sizes = [read_photo(path) for path in expand([Path(FLAGS.images)], SUFFIXES)], {}
    folders = sorted(map(Path, FLAGS.bundles), key=lambda folder: (folder / bundles.MODEL).is_symlink())
    for folder in folders:
        if (folder / bundles.MODEL).is_symlink():
            follow(folder)
            continue
        before, after = sizes[str(folder)] = rewrite(folder, images)
        print(f"{folder}: {before} -> {after} bytes, the same outputs for {len(images)} images", flush=True)
    print(json.dumps(sizes))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_list("bundles", None, "folders", required=True)
    flags.DEFINE_string("images", None, "folder of the images that outputs are compared on", required=True)
    app.run(main)
