# mask_rcnn_pe.py for the 1203 classes of LVIS v1 as released (perception_models@3e352cc,
# mask_rcnn_PEspatial_G_lvis75ep.py): sigmoid instead of softmax, trained on 50 classes at a time; 300 detections above
# 0.02. To train, add the hook SetClassWeights, which FederatedLoss needs.

_base_ = './mask_rcnn_pe.py'

num_classes = 1203
model = dict(
    roi_head=dict(
        bbox_head=dict(
            num_classes=num_classes,
            loss_cls=dict(
                _delete_=True, type='FederatedLoss', num_classes=num_classes, num_sample_classes=50)),
        mask_head=dict(num_classes=num_classes)),
    test_cfg=dict(rcnn=dict(score_thr=0.02, max_per_img=300)))
tta_model = dict(tta_cfg=dict(max_per_img=300))
