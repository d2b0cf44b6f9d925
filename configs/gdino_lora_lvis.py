# LVIS v1, 1203 classes: captions of training are sampled, those of testing hold 40 names each.
# mmdet's docs (configs/mm_grounding_dino/dataset_prepare.md) say how its three files are made.
_base_ = 'gdino_lora_odvg.py'

data_root = '{{$DATA_ROOT:data/coco/}}'
model = dict(test_cfg=dict(max_per_img=300, chunked_size=40))

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ClassBalancedDataset',
        oversample_thr=1e-3,
        dataset=dict(
            type='ODVGDataset',
            data_root=data_root,
            ann_file='annotations/lvis_v1_train_od.json',
            label_map_file='annotations/lvis_v1_label_map.json',
            data_prefix=dict(img=''),
            filter_cfg=dict(filter_empty_gt=False, min_size=32),
            return_classes=True,
            pipeline=_base_.train_pipeline,
        ),
    )
)
minival = 'annotations/lvis_v1_minival_inserted_image_name.json'
val_dataloader = dict(
    dataset=dict(
        type='LVISV1Dataset', data_root=data_root, ann_file=minival, data_prefix=dict(img='')
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='LVISFixedAPMetric', ann_file=data_root + minival)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='lvis_fixed_ap/AP', rule='greater'))
train_cfg = dict(val_interval=3)
