# Detection data in ODVG's format (a line of JSON for each image, and a label map), validated on
# COCO's format. Captions of training are sampled: a label map may have more names than fit.
_base_ = 'gdino_lora_coco.py'

data_root = '{{$DATA_ROOT:data/odvg/}}'
train_pipeline = [
    dict(step, num_negatives='fit') if step['type'] == 'TokenSpans' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ODVGDataset',
        data_root=data_root,
        ann_file='annotations/train_od.json',
        label_map_file='annotations/label_map.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=False),
        return_classes=True,
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, ann_file='annotations/val.json', data_prefix=dict(img='val/'))
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
