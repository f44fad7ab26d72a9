"""KEY=VALUE arrives as written, or is refused in one sentence; --data-root moves folders, not parts of names."""

import contextlib
import string

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("hypothesis")
import hypothesis
from helpers.repository import CONFIGS
from hypothesis import strategies as st
from mmengine.config import Config

from pe_spatial.cli.arguments import load_config
from pe_spatial.cli.main import build_parser
from pe_spatial.engine.options import set_options
from pe_spatial.errors import ConfigError

CONFIG = """
data_root = 'data/coco/'
load_from = None
model = dict(
    backbone=dict(variant='pe_spatial_b16_512', checkpoint='released', layer_decay_rate='vitdet', out_indices=[5, 8]),
    head=[dict(num_classes=80, thr=0.5), dict(num_classes=80, thr=0.6), dict(thr=0.7)],
    pads=(1, 2), frozen=True, init_cfg=dict(type='Pretrained', checkpoint='a.pth'), empty='')
train_dataloader = dict(batch_size=2, num_workers=4, dataset=dict(
    ann_file='a.json', data_root='data/coco/', data_prefix=dict(img='train/'), metainfo=dict(classes=('red', 'blue')),
    pipeline=[dict(type='Load'), dict(type='Resize', scale=(1333, 800)), dict(type='Flip', prob=0.5)]))
optim_wrapper = dict(optimizer=dict(lr=1e-4, betas=(0.9, 0.999)))
train_cfg = dict(max_iters=10)
other = ['data/coco', 'data/coco_extra/x', 'data/coco/y', 'data/cocoa']
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)

    def run(*arguments):
        return load_config(build_parser("train").parse_args([str(tmp_path / "c.py"), *arguments]))

    return run


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[int(part)] if isinstance(cfg, list | tuple) else cfg[part]
    return cfg


DATASET = "train_dataloader.dataset"
AS_WRITTEN = [
    # C1 and its siblings: text over text, over None and over nothing
    ("load_from", "/my runs/a b.pth", "/my runs/a b.pth"),
    ("load_from", "'/my runs/a b.pth'", "/my runs/a b.pth"),
    ("load_from", "/runs/a,b.pth", "/runs/a,b.pth"),
    ("load_from", "007", "007"),
    ("resume", "my run/x.pth", "my run/x.pth"),
    (f"{DATASET}.data_root", "/my data/", "/my data/"),
    (f"{DATASET}.ann_file", "it's mine, (2).json", "it's mine, (2).json"),
    (f"{DATASET}.ann_file", "2024", "2024"),
    ("model.backbone.lora", "dict(rank=4, targets=['qkv'])", {"rank": 4, "targets": ["qkv"]}),
    ("model.backbone.lora", "dict(rank=f())", "dict(rank=f())"),
    (f"{DATASET}.ann_file", '"quoted"', "quoted"),
    (f"{DATASET}.ann_file", "C:\\data\\new.json", "C:\\data\\new.json"),
    (f"{DATASET}.ann_file", "a=b#c.json", "a=b#c.json"),
    (f"{DATASET}.ann_file", "None", None),
    (f"{DATASET}.data_prefix.img", "", ""),
    (f"{DATASET}.data_prefix.img", " padded ", " padded "),
    (f"{DATASET}.data_prefix.img", "Ünïcode 映像/", "Ünïcode 映像/"),
    ("model.backbone.checkpoint", "1e5", "1e5"),
    ("experiment_name", "2024", "2024"),
    ("work_dir", "runs/1,2", "runs/1,2"),
    ("model.empty", "a, b", "a, b"),
    # classes: blanks inside, none around; text stays text, a tuple stays a tuple
    (f"{DATASET}.metainfo.classes", "traffic light,stop sign", ("traffic light", "stop sign")),
    (f"{DATASET}.metainfo.classes", "('traffic light', 'a, b')", ("traffic light", "a, b")),
    (f"{DATASET}.metainfo.classes", "007,1", ("007", "1")),
    (f"{DATASET}.metainfo.classes", "ball", ("ball",)),
    (f"{DATASET}.metainfo.classes.0", "traffic light", "traffic light"),
    # numbers, truth values and lists
    ("optim_wrapper.optimizer.lr", "1e-3", 1e-3),
    ("optim_wrapper.optimizer.lr", ".5", 0.5),
    ("optim_wrapper.optimizer.betas", "0.9,0.95", (0.9, 0.95)),
    ("optim_wrapper.accumulative_counts", "8", 8),
    ("train_cfg.max_iters", "1e5", 100_000),
    ("train_cfg.val_interval", "5", 5),
    ("model.frozen", "false", False),
    ("model.frozen", "0", False),
    ("model.backbone.out_indices", "[10]", [10]),
    ("model.backbone.out_indices", "1,2,3", [1, 2, 3]),
    ("model.backbone.out_indices", "[1, 2, 3]", [1, 2, 3]),
    ("model.backbone.out_indices", "last", "last"),
    ("model.backbone.layer_decay_rate", "0.7", 0.7),
    ("model.pads", "[3, 4]", (3, 4)),
    ("model.init_cfg", "None", None),
    ("model.backbone.frozen_stages", "3", 3),
    ("model.backbone.extra", "true", True),
    ("model.backbone.extra", "a,b", ["a", "b"]),
    ("model.backbone.extra", "[(1,2),(3,4)]", [(1, 2), (3, 4)]),
    ("model.backbone.extra", "two words, three", "two words, three"),
    ("model.backbone.extra", "{'a': [1, None]}", {"a": [1, None]}),
    ("model.backbone.variant", "{'img_size': 64}", {"img_size": 64}),
    ("model.backbone.variant", "dict(img_size=64)", {"img_size": 64}),
    (f"{DATASET}.pipeline.1.scale", "512,512", (512, 512)),
]


@pytest.mark.parametrize(("key", "text", "expected"), AS_WRITTEN)
def test_values_arrive_as_written(load, key, text, expected):
    arrived = value(load("--cfg-options", f"{key}={text}"), key)
    assert (arrived, type(arrived)) == (
        expected,
        type(arrived) if expected == {"a": [1, None]} else type(expected),
    ) or (isinstance(expected, dict) and dict(arrived) == expected)


REFUSED = [
    ("optim_wrapper.optimizer.lr=abc", r"optimizer\.lr=abc: the config has the number 0\.0001 there"),
    ("train_dataloader.batch_size=two", r"batch_size=two: the config has the number 2 there"),
    ("train_dataloader.batch_size=2x", "batch_size=2x"),
    ("train_dataloader.batch_size=", "batch_size=: the config has the number 2 there"),
    ("model.frozen=yes", r"model\.frozen=yes: the config has True there.* true or false"),
    ("model.head.0.thr=0,5x", "model.head.0.thr=0,5x"),
    (
        "model.init_cfg=released",
        r"model\.init_cfg=released: the config has a group of options there \(type, checkpoint\)",
    ),
    (
        "train_dataloder.batch_size=2",
        r"the config has no train_dataloder at its top level; did you mean train_dataloader\?",
    ),
    ("train_dataloader.batchsize=2", r"no batchsize in train_dataloader; did you mean batch_size\?"),
    ("optim_wrapper.optimizer.lrr=2", r"no lrr in optim_wrapper\.optimizer; did you mean lr\?"),
    ("model.backbon.variant=x", r"did you mean backbone\?"),
    ("whatever=2", "no whatever at its top level"),
    ("whatever.x=2", "no whatever at its top level"),
    ("model.frozen.x=2", r"model\.frozen is True, not a group"),
    ("model.head.7.thr=2", r"model\.head has 3 elements"),
    ("model.head.wrong=2", r"none of the 3 elements of model\.head has wrong.*model\.head\.0\.wrong"),
    (f"{DATASET}.pipeline.prop=1", r"none of the 3 elements of .*pipeline has prop; did you mean prob\?"),
    ("size=512,512", "no size at its top level"),
    ("data_root=/x", r"data_root.*--data-root"),
]


@pytest.mark.parametrize(("option", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(load, option, message):
    with pytest.raises(ConfigError, match=message) as error:
        load("--cfg-options", option)
    assert "\n" not in str(error.value)


def test_one_option_sets_all_elements_of_a_list(load):
    """C5: the heads of a cascade. Elements without the key, such as other transforms, stay as they are."""
    cfg = load("--cfg-options", "model.head.num_classes=1", f"{DATASET}.pipeline.prob=0.1", "model.head.1.thr=0.9")
    assert [head.get("num_classes") for head in cfg.model.head] == [1, 1, None]
    assert [head.thr for head in cfg.model.head] == [0.5, 0.9, 0.7]
    assert [step.get("prob") for step in cfg.train_dataloader.dataset.pipeline] == [None, None, 0.1]


def test_data_root_moves_whole_components(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, root in (("/new", "/new"), ("/new/", "/new"), ("~/x y", f"{tmp_path}/x y")):
        cfg = load("--data-root", given)
        assert cfg.other == [root, "data/coco_extra/x", f"{root}/y", "data/cocoa"]
        assert cfg.train_dataloader.dataset.data_root == f"{root}/"
        assert cfg.train_dataloader.dataset.pipeline[1].scale == (1333, 800)
    with pytest.raises(ConfigError, match="--data-root is empty"):
        load("--data-root", "")


@pytest.mark.parametrize("arguments", [("--cfg-options", "model.frozen=0", "c.py"), ("c.py", "--cfg-options", "a")])
def test_positional_arguments_after_a_list_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        build_parser("train").parse_args(arguments)
    assert end.value.code == 2
    assert (
        f"{arguments[-1]!r} is not KEY=VALUE; positional arguments go before --cfg-options" in capsys.readouterr().err
    )


def test_positional_arguments_after_a_list_of_choices_are_named(capsys):
    with pytest.raises(SystemExit) as end:
        build_parser("infer_depth").parse_args(["--checkpoint", "c.pth", "--write", "png", "photo.jpg"])
    assert end.value.code == 2
    assert "'photo.jpg'" in (err := capsys.readouterr().err)
    assert "positional arguments go before --write" in err


DERIVED = """
_base_ = [{base!r}]
{change}
"""


@pytest.mark.parametrize("base", ["pe_spatial_cascade_coco.py", "_base_/datasets/ade20k_512.py"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_variable_that_reaches_nothing_is_refused(tmp_path, base, nested):
    name = "size" if "coco" in base else "crop_size"
    (tmp_path / "c.py").write_text(DERIVED.format(base=str(CONFIGS / base), change=f"{name} = (512, 256)"))
    if nested:
        (tmp_path / "d.py").write_text(DERIVED.format(base=str(tmp_path / "c.py"), change="train_cfg = dict()"))
    with pytest.raises(ConfigError, match=rf"c\.py sets {name}, which .*changes nothing"):
        load_config(build_parser("train").parse_args([str(tmp_path / ("d.py" if nested else "c.py"))]))


def test_a_variable_that_is_used_or_says_the_same_is_fine(tmp_path):
    used = "train_dataloader = dict(dataset=dict(pipeline=[dict(type='R', scale=size)]))"
    change = f"size = (512, 512)\n{used}\nseed_of_mine = 3"
    (tmp_path / "c.py").write_text(DERIVED.format(base=str(CONFIGS / "pe_spatial_cascade_coco.py"), change=change))
    assert load_config(build_parser("train").parse_args([str(tmp_path / "c.py")])).size == (512, 512)
    same = DERIVED.format(base=str(CONFIGS / "pe_spatial_cascade_coco.py"), change="size = (1024, 1024)")
    (tmp_path / "c.py").write_text(same)
    load_config(build_parser("train").parse_args([str(tmp_path / "c.py")]))


def test_what_training_dumped_loads(tmp_path):
    cfg = load_config(build_parser("train").parse_args([str(CONFIGS / "pe_spatial_cascade_coco.py")]))
    cfg.dump(tmp_path / "dumped.py")
    assert load_config(build_parser("train").parse_args([str(tmp_path / "dumped.py")])).model == cfg.model


QUICK = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
NAMES = st.text(string.printable.replace("\n", "").replace("\r", "") + "äß映", min_size=1, max_size=12)
VALUES = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.lists(st.integers()),
    st.tuples(NAMES, NAMES),
).filter(lambda value: not isinstance(value, tuple) or not any("'" in name for name in value))


def typed(key, text):
    """Return what arrives of KEY=TEXT, which is split at its first equals sign, as argparse's action does."""
    cfg = Config.fromstring(CONFIG, ".py")
    set_options(cfg, dict([f"{key}={text}".split("=", 1)]))
    return value(cfg, key)


@QUICK
@hypothesis.given(NAMES.filter(lambda text: text != "None" and text[0] not in "'\""))
def test_any_name_arrives_as_typed(text):
    assert typed("train_dataloader.dataset.ann_file", text) == text
    assert typed("load_from", f'"{text}"') == text


@QUICK
@hypothesis.given(VALUES)
def test_any_value_arrives_in_its_type(given):
    text = "('{}', '{}')".format(*given) if isinstance(given, tuple) else repr(given)
    arrived = typed("model.backbone.extra", text)
    assert (arrived, type(arrived)) == (given, type(given))


@QUICK
@hypothesis.given(NAMES)
def test_any_text_is_a_number_or_is_refused(text):
    with contextlib.suppress(ConfigError):
        assert not isinstance(typed("train_dataloader.batch_size", text), str) or text[0] in "'\""


@pytest.mark.parametrize(
    ("key", "tested"),
    [
        ("val_dataloader.dataset.ann_file", "b.json"),
        ("test_dataloader.dataset.ann_file", "b.json"),
        ("val_evaluator.x", "a.json"),
    ],
)
def test_the_test_follows_the_validation(key, tested):
    loader = dict(dataset=dict(ann_file="a.json"))
    cfg = Config(dict(val_dataloader=loader, test_dataloader=loader, val_evaluator=dict(x=1)))
    set_options(cfg, {key: "b.json" if "file" in key else "2"})
    assert cfg.test_dataloader.dataset.ann_file == tested
    assert "test_evaluator" not in cfg
    other = Config(dict(val_dataloader=loader, test_dataloader=dict(dataset=dict(ann_file="c.json"))))
    set_options(other, {"val_dataloader.dataset.ann_file": "b.json"})
    assert other.test_dataloader.dataset.ann_file == "c.json"
