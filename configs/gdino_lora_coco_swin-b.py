# MM Grounding DINO with Swin-B, on COCO 2017 or data laid out like it.
_base_ = 'gdino_lora_coco.py'

_openmmlab = 'https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino'
model = dict(
    base_checkpoint=f'{_openmmlab}/grounding_dino_swin-b_pretrain_all/'
    'grounding_dino_swin-b_pretrain_all-f9818a7c.pth',
    backbone=dict(
        pretrain_img_size=384,
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
