"""Captions from class names, their tokens, and the text encoder with its masks."""

from mmdet_gdino_lora.text.caption import (
    Caption,
    Prompt,
    build_caption,
    clean_name,
    prompted,
    split_names,
    spoken,
)
from mmdet_gdino_lora.text.encoder import GroundingTextEncoder
from mmdet_gdino_lora.text.labels import token_labels
from mmdet_gdino_lora.text.tokenizer import CaptionTokenizer
from mmdet_gdino_lora.text.tokens import TokenizedCaption

__all__ = [
    'Caption',
    'CaptionTokenizer',
    'GroundingTextEncoder',
    'Prompt',
    'TokenizedCaption',
    'build_caption',
    'clean_name',
    'prompted',
    'split_names',
    'spoken',
    'token_labels',
]
