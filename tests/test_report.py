"""The report of a small trained folder: what it holds, that it needs nothing beside itself, and how it behaves in a browser."""

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import browsers
import keras
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from small_network import small_network

from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_runtime.bundle import file_sha256
from mess_tf import configs, metrics, report
from mess_tf.calibrate import calibrate
from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig
from mess_tf.data.sources import open_split
from mess_tf.files import Asked, Combination, Deployment, ExitChoice, Objective, Stats, best_weights
from mess_tf.network.model import build_network
from mess_tf.optimise import guarantee
from mess_tf.optimise.search import resolve_objective, search
from mess_tf.optimise.space import evaluate_configuration, macs_costs, original, predict

SHOWN = ["exit1.fcn-r8-b0", "final.original"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A folder as the other commands leave it; the network is not trained."""
    keras.utils.set_random_seed(0)
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
    for part in (network.original, *network.heads.values()):
        for kernel in (each for each in part.trainable_variables if each.ndim == 4):
            kernel.assign(3 * kernel)  # sure of something, which differs from image to image
    rows = [{"step": step, "epoch": step / 2, "loss": dict.fromkeys(network.candidates, 1.0 / step)} for step in (1, 2)]
    rows.append({"step": 2, "epoch": 1.0, "miou": dict.fromkeys(network.candidates, 0.25)})
    for stage in ("stage1", "stage2"):
        (folder / "logs" / stage).mkdir(parents=True)
        (folder / "logs" / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(best_weights(str(folder), "stage2")).parent.mkdir(parents=True)
    network.save_weights(best_weights(str(folder), "stage2"))
    stats = calibrate(network, val, "val", config.data.input_size, str(folder / "candidates"), [0.5, 0.8])
    stats.save(folder / "stats.npz")
    costs = macs_costs(stats)
    deployment = search(stats, costs, resolve_objective(original(stats, costs), costs, "input-dependent", cost_share=0.9))
    # Untrained exits give the search no reason to decide: here the first one lets go the three images of which it is surest.
    third = np.sort(stats.confident[0, :, 1, 0] / stats.pixels)[3]
    exits = (ExitChoice("exit1", "fcn-r8-b0", 0.8, float(third)), ExitChoice("final", "original"))
    predicted = dataclasses.replace(deployment.predicted, exit_rates=(0.5, 0.5))
    deployment = dataclasses.replace(deployment, exits=exits, edge_aware=False, predicted=predicted)
    predicted = predict(stats, costs, deployment)
    dataclasses.replace(deployment, predicted=predicted, stats_sha256=file_sha256(folder / "stats.npz")).save(folder / "deployment.json")
    return folder


@pytest.fixture(scope="module")
def searched(workdir) -> tuple[Stats, Deployment]:
    return Stats.load(workdir / "stats.npz"), Deployment.load(workdir / "deployment.json")


@pytest.fixture(scope="module")
def page(workdir) -> Path:
    """The report of the folder, as the command writes it, however long Numba takes to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FRONT_SECONDS", 600.0)
        return report.run(workdir)


@pytest.fixture(scope="module")
def drawn(page) -> dict:
    """What the page's charts and viewer are drawn from."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def points_of(drawn: dict, kind: str) -> list[dict]:
    return [point for point in drawn["points"] if point["kind"] == kind]


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


# === What the page holds ===


def test_page_is_one_file_with_every_section(page):
    assert sorted(path.name for path in page.parent.iterdir()) == ["deployment.json", "index.html"]
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import', text), "the page must not refer to other files"
    sections = ["Result", "Accuracy and cost", "Images", "IoU per class", "Training", "Search certificate"]
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == sections


def test_points_are_those_of_the_statistics(drawn, searched):
    stats, deployment = searched
    costs = macs_costs(stats)
    heads = points_of(drawn, "head")
    assert [f"{head['exits'][0]['exit']}.{head['exits'][0]['head']}" for head in heads] == list(stats.candidates[:-1])
    for k, head in enumerate(heads):
        assert head["miou"] == pytest.approx(100 * metrics.miou(*(counts.sum(0) for counts in stats.counts(k))))
        assert head["mean"] == pytest.approx(1e-9 * (stats.prefix_macs[stats.exit_of_candidate[k]] + stats.head_macs[k]))
    (reference,), (chosen,) = points_of(drawn, "original"), points_of(drawn, "chosen")
    assert (reference["miou"], reference["mean"]) == pytest.approx((100 * deployment.original.miou, 1e-9 * deployment.original.cost))
    accuracy, cost, leaves_at = evaluate_configuration(stats, costs, deployment)
    assert (chosen["miou"], chosen["mean"]) == pytest.approx((100 * accuracy, 1e-9 * cost))
    assert [each["leave"] for each in chosen["exits"]] == [np.mean(leaves_at == 0), np.mean(leaves_at == 1)]
    front = points_of(drawn, "front")
    assert len(front) > 1 and (np.diff([[point["miou"], point["mean"]] for point in front], axis=0) > 0).all()
    best = [max(point["miou"] for point in front if point["mean"] <= head["mean"] + 1e-12) for head in heads]
    assert all(miou >= head["miou"] - 100 / 20 for miou, head in zip(best, heads, strict=True))  # of 20 levels, the next one at most


def test_images_are_shown_as_they_were_counted(drawn, searched):
    stats, deployment = searched
    leaves_at = evaluate_configuration(stats, macs_costs(stats), deployment)[2]
    assert sorted(leaves_at) == [0, 0, 0, 1, 1, 1]
    assert drawn["shown"] == SHOWN
    assert {image["name"] for image in drawn["images"]} == set(stats.images)  # so few that all are shown
    assert drawn["images"][0]["lost"] == max(image["lost"] for image in drawn["images"])
    for image in drawn["images"]:
        i = stats.images.index(image["name"])
        miou = [100 * metrics.miou(*(counts[i] for counts in stats.counts(k))) for k in (0, -1)]
        assert [at_exit["miou"] for at_exit in image["exits"]] == pytest.approx(miou)
        assert image["leaves"] == leaves_at[i]
        assert image["lost"] == pytest.approx(miou[1] - miou[leaves_at[i]])
        assert image["exits"][0]["sure"] == pytest.approx(100 * stats.confident[0, i, 1, 0] / stats.pixels[i])
        photo, label = pixels(image["photo"]), pixels(image["label"])
        assert len(np.unique(photo.reshape(-1, 3), axis=0)) > 100
        for k, at_exit in zip((0, -1), image["exits"], strict=True):
            mask, confidence, errors = (pixels(at_exit[name]) for name in ("mask", "confidence", "errors"))
            assert mask.shape == label.shape == confidence.shape == errors.shape == photo.shape
            right = (mask == label).all(-1)
            told = (errors == report.ERRORS["right"]).all(-1) | (errors == report.ERRORS["right, original wrong"]).all(-1)
            np.testing.assert_array_equal(right, told)
            tp, _, fn = stats.counts(k)
            assert right.mean() == pytest.approx(tp[i].sum() / (tp[i] + fn[i]).sum(), abs=0.05)


def test_exit_rate_at_the_chosen_threshold(drawn, searched):
    (curve,) = drawn["rates"]
    assert curve["chosen"] == pytest.approx([searched[1].exits[0].theta_img, 50])
    assert curve["points"][0][1] == 100 and (np.diff(curve["points"], axis=0) * [1, -1] > 0).all()


def test_training_curves(drawn):
    panels = {panel["title"]: panel["series"] for panel in drawn["training"]}
    assert list(panels) == ["stage1: loss", "stage1: val mIoU %", "stage2: loss", "stage2: val mIoU %"]
    assert panels["stage2: loss"][0] == {"name": "exit1", "points": [[0.5, 1.0], [1.0, 0.5]]}
    assert panels["stage2: val mIoU %"][0] == {"name": "exit1", "points": [[1.0, 25.0]]}


def test_tables_hold_the_values_without_javascript(page, searched):
    stats, deployment = searched
    tables = page.read_text(encoding="utf-8").partition('<script type="application/json"')[0]
    words = " ".join(re.sub(r"<[^>]+>", " ", tables).split())
    accuracy, _, _ = evaluate_configuration(stats, macs_costs(stats), deployment)
    assert f"original {100 * deployment.original.miou:.2f} {1e-9 * deployment.original.cost:.4g} " in words
    assert f"difference {100 * (accuracy - deployment.original.miou):+.2f} pp ".replace("-", "−") in words
    assert f"exit1 50.0 % fcn-r8-b0 0.8000 {deployment.exits[0].theta_img:.4f} final 50.0 % original – –" in words
    classes = report.class_ious(stats, deployment, report.chosen_of(stats, macs_costs(stats), deployment))
    mixed = classes["chosen mixture"]
    assert mixed[-1] == pytest.approx(100 * accuracy)
    assert f"mean {classes[SHOWN[0]][-1]:.2f} {100 * deployment.original.miou:.2f} {mixed[-1]:.2f} " in words
    kinds = re.findall(r'<tr><th scope="row">(head|front|original|chosen)</th><td>', tables)
    assert kinds.count("head") == len(stats.candidates) - 1 and {*kinds} == {"head", "front", "original", "chosen"}


# === What it is made of ===


def test_most_telling_images_come_first():
    miou = np.array([0.9, 0.2, 0.5, 0.6, 0.8])
    lost = np.array([0.0, 0.0, 0.3, 0.1, 0.0])
    order = report.worth_showing(miou, lost, leaves_at=np.array([0, 0, 0, 1, 1]), confidence=np.array([0.9, 0.8, 0.7, 0.2, 0.3]))
    assert order == [2, 1, 0, 4, 3]  # loses most, worst, surest of the first exit, surest of the second; then what is left


def test_as_many_images_as_fit():
    assert report.fitting(iter(["aaaa", "bbbb", "cccc"]), 12) == ["aaaa", "bbbb"]  # 6 bytes each, with quotes
    assert report.fitting(iter(["aaaa"]), 1) == ["aaaa"]


def test_errors_compare_an_exit_with_the_label_and_the_original():
    label, here, final = (np.array([row], np.uint8) for row in ([1, 1, 1, 1, 255], [1, 0, 0, 1, 1], [1, 0, 1, 0, 1]))
    expected = ["right", "wrong", "wrong, original right", "right, original wrong", "no label"]
    assert report.error_map(label, here, final).tolist() == [[list(report.ERRORS[name]) for name in expected]]


def test_difference_is_zero_where_the_original_is_chosen(searched):
    stats, deployment = searched
    same = dataclasses.replace(
        deployment, exits=deployment.exits[1:], predicted=dataclasses.replace(deployment.predicted, exit_rates=(1.0,))
    )
    costs = macs_costs(stats)
    assert report.difference_interval(stats, report.chosen_of(stats, costs, same)) == (0.0, 0.0)
    low, high = report.difference_interval(stats, report.chosen_of(stats, costs, deployment))
    assert low < deployment.predicted.miou - deployment.original.miou < high


def test_images_that_judge_are_those_that_did_not_choose(searched):
    stats, deployment = searched
    checks = guarantee.split(stats, 0.5)[1]
    judged = dataclasses.replace(deployment, predicted=predict(checks, macs_costs(stats), deployment))
    assert report.judging(stats, judged).images == checks.images
    assert report.judging(stats, deployment) is stats


def test_costs_are_those_of_the_device_that_was_searched(searched):
    stats, deployment = searched
    kinds = ("prefix_sha256", "head_sha256", "mask_sha256", "plain_sha256", "edge_sha256")
    hashes = {kind: tuple(f"{k}{n:063x}" for n in range(len(getattr(stats, kind)))) for k, kind in enumerate(kinds)}
    row = LatencyRow("", "0" * 64, 1, "", "", "", "litert", "", "xnnpack", "xnnpack", 1, 1.0, None, 1.0, 3, None)
    rows = [
        dataclasses.replace(row, submodel=sha256, sha256=sha256, device=device, threads=threads, p50_ms=ms)
        for device, threads, ms in (("slow", 1, 4.0), ("slow", 2, 3.0), ("fast", 1, 1.0))
        for sha256 in sum(hashes.values(), ())
    ]
    part = dataclasses.replace(rows[0], device="a part of it was measured")
    table = LatencyTable({}, tuple(rows))
    stats = dataclasses.replace(stats, **hashes)

    def costs_where_the_original_takes(ms: float):
        return report.searched_costs(
            stats, dataclasses.replace(deployment, original=dataclasses.replace(deployment.original, cost=ms)), table
        )

    assert set(costs_where_the_original_takes(6.0).prefix) == {3.0}
    with pytest.raises(ValueError, match=r"latency: must be the file that was searched, where the original takes 5 ms"):
        costs_where_the_original_takes(5.0)
    table = LatencyTable({}, (part, *rows))
    assert set(costs_where_the_original_takes(6.0).prefix) == {3.0}
    with pytest.raises(ValueError, match=r"latency\.json: must have a row .*for every submodel"):
        costs_where_the_original_takes(5.0)


def test_backend_and_precision_that_were_chosen_are_named(searched):
    _, deployment = searched
    rows = (
        Combination("gpu", "fp16", 0.5, 1.25e9, ("final.original",), ""),
        Combination("gpu", "int8", None, None, (), "refused by verify on board: mask"),
        Combination("xnnpack", "fp16", 0.5, 2e9, ("final.original",), "macs 2e+09 against 1.25e+09"),
    )
    chosen = dataclasses.replace(deployment, backend="gpu", precision="fp16", combinations=rows)
    words = "Runs in fp16 on gpu, chosen before int8 on gpu (refused by verify on board: mask), fp16 on xnnpack (50.00 % at 2 GMACs; macs "
    assert report.choice(chosen).startswith(words)
    assert report.choice(dataclasses.replace(chosen, backend=None, combinations=())) == "Runs in fp16."
    assert report.choice(dataclasses.replace(chosen, backend=None, precision="", combinations=())) == ""


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"max_drop_pp": 0.0}, "Asked for the least macs with an mIoU at most 0 pp below the original's."),
        ({"max_drop_pp": 100.0}, "Asked for the least macs with an mIoU at most 100 pp below the original's."),
        ({"max_drop_pp": -0.5}, "Asked for the least macs with an mIoU at least 0.5 pp above the original's."),
        ({"min_miou": 0.0}, "Asked for the least macs with an mIoU of at least 0.00 %."),
        ({"cost_share": 0.4}, "Asked for the best mIoU with macs of at most 0.002 GMACs, 0.4 of the original's."),
        ({"max_cost": 2e6}, "Asked for the best mIoU with macs of at most 0.002 GMACs."),
    ],
)
def test_what_was_asked_is_said_as_it_was_asked(searched, constraint, words):
    objective = Objective("macs", 0.0) if {*constraint} & {"max_drop_pp", "min_miou"} else Objective(limits={"macs": 2e6})
    assert report.asked(dataclasses.replace(searched[1], asked=Asked(**constraint), constraint=objective, guarantee=None)) == words


def test_a_search_in_other_statistics_is_an_error(workdir, tmp_path):
    document = json.loads((workdir / "deployment.json").read_text())
    (tmp_path / "stats.npz").symlink_to(workdir / "stats.npz")
    (tmp_path / "deployment.json").write_text(json.dumps(document | {"stats_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"deployment\.json: stats_sha256: must be that of .*stats\.npz; search again, got '0"):
        report.run(tmp_path)


def test_latencies_of_a_search_in_macs_are_an_error(workdir):
    with pytest.raises(ValueError, match=r"latency: must be left out where the search counted MACs, got 'latency\.json'"):
        report.run(workdir, latency="latency.json")


# === In a browser ===


@pytest.fixture(scope="module")
def browser():
    started = browsers.start()
    yield started
    started.quit()


@pytest.fixture
def opened(browser, page):
    """The page, freshly opened; whatever its script does, the browser has nothing to complain of."""
    browsers.show(browser, page.as_uri(), width=1200, dark=False)
    yield browser
    assert browser.get_log("browser") == []


def one(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def press(browser, text: str) -> None:
    browser.find_element(By.XPATH, f"//button[contains(., '{text}')]").click()


def point_at(browser, selector: str) -> ActionChains:
    actions = ActionChains(browser).move_to_element(one(browser, selector))
    actions.perform()
    return actions


def test_chart_tells_the_values_of_the_point_under_the_pointer(opened, drawn):
    title, values = one(opened, ".readout h3"), one(opened, ".readout dl")
    assert title.text == "Chosen"
    point_at(opened, "#front-chart rect.original")
    title, values = one(opened, ".readout h3"), one(opened, ".readout dl")
    (reference,) = points_of(drawn, "original")
    assert title.text == "Original network" and f"{reference['miou']:.2f} %" in values.text
    heads = {f"{head['exits'][0]['exit']}.{head['exits'][0]['head']} alone": head for head in points_of(drawn, "head")}
    seen = set()
    for number in range(len(opened.find_elements(By.CSS_SELECTOR, "#front-chart circle.head"))):
        point_at(opened, f"#front-chart g:nth-of-type({number + 1}) circle.head")
        title, values = one(opened, ".readout h3").text, one(opened, ".readout dl").text
        if title in heads:  # others lie below a point of the front
            assert f"{heads[title]['miou']:.2f} %" in values and f"mean\n{heads[title]['mean']:.4g} GMACs" in values
            seen.add(title)
    assert seen


def test_a_click_pins_a_point_and_keys_step(opened, drawn):
    def title() -> str:
        return one(opened, ".readout h3").text

    point_at(opened, "#front-chart rect.original").click().perform()
    point_at(opened, "#front-chart circle.chosen")
    assert title() == "Original network"
    press(opened, "Unpin")
    point_at(opened, "#front-chart circle.chosen")
    assert title() != "Original network"
    chart, titles = one(opened, "#front-chart svg"), []
    for key in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT):
        for _ in drawn["points"]:
            chart.send_keys(key)
            titles.append(title())
    count = len(points_of(drawn, "front"))
    assert {"Chosen", "Original network", *(f"Front, {k + 1} of {count}" for k in range(count))} == {*titles[len(drawn["points"]) - 1 :]}
    chart.send_keys(Keys.ARROW_DOWN)
    assert title().endswith(" alone")


def test_viewer_steps_through_images_and_exits(opened, drawn):
    images, exits = drawn["images"], [name.partition(".")[0] for name in SHOWN]

    def shown() -> tuple[str, str]:
        name, mask = (caption.text for caption in opened.find_elements(By.CSS_SELECTOR, ".panes figcaption")[:3:2])
        (image,) = (image for image in images if image["name"] == name)
        at_exit = image["exits"][exits.index(mask.removeprefix("mask of "))]
        sources = [picture.get_attribute("src") for picture in opened.find_elements(By.CSS_SELECTOR, ".panes img")]
        assert sources == [image["photo"], image["label"], at_exit["mask"], at_exit["confidence"], at_exit["errors"]]
        assert f"{at_exit['miou']:.2f}" in one(opened, ".facts").text
        return name, mask.removeprefix("mask of ")

    by_loss = [(image["name"], exits[image["leaves"]]) for image in sorted(images, key=lambda image: -image["lost"])]
    assert shown() == by_loss[0]
    press(opened, "Next")
    assert shown() == by_loss[1]
    other = {"exit1": "final", "final": "exit1"}[by_loss[1][1]]
    opened.find_element(By.XPATH, f"//div[@id='viewer']//button[contains(., '{other}')]").click()
    assert shown() == (by_loss[1][0], other)
    viewer = one(opened, "#viewer")
    viewer.send_keys(Keys.ARROW_LEFT)
    assert shown() == by_loss[0]
    for key, exit_name in ((Keys.ARROW_UP, "exit1"), (Keys.ARROW_DOWN, "final")):
        viewer.send_keys(key)
        assert shown() == (by_loss[0][0], exit_name)
    one(opened, "#order option[value='worst']").click()
    worst = min(images, key=lambda image: image["exits"][image["leaves"]]["miou"])
    assert shown() == (worst["name"], exits[worst["leaves"]])
    assert one(opened, "#viewer output").text == f"1 of {len(images)}"
    one(opened, "#order option[value='surest']").click()
    assert shown()[0] == max(images, key=lambda image: image["exits"][0]["sure"])["name"]


@pytest.mark.parametrize("width", [390, 1200])
def test_dark_and_light_at_any_width(opened, page, width):
    backgrounds = set()
    for dark in (False, True):
        browsers.show(opened, page.as_uri(), width, dark)
        assert opened.execute_script("const page = document.documentElement; return page.scrollWidth <= page.clientWidth")
        backgrounds.add(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))
        heads = opened.find_elements(By.CSS_SELECTOR, "#front-chart circle.head")
        lightness = sorted({float(re.match(r"oklch\(([\d.]+)", head.value_of_css_property("fill"))[1]) for head in heads})
        assert len(lightness) == 2 and min(np.diff(lightness)) > 0.15  # exits are told apart by that alone
    assert len(backgrounds) == 2
