# MM Grounding DINO with Swin-L and five feature levels, on COCO 2017 or data laid out like it.
_base_ = 'gdino_lora_coco.py'

_openmmlab = 'https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino'
model = dict(
    base_checkpoint=f'{_openmmlab}/grounding_dino_swin-l_pretrain_all/'
    'grounding_dino_swin-l_pretrain_all-56d69e78.pth',
    num_feature_levels=5,
    backbone=dict(
        pretrain_img_size=384,
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536], num_outs=5),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=5))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=5))),
)
