"""Small detectors train, validate, predict and merge on the virtual device as on a GPU.

What `tests/test_cuda.py` sees on a card holds here too: the host's numbers, and no wait but the
matching's. Mistakes planted into a step are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdet_gdino_lora import head
from mmdet_gdino_lora.layers import deformable
from mmdet_gdino_lora.layers.denoising import DenoisingQueryGenerator
from mmdet_gdino_lora.lora.store.merge import merged_weights
from mmdet_gdino_lora.objective import host
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion
from tests.builders import WORDS, build, data_samples
from tests.ceilings import WAITS
from tests.detectors import SETTINGS, ready_for_devices
from tests.faults.smallest import model as smallest
from tests.virtual_device import DeviceError, VirtualDevice
from tests.virtual_device.steps import Step, Trained

NAMES, SIZE = WORDS[:4], 32
MORE: dict[str, dict[str, Any]] = {
    **SETTINGS,
    'no denoising': dict(lora=dict(preset='decoder', r=2), dn_cfg=None),
    'full': dict(lora=None),
}


@pytest.fixture
def device() -> Iterator[VirtualDevice]:
    with VirtualDevice() as device:
        yield device


def detector(text_dir: str, base: str, settings: str) -> nn.Module:
    """Its adapters change what it does, and nothing is dropped: the device draws other numbers."""
    torch.manual_seed(0)
    model = build(text_dir, base_checkpoint=base, **{**smallest(), **MORE[settings]})
    return ready_for_devices(model)


def trained(
    device: VirtualDevice, text_dir: str, base: str, settings: str, amp: str = ''
) -> Trained:
    return Trained(device, detector(text_dir, base, settings), amp)


def second_step(trained: Trained, boxes: tuple[int, ...] = (3, 2)) -> Step:
    """The first remembers names and sizes."""
    for seed in range(2):
        step = trained.step(*trained.batch(NAMES, boxes, SIZE, seed))
    return step


@pytest.mark.parametrize(
    ('settings', 'amps'),
    [
        ('decoder', ['', 'bfloat16', 'float16']),
        ('all', ['', 'bfloat16']),
        ('DoRA', ['bfloat16']),
        ('retain', ['', 'float16']),
        ('half base', ['', 'float16']),
        ('no denoising', ['']),
        ('full', ['']),
    ],
)
def test_a_training_step_waits_for_the_matching_alone(
    device: VirtualDevice, text_dir: str, small_base: str, settings: str, amps: list[str]
) -> None:
    model = detector(text_dir, small_base, settings)
    for amp in amps:
        trained = Trained(device, model, amp)
        step = second_step(trained)
        assert torch.isfinite(step.loss)
        for way in ('forward', 'backward', 'optimizer'):
            assert len(getattr(step, way).waits) <= WAITS[way], getattr(step, way).waits
        assert all(p.is_cuda for p in trained.parameters)


@pytest.mark.parametrize('settings', ['decoder', 'retain', 'no denoising'])
def test_losses_and_gradients_are_the_hosts(text_dir: str, small_base: str, settings: str) -> None:
    def step(on_device: bool) -> dict[str, Tensor]:
        # in double precision, where no rounding bends a gradient at a kink
        model = detector(text_dir, small_base, settings).train().double()
        model.dn_query_generator = None  # the device draws other numbers
        images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
        samples = data_samples(NAMES, (3, 2), size=SIZE)
        if on_device:
            model, images = model.cuda(), images.cuda()
            samples = [sample.to('cuda') for sample in samples]
        total, _ = model.parse_losses(model.loss(images, samples))
        total.backward()
        found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        return dict(found, total=total.detach().cpu())

    expected = step(False)
    with VirtualDevice():
        got = step(True)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max()
        assert error <= 1e-9 * value.abs().max() + 1e-12, name


@pytest.mark.parametrize('boxes', [(0, 0), (0, 3), (40, 1)])
def test_images_with_no_and_with_many_boxes(
    device: VirtualDevice, text_dir: str, small_base: str, boxes: tuple[int, ...]
) -> None:
    step = second_step(trained(device, text_dir, small_base, 'decoder'), boxes)
    assert torch.isfinite(step.loss)
    assert len(step.forward.waits) <= WAITS['forward']
    assert step.backward.waits == []


@pytest.mark.parametrize('settings', ['decoder', 'half base'])
def test_prediction_waits_three_times_a_batch_at_most(
    device: VirtualDevice, text_dir: str, small_base: str, settings: str
) -> None:
    model = trained(device, text_dir, small_base, settings)
    model.model.eval()
    with torch.no_grad():
        for _ in range(2):
            images, samples = model.batch(NAMES, (3, 2), SIZE)
            with device.watch() as counts:
                found = model.model.predict(images, samples)
    assert len(counts.waits) <= WAITS['prediction'], counts.waits
    assert all(sample.pred_instances.scores.is_cuda for sample in found)


def test_validation_waits_no_more_for_its_losses(
    device: VirtualDevice, text_dir: str, small_base: str
) -> None:
    model = trained(device, text_dir, small_base, 'decoder')
    model.model.eval()
    for _ in range(2):
        data = dict(
            inputs=[torch.zeros(3, SIZE, SIZE, dtype=torch.uint8) for _ in range(2)],
            data_samples=data_samples(NAMES, (3, 2), size=SIZE),
        )
        with device.watch() as counts:
            *found, losses = model.model.val_step(data)
    # what comes from the loader is the loader's: pinned there, it is no wait
    in_model = [wait for wait in counts.waits if 'data_preprocessor.py' not in wait.stack]
    assert len(found) == 2 and losses.loss
    assert len(in_model) <= WAITS['validation'], in_model


def test_adapters_are_merged_and_switched_where_they_lie(
    device: VirtualDevice, text_dir: str, small_base: str
) -> None:
    model = trained(device, text_dir, small_base, 'all').model
    for _ in range(2):  # the base's values come there first
        with device.watch() as counts:
            model.set_adapter(None)
            model.set_adapter()
    assert counts.waits == []
    weights = merged_weights(model, 0.5)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# Mistakes planted into a step, and what is seen of each.


def test_bfloat16_in_mmcvs_kernel_ends_the_step(
    device: VirtualDevice, text_dir: str, small_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deformable, '_exact', lambda *given: [t.contiguous() for t in given])
    model = trained(device, text_dir, small_base, 'decoder', 'bfloat16')
    with pytest.raises(NotImplementedError, match="not implemented for 'bfloat16'"):
        second_step(model)


def test_a_mask_made_on_the_host_ends_the_step(
    device: VirtualDevice, text_dir: str, small_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = DenoisingQueryGenerator.generate_dn_mask
    monkeypatch.setattr(
        DenoisingQueryGenerator,
        'generate_dn_mask',
        lambda self, widest, groups, device: make(self, widest, groups, torch.device('cpu')),
    )
    with pytest.raises(DeviceError, match='same device'):
        second_step(trained(device, text_dir, small_base, 'decoder'))


def test_reading_the_costs_too_early_ends_the_step(
    device: VirtualDevice, text_dir: str, small_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hasty:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(host.torch.cuda, 'current_stream', lambda device: Hasty())
    with pytest.raises(DeviceError, match='before the download has ended'):
        second_step(trained(device, text_dir, small_base, 'decoder'))


def blocking(data: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """An upload that waits."""
    return torch.as_tensor(data).to(device)


def test_waits_planted_into_a_step_are_told_with_their_lines(
    device: VirtualDevice, text_dir: str, small_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GroundingDINOCriterion.forward

    def reporting(self: nn.Module, *args: Any) -> dict[str, Tensor]:
        losses = forward(self, *args)
        assert losses['loss_ce'].item() > 0
        return losses

    monkeypatch.setattr(head, 'to_device', blocking)
    monkeypatch.setattr(GroundingDINOCriterion, 'forward', reporting)
    waits = second_step(trained(device, text_dir, small_base, 'decoder')).forward.waits
    for kind, name in (('blocking upload', 'blocking'), ('_local_scalar_dense', 'reporting')):
        planted = [w for w in waits if w.kind == kind and f' {name} <' in w.stack]
        assert planted, waits
        waits = [wait for wait in waits if wait not in planted]
    assert len(waits) <= WAITS['forward'], waits


def test_an_upload_in_the_backward_pass_is_told(
    device: VirtualDevice, text_dir: str, small_base: str
) -> None:
    model = trained(device, text_dir, small_base, 'decoder')
    parameter = model.parameters[0]
    parameter.register_hook(lambda grad: grad * torch.ones(grad.shape).to(grad.device))
    assert [wait.kind for wait in second_step(model).backward.waits] == ['blocking upload']
