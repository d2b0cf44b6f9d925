# The first Grounding DINO with Swin-B (IDEA-Research's, in mmdet's names).
_base_ = 'gdino_lora_coco_swin-b.py'

_openmmlab = 'https://download.openmmlab.com/mmdetection/v3.0/grounding_dino'
model = dict(
    base_checkpoint=f'{_openmmlab}/groundingdino_swinb_cogcoor_mmdet-55949c9c.pth',
    bbox_head=dict(contrastive_cfg=dict(log_scale=0.0, bias=False)),
)
