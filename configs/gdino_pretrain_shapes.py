# A small Grounding DINO trained from random weights on the base classes of the shapes data set
# (mmdet_gdino_lora/datasets/shapes.py). It made assets/shapes/base.safetensors, which
# gdino_lora_shapes.py puts adapters on; assets/shapes/README.md has command, seed and log.
_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['mmdet_gdino_lora'], allow_failed_imports=False)

data_root = 'data/shapes/'
text_model = '{{ fileDirname }}/../assets/shapes/text'
metainfo = dict(
    classes=(
        'red circle',
        'green circle',
        'blue circle',
        'yellow circle',
        'red square',
        'green square',
        'blue square',
        'yellow square',
        'red triangle',
        'green triangle',
        'blue triangle',
        'yellow triangle',
    )
)

model = dict(
    type='LoRAGroundingDINO',  # without `lora`: no adapters, every parameter is trained
    num_queries=60,
    num_feature_levels=3,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=False,
    ),
    language_model=dict(
        type='GroundingTextEncoder',
        name=text_model,
        max_tokens=256,
        pad_to_max=False,
        use_sub_sentence_represent=True,
        special_tokens_list=['[CLS]', '[SEP]', '.', '?'],
        add_pooling_layer=False,
        # The folder holds a config and a vocabulary alone. Random weights of BERT's usual size
        # would mix the words of a name too little to tell "red circle" from "red square".
        init_cfg=[
            dict(type='Normal', layer='Embedding', std=0.05),
            dict(type='Xavier', layer='Linear', distribution='uniform'),
        ],
    ),
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=32,
        num_stages=4,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='GN', num_groups=16, requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
        style='pytorch',
    ),
    neck=dict(
        type='ChannelMapper',
        in_channels=[64, 128, 256],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        bias=True,
        norm_cfg=dict(type='GN', num_groups=32),
        num_outs=3,
    ),
    encoder=dict(
        num_layers=2,
        num_cp=0,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_levels=3, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        text_layer_cfg=dict(
            self_attn_cfg=dict(num_heads=4, embed_dims=256, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        fusion_layer_cfg=dict(
            v_dim=256, l_dim=256, embed_dim=256, num_heads=4, dropout=0.0, drop_path=0.0,
            init_values=1e-1,
        ),
    ),
    decoder=dict(
        num_layers=3,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_text_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=3, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type='GroundingDINOCriterionHead',
        num_classes=16,
        contrastive_cfg=dict(max_text_len=256, log_scale='auto', bias=True),
        # From random weights, classes in the encoder's targets teach the image features sooner.
        criterion=dict(type='GroundingDINOCriterion', enc_target='tokens'),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=16),
    ),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='TokenFocalCost', weight=1.0),
                dict(type='BoxL1Cost', weight=5.0),
                dict(type='BoxGIoUCost', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=60),
)  # fmt: skip

# The same for training and validation, but for the flip.
load = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
]
pack = [
    dict(type='TokenSpans', tokenizer_name=text_model),
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
            'flip_direction', 'text', 'custom_entities', 'tokens_positive', 'caption_tokens',
        ),
    ),
]  # fmt: skip
train_pipeline = [*load, dict(type='RandomFlip', prob=0.5), *pack]
test_pipeline = [*load, *pack]

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/base_train.json',
        data_prefix=dict(img='base_train/'),
        filter_cfg=dict(filter_empty_gt=False, min_size=1),
        pipeline=train_pipeline,
        return_classes=True,
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/base_val.json',
        data_prefix=dict(img='base_val/'),
        test_mode=True,
        pipeline=test_pipeline,
        return_classes=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/base_val.json', metric='bbox'
)
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=4, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.0004, weight_decay=0.0001),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=2.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=0, end=4, eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
auto_scale_lr = dict(enable=False, base_batch_size=8)

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=10),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
