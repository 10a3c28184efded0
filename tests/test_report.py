"""The report of a small trained folder: what it holds, and that it needs nothing beside itself."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_network import small_network

from mess_runtime.bundle import file_sha256
from mess_tf import configs, report
from mess_tf.calibrate import calibrate
from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig
from mess_tf.data.sources import open_split
from mess_tf.files import Deployment, Stats
from mess_tf.network.model import best_weights, build_network
from mess_tf.optimise.search import resolve_objective, search
from mess_tf.optimise.space import evaluate_configuration, macs_costs, original

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A folder as the other commands leave it; the network is not trained."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(
        data=DataConfig(input_size=(32, 64), synthetic_val=6),
        backbone=BackboneConfig("keras_file", weights=str(folder / "small.keras")),
        exits=ExitsConfig(count=3, heads=("fcn-r8-b0", "decoder-r8-b0")),
    )
    (folder / "config.json").write_text(configs.to_json(config))
    val = open_split(config.data, "val")
    small_network(val.info.num_classes).save(config.backbone.weights)
    network = build_network(config, val.info.num_classes)
    network.add_heads(config.exits.head_specs, 0.9)
    rows = [{"step": step, "epoch": step / 2, "loss": dict.fromkeys(network.candidates, 1.0 / step)} for step in (1, 2)]
    rows.append({"step": 2, "epoch": 1.0, "miou": dict.fromkeys(network.candidates, 0.25)})
    for stage in ("stage1", "stage2"):
        (folder / "logs" / stage).mkdir(parents=True)
        (folder / "logs" / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(best_weights(str(folder), "stage2")).parent.mkdir(parents=True)
    network.save_weights(best_weights(str(folder), "stage2"))
    stats = calibrate(network, val, "val", config.data.input_size, str(folder / "candidates"), [0.15, 0.3])
    stats.save(folder / "stats.npz")
    costs = macs_costs(stats)
    deployment = search(stats, costs, resolve_objective(original(stats, costs), costs, "input-dependent", cost_share=0.9))
    dataclasses.replace(deployment, stats_sha256=file_sha256(folder / "stats.npz")).save(folder / "deployment.json")
    return folder


def test_page_holds_everything_and_pictures_lie_beside_it(workdir):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tflite")])}
    command = [sys.executable, "-m", "mess_tf.report", f"--workdir={workdir}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = workdir / "report"
    assert done.stdout.splitlines()[-1] == str(folder / "index.html")
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page must not refer to other files"
    headings = ["Result", "Chosen exits", "Accuracy and cost", "Examples", "IoU per class", "Training", "Search certificate"]
    assert [heading for heading in re.findall(r"<h2>(.*?)</h2>", text) if heading != "Exit rates"] == headings
    assert "currentColor" in text and "#010203" not in text
    deployment = json.loads((workdir / "deployment.json").read_text())
    assert f"<td>{100 * deployment['original']['miou']:.2f}</td>" in text
    for name in ("front", "examples", "training"):
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, name


def test_per_class_table_counts_each_image_where_it_leaves(workdir):
    stats, deployment = Stats.load(workdir / "stats.npz"), Deployment.load(workdir / "deployment.json")
    accuracy, _, leaves_at = evaluate_configuration(stats, macs_costs(stats), deployment)
    cells = re.findall(r"<td>([^<]*)</td></tr>", report.class_table(stats, deployment, leaves_at))
    assert cells[-1] == f"{100 * accuracy:.2f}"


def test_a_search_in_other_statistics_is_an_error(workdir, tmp_path, monkeypatch):
    document = json.loads((workdir / "deployment.json").read_text())
    for path in workdir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "deployment.json").unlink()
    (tmp_path / "deployment.json").write_text(json.dumps(document | {"stats_sha256": "0" * 64}))
    monkeypatch.setattr(report, "FLAGS", SimpleNamespace(workdir=str(tmp_path)), raising=False)
    with pytest.raises(ValueError, match=r"deployment\.json: must be searched in this stats\.npz"):
        report.main()
