"""SAM 2 on PE under mmengine: losses of batches, training that resumes, evaluation from masks, boxes and clicks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.repository import REPO
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from PIL import Image
from torch.testing import assert_close

from pe_spatial.engine.determinism import make_deterministic
from pe_spatial.engine.fault_tolerance import add_fault_tolerance
from pe_spatial.errors import ConfigError
from pe_spatial.tracking.sam2.tracker import PESAM2
from pe_spatial.tracking.sam2.training import predict_clip
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.masks import write_mask
from pe_spatial.video import list_frames

pytest.importorskip("sam2")

ENCODER = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)
TRACKER = dict(variant=ENCODER, grid=4, d_model=32, mem_dim=8, layers=1, feedforward=32)


@pytest.fixture
def model(randomize):
    torch.manual_seed(0)
    made = randomize(PESAM2(TRACKER))
    made.tracker.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)  # objects stay in the frame
    return made.eval()


@pytest.fixture(autouse=True)
def first_step():
    MessageHub.get_current_instance().update_info("iter", 0)


def batch(clips=2, frames=3, side=64):
    """Clips of one, two, ... objects."""
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (frames, 3, side, side), dtype=torch.uint8) for _ in range(clips)]
    masks = []
    for count in range(1, clips + 1):
        objects = torch.zeros(count, frames, side, side, dtype=torch.bool)
        for i in range(count):
            objects[i, :, 5 + 9 * i : 30 + 9 * i, 10:40] = True
        masks.append(objects)
    return images, masks


# -- losses


def test_losses_are_those_of_the_batch_normalized_as_sam2_does(model):
    images, masks = batch()
    found = model(images, masks, mode="loss")
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    clips = (torch.stack(images) / 255 - mean) / std
    targets, clip_of = torch.cat(masks).transpose(0, 1), torch.tensor([0, 1, 1])
    plan = model.prompting.draw(3, np.random.default_rng((42, 0)))
    expected = model.loss(predict_clip(model.tracker, clips, targets, clip_of, plan), targets)
    assert set(plan.prompts.values()) == {"mask"}  # so that nothing is random
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_prompts_follow_from_the_step(model, monkeypatch):
    drawn = []
    draw = type(model.prompting).draw

    def spy(self, frames, rng):
        drawn.append(draw(self, frames, rng))
        return drawn[-1]

    monkeypatch.setattr(type(model.prompting), "draw", spy)
    for step in (0, 1, 2, 3, 0, 1, 2, 3):
        MessageHub.get_current_instance().update_info("iter", step)
        with torch.no_grad():
            model(*batch(1), mode="loss")
    assert drawn[:4] == drawn[4:]
    assert len({str(plan) for plan in drawn}) > 2


def test_the_encoder_is_frozen_and_all_else_learns(model):
    model.train()
    model.tracker.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.zero_()
    for step in range(12):
        MessageHub.get_current_instance().update_info("iter", step)
        sum(model(*batch(), mode="loss").values()).backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(".trunk." in name for name in gradients)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    # what SAM 2.1's flags leave unused, and what absent objects alone use
    idle = ("no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial", "mask_downsample.weight", "mask_downsample.bias")
    assert names - gradients <= {f"tracker.{name}" for name in idle}


def test_one_object_of_one_clip_in_bfloat16(model):
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*batch(1), mode="loss")
    exact = model(*batch(1), mode="loss")
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert_close(value, exact[name], rtol=0.1, atol=0.1)


def test_clips_that_do_not_fit(model):
    images, masks = batch()
    with pytest.raises(ConfigError, match=r"size=64"):
        model([x[..., :48] for x in images], masks, mode="loss")
    with pytest.raises(ConfigError, match="the same number of frames"):
        model([images[0], images[1][:2]], masks, mode="loss")
    with pytest.raises(ConfigError, match="'loss' with clips of a VideoClipDataset"):
        model(images, masks, mode="tensor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt="scribble"), "prompt is 'scribble'"),
        (dict(corrections=2), "a mask needs none"),
        (dict(prompting=dict(prompted_frames=0)), "prompted_frames is 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        PESAM2(TRACKER, **options)


def test_patch_14_and_16_share_all_but_the_encoder():
    other = PESAM2({**TRACKER, "variant": dict(ENCODER, img_size=56, patch_size=14)})
    names = {
        kind: {name: tuple(x.shape) for name, x in m.state_dict().items() if ".trunk." not in name}
        for kind, m in ((16, PESAM2(TRACKER)), (14, other))
    }
    assert names[14] == names[16]


def test_weights_come_from_three_files_or_one(model, tmp_path):
    tracker = model.tracker
    torch.save(tracker.image_encoder.trunk.encoder.state_dict(), tmp_path / "encoder.pth")
    torch.save({"model": tracker.state_dict()}, tmp_path / "sam2.pt")
    made = PESAM2(TRACKER, encoder_weights=str(tmp_path / "encoder.pth"), sam2_weights=str(tmp_path / "sam2.pt"))
    before = made.tracker.image_encoder.neck.state_dict()
    made.init_weights()
    for name, value in tracker.state_dict().items():
        if not name.startswith("image_encoder.neck"):
            assert_close(made.tracker.state_dict()[name], value)
    for name, value in before.items():
        assert_close(made.tracker.image_encoder.neck.state_dict()[name], value)


# -- videos


@pytest.fixture
def clip(tmp_path):
    """Four frames with two objects."""
    rng = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 5:25], mask[20:40, 40:60] = 1, 3
    for t in range(4):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / "frames" / f"{t:05d}.png")
        write_mask(tmp_path / "masks" / f"{t:05d}.png", mask)
        for folder, i in (("000", 1), ("001", 3)):
            write_mask(tmp_path / "objects" / folder / f"{t:05d}.png", (mask == i).astype(np.uint8))
    return Clip("video", list_frames(tmp_path / "frames"), tmp_path / "masks" / "00000.png")


def test_a_video_is_followed_from_its_first_mask(model, clip):
    (found,) = model(clip=[clip], mode="predict")
    assert (found["video"], found["frames"]) == ("video", ["00000", "00001", "00002", "00003"])
    assert_close(found["pred_masks"][0], clip.load()[0])  # what was given is not predicted again
    assert all(mask.shape == (48, 64) and mask.dtype == np.uint8 for mask in found["pred_masks"])
    assert {int(i) for mask in found["pred_masks"][1:] for i in np.unique(mask)} <= {0, 1, 3}
    assert any(mask.any() for mask in found["pred_masks"][1:])


def test_objects_of_their_own_files_may_overlap(model, clip):
    """And only annotated frames are kept, as the annotations of SA-V are sparse."""
    for path in clip.mask.parents[1].glob("objects/*/00002.png"):
        path.unlink()
    clip = Clip("video", clip.frames, clip.mask.parents[1] / "objects", overlapping=True)
    (found,) = model(clip=[clip], mode="predict")
    assert [set(masks) for masks in found["pred_masks"]] == [{0, 1}] * 3
    assert found["frames"] == ["00000", "00001", "00003"]
    assert_close(found["pred_masks"][0][1].sum(), np.int64(400))


@pytest.mark.parametrize(("prompt", "corrections"), [("click", 0), ("click", 2), ("box", 1)])
def test_a_video_is_followed_from_clicks_that_correct(model, clip, prompt, corrections, monkeypatch):
    given = []
    for name in ("step", "refine"):
        method = getattr(type_of_stream(), name)

        def spy(self, *args, method=method, name=name):
            given.append((name, args[-1]))
            return method(self, *args)

        monkeypatch.setattr(type_of_stream(), name, spy)
    model.prompt, model.corrections = prompt, corrections
    (found,) = model(clip=[clip], mode="predict")
    assert [name for name, _ in given] == ["step"] + ["refine"] * corrections + ["step"] * 3
    first = given[0][1]
    assert set(first) == {1, 3}
    if prompt == "box":
        assert list(first[1].box) == [5, 10, 25, 30]
    else:
        (x, y), (label,) = first[1].points[0].tolist(), first[1].labels.tolist()
        assert (x, y, label) == (pytest.approx(15, abs=1), pytest.approx(20, abs=1), 1)
    assert len(found["pred_masks"]) == 4


def type_of_stream():
    from pe_spatial.tracking.sam2.streaming import StreamingTracker

    return StreamingTracker


# -- under the Runner, on real sequences


def config(shared, work_dir, **changes):
    """configs/pe_spatial_sam2_davis.py, made tiny, on two sequences."""
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_sam2_davis.py")
    root = str(shared / "data/video")
    (work_dir.parent / "list.txt").write_text("labelme-truck-car\n")
    data = dict(data_root=root, sequences=str(work_dir.parent / "list.txt"))
    cfg.merge_from_dict(
        dict(
            model=dict(encoder_weights=None, sam2_weights=None, prompting=dict(corrections=1)),
            train_dataloader=dict(num_workers=0, persistent_workers=False, batch_size=2, dataset=data),
            val_dataloader=dict(dataset=data),
            test_dataloader=dict(dataset=data),
            val_evaluator=dict(ann_dir=root),
            test_evaluator=dict(ann_dir=root),
            optim_wrapper=dict(optimizer=dict(lr=1e-3)),
            train_cfg=dict(max_iters=4, val_interval=4),
            default_hooks=dict(checkpoint=dict(interval=2), logger=dict(interval=1)),
            work_dir=str(work_dir),
            log_level="WARNING",
            experiment_name=work_dir.name,
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
        )
    )
    cfg.model.tracker = TRACKER
    load, resize = cfg.train_dataloader.dataset.pipeline[0], cfg.train_dataloader.dataset.pipeline[3]
    load.num_frames, resize.size = 3, 64
    cfg.merge_from_dict(changes)
    add_fault_tolerance(cfg)
    return cfg


@pytest.fixture
def train(shared, tmp_path):
    def run(name, **changes):
        cfg = config(shared, tmp_path / name, **changes)
        make_deterministic(cfg, 0)
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner

    yield run
    torch.use_deterministic_algorithms(False)


def test_trains_resumes_and_evaluates_on_real_sequences(train, shared, tmp_path):
    whole = train("whole")
    train("part", **{"train_cfg.max_iters": 2, "train_cfg.val_interval": 2})
    gone = str(tmp_path / "gone.pth")  # a run that resumes needs no released weights
    again = train("part", resume=True, **{"model.encoder_weights": gone, "model.sam2_weights": gone})
    for (name, value), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    scores = [runner.message_hub.get_scalar("val/vos/J&F-Mean").current() for runner in (whole, again)]
    assert scores[0] == scores[1]
    cfg = config(shared, tmp_path / "test", load_from=str(tmp_path / "whole" / "iter_4.pth"))
    found = Runner.from_cfg(cfg).test()
    assert found["vos/J&F-Mean"] == scores[0]


def test_trains_with_averaged_weights(train):
    hooks = [dict(type="EMAHook", momentum=0.5)]
    runner = train("ema", custom_hooks=hooks)
    saved = torch.load(Path(runner.work_dir) / "iter_4.pth", weights_only=False)
    name = "tracker.maskmem_tpos_enc"
    assert not torch.equal(saved["state_dict"][name], saved["ema_state_dict"][f"module.{name}"])


def test_rates_of_the_second_stage(shared, tmp_path):
    """Ten times as much for the neck, less and less towards the encoder's input, no decay for norms and biases."""
    cfg = config(shared, tmp_path / "rates")
    cfg.model.tracker.frozen = False
    runner = Runner.from_cfg(cfg)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    names = {id(p): name for name, p in runner.model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups for p in g["params"]}
    encoder = "tracker.image_encoder.trunk.encoder."
    assert rates["tracker.maskmem_tpos_enc"] == (1e-3, 0.1)
    assert rates["tracker.memory_attention.norm.weight"] == (1e-3, 0.0)
    neck = [rate for name, (rate, _) in rates.items() if ".neck." in name]
    assert neck == [pytest.approx(1e-2)] * len(neck) != []
    for layer, name in enumerate(("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight")):
        assert rates[encoder + name] == (pytest.approx(1e-3 * 0.9 ** (3 - layer)), 0.1)


# -- recipes


@pytest.mark.parametrize("name", ["stage1_frozen", "stage2_unfrozen"])
def test_stages_draw_from_three_sets(shared, name):
    """Each set in its own layout; here the same real sequences stand for all of them."""
    cfg = Config.fromfile(REPO / "projects" / "video_tracking" / f"{name}.py")
    assert cfg.param_scheduler[0].end == cfg.train_cfg.max_iters
    first = name == "stage1_frozen"
    assert (cfg.model.tracker.frozen, cfg.model.sam2_weights is not None) == (first, first)
    repeated, *others = cfg.train_dataloader.dataset.datasets
    prefix = dict(img_path="JPEGImages/480p", ann_path="Annotations/480p")
    listed = shared / "data/video/ImageSets/full_gt.txt"
    for one in (repeated.dataset, *others):
        one.update(data_root=str(shared / "data/video"), data_prefix=prefix, sequences=str(listed))
        one.pipeline[0].num_frames = 2
    found = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(found) == (5 + 1 + 1) * len(listed.read_text().split())
    item = found[len(found) - 1]
    assert item["inputs"].shape == (2, 3, 1024, 1024)


def test_images_are_clips_of_one_frame(shared):
    cfg = Config.fromfile(REPO / "projects" / "video_tracking" / "images.py")
    dataset = cfg.train_dataloader.dataset
    prefix = dict(img_path="val2017", ann_path="annotations/instances_val2017.json")
    dataset.update(data_root=str(shared / "data/detection/coco_tiny"), data_prefix=prefix)
    found = DATASETS.build(dataset)[0]
    assert found["inputs"].shape == (1, 3, 1024, 1024)
    assert found["masks"].shape[1:] == (1, 1024, 1024)
    assert found["masks"].flatten(1).any(1).all()
