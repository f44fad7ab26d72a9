"""Students, teachers and runs of alignment: exact starts, equal caches, resuming to the last bit."""

import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("mmcv")
from helpers.encoders import TINY
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, PixelData
from PIL import Image

import pe_spatial.alignment  # noqa: F401  (registers)
from pe_spatial import PerceptionEncoder
from pe_spatial.alignment.losses import pairwise_similarity, token_cosine
from pe_spatial.alignment.sam2_teacher import point_grid
from pe_spatial.alignment.student import Masking, fill_gray
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
GRID = (4, 4)
BOTH = [dict(kind="token_cosine", teacher="core"), dict(kind="pairwise_similarity", teacher="masks")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "encoder.pt"
    torch.save(PerceptionEncoder(TINY).state_dict(), path)
    return dict(type="Pretrained", checkpoint=str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images with instance maps, of which one image is broken."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for kind in ("rgb", "ids"):
        (root / kind).mkdir()
    for i in range(6):
        Image.fromarray(generator.integers(0, 256, (70, 90 + i, 3), np.uint8)).save(root / f"rgb/{i}.png")
        Image.fromarray(generator.integers(0, 3, (70, 90 + i), np.uint8)).save(root / f"ids/{i}.png")
    (root / "rgb/3.png").write_bytes(b"no image")
    return root


def model_config(weights, **changes):
    model = dict(
        type="SpatialAlignment",
        backbone=dict(type="PerceptionEncoder", variant=TINY.__dict__, drop_path_rate=0.4, init_cfg=weights),
        teachers=dict(core=dict(type="EncoderTeacher", layer=1), masks=dict(type="ObjectMaskTeacher", objects=3)),
        losses=BOTH,
        layer_scale=0.1,
        masking=dict(ratio=0.75),
    )
    return {**model, **changes}


def build(weights, **changes):
    model = MODELS.build(model_config(weights, **changes))
    model.init_weights()
    return model


def batch(size=64, number=2, **about):
    images = torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    samples = [BaseDataElement(metainfo=about) for _ in images]
    for i, sample in enumerate(samples):
        ids = torch.zeros(1, size, size, dtype=torch.uint8)
        ids[:, : size // 2, : size // 4] = i + 1
        sample.instances = PixelData(data=ids)
    return images, samples


def run_config(work_dir, folder, weights, *, iterations=4, **changes):
    prefix = dict(img="rgb", instances="ids")
    steps = ["LoadUnlabeled", dict(type="AspectJitter", size=64), "ColorJitter", "FlipView", "PackViews"]
    pipeline = [step if isinstance(step, dict) else dict(type=step) for step in steps]
    cfg = Config(
        dict(
            model=model_config(weights),
            custom_imports=dict(imports=["pe_spatial.alignment"]),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type="InfiniteSampler", shuffle=True),
                dataset=dict(type="UnlabeledImages", data_root=str(folder), data_prefix=prefix, pipeline=pipeline),
            ),
            optim_wrapper=dict(optimizer=dict(type="LAMB", lr=0.01, betas=(0.9, 0.95), weight_decay=0.05)),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=iterations),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2, max_keep_ckpts=-1)),
            custom_hooks=[dict(type="EMAHook", momentum=0.2, update_buffers=True)],
            default_scope="mmengine",
            log_level="WARNING",
            experiment_name=work_dir.name,
            randomness=dict(seed=0),
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


def run(cfg, resume=None):
    prepare_training(cfg, resume=resume, deterministic=True)
    return train(cfg)


def test_student_starts_as_exactly_the_function_of_its_weights_and_the_teacher_is_its_inner_layer(weights):
    images, samples = batch()
    plain = PerceptionEncoder(TINY, out_indices=(1, -1))
    plain.load_state_dict(torch.load(weights["checkpoint"]))
    inner, last = plain((images - 127.5) / 127.5)
    model = build(weights).eval()
    assert_close(model(images)[0], last, rtol=0, atol=1e-5)
    assert_close(model.targets(images, GRID, samples)["core"], inner, rtol=0, atol=1e-6)
    assert all(torch.equal(b.gamma_1, torch.full((TINY.embed_dim,), 0.1)) for b in model.backbone.blocks)
    weaker = build(weights, layer_scale_start="plain").eval()
    assert (weaker(images)[0] - last).abs().max() > 0.01
    assert torch.equal(weaker.backbone.blocks[0].attn.proj.weight, plain.blocks[0].attn.proj.weight)


def test_both_losses_train_the_student_alone(weights):
    model = build(weights).train()
    images, samples = batch()
    losses = model(images, samples, mode="loss")
    assert set(losses) == {"loss_core_token_cosine", "loss_masks_pairwise_similarity"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for t in model.teachers.values() for p in t.parameters())
    assert not any(p.requires_grad for t in model.teachers.values() for p in t.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert not model.teachers["core"].encoder.training


def test_masked_tokens_count_teachers_see_the_complete_image_and_weights_multiply(weights):
    kinds = dict(core=("token_cosine", 2.0), masks=("pairwise_similarity", 3.0))
    losses = [dict(kind=kind, teacher=name, weight=weight) for name, (kind, weight) in kinds.items()]
    model = build(weights, losses=losses).eval()
    images, samples = batch()
    torch.manual_seed(1)
    found = model(images, samples, mode="loss")
    torch.manual_seed(1)
    masked = model.masking.draw(len(images), GRID, images.device)
    student = model.backbone(fill_gray((images - 127.5) / 127.5, masked, 16))[-1].flatten(2).mT
    core, masks = (x.flatten(2).mT for x in model.targets(images, GRID, samples).values())
    expected = [2 * token_cosine(student, core), 3 * pairwise_similarity(student, masks)]
    weight = model.backbone.blocks[-1].mlp.fc2.weight
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert_close(ours, theirs)
        assert_close(*(torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (ours, theirs)))


def test_object_masks_are_the_covered_parts_of_patches():
    ids = torch.zeros(1, 64, 64, dtype=torch.uint8)
    ids[:, :, :24] = 2  # a column of patches and half of the next one
    sample = BaseDataElement()
    sample.instances = PixelData(data=ids)
    teacher = MODELS.build(dict(type="ObjectMaskTeacher", objects=2))
    maps = teacher(torch.zeros(1, 3, 64, 64), GRID, [sample])
    assert maps.shape == (1, 3, *GRID)
    assert_close(maps.sum(1), torch.ones(1, *GRID))
    assert (maps[0, 2, :, 0] > 0.9).all()
    assert_close(maps[0, 2, :, 1], torch.full((4,), 0.5), rtol=0, atol=0.05)
    assert (maps[0, 2, :, 2:] < 0.1).all()
    sample.instances.data[:, :, 20:24] = 0  # a quarter of it, none of which is at its center
    assert (teacher(torch.zeros(1, 3, 64, 64), GRID, [sample])[0, 2, :, 1] > 0.2).all()


def test_masks_are_blocks_of_the_stated_part_and_hide_the_pixels():
    torch.manual_seed(0)
    masked = Masking(ratio=0.75, block=2).draw(3, (8, 8), torch.device("cpu"))
    assert masked.flatten(1).sum(1).tolist() == [48] * 3
    blocks = masked.unflatten(1, (4, 2)).unflatten(3, (4, 2))
    assert torch.equal(blocks.all(4).all(2), blocks.any(4).any(2))
    assert not torch.equal(masked[0], masked[1])
    assert Masking(ratio=0.5, block=2).draw(1, (3, 5), torch.device("cpu")).shape == (1, 3, 5)
    images = torch.ones(3, 3, 32, 32)
    assert torch.equal(fill_gray(images, masked, 4)[:, 0, ::4, ::4] == 0, masked)


def test_gray_patches_equal_patches_without_embedding(weights):
    """The patch projection has no bias, so that gray and a token of zeros are the same."""
    images, samples = batch()
    values = []
    for fill in ("gray", "token"):
        model = build(weights, masking=dict(fill=fill)).eval()
        torch.manual_seed(1)
        values.append(model(images, samples, mode="loss"))
    assert_close(values[0], values[1], rtol=0, atol=1e-6)
    torch.manual_seed(1)
    sum(model(images, samples, mode="loss").values()).backward()
    assert model.mask_token.grad.abs().sum() > 0


def test_cached_maps_equal_computed_ones_and_random_views_are_refused(weights, tmp_path):
    images, samples = batch()
    plain = build(weights).teachers["core"](images, GRID, samples)
    cached = dict(core=dict(type="CachedTeacher", teacher=dict(type="EncoderTeacher", layer=1), folder=str(tmp_path)))
    options = dict(teachers=cached, losses=[dict(kind="token_cosine", teacher="core")])
    teacher = build(weights, **options).teachers["core"]
    first = teacher(images, GRID, samples)
    assert_close(first, plain, rtol=1e-3, atol=1e-3)
    teacher.teacher.forward = None  # is not called again
    assert torch.equal(teacher(images, GRID, samples), first)
    (path,) = [p for p in tmp_path.rglob("*.npy")][:1]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DatasetError, match=r"is damaged .* delete it"):
        teacher(images, GRID, samples)
    with pytest.raises(ConfigError, match="AspectJitter changes them at random; remove it"):
        teacher(*[batch(augmented="AspectJitter")[0], GRID, batch(augmented="AspectJitter")[1]])


def test_teachers_of_other_widths_grids_and_projects(weights, tmp_path):
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "vit.pt")
    teacher = dict(type="EncoderTeacher", variant=f"timm:{name}", layer=3)
    teacher["init_cfg"] = dict(type="Pretrained", checkpoint=str(tmp_path / "vit.pt"))
    losses = [dict(kind="token_cosine", teacher="other", linear=True)]
    losses.append(dict(kind="pairwise_similarity", teacher="other", sharpness=None))
    images, samples = batch()
    backbone = dict(model_config(weights)["backbone"], lora=dict(rank=2))
    model = build(weights, backbone=backbone, teachers=dict(other=teacher), losses=losses, layer_scale=None)
    assert model.maps["other"].weight.shape == (192, TINY.embed_dim)
    for side, shape in ((128, GRID), (32, GRID)):
        model.teachers["other"].image_size = side
        assert model.targets(images, GRID, samples)["other"].shape == (2, 192, *shape)
    sum(model(images, samples, mode="loss").values()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_" in name for name in trained)
    assert all("lora_" in name or name.startswith("maps.") for name in trained)
    model.teachers["other"].image_size = 96
    with pytest.raises(ConfigError, match=r"6x6 patches and the student 4x4, and neither is a multiple"):
        model.targets(images, GRID, samples)
    teacher["init_cfg"] = dict(type="Pretrained", checkpoint=str(tmp_path / "none.pt"))
    with pytest.raises(ConfigError, match=r"^teacher other: .*none\.pt"):
        build(weights, teachers=dict(other=teacher), losses=losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(
                teachers=dict(x=dict(type="EncoderTeacher", layer=4)), losses=[dict(kind="token_cosine", teacher="x")]
            ),
            "layer 4 is outside of the teacher.*0 to 3",
        ),
        (
            dict(teachers=dict(core=dict(type="EncoderTeacher", layer=1, image_size=72)), losses=BOTH[:1]),
            "image_size of a teacher is 72; take a multiple of its patch size, 16",
        ),
        (dict(losses=[]), "losses is empty"),
        (dict(losses=[dict(kind="l2", teacher="core")]), "kind of a loss is 'l2'; allowed are 'token_cosine'"),
        (dict(losses=[dict(kind="token_cosine", teacher="sam")]), "teacher of a loss is 'sam'; allowed are 'core'"),
        (dict(losses=[dict(kind="token_cosine", teacher="masks", sharpness=1)]), "has no option sharpness"),
        (dict(losses=[dict(kind="token_cosine", teacher="masks")]), "an unknown number of the teacher masks"),
        (dict(masking=dict(ratio=1.0)), "ratio=1.0"),
        (dict(layer_scale=0.0), "layer_scale is 0.0"),
        (dict(layer_scale_start="none"), "layer_scale_start is 'none'"),
        (
            dict(
                teachers=dict(sam=dict(type="SAM2MaskTeacher", size="huge")),
                losses=[dict(kind="pairwise_similarity", teacher="sam")],
            ),
            "size of SAM2MaskTeacher is 'huge'",
        ),
    ],
)
def test_wrong_options_end_in_a_sentence(weights, changes, message):
    with pytest.raises(ConfigError, match=message):
        MODELS.build(model_config(weights, **changes))


def test_what_is_missing_ends_in_a_sentence(weights, monkeypatch):
    with pytest.raises(ConfigError, match="features of random weights teach nothing"):
        MODELS.build(model_config(None))
    images, samples = batch()
    del samples[0].instances
    with pytest.raises(ConfigError, match=r"give the dataset's data_prefix.instances"):
        build(weights)(images, samples, mode="loss")
    monkeypatch.setattr("pe_spatial.integrations.sam2.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs sam2, which is not installed; pip install"):
        MODELS.build(dict(type="SAM2MaskTeacher"))
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    from pe_spatial.alignment.optimizer import build_lamb

    with pytest.raises(ConfigError, match="pip install pytorch-optimizer"):
        build_lamb([])


def test_resumed_run_equals_uninterrupted_one_to_the_last_bit(weights, folder, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    whole = run(run_config(tmp_path / "whole", folder, weights))
    run(run_config(tmp_path / "parts", folder, weights, iterations=2))
    resumed = run(run_config(tmp_path / "parts", folder, weights), resume="auto")
    saved = [torch.load(tmp_path / name / "iter_4.pth", weights_only=False) for name in ("whole", "parts")]
    for key in ("state_dict", "ema_state_dict"):
        assert saved[0][key].keys() == saved[1][key].keys()
        assert all(torch.equal(saved[0][key][name], saved[1][key][name]) for name in saved[0][key])
    start = build(weights).state_dict()
    moved = [name for name, x in whole.model.state_dict().items() if not torch.equal(x, start[name])]
    assert len(moved) > 0.9 * len(start)
    assert resumed.model.teachers["core"].encoder.pos_embed.equal(whole.model.teachers["core"].encoder.pos_embed)


@pytest.mark.slow
def test_sam2_gives_the_same_logits_in_batches_of_any_size(tmp_path):
    pytest.importorskip("sam2")
    from pe_spatial.integrations.sam2 import build_sam2

    torch.manual_seed(0)
    path = tmp_path / "sam.pt"
    torch.save(dict(model=build_sam2("tiny", 64).state_dict()), path)
    images, samples = batch(number=1)
    options = dict(type="SAM2MaskTeacher", size="tiny", checkpoint=str(path), image_size=64, points=3)
    maps = {}
    for prompts in (2, 9):
        teacher = MODELS.build(dict(options, prompts=prompts))
        teacher.load()
        with torch.no_grad():
            maps[prompts] = teacher(images, GRID, samples)
    assert maps[2].shape == (1, 9, *GRID)
    with torch.no_grad():
        logits = teacher(images, (16, 16), samples)  # SAM's own grid
    small = torch.nn.functional.interpolate(logits, GRID, mode="bilinear", align_corners=False, antialias=True)
    assert_close(maps[9], small, rtol=1e-4, atol=1e-4)
    assert not ((logits >= 0) & (logits <= 1)).all()  # no threshold, no sigmoid
    assert_close(maps[2], maps[9], rtol=1e-4, atol=1e-4)
    assert point_grid(32, 1024)[[0, 1, -1]].tolist() == [[16, 16], [48, 16], [1008, 1008]]
    for mask, number in (("single", 9), ("all", 27)):
        other = MODELS.build(dict(options, mask=mask, prompts=9))
        other.sam = teacher.sam
        with torch.no_grad():
            found = other(images, GRID, samples)
        assert found.shape[1] == number == other.channels
    distance = (found.unflatten(1, (9, 3)) - maps[9][:, :, None]).abs().amax((3, 4)).amin(2)
    assert distance.max() < 1e-5  # the best mask is one of the three
    with pytest.raises(CheckpointError, match=r"does not hold SAM 2.1 small"):
        MODELS.build(dict(options, size="small")).load()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"is no checkpoint of SAM 2.1"):
        MODELS.build(options).load()
