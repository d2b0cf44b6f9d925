"""The training step whose operations are counted: real depths, small widths and images.

6 + 6 layers, Swin-T's depths, 2 images and 80 class names: the number of operations depends on
nothing else but on whether images and Swin's windows are padded, as they are at most sizes. The
number of queries changes none of it; fewer of them are counted sooner.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.builders import SMALL_DECODER, SMALL_ENCODER, WORDS, build, data_samples
from tests.virtual_device.counts import Counts
from tests.virtual_device.device import ShapedKernels, VirtualDevice

NAMES = [' '.join(pair) for pair in itertools.permutations(WORDS[:10], 2)][:80]
AMP = {'': None, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


def full_depth(queries: int = 100) -> dict[str, Any]:
    """Settings of `tests.builders.detector_cfg` for a model as deep as the published ones."""
    heads = dict(
        type='GroundingDINOCriterionHead',
        num_classes=len(NAMES),
        contrastive_cfg=dict(max_text_len=256, log_scale='auto', bias=True),
        criterion=dict(type='GroundingDINOCriterion'),
    )
    backbone = dict(
        type='SwinTransformer',
        embed_dims=12,
        depths=[2, 2, 6, 2],
        num_heads=[1, 2, 3, 4],
        window_size=7,
        drop_path_rate=0.2,
        patch_norm=True,
        out_indices=(1, 2, 3),
        with_cp=False,
        convert_weights=False,
    )
    dn_cfg = dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20),
    )
    return dict(
        num_queries=queries,
        encoder={**SMALL_ENCODER, 'num_layers': 6},
        decoder={**SMALL_DECODER, 'num_layers': 6},
        backbone=backbone,
        bbox_head=heads,
        dn_cfg=dn_cfg,
    )


@dataclass
class Step:
    """What a training step asked for.

    Attributes:
        forward: The loss and its sum.
        backward: The gradients.
        optimizer: Clipping and AdamW.
        loss: Its number, on the device.
    """

    forward: Counts
    backward: Counts
    optimizer: Counts
    loss: Tensor


class Trained:
    """A detector on the virtual device that trains.

    Args:
        device: Entered.
        model: It is moved to the device where it is not there.
        amp: Type of autocast; '' for none.
    """

    def __init__(self, device: VirtualDevice, model: nn.Module, amp: str = '') -> None:
        if not next(model.parameters()).is_cuda:
            model = model.cuda()
        self.device, self.model, self.dtype = device, model.train(), AMP[amp]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, foreach=True)

    def batch(
        self, names: list[str], boxes: tuple[int, ...], size: int, seed: int = 0
    ) -> tuple[Tensor, list]:
        """Images and samples on the device."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(len(boxes), 3, size, size, generator=generator)
        samples = data_samples(names, boxes, size=size, seed=seed)
        return images.cuda(), [sample.to('cuda') for sample in samples]

    def step(self, images: Tensor, samples: list) -> Step:
        """One step, as mmengine's optimizer wrapper runs it."""
        with (
            self.device.watch() as forward,
            torch.autocast('cuda', dtype=self.dtype, enabled=self.dtype is not None),
        ):
            losses = self.model.loss(images, samples)
            total, _ = self.model.parse_losses(losses)
        with self.device.watch() as backward:
            total.backward()
        with self.device.watch() as optimizer:
            nn.utils.clip_grad_norm_(self.parameters, 0.1, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return Step(forward, backward, optimizer, total.detach())


def counted(
    text_dir: str,
    base: str,
    amps: Sequence[str] = ('',),
    *,
    size: int = 256,
    padded: bool = False,
    **settings: Any,
) -> dict[str, Step]:
    """Counts a detector's second step in each precision: the first remembers names and sizes.

    Args:
        text_dir: Folder of the text model.
        base: The base checkpoint.
        amps: Types of autocast; '' for none.
        size: Of the images, in pixels.
        padded: Whether one image is smaller than the batch.
        **settings: Of the detector.

    Returns:
        By type of autocast.
    """
    steps = {}
    device = VirtualDevice()
    device.kernels = ShapedKernels(device.operations)
    with device:
        model = build(text_dir, base_checkpoint=base, **{**full_depth(), **settings})
        for amp in amps:
            trained = Trained(device, model, amp)
            for seed in range(2):
                images, samples = trained.batch(NAMES, (4, 3), size, seed)
                if padded:
                    samples[1].set_metainfo(dict(img_shape=(size - 40, size - 64)))
                steps[amp] = trained.step(images, samples)
    return steps
