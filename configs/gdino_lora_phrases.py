# Phrases of captions (ODVG's grounding format), as in Flickr30k Entities, which it is validated on.
_base_ = 'gdino_lora_coco.py'

data_root = '{{$DATA_ROOT:data/flickr30k_entities/}}'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ODVGDataset',
        data_root=data_root,
        ann_file='final_flickr_separateGT_train_vg.json',
        label_map_file=None,
        data_prefix=dict(img='flickr30k_images/'),
        filter_cfg=dict(filter_empty_gt=False),
        return_classes=True,
        pipeline=_base_.train_pipeline,
    )
)
# The phrases of an image are given with it, by their places in its caption.
test_pipeline = [
    *_base_.test_pipeline[:-2],
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'text',
            'custom_entities', 'tokens_positive', 'phrase_ids', 'phrases',
        ),
    ),
]  # fmt: skip
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='Flickr30kDataset',
        data_root=data_root,
        ann_file='final_flickr_separateGT_val.json',
        data_prefix=dict(img='flickr30k_images/'),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='Flickr30kMetric')
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best=None))
