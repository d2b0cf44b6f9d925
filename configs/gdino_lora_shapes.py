# The demo: adapters learn classes whose words the shipped base never saw, and are held to the base
# on the classes that it knows. `make demo` runs it and measures before and after; tools/train.py
# runs it as any other config.
_base_ = './gdino_pretrain_shapes.py'

data_root = _base_.data_root
metainfo = dict(
    classes=(
        'purple star',
        'orange star',
        'cyan star',
        'purple bar',
        'orange bar',
        'cyan bar',
        'purple heart',
        'orange heart',
        'cyan heart',
    )
)

model = dict(
    base_checkpoint='{{ fileDirname }}/../assets/shapes/base.safetensors',
    # A base this small has little to build on: adapters everywhere, and of a high rank.
    lora=dict(preset='all', r=32, lora_alpha=64),
    # None of the old classes is in the images; the base says what it sees there.
    retain=dict(names=_base_.metainfo.classes),
)

train_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        ann_file='annotations/new_train.json',
        data_prefix=dict(img='new_train/'),
    ),
)
val_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        ann_file='annotations/new_val.json',
        data_prefix=dict(img='new_val/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/new_val.json')
test_evaluator = val_evaluator

# 400 images in batches of 8: 200 iterations.
train_cfg = dict(max_epochs=4, val_interval=4)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.003, weight_decay=0.0001),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=0, end=4, eta_min_ratio=0.05,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
