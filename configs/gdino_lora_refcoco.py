# Referring expressions: RefCOCO; for RefCOCO+ and RefCOCOg change the two annotation files.
_base_ = 'gdino_lora_coco.py'

data_root = '{{$DATA_ROOT:data/coco/}}'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ODVGDataset',
        data_root=data_root,
        ann_file='mdetr_annotations/finetune_refcoco_train_vg.json',
        label_map_file=None,
        data_prefix=dict(img='train2014/'),
        filter_cfg=dict(filter_empty_gt=False, min_size=32),
        return_classes=True,
        # "the left one" is another in the mirror
        pipeline=[
            dict(step, prob=0.0) if step['type'] == 'RandomFlip' else step
            for step in _base_.train_pipeline
        ],
    )
)
val_file = 'mdetr_annotations/finetune_refcoco_val.json'
val_dataloader = dict(
    dataset=dict(
        type='MDETRStyleRefCocoDataset',
        ann_file=val_file,
        data_prefix=dict(img='train2014/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='RefExpMetric',
    ann_file=data_root + val_file,
    metric='bbox',
    iou_thrs=0.5,
    topk=(1, 5, 10),
)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best=None))
train_cfg = dict(max_epochs=5)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=5, milestones=[3], gamma=0.1)]
