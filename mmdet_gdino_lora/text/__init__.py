"""Captions from class names, their tokens, and the text encoder with its masks."""

from mmdet_gdino_lora.text.caption import Caption, build_caption, clean_name
from mmdet_gdino_lora.text.encoder import GroundingTextEncoder
from mmdet_gdino_lora.text.labels import token_labels
from mmdet_gdino_lora.text.tokens import CaptionTokenizer, TokenizedCaption

__all__ = [
    'Caption',
    'CaptionTokenizer',
    'GroundingTextEncoder',
    'TokenizedCaption',
    'build_caption',
    'clean_name',
    'token_labels',
]
