"""In Detectron2: the core's maps, padding that counts, the released recipe and the released detectors."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.repository import CONFIGS
from torch.testing import assert_close

from pe_spatial import VARIANTS, FusedFeaturePyramid, PerceptionEncoder, SimpleFeaturePyramid
from pe_spatial.encoder.checkpoint import CheckpointError
from pe_spatial.encoder.files import read_state_dict
from pe_spatial.encoder.variants import VITDET_RECIPES
from pe_spatial.errors import ConfigError

INSTALLED = importlib.util.find_spec("detectron2") is not None
pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed; the README says how to install it"),
]
if INSTALLED:
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, get_cfg, instantiate
    from detectron2.modeling import build_backbone, build_model
    from detectron2.solver.build import get_default_optimizer_params
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage
    from pycocotools import mask as coco_mask

    from pe_spatial.integrations import detectron2 as ours

RECIPE = CONFIGS / "detectron2" / "pe_spatial_maskrcnn_coco_g14.py"
SMALL = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
GEOMETRY = dict(window_size=2, global_attn_indexes=(1, 3), pos_embed_mode="tile", rope_mode="interpolate")


@pytest.fixture
def yacs():
    """Return `yacs(**options)`: a config of Detectron2's Mask R-CNN on the smallest variant."""

    def make(**options):
        cfg = get_cfg()
        ours.add_pe_spatial_config(cfg)
        cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
        cfg.MODEL.BACKBONE.NAME = "build_pe_spatial_backbone"
        cfg.MODEL.PE_SPATIAL.VARIANT = "pe_spatial_t16_512"
        cfg.MODEL.DEVICE = "cpu"
        cfg.merge_from_list([part for name, value in options.items() for part in (name.replace("__", "."), value)])
        return cfg

    return make


# --- maps


@pytest.mark.parametrize(
    "options", [GEOMETRY, {**GEOMETRY, "out_indices": (1, 2, 3)}, {"geometry": "timm"}, {"frozen_stages": 2}]
)
def test_maps_equal_the_core_bit_for_bit(randomize, options):
    backbone = randomize(ours.PerceptionEncoderPyramid(SMALL, pyramid=dict(out_channels=24), **options)).eval()
    encoder = PerceptionEncoder(SMALL, **options).eval()
    maps = len(encoder.out_indices)
    pyramid = (
        SimpleFeaturePyramid(32, out_channels=24) if maps == 1 else FusedFeaturePyramid([32] * maps, out_channels=24)
    )
    encoder.load_state_dict(backbone.encoder.state_dict())
    pyramid.load_state_dict(backbone.pyramid.state_dict())
    images = torch.randn(2, 3, 128, 96)
    levels, expected = backbone(images), pyramid(encoder(images))
    for (name, level), want, stride in zip(levels.items(), expected, (4, 8, 16, 32, 64), strict=True):
        assert torch.equal(level, want)
        shape = backbone.output_shape()[name]
        assert (name, shape.stride, shape.channels) == (f"p{stride.bit_length() - 1}", stride, level.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert {level.dtype for level in backbone(images).values()} == {torch.float32}


def test_geometry_and_weights_come_from_the_core(tmp_path, randomize):
    encoder = randomize(PerceptionEncoder("pe_spatial_t16_512"))
    torch.save(encoder.state_dict(), tmp_path / "t16.pt")
    backbone = ours.PerceptionEncoderPyramid(
        "pe_spatial_t16_512", geometry="vitdet", weights=tmp_path / "t16.pt", drop_path_rate=0.2
    )
    assert_close(dict(backbone.encoder.state_dict()), dict(encoder.state_dict()), rtol=0, atol=0)
    assert backbone.encoder.geometry.window_size == 32
    assert backbone.encoder.blocks[-1].drop_path == pytest.approx(0.2)


# --- padding


def test_padding_that_detectron2_applies():
    inputs = [dict(image=torch.zeros(3, 70, 130)), dict(image=torch.zeros(3, 33, 20))]

    def padded(**options):
        cfg = LazyConfig.load(str(RECIPE))
        cfg.model.backbone = dict(_target_=ours.PerceptionEncoderPyramid, variant=SMALL, **options)
        return instantiate(cfg.model).preprocess_image(inputs).tensor.shape[2:]

    assert padded() == (96, 160)  # p5 has whole cells, p6 subsamples it
    assert padded(pyramid=dict(strides=(8, 16, 32, 64, 128))) == (96, 160)
    assert padded(pyramid=dict(strides=(16,))) == (80, 144)
    assert padded(pyramid=dict(strides=(32, 64), out_channels=(8, 16))) == (128, 192)  # pools the map itself
    assert padded(size_divisibility=64) == (128, 192)
    assert padded(square_size=256) == (256, 256)


def test_levels_cover_an_image_padded_to_the_divisor():
    backbone = ours.PerceptionEncoderPyramid(SMALL)
    levels = backbone(torch.randn(1, 3, backbone.size_divisibility, 3 * backbone.size_divisibility))
    for name, level in levels.items():
        stride = backbone.output_shape()[name].stride
        assert level.shape[2:] == (-(-32 // stride), -(-96 // stride))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size_divisibility=48), "size_divisibility is 48 pixels; patches and levels need a multiple of 32"),
        (dict(square_size=1000), "square_size is 1000 pixels"),
        (dict(patch_size=14, pyramid=dict(strides=(7, 14))), "Detectron2 takes different powers of two"),
        (dict(geometry="x"), "geometry is 'x'; allowed are"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    with pytest.raises(ValueError, match=message):
        ours.PerceptionEncoderPyramid(SMALL, **options)


# --- yacs


def test_yacs_config_builds_the_same_backbone(yacs, tmp_path):
    torch.save(PerceptionEncoder("pe_spatial_t16_512").state_dict(), tmp_path / "t16.pt")
    backbone = build_backbone(
        yacs(
            MODEL__PE_SPATIAL__WEIGHTS=str(tmp_path / "t16.pt"),
            MODEL__PE_SPATIAL__OUT_INDICES=(5, 11),
            MODEL__PE_SPATIAL__STRIDES=(8, 16, 32, 64),
            MODEL__PE_SPATIAL__OUT_CHANNELS=64,
            MODEL__PE_SPATIAL__FROZEN_STAGES=3,
            MODEL__PE_SPATIAL__GRAD_CHECKPOINTING=True,
            MODEL__PE_SPATIAL__DROP_PATH_RATE=0.3,
            MODEL__PE_SPATIAL__SQUARE_SIZE=512,
        )
    )
    assert {name: shape.channels for name, shape in backbone.output_shape().items()} == dict.fromkeys(
        ("p3", "p4", "p5", "p6"), 64
    )
    assert backbone.padding_constraints == dict(size_divisibility=32, square_size=512)
    encoder = backbone.encoder
    assert (encoder.out_indices, encoder.frozen_stages) == ((5, 11), 3)
    assert encoder.grad_checkpointing == dict.fromkeys(range(12), "full")
    assert encoder.geometry.window_size == 32
    assert encoder.blocks[-1].drop_path == pytest.approx(0.3)
    assert_close(dict(encoder.state_dict()), read_state_dict(tmp_path / "t16.pt"))


def test_yacs_detector_trains_a_step(yacs):
    cfg = yacs(
        MODEL__PE_SPATIAL__OUT_CHANNELS=16,
        MODEL__ROI_BOX_HEAD__FC_DIM=16,
        MODEL__ROI_MASK_HEAD__CONV_DIM=16,
        MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=16,
        MODEL__RPN__POST_NMS_TOPK_TRAIN=50,
        SOLVER__BASE_LR=1e-3,
        SOLVER__WEIGHT_DECAY=0.1,
    )
    model = build_model(cfg)
    optimizer = ours.build_optimizer(cfg, model)
    assert len({group["lr"] for group in optimizer.param_groups}) == 14  # 12 blocks, the stem, the rest
    decay = {group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM} == {0.1, 0.0}
    objects = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 50.0]])), gt_classes=torch.tensor([3]))
    objects.gt_masks = BitMasks(torch.ones(1, 64, 96, dtype=torch.bool))
    before = model.backbone.encoder.pos_embed.detach().clone()
    with EventStorage():
        losses = model([dict(image=torch.randint(0, 256, (3, 64, 96)), instances=objects)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    without = [name for name, parameter in model.backbone.named_parameters() if parameter.grad is None]
    assert without == []
    optimizer.step()
    assert not torch.equal(before, model.backbone.encoder.pos_embed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(MODEL__PE_SPATIAL__VARIANT=""), "MODEL.PE_SPATIAL.VARIANT is missing"),
        (dict(MODEL__PE_SPATIAL__VARIANT="pe"), "unknown variant 'pe'; allowed are"),
        (dict(INPUT__FORMAT="BGR"), "INPUT.FORMAT is BGR.* set RGB and 127.0"),
        (dict(MODEL__PIXEL_STD=[1.0, 1.0, 1.0]), "PE takes RGB in"),
        (dict(MODEL__PIXEL_MEAN=[127.0], MODEL__PIXEL_STD=[127.0]), "the input has 1 channels"),
    ],
)
def test_yacs_config_that_would_train_garbage_is_refused(yacs, options, message):
    with pytest.raises(ConfigError if "variant" not in message else ValueError, match=message):
        build_backbone(yacs(**options))


def test_yacs_config_without_the_options_says_what_to_call():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_pe_spatial_backbone"
    with pytest.raises(ConfigError, match=r"call add_pe_spatial_config\(cfg\)"):
        build_backbone(cfg)
    ours.add_pe_spatial_config(cfg)
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    with pytest.raises(ConfigError, match="BIAS_LR_FACTOR is 2"):
        ours.build_optimizer(cfg, torch.nn.Linear(1, 1))


# --- layer decay


def test_layer_decay_needs_an_encoder_and_finds_it_anywhere():
    with pytest.raises(ConfigError, match="contains no PerceptionEncoder"):
        ours.layer_decay(torch.nn.Linear(1, 1))
    encoder = PerceptionEncoder(SMALL)
    outer = torch.nn.ModuleDict(dict(teacher=torch.nn.Linear(2, 2), student=torch.nn.Sequential(encoder)))
    for model in (encoder, outer):
        groups = get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=ours.layer_decay(model, 0.5))
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert rates[id(encoder.pos_embed)] == rates[id(encoder.patch_embed.proj.weight)] == 0.5**5
        assert rates[id(encoder.blocks[3].norm1.bias)] == 0.5
    assert rates[id(outer["teacher"].weight)] == 1.0


# --- the released recipe


def shrunk_recipe(facts):
    """The LazyConfig of the released recipe, brought to the size of the reference's fixture."""
    cfg = LazyConfig.load(str(RECIPE))
    hyper, model = facts["hyper"], cfg.model
    vit, width, classes = hyper["backbone"], hyper["fpn_channels"], hyper["num_classes"]
    model.backbone.update(
        variant=dict(
            img_size=vit["pretrain_img_size"], patch_size=vit["patch_size"], embed_dim=vit["embed_dim"],
            depth=vit["depth"], num_heads=vit["num_heads"], mlp_ratio=facts["mlp_ratio"],
            class_token=False, init_values=facts["init_values"],
        ),
        weights=None, drop_path_rate=0.0, square_size=vit["img_size"],
        window_size=vit["window_size"], pos_embed_mode="tile",
        global_attn_indexes=[i for i in range(vit["depth"]) if i not in vit["window_block_indexes"]],
        rope_mode="interpolate", rope_grid=vit["pt_hw_seq_len"],
    )  # fmt: skip
    model.backbone.pyramid.out_channels = width
    model.proposal_generator.update(pre_nms_topk=hyper["pre_nms_topk"], post_nms_topk=hyper["post_nms_topk"])
    model.proposal_generator.head.in_channels = width
    roi = model.roi_heads
    roi.num_classes = classes
    for head, count in ((roi.box_head, 4), (roi.mask_head, 5)):
        head.input_shape.channels = width
        head.conv_dims = [width] * count
    roi.box_head.fc_dims = [hyper["fc_dim"]]
    roi.box_predictor.input_shape.channels = hyper["fc_dim"]
    roi.box_predictor.update(
        test_score_thresh=hyper["test_score_thresh"], test_topk_per_image=hyper["test_topk_per_image"]
    )
    cfg.dataloader.test.mapper.augmentations[0].update(short_edge_length=vit["img_size"], max_size=vit["img_size"])
    return cfg


@pytest.fixture(scope="module")
def reference(golden):
    folder = golden / "maskrcnn"
    facts = read_json(folder / "maskrcnn.json")
    cfg = shrunk_recipe(facts)
    model = instantiate(cfg.model).eval()
    ours.load_released_detector(model, checkpoint_file(folder / "maskrcnn.pth"))
    return folder, facts, cfg, model


def test_recipe_gives_the_released_detections(reference):
    folder, facts, cfg, model = reference
    arrays, masks = read_arrays(folder / "maskrcnn.npz"), read_json(folder / "maskrcnn_masks_rle.json")
    mapper = instantiate(cfg.dataloader.test.mapper)
    inputs = []
    for index, name in enumerate(facts["files"]):
        height, width = (int(side) for side in arrays[f"image_{index}_original_size"])
        inputs.append(mapper(dict(file_name=str(folder / name), height=height, width=width)))
        assert np.array_equal(inputs[-1]["image"].permute(1, 2, 0).numpy(), arrays[f"image_{index}"])
    with torch.no_grad():
        images = model.preprocess_image(inputs).tensor
        levels = model.backbone(images)
        found = model(inputs)
    assert_close(images, torch.from_numpy(arrays["input"]))
    for name in ("p3", "p4", "p5", "p6"):
        assert_close(levels[name], torch.from_numpy(arrays[name]), rtol=0, atol=1e-4)
    assert_close(levels["p2"][:, :, ::2, ::2], torch.from_numpy(arrays["p2_even"]), rtol=0, atol=1e-4)
    for index, image in enumerate(found):
        instances = image["instances"]
        boxes, classes = (torch.from_numpy(arrays[f"det_{index}_{what}"]) for what in ("boxes", "classes"))
        assert len(instances) == len(boxes)
        apart = (instances.pred_boxes.tensor[:, None] - boxes[None]).abs().amax(-1)
        apart[instances.pred_classes[:, None] != classes[None]] = torch.inf
        distance, match = apart.min(1)
        assert sorted(match.tolist()) == list(range(len(boxes)))
        assert distance.max() < 0.05
        assert_close(instances.scores, torch.from_numpy(arrays[f"det_{index}_scores"])[match], rtol=0, atol=5e-4)
        wanted = coco_mask.decode([masks[index][i] for i in match])
        assert (instances.pred_masks.permute(1, 2, 0).numpy() != wanted).sum() <= 60  # of some 80 whole images


def test_recipe_has_the_released_learning_rates_and_weight_decay(reference):
    _, facts, cfg, model = reference
    cfg.optimizer.params.update(model=model, layer_decay_rate=0.9)  # no rate is published for four blocks
    optimizer = instantiate(cfg.optimizer)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    expected = facts["optimizer"]
    assert (type(optimizer).__name__, list(optimizer.defaults["betas"])) == (expected["type"], expected["betas"])
    numbers = {name: torch.tensor([[i]]) for i, name in enumerate(expected["groups"])}  # to follow a name
    backbone = ours.from_released_names({k.removeprefix("backbone."): v for k, v in numbers.items() if "backbone" in k})
    numbers |= {f"backbone.{name}": number for name, number in backbone.items()}
    wanted = list(expected["groups"].values())
    for name, parameter in model.named_parameters():
        group, want = groups.pop(id(parameter)), wanted[int(numbers[name])]
        assert group["lr"] == pytest.approx(expected["lr"] * want["lr_factor"], rel=1e-6)
        assert group["weight_decay"] == want["weight_decay"]
    assert groups == {}


@pytest.mark.parametrize("variant", ["pe_spatial_g14_448", "pe_core_g14_448"])
def test_recipe_at_full_width_takes_every_released_tensor(golden, variant):
    file = {"pe_spatial_g14_448": "PEspatial_G_coco36ep", "pe_core_g14_448": "PEcore_G_coco75ep"}[variant]
    contract = read_json(golden / "maskrcnn" / f"contract_mask_rcnn_{file}.json")
    cfg = LazyConfig.load(str(RECIPE))
    LazyConfig.apply_overrides(cfg, [f"model.backbone.variant={variant}", "model.backbone.weights=null"])
    with torch.device("meta"):
        model = instantiate(cfg.model)
        state = {name: torch.empty(shape) for name, shape in contract["keys"].items()}
        found = model.load_state_dict(state, strict=True, assign=True)
    assert found.missing_keys == found.unexpected_keys == []


@pytest.mark.parametrize("variant", ["pe_spatial_t16_512", "pe_spatial_l14_448"])
def test_another_variant_is_one_option(variant):
    cfg = LazyConfig.load(str(RECIPE))
    assert cfg.model.backbone.weights == "released"
    LazyConfig.apply_overrides(cfg, [f"model.backbone.variant={variant}", "model.backbone.weights=null"])
    with torch.device("meta"):
        model = instantiate(cfg.model)
    encoder, recipe = model.backbone.encoder, VITDET_RECIPES[VARIANTS[variant].depth]
    assert (encoder.config, encoder.patch_size, encoder.geometry.window_size) == (VARIANTS[variant], 16, 32)
    assert encoder.blocks[-1].drop_path == pytest.approx(recipe.drop_path_rate)
    cfg.optimizer.params.model = model
    rates = {group["lr"] for group in instantiate(cfg.optimizer).param_groups}
    assert min(rates) == pytest.approx(5e-5 * recipe.layer_decay_rate ** (encoder.depth + 1))
    assert max(rates) == pytest.approx(5e-5)


def test_recipe_scales_crops_and_pads_to_one_square():
    """Detectron2 crops a single image that is larger than the square without a word."""
    cfg = LazyConfig.load(str(RECIPE))
    _, scale, crop = cfg.dataloader.train.mapper.augmentations
    (resize,) = cfg.dataloader.test.mapper.augmentations
    sides = [scale.target_height, scale.target_width, *crop.crop_size, resize.short_edge_length, resize.max_size]
    assert sides == [1024] * 6 == [cfg.model.backbone.square_size] * 6
    assert crop.pad is False  # the model pads, with zeros after normalisation


def test_recipe_warms_up_and_drops_as_released():
    cfg = LazyConfig.load(str(RECIPE))
    schedule = instantiate(cfg.lr_multiplier)
    factors = [schedule(step / cfg.train.max_iter) for step in (0, 45, 90, 58999, 59000, 63915, 63916)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01], rel=1e-3)


# --- checkpoints


def test_released_and_own_checkpoints_through_detectron2(reference, tmp_path, caplog):
    folder, _, cfg, model = reference
    fresh = [instantiate(cfg.model) for _ in range(2)]
    DetectionCheckpointer(model, str(tmp_path)).save("own")
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(fresh[0]).load(str(checkpoint_file(folder / "maskrcnn.pth")))
        DetectionCheckpointer(fresh[1]).load(str(tmp_path / "own.pth"))
    assert caplog.messages == []
    for other in fresh:
        assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_detector_that_does_not_fit_is_refused(reference, tmp_path):
    folder, _, cfg, model = reference
    state = read_state_dict(checkpoint_file(folder / "maskrcnn.pth"))
    torch.save({name: value for name, value in state.items() if "simfp_3.1.norm" not in name}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"missing in it: backbone\.pyramid\.levels\.1\.2\.weight"):
        ours.load_released_detector(model, tmp_path / "part.pth")
    state["backbone.net.odd"] = state["backbone.simfp_2.9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"only in the file: backbone\.encoder\.odd, backbone\.pyramid\.levels"):
        ours.load_released_detector(model, tmp_path / "more.pth")
    cfg.model.roi_heads.num_classes += 1
    with pytest.raises(CheckpointError, match="other shapes than this model: size mismatch for roi_heads"):
        ours.load_released_detector(instantiate(cfg.model), checkpoint_file(folder / "maskrcnn.pth"))
    cfg.model.roi_heads.num_classes -= 1
