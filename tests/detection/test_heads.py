"""Detectors of MMDetection equal Detectron2's: the released layout goes in, every stage and the detections come out."""

import copy

import numpy as np
import pytest
import torch
from helpers.repository import CONFIGS
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.reference_maskrcnn import ENTRIES, ReferenceMaskRCNN, match
from mmdet.models.task_modules.samplers import RandomSampler, SamplingResult
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, TRANSFORMS, init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings
from pycocotools import mask as coco_mask

from pe_spatial.convert.converter import to_mmdet
from pe_spatial.encoder.files import read_checkpoint
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmdet


@pytest.fixture(scope="module", params=list(ENTRIES))
def fixture(golden, request):
    return ReferenceMaskRCNN(golden / "maskrcnn", request.param)


@pytest.fixture(scope="module")
def outputs(fixture):
    """Everything from the images to the detections, in one run of MMDetection's own predict."""
    batch = fixture.images()
    with torch.no_grad():
        levels = fixture.model.extract_feat(batch["inputs"])
        rpn = fixture.model.rpn_head(levels)
        proposals = fixture.model.rpn_head.predict(levels, batch["data_samples"], rescale=False)
        results = fixture.model.predict(batch["inputs"], batch["data_samples"], rescale=True)
    return dict(batch=batch, levels=levels, rpn=rpn, proposals=proposals, results=results)


def test_input(fixture, outputs):
    for index, sample in enumerate(outputs["batch"]["data_samples"]):
        image = fixture.arrays[f"image_{index}"]
        assert sample.img_shape == image.shape[:2] == tuple(fixture.arrays["image_sizes"][index])
        assert sample.ori_shape == tuple(fixture.arrays[f"image_{index}_original_size"])
    assert_close(outputs["batch"]["inputs"], fixture.value("input"), rtol=0, atol=1e-6)


def test_pyramid_and_rpn(fixture, outputs):
    close = dict(rtol=1e-4, atol=1e-4)
    assert_close(outputs["levels"][0][:, :, ::2, ::2], fixture.value("p2_even"), **close)
    for level, x, logits, deltas in zip(range(2, 7), outputs["levels"], *outputs["rpn"], strict=True):
        if level > 2:
            assert_close(x, fixture.value(f"p{level}"), **close)
        assert_close(logits, fixture.value(f"rpn_logits_p{level}"), **close)
        assert_close(deltas, fixture.value(f"rpn_deltas_p{level}"), **close)


def test_proposals(fixture, outputs):
    for image, proposals in enumerate(outputs["proposals"]):
        boxes, logits = fixture.value(f"proposals_{image}_boxes"), fixture.value(f"proposals_{image}_logits")
        zeros = torch.zeros(len(boxes))
        index = match(proposals.bboxes, zeros, proposals.scores, boxes, zeros, logits.sigmoid(), px=0.01)
        assert_close(proposals.scores[index], logits.sigmoid(), rtol=0, atol=1e-4)


def intersection_over_union(ours, theirs):
    assert ours.shape == theirs.shape
    union = (ours | theirs).sum((1, 2))
    return torch.where(union > 0, (ours & theirs).sum((1, 2)) / union, 1.0)


def masks_of(fixture, image):
    return torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in fixture.masks[image]])).bool()


def test_detections(fixture, outputs):
    """In the masks some pixels may flip: a box that moves by 0.001 px can change RoIAlign's number of samples."""
    for image, sample in enumerate(outputs["results"]):
        ours = sample.pred_instances
        boxes, scores, labels = (fixture.value(f"det_{image}_{part}") for part in ("boxes", "scores", "classes"))
        index = match(ours.bboxes, ours.labels, ours.scores, boxes, labels, scores, px=0.01)
        assert_close(ours.scores[index], scores, rtol=0, atol=1e-4)
        masks = masks_of(fixture, image)
        assert intersection_over_union(ours.masks[index][None].flatten(1, 2), masks[None].flatten(1, 2)) > 0.9995
        flipped = (ours.masks[index] ^ masks).sum((1, 2))
        assert ((intersection_over_union(ours.masks[index], masks) >= 0.999) | (flipped <= 4)).all()


def test_masks_of_the_recorded_boxes(fixture, outputs):
    metas = [sample.metainfo for sample in outputs["batch"]["data_samples"]]
    recorded = [
        InstanceData(bboxes=fixture.value(f"det_{i}_boxes_input"), labels=fixture.value(f"det_{i}_classes").long())
        for i in range(2)
    ]
    head = fixture.model.roi_head
    with torch.no_grad():
        logits = head._mask_forward(outputs["levels"], bbox2roi([r.bboxes for r in recorded]))["mask_preds"]
        labels = torch.cat([r.labels for r in recorded])
        expected = torch.cat([fixture.value(f"det_{i}_mask_logits") for i in range(2)])
        assert_close(logits[range(len(labels)), labels], expected, rtol=1e-4, atol=1e-4)
        for image, results in enumerate(head.predict_mask(outputs["levels"], metas, recorded, rescale=True)):
            assert intersection_over_union(results.masks, masks_of(fixture, image)).min() >= 0.999


def test_stages_of_the_box_heads(fixture, outputs):
    """Fed with the recorded RoIs of a stage, its head gives the recorded logits and deltas."""
    head = fixture.model.roi_head
    stages = 3 if fixture.name == "cascade" else 1
    for stage in range(stages):
        kind = "proposals_{}_boxes" if stage == 0 else f"stage{stage}_boxes_{{}}"
        rois = bbox2roi([fixture.value(kind.format(i)) for i in range(2)])
        with torch.no_grad():
            out = head._bbox_forward(*([stage] if stages == 3 else []), outputs["levels"], rois)
        assert_close(out["cls_score"], fixture.value(f"stage{stage}_cls_logits"), rtol=1e-4, atol=1e-4)
        assert_close(out["bbox_pred"], fixture.value(f"stage{stage}_box_deltas"), rtol=1e-4, atol=1e-4)
    if stages == 3:
        metas = [sample.metainfo for sample in outputs["batch"]["data_samples"]]
        with torch.no_grad():
            _, scores, _ = head._stages(outputs["levels"], metas, [p.bboxes for p in outputs["proposals"]])
        ours, theirs = (torch.cat(x).sort(0)[0] for x in (scores, [fixture.value(f"avg_probs_{i}") for i in range(2)]))
        assert_close(ours, theirs, rtol=0, atol=1e-4)


# --- training


class Recorded(RandomSampler):
    """Take the recorded samples, of one image after the other."""

    def __init__(self, labels):
        super().__init__(num=256, pos_fraction=0.5)
        self.labels = iter(labels)

    def sample(self, assigned, priors, gt, **_):
        labels = next(self.labels)
        assert (assigned.gt_inds[labels == 1] > 0).all()
        assert (assigned.gt_inds[labels == 0] == 0).all()
        flags = torch.zeros(len(labels), dtype=torch.uint8)
        return SamplingResult(*(torch.where(labels == i)[0] for i in (1, 0)), priors.priors, gt.bboxes, assigned, flags)


def annotated(fixture, mode):
    samples = []
    for image, (targets, shape) in enumerate(
        zip(fixture.train_facts["targets"], fixture.train_facts["image_sizes"], strict=True)
    ):
        if mode == "all_second_empty" and image == 1:
            targets = []
        polygons = [[np.array(p) for p in target["polygons"]] for target in targets]
        masks = PolygonMasks(polygons, *shape)
        boxes = [
            [min(p[0::2].min() for p in ps), min(p[1::2].min() for p in ps),
             max(p[0::2].max() for p in ps), max(p[1::2].max() for p in ps)] for ps in polygons
        ]  # fmt: skip
        if mode == "all_bitmask":
            masks = BitmapMasks(masks.to_ndarray(), *shape)
        size = fixture.cfg.model.data_preprocessor.pad_size_divisor
        sample = DetDataSample(metainfo=dict(img_shape=tuple(shape), pad_shape=(size, size), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([t["category"] for t in targets], dtype=torch.long),
            masks=masks,
        )
        samples.append(sample)
    return samples


def losses_of(fixture, mode, model):
    """The five (cascade: nine) losses under the reference's names."""
    samples, head = annotated(fixture, mode), model.roi_head
    if mode == "sampled":
        levels = model.extract_feat(fixture.value("input"))
        labels = [torch.from_numpy(fixture.train_arrays[f"sampled/anchor_{i}_labels"]) for i in range(2)]
        model.rpn_head.sampler = Recorded(labels)
        losses = model.rpn_head.loss(levels, [rpn_sample(sample) for sample in samples])
        boxes = [torch.from_numpy(fixture.train_arrays[f"sampled/sampled_{i}_boxes"]) for i in range(2)]
        losses |= head.loss(levels, [InstanceData(bboxes=b) for b in boxes], samples)
    else:
        losses = model.loss(fixture.value("input"), samples)
    names = {"loss_bbox": "loss_box_reg", "loss_rpn_bbox": "loss_rpn_loc"}
    out = {}
    for name, value in losses.items():
        if "loss" in name:
            stage, _, name = name.rpartition(".")
            name = names.get(name, name) + (f"_stage{stage[1]}" if stage else "")
            out[name] = sum(value) if isinstance(value, list) else value
    return out


def rpn_sample(sample):
    sample = copy.deepcopy(sample)
    sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
    return sample


@pytest.fixture
def trainer(fixture):
    """A model in training mode whose samplers take everything, or the recorded samples."""

    def build(mode):
        cfg = copy.deepcopy(fixture.cfg.model)
        rcnn = cfg.train_cfg.rcnn[0] if fixture.name == "cascade" else cfg.train_cfg.rcnn
        if mode == "sampled":
            rcnn.sampler = dict(type="PseudoSampler")
        else:
            rcnn.sampler.num = 4096
            cfg.train_cfg.rpn.sampler.num = 2 * 16368
        model = MODELS.build(cfg)
        model.load_state_dict(fixture.model.state_dict())
        return model.train()

    return build


@pytest.mark.parametrize("mode", ["all", "sampled", "all_bitmask", "all_second_empty"])
def test_losses(fixture, trainer, mode):
    recorded = fixture.train_facts["modes"][mode]["losses"]
    ours = losses_of(fixture, mode, trainer(mode))
    assert ours.keys() == recorded.keys()
    assert_close({k: v.item() for k, v in ours.items()}, recorded, rtol=1e-4, atol=1e-5)


def test_gradients(fixture, trainer):
    facts = fixture.train_facts["modes"]["all"]
    model = trainer("all")
    sum(losses_of(fixture, "all", model).values()).backward()
    released = read_checkpoint(checkpoint_file(fixture.folder / f"{fixture.name}.pth"))
    ours = {value.data_ptr(): name for name, value in to_mmdet(released).items()}  # conversion copies nothing
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in facts["grad_l2"].items():
        gradient = gradients.pop(ours[released.state[name].data_ptr()])
        assert_close(gradient.norm().item(), norm, rtol=5e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not gradients


def test_cascade_trains_on_no_empty_box_and_survives_images_without_proposals(golden):
    fixture = ReferenceMaskRCNN(golden / "maskrcnn", "cascade")
    head = fixture.model.roi_head.train()
    sizes, refine, run = [], head._refine, head._bbox_forward

    def squash(*args):
        first, *others = refine(*args)
        first[:7, 2] = first[:7, 0]
        return [first, *others]

    def count(stage, x, rois):
        sizes.append(len(rois))
        return run(stage, x, rois)

    head._refine, head._bbox_forward = squash, count
    levels = fixture.model.extract_feat(fixture.value("input"))
    recorded = [torch.from_numpy(fixture.train_arrays[f"sampled/sampled_{i}_boxes"]) for i in range(2)]
    boxes = [InstanceData(bboxes=b) for b in recorded]
    head.loss(levels, boxes, annotated(fixture, "sampled"))
    assert sizes[1] == sizes[0] - 7
    assert sizes[2] == sizes[1] - 7

    head._refine = refine
    metas = [sample.metainfo for sample in annotated(fixture, "sampled")]
    none = InstanceData(bboxes=torch.zeros(0, 4))
    for images in ([none, boxes[1]], [none, none]):
        results = head.eval().predict_bbox(levels, metas, images, fixture.cfg.model.test_cfg.rcnn)
        assert [len(r) == 0 for r in results] == [p is none for p in images]


def test_cascade_refuses_heads_that_it_cannot_refine(golden):
    fixture = ReferenceMaskRCNN(golden / "maskrcnn", "cascade")
    cfg = copy.deepcopy(fixture.cfg.model.roi_head)
    cfg.bbox_head[1].reg_class_agnostic = False
    with pytest.raises(ConfigError, match="needs box heads"):
        MODELS.build(cfg)


# --- single operations


@pytest.fixture(scope="module")
def ops(golden):
    folder = golden / "maskrcnn"
    arrays = {name: torch.from_numpy(value) for name, value in read_arrays(folder / "ops.npz").items()}
    return arrays, read_json(folder / "ops.json")


@pytest.fixture(scope="module")
def cfg():
    cfg = Config.fromfile(CONFIGS / ENTRIES["maskrcnn"])
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    return cfg


@pytest.mark.parametrize("weight", [1, 10, 20, 30])
def test_box_coder(ops, cfg, weight):
    """With deltas beyond both clamps, of which Detectron2 has the upper alone."""
    arrays, _ = ops
    stds = [1 / weight] * 2 + [2 / weight if weight > 1 else 1.0] * 2
    coder = TASK_UTILS.build({**cfg.model.rpn_head.bbox_coder, "target_stds": stds})
    source = arrays["delta_src"]
    assert_close(coder.encode(source, arrays["delta_tgt"]), arrays[f"delta_encoded_w{weight}"], rtol=1e-5, atol=1e-5)
    decoded = coder.decode(source, arrays["delta_in"])
    assert_close(decoded, arrays[f"delta_decoded_w{weight}"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("iou", ["rpn", "roi_0.5", "roi_0.6", "roi_0.7"])
def test_assigner(ops, cfg, iou):
    arrays, _ = ops
    part = cfg.model.train_cfg.rpn if iou == "rpn" else cfg.model.train_cfg.rcnn
    thresholds = {} if iou == "rpn" else dict.fromkeys(("pos_iou_thr", "neg_iou_thr", "min_pos_iou"), float(iou[4:]))
    assigner = TASK_UTILS.build({**part.assigner, **thresholds})
    overlaps = arrays["match_iou"]
    result = assigner.assign_wrt_overlaps(overlaps, torch.arange(10, 10 + len(overlaps)))
    labels, index = arrays[f"match_{iou}_label"], arrays[f"match_{iou}_index"].long()
    assert (labels == 1).any()
    assert_close(result.gt_inds.clamp(-1, 1), labels.long())
    assert_close(result.gt_inds[labels == 1] - 1, index[labels == 1])
    assert_close(result.labels[labels == 1], index[labels == 1] + 10)


def test_low_quality_match_leaves_the_anchor_its_own_best_object(cfg):
    """Anchor 0 is the best that object 1 has, but overlaps object 0 more."""
    assigner = TASK_UTILS.build(cfg.model.train_cfg.rpn.assigner)
    overlaps = torch.tensor([[0.8, 0.9, 0.1], [0.5, 0.1, 0.2]])
    assert assigner.assign_wrt_overlaps(overlaps, torch.tensor([4, 5])).gt_inds.tolist() == [1, 1, 0]
    assert assigner.assign_wrt_overlaps(overlaps, torch.tensor([4, 5])).labels.tolist() == [4, 4, -1]


def test_roi_extractor(ops, cfg):
    arrays, _ = ops
    levels = [arrays[f"roi_feat_p{level}"] for level in range(2, 6)]
    rois = bbox2roi([arrays["roi_boxes_0"], arrays["roi_boxes_1"]])
    for name, part in (("7", "bbox"), ("14", "mask")):
        extractor = MODELS.build({**cfg.model.roi_head[f"{part}_roi_extractor"], "out_channels": 8})
        assert_close(extractor.map_roi_levels(rois, 4), arrays["roi_level"].long())
        assert_close(extractor(levels, rois), arrays[f"roi_pooled_{name}"], rtol=1e-5, atol=1e-5)


def test_levels_change_where_detectron2_changes_them(cfg):
    """Just below a border; MMDetection's epsilon of 1e-6 would lift the square to the next level."""
    extractor = MODELS.build(cfg.model.roi_head.bbox_roi_extractor)
    rois = torch.tensor([[0, 0, 0, side, side] for side in (111.99996, 112.0)])
    assert extractor.map_roi_levels(rois, 4).tolist() == [0, 1]


def test_mask_targets(ops):
    arrays, facts = ops
    height, width = arrays["poly_full_bitmasks"].shape[1:]
    polygons = PolygonMasks([[np.array(p) for p in ob["polygons"]] for ob in facts["polygons"]], height, width)
    boxes, index = arrays["poly_boxes"].numpy(), arrays["poly_index"].numpy()
    targets = polygons.crop_and_resize(boxes, (28, 28), inds=index, device="cpu").to_ndarray()
    assert_close(torch.from_numpy(targets).bool(), arrays["poly_targets"])
    bitmaps = BitmapMasks(arrays["poly_full_bitmasks"].numpy().astype(np.uint8), height, width)
    targets = bitmaps.crop_and_resize(boxes, (28, 28), inds=index, device="cpu").to_ndarray()
    assert_close(torch.from_numpy(targets).bool(), arrays["poly_targets_from_bitmask"])


def test_paste(ops, cfg):
    arrays, _ = ops
    head = MODELS.build({**cfg.model.roi_head.mask_head, "class_agnostic": True})
    meta = dict(scale_factor=(1.0, 1.0), ori_shape=arrays["paste_bool"].shape[1:])
    logits = arrays["paste_probs"][:, None].double().logit().float()
    pasted = head._predict_by_feat_single(
        logits, arrays["paste_boxes"].clone(), torch.zeros(6), meta, cfg.model.test_cfg.rcnn, rescale=True
    )
    assert_close(pasted, arrays["paste_bool"])


def test_boxes_beside_the_image_are_no_detections(cfg):
    head = MODELS.build({**cfg.model.roi_head.bbox_head, "num_classes": 1})
    rois = torch.tensor([[0.0, -30, 5, -10, 25], [0, 10, 5, 30, 25]])
    scores, meta = torch.tensor([[0.9, 0.1], [0.8, 0.2]]), dict(img_shape=(40, 50), scale_factor=(2.0, 0.5))
    ours = head.select(rois, scores, torch.zeros(2, 4), meta, rescale=True, cfg=cfg.model.test_cfg.rcnn)
    assert_close(ours.bboxes, torch.tensor([[5.0, 10, 15, 50]]))
    assert_close(ours.scores, torch.tensor([0.8]))


@pytest.mark.parametrize("agnostic", [True, False])
def test_rows_with_infinite_numbers_are_dropped(ops, cfg, agnostic):
    arrays, facts = ops
    name = "agnostic" if agnostic else "per_class"
    head = MODELS.build({**cfg.model.roi_head.bbox_head, "num_classes": 6, "reg_class_agnostic": agnostic})
    boxes = arrays["inf_boxes_agnostic" if agnostic else "inf_boxes_per_class"]
    head.bbox_coder.decode = lambda _, deltas: deltas  # the reference gives boxes, not deltas
    test_cfg = Config(dict(
        score_thr=facts["nms"]["score_thresh"], nms=dict(type="nms", iou_threshold=facts["nms"]["nms_thresh"]),
        max_per_img=facts["nms"]["topk"],
    ))  # fmt: skip
    meta = dict(img_shape=facts["nms"]["image_size"])
    ours = head.select(torch.zeros(len(boxes), 5), arrays["inf_scores"], boxes, meta, rescale=False, cfg=test_cfg)
    assert_close(ours.bboxes, arrays[f"inf_{name}_boxes"])
    assert_close(ours.scores, arrays[f"inf_{name}_scores"])
    assert_close(ours.labels, arrays[f"inf_{name}_classes"].long())


@pytest.mark.parametrize("side", [256, 1024])
def test_sizes_after_the_resize(ops, cfg, side):
    arrays, _ = ops
    resize = TRANSFORMS.build({**cfg.test_dataloader.dataset.pipeline[1], "scale": (side, side)})
    sizes = zip(arrays["resize_hw"].tolist(), arrays[f"resize_out_{side}"].tolist(), strict=True)
    for (height, width), expected in [pair for pair in sizes if min(pair[1])]:  # nobody can resize to 0 pixels
        assert list(resize(dict(img=np.zeros((height, width, 3), np.uint8)))["img_shape"]) == expected
