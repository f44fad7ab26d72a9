"""Exported models in tests: detectors of the golden values, and a session that runs the graph's module in torch."""

import torch
from helpers.golden import checkpoint_file
from helpers.reference_maskrcnn import ReferenceMaskRCNN

import pe_spatial


class EagerSession:
    """What `open_session` returns, for a module that was not exported."""

    def __init__(self, exportable):
        self.exportable = exportable
        self.names = [*exportable.outputs, *exportable.stages]

    def run(self, inputs):
        with torch.no_grad():
            values = self.exportable.module(*(torch.from_numpy(value) for value in inputs.values()))
        return {name: value.numpy() for name, value in zip(self.names, values, strict=True)}


def golden_detector(golden, name):
    """Return the predictor of the reference's 'maskrcnn' or 'cascade', its images, and what they contain."""
    fixture = ReferenceMaskRCNN(golden / "maskrcnn", name)
    predictor = pe_spatial.load(checkpoint_file(golden / "maskrcnn" / f"{name}.pth"), config=fixture.cfg,
                                class_names=[str(i) for i in range(80)])  # fmt: skip
    images = [golden / "maskrcnn" / file for file in fixture.facts["files"]]
    parts = ("boxes", "scores", "classes")
    return predictor, images, [
        dict(zip(("boxes", "scores", "labels"), (fixture.arrays[f"det_{i}_{part}"] for part in parts), strict=True))
        for i in range(len(images))
    ]  # fmt: skip


def found(result):
    """Return detections in the form that `compare.match` takes."""
    values = dict(boxes=result.boxes, scores=result.scores, labels=result.labels)
    return values if result.masks is None else values | {"masks": result.masks}
