"""DETA's matches and losses equal the released code's: both assigners, every term, the gradients of its heads."""


import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.golden import checkpoint_file, read_arrays, read_json
from mmdet.models.layers import inverse_sigmoid
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.registry import MODELS, TASK_UTILS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from pe_spatial.detection.deta import head as deta_head
from pe_spatial.encoder.files import read_checkpoint
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmdet
CLOSE = dict(rtol=1e-4, atol=1e-6)
STAGES = {1: "DETAFirstStageAssigner", 2: "DETASecondStageAssigner"}
STAGE_1 = ["grid", "same_gt_twice", "more_than_128_positives", "no_gt", "with_invalid_anchors"]
STAGE_2 = ["few", "same_gt_twice", "more_positives_than_quarter", "gt_without_any_overlap", "no_gt"]
CASES = [*(f"stage1_{case}" for case in STAGE_1), *(f"stage2_{case}" for case in STAGE_2)]


def build_head(num_classes, **options):
    init_default_scope("mmdet")
    cfg = dict(
        type="DETAHead", num_classes=num_classes, embed_dims=64, num_pred_layer=3, as_two_stage=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
        train_cfg=dict(proposal_assigner=dict(type=STAGES[1]), assigner=dict(type=STAGES[2])),
    )  # fmt: skip
    return MODELS.build(cfg | options)


def load(folder, name):
    arrays = {key: torch.from_numpy(value) for key, value in read_arrays(folder / f"{name}.npz").items()}
    return arrays, read_json(folder / f"{name}.json")


def image(boxes, labels, height, width):
    """An image of this size with objects (cx, cy, w, h) in 0..1."""
    pixels = bbox_cxcywh_to_xyxy(boxes) * boxes.new_tensor([width, height, width, height])
    objects = InstanceData(bboxes=pixels, labels=labels.long())
    return DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)), gt_instances=objects)


def weighted(facts, losses):
    """The reference's losses under our names, with their weights."""
    prefixes = {"": "", "_0": "d0.", "_enc": "enc_"}
    names = {"ce": "cls", "bbox": "bbox", "giou": "iou"}
    weights = facts["weights"]
    return {
        f"{prefix}loss_{ours}": weights[f"loss_{theirs}{suffix}"] * losses[f"loss_{theirs}{suffix}"]
        for suffix, prefix in prefixes.items()
        for theirs, ours in names.items()
    }


def assert_losses(ours, facts, case):
    expected = weighted(facts, case["losses"])
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(ours[name].item(), value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(sum(ours.values()).item(), case["total"], **CLOSE)


def assert_matches(ours, pairs):
    """Ours and the reference's (predictions, objects) of each image."""
    assert [[index.tolist() for index in match] for match in ours] == pairs


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "deta"


@pytest.fixture(scope="module")
def assigners(folder):
    return load(folder, "assigners")


@pytest.fixture(scope="module")
def synthetic(folder):
    return load(folder, "criterion_synthetic")


@pytest.mark.parametrize("case", CASES)
def test_assigner(assigners, case):
    arrays, facts = assigners
    value = {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(f"{case}/")}
    assigner = TASK_UTILS.build(dict(type=STAGES[facts[case]["stage"]]))
    boxes, objects = value["boxes"], value["gt"]
    if len(objects):
        best, positive = assigner.positives(value["iou"])
        assert_close(best, value["matched_gt"].long())
        assert_close(positive, value["match_label"] == 1)
        assert positive.sum() == facts[case]["positives"]
    permutation = value["randperm_0"].long() if "randperm_0" in value else None
    index, owner = assigner.assign(boxes, objects, permutation=permutation)
    assert_close(index, value["pred_index"].long())
    assert_close(owner, value["gt_index"].long())


@pytest.mark.parametrize(("stage", "threshold"), [(1, 0.7), (2, 0.6)])
def test_the_threshold_itself_is_positive(stage, threshold):
    iou = torch.tensor([[threshold, threshold - 1e-3, 0.9], [0.0, 0.8, 0.1]])
    best, positive = TASK_UTILS.build(dict(type=STAGES[stage])).positives(iou)
    assert best.tolist() == [0, 1, 0]
    assert positive.tolist() == [True, True, True]
    iou[1] = torch.tensor([0.0, 0.0, 0.95])
    assert TASK_UTILS.build(dict(type=STAGES[stage])).positives(iou)[1].tolist() == [True, False, True]


@pytest.mark.parametrize("stage", STAGES)
def test_only_chosen_positives_give_an_object_its_matches(stage):
    """Two equal objects far apart, each with 200 equal boxes; the choice goes to one of them alone."""
    assigner = TASK_UTILS.build(dict(type=STAGES[stage]))
    objects = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    boxes = objects.repeat_interleave(200, 0)
    limit = assigner.max_positives(len(boxes))
    assert limit == (128 if stage == 1 else 100)
    for order, owner in ((torch.arange(400), 0), (torch.arange(400).flip(0), 1)):
        assert assigner.assign(boxes, objects, permutation=order)[1].tolist() == [owner] * 4
    few = torch.cat([torch.arange(3), 200 + torch.arange(limit - 3)])
    assert assigner.assign(boxes, objects, permutation=few)[1].tolist() == [0] * 3 + [1] * 4


def test_positives_are_chosen_at_random():
    assigner = TASK_UTILS.build(dict(type=STAGES[2], pos_fraction=0.5))
    objects = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    boxes = objects.repeat_interleave(4, 0)
    torch.manual_seed(0)
    counts = torch.stack([assigner.assign(boxes, objects)[1].bincount(minlength=2) for _ in range(50)])
    assert (counts.sum(1) == 4).all()
    assert counts.unique(dim=0).shape[0] >= 3


@pytest.mark.parametrize("stage", STAGES)
def test_objects_and_boxes_without_area(stage):
    """They overlap nothing, not even themselves; the other object is matched as if it were alone in its place."""
    assigner = TASK_UTILS.build(dict(type=STAGES[stage], pos_iou=0.5))
    point = [0.5, 0.5, 0.0, 0.0]
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], point, *[[0.9, 0.9, 0.1, 0.1]] * 14])
    assert_matches([assigner.assign(boxes, boxes[:1])], [[[0], [0]]])
    objects = torch.tensor([point, [0.2, 0.2, 0.1, 0.1]])
    permutation = torch.tensor([0, 1, 2, 3])  # all boxes but the first overlap nothing, as the point does
    index, owner = assigner.assign(boxes, objects, permutation=permutation)
    assert index[owner == 1].tolist() == [0]


def test_fewer_boxes_than_matches_of_an_object():
    assigner = TASK_UTILS.build(dict(type=STAGES[1]))
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.19]])
    assert_matches([assigner.assign(boxes, boxes[:1])], [[[0, 1], [0, 0]]])


@pytest.mark.parametrize("wrong", [dict(pos_iou=0.0), dict(pos_iou=1.5), dict(topk=0)])
def test_assigner_refuses(wrong):
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\]"):
        TASK_UTILS.build(dict(type=STAGES[1], **wrong))


def synthetic_outputs(arrays):
    logits = torch.stack([arrays["aux0_pred_logits"], arrays["pred_logits"]])
    boxes = torch.stack([arrays["aux0_pred_boxes"], arrays["pred_boxes"]])
    proposals = dict(
        init_reference=arrays["init_reference"], anchors=arrays["enc_anchors"],
        enc_logits=arrays["enc_pred_logits"], enc_boxes=arrays["enc_pred_boxes"],
    )  # fmt: skip
    return logits, boxes, proposals


def synthetic_losses(head, arrays, size=(480, 640)):
    samples = [image(arrays[f"target_{i}_boxes"], arrays[f"target_{i}_labels"], *size) for i in range(2)]
    objects = [sample.gt_instances for sample in samples]
    return head.loss_by_feat(*synthetic_outputs(arrays), objects, [sample.metainfo for sample in samples])


@pytest.mark.parametrize("size", [(480, 640), (1824, 1216)])
def test_losses_of_shared_predictions(synthetic, size):
    """Several matches per object, and predictions of two objects; the size in pixels does not matter."""
    arrays, facts = synthetic
    head = build_head(91)
    for part, kind in (("dec", head.assigner), ("enc", head.proposal_assigner)):
        boxes = arrays["init_reference" if part == "dec" else "enc_anchors"]
        ours = [kind.assign(boxes[i], arrays[f"target_{i}_boxes"]) for i in range(2)]
        assert_matches(ours, facts["indices"][part])
    assert sum(facts["duplicate_predictions"]["dec"]) > 0
    assert_losses(synthetic_losses(head, arrays, size), facts, facts)


def test_losses_are_divided_by_the_mean_number_of_objects_over_ranks(synthetic, monkeypatch):
    arrays, _ = synthetic
    head = build_head(91)
    alone = synthetic_losses(head, arrays)
    monkeypatch.setattr(deta_head, "reduce_mean", lambda number: (number + 15) / 2)  # the other rank has 15
    for name, value in synthetic_losses(head, arrays).items():
        assert_close(value, alone[name] * 5 / 10)
    monkeypatch.setattr(deta_head, "reduce_mean", lambda number: number / 50)
    for name, value in synthetic_losses(head, arrays).items():
        assert_close(value, alone[name] * 5)


def test_giou_of_an_object_of_one_pixel():
    """Its area, a millionth of the image's, is below mmdet's epsilon where an image has size 1."""
    head = build_head(1)
    boxes = torch.tensor([[[0.5, 0.5, 5e-4, 5e-4]]])
    objects = torch.tensor([[0.5, 0.5, 5e-4, 1e-3]])
    match, size = (torch.tensor([0]), torch.tensor([0])), torch.full((4,), 1824.0)
    losses = head.loss_by_feat_single(torch.zeros(1, 1, 1), boxes, [match], [objects], [torch.tensor([0])], [size], 1)
    assert_close(losses[2], torch.tensor(2 * 0.5), rtol=1e-3, atol=0)


class Fixture:
    """The heads of the shrunk model, with what the reference's encoder and decoder gave them."""

    def __init__(self, folder):
        self.arrays, _ = load(folder, "deta")
        targets, self.facts = load(folder, "criterion")
        self.arrays |= targets
        self.weights = read_checkpoint(checkpoint_file(folder / "deta.pth")).state
        self.head = build_head(91)
        self.head.load_state_dict({self.our_name(name): self.weights[name] for name in self.head_names()})
        self.enc_output, self.enc_output_norm = nn.Linear(64, 64), nn.LayerNorm(64)
        for module in ("enc_output", "enc_output_norm"):
            state = {part: self.weights[f"transformer.{module}.{part}"] for part in ("weight", "bias")}
            getattr(self, module).load_state_dict(state)

    def head_names(self):
        return [name for name in self.weights if name.startswith(("class_embed", "bbox_embed"))]

    @staticmethod
    def our_name(name):
        kind, layer, *rest = name.split(".")
        if kind == "class_embed":
            return ".".join(["cls_branches", layer, *rest])
        _, index, part = rest
        return f"reg_branches.{layer}.{2 * int(index)}.{part}"

    def forward(self):
        """Inputs of `DETAHead.loss`, but for the samples."""
        a = self.arrays
        invalid = a["token_is_invalid"][..., None]
        memory = self.enc_output_norm(self.enc_output(a["memory"].masked_fill(invalid, 0)))
        boxes = self.head.reg_branches[-1](memory) + inverse_sigmoid(a["anchors"]).masked_fill(invalid, torch.inf)
        proposals = dict(
            init_reference=a["init_reference"], anchors=a["anchors"],
            enc_logits=self.head.cls_branches[-1](memory), enc_boxes=boxes.sigmoid(),
        )  # fmt: skip
        references = [a["init_reference"], *a["decoder_references"]]
        return a["decoder_hidden"], references, proposals

    def samples(self, *, second_empty=False):
        count = {0: None, 1: 0 if second_empty else None}
        return [
            image(
                self.arrays[f"target_{i}_boxes"][: count[i]],
                self.arrays[f"target_{i}_labels"][: count[i]],
                *self.arrays["resized_sizes"][i].tolist(),
            )
            for i in range(2)
        ]


@pytest.fixture(scope="module")
def fixture(folder):
    return Fixture(folder)


def test_outputs_of_the_layers(fixture):
    hidden, references, proposals = fixture.forward()
    logits, boxes = fixture.head(hidden, references)
    close = dict(rtol=1e-4, atol=1e-4)
    for layer, name in enumerate(("aux0_pred", "pred")):
        assert_close(logits[layer], fixture.arrays[f"{name}_logits"], **close)
        assert_close(boxes[layer], fixture.arrays[f"{name}_boxes"], **close)
    assert_close(proposals["enc_logits"][..., 0], fixture.arrays["enc_objectness"], **close)
    assert_close(proposals["enc_boxes"], fixture.arrays["enc_boxes"], **close)


@pytest.mark.parametrize("case", ["assigners", "assigners_second_empty"])
def test_losses_of_the_model(fixture, case):
    expected = fixture.facts["cases"][case]
    samples = fixture.samples(second_empty=case == "assigners_second_empty")
    hidden, references, proposals = fixture.forward()
    for part, kind in (("dec", fixture.head.assigner), ("enc", fixture.head.proposal_assigner)):
        boxes = proposals["init_reference" if part == "dec" else "anchors"]
        objects = [fixture.arrays[f"target_{i}_boxes"][: len(samples[i].gt_instances)] for i in range(2)]
        assert_matches(list(map(kind.assign, boxes, objects)), expected["indices"][part])
    assert_losses(fixture.head.loss(hidden, references, proposals, samples), fixture.facts, expected)


def test_gradients_of_the_heads(fixture):
    case = fixture.facts["cases"]["assigners"]
    modules = fixture.head, fixture.enc_output, fixture.enc_output_norm
    for module in modules:
        module.zero_grad()
    sum(fixture.head.loss(*fixture.forward(), fixture.samples()).values()).backward()
    ours = {name: parameter.grad for name, parameter in fixture.head.named_parameters()}
    names = {name: ours[fixture.our_name(name)] for name in fixture.head_names()}
    for module in ("enc_output", "enc_output_norm"):
        names |= {f"{module}.{part}": getattr(getattr(fixture, module), part).grad for part in ("weight", "bias")}
    for name, gradient in names.items():
        aliases = (f"transformer.decoder.{name}", f"transformer.{name}", name)
        theirs = next(alias for alias in aliases if alias in case["grad_l2"])
        assert_close(gradient.norm().item(), case["grad_l2"][theirs], rtol=2e-4, atol=1e-6)
        scale = case["grad_l2"][theirs] * gradient.numel() ** 0.5
        assert_close(gradient.sum().item(), case["grad_sum"][theirs], rtol=2e-4, atol=2e-5 * scale)
    assert len(names) == len(ours) + 4


def test_images_without_objects_still_train_every_head(fixture):
    """Nothing to match in any image: boxes cost nothing, but a rank must not leave a parameter without gradient."""
    samples = [image(torch.zeros(0, 4), torch.zeros(0), 256, 192) for _ in range(2)]
    fixture.head.zero_grad()
    losses = fixture.head.loss(*fixture.forward(), samples)
    sum(losses.values()).backward()
    assert all(losses[name] == 0 for name in losses if "cls" not in name)
    assert losses["loss_cls"] > 0
    assert all(parameter.grad is not None for parameter in fixture.head.parameters())


def test_objects_without_area_give_finite_losses(fixture):
    samples = fixture.samples()
    samples[0].gt_instances.bboxes[1, 2:] = samples[0].gt_instances.bboxes[1, :2]
    hidden, references, proposals = fixture.forward()
    proposals["init_reference"] = proposals["init_reference"].clone()
    proposals["init_reference"][0, :, 2:] = 0
    fixture.head.zero_grad()
    losses = fixture.head.loss(hidden, references, proposals, samples)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in fixture.head.parameters())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [("nms", {}), ("soft_quad_0.5", dict(method="quad", iou_threshold=0.7, quad_scale=0.5, max_per_img=None))],
)
def test_detections(fixture, folder, monkeypatch, name, options, rescale):
    """In pixels of the original image, or of the input; `test_cfg` chooses the suppression."""
    expected, _ = load(folder, "postprocess")
    hidden, references, _ = fixture.forward()
    samples = fixture.samples()
    for sample, shape in zip(samples, fixture.arrays["orig_sizes"].tolist(), strict=True):
        sample.set_metainfo(dict(ori_shape=tuple(shape)))
    monkeypatch.setattr(fixture.head, "test_cfg", options)
    results = fixture.head.predict(hidden, references, samples, rescale=rescale)
    for index, (result, sample) in enumerate(zip(results, samples, strict=True)):
        boxes, scores, labels = (expected[f"model/{name}/{index}_{part}"] for part in ("boxes", "scores", "labels"))
        (height, width), (h, w) = sample.ori_shape, sample.ori_shape if rescale else sample.img_shape
        boxes = boxes * boxes.new_tensor([w / width, h / height] * 2)
        assert_close(result.labels, labels.long())
        assert_close(result.scores, scores, rtol=1e-4, atol=1e-5)
        assert_close(result.bboxes, boxes, rtol=1e-4, atol=1e-2)


def test_the_first_head_starts_where_the_reference_does():
    head = build_head(80)
    head.init_weights()
    assert len(head.cls_branches) == len(head.reg_branches) == 3
    for classes, boxes in zip(head.cls_branches, head.reg_branches, strict=True):
        assert_close(classes.bias.sigmoid(), torch.full((80,), 0.01))
        assert not boxes[-1].weight.any()
        assert not boxes[-1].bias.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sync_cls_avg_factor=False), "mean over ranks"),
        (dict(loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False)), "FocalLoss"),
        (dict(train_cfg=dict(assigner=dict(type=STAGES[2]))), "add proposal_assigner"),
    ],
)
def test_head_refuses(options, words):
    with pytest.raises(ConfigError, match=words):
        build_head(80, **options)
