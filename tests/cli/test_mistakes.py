"""Common mistakes end in one sentence before anything is built."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.repository import CONFIGS

from pe_spatial.cli.main import main
from pe_spatial.engine.configs import mixed_packages, read_config

CONFIG = f"""
_base_ = [{str(CONFIGS / 'pe_spatial_cascade_coco.py')!r}]
custom_imports = dict(imports=['pe_spatial.integrations.openmmlab'], _delete_=True)
"""


@pytest.fixture
def sentence(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command and returns the sentence that it ends with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    write_coco(tmp_path / "data/coco", split="train2017")
    write_coco(tmp_path / "data/coco", split="val2017")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_, **__):
        raise AssertionError("a runner is built")

    monkeypatch.setattr("pe_spatial.engine.training.build_runner", refuse)
    monkeypatch.setattr("pe_spatial.engine.evaluation.build_runner", refuse)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert isinstance(end.value.code, str)
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        assert capsys.readouterr().out == ""
        return end.value.code

    return run


RANDOM = ("--cfg-options", "model.backbone.init_cfg=None")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", "c.py", "gone.pth"), "no checkpoint at gone.pth"),
        (("test", "c.py", "data"), "data should hold one file of weights"),
        (("train", "c.py", *RANDOM, "load_from=gone.pth"), "no checkpoint at gone.pth"),
        (("train", "c.py", "--cfg-options", "model.backbone.init_cfg.checkpoint=gone.pt"), "no checkpoint at gone.pt"),
        (("train", "c.py", *RANDOM, "--data-root", "elsewhere"), "elsewhere/annotations/instances_train2017.json"),
        (("test", "c.py", __file__, "--data-root", "elsewhere"), "elsewhere/annotations/instances_val2017.json"),
        (
            ("train", "c.py", *RANDOM, "val_dataloader.dataset.ann_file=annotations/other.json"),
            "annotations/other.json",
        ),
        (("train", "c.py", *RANDOM, "train_dataloader.dataset.data_prefix.img=gone/"), "data/coco/gone"),
        (("train", "c.py", *RANDOM, "--launcher", "pytorch"), "--launcher pytorch"),
        (("train", "c.py", *RANDOM, "--launcher", "slurm"), "--launcher slurm"),
        (("train", "c.py", *RANDOM, "--launcher", "mpi"), "--launcher mpi"),
        (("test", "c.py", __file__, "--launcher", "pytorch"), "dist_test.sh"),
        (("train", "gone.py"), "gone.py"),
        (("plan", "gone.py"), "gone.py"),
        (("plan", "c.py", "--cfg-options", "model.backbone.variant.x=1"), "variant"),
        (("plan", "c.py", "--cfg-options", "model.backbon.variant=x"), "did you mean backbone"),
        (("sweep_layers", "gone.py", "--layers", "all"), "gone.py"),
        (("sweep_layers", "c.py", "--layers", "all", "--data", "gone"), "gone does not exist; give a folder"),
        (("train", str(CONFIGS / "pe_spatial_zeroshot_davis.py"), "--data", "data/coco"), "configs for detection"),
        (("train", "c.py", "--data", "data/coco", "--data-root", "data"), "omit --data-root"),
        (("browse", "data/coco", "--data", "data/coco"), "data/coco is a dataset; omit them"),
        (("swap_backbone", "gone.py", "--variant", "pe_spatial_s16_512"), "gone.py"),
        (("swap_backbone", "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "--variant", "timm:no_one"), "no_one"),
        (("render_synthetic", "/dev/null/x"), "/dev/null/x"),
        (("check_swap", "--results", "/dev/null/x/y.jsonl"), "/dev/null/x"),
        (("consolidate_checkpoint", "gone.pth", "out.pth"), "no checkpoint at gone.pth"),
    ],
    ids=lambda value: "-".join(value)[-40:].replace("/", "_") if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_sentence_before_anything_is_built(sentence, arguments, message):
    assert message in sentence(*arguments)


def test_the_work_dir_of_an_installed_config(monkeypatch):
    """`pe_spatial::x.py` writes to work_dirs/x and work_dirs/x_layers."""
    folders = []

    class Stop(Exception):
        pass

    def sweep(*_, folder, **__):
        folders.append(folder)
        raise Stop

    monkeypatch.setattr("pe_spatial.probing.sweep.LayerSweep", sweep)
    for name in ("pe_spatial::pe_spatial_lin1_nyu.py", str(CONFIGS / "pe_spatial_lin1_nyu.py")):
        with pytest.raises(Stop):
            main(["sweep_layers", name, "--layers", "all"])
    with pytest.raises(Stop):
        main(["sweep_layers", name, "--layers", "all", "--work-dir", "mine"])
    assert folders == ["work_dirs/pe_spatial_lin1_nyu_layers"] * 2 + ["mine"]


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    """C6: custom_imports of a module beside the user's config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    (tmp_path / "my_module_of_c6.py").write_text("here = True")
    (tmp_path / "c.py").write_text("custom_imports = dict(imports=['my_module_of_c6'])")
    read_config("c.py")
    assert sys.modules.pop("my_module_of_c6").here


def test_mixed_packages_are_named(monkeypatch):
    """K2: OpenMMLab's own packages have the import names of onedl-*, and overwrite their files or are overwritten."""
    names = ["mmdet", "onedl-mmdetection", "torch"]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [SimpleNamespace(name=name) for name in names])
    assert "mmdet and onedl-mmdetection" in mixed_packages()
    names.remove("mmdet")
    assert mixed_packages() is None
