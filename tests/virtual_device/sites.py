"""Which line of whose code, in which part of the step, asks for an operation."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
HERE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)

#: Functions that are parts of a step, by the file's end and name; the outermost counts, but for
#: those of a lesson of `retain`, which has all the others inside.
PARTS = {
    ('retain.py', 'ask_teacher'): 'retain: teacher',
    ('retain.py', 'loss'): 'retain: student',
    ('data_preprocessor.py', 'forward'): 'preprocessing',
    ('transformer.py', 'encode_text'): 'text',
    ('samples.py', 'attach'): 'targets',
    ('two_stage.py', 'extract_feat'): 'image tower',
    ('base_detr.py', 'extract_feat'): 'image tower',
    ('detection_transformer.py', 'extract_feat'): 'image tower',
    ('transformer.py', 'pre_transformer'): 'levels and positions',
    ('grounding_dino.py', 'forward_encoder'): 'encoder',
    ('transformer.py', 'pre_decoder'): 'query selection and denoising',
    ('transformer.py', 'select_proposals'): 'query selection and denoising',
    ('dino.py', 'forward_decoder'): 'decoder',
    ('decoder.py', 'forward'): 'decoder',
    ('criterion.py', 'forward'): 'criterion',
    ('head.py', 'loss'): 'head',
    ('head.py', 'predict'): 'head',
    ('prediction.py', 'detect'): 'prediction',
    ('clip_grad.py', 'clip_grad_norm_'): 'gradient clipping',
    ('optimizer.py', 'wrapper'): 'optimizer',
    ('grad_scaler.py', 'unscale_'): 'loss scaler',
    ('grad_scaler.py', 'scale'): 'loss scaler',
    ('grad_scaler.py', 'update'): 'loss scaler',
}


class Site(NamedTuple):
    """Where an operation comes from.

    Attributes:
        part: Of the step.
        line: File, line and function, the innermost that is not torch's.
        own: The same, the innermost of this project.
    """

    part: str
    line: str
    own: str


@cache
def _shown(code: CodeType, line: int) -> str:
    path = Path(code.co_filename)
    packages = [i for i, name in enumerate(path.parts) if name == 'site-packages']
    if packages:
        shown = '/'.join(path.parts[packages[-1] + 1 :])
    else:
        shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return f'{shown}:{line} {code.co_name}'


@cache
def _looked_at(code: CodeType) -> tuple[bool, bool, str | None]:
    """Whether a function is not torch's, whether it is this project's, and its part."""
    path = code.co_filename
    ours = '/mmdet_gdino_lora/' in path and 'site-packages' not in path
    part = PARTS.get((path.rpartition('/')[2], code.co_name))
    return not path.startswith((HERE, TORCH)), ours, part


def current_site() -> Site:
    """Looks up the stack of whoever calls."""
    frame: FrameType | None = sys._getframe(1)
    line, own, parts = '', '', []
    while frame is not None:
        known, ours, part = _looked_at(frame.f_code)
        if known and not line:
            line = _shown(frame.f_code, frame.f_lineno)
        if ours and not own:
            own = _shown(frame.f_code, frame.f_lineno)
        if part is not None:
            parts.append(part)
        frame = frame.f_back
    return Site(_part(parts), line or 'torch', own or '-')


def _part(parts: list[str]) -> str:
    """Of the parts around a frame, innermost first."""
    if not parts:
        return 'other'
    outermost = parts[-1]
    if outermost == 'head' and 'criterion' in parts:
        return 'criterion'
    if outermost.startswith('retain') and len(parts) > 1:
        return f'{outermost}, {parts[-2]}'
    return outermost


def stack() -> str:
    """The lines of this project, and of who is called from there, that lead to an operation."""
    frame: FrameType | None = sys._getframe(1)
    lines = []
    while frame is not None and len(lines) < 12:
        path = frame.f_code.co_filename
        if not path.startswith((HERE, TORCH)):
            lines.append(_shown(frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return ' < '.join(lines)
