# The first Grounding DINO with Swin-T (IDEA-Research's, in mmdet's names): its head scores without
# the scale and the bias that MM Grounding DINO learns.
_base_ = 'gdino_lora_coco.py'

_openmmlab = 'https://download.openmmlab.com/mmdetection/v3.0/grounding_dino'
model = dict(
    base_checkpoint=f'{_openmmlab}/groundingdino_swint_ogc_mmdet-822d7e9d.pth',
    bbox_head=dict(contrastive_cfg=dict(log_scale=0.0, bias=False)),
)
