"""Captions from class names, their tokens, and the text encoder with its masks."""

from .caption import Caption, build_caption, clean_name
from .encoder import GroundingTextEncoder
from .labels import token_labels
from .tokens import CaptionTokenizer, TokenizedCaption

__all__ = [
    'Caption',
    'CaptionTokenizer',
    'GroundingTextEncoder',
    'TokenizedCaption',
    'build_caption',
    'clean_name',
    'token_labels',
]
