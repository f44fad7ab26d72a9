"""DETA in MMDetection equals the reference: its layout goes in; every stage, detections and gradients come out."""

import copy
import re

import numpy as np
import pytest
import torch
from helpers.repository import CONFIGS
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.golden import read_arrays, read_json
from helpers.reference_deta import ReferenceDETA, load_config
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.utils import import_modules_from_strings
from torchvision.ops import box_convert, box_iou

from pe_spatial.convert.layouts import COCO_CATEGORY_IDS
from pe_spatial.detection.deta.detector import select_proposals
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
CLOSE = dict(rtol=1e-4, atol=5e-5)


@pytest.fixture(scope="module")
def fixture(golden):
    return ReferenceDETA(golden / "deta")


@pytest.fixture(scope="module")
def outputs(fixture):
    """Everything from the images to the decoder, in the order of MMDetection's `forward_transformer`."""
    model, out = fixture.model, {}
    with torch.no_grad():
        out["maps"] = model.backbone(fixture.value("input"))
        out["encoder"], out["decoder"] = model.pre_transformer(
            model.extract_feat(fixture.value("input")), fixture.samples()
        )
        out["memory"] = model.forward_encoder(**out["encoder"])
        queries, head = model.pre_decoder(**out["memory"])
        out["decoder"].update(queries)
        return out | head | model.forward_decoder(**out["decoder"])


def test_pyramid_and_neck(fixture, outputs):
    assert_close(outputs["maps"][0], fixture.value("backbone_p3"), **CLOSE)
    assert_close(outputs["maps"][1], fixture.value("backbone_p4"), **CLOSE)
    assert_close(outputs["encoder"]["feat"], fixture.value("input_proj_tokens"), **CLOSE)


def test_padding_and_positions(fixture, outputs):
    inputs = outputs["encoder"]
    assert_close(inputs["feat_mask"], fixture.value("token_padding_mask"))
    assert_close(inputs["spatial_shapes"], fixture.value("spatial_shapes").long())
    assert_close(inputs["level_start_index"], fixture.value("level_start_index").long())
    assert_close(inputs["valid_ratios"], fixture.value("valid_ratios"))
    start = 0
    for level, (h, w) in enumerate(inputs["spatial_shapes"].tolist()):
        position = inputs["feat_pos"][:, start : start + h * w] - fixture.model.level_embed[level].detach()
        position = position.transpose(1, 2).unflatten(2, (h, w))
        every = 4 if level == 0 else 1  # what the fixture stores
        assert_close(position[..., ::every, ::every], fixture.value(f"pos_level{level}"), rtol=1e-5, atol=1e-5)
        start += h * w


def test_memory_and_proposals(fixture, outputs):
    assert_close(outputs["memory"]["memory"], fixture.value("memory"), **CLOSE)
    proposals = outputs["proposals"]
    assert_close(proposals["anchors"], fixture.value("anchors"))
    assert_close(proposals["anchors"].eq(1).all(-1), fixture.value("token_is_invalid"))
    assert_close(proposals["enc_logits"][..., 0], fixture.value("enc_objectness"), **CLOSE)
    assert_close(proposals["enc_logits"][:, ::16], fixture.value("enc_logits_every16"), **CLOSE)
    assert_close(proposals["enc_boxes"], fixture.value("enc_boxes"), **CLOSE)


@pytest.mark.parametrize("image", [0, 1])
def test_survivors_of_the_nms_are_the_reference_s(fixture, image):
    """Asked for as many as survive, the choice leaves none out, whatever the levels' shares."""
    boxes, logits = fixture.value("enc_boxes")[image], fixture.value("enc_objectness")[image]
    expected, invalid = fixture.value(f"post_nms_index_{image}"), fixture.value("token_is_invalid")[image]
    sizes = fixture.value("spatial_shapes").prod(1).tolist()
    kept = select_proposals(boxes, logits, sizes, number=len(expected))
    different = kept != expected
    assert invalid[kept[different]].all()  # these are identical, and any of them may stand for its level
    assert invalid[expected[different]].all()
    assert different.sum() <= invalid[expected].sum() <= len(sizes)


def test_proposals_kept(fixture, outputs):
    expected = fixture.value("init_reference")
    assert_close(outputs["proposals"]["init_reference"], expected, **CLOSE)
    assert_close(outputs["proposals"]["init_reference"].eq(1).all(-1), fixture.value("selected_is_invalid"))
    sizes, number = fixture.value("spatial_shapes").prod(1).tolist(), expected.shape[1]
    level_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for image in range(2):
        boxes, logits = fixture.value("enc_boxes")[image], fixture.value("enc_objectness")[image]
        chosen = select_proposals(boxes, logits, sizes, number=number)
        valid = ~fixture.value("selected_is_invalid")[image]
        assert_close(chosen[valid], fixture.value("topk_index")[image][valid].long())
        assert_close(level_of[chosen][valid], fixture.value("topk_level")[image][valid].long())


def test_queries_and_every_decoder_layer(fixture, outputs):
    assert_close(outputs["decoder"]["query_pos"], fixture.value("query_pos"), **CLOSE)
    assert_close(outputs["decoder"]["query"], fixture.value("query_content"), **CLOSE)
    assert_close(outputs["hidden_states"], fixture.value("decoder_hidden"), **CLOSE)
    assert_close(torch.stack(outputs["references"][1:]), fixture.value("decoder_references"), **CLOSE)
    with torch.no_grad():
        logits, boxes = fixture.model.bbox_head(outputs["hidden_states"], outputs["references"])
    assert_close(logits, torch.stack([fixture.value("aux0_pred_logits"), fixture.value("pred_logits")]), **CLOSE)
    assert_close(boxes, torch.stack([fixture.value("aux0_pred_boxes"), fixture.value("pred_boxes")]), **CLOSE)
    tensor = fixture.model(fixture.value("input"), fixture.samples(), mode="tensor")
    assert_close(tensor[0].detach(), logits)
    assert_close(tensor[1].detach(), boxes)


DETECTIONS = {
    "nms": dict(method="nms"),
    "soft_quad_0.5": dict(method="quad", quad_scale=0.5, max_per_img=None),
    "topk_without_nms": dict(method=None),
}


@pytest.mark.parametrize("option", DETECTIONS)
def test_detections(fixture, option):
    """From images to detections in one call of MMDetection's `predict`, in pixels of the original."""
    model = fixture.build(test_cfg=DETECTIONS[option])
    with torch.no_grad():
        samples = model.predict(fixture.value("input"), fixture.samples())
        resized = model.predict(fixture.value("input"), fixture.samples(), rescale=False)
    for index, (sample, other) in enumerate(zip(samples, resized, strict=True)):
        found = sample.pred_instances
        boxes, scores, labels = (
            torch.from_numpy(fixture.detections[f"model/{option}/{index}_{key}"])
            for key in ("boxes", "scores", "labels")
        )
        ours, theirs = unique_order(found.scores, found.labels), unique_order(scores, labels)
        if option.startswith("soft"):
            # Of faint boxes that nearly tie, another one is picked where the CPU rounds otherwise. That soft-NMS agrees
            # to the last of them on recorded boxes is shown in test_tta.py.
            count = int((scores > 2e-3).sum())
            assert count > 300
            ours, theirs = ours[:count], theirs[:count]
        assert_close(found.scores[ours], scores[theirs], rtol=1e-4, atol=1e-6)
        assert_close(found.labels[ours], labels[theirs].long())
        assert_close(found.bboxes[ours], boxes[theirs], rtol=1e-4, atol=5e-3)
        scale = torch.tensor([*other.img_shape[::-1]] * 2) / torch.tensor([*sample.ori_shape[::-1]] * 2)
        assert_close(other.pred_instances.bboxes, found.bboxes * scale, **CLOSE)


def unique_order(scores, labels):
    """Best first, but by class among those whose scores agree to the fifth digit."""
    return torch.from_numpy(np.lexsort((labels, -scores.numpy().round(5))))


def random_proposals(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    number = sum(sizes)
    boxes = torch.rand(number, 4, generator=generator) * torch.tensor([1, 1, 0.2, 0.2])
    return boxes, torch.randn(number, generator=generator) * 3, list(sizes)


def test_each_level_gets_its_share_and_the_best_fill_up():
    boxes, logits, sizes = random_proposals((400, 100, 25, 9, 4))
    logits[:400] += 20  # without shares the first level would take all
    chosen = select_proposals(boxes, logits, sizes, number=60)
    level_of = torch.arange(5).repeat_interleave(torch.tensor(sizes))[chosen]
    assert level_of.bincount().tolist() == [60 - 12 - 12 - 9 - 4, 12, 12, 9, 4]
    assert (logits[chosen].diff() <= 0).all()
    for level in range(5):
        own = (torch.arange(5).repeat_interleave(torch.tensor(sizes)) == level).nonzero()[:, 0]
        count = (level_of == level).sum()
        assert set(chosen[level_of == level].tolist()) == set(own[logits[own].topk(count).indices].tolist())


def test_duplicates_of_one_level_are_dropped_and_of_another_kept():
    boxes, logits, sizes = random_proposals((40, 10))
    boxes[1] = boxes[0]
    boxes[45] = boxes[0]
    logits[[0, 1, 45]] = torch.tensor([9.0, 8.5, 8.0])
    boxes[2:4] = torch.tensor([[0.5, 0.5, 2, 2], [0.5, 0.5, 3, 3]])  # alike within the image
    logits[2:4] = torch.tensor([7.5, 7.0])
    chosen = select_proposals(boxes, logits, sizes, number=40).tolist()
    assert chosen[:3] == [0, 45, 2]
    assert not {1, 3} & set(chosen)
    kept = box_convert(boxes[[i for i in chosen if i < 40]], "cxcywh", "xyxy").clamp(0, 1)
    assert (box_iou(kept, kept).triu(1) <= 0.9).all()


def test_too_few_survivors_mean_the_best_without_nms():
    boxes, logits, sizes = random_proposals((40, 10))
    boxes[:] = boxes[0]
    assert_close(select_proposals(boxes, logits, sizes, number=20), logits.topk(20).indices)


def test_only_the_best_of_a_level_enter_the_nms():
    boxes, logits, sizes = random_proposals((400, 20))
    best = select_proposals(boxes, logits, sizes, number=60, nms_pre=50)
    assert set(best[best < 400].tolist()) <= set(logits[:400].topk(50).indices.tolist())


def test_more_queries_than_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"num_queries is 51, but an image has only 50 tokens in its 2 levels"):
        select_proposals(*random_proposals((40, 10)), number=51)
    assert len(select_proposals(*random_proposals((40, 10)), number=50)) == 50


def test_a_image_that_fills_the_canvas_needs_no_mask(fixture, outputs):
    memory = outputs["memory"]["memory"]
    shapes = outputs["memory"]["spatial_shapes"]
    with torch.no_grad():
        without, with_mask = (
            fixture.model.pre_decoder(memory, mask, shapes)
            for mask in (None, torch.zeros(memory.shape[:2], dtype=torch.bool))
        )
    assert_close(without, with_mask)


@pytest.mark.parametrize("case", ["assigners", "assigners_second_empty"])
def test_losses_and_gradients_of_the_whole_model(fixture, case):
    """No limit on positives acts here, so nothing is random."""
    expected = fixture.criterion["cases"][case]
    samples = fixture.samples()
    if case == "assigners_second_empty":
        samples[1].gt_instances = samples[1].gt_instances[:0]
    model = copy.deepcopy(fixture.model).train()
    losses = model.loss(fixture.value("input"), samples)
    assert len(losses) == len(fixture.criterion["weights"])
    total = sum(losses.values())
    assert_close(total.item(), expected["total"], rtol=1e-5, atol=0)
    if case == "assigners_second_empty":
        return
    total.backward()
    ours = dict(model.named_parameters())
    for name, norm in expected["grad_l2"].items():
        first = re.sub(r"^transformer\.decoder\.(bbox|class)_embed", r"\1_embed", name)  # there by its second name
        gradient = ours.pop(fixture.weights.renamed[first]).grad
        assert_close(gradient.norm().item(), norm, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        close = 1e-3 * norm + 1e-4
        assert gradient.sum().item() == pytest.approx(expected["grad_sum"][name], abs=close), name
    assert not ours


def gradients(model, fixture):
    model.zero_grad()
    levels = model.extract_feat(fixture.value("input"))
    out = model.forward_transformer(levels, fixture.samples())
    logits, boxes = model.bbox_head(out["hidden_states"], out["references"])
    proposals = out["proposals"]
    loss = sum(x.square().mean() for x in (logits, boxes, proposals["enc_logits"], proposals["enc_boxes"]))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recomputed_activations_change_no_gradient_and_all_parameters_have_one(fixture):
    expected = gradients(fixture.model, fixture)
    assert not [name for name, gradient in expected.items() if gradient is None]
    assert_close(gradients(fixture.build(grad_checkpointing=True), fixture), expected)
    fixture.model.zero_grad()


def test_only_the_backbone_computes_in_bfloat16(fixture, outputs):
    model, images = fixture.model, fixture.value("input")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model.backbone(images)
        levels = model.extract_feat(images)
        tensors = model(images, fixture.samples(), mode="tensor")
        losses = model(images, fixture.samples(), mode="loss")
        found = model(images, fixture.samples(), mode="predict")
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(low, outputs["maps"], strict=True))
    with torch.no_grad():
        assert_close(levels, model.neck(tuple(x.float() for x in low)))
        out = model.forward_transformer(levels, fixture.samples())
        assert_close(tensors, model.bbox_head(out["hidden_states"], out["references"]))
        assert_close(losses, model.bbox_head.loss(**out, batch_data_samples=fixture.samples()))
        del out["proposals"]
        expected = model.bbox_head.predict(**out, batch_data_samples=fixture.samples())
    for sample, instances in zip(found, expected, strict=True):
        assert_close(sample.pred_instances.scores, instances.scores)


def test_encoder_and_neck_run_on_the_meta_device(fixture):
    with torch.device("meta"):
        model = MODELS.build(copy.deepcopy(fixture.cfg))
    levels = model.extract_feat(torch.empty(1, 3, 256, 256, device="meta"))
    assert [tuple(x.shape[2:]) for x in levels] == [(h, w) for h, w in fixture.arrays["spatial_shapes"].tolist()]


def test_canvas(fixture):
    preprocessor = fixture.model.data_preprocessor
    assert (preprocessor.pad_size_divisor, preprocessor.pad_value) == (256, 0)
    samples = [DetDataSample(metainfo=dict(img_path="a/b.jpg", img_shape=(200, 256))) for _ in range(2)]
    image = torch.full((3, 200, 256), 255, dtype=torch.uint8)
    batch = preprocessor(dict(inputs=[image, image[:, :40, :50]], data_samples=samples))
    assert batch["inputs"].shape == (2, 3, 256, 256)
    normalise = fixture.facts["normalise"]
    for channel, (mean, std) in enumerate(zip(normalise["mean"], normalise["std"], strict=True)):
        assert batch["inputs"][0, channel, :200].unique().item() == pytest.approx((1 - mean) / std, abs=1e-5)
    assert not batch["inputs"][0, :, 200:].any()
    assert not batch["inputs"][1, :, 40:].any()
    assert not batch["inputs"][1, :, :, 50:].any()
    with pytest.raises(DatasetError, match=r"a/b.jpg is 257 x 200 px when it reaches the model, .* canvas has 256 px"):
        preprocessor(dict(inputs=[image, image[:, :, :1].expand(3, 200, 257)], data_samples=samples))
    with pytest.raises(DatasetError, match=r"image 0 of the batch is 256 x 257 px"):
        preprocessor(dict(inputs=[image[:, :1].expand(3, 257, 256)], data_samples=None))


def test_channels_are_rgb_for_the_model():
    assert load_config().data_preprocessor.bgr_to_rgb  # images are loaded as BGR


def test_initialisation_is_the_released_one(fixture):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(fixture.cfg))
    before = model.pix_trans_fc.weight.detach().clone()
    model.init_weights()
    bound = (6 / (2 * model.embed_dims)) ** 0.5  # Xavier's
    assert before.abs().max() < 0.6 * bound < model.pix_trans_fc.weight.abs().max() <= bound
    for branch in model.bbox_head.cls_branches:
        assert_close(branch.bias, torch.full_like(branch.bias, -np.log(99)))
    assert not any(branch[-1].weight.any() or branch[-1].bias.any() for branch in model.bbox_head.reg_branches)
    assert not any(conv.conv.bias.any() for conv in (*model.neck.convs, *model.neck.extra_convs))


def test_config_builds_at_full_width():
    cfg = load_config()
    with torch.device("meta"):
        model = MODELS.build(cfg)
    assert isinstance(model.positional_encoding.offset, float)
    assert (model.positional_encoding.offset, model.positional_encoding.normalize) == (-0.5, True)
    assert [conv.conv.in_channels for conv in model.neck.convs] == [768, 1536, 1536]
    assert all(conv.conv.bias is not None for conv in (*model.neck.convs, *model.neck.extra_convs))
    assert model.pix_trans_fc.weight.shape == (256, 256)
    assert (model.num_queries, model.nms_pre, model.nms_iou_threshold) == (900, 1000, 0.9)
    assert cfg.test_cfg.class_ids == list(COCO_CATEGORY_IDS)
    assert not {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} - {0.0}


def test_pipeline_of_the_released_evaluation_gives_the_recorded_input(golden):
    """The entry config's own steps, at the size of the fixture: a canvas of 256 px, long sides of 32 px less."""
    cfg = Config.fromfile(CONFIGS / "pe_spatial_deta_g14.py")
    import_modules_from_strings(**cfg.custom_imports)
    folder = golden / "deta"
    facts, arrays = read_json(folder / "deta.json"), read_arrays(folder / "deta.npz")
    side = facts["hyper"]["lsj_img_size"]
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == "ShortSideResize":
            assert (step.short_sides, step.max_long_side) == ([1824 - 32], 1824 - 32)
            step.update(short_sides=[side - 32], max_long_side=side - 32)
    steps = [TRANSFORMS.build(step) for step in cfg.test_dataloader.dataset.pipeline if "Ann" not in step.type]
    batch = dict(inputs=[], data_samples=[])
    for index, name in enumerate(facts["files"]):
        results = dict(img_path=str(folder / name), img_id=index)
        for step in steps:
            results = step(results)
        for key, values in batch.items():
            values.append(results[key])
    prepare = MODELS.build({**cfg.model.data_preprocessor, "pad_size_divisor": side})
    out = prepare(batch)
    assert_close(out["inputs"], torch.from_numpy(arrays["input"]), rtol=0, atol=1e-5)
    assert [list(s.img_shape) for s in out["data_samples"]] == arrays["resized_sizes"].tolist()
    assert [list(s.ori_shape) for s in out["data_samples"]] == arrays["orig_sizes"].tolist()
