# Open-vocabulary Mask R-CNN on PE-Core-L14-336, LVIS v1 at 1024 px: text embeddings of the class names classify.
# Trained on the 866 common and frequent classes; the 337 rare ones are found by their names alone (APr).
#
#   command   pe-spatial embed_classes data/lvis_v1/annotations/lvis_v1_val.json \
#                 data/lvis_v1/pe_core_l14_336.safetensors --model PE-Core-L14-336 --templates imagenet
#             torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_core_openvocab_lvis.py --launcher pytorch
#   data      data/lvis_v1/{train2017,val2017,annotations}, or --data-root FOLDER; the images are COCO's
#   hardware  16 GPUs of 80 GB, 4 images each
#   cost      138281 iterations of 64 images (75 epochs of COCO's length); at least 16 GB of
#             each GPU and 6.4 hours on 16 H100 by pe-spatial plan, without loading of data; not measured
#   expected  not measured yet; a small version on the synthetic world is in projects/synthetic_language
#
# The split is ViLD's (arXiv 2104.13921). Boxes and masks do not depend on the class, so that they apply to any. Other
# names need no training: embed_classes writes another file, and num_classes says how many.

_base_ = [
    '_base_/models/mask_rcnn_pe_lvis.py',
    '_base_/datasets/lvis_v1_instance_lsj_1024.py',
    '_base_/schedules/coco_75e.py',
    '_base_/detection_runtime.py',
]

data_root = 'data/lvis_v1/'
model = dict(
    backbone=dict(variant='pe_core_l14_336', grad_checkpointing=True),
    roi_head=dict(
        bbox_head=dict(
            reg_class_agnostic=True,
            cls_predictor_cfg=dict(
                _delete_=True,
                type='TextClassifierHead',
                embeddings=data_root + 'pe_core_l14_336.safetensors',
                embed_dims=1024,
                prior=-4.6)),  # log(0.01 / 0.99): few regions are of a class
        mask_head=dict(class_agnostic=True)))
optim_wrapper = dict(optimizer=dict(lr=2e-4))  # PE paper, Tab. 24: LVIS, encoders of size L
train_dataloader = dict(batch_size=4, dataset=dict(frequencies=['c', 'f']))
train_cfg = dict(val_interval=30000)
custom_hooks = [*_base_.custom_hooks, dict(type='SetClassWeights')]
