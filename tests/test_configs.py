"""Configurations: the JSON round trip, strict reading, overrides, the head space, and the checks of every value."""

import dataclasses
import json
import math

import pytest

from mess_tf import configs
from mess_tf.configs import HEAD_SPACE, RECIPES, BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec, StageConfig


def changed(change) -> str:
    """The default configuration in JSON, after `change` has been applied to the parsed document."""
    document = json.loads(configs.to_json(Config()))
    change(document)
    return json.dumps(document)


# === JSON ===


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    assert configs.from_json(configs.to_json(RECIPES[name])) == RECIPES[name]


def test_a_configuration_with_no_default_value_survives_json():
    config = Config(
        DataConfig("folder", "D", "a", "b", (32, 48), (16, 32), 7, (1.0, 2.0), False, 0.1, 0.2, 0.3, 4, 5, 0.6, 8, "letterbox"),
        BackboneConfig("resnet50", 1.0, 8, "FILE", 0.9, 0.5),
        ExitsConfig(3, ("a", "b"), "fcn-r2-b0", "deeplab-r4-b1-d2", ("fcn-r8-b3-d4",)),
        StageConfig(
            *(
                "network",
                "all",
                "filtered",
                "soft.npz",
                "best.npz",
                "stale",
                8,
                9,
                0.1,
                2.0,
                3,
                4,
                0.5,
                0.6,
                0.7,
                0.8,
                0.9,
                0.11,
                "none",
                5,
                6,
                7,
                8,
            ),
            *("mixed_bfloat16", 9, True),
        ),
        StageConfig("heads", "none", "all", "soft.npz", "best.npz", alpha=0.2),
    )
    assert configs.from_json(configs.to_json(config)) == config


def test_a_file_of_before_a_field_was_added_means_what_was_done_then():
    document = json.loads(configs.to_json(RECIPES["demo"]))
    del document["data"]["resize"], document["stage1"]["regions"], document["stage2"]["region_cell"], document["stage1"]["jit_compile"]
    assert configs.from_json(json.dumps(document)) == RECIPES["demo"]


def test_load_config_reads_the_file_of_a_workdir(tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(RECIPES["camvid_lite0"]))
    assert configs.load_config(str(tmp_path)) == RECIPES["camvid_lite0"]


def test_load_config_of_a_folder_without_one_says_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"workdir: must hold config\.json, which `python -m mess_tf\.train` makes, got "):
        configs.load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["stage1"].update(learning_rat=1.0),
            r"config\.json\.stage1: must be a known name, nearest \['learning_rate'.*, got 'learning_rat'",
        ),
        (lambda d: d.update(dat={}), r"config\.json: must be a known name, nearest \['data'.*, got 'dat'"),
        (lambda d: d["data"].pop("flip"), r"config\.json\.data: must be complete, got \"nothing for \['flip'\]\""),
        (lambda d: d.pop("stage2"), r"config\.json: must be complete, got \"nothing for \['stage2'\]\""),
        (lambda d: d["exits"].update(count="6"), r"config\.json\.exits\.count: must be an integer, got '6'"),
        (lambda d: d["exits"].update(count=True), r"config\.json\.exits\.count: must be an integer, got True"),
        (lambda d: d["data"].update(flip=1), r"config\.json\.data\.flip: must be true or false, got 1"),
        (lambda d: d["data"].update(source=None), r"config\.json\.data\.source: must be a text, got None"),
        (lambda d: d["data"].update(input_size=[32, 64, 3]), r"config\.json\.data\.input_size: must be a list of 2, got \[32, 64, 3\]"),
        (lambda d: d["data"].update(input_size=32), r"config\.json\.data\.input_size: must be a list, written like \[1,2\], got 32"),
        (lambda d: d["data"].update(input_size=[32.0, 64]), r"config\.json\.data\.input_size: must be an integer, got 32\.0"),
        (lambda d: d["stage1"].update(exits="some"), r"config\.json\.stage1\.exits: must be one of .*'round_robin'.*, got 'some'"),
        (lambda d: d.update(backbone=3), r"config\.json\.backbone: must be an object, got 3"),
        (lambda d: d.update(format=99), r"config\.json: format: must be 1, got 99"),
        (lambda d: d.pop("format"), r"config\.json: format: must be 1, got None"),
    ],
)
def test_json_is_read_strictly(change, message):
    with pytest.raises(ValueError, match=message):
        configs.from_json(changed(change))


def test_json_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match=r"config\.json: must be an object, got \[\]"):
        configs.from_json("[]")


def test_a_whole_number_is_a_good_float():
    config = configs.from_json(changed(lambda d: d["stage1"].update(momentum=0)))
    assert type(config.stage1.momentum) is float


# === Overrides ===


def test_overrides_change_what_they_name_and_nothing_else():
    overrides = ["stage1.learning_rate=0.01", "data.input_size=[32, 64]", "data.source=voc", 'backbone.weights="a=b"', "data.flip=false"]
    overrides += ['exits.heads=["fcn-r1-b0"]', "stage2.distillation=all"]
    config = configs.apply_overrides(Config(), overrides)
    assert config == Config(
        data=DataConfig(input_size=(32, 64), source="voc", flip=False),
        backbone=BackboneConfig(weights="a=b"),
        exits=ExitsConfig(heads=("fcn-r1-b0",)),
        stage1=StageConfig(learning_rate=0.01),
        stage2=dataclasses.replace(Config().stage2, distillation="all"),
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.learning_rat=1", r"--set stage1: must be a known name, nearest \['learning_rate'.*, got 'learning_rat'"),
        ("stage3.epochs=1", r"--set: must be a known name, nearest \['stage.*got 'stage3'"),
        ("stage1.epochs=1.5", r"stage1\.epochs: must be an integer, got 1\.5"),
        ("stage1.epochs=many", r"stage1\.epochs: must be an integer, got 'many'"),
        ("stage1.precision=float16", r"stage1\.precision: must be one of .*, got 'float16'"),
        ("stage1.epochs=-1", r"stage1\.epochs: must be at least 0, got -1"),
        ("stage1.epochs", r"--set: must be section\.field=value, got 'stage1\.epochs'"),
        ("stage1=3", r"--set: must be section\.field=value, got 'stage1=3'"),
    ],
)
def test_bad_overrides_are_errors(override, message):
    with pytest.raises(ValueError, match=message):
        configs.apply_overrides(Config(), [override])


def test_with_data_dir():
    config = RECIPES["camvid_lite0"]
    assert configs.with_data_dir(config, "") == config
    assert configs.with_data_dir(config, "D") == configs.apply_overrides(config, ["data.data_dir=D"]) != config


def test_recipes_are_known_by_name():
    assert configs.of_recipe("", "", []) == configs.RECIPES["default"]
    for name in RECIPES:
        configs.of_recipe(name, "", [])
    with pytest.raises(ValueError, match=r"--recipe: must be a known name, nearest \['camvid_lite0'.*, got 'camvid'"):
        configs.of_recipe("camvid", "", [])


# === Heads ===


def test_head_space_has_120_heads_80_of_the_papers_kinds():
    names = [spec.name for spec in HEAD_SPACE]
    assert len(names) == len(set(names)) == len(set(HEAD_SPACE)) == 120
    assert sum(spec.kind != "decoder" for spec in HEAD_SPACE) == 80


def test_head_names_are_read_back():
    assert [HeadSpec.parse(spec.name) for spec in HEAD_SPACE] == list(HEAD_SPACE)
    assert HeadSpec("decoder", 4, 1, 2).name == "decoder-r4-b1-d2"
    assert HeadSpec("fcn", 1, 0).name == "fcn-r1-b0"
    assert HeadSpec.parse("rest") == HeadSpec("rest")


@pytest.mark.parametrize("name", ["fcn-r3-b0", "fcn-r1-b0-d2", "", "FCN-r1-b0"])
def test_an_unknown_head_name_lists_the_nearest(name):
    form = r"KIND-rREDUCTION-bBLOCKS, with blocks also -dDILATION"
    with pytest.raises(ValueError, match=rf"head: must be rest or {form}, such as \S+, \S+, \S+, got"):
        HeadSpec.parse(name)


def test_no_heads_means_all_heads():
    assert ExitsConfig().head_specs == HEAD_SPACE
    assert ExitsConfig(heads=("fcn-r2-b0", "fcn-r1-b0")).head_specs == (HeadSpec("fcn", 2), HeadSpec("fcn", 1))


# === Values ===


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: DataConfig(input_size=(15, 64)), "input_size"),
        (lambda: DataConfig(crop_size=(32, 0)), "crop_size"),
        (lambda: DataConfig(scale_range=(2.0, 1.0)), "scale_range"),
        (lambda: DataConfig(scale_range=(0.0, 1.0)), "scale_range"),
        (lambda: DataConfig(brightness=1.0), "brightness"),
        (lambda: DataConfig(contrast=-0.1), "contrast"),
        (lambda: DataConfig(saturation=2.0), "saturation"),
        (lambda: DataConfig(synthetic_hard=1.5), "synthetic_hard"),
        (lambda: BackboneConfig(name="resnet"), "name"),
        (lambda: BackboneConfig(name="keras_file", weights="imagenet"), "weights"),
        (lambda: BackboneConfig(input_scale=0), "input_scale"),
        (lambda: StageConfig(teacher="soft.npz"), "teacher"),
        (lambda: BackboneConfig(output_stride=4), "output_stride"),
        (lambda: BackboneConfig(width=0.0), "width"),
        (lambda: BackboneConfig(name="resnet50", width=0.5), "width"),
        (lambda: BackboneConfig(batch_norm_momentum=1.0), "batch_norm_momentum"),
        (lambda: HeadSpec(kind="unet"), "kind"),
        (lambda: HeadSpec(reduction=3), "reduction"),
        (lambda: HeadSpec(blocks=4), "blocks"),
        (lambda: HeadSpec(blocks=1, dilation=3), "dilation"),
        (lambda: HeadSpec(blocks=0, dilation=2), "dilation"),
        (lambda: HeadSpec(kind="rest", reduction=2), "head"),
        (lambda: ExitsConfig(count=1), "count"),
        (lambda: ExitsConfig(final_head="rest"), "final_head"),
        (lambda: ExitsConfig(final_head="x"), "final_head"),
        (lambda: ExitsConfig(plain_head="x"), "plain_head"),
        (lambda: ExitsConfig(heads=("x",)), "heads"),
        *(
            (lambda field=field: StageConfig(**{field: "x"}), field)
            for field in ("trains", "exits", "regions", "class_weights", "precision")
        ),
        *(
            (lambda field=field: StageConfig(**{field: 0}), field)
            for field in ("batch_size", "pixel_stride", "group_size", "eval_epochs", "checkpoint_steps")
        ),
        (lambda: StageConfig(alpha=1.1), "alpha"),
        (lambda: StageConfig(label_smoothing=-0.1), "label_smoothing"),
        (lambda: StageConfig(temperature=0.0), "temperature"),
        *((lambda value=value: StageConfig(learning_rate=value), "learning_rate") for value in (0.0, math.inf, math.nan)),
        *(
            (lambda field=field, value=value: StageConfig(**{field: value}), field)
            for field in ("momentum", "weight_decay", "final_learning_rate", "power")
            for value in (-1.0, math.nan, math.inf)
        ),
        *((lambda build=build, seed=seed: build(seed=seed), "seed") for build in (DataConfig, StageConfig) for seed in (-1, 2**32)),
        (lambda: DataConfig(input_size=(2048, 4096)), "input_size"),
        (lambda: DataConfig(scale_range=(1.0, math.inf)), "scale_range"),
        (lambda: StageConfig(trains="heads", distillation="x"), "distillation"),
    ],
)
def test_a_bad_value_raises_with_its_name(build, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: must be .*, got "):
        build()


@pytest.mark.parametrize(
    ("override", "argument"),
    [
        ("stage1.epochs=-3", "stage1.epochs"),
        ("stage2.epochs=-3", "stage2.epochs"),
        ("data.brightness=2", "data.brightness"),
        ("data.label_values=x", "data.label_values"),
        ("backbone.width=0", "backbone.width"),
        ('exits.heads=["fcn"]', "exits.heads"),
        ("exits.final_head=fcn", "exits.final_head"),
    ],
)
def test_a_bad_value_of_a_flag_or_file_raises_with_its_section(override, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: must be .*, got "):
        configs.apply_overrides(Config(), [override])
    section, field = argument.split(".")
    text = override.partition("=")[2]
    value = text if text.isalpha() else json.loads(text)
    with pytest.raises(ValueError, match=rf"^config\.json\.{argument}: must be .*, got "):
        configs.from_json(changed(lambda document: document[section].update({field: value})))


def test_a_recipe_is_not_in_the_way_of_another_backbone():
    own = ["backbone.name=keras_file", "backbone.weights=own.keras"]
    found = configs.apply_overrides(RECIPES["smoke"], own)
    assert found.backbone == BackboneConfig("keras_file", weights="own.keras") and found.exits == RECIPES["smoke"].exits
    assert configs.apply_overrides(RECIPES["demo"], own).exits.layers == ()
    assert configs.apply_overrides(RECIPES["demo"], [*own, 'exits.layers=["a"]']).exits.layers == ("a",)
    assert configs.apply_overrides(RECIPES["smoke"], ["backbone.name=mobilenet_v3_small"]).backbone.width == 0.35
    assert configs.apply_overrides(RECIPES["demo"], ["backbone.name=mobilenet_v2"]) == RECIPES["demo"]
    with pytest.raises(ValueError, match=r"^backbone\.width: must be positive, and 1 unless"):
        configs.apply_overrides(RECIPES["smoke"], [*own, "backbone.width=0.5"])


def test_training_size_is_the_crop_or_else_the_input():
    assert DataConfig(input_size=(32, 64)).training_size == (32, 64)
    assert DataConfig(input_size=(32, 64), crop_size=(16, 32)).training_size == (16, 32)
