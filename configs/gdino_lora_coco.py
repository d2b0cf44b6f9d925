# LoRA fine-tuning of MM Grounding DINO (Swin-T, BERT-base) on COCO 2017 or data laid out like it.
#
# Everything not named here is mmdet's own fine-tuning config. LANG_MODEL and DATA_ROOT in the
# environment replace the two paths; without a network set LANG_MODEL to a folder with the files of
# bert-base-uncased and `model.base_checkpoint` to a downloaded copy of the base.
_base_ = 'mmdet::mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py'

custom_imports = dict(imports=['mmdet_gdino_lora'], allow_failed_imports=False)

lang_model_name = '{{$LANG_MODEL:bert-base-uncased}}'
data_root = '{{$DATA_ROOT:data/coco/}}'

model = dict(
    type='LoRAGroundingDINO',
    base_checkpoint=_base_.load_from,
    lora=dict(preset='decoder', r=16, lora_alpha=32),
    train_box_head=True,
    precision='auto',  # bfloat16 mixed precision and TF32 on a GPU that has them; or 'float32'
    data_preprocessor=dict(non_blocking=True),
    language_model=dict(type='GroundingTextEncoder', name=lang_model_name),
    backbone=dict(init_cfg=None),  # the base brings the backbone's weights
    bbox_head=dict(
        _delete_=True,
        type='GroundingDINOCriterionHead',
        num_classes=256,
        contrastive_cfg=dict(max_text_len=256, log_scale='auto', bias=True),
        criterion=dict(type='GroundingDINOCriterion'),
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
)
load_from = None

# TokenSpans turns the data set's class names into caption, character spans and token spans.
token_spans = dict(type='TokenSpans', tokenizer_name=lang_model_name)
train_pipeline = [
    *_base_.train_pipeline[:-1],
    token_spans,
    dict(
        type='PackDetInputs',
        meta_keys=(*_base_.train_pipeline[-1]['meta_keys'], 'tokens_positive', 'caption_tokens'),
    ),
]
test_pipeline = [
    *_base_.test_pipeline[:-1],
    token_spans,
    dict(
        type='PackDetInputs',
        meta_keys=(*_base_.test_pipeline[-1]['meta_keys'], 'caption_tokens'),
    ),
]

# Images go to the GPU from pinned memory, which the host doesn't wait for.
train_dataloader = dict(pin_memory=True, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(pin_memory=True, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# One GPU, batch 4. Adapters bear a larger learning rate than mmdet's full fine-tuning.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.0002, weight_decay=0.0001),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)

# Atomic writes, and the adapter in PEFT's format beside each checkpoint.
default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook'))

# A resumed run draws the random numbers of the run it continues, and goes on in the middle of an
# epoch; SIGTERM saves and ends; NaN ends the run with the batch kept for a look ('skip' goes on).
custom_hooks = [
    dict(type='ResumableSeedHook'),
    dict(type='PreemptHook'),
    dict(type='NonFiniteHook', on_nonfinite='stop'),
]
