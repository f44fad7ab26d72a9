"""Files and classes that do not fit together are found before the first step, with the options that fix them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmdet")
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.runner import BaseLoop

import pe_spatial.engine
from pe_spatial.engine.checks import CheckClassesHook, check_classes, check_files, empty_sets_as_errors
from pe_spatial.engine.configs import installed_config
from pe_spatial.engine.evaluation import limit_test, write_predictions
from pe_spatial.engine.options import set_options
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet


@pytest.fixture
def cfg(tmp_path):
    """A test set and its evaluator, as in any config of MMDetection."""
    content = dict(images=[dict(id=1)], categories=[dict(id=1, name="ball")], annotations=[])
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    dataset = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", metainfo=dict(classes=("bat",)))
    loader = dict(dataset=dataset)
    evaluator = dict(type="CocoMetric", ann_file=str(tmp_path / "a.json"))
    return Config(dict(test_dataloader=loader, test_evaluator=evaluator, default_scope="mmdet"))


def test_files_that_fit(cfg):
    check_files(cfg, "test")
    check_files(cfg, "val")  # there is none
    cfg.test_dataloader.dataset = dict(type="ConcatDataset", datasets=[cfg.test_dataloader.dataset])
    check_files(cfg, "test")


@pytest.mark.parametrize("several", [False, True])
def test_evaluator_of_another_file(cfg, tmp_path, several):
    """A7."""
    cfg.test_dataloader.dataset.ann_file = "b.json"
    if several:
        cfg.test_evaluator = [dict(type="DumpResults"), cfg.test_evaluator]
    with pytest.raises(ConfigError, match=r"its evaluator reads .*a.json.* --cfg-options") as error:
        check_files(cfg, "test")
    option = str(error.value).split("--cfg-options ")[1]
    set_options(cfg, dict([option.split("=", 1)]))
    check_files(cfg, "test")
    assert (cfg.test_evaluator[1] if several else cfg.test_evaluator).ann_file == str(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("place", "option"),
    [
        (lambda cfg: cfg.test_dataloader.dataset, "test_dataloader.dataset.ann_file"),
        (lambda cfg: cfg.test_evaluator, "test_evaluator.ann_file"),
    ],
)
def test_absent_annotation_file(cfg, tmp_path, place, option):
    node = place(cfg)
    node.ann_file = str(tmp_path / "c.json")
    if option.startswith("test_evaluator"):
        cfg.test_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.test_dataloader.dataset)
    with pytest.raises(DatasetError, match=rf"no annotation file at .*c\.json; .* contains a.json, b.json.* {option}"):
        check_files(cfg, "test")
    node.ann_file = str(tmp_path / "none" / "c.json")
    with pytest.raises(DatasetError, match=r"there is no folder .*none"):
        check_files(cfg, "test")


def test_set_without_any_object_of_the_classes(cfg):
    """What mmengine says of mmdet's own dataset."""
    with (
        pytest.raises(DatasetError, match=r"classes of the config, bat; the file has ball"),
        empty_sets_as_errors(cfg, "test"),
    ):
        raise ValueError("need at least one array to concatenate")
    with pytest.raises(ValueError, match="other"), empty_sets_as_errors(cfg, "test"):
        raise ValueError("other")


HEADS = {
    "cascade": (
        "pe_spatial::pe_spatial_cascade_coco.py",
        "model.roi_head.bbox_head.num_classes=1 model.roi_head.mask_head.num_classes=1",
    ),
    "DETA": ("pe_spatial::pe_spatial_deta_g14.py", "model.bbox_head.num_classes=1"),
    "another detector": ("mmdet::atss/atss_r50_fpn_1x_coco.py", "model.bbox_head.num_classes=1"),
    "a tracker": (
        "mmdet::bytetrack/bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval.py", None,
    ),
    "a segmenter": (
        "mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py",
        "model.decode_head.num_classes=1 model.auxiliary_head.num_classes=1",
    ),
    "heads of text": ("mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py", None),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_heads_of_another_number_of_classes(case):
    """A5 and A6; C5: one option sets all heads of a cascade."""
    name, options = HEADS[case]
    if name.startswith("pe_spatial"):
        from helpers.repository import CONFIGS

        cfg = Config.fromfile(CONFIGS / name.partition("::")[2])
    else:
        cfg = Config.fromfile(installed_config(name), import_custom_modules=False)
    metas = dict(train=dict(classes=("ball",)), val=dict(classes=["ball"]))
    if options is not None:
        with pytest.raises(ConfigError, match="the train set has 1 class ") as error:
            check_classes(cfg.model, metas)
        assert str(error.value).endswith(f"--cfg-options {options}")
        set_options(cfg, dict(option.split("=") for option in options.split()))
    check_classes(cfg.model, metas)


@pytest.mark.parametrize("number", [2, 80])
def test_one_head_of_a_list_or_inside_a_wrapper(number):
    model = dict(
        roi_head=dict(bbox_head=[dict(num_classes=5), dict(num_classes=number)]),
        rpn_head=dict(num_classes=1),
        backbone=dict(num_classes=1000),
        teacher_config=dict(bbox_head=dict(num_classes=3)),
    )
    classes = dict(test=dict(classes=tuple("abcde")))
    for wrapped in (model, dict(type="BoxTTA", module=model)):
        with pytest.raises(ConfigError, match=rf"model\.roi_head\.bbox_head\.1\.num_classes is {number}"):
            check_classes(ConfigDict(wrapped), classes)


def test_sets_of_different_classes():
    with pytest.raises(ConfigError, match=r"val_dataloader\.dataset\.metainfo\.classes"):
        check_classes({}, dict(train=dict(classes=("a", "b")), val=dict(classes=("b", "a"))))
    panoptic = dict(train=dict(classes=("cat", "sky"), thing_classes=("cat",)))
    check_classes(dict(roi_head=dict(num_classes=1), panoptic_head=dict(num_classes=2)), panoptic)
    check_classes(dict(head=dict(num_classes=3)), dict(train=dict(classes=None), val={}))


class Loop(BaseLoop):
    def __init__(self, **dataset):
        self.dataloader = SimpleNamespace(dataset=SimpleNamespace(**dataset))

    def run(self):
        raise NotImplementedError


def test_hook_looks_at_the_loops_that_were_built(log):
    """mmdet's own dataset drops categories that the file lacks, without a word, and renumbers the others."""
    runner = SimpleNamespace(
        cfg=dict(model=dict(head=dict(num_classes=2))),
        logger=MMLogger.get_current_instance(),
        _train_loop=Loop(),  # a set without classes
        _val_loop=Loop(metainfo=dict(classes=("a", "b")), cat_ids=[1, 2], ann_file="x.json"),
        _test_loop=dict(type="TestLoop"),
    )
    CheckClassesHook().before_run(runner)
    assert not log
    runner._val_loop.dataloader.dataset.cat_ids = [1]
    CheckClassesHook().before_run(runner)
    assert "x.json has 1 of the 2 classes (a, b)" in log[-1][0]
    runner._val_loop.dataloader.dataset.cat_ids = []
    with pytest.raises(DatasetError, match="has 0 of the 2 classes"):
        CheckClassesHook().before_run(runner)
    runner.cfg["model"]["head"]["num_classes"] = 3
    with pytest.raises(ConfigError, match=r"model\.head\.num_classes is 3"):
        CheckClassesHook().before_run(runner)


def test_limit_reads_and_evaluates_the_first_images(cfg):
    limit_test(cfg, 2)
    assert cfg.test_dataloader.dataset.indices == 2
    assert cfg.test_evaluator[0].type == "CheckedCocoMetric"
    with pytest.raises(ConfigError, match="first 0 images"):
        limit_test(cfg, 0)
    cfg.test_evaluator = dict(type="CocoPanopticMetric", ann_file="a.json")
    with pytest.raises(ConfigError, match="CocoPanopticMetric evaluates all images of its file"):
        limit_test(cfg, 2)


def test_predictions_as_json_need_an_evaluator_that_writes_them(cfg):
    write_predictions(cfg, "out.json")
    assert cfg.test_evaluator[0] == dict(cfg.test_evaluator[0], type="CheckedCocoMetric", out_file="out.json")
    cfg.test_evaluator = dict(type="IoUMetric")
    with pytest.raises(ConfigError, match=r"out\.json needs an evaluator of COCO or LVIS"):
        write_predictions(cfg, "out.json")
    with pytest.raises(ConfigError, match=r"must end in \.pkl, or in \.json"):
        write_predictions(cfg, "out.csv")


def test_the_engine_registers_what_a_config_of_a_run_names():
    """Such a config evaluates in a new process, which imports less than the training did."""
    folder = Path(pe_spatial.engine.__file__).parent
    registering = {path.stem for path in folder.glob("*.py") if "register_module(" in path.read_text()}
    assert registering - {"fsdp"} <= set(pe_spatial.engine.__all__)  # fsdp needs a newer torch; the runner imports it
