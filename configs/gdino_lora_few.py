# A few images of your own things, some ten to a hundred, in COCO's format: more passes over them,
# smaller adapters in encoder and decoder, and the best checkpoint kept. What the base must not
# forget is named in `model.retain`; the README's section on own data shows the paths to change.
_base_ = 'gdino_lora_coco.py'

model = dict(
    lora=dict(preset=['encoder', 'decoder'], r=8, lora_alpha=16),
    retain=dict(names=['person', 'car', 'dog', 'chair', 'bottle']),
)
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=60, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=0.0001))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=60, milestones=[45], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1, save_best='auto'))
