"""What each level shows of a padded image, against the drawing that mmdet shrinks."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.detectors import DeformableDETR

from mmdet_gdino_lora.layers.levels import padding_mask, seen_sizes

SIDES = st.integers(1, 1400)


@settings(max_examples=60, deadline=None, database=None)
@given(first=st.tuples(SIDES, SIDES), second=st.tuples(SIDES, SIDES), more=st.integers(0, 40))
def test_levels_show_what_is_left_of_the_shrunk_drawing(first, second, more) -> None:
    padded = tuple(max(sides) + more for sides in zip(first, second))
    drawing = torch.ones(2, *padded)
    for canvas, (height, width) in zip(drawing, (first, second)):
        canvas[:height, :width] = 0
    shapes = [tuple(-(-side // stride) for side in padded) for stride in (8, 16, 32, 64)]
    shrunk = [F.interpolate(drawing[None], size=shape)[0].bool() for shape in shapes]
    seen = seen_sizes(shapes, [first, second], padded)
    if seen is None:
        assert first == second == padded
        return
    mask = torch.cat([level.flatten(1) for level in shrunk], dim=1)
    assert torch.equal(torch.from_numpy(padding_mask(shapes, seen)), mask)
    ratios = torch.from_numpy(seen[..., ::-1] / np.array(shapes)[:, ::-1]).float()
    expected = [DeformableDETR.get_valid_ratio(level) for level in shrunk]
    torch.testing.assert_close(ratios, torch.stack(expected, dim=1))
