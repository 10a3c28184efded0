"""What the exit policy costs inside the graph, and whether it is exact.

`python benchmarks/policy_cost.py --workdir W [--data_dir D] --split val --candidates exit2.decoder-r1-b0`, after training.

In one process and interleaved: each candidate as a network of its own, image to logits, in fp32 and int8, and the policies on logits of
its size, without a decision and with plain and edge-aware decisions at every fidelity, beside a textbook graph (classes in the innermost
axis, softmax at full size, square pools). The policies run apart from the networks, beside whose noise a decision is small. Then the exact
policy runs on the images of the split and is compared with NumPy on the same logits, and with Canny's edges in the place of ours (needs
OpenCV). The last line is one JSON object:
  edge_exact_share: share of an exact edge-aware decision (beyond the mask, which every exit makes) in the latency of its exit in fp32,
    network, mask and decision together; the largest over the candidates. share_interval: the quartiles of that candidate.
    plain_exact_share, edge_exact_share_int8: likewise. edge_exact_with_mask_share: of decision and mask.
  textbook_over_ours: latency of the textbook edge-aware policy over ours, mask included.
  mask_pixels_differ, count_pixels_differ: pixels of all images on which the graph and NumPy (in float64) disagree, less those that lie
    within the rounding of float32 of a tie or of the threshold; count_pixels_off: with those.
  canny_confidence_difference: mean absolute difference of the image confidence with Canny's edges; canny_correlation: over the images.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf
from absl import app, flags
from common import Trained, define_flags, interleaved, invocation, ratio

from mess_runtime.bundle import CONFIDENT_PIXELS, IMAGE, MASK, SIGNATURE
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import FP32, INT8, convert, run_signature
from mess_tf.graph.exporter import Exporter, logits_size

THETA = 0.9
ROUNDING = 1e-4  # of float32 probabilities
DECISIONS = {"mask": (), "plain": ((THETA, False),), "edge": ((THETA, True),)}


def sides(exporters: Mapping[str, Exporter], candidate: str) -> dict[str, Callable[[int], Callable[[], None]]]:
    """Of the candidate's network by precision, of every policy by `FIDELITY.DECISION`, and of the textbook's: threads to a run."""
    exporter = exporters[FP32]
    model, size = exporter.network.submodel([candidate]), exporter.size
    shape = (1, *logits_size(candidate, exporter.shapes), exporter.network.num_classes)

    def network(image):
        return {"logits": model(image, training=False)[candidate]}

    files = {precision: each.converted(network, [IMAGE]) for precision, each in exporters.items()}
    for fidelity, (name, thresholds) in itertools.product(policy.FIDELITIES, DECISIONS.items()):

        def decide(logits, thresholds=thresholds, fidelity=fidelity):
            return policy.decide(logits, size, thresholds, fidelity)

        files[f"{fidelity}.{name}"] = convert(decide, {"logits": shape})
    window = 2 * round(size[0] / shape[1])
    files["textbook"] = convert(lambda logits: textbook(logits, size, window), {"logits": shape})
    image = exporter.samples[0][IMAGE]
    inputs = {IMAGE: image, "logits": model(image, training=False)[candidate].numpy()}
    return {
        name: functools.partial(invocation, flatbuffer.write({SIGNATURE: graph}), inputs={each: inputs[each] for each in graph.inputs})
        for name, graph in files.items()
    }


def textbook(logits: tf.Tensor, size: tuple[int, int], window: int) -> dict[str, tf.Tensor]:
    """The edge-aware policy written down directly: softmax at full size, square pools over one channel."""
    probabilities = tf.nn.softmax(tf.image.resize(logits, size))
    mask = tf.cast(tf.argmax(probabilities, -1, tf.int32), tf.uint8)
    classes = tf.cast(mask, tf.float32)[..., None]
    edges = tf.nn.max_pool2d(classes, 3, 1, "SAME") + tf.nn.max_pool2d(-classes, 3, 1, "SAME") > 0
    confident = tf.reduce_max(probabilities, -1, keepdims=True) >= THETA
    half = tf.nn.avg_pool2d(tf.cast(confident, tf.float32), window, 1, "SAME") >= 0.5 - 0.25 / window**2
    return {MASK: mask, CONFIDENT_PIXELS: tf.reduce_sum(tf.cast(tf.where(edges, half, confident), tf.int32), (1, 2, 3))}


def reference(logits: np.ndarray, size: tuple[int, int], window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NumPy's mask, confidence, and margin between the two best classes: [H, W] each, in float64."""
    shifted = np.asarray(tf.image.resize(logits, size)[0], np.float64)
    exponentials = np.exp(shifted - shifted.max(-1, keepdims=True))
    best = np.sort(shifted, -1)
    return shifted.argmax(-1), 1 / exponentials.sum(-1), best[..., -1] - best[..., -2]


def confident(sure: np.ndarray, edges: np.ndarray, window: int) -> np.ndarray:
    """Pixels that are sure, on edges those around which at least half are: bool [H, W]."""
    summed = np.pad(np.cumsum(np.cumsum(sure, 0), 1), ((1, 0), (1, 0)))
    height, width = sure.shape
    (top, bottom), (left, right) = (
        (np.clip(np.arange(n) - (window - 1) // 2, 0, n), np.clip(np.arange(n) - (window - 1) // 2 + window, 0, n)) for n in (height, width)
    )
    inside = summed[bottom][:, right] - summed[top][:, right] - summed[bottom][:, left] + summed[top][:, left]
    area = np.outer(bottom - top, right - left)
    return np.where(edges, 2 * inside >= area, sure)


def predicted_edges(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from one of their 8 neighbours."""
    padded = np.pad(mask, 1, mode="edge")
    shifts = [padded[r : r + mask.shape[0], c : c + mask.shape[1]] for r in range(3) for c in range(3)]
    return np.any([shift != mask for shift in shifts], axis=0)


def agreement(exporter: Exporter, candidate: str, examples, limit: int) -> dict[str, float]:
    """Compares the exact policy with NumPy, and our edges with Canny's, on images of a split."""
    import cv2

    model = tf.function(exporter.network.submodel([candidate]))
    mask_differs, count_differs, count_off, ours, canny = 0, 0, 0, [], []
    for image, _ in itertools.islice(evaluation_batches(examples).as_numpy_iterator(), limit):
        logits = model(network_input(image, exporter.size, "stretch"), training=False)[candidate].numpy()
        window = policy.median_window(exporter.size, logits)
        graph = exporter.policy(*logits.shape[1:3], DECISIONS["edge"])
        outputs = run_signature(flatbuffer.write({SIGNATURE: graph}), {"logits": logits})
        mask, confidence, margin = reference(logits, exporter.size, window)
        mask_differs += int(((outputs[MASK][0] != mask) & (margin > ROUNDING)).sum())
        edges, count = predicted_edges(outputs[MASK][0]), int(outputs[CONFIDENT_PIXELS][0])
        least, exact, most = (int(confident(confidence >= THETA + e, edges, window).sum()) for e in (ROUNDING, 0.0, -ROUNDING))
        count_differs += max(0, least - count, count - most)
        count_off += abs(count - exact)
        canny_edges = cv2.Canny((mask * (255 // (exporter.network.num_classes - 1))).astype(np.uint8), 10, 20) > 0
        ours.append(exact / mask.size)
        canny.append(confident(confidence >= THETA, canny_edges, window).mean())
    return {
        "mask_pixels_differ": mask_differs,
        "count_pixels_differ": count_differs,
        "count_pixels_off": count_off,
        "canny_confidence_difference": float(np.abs(np.array(ours) - canny).mean()),
        "canny_correlation": float(np.corrcoef(ours, canny)[0, 1]),
        "images": len(ours),
    }


def share(samples: Mapping[str, np.ndarray], precision: str, name: str, beyond: str | None) -> tuple[float, float, float]:
    """Median share of a policy, or of what it costs beyond another one, in the latency of its exit, and the quartiles."""
    part = samples[name] - (samples[beyond] if beyond else 0.0)
    return tuple(float(value) for value in np.quantile(part / (samples[precision] + samples[name]), [0.5, 0.25, 0.75]))


def main(argv) -> None:
    del argv
    trained = Trained()
    exporters = {precision: trained.exporter(precision) for precision in (FP32, INT8)}
    table = {}
    runs = {candidate: sides(exporters, candidate) for candidate in trained.candidates}
    for threads, candidate in itertools.product(map(int, FLAGS.threads), trained.candidates):
        samples = interleaved({name: run(threads) for name, run in runs[candidate].items()}, FLAGS.rounds)
        table[threads, candidate] = samples
        print(
            f"{candidate}, {threads} thread(s): "
            + ", ".join(f"{name} {np.median(samples[name]):.2f} ms" for name in (FP32, INT8, "textbook"))
        )
        for fidelity, decision in itertools.product(policy.FIDELITIES, DECISIONS):
            name = f"{fidelity}.{decision}"
            parts = [share(samples, precision, name, f"{fidelity}.mask") for precision in exporters]
            shares = ", ".join(f"{100 * part[0]:5.1f} % of {precision}" for precision, part in zip(exporters, parts, strict=True))
            print(f"  {name:22} {np.median(samples[name]):6.2f} ms, decision {shares}", flush=True)

    def worst(precision: str, name: str, beyond: str | None = "exact.mask") -> tuple[float, float, float]:
        return max(share(table[int(FLAGS.threads[0]), candidate], precision, name, beyond) for candidate in trained.candidates)

    samples = table[int(FLAGS.threads[0]), trained.candidates[0]]
    figures = {
        "edge_exact_share": worst(FP32, "exact.edge")[0],
        "share_interval": worst(FP32, "exact.edge")[1:],
        "plain_exact_share": worst(FP32, "exact.plain")[0],
        "edge_exact_share_int8": worst(INT8, "exact.edge")[0],
        "edge_exact_with_mask_share": worst(FP32, "exact.edge", None)[0],
        "textbook_over_ours": ratio(samples["textbook"], samples["exact.edge"])[0],
        **agreement(exporters[FP32], trained.candidates[0], trained.examples, FLAGS.images),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    FLAGS.set_default("candidates", ["exit2.decoder-r1-b0"])
    flags.DEFINE_list("threads", ["1", "2"], "interpreter threads; the shares in the JSON are those of the first")
    flags.DEFINE_integer("rounds", 40, "timed runs of each file")
    flags.DEFINE_integer("images", 101, "largest number of images to compare on")
    app.run(main)
