"""Text embeddings as a classifier: its rule, what is left out, other names for a trained detector, and small models."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.configs import load
from helpers.repository import CONFIGS
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from safetensors.torch import save_file

from pe_spatial.detection.coco import CheckedCocoDataset
from pe_spatial.detection.text_classifier import TextClassifierHead
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmdet


def vocabulary(path, number, width=6):
    save_file({"embeddings": torch.randn(number, width, generator=torch.Generator().manual_seed(number))}, path)
    return str(path)


def test_logits_are_cosines_over_the_temperature(tmp_path):
    head = TextClassifierHead(5, 4, embed_dims=6, embeddings=vocabulary(tmp_path / "v.safetensors", 3), prior=-2.0)
    x = torch.randn(7, 5)
    logits = head(x)
    features = head.proj(x)
    for i in range(7):
        for k in range(3):
            cosine = F.cosine_similarity(features[i], head.embeddings[k], dim=0)
            assert_close(logits[i, k], cosine / 0.02 - 2.0, rtol=1e-4, atol=1e-4)
        other = F.cosine_similarity(features[i], head.background[0], dim=0)
        assert_close(logits[i, 3], other / 0.02, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(head(x), logits)


def test_left_out_classes_are_no_negatives(tmp_path):
    file = vocabulary(tmp_path / "v.safetensors", 3)
    head = TextClassifierHead(5, 4, embed_dims=6, embeddings=file, left_out=[1])
    x, labels = torch.randn(7, 5), torch.tensor([0, 2, 3, 3, 0, 2, 3])
    loss = F.cross_entropy(head.train()(x), labels)
    assert_close(loss, F.cross_entropy(head(x)[:, [0, 2, 3]], torch.tensor([0, 1, 2, 2, 0, 1, 2])))
    binary = F.binary_cross_entropy_with_logits(head(x), F.one_hot(labels, 4).float(), reduction="none")
    assert_close(binary[:, 1], torch.zeros(7))
    assert (head.eval()(x)[:, 1] > -100).all()
    with pytest.raises(ConfigError, match="left_out is \\[3\\]; labels of 3 classes are 0 to 2"):
        TextClassifierHead(5, 4, embed_dims=6, left_out=[3])


def test_other_names_replace_those_of_a_checkpoint(tmp_path):
    trained = TextClassifierHead(5, 4, embed_dims=6, embeddings=vocabulary(tmp_path / "a.safetensors", 3))
    alone = TextClassifierHead(5, 4, embed_dims=6, embeddings=str(tmp_path / "absent.safetensors"))
    x = torch.randn(2, 5)
    with pytest.raises(ConfigError, match=r"the classes have no embeddings: .*absent\.safetensors is absent"):
        alone(x)
    alone.load_state_dict(trained.state_dict())
    assert_close(alone(x), trained(x))
    other = TextClassifierHead(5, 9, embed_dims=6, embeddings=vocabulary(tmp_path / "b.safetensors", 8))
    own = other.embeddings.clone()
    other.load_state_dict(trained.state_dict())
    assert_close(other.embeddings, own)
    assert_close(other(x)[:, -1], trained(x)[:, -1])
    with pytest.raises(ConfigError, match=r"has embeddings \(3, 6\), and the head needs \(8, 6\)"):
        TextClassifierHead(5, 9, embed_dims=6, embeddings=str(tmp_path / "a.safetensors"))


def sample(size=64):
    objects = InstanceData(bboxes=torch.tensor([[4.0, 4, 40, 50], [20, 10, 60, 60]]), labels=torch.tensor([0, 3]))
    shape = dict(img_shape=(size, size), ori_shape=(size, size), batch_input_shape=(size, size), scale_factor=(1, 1))
    return DetDataSample(gt_instances=objects, metainfo=dict(shape, pad_shape=(size, size), img_id=0))


@pytest.mark.parametrize("federated", [False, True])
def test_cascade_learns_and_predicts(tmp_path, federated):
    cfg = load(CONFIGS / "pe_demo_cascade_synthetic.py")
    cfg.model.backbone.init_cfg = None
    cfg.model.data_preprocessor.pad_size_divisor = 64
    cfg.model.roi_head.pop("mask_head")
    cfg.model.roi_head.pop("mask_roi_extractor")
    for head in cfg.model.roi_head.bbox_head:
        head.cls_predictor_cfg = dict(
            type="TextClassifierHead", embed_dims=6, embeddings=vocabulary(tmp_path / "v.safetensors", 5), left_out=[4]
        )
        if federated:
            head.loss_cls = dict(type="FederatedLoss", num_classes=5, num_sample_classes=3)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for head in model.roi_head.bbox_head:
        if federated:
            head.loss_cls.class_weights += torch.tensor([1.0, 1, 1, 1, 0])
    images = torch.randn(1, 3, 64, 64)
    losses = model.train().loss(images, [sample()])
    total = sum(sum(value) if isinstance(value, list) else value for name, value in losses.items() if "loss" in name)
    total.backward()
    assert total.isfinite()
    assert model.roi_head.bbox_head[0].fc_cls.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval().predict(images, [sample()])[0].pred_instances
    assert set(found.labels.tolist()) <= set(range(5))


def test_openvocab_config_is_classless_but_for_names():
    cfg = load(CONFIGS / "pe_core_openvocab_lvis.py")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    head = model.roi_head.bbox_head
    assert head.fc_cls.embeddings.shape == (1203, 1024)
    assert head.fc_reg.out_features == 4
    assert model.roi_head.mask_head.conv_logits.out_channels == 1
    assert list(cfg.train_dataloader.dataset.frequencies) == ["c", "f"]
    assert "frequencies" not in cfg.val_dataloader.dataset
    assert head.fc_cls(torch.empty(2, 1024, device="meta")).shape == (2, 1204)


def test_deta_has_text_in_its_decoder_alone(tmp_path):
    cfg = load(CONFIGS / "pe_spatial_deta_g14.py")
    text = dict(embed_dims=6, embeddings=vocabulary(tmp_path / "v.safetensors", 7))
    options = dict(cfg.model.bbox_head, num_classes=7, classifier=dict(type="TextClassifierHead", **text))
    options |= dict(embed_dims=16, num_pred_layer=3, as_two_stage=True)
    head = MODELS.build(dict(options, train_cfg=None, test_cfg=None))
    kinds = [type(branch).__name__ for branch in head.cls_branches]
    assert kinds == ["TextClassifierHead", "TextClassifierHead", "Linear"]
    head.init_weights()
    assert head.cls_branches[0](torch.randn(2, 5, 16)).shape == (2, 5, 7)
    assert head.cls_branches[0].prior.item() == pytest.approx(-4.595, abs=1e-3)


def test_dataset_leaves_out_annotations(tmp_path):
    file = write_coco(tmp_path)
    options = dict(ann_file=str(file), data_prefix=dict(img=str(tmp_path / "train2017")), pipeline=[])
    options |= dict(metainfo=dict(classes=("red", "blue")))
    labels = [one["bbox_label"] for image in CheckedCocoDataset(**options) for one in image["instances"]]
    assert set(labels) == {0, 1}
    found = CheckedCocoDataset(**options, left_out=["red"])
    assert [one["bbox_label"] for image in found for one in image["instances"]] == [1] * 4
    with pytest.raises(ConfigError, match="left_out names green; the classes are red, blue"):
        CheckedCocoDataset(**options, left_out=["green"])
