"""The zero-shot tracker: the script's pixels, any layers in one pass, and mmengine's test loop."""


import cv2
import numpy as np
import pytest
import torch
from helpers.repository import REPO
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmengine")
from helpers.videos import SIZE, TINY, moving, write_davis
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from pe_spatial import VARIANTS, PerceptionEncoder
from pe_spatial.engine.configs import move_data_root
from pe_spatial.errors import ConfigError
from pe_spatial.tracking.propagation import LabelPropagation, first_soft, hard_mask
from pe_spatial.tracking.vos.datasets import davis_clips
from pe_spatial.tracking.vos.evaluation import evaluate
from pe_spatial.tracking.vos.masks import read_mask
from pe_spatial.tracking.zero_shot import ZeroShotTracker


def build(patch_size=16, out_indices=(-1,), init_cfg=None, **options):
    torch.manual_seed(0)
    encoder = dict(
        type="PerceptionEncoder",
        variant=dict(TINY, patch_size=patch_size),
        out_indices=list(out_indices),
        init_cfg=init_cfg,
    )
    return MODELS.build(dict(type="ZeroShotTracker", backbone=encoder, **options))


@pytest.fixture
def davis(tmp_path):
    return write_davis(tmp_path / "davis")


def run(tracker, count=5, size=SIZE):
    video = list(moving(count, size))
    return list(tracker.track(((name, rgb) for name, rgb, _ in video), video[0][2]))


@pytest.mark.parametrize(
    ("protocol", "patch", "size", "frame", "pixels", "grid"),
    [
        ("dino", 16, 480, (480, 854), (480, 832), (30, 52)),
        ("dino", 14, 480, (480, 854), (480, 832), (34, 59)),  # the rest is cut off
        ("dino", 16, 480, (1000, 563), (832, 480), (52, 30)),
        ("dino", 16, 480, (500, 500), (480, 448), (30, 28)),  # the script's reading of a square
        ("dino", 16, (448, 448), (480, 854), (448, 448), (28, 28)),
        ("aligned", 16, 480, (480, 854), (480, 864), (30, 54)),
        ("aligned", 14, 480, (480, 854), (490, 854), (35, 61)),
        ("aligned", 14, 420, (1000, 563), (756, 420), (54, 30)),
        ("aligned", 14, (448, 448), (480, 854), (448, 448), (32, 32)),
        ("aligned", 16, (450, 448), (480, 854), (464, 448), (29, 28)),
    ],
)
def test_sizes(protocol, patch, size, frame, pixels, grid):
    tracker = build(patch, protocol=protocol, size=size)
    assert tracker.input_size(frame) == pixels
    assert tracker.grid(frame) == grid


def read_frame(rgb, side):
    """The script's reading of a landscape frame (its constants, its operations)."""
    h, w = rgb.shape[:2]
    image = cv2.resize(rgb[..., ::-1], (int((side * w / h) // 64 * 64), side)).astype(np.float32) / 255.0
    x = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
    for channel, mean, std in zip(x, (0.485, 0.456, 0.406), (0.228, 0.224, 0.225), strict=True):
        channel.sub_(mean).div_(std)
    return x


@pytest.mark.parametrize(("patch", "cut"), [(16, (96, 128)), (14, (84, 126))])
def test_dino_protocol_sees_the_scripts_pixels(patch, cut):
    """A convolution whose kernel does not fit leaves the far edge out."""
    tracker = build(patch, size=96, normalization="dino").eval()
    rgb = next(moving(1, (120, 170)))[1]
    with torch.no_grad():
        expected = tracker.backbone(read_frame(rgb, 96)[None, :, : cut[0], : cut[1]])[0][0]
        (ours,) = tracker.features(rgb)
    assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_aligned_protocol_sees_the_whole_frame_as_pe_resizes_it():
    tracker = build(14, protocol="aligned", size=90).eval()
    rgb = next(moving(1, (240, 340)))[1]
    image = Image.fromarray(rgb).resize((140, 98), Image.Resampling.BILINEAR)
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    with torch.no_grad():
        assert_close(tracker.features(rgb)[0], tracker.backbone(x[None])[0][0])


def test_normalization_is_the_encoders_or_the_scripts():
    pytest.importorskip("timm")
    assert build()._mean.flatten().tolist() == build()._std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert_close(build(normalization="dino")._std.flatten(), torch.tensor([0.228, 0.224, 0.225]))
    timm = dict(type="PerceptionEncoder", variant="timm:deit_tiny_patch16_224.fb_in1k", out_indices=[0])
    assert_close(ZeroShotTracker(timm)._std.flatten(), torch.tensor([0.229, 0.224, 0.225]))


@pytest.mark.parametrize(("protocol", "patch"), [("dino", 14), ("aligned", 16)])
def test_tracking_is_encoder_propagation_and_upsampling(protocol, patch):
    options = dict(context=2, radius=3, shape="circle", topk=4, temperature=0.2)
    tracker = build(patch, protocol=protocol, size=120, propagation=options)
    video = list(moving())
    soft, ids = first_soft(torch.from_numpy(video[0][2]), tracker.grid(SIZE))
    propagation = LabelPropagation(**options)
    results = run(tracker)
    assert [name for name, _ in results] == [name for name, *_ in video]
    assert np.array_equal(results[0][1][0], video[0][2])
    with torch.no_grad():
        propagation.start(tracker.features(video[0][1])[0], soft)
        for (_, rgb, _), (_, (mask,)) in zip(video[1:], results[1:], strict=True):
            expected = propagation.step(tracker.features(rgb)[0])
            expected = hard_mask(expected, ids, SIZE, patch_size=patch if protocol == "dino" else None)
            assert mask.dtype == np.uint8
            assert np.array_equal(mask, expected.numpy())


def test_it_follows_what_moves():
    """Random weights are enough for two colored discs; standing still is not."""
    video = list(moving(8))
    (last,) = run(build(size=240, protocol="aligned"), 8)[-1][1]

    def overlap(a, b):
        return np.mean([((a == i) & (b == i)).sum() / ((a == i) | (b == i)).sum() for i in (1, 2)])

    assert overlap(last, video[-1][2]) > 0.6 > overlap(video[0][2], video[-1][2]) + 0.1


def test_layers_together_are_the_layers_alone():
    together = run(build(out_indices=range(4), size=96))
    for layer in range(4):
        tracker = build(out_indices=[layer], size=96)
        tracker.backbone.load_state_dict(build(out_indices=range(4)).backbone.state_dict(), strict=False)
        for (_, masks), (_, (alone,)) in zip(together, run(tracker), strict=True):
            assert np.array_equal(masks[layer], alone)
    assert any(not np.array_equal(together[-1][1][0], together[-1][1][layer]) for layer in (1, 2, 3))


def test_frames_are_encoded_once_and_one_at_a_time():
    tracker = build(out_indices=range(4), size=96)
    shapes, taken = [], []
    tracker.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))

    def frames():
        for name, rgb, _ in moving():
            taken.append(name)
            yield name, rgb

    for i, (name, _) in enumerate(tracker.track(frames(), next(moving())[2]), 1):
        assert taken[-1] == name
        assert len(taken) == len(shapes) == i
    assert shapes == [(1, 3, 96, 128)] * 5


def test_tracking_needs_no_autograd_and_no_training_mode():
    tracker = build(size=96, propagation=dict(context=1)).train()
    tracker.backbone.blocks[0].drop_path = 0.9
    (a, b) = (run(tracker) for _ in range(2))
    assert all(np.array_equal(x, y) for (_, (x,)), (_, (y,)) in zip(a, b, strict=True))
    assert not tracker.training


def test_lost_objects_are_named():
    mask = next(moving())[2]
    mask[0, 0] = 77
    assert build(size=96).lost_objects(mask) == [77]


def test_an_encoders_file_loads(tmp_path):
    tracker = build(size=96)
    torch.manual_seed(1)
    other = PerceptionEncoder(TINY)
    torch.save(other.state_dict(), tmp_path / "encoder.pt")
    before = run(tracker)
    tracker.load_encoder(tmp_path / "encoder.pt")
    assert_close(tracker.backbone.state_dict(), other.state_dict())
    assert any(not np.array_equal(x, y) for (_, (x,)), (_, (y,)) in zip(before, run(tracker), strict=True))
    configured = build(size=96, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "encoder.pt")))
    run(configured)  # loads before the first frame
    assert_close(configured.backbone.state_dict(), other.state_dict())


def test_options_are_checked():
    for options, words in (
        (dict(protocol="dinov3"), "protocol is 'dinov3'; allowed are 'dino', 'aligned'"),
        (dict(normalization="imagenet"), "normalization is 'imagenet'; allowed are 'encoder', 'dino'"),
        (dict(propagation=dict(topk=0)), "topk is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)
    with pytest.raises(ConfigError, match=r"less than one patch of 16 px; raise size, which is 10"):
        build(size=10).grid((480, 854))
    with pytest.raises(ConfigError, match="cannot be trained"):
        build().forward([], mode="loss")
    with pytest.raises(ConfigError, match="one layer is evaluated at a time"):
        build(out_indices=[0, 1]).forward([], mode="predict")


def config(davis, tmp_path, **model):
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_zeroshot_davis.py")
    move_data_root(cfg, str(davis))
    cfg.merge_from_dict(dict(model=model, work_dir=str(tmp_path / "work"), log_level="ERROR"))
    return cfg


def test_mmengines_test_loop_evaluates(davis, tmp_path):
    cfg = config(davis, tmp_path, size=96, backbone=dict(init_cfg=None))
    cfg.model.backbone.variant = TINY
    cfg.test_evaluator.save_dir = str(tmp_path / "masks")
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    scores = runner.test()
    results = evaluate(davis, tmp_path / "masks").global_results
    assert scores == {f"vos/{name}": pytest.approx(value) for name, value in results.items()}
    _, frames = davis_clips(davis)[1].load()
    runner.model.cpu()
    for name, (mask,) in runner.model.track(frames, davis_clips(davis)[1].load()[0]):
        assert np.array_equal(read_mask(tmp_path / "masks" / "dog" / f"{name}.png"), mask)


def test_config_builds_at_full_width(davis, tmp_path):
    cfg = config(davis, tmp_path)
    import_modules_from_strings(**cfg.custom_imports)
    with torch.device("meta"):
        tracker = MODELS.build(cfg.model)
    assert tracker.backbone.config == VARIANTS["pe_spatial_b16_512"]
    assert (tracker.protocol, tracker.input_size((480, 854))) == ("dino", (480, 832))
    assert tracker.propagation == {key: getattr(LabelPropagation(), key) for key in tracker.propagation}
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="released")
