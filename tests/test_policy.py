"""The exit policy against NumPy and SciPy references."""

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options
from ai_edge_litert.interpreter import Interpreter
from scipy import ndimage

from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import convert
from mess_tf.graph.policy import EXACT, FIDELITIES, LOW, LOW_CONFIDENCE, decide

SIZE = (40, 56)
THETAS = (0.3, 0.5, 0.8)
THRESHOLDS = [(theta, edge_aware) for edge_aware in (False, True) for theta in THETAS]


def random_logits(seed: int, scale: float, height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (1, height, width, 4)).astype(np.float32)


def reference(logits: np.ndarray, size: tuple[int, int], window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask, plain and edge-aware confidence map, written from their definitions with windows cut off at the border."""
    probabilities = tf.nn.softmax(tf.image.resize(logits, size)).numpy()[0]
    mask, confidence = probabilities.argmax(-1), probabilities.max(-1)
    edges = ndimage.maximum_filter(mask, 3, mode="nearest") != ndimage.minimum_filter(mask, 3, mode="nearest")
    edge_aware = confidence.copy()
    before = (window - 1) // 2
    for row, column in np.argwhere(edges):
        rows = slice(max(0, row - before), row - before + window)
        columns = slice(max(0, column - before), column - before + window)
        values = np.sort(confidence[rows, columns].ravel())
        edge_aware[row, column] = values[values.size // 2]  # the upper median
    return mask, confidence, edge_aware


def counts_of(plain: np.ndarray, edge_aware: np.ndarray) -> list[int]:
    return [int((confidence >= theta).sum()) for confidence in (plain, edge_aware) for theta in THETAS]


@pytest.mark.parametrize(("height", "width"), [(5, 7), (6, 7), (10, 14), (40, 56)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("strip_values", [policy.STRIP_VALUES, 3000])
def test_exact_equals_the_reference(height, width, scale, strip_values, monkeypatch):
    monkeypatch.setattr(policy, "STRIP_VALUES", strip_values)
    logits = random_logits(height, scale, height, width)
    mask, plain, edge_aware = reference(logits, SIZE, 2 * round(SIZE[0] / height))
    outputs = decide(tf.constant(logits), SIZE, THRESHOLDS)
    np.testing.assert_array_equal(outputs["mask"].numpy()[0], mask)
    assert outputs["confident_pixels"].numpy().tolist() == counts_of(plain, edge_aware)
    assert (edge_aware != plain).any()


@pytest.mark.parametrize("window", [3, 7, 8, 16])
def test_windows_of_any_side(window, monkeypatch):
    monkeypatch.setattr(policy, "median_window", lambda *_: window)
    logits = random_logits(window, 2.0)
    expected = counts_of(*reference(logits, SIZE, window)[1:])
    assert decide(tf.constant(logits), SIZE, THRESHOLDS)["confident_pixels"].numpy().tolist() == expected


def test_low_fidelity_counts_at_the_size_of_the_logits():
    logits = random_logits(1, 3.0)
    low_mask, plain, edge_aware = reference(logits, logits.shape[1:3], 2)
    outputs = {fidelity: decide(tf.constant(logits), SIZE, THRESHOLDS, fidelity) for fidelity in FIDELITIES}
    expected = [64 * count for count in counts_of(plain, edge_aware)]  # 8 x 8 pixels each
    for fidelity in (LOW_CONFIDENCE, LOW):
        assert outputs[fidelity]["confident_pixels"].numpy().tolist() == expected
    np.testing.assert_array_equal(outputs[LOW_CONFIDENCE]["mask"], outputs[EXACT]["mask"])
    np.testing.assert_array_equal(outputs[LOW]["mask"].numpy()[0], np.kron(low_mask, np.ones((8, 8))))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_tflite_equals_tensorflow(fidelity):
    logits = random_logits(2, 3.0, 6, 7)
    graph = convert(lambda logits: decide(logits, SIZE, THRESHOLDS, fidelity), {"logits": logits.shape})
    outputs = Interpreter(model_content=flatbuffer.write({"serve": graph})).get_signature_runner("serve")(logits=logits)
    expected = decide(tf.constant(logits), SIZE, THRESHOLDS, fidelity)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(outputs[name], value)


@pytest.mark.parametrize(
    ("fidelity", "classes"),
    [(EXACT, 150), *((name, 4) for name in FIDELITIES), *(pytest.param(name, 150, marks=pytest.mark.full) for name in FIDELITIES[1:])],
)
def test_it_holds_in_half_precision(fidelity, classes, tmp_path):
    """Constants and outputs of every XNNPACK kernel in float16, as an app can ask for with TFLITE_XNNPACK_DELEGATE_FLAG_FORCE_FP16."""
    logits = np.random.default_rng(3).normal(0, 3, (1, 45, 60, classes)).astype(np.float32)
    size, thresholds = (360, 480), [(theta, edge_aware) for theta in (0.4, 0.9) for edge_aware in (False, True)]
    graph = convert(lambda logits: decide(logits, size, thresholds, fidelity), {"logits": logits.shape})
    (tmp_path / "policy.tflite").write_bytes(flatbuffer.write({"serve": graph}))
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=1, xnnpack_flags=4))
    model = CompiledModel.from_file(str(tmp_path / "policy.tflite"), options=options)
    (given,) = model.create_input_buffers(0)
    given.write(logits)
    got = {name: model.create_output_buffer_by_name("serve", name) for name in graph.outputs}
    model.run_by_name("serve", {"logits": given}, got)
    mask, counts = got["mask"].read(360 * 480, np.uint8), got["confident_pixels"].read(4, np.int32)
    expected = decide(tf.constant(logits), size, thresholds, fidelity)
    assert 0 < (mask != expected["mask"].numpy().ravel()).mean() < 2e-3 or fidelity == LOW
    assert counts.tolist() != expected["confident_pixels"].numpy().tolist()  # so it was computed in float16
    np.testing.assert_allclose(counts, expected["confident_pixels"], rtol=0.02, atol=0.002 * 360 * 480)


def test_the_first_of_equal_classes_wins():
    logits = np.zeros((1, 5, 7, 4), np.float32)
    logits[..., 1] = logits[..., 3] = 1e-30
    assert (decide(tf.constant(logits), SIZE, [])["mask"].numpy() == 0).all()  # 1e-30 below is equal in the softmax too
    logits[..., 1] = logits[..., 3] = 5.0
    assert (decide(tf.constant(logits), SIZE, [])["mask"].numpy() == 1).all()


def test_window_is_twice_the_output_stride():
    assert policy.median_window((360, 480), tf.zeros((1, 45, 60, 3))) == 16
    assert policy.median_window((360, 480), tf.zeros((1, 23, 30, 3))) == 32


def test_one_class_everywhere_has_no_edges():
    logits = np.zeros((1, 5, 7, 4), np.float32)
    logits[..., 2] = 3.0
    confidence = float(np.exp(3) / (np.exp(3) + 3))
    thresholds = [(confidence + change, edge_aware) for edge_aware in (False, True) for change in (-0.01, 0.01)]
    outputs = decide(tf.constant(logits), SIZE, thresholds)
    assert (outputs["mask"].numpy() == 2).all()
    assert outputs["confident_pixels"].numpy().tolist() == [SIZE[0] * SIZE[1], 0] * 2


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_large_logits_do_not_overflow(offset):
    logits = random_logits(0, 1.0)
    counts = decide(tf.constant(logits + offset), SIZE, THRESHOLDS)["confident_pixels"].numpy()
    expected = counts_of(*reference(logits, SIZE, 16)[1:])
    np.testing.assert_allclose(counts, expected, atol=3)  # rounding of the large logits


def test_counts_of_large_images_do_not_overflow():
    size, logits = (2160, 3840), np.zeros((1, 135, 240, 2), np.float32)
    logits[:, :, :120, 1] = 9.0
    for fidelity in (LOW_CONFIDENCE, EXACT):
        (count,) = decide(tf.constant(logits), size, [(0.9, False)], fidelity)["confident_pixels"].numpy()
        assert count == pytest.approx(2160 * 3840 / 2, rel=0.01)
    logits = np.concatenate([np.zeros((1, 540, 480, 2)), np.full((1, 540, 480, 2), (0.0, 9.0))], 2).astype(np.float32)
    size = (2161, 3841)  # no multiple of the logits' size
    (count,) = decide(tf.constant(logits), size, [(0.9, False)], LOW)["confident_pixels"].numpy()
    assert count == pytest.approx(2161 * 3841 / 2, rel=1e-3)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_an_image_that_is_confident_everywhere_counts_all_its_pixels(fidelity):
    logits = np.zeros((1, 23, 30, 2), np.float32)
    logits[..., 1] = 9.0
    counts = decide(tf.constant(logits), (360, 480), [(0.9, False), (0.9, True)], fidelity)["confident_pixels"].numpy()
    assert counts.tolist() == [360 * 480] * 2


def test_the_policy_is_made_of_what_gpu_delegates_take():
    """No integer division, which they compute in floats; slices within their tensor; tables read with one index in one dimension."""
    for fidelity in FIDELITIES:
        graph = convert(lambda logits, fidelity=fidelity: decide(logits, SIZE, THRESHOLDS, fidelity), {"logits": (1, 6, 7, 4)})
        for operation in graph.operations:
            name = flatbuffer.OPERATOR_NAMES[operation.builtin]
            assert name not in ("FLOOR_DIV", "DIV", "ARG_MAX")
            if name == "STRIDED_SLICE":
                end = np.frombuffer(bytes(operation.inputs[2].content), np.int32)
                assert (end <= operation.inputs[0].shape).all()
            if name == "GATHER":
                assert [tensor.shape for tensor in operation.inputs] == [(6 * 7 + 1,), (1,)]


def test_classes_far_apart_leave_no_pixel_confident_between_them():
    logits = np.zeros((1, 2, 2, 2), np.float32)
    logits[:, :, 0, 0] = logits[:, :, 1, 1] = 1000.0
    counts = decide(tf.constant(logits), (2, 3), [(0.9, False)])["confident_pixels"].numpy()
    assert counts.tolist() == [4]  # in the middle column both classes are equal
