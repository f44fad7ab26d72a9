"""Exported models in tests: detectors of the golden values, and a session that runs the graph's module in torch."""

import torch
from helpers.configs import load as load_config
from helpers.golden import checkpoint_file
from helpers.reference_deta import ReferenceDETA
from helpers.reference_maskrcnn import ReferenceMaskRCNN
from helpers.repository import CONFIGS

import pe_spatial
from pe_spatial.convert.converter import write_checkpoint


class EagerSession:
    """What `open_session` returns, for a module that was not exported."""

    def __init__(self, exportable):
        self.exportable = exportable
        self.names = [*exportable.outputs, *exportable.stages]

    def run(self, inputs):
        with torch.no_grad():
            values = self.exportable.module(*(torch.from_numpy(value) for value in inputs.values()))
        return {name: value.numpy() for name, value in zip(self.names, values, strict=True)}


def golden_detector(golden, name, folder):
    """Return the predictor of the reference's 'maskrcnn', 'cascade' or 'deta', its images, and what they contain.

    The weights of 'deta' are written into `folder`.
    """
    if name == "deta":
        return golden_deta(golden, folder)
    fixture = ReferenceMaskRCNN(golden / "maskrcnn", name)
    predictor = pe_spatial.load(checkpoint_file(golden / "maskrcnn" / f"{name}.pth"), config=fixture.cfg,
                                class_names=[str(i) for i in range(80)])  # fmt: skip
    images = [golden / "maskrcnn" / file for file in fixture.facts["files"]]
    parts = ("boxes", "scores", "classes")
    return predictor, images, [
        dict(zip(("boxes", "scores", "labels"), (fixture.arrays[f"det_{i}_{part}"] for part in parts), strict=True))
        for i in range(len(images))
    ]  # fmt: skip


def golden_deta(golden, folder):
    fixture = ReferenceDETA(golden / "deta")
    write_checkpoint(folder / "deta.pth", fixture.weights)
    cfg = load_config(CONFIGS / "pe_spatial_deta_g14.py")
    cfg.model = fixture.cfg
    for step in cfg.test_dataloader.dataset.pipeline:
        if "short_sides" in step:
            step.update(short_sides=[224], max_long_side=224)
    predictor = pe_spatial.load(folder / "deta.pth", config=cfg, class_names=[str(i) for i in range(91)])
    images = [(golden / "deta" / file).resolve() for file in fixture.facts["files"]]
    return predictor, images, [
        {key: fixture.detections[f"model/nms/{i}_{key}"] for key in ("boxes", "scores", "labels")}
        for i in range(len(images))
    ]  # fmt: skip


def found(result):
    """Return detections in the form that `compare.match` takes."""
    values = dict(boxes=result.boxes, scores=result.scores, labels=result.labels)
    return values if result.masks is None else values | {"masks": result.masks}


def predicted(model, images):
    """Return what a detector of MMDetection finds in images (B, H, W, 3) uint8 RGB, for `compare.match`."""
    from mmdet.structures import DetDataSample

    size = images.shape[1:3]
    inputs = [torch.from_numpy(image.copy()).permute(2, 0, 1).flip(0) for image in images]
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=[sample.clone() for _ in inputs]), False)
    with torch.no_grad():
        results = [one.pred_instances for one in model(**data, mode="predict")]
    return [dict(boxes=r.bboxes.numpy(), scores=r.scores.numpy(), labels=r.labels.numpy()) for r in results]
