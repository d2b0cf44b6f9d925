"""On a GPU: the CPU's numbers in every precision, and no wait but the matching's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from tests.builders import WORDS, build, data_samples
from tests.detectors import SETTINGS, ready_for_devices
from tests.run_small import config

if not torch.cuda.is_available():
    pytest.skip('needs a GPU, and GPU_TESTS=1', allow_module_level=True)

SIZE = 96
PRECISIONS = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Products in float32 are what they say; matching is as sure as on the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def detector(text_dir: str, base: str, settings: str, **more: Any) -> nn.Module:
    """Its adapters change what it does, and nothing is dropped: devices draw other numbers."""
    made = build(text_dir, base_checkpoint=base, **SETTINGS[settings], **more)
    made.init_weights()
    return ready_for_devices(made)


def batch(device: str, boxes: tuple[int, ...] = (3, 2)) -> tuple[Tensor, list]:
    """Images and their samples."""
    torch.manual_seed(1)
    images = torch.randn(len(boxes), 3, SIZE, SIZE)
    samples = data_samples(WORDS[:4], boxes, size=SIZE)
    return images.to(device), [sample.to(device) for sample in samples]


def step(model: nn.Module, device: str, dtype: torch.dtype | None = None, **given: Any) -> Tensor:
    """A training step as far as the gradients; returns the loss."""
    model.train()
    images, samples = batch(device, **given)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        losses = model.loss(images, samples)
    total = sum(value for name, value in losses.items() if 'loss' in name)
    total.backward()
    return total.detach()


@contextmanager
def waits() -> Iterator[list[str]]:
    """Lists where the host waits for the device."""
    places: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode('default')
    said = [w for w in caught if 'synchroniz' in str(w.message)]
    places += [f'{w.filename}:{w.lineno}' for w in said]


@pytest.mark.parametrize('settings', SETTINGS)
def test_losses_and_gradients_are_the_cpus(text_dir: str, base: str, settings: str) -> None:
    on_cpu = detector(text_dir, base, settings, dn_cfg=None)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    tolerance = 0.1 if settings == 'half base' else 1e-3
    expected, got = step(on_cpu, 'cpu'), step(on_gpu, 'cuda')
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=0)
    gradients = {n: p.grad for n, p in on_cpu.named_parameters() if p.grad is not None}
    assert gradients
    for name, parameter in on_gpu.named_parameters():
        assert (parameter.grad is not None) == (name in gradients), name
        if name in gradients and settings != 'half base':  # which rounds as it likes
            error = (parameter.grad.cpu() - gradients[name]).abs().max()
            assert error <= 10 * tolerance * gradients[name].abs().max() + 1e-5, name


@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
@pytest.mark.parametrize('settings', SETTINGS)
def test_mixed_precision_comes_near_it(
    text_dir: str, base: str, settings: str, precision: str
) -> None:
    exact = detector(text_dir, base, settings, dn_cfg=None).cuda()
    mixed = copy.deepcopy(exact)
    expected, got = step(exact, 'cuda'), step(mixed, 'cuda', PRECISIONS[precision])
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0)
    for name, parameter in mixed.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('settings', SETTINGS)
def test_a_training_step_waits_for_the_matching_alone(
    text_dir: str, base: str, settings: str, precision: str
) -> None:
    model = detector(text_dir, base, settings).cuda().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _ in range(2):  # the first remembers sizes and names
        images, samples = batch('cuda')
        dtype = PRECISIONS[precision]
        with waits() as forward, torch.autocast('cuda', dtype=dtype, enabled=dtype is not None):
            losses = model.loss(images, samples)
        with waits() as backward:
            sum(value for name, value in losses.items() if 'loss' in name).backward()
            nn.utils.clip_grad_norm_(trained, 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert len(forward) <= 1 and backward == [], (forward, backward)


@pytest.mark.parametrize('boxes', [(0, 0), (0, 3), (40, 1)])
def test_images_with_no_and_with_many_boxes(
    text_dir: str, base: str, boxes: tuple[int, ...]
) -> None:
    model = detector(text_dir, base, 'decoder').cuda()
    assert torch.isfinite(step(model, 'cuda', boxes=boxes))


@pytest.mark.parametrize('settings', ['decoder', 'all'])
def test_what_it_detects_is_what_the_cpu_detects(text_dir: str, base: str, settings: str) -> None:
    on_cpu = detector(text_dir, base, settings).eval()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    with torch.no_grad():
        expected, got = on_cpu.predict(*batch('cpu')), on_gpu.predict(*batch('cuda'))
    for theirs, ours in zip(expected, got):
        theirs, ours = theirs.pred_instances, ours.pred_instances.cpu()
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.bboxes[:5], theirs.bboxes[:5], rtol=1e-3, atol=0.1)


def test_prediction_waits_three_times_a_batch_at_most(text_dir: str, base: str) -> None:
    model = detector(text_dir, base, 'decoder').cuda().eval()
    with torch.no_grad():
        model.predict(*batch('cuda'))
        given = batch('cuda')
        with waits() as places:
            model.predict(*given)
    assert len(places) <= 3, places


@pytest.mark.parametrize('amp', [None, 'float16', 'bfloat16'])
def test_a_run_trains_validates_and_resumes(
    text_dir: str, base: str, tmp_path: Path, amp: str | None
) -> None:
    def trained(resume: bool) -> Runner:
        scores = [0.1, 0.2] if not resume else [0.3]
        cfg = config(
            str(tmp_path),
            text_dir,
            base,
            by_epoch=True,
            epochs=3 if resume else 2,
            scores=scores,
            resume=resume,
            retain=dict(names=['bird', 'car'], every=2),
        )
        if amp:
            cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=amp)
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner

    assert next(trained(False).model.parameters()).is_cuda
    assert trained(True).epoch == 3
    state = torch.load(tmp_path / 'epoch_3.pth', map_location='cpu', weights_only=False)
    assert all(torch.isfinite(v).all() for v in state['state_dict'].values())
