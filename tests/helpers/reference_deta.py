"""The shrunk DETA of tests/golden/deta, built from our config."""

import copy

import torch
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.repository import CONFIGS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings
from torchvision.ops import box_convert

from pe_spatial.convert.converter import convert
from pe_spatial.encoder.files import read_checkpoint


def load_config():
    cfg = Config.fromfile(CONFIGS / "_base_" / "models" / "deta_pe.py")
    init_default_scope("mmdet")
    import_modules_from_strings(["pe_spatial.integrations.openmmlab", "pe_spatial.detection.deta.head"])
    return cfg.model


class ReferenceDETA:
    """The shrunk model of the reference, built from our config, with the reference's values."""

    def __init__(self, folder):
        self.facts = read_json(folder / "deta.json")
        self.criterion = read_json(folder / "criterion.json")
        self.arrays = read_arrays(folder / "deta.npz")
        self.targets = read_arrays(folder / "criterion.npz")
        self.detections = read_arrays(folder / "postprocess.npz")
        self.weights = convert(read_checkpoint(checkpoint_file(folder / "deta.pth")), "mmdet", all_classes=True)
        self.cfg = self.shrunk_config()
        self.model = self.build()

    def shrunk_config(self):
        model, hyper, vit = load_config(), self.facts["hyper"], self.facts["hyper"]["backbone"]
        width = hyper["hidden_dim"]
        model.num_queries = hyper["num_queries"]
        model.data_preprocessor.pad_size_divisor = hyper["lsj_img_size"]
        model.backbone.update(
            variant=dict(
                img_size=vit["pretrain_img_size"], patch_size=16, embed_dim=vit["embed_dim"],
                depth=vit["depth"], num_heads=vit["num_heads"], mlp_ratio=self.facts["mlp_ratio"],
                class_token=False, init_values=hyper["backbone_init_values"],
            ),
            geometry="release", drop_path_rate=0.0, init_cfg=None, grad_checkpointing=False,
            window_size=vit["window_size"], pos_embed_mode="tile",
            global_attn_indexes=[i for i in range(vit["depth"]) if i not in vit["window_block_indexes"]],
            rope_mode="interpolate", rope_grid=vit["pt_hw_seq_len"],
        )  # fmt: skip
        model.neck.update(in_channels=[vit["embed_dim"] // 2] + [vit["embed_dim"]] * 2, out_channels=width)
        model.positional_encoding.num_feats = width // 2
        for part, layers in ((model.encoder, hyper["enc_layers"]), (model.decoder, hyper["dec_layers"])):
            part.num_layers = layers
            for block in part.layer_cfg.values():
                block.embed_dims = width
                block.update({"num_heads": hyper["nheads"]} if "num_heads" in block else {})
            part.layer_cfg.ffn_cfg.feedforward_channels = hyper["dim_feedforward"]
        model.bbox_head.update(embed_dims=width, num_classes=self.facts["num_classes"])
        model.test_cfg.class_ids = None  # here a class is its number in COCO
        return model

    def value(self, name):
        return torch.from_numpy(self.arrays[name])

    def build(self, **options):
        """The reference's weights in a model of these options."""
        cfg = copy.deepcopy(self.cfg)
        for name, value in options.items():
            cfg[name] = value
        model = MODELS.build(cfg).eval()
        model.load_state_dict(self.weights.state, strict=True)
        return model

    def samples(self):
        """The two photos, with the objects of the recorded losses."""
        samples = []
        for index, (h, w) in enumerate(self.arrays["resized_sizes"].tolist()):
            boxes = torch.from_numpy(self.targets[f"target_{index}_boxes"])
            boxes = box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([w, h, w, h])
            labels = torch.from_numpy(self.targets[f"target_{index}_labels"]).long()
            original = tuple(self.arrays["orig_sizes"][index].tolist())
            sample = DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=labels))
            sample.set_metainfo(dict(img_shape=(h, w), ori_shape=original, batch_input_shape=(256, 256)))
            samples.append(sample)
        return samples
