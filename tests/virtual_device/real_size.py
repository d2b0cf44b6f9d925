"""A training step at real size, of which only shapes exist: what it reads and writes on a GPU.

Swin-T, 6 + 6 layers, 900 queries, four images of 800 x 1333, 20 boxes in each. The text tower is
small; frozen as it is, it is asked once in a run.

python -m tests.virtual_device.real_size --preset all --amp bfloat16
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdet_gdino_lora.layers import levels
from mmdet_gdino_lora.objective import matches
from tests.builders import build, data_samples, tiny_text_model
from tests.virtual_device.device import ShapedKernels, VirtualDevice
from tests.virtual_device.steps import AMP, NAMES, Step, Trained, full_depth

IMAGE, BATCH, BOXES = (800, 1333), 4, 20


def real_widths() -> dict[str, Any]:
    """Settings of `tests.builders.detector_cfg` for MM Grounding DINO with Swin-T."""
    settings = full_depth(queries=900)
    settings['backbone'].update(embed_dims=96, num_heads=[3, 6, 12, 24])
    encoder, decoder = settings['encoder'], settings['decoder']
    ffn = dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0)
    settings['encoder'] = dict(
        encoder,
        layer_cfg=dict(encoder['layer_cfg'], ffn_cfg=ffn),
        text_layer_cfg=dict(
            encoder['text_layer_cfg'], ffn_cfg=dict(ffn, feedforward_channels=1024)
        ),
        fusion_layer_cfg=dict(encoder['fusion_layer_cfg'], embed_dim=1024),
    )
    settings['decoder'] = dict(decoder, layer_cfg=dict(decoder['layer_cfg'], ffn_cfg=ffn))
    settings['dn_cfg']['group_cfg']['num_dn_queries'] = 100
    settings['neck'] = dict(
        type='ChannelMapper',
        in_channels=[192, 384, 768],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        bias=True,
        norm_cfg=dict(type='GN', num_groups=32),
        num_outs=4,
    )
    return settings


def drawn_for_host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Stands in for ``to_host``: every target has two tokens, costs are random."""
    rng = np.random.default_rng(0)
    arrays = {name: np.ones(tuple(t.shape), np.float32) for name, t in tensors.items()}
    for name, array in arrays.items():
        if name == 'spans':
            array[:, 2:] = 0
        elif name.endswith('costs'):
            array[:] = rng.random(array.shape)
    return arrays


@contextmanager
def shapes_alone() -> Iterator[VirtualDevice]:
    """A virtual device whose tensors have shapes and no numbers."""
    device = VirtualDevice()
    device.kernels = ShapedKernels(device.operations)
    try:
        with (
            mock.patch.object(matches, 'to_host', drawn_for_host),
            FakeTensorMode(allow_non_fake_inputs=True),
            device,
        ):
            yield device
    finally:
        levels._levels.cache_clear()  # it would give tensors without numbers to others


def counted_at_real_size(text_dir: str, amp: str = '', **settings: Any) -> Step:
    """Counts a detector's first step.

    Args:
        text_dir: Folder of the text model.
        amp: Type of autocast; '' for none.
        **settings: Of the detector.
    """
    samples = data_samples(NAMES, [BOXES] * BATCH, size=IMAGE[0])
    for sample in samples:
        sample.set_metainfo(dict(img_shape=IMAGE, batch_input_shape=IMAGE, pad_shape=IMAGE))
    model = build(text_dir, **{**real_widths(), **settings})
    with shapes_alone() as device:
        trained = Trained(device, model, amp)
        images = torch.empty(BATCH, 3, *IMAGE, device='cuda')
        return trained.step(images, [sample.to('cuda') for sample in samples])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--preset', default='all')
    parser.add_argument('--amp', default='', choices=AMP)
    parser.add_argument('--most', type=int, default=30, help='lines of each table')
    args = parser.parse_args()
    register_all_modules(init_default_scope=True)
    MMLogger.get_instance('virtual device', log_level='ERROR')
    with tempfile.TemporaryDirectory() as folder:
        text_dir = tiny_text_model(folder)
        step = counted_at_real_size(text_dir, args.amp, lora=dict(preset=args.preset, r=16))
    for way in ('forward', 'backward'):
        counts = getattr(step, way)
        print(f'{way}: {counts.traffic / 1e9:.1f} GB, {counts.launches} operations')
        for fields in (('part',), ('part', 'own', 'name')):
            for key, size in counts.by(*fields, of='bytes').most_common(args.most):
                print(f'{size / 1e9:8.2f}  ' + '  '.join(key))


if __name__ == '__main__':
    main()
