"""A training step at real size, of which only shapes exist: what it reads and writes on a GPU.

MM Grounding DINO with Swin-T, 6 + 6 layers and 900 queries, BERT-base and its vocabulary, four
images of 800 x 1333 with 20 boxes each, COCO's 80 names, denoising. The step that is counted is the
second one: in the first, names and frozen weights become what is remembered of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmdet_gdino_lora.layers import denoising, levels, proposals, sine, swin
from mmdet_gdino_lora.objective import matches
from tests.virtual_device.device import ShapedKernels, VirtualDevice
from tests.virtual_device.memory import Place, place_of, put
from tests.virtual_device.sites import ROOT
from tests.virtual_device.steps import Step, Trained

IMAGE, BATCH, BOXES = (800, 1333), 4, 20
REMEMBERING = (denoising, levels, proposals, sine, swin)


def made_up(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Stands in for ``to_host``: two tokens for every target, all is finite, costs are random."""
    rng = np.random.default_rng(0)
    arrays = {name: np.ones(tuple(t.shape), np.float32) for name, t in tensors.items()}
    for name, array in arrays.items():
        if name == 'spans':
            array[:, 2:] = 0
        elif name.endswith('costs'):
            array[:] = rng.random(array.shape)
    return arrays


_device = FakeTensor.device


def _says(tensor: FakeTensor) -> torch.device:
    """The virtual device's answer to who may ask; fake tensors' own insides are told the truth."""
    if torch._C._is_torch_function_mode_enabled():
        return place_of(tensor).device
    return _device.__get__(tensor)


@contextmanager
def shapes_alone() -> Iterator[VirtualDevice]:
    """A virtual device whose tensors have shapes and no numbers."""
    device = VirtualDevice()
    device.kernels = ShapedKernels(device.operations)
    try:
        with (
            mock.patch.object(matches, 'to_host', made_up),
            mock.patch.object(FakeTensor, 'device', property(_says)),
            FakeTensorMode(allow_non_fake_inputs=True),
            device,
        ):
            yield device
    finally:
        for module in REMEMBERING:  # it would give tensors without numbers to others
            for function in vars(module).values():
                getattr(function, 'cache_clear', lambda: None)()


def emptied(model: nn.Module) -> nn.Module:
    """Exchanges a model's weights for shapes on the device, one for all that share it."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    shape = torch.empty_like(tensor, device='cuda')
                    if isinstance(tensor, nn.Parameter):
                        shape = nn.Parameter(shape, tensor.requires_grad)
                        put(shape, Place.DEVICE)
                    known[id(tensor)] = shape
                kept[name] = known[id(tensor)]
    return model


class Kept:
    """Storages that autograd keeps for the backward pass, each once, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        weights = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in weights}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Notes a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(storage.nbytes() for storage in self.storages.values())


def counted_at_real_size(
    folder: str, way: str, amp: str = '', retain: bool = False
) -> tuple[Step, int]:
    """Counts a detector's second step, and the bytes that it keeps for the backward pass.

    Args:
        folder: An empty one, for the text model's files.
        way: A preset, or ``'full'`` for full fine-tuning.
        amp: Type of autocast; '' for none.
        retain: Whether there is a lesson in the step.
    """
    sys.path.insert(0, str(ROOT / 'tools' / 'benchmarks'))
    import contenders as cs

    cs.text_model(folder)
    here = cs.Scale(image=IMAGE, batch=BATCH, boxes=BOXES)
    if retain:
        like = cs.ours(folder, here, way)
        contender = cs.ours_retaining(folder, here, way, like)
    else:
        contender = cs.ours(folder, here, None if way == 'full' else way)
    batches = [contender.data(here.batch_of(seed)) for seed in range(2)]
    with shapes_alone() as device:
        trained = Trained(device, emptied(contender.model), amp)
        for batch in batches:
            images = torch.empty_like(batch['inputs'], device='cuda')
            samples = [sample.to('cuda') for sample in batch['data_samples']]
            kept = Kept(trained.model)
            with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
                step = trained.step(images, samples)
        return step, kept.bytes
