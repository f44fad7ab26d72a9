"""Cheap probes against scikit-like references, labels of every form, and the hook that measures a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("mmcv")
from helpers.repository import REPO
from mmengine.config import Config
from PIL import Image

from pe_spatial import from_pretrained
from pe_spatial.alignment.material import NO_CLASS, open_material
from pe_spatial.alignment.measure import encoding_of, measure
from pe_spatial.alignment.probes import (
    DECAY,
    LeastSquares,
    count_confusion,
    matched,
    mean_iou,
    pool_classes,
    pool_depth,
    random_warp,
)
from pe_spatial.alignment.progress import summarize
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.errors import DatasetError
from pe_spatial.synthetic import write_dataset

pytestmark = pytest.mark.mmdet


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve images to train on and three short clips to score on, 96 pixels wide."""
    root = tmp_path_factory.mktemp("worlds") / "world"
    return write_dataset(root, scenes={"train": 4, "val": 2}, frames_per_scene=4, size=(96, 96))


def test_least_squares_equals_ridge_regression_of_all_patches_at_once():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(60, n, generator=generator, dtype=torch.float64) * 5 + 3 for n in (4, 2))
    y, weights = x[:, :2] @ torch.ones(2, 2).double() + w, torch.rand(60, generator=generator, dtype=torch.float64)
    probe = LeastSquares()
    for part in (slice(0, 20), slice(20, 60)):
        probe.add(x[part], y[part], weights[part])
    probe.solve()
    p = weights / weights.sum()
    cx, cy = x - p @ x, y - p @ y
    cov = cx.T @ (cx * p[:, None])
    expected = torch.linalg.solve(cov + DECAY * cov.diagonal().diag(), cx.T @ (cy * p[:, None]))
    assert_close(probe(x).double(), cx @ expected + p @ y, rtol=1e-4, atol=1e-4)


def test_pooling_counts_labeled_pixels_alone():
    classes = np.array([[0, 0, 1, 1], [0, NO_CLASS, 1, 2]], np.uint8)
    parts, weights = pool_classes(classes, 3, (1, 2))
    assert_close(parts, torch.tensor([[1.0, 0, 0], [0, 0.75, 0.25]]))
    assert_close(weights, torch.tensor([0.75, 1.0]))
    depth, known = pool_depth(np.array([[1, 4, 0, 0]], np.float32), (1, 2))
    assert_close(depth, torch.tensor([[np.log(2)], [0.0]]).float())
    assert known.tolist() == [1, 0]
    confusion = count_confusion(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 2]]), classes, 3)
    assert mean_iou(confusion) == pytest.approx(100 * (3 / 4 + 2 / 3 + 1) / 3)


def test_features_that_are_their_position_match_everywhere_and_constants_nowhere():
    size, generator = (80, 120), np.random.default_rng(0)
    warp = random_warp(size, generator)
    y, x = torch.meshgrid((torch.arange(40) + 0.5) * 2, (torch.arange(60) + 0.5) * 2, indexing="ij")
    at = torch.stack((x, y), -1).flatten(0, 1).double()

    def code(points):  # a smooth code in which near points are similar and length is 1
        waves = torch.cat([torch.cat(((points * f).sin(), (points * f).cos()), 1) for f in (0.02, 0.05, 0.1)], 1)
        return waves.T.unflatten(1, (40, 60))

    forward = at @ torch.from_numpy(warp[:, :2]).T + torch.from_numpy(warp[:, 2])
    right = matched(code(forward), code(at), warp, size)
    assert len(right) > 1000
    assert right.float().mean() > 0.97
    noise = torch.rand(8, 40, 60, generator=torch.Generator().manual_seed(0))
    assert matched(noise, noise.flip(1), warp, size).float().mean() < 0.1


def test_world_gives_scores_of_every_task_and_layer(world):
    material = open_material(world)
    assert material.tasks == ("segmentation", "depth", "tracking")
    encoder = from_pretrained("pe_synthetic_xs8_192", out_indices=(0, 4))
    small = material.at_most(8, 1, 3)
    assert (len(small.train), len(small.val), len(small.clips), len(small.clips[0])) == (8, 8, 1, 3)
    scores = measure(encoding_of(encoder), small, size=96, tasks=(*material.tasks, "correspondence"))
    assert set(scores) == {0, 4}
    assert set(scores[0]) == {"mIoU", "rmse", "matches", "J&F"}
    assert max(scores[layer]["rmse"] for layer in scores) < 2
    assert scores[4]["mIoU"] > scores[0]["mIoU"] > 10
    best = summarize(scores, "mIoU")
    assert (best["layer"], best["gap"]) == (4, 0)


def test_boxes_masks_depth_tables_and_unlabeled_images_are_read(world, tmp_path):
    coco = json.loads((world / "annotations/instances_val.json").read_text())
    masks = open_material(world).val[0].classes()
    for one in coco["annotations"]:
        del one["segmentation"]
    shutil.copytree(world / "val", tmp_path / "images")
    (tmp_path / "images/instances.json").write_text(json.dumps(coco))
    boxes = open_material(tmp_path / "images/instances.json")
    assert boxes.tasks == ("segmentation",)
    same = open_material(world).val[0].rgb()
    first = next(one.classes() for one in (*boxes.train, *boxes.val) if np.array_equal(one.rgb(), same))
    assert (first[(masks > 0) & (masks != NO_CLASS)] > 0).all()
    assert (first > 0).sum() > (masks > 0).sum() / 2
    table = ["rgb,depth,units_per_meter"]
    table += [f"{world}/val/{n}.jpg,{world}/depth/val/{n}.png,1000" for n in ("0000/00000", "0001/00000")]
    (tmp_path / "pairs.csv").write_text("\n".join(table))
    depth = open_material(tmp_path / "pairs.csv")
    assert depth.tasks == ("depth",)
    assert_close(depth.train[0].depth(), open_material(world).val[0].depth())
    plain = open_material(world / "val")
    assert plain.tasks == ("correspondence",)
    assert len(plain.train) == len(plain.val) == 4


def test_wrong_data_ends_in_a_sentence(tmp_path):
    with pytest.raises(DatasetError, match="does not exist; give a config"):
        open_material(tmp_path / "none")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "one.png")
    with pytest.raises(DatasetError, match="has 1 of the two images needed"):
        open_material(tmp_path)


def test_hook_measures_the_student_changes_nothing_and_continues_its_file(world, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    path = REPO / "projects/spatial_alignment/align_synthetic.py"
    losses = []
    for name, hooks in (("with", True), ("without", False)):
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(
            dict(
                work_dir=str(tmp_path / name),
                experiment_name=name,
                train_cfg=dict(max_iters=2),
                log_level="WARNING",
                randomness=dict(seed=0),
            )
        )
        cfg.model.backbone.update(variant="pe_synthetic_xs8_192")
        cfg.model.backbone.init_cfg.checkpoint = "released"
        cfg.model.teachers.core.layer = 2
        cfg.train_dataloader.update(batch_size=2)
        cfg.train_dataloader.dataset.update(
            data_root=str(world), data_prefix=dict(img="train", instances="instances/train")
        )
        probe = dict(type="AlignmentProgressHook", data=str(world), interval=1, size=96, images=2, clips=1, frames=3)
        cfg.custom_hooks = [probe] if hooks else []
        prepare_training(cfg, deterministic=True)
        runner = train(cfg)
        losses.append({k: v.clone() for k, v in runner.model.state_dict().items()})
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    history = json.loads((tmp_path / "with/progress.json").read_text())["measured"]
    assert [entry["step"] for entry in history] == [0, 1, 2]
    assert set(history[0]["layers"]) == {"0", "1", "2", "3", "4"}
    assert set(history[0]["summary"]) == {"mIoU", "rmse", "J&F"}
    assert (tmp_path / "with/progress.png").stat().st_size > 1000
