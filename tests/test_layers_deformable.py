"""Deformable attention gives mmcv's kernel what it can compute, in every precision.

No GPU is needed: the compiled functions are stood in for by ones that ask of their arguments what
mmcv's CUDA source asks, and mmcv's own autograd function around them stays.
"""

from __future__ import annotations

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_gdino_lora.layers import deformable
from mmdet_gdino_lora.layers.deformable import sampler
from mmdet_gdino_lora.layers.exchange import exchange_layers
from mmdet_gdino_lora.layers.levels import level_tensors
from mmdet_gdino_lora.layers.precision import cast_frozen
from tests.builders import WORDS, build, data_samples
from tests.launches import Launches
from tests.virtual_device.kernels import Kernels

LEVELS = [torch.zeros(1, 1, *size) for size in ((9, 7), (5, 4), (2, 3), (1, 1))]
POSITIONS = sum(level.numel() for level in LEVELS)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Every deformable attention runs as it does on a GPU; counts its calls."""
    kernels = Kernels()
    monkeypatch.setattr('mmcv.ops.multi_scale_deform_attn.ext_module', kernels)
    monkeypatch.setattr(deformable, 'sampler', lambda *_: sampler('cuda', True))
    return kernels


def layer(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(32, 4, dropout=0.0, batch_first=batch_first)
    nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    nn.init.normal_(layer.attention_weights.weight, std=0.2)
    return exchange_layers(layer)


def outputs(layer: nn.Module, batch: int = 2, boxes: int = 4) -> dict[str, Tensor]:
    """The result and all gradients."""
    torch.manual_seed(1)
    shapes, starts = level_tensors(LEVELS)
    dtype = layer.output_proj.bias.dtype
    query, value = torch.randn(batch, 6, 32).to(dtype), torch.randn(batch, POSITIONS, 32).to(dtype)
    inputs = dict(query=query, value=value)
    if not layer.batch_first:
        inputs = {name: tensor.transpose(0, 1) for name, tensor in inputs.items()}
    for tensor in inputs.values():
        tensor.requires_grad_()
    out = layer(
        **inputs,
        key_padding_mask=torch.rand(batch, POSITIONS) < 0.2,
        reference_points=torch.rand(batch, 6, 4, boxes).to(dtype),
        spatial_shapes=shapes,
        level_start_index=starts,
    )
    (out * torch.randn(out.shape)).sum().backward()
    trained = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    grads = {**trained, **{name: tensor.grad for name, tensor in inputs.items()}}
    return dict(out=out.detach(), **grads)


@pytest.mark.parametrize('boxes', [2, 4])
@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('precision', ['float32', 'float64', 'bfloat16', 'float16', 'half base'])
def test_the_kernel_gives_the_cpus_numbers_and_gradients(
    kernels: Kernels, monkeypatch, precision: str, batch_first: bool, boxes: int
) -> None:
    def run() -> dict[str, Tensor]:
        module = layer(batch_first)
        if precision == 'float64':
            module.double()
        if precision == 'half base':
            module.requires_grad_(False)
            cast_frozen(module, torch.bfloat16)
        dtype = torch.float16 if precision == 'float16' else torch.bfloat16
        with torch.autocast('cpu', dtype=dtype, enabled=precision not in ('float32', 'float64')):
            return outputs(module, boxes=boxes)

    on_gpu = run()
    assert kernels.calls == 2  # forward and backward
    monkeypatch.setattr(deformable, 'sampler', sampler)
    on_cpu = run()
    assert on_gpu.keys() == on_cpu.keys()
    tolerance = {'float32': 1e-4, 'float64': 1e-10}.get(precision, 2e-2)
    for name, expected in on_cpu.items():
        assert torch.isfinite(expected).all()
        error = (on_gpu[name] - expected).abs().max()
        assert error <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('has_ops', [True, False])
def test_half_precision_rounds_no_location(
    kernels: Kernels, dtype: torch.dtype, has_ops: bool
) -> None:
    # Zeros and ones in turn: a location that is off by a tenth of a cell is off by a tenth.
    width = 167
    shapes, starts = level_tensors([torch.zeros(1, 1, 1, width)])
    value = (torch.arange(width) % 2).to(dtype).view(1, width, 1, 1)
    x = torch.rand(1, 400, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    locations = torch.stack((x, torch.full_like(x, 0.5)), dim=-1)
    out = sampler('cuda', has_ops)(value, shapes, starts, locations, torch.ones_like(x))
    assert out.dtype == dtype
    distance = (x.flatten().double() * width - 0.5) % 2
    expected = torch.where(distance > 1, 2 - distance, distance)
    error = (out.flatten().double() - expected).abs().max()
    assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4)


def test_the_kernel_gets_strided_arguments_contiguous(kernels: Kernels) -> None:
    shapes, starts = level_tensors(LEVELS)
    value = torch.randn(POSITIONS, 2, 3, 8).transpose(0, 1)
    locations = torch.rand(3, 6, 2, 4, 5, 2).transpose(0, 2)
    weights = torch.rand(3, 6, 2, 4, 5).transpose(0, 2)
    given = value, shapes, starts, locations, weights
    on_gpu, on_cpu = (sampler(device, True)(*given) for device in ('cuda', 'cpu'))
    assert kernels.calls == 1
    torch.testing.assert_close(on_gpu, on_cpu)


@pytest.mark.parametrize('batch', [1, 3, 65])
def test_any_number_of_images_fits_the_kernels_step(kernels: Kernels, batch: int) -> None:
    outputs(layer(), batch)
    assert kernels.calls == 2


def test_devices_without_a_kernel_take_the_definition() -> None:
    ways = {sampler(*given) for given in [('cpu', True), ('cuda', True), ('cuda', False)]}
    assert len(ways) == 3
    assert sampler('cpu', False) is sampler('cpu', True)
    assert sampler('xpu', True) is sampler('cuda', False)


@pytest.mark.parametrize(
    ('device', 'has_ops', 'told'), [('cuda', False, 1), ('cuda', True, 0), ('cpu', False, 0)]
)
def test_a_gpu_without_kernels_is_told_once_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, device: str, has_ops: bool, told: int
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', warnings.append)
    deformable._tell_what_no_kernel_costs.cache_clear()
    for _ in range(2):
        sampler(device, has_ops)
    assert len(warnings) == told
    assert all('10 operations instead of 2' in warning for warning in warnings)


def test_what_no_kernel_costs_is_what_the_definition_asks_for_and_keeps() -> None:
    sizes = [(100, 167), (50, 84), (25, 42), (13, 21)]  # of an image of 800 x 1333
    positions = sum(height * width for height, width in sizes)
    given = dict(device='meta', requires_grad=True)
    value = torch.empty(1, positions, 8, 32, **given)
    locations = torch.empty(1, positions, 8, 4, 4, 2, **given)
    weights = torch.empty(1, positions, 8, 4, 4, **given)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Launches() as way:
        out = multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)
    with Launches() as back:
        out.backward(torch.empty_like(out))
    assert (way.counts.total(), back.counts.total()) == (10, 17)
    assert round(sum(storage.nbytes() for storage in kept.values()) / 1e9, 2) == 0.42
    inputs = sum(tensor.numel() * 4 for tensor in (value, locations, weights))  # the kernel's
    assert round(inputs / 1e9, 2) == 0.06


@pytest.mark.parametrize('autocast', [None, torch.float16])
def test_a_detector_trains_through_the_kernel(
    text_dir: str, base: str, kernels: Kernels, autocast: torch.dtype | None
) -> None:
    detector = build(
        text_dir,
        lora=dict(preset='all', r=2),
        base_checkpoint=base,
        base_dtype='float32' if autocast else 'bfloat16',
    ).train()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', dtype=autocast, enabled=autocast is not None):
        losses = detector(images, data_samples(WORDS[:4], (3, 1)), mode='loss')
    sum(losses.values()).backward()
    assert kernels.calls == 2 * (2 + 3)  # encoder and decoder layers
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
