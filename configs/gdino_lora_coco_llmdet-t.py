# LLMDet with Swin-T, which is MM Grounding DINO's architecture. A folder in transformers' format
# may stand for the file: `--cfg-options model.base_checkpoint=FOLDER`.
_base_ = 'gdino_lora_coco.py'

model = dict(base_checkpoint='https://huggingface.co/fushh7/LLMDet/resolve/main/tiny.pth')
