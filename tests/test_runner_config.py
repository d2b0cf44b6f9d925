"""What a detector learns of its run, and validation of boxes that weren't resized."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from torch import nn

from mmdet_gdino_lora.engine.runner_config import annotations_follow_resize, runner_config
from tests.builders import WORDS, build, data_samples

RESIZE = dict(type='FixScaleResize', scale=(800, 1333), keep_ratio=True)
LOAD = dict(type='LoadAnnotations', with_bbox=True)
PACK = dict(type='PackDetInputs')


def start_run(pipeline: list, **keys) -> None:
    """What mmengine's ``RuntimeInfoHook`` does at the start of a run with this pipeline."""
    cfg = Config(dict(val_dataloader=dict(dataset=dict(pipeline=pipeline)), **keys))
    MessageHub.get_current_instance().update_info('cfg', cfg.pretty_text)


def test_the_config_of_the_run_is_read_once() -> None:
    assert runner_config() == {}
    start_run([RESIZE, LOAD], load_from="it's.pth")
    assert runner_config().load_from == "it's.pth"
    assert runner_config() is runner_config()
    start_run([LOAD, RESIZE])
    assert 'load_from' not in runner_config()


@pytest.mark.parametrize(
    'pipeline, follow',
    [
        ([RESIZE, LOAD, PACK], True),
        ([LOAD, RESIZE, PACK], False),
        ([RESIZE, PACK], False),
        ([LOAD, PACK], False),
        ([], False),
    ],
)
def test_boxes_behind_the_resizing_are_in_the_original_images_pixels(pipeline, follow) -> None:
    for dataset in (dict(pipeline=pipeline), dict(dataset=dict(pipeline=pipeline))):
        config = dict(val_dataloader=dict(dataset=dataset))
        assert annotations_follow_resize(config) == follow
    assert not annotations_follow_resize({})


def validated(detector: nn.Module, by_hand: bool) -> dict[str, torch.Tensor]:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = data_samples(WORDS[:6], [3, 1])
    factors = [(2.0, 0.5), (0.5, 1.5)]
    for sample, factor in zip(samples, factors):
        sample.set_metainfo(dict(scale_factor=factor))
        if by_hand:
            sample.gt_instances.bboxes *= torch.tensor(factor * 2)
    before = [sample.gt_instances.bboxes.clone() for sample in samples]
    *results, last = detector.val_step(dict(inputs=list(images), data_samples=samples))
    for sample, boxes in zip(results, before):  # metrics read them
        assert torch.equal(sample.gt_instances.bboxes, boxes)
    return last.loss


def test_validation_losses_are_those_of_boxes_resized_with_their_image(
    text_dir: str, base: str
) -> None:
    detector = build(text_dir, base_checkpoint=base).eval()
    start_run([RESIZE, LOAD, PACK])
    losses = validated(detector, by_hand=False)
    start_run([LOAD, RESIZE, PACK])
    by_hand = validated(detector, by_hand=True)
    assert losses.keys() == by_hand.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-6, atol=0)
    unresized = validated(detector, by_hand=False)
    assert not torch.allclose(unresized['loss_bbox'], losses['loss_bbox'], rtol=0.01)
