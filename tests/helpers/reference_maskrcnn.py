"""The shrunk Mask R-CNN and Cascade Mask R-CNN of tests/golden/maskrcnn, built from our configs."""

import torch
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.repository import CONFIGS
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.utils import import_modules_from_strings

from pe_spatial.convert.converter import to_mmdet
from pe_spatial.encoder.files import read_checkpoint

ENTRIES = {"maskrcnn": "pe_spatial_maskrcnn_coco_g14.py", "cascade": "pe_spatial_cascade_coco_g14.py"}


class ReferenceMaskRCNN:
    """One of the two shrunk models of the reference, built from our config, with the reference's values."""

    def __init__(self, folder, name):
        self.facts = read_json(folder / f"{name}.json")
        self.train_facts = read_json(folder / f"{name}_train.json")
        self.arrays = read_arrays(folder / "maskrcnn.npz") | read_arrays(folder / f"{name}.npz")
        self.train_arrays = read_arrays(folder / f"{name}_train.npz")
        self.masks = read_json(folder / f"{name}_masks_rle.json")
        self.folder, self.name = folder, name
        self.cfg = self.shrunk_config()
        self.model = MODELS.build(self.cfg.model).eval()
        self.model.load_state_dict(to_mmdet(read_checkpoint(checkpoint_file(folder / f"{name}.pth"))), strict=True)

    def shrunk_config(self):
        cfg = Config.fromfile(CONFIGS / ENTRIES[self.name])
        init_default_scope(cfg.default_scope)
        import_modules_from_strings(**cfg.custom_imports)
        hyper = self.facts["hyper"]
        vit, width, size = hyper["backbone"], hyper["fpn_channels"], hyper["backbone"]["img_size"]
        model = cfg.model
        model.data_preprocessor.pad_size_divisor = size
        model.backbone.update(
            variant=dict(
                img_size=vit["pretrain_img_size"], patch_size=vit["patch_size"], embed_dim=vit["embed_dim"],
                depth=vit["depth"], num_heads=vit["num_heads"], mlp_ratio=self.facts["mlp_ratio"],
                class_token=False, init_values=self.facts["init_values"],
            ),
            geometry="release", drop_path_rate=0.0, init_cfg=None, grad_checkpointing=False,
            window_size=vit["window_size"], pos_embed_mode="tile",
            global_attn_indexes=[i for i in range(vit["depth"]) if i not in vit["window_block_indexes"]],
            rope_mode="interpolate", rope_grid=vit["pt_hw_seq_len"],
        )  # fmt: skip
        model.backbone.pyramid.out_channels = width
        model.rpn_head.update(in_channels=width, feat_channels=width)
        roi = model.roi_head
        boxes = roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]
        for head in (*boxes, roi.mask_head):
            head.update(in_channels=width, conv_out_channels=width, num_classes=hyper["num_classes"])
        for head in boxes:
            head.fc_out_channels = hyper["fc_dim"]
        for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor):
            extractor.out_channels = width
        for part, index in ((model.train_cfg.rpn_proposal, 0), (model.test_cfg.rpn, 1)):
            part.update(nms_pre=hyper["pre_nms_topk"][index], max_per_img=hyper["post_nms_topk"][index])
        model.test_cfg.rcnn.update(score_thr=hyper["test_score_thresh"], max_per_img=hyper["test_topk_per_image"])
        for step in cfg.test_dataloader.dataset.pipeline:
            if step.type == "Resize":
                step.scale = (size, size)
        return cfg

    def value(self, name):
        return torch.from_numpy(self.arrays[name])

    def images(self):
        """The two photos through the config's own test pipeline and preprocessor."""
        pipeline = Compose(
            [TRANSFORMS.build(step) for step in self.cfg.test_dataloader.dataset.pipeline if "Ann" not in step.type]
        )
        paths = [str(self.folder / name) for name in self.facts["files"]]
        packed = [pipeline(dict(img_path=path, img_id=index)) for index, path in enumerate(paths)]
        batch = dict(inputs=[p["inputs"] for p in packed], data_samples=[p["data_samples"] for p in packed])
        return self.model.data_preprocessor(batch)


def match(boxes, labels, scores, expected_boxes, expected_labels, expected_scores, *, px):
    """Match one to one by class and box; return our index of each expected entry."""
    assert len(boxes) == len(expected_boxes)
    far = (boxes[None] - expected_boxes[:, None]).abs().amax(-1)
    far = far.masked_fill(labels[None] != expected_labels[:, None], torch.inf)
    far = far + 1e3 * (scores[None] - expected_scores[:, None]).abs().clamp(max=0.1)
    index = far.argmin(1)
    assert len(set(index.tolist())) == len(index)
    assert (boxes[index] - expected_boxes).abs().max() <= px
    return index
