"""Two processes train as one with the same batch, and two or three evaluate as one, to the last bit.

Losses that divide by a count of their own process cannot be those of the whole batch unless the counts are equal:

- MMDetection's box heads divide by the RoIs sampled, its mask head by the positive ones. The cascade here samples
  equally many of either in both images, which `FirstSampler` does without random numbers. Our RPN head divides by
  the number of anchors that are to be sampled, and DETA (tests/engine/test_fsdp.py) by the mean count over the
  processes: these agree whatever the images hold.
- The losses of depth agree with `across_ranks`, whatever the counts of valid pixels; without it they are those of a
  process, as released.
- The tracker's divide by the mean number of objects over the processes. Dropout is off in it here.
- Synchronised batch norm runs on GPUs alone; the heads for depth have layer norms here.

`test_counts_that_differ` shows which losses are not those of the whole batch.
"""

import copy
import os
import sys

import numpy as np
import pytest
import torch
from helpers.coco import annotation
from helpers.processes import free_port, start
from helpers.repository import CONFIGS
from torch import nn
from torch.testing import assert_close

pytest.importorskip("mmdet")
pytest.importorskip("torch", minversion="2.7")
pytest.importorskip("mmseg")
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import TASK_UTILS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import dump
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from mmseg.structures import SegDataSample

import pe_spatial.depth.dpt  # registers
import pe_spatial.depth.losses
import pe_spatial.depth.metrics
import pe_spatial.detection
import pe_spatial.integrations.openmmlab
import pe_spatial.tracking.vos.metric  # noqa: F401
from pe_spatial.depth.estimator import DepthEstimator
from pe_spatial.engine.fsdp import gather, read_parts, write_parts
from pe_spatial.tracking.sam2.tracker import PESAM2
from pe_spatial.tracking.vos.masks import write_mask

pytestmark = [
    pytest.mark.mmdet,
    pytest.mark.mmseg,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo"),
]
SIDE = 64
TINY = dict(img_size=SIDE, patch_size=16, embed_dim=32, depth=2, num_heads=2)


# --- training: a case gives a model and the images of the whole batch, the same in every process


@TASK_UTILS.register_module()
class FirstSampler(RandomSampler):
    """Takes the first ones instead of random ones, which two processes would draw differently."""

    def random_choice(self, gallery, num):
        return gallery[:num]


def image(seed, side=SIDE):
    return torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def detection_sample(index, boxes):
    """`boxes` squares of 24 px, with their masks."""
    corners = [(4 + 30 * (i % 2), 4 + 30 * (i // 2)) for i in range(boxes)]
    masks = np.zeros((boxes, SIDE, SIDE), np.uint8)
    for mask, (x, y) in zip(masks, corners, strict=True):
        mask[y : y + 24, x + index : x + 24] = 1
    sample = DetDataSample()
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[x + index, y, x + 24, y + 24] for x, y in corners], dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(boxes) % 3,
        masks=BitmapMasks(masks, SIDE, SIDE),
    )
    sample.set_metainfo(dict(img_id=index, img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), scale_factor=(1, 1)))
    return sample


def cascade(*, boxes=(4, 4)):
    init_default_scope("mmdet")
    model = Config.fromfile(CONFIGS / "_base_" / "models" / "cascade_mask_rcnn_pe.py").model
    width, classes = 16, 3
    model.data_preprocessor.pad_size_divisor = SIDE
    model.backbone.update(variant=TINY, geometry="release", drop_path_rate=0.0, init_cfg=None)
    model.backbone.pyramid.out_channels = width
    model.rpn_head.update(in_channels=width, feat_channels=width)
    head = model.roi_head
    head.bbox_roi_extractor.out_channels = head.mask_roi_extractor.out_channels = width
    for box_head in head.bbox_head:
        box_head.update(in_channels=width, conv_out_channels=width, fc_out_channels=32, num_classes=classes)
    head.mask_head.update(in_channels=width, conv_out_channels=width, num_classes=classes)
    model.train_cfg.rpn.sampler.update(type="FirstSampler", num=32)
    for stage in model.train_cfg.rcnn[:1]:
        stage.sampler.update(type="FirstSampler", num=16)  # a quarter positives: four boxes are enough for them
    items = [dict(inputs=image(i), data_samples=detection_sample(i, n)) for i, n in enumerate(boxes)]
    return MODELS.build(model), items


def uneven_cascade():
    return cascade(boxes=(4, 0))


def depth_case(head, *losses, holes):
    """Two images with depth from 1 to 5 m, of which the first `holes[i]` rows of each are missing."""
    init_default_scope("mmseg")
    layers = [0, 1, 0, 1] if head["type"] == "DPTDepthHead" else [1]
    model = DepthEstimator(
        backbone=dict(type="PerceptionEncoder", variant=TINY, geometry="release", out_indices=layers),
        decode_head=head,
        losses=losses,
        frozen=False,
        data_preprocessor=dict(type="DepthPreprocessor", mean=[127.5] * 3, std=[127.5] * 3),
    )
    items = []
    for i, missing in enumerate(holes):
        depth = 1 + image(10 + i)[:1] / 64
        depth[:, :missing] = 0
        sample = SegDataSample(gt_depth_map=PixelData(data=depth))
        items.append(dict(inputs=image(i), data_samples=sample))
    return model, items


def dpt():
    losses = [dict(type="SigLoss", across_ranks=True, warm_up=0), dict(type="SiLog")]
    return depth_case(dict(type="DPTDepthHead", channels=16, norm="layer"), *losses, holes=(5, 40))


def bins():
    names = ("GradientLoss", "ScaleAndShiftInvariantLoss", "SiLog")
    losses = [dict(type=name, across_ranks=True) for name in names]
    return depth_case(dict(type="BinsDepthHead", bins=16, norm="layer"), *losses, holes=(5, SIDE))


def uneven_bins():
    losses = [dict(type="SigLoss", warm_up=0), dict(type="SiLog"), dict(type="GradientLoss")]
    return depth_case(dict(type="BinsDepthHead", bins=16), *losses, holes=(5, 40))


def tracker():
    """Clips of one and of three objects, prompted by masks, because clicks are drawn by each process."""
    MessageHub.get_current_instance().update_info("iter", 0)  # prompts follow from the step
    small = dict(d_model=32, mem_dim=8, layers=1, feedforward=32)
    model = PESAM2(dict(variant=TINY, grid=SIDE // 16, frozen=False, **small), prompting=dict(clicks=0))
    for module in model.modules():
        for name in ("p", "dropout_p"):  # of Dropout and of sam2's attention
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    items = []
    for i, count in enumerate((1, 3)):
        masks = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.bool)
        for n in range(count):
            masks[n, :, 4 + 9 * n : 30 + 9 * n, 5 + 8 * i : 40] = True
        frames = torch.stack([image(3 * i + t) for t in range(3)])
        items.append(dict(inputs=frames, masks=masks, data_samples=BaseDataElement()))
    return model, items


CASES = {"cascade": cascade, "dpt": dpt, "bins": bins, "tracker": tracker}  # agree
UNEVEN = {  # and which losses do not
    "cascade": (uneven_cascade, {"loss_mask"}),
    "bins": (uneven_bins, {"loss_0_SigLoss", "loss_2_GradientLoss"}),
}


def train_step(case, rank, world):
    """Losses and gradients of one step; each process has its part of the images."""
    torch.manual_seed(0)
    model, items = case()
    model.train()
    size = len(items) // world
    batch = model.data_preprocessor(pseudo_collate(items[rank * size : (rank + 1) * size]), training=True)
    run = model if world == 1 else MMDistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=True
    )
    total, log = model.parse_losses(run(**batch, mode="loss"))
    total.backward()
    losses = {name: float(value.detach()) for name, value in log.items() if "loss" in name}
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- evaluation: a set, a metric for it, and a model whose predictions depend on the images


@MODELS.register_module()
class Oracle(BaseModel):
    """Predicts what `guess`, a function of this module, makes of an image and its sample."""

    def __init__(self, guess):
        super().__init__()
        self.guess = globals()[guess]
        self.weight = nn.Parameter(torch.ones(()))  # DDP asks for one

    def forward(self, inputs, data_samples, mode):
        assert mode == "predict"
        for x, sample in zip(inputs, data_samples, strict=True):
            self.guess(x, sample)
        return data_samples


@DATASETS.register_module()
class Samples(torch.utils.data.Dataset):
    """Images of noise with the samples that `make`, a function of this module, gives."""

    def __init__(self, number, make, classes=()):
        self.number, self.make, self.metainfo = number, globals()[make], dict(classes=tuple(classes))

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return dict(inputs=image(index), data_samples=self.make(index))


CLASSES = ("rare", "common", "frequent")


def detected_sample(index):
    return DetDataSample(metainfo=dict(img_id=index + 1, ori_shape=(SIDE, SIDE)))


def detect(x, sample):
    """The squares of the truth, moved by what the image says, and some that are wrong."""
    generator = torch.Generator().manual_seed(int(x.sum()))
    truth = detection_sample(0, 4).gt_instances
    moves = torch.randint(-4, 5, (4,), generator=generator)
    masks = [torch.from_numpy(mask).roll(int(move), 1) for mask, move in zip(truth.masks.masks, moves, strict=True)]
    sample.pred_instances = InstanceData(
        bboxes=truth.bboxes + moves[:, None] * torch.tensor([1, 0, 1, 0]),
        scores=torch.rand(4, generator=generator),
        labels=(truth.labels + (torch.rand(4, generator=generator) < 0.3)) % 3,
        masks=torch.stack(masks).bool(),
    )


def depth_sample(index):
    depth = 1 + image(50 + index, 8).float()[:1].repeat_interleave(8, 1).repeat_interleave(8, 2) / 32
    depth[:, : 11 * index] = 0  # each has another number of valid pixels, and the last has none
    return SegDataSample(gt_depth_map=PixelData(data=depth), metainfo=dict(img_path=f"{index}.png"))


def estimate(x, sample):
    sample.pred_depth_map = PixelData(data=sample.gt_depth_map.data + x[:1] / 256 + 0.1)


def label_sample(index):
    labels = image(50 + index)[:1].long() % 4
    labels[labels == 3] = 255
    meta = dict(img_path=f"{index}.png", ori_shape=(SIDE, SIDE))
    return SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta)


def label(x, sample):
    truth = sample.gt_sem_seg.data
    sample.pred_sem_seg = PixelData(data=torch.where(x[:1] % 2 == 0, truth % 3, x[1:2] % 3))


def video_mask(index, frame):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10 + index : 30, 5 + frame : 25] = 1
    mask[40:60, 30 + frame : 50 + index] = 2
    return mask


def video_sample(index):
    return BaseDataElement(metainfo=dict(video=f"v{index}", frames=[f"{t:05d}" for t in range(4)], index=index))


def follow(x, sample):
    shift = int(x.sum()) % 5
    masks = [np.roll(video_mask(sample.index, t), shift, 1) for t in range(4)]
    if by_object(sample.index):
        masks = [{i: mask == i for i in (1, 2)} for mask in masks]
    sample.set_field(masks, "pred_masks", field_type="metainfo")


def by_object(index):
    """Whether a video has a folder of masks for each object: its scores are several things."""
    return index % 2 == 1


EVALUATIONS = {  # name -> number of items, sample, guess, metric
    "coco": (7, "detected_sample", "detect", dict(type="mmdet.CocoMetric", metric=["bbox", "segm"])),
    "lvis": (5, "detected_sample", "detect", dict(type="FastLVISMetric")),
    "depth": (7, "depth_sample", "estimate", dict(type="CheckedDepthMetric", crop="none", max_depth=10.0)),
    "segmentation": (5, "label_sample", "label", dict(type="mmseg.IoUMetric")),
    "video": (5, "video_sample", "follow", dict(type="JandFMetric")),
}


def write_truth(folder):
    """Annotation files for COCO and LVIS, and masks of videos."""
    truth = detection_sample(0, 4).gt_instances
    annotations = []
    for image in range(1, 8):
        for i, (x, y, *_) in enumerate(truth.bboxes.tolist()):
            annotations.append(annotation(10 * image + i, image, [x, y, 24.0, 24.0], i % 3 + 1))
    names = [f"val2017/{i}.png" for i in range(1, 8)]
    lists = dict(neg_category_ids=[], not_exhaustive_category_ids=[])
    images = [
        dict(id=i, file_name=name, coco_url=f"http://x/{name}", height=SIDE, width=SIDE, **lists)
        for i, name in enumerate(names, 1)
    ]
    categories = [dict(id=i, name=name, frequency=name[0], image_count=i) for i, name in enumerate(CLASSES, 1)]
    dump(dict(images=images, annotations=annotations, categories=categories), folder / "truth.json")
    for index in range(5):
        video = folder / "Annotations" / f"v{index}"
        for t in range(4):
            mask = video_mask(index, t)
            if by_object(index):
                for i in (1, 2):
                    write_mask(video / f"{i:03d}" / f"{t:05d}.png", (mask == i).astype(np.uint8))
            else:
                write_mask(video / f"{t:05d}.png", mask)


def evaluate(folder, name, world, *, round_up):
    number, make, guess, metric = copy.deepcopy(EVALUATIONS[name])
    if name in ("coco", "lvis"):
        metric["ann_file"] = str(folder / "truth.json")
    if name == "video":
        metric["ann_dir"] = str(folder / "Annotations")
    runner = Runner(
        model=dict(type="Oracle", guess=guess),
        work_dir=str(folder / f"{name}{world}{round_up}"),
        experiment_name=f"{name}{world}{round_up}",
        test_dataloader=dict(
            batch_size=1,
            num_workers=0,
            collate_fn=dict(type="pseudo_collate"),
            sampler=dict(type="DefaultSampler", shuffle=False, round_up=round_up),
            dataset=dict(type="Samples", number=number, make=make, classes=CLASSES),
        ),
        test_evaluator=metric,
        test_cfg=dict(),
        launcher="pytorch" if world > 1 else "none",
        cfg=dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)),
        default_scope="mmengine",
        log_level="ERROR",
    )
    return runner.test()


# --- the processes


def cut_tree(world):
    """Tensors cut over all processes; the smaller ones leave some of them without a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    tensors = {str(n): torch.arange(n * 3.0).reshape(n, 3) for n in (1, 2, 7)}
    tree = dict(state_dict={k: distribute_tensor(x, mesh, [Shard(0)]) for k, x in tensors.items()}, meta=dict(iter=3))
    return mesh, tensors, tree


def process(rank, ports, folder):
    """Everything that processes do: two of them train and evaluate, then all three evaluate."""
    torch.set_num_threads(1)
    found = {}
    for world, port in ports.items():
        if rank >= world:
            continue
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(world))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        if world == 2:
            for name, case in CASES.items():
                found[name] = train_step(case, rank, world)
            for name, (case, _) in UNEVEN.items():
                found[f"uneven {name}"] = train_step(case, rank, world)
            torch.save(write_parts(cut_tree(world)[2], folder / "two.pth"), folder / f"two{rank}.pth")
        else:
            mesh, tensors, _ = cut_tree(world)
            tree = read_parts(torch.load(folder / "two0.pth"), folder / "two.pth", mesh)
            if rank == 0:
                found["parts"] = tensors, gather(tree)["state_dict"]
            else:
                gather(tree)
        for name in EVALUATIONS:
            for round_up in (True, False):
                found[name, world, round_up] = evaluate(folder, name, world, round_up=round_up)
        torch.distributed.destroy_process_group()
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank found, and the folder of the truth."""
    folder = tmp_path_factory.mktemp("processes")
    write_truth(folder)
    ports = {world: free_port() for world in (2, 3)}
    start(process, (ports, folder), number=3)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(3)], folder


def differences(ranks, name, case):
    """By how much two processes miss one: each loss, and each gradient relative to its largest value.

    Gradients that are zero but for rounding, such as those of biases of keys, are compared to a thousandth of the
    largest one.
    """
    losses, gradients = train_step(case, 0, 1)
    ours, others = (rank[name] for rank in ranks[:2])
    assert ours[0].keys() == others[0].keys() == losses.keys()
    assert ours[1].keys() == others[1].keys() == gradients.keys()
    for key, gradient in ours[1].items():
        assert_close(others[1][key], gradient, rtol=0, atol=0)
    floor = 1e-3 * max(float(g.abs().max()) for g in gradients.values())
    return (
        {key: abs((ours[0][key] + others[0][key]) / 2 - value) for key, value in losses.items()},
        {key: float((ours[1][key] - g).abs().max() / g.abs().max().clamp(min=floor)) for key, g in gradients.items()},
    )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(results, name):
    for found in differences(results[0], name, CASES[name]):
        worst = max(found, key=found.get)
        assert found[worst] < 1e-5, worst


@pytest.mark.parametrize("name", UNEVEN)
def test_counts_that_differ(results, name):
    case, expected = UNEVEN[name]
    losses, gradients = differences(results[0], f"uneven {name}", case)
    assert {key for key, value in losses.items() if value > 1e-5 and key != "loss"} == expected
    assert max(gradients.values()) > 1e-3


@pytest.mark.parametrize("name", EVALUATIONS)
def test_two_and_three_processes_evaluate_as_one(results, name):
    ranks, folder = results
    alone = evaluate(folder, name, 1, round_up=True)
    assert len({value for value in alone.values() if 0 < value < 1e3}) > 1  # neither nothing nor perfect
    for world in (2, 3):
        for round_up in (True, False):
            for rank in ranks[:world]:
                np.testing.assert_equal(rank[name, world, round_up], alone)  # exactly, and NaN where NaN is


def test_three_processes_read_what_two_wrote(results):
    tensors, read = results[0][0]["parts"]
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(read[name], expected)
