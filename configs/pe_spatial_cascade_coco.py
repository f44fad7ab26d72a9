# Cascade Mask R-CNN on PE-Spatial-B16-512, fine-tuned on COCO at 1024 px.
#
#   command   torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_cascade_coco.py --launcher pytorch
#             python tools/train.py configs/pe_spatial_cascade_coco.py --auto-scale-lr    (one GPU, or none)
#   data      data/coco/{train2017,val2017,annotations}, or --data-root FOLDER
#   hardware  8 GPUs of 80 GB, 8 images each (memory not measured yet; to save memory, --cfg-options
#             model.backbone.grad_checkpointing=True, or train_dataloader.batch_size=N with --auto-scale-lr)
#   cost      66375 iterations of 64 images; not measured yet
#   expected  not measured yet: nobody has published a Cascade R-CNN on PE. ViTDet-B, the nearest known recipe, reaches
#             box AP 54.0 with Cascade Mask R-CNN and MAE in 100 epochs (detectron2's numbers)
#
# Other sizes are one option: --cfg-options model.backbone.variant=pe_spatial_t16_512
# bfloat16 is the default; float16 with a loss scale, on CUDA: --cfg-options optim_wrapper.type=AmpOptimWrapper

_base_ = [
    '_base_/models/cascade_mask_rcnn_pe.py',
    '_base_/datasets/coco_instance_lsj_1024.py',
    '_base_/schedules/coco_36e.py',
    '_base_/detection_runtime.py',
]
