"""What the host knows reaches the device in few copies, and without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmdet_gdino_lora.layers.denoising import DenoisingQueryGenerator
from mmdet_gdino_lora.layers.levels import _levels, host_shapes, level_tensors
from mmdet_gdino_lora.transfer import to_device
from tests.builders import data_samples

META = torch.device('meta')


class Uploads(TorchFunctionMode):
    """Counts what goes from the host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type != 'cpu':
            made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            moved = func in (Tensor.to, Tensor.cuda) and args[0].device.type == 'cpu'
            self.count += made or moved
        return out


class Cuda(TorchFunctionMode):
    """Notes how tensors go to a GPU, which this machine may lack."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is Tensor.pin_memory:
            self.calls.append('pinned')
            return args[0]
        if func is Tensor.to:
            self.calls.append((args[1], kwargs))
            return args[0]
        return func(*args, **(kwargs or {}))


def feats(*sizes: tuple[int, int], device: torch.device = META) -> list[Tensor]:
    return [torch.empty(2, 8, *size, device=device) for size in sizes]


def test_uploads_to_a_gpu_are_pinned_and_do_not_wait() -> None:
    device = torch.device('cuda', 1)
    with Cuda() as cuda:
        to_device(np.arange(3), device)
        to_device(torch.arange(3), device)
    assert cuda.calls == ['pinned', (device, dict(non_blocking=True))] * 2


def test_arrays_and_tensors_arrive_as_they_are() -> None:
    array = np.array([[1, 2], [3, 4]])
    tensor = to_device(array, torch.device('cpu'))
    assert tensor.dtype == torch.int64 and tensor.tolist() == array.tolist()
    assert to_device(tensor, torch.device('cpu')) is tensor
    assert to_device(array, META).device == META


def test_new_level_sizes_are_one_upload_and_known_ones_none() -> None:
    _levels.cache_clear()
    with Uploads() as uploads:
        shapes, starts = level_tensors(feats((9, 7), (5, 4)))
    assert uploads.count == 1
    assert shapes.shape == (2, 2) and starts.shape == (2,) and shapes.device == META
    assert shapes.is_contiguous() and starts.is_contiguous()
    with Uploads() as uploads:
        again, _ = level_tensors(feats((9, 7), (5, 4)))
    assert uploads.count == 0 and again is shapes
    assert host_shapes(again) == ((9, 7), (5, 4))  # a meta tensor could not be asked


def test_level_tensors_hold_sizes_and_first_positions() -> None:
    shapes, starts = level_tensors(feats((9, 7), (5, 4), (1, 2), device=torch.device('cpu')))
    assert shapes.tolist() == [[9, 7], [5, 4], [1, 2]] and starts.tolist() == [0, 63, 83]
    assert shapes.dtype == starts.dtype == torch.int64


def test_level_tensors_of_a_prediction_serve_training() -> None:
    _levels.cache_clear()
    with torch.inference_mode():
        level_tensors(feats((3, 3), device=torch.device('cpu')))
    shapes, starts = level_tensors(feats((3, 3), device=torch.device('cpu')))
    assert not shapes.is_inference() and not starts.is_inference()


def test_denoising_uploads_do_not_grow_with_the_images() -> None:
    generator = DenoisingQueryGenerator(
        num_classes=5,
        embed_dims=16,
        num_matching_queries=7,
        group_cfg=dict(dynamic=True, num_dn_queries=12),
    ).to(META)
    samples = [sample.to(META) for sample in data_samples('abcde', (3, 1, 2, 2))]
    with Uploads() as uploads:
        queries, *_ = generator(samples)
    assert queries.device == META and uploads.count == 2
