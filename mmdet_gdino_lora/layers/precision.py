"""In what precision a detector computes: its weights', and mixed with it what a GPU is good at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Optional

import torch
from mmengine.logging import MMLogger
from torch import nn

from mmdet_gdino_lora.errors import ConfigError

DTYPES = {'float32': None, 'bfloat16': torch.bfloat16}


def base_dtype(name: str) -> Optional[torch.dtype]:
    """Find the type that frozen weights are kept in.

    Args:
        name: ``'float32'`` or ``'bfloat16'``.

    Returns:
        None for float32: nothing to change.

    Raises:
        ConfigError: For any other name. float16 is none of them: published bases hold weights that
            fall below its smallest number.
    """
    if name not in DTYPES:
        raise ConfigError(f'model.base_dtype={name!r} is not one of {", ".join(DTYPES)}.')
    return DTYPES[name]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of a model in another type; what trains and all norms stay.

    The model has to run under autocast from then on, see :func:`autocast`.

    Args:
        model: With its trainable parameters known.
        dtype: For the frozen weights of linear, convolution, embedding and attention layers.
    """
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
    for module in model.modules():
        if isinstance(module, kinds):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


class Precision:
    """What a detector trains and predicts in.

    Args:
        setting: ``'auto'`` trains with float32 weights in bfloat16 mixed precision on a GPU that
            computes in it, and lets it round the factors of other float32 products to TF32;
            ``'float32'`` does neither.
        base: ``'float32'`` or ``'bfloat16'``, of the frozen weights.

    Attributes:
        base: The type of the frozen weights where it isn't float32; predictions run in it too.

    Raises:
        ConfigError: For other names.
    """

    def __init__(self, setting: str, base: str) -> None:
        if setting not in ('auto', 'float32'):
            raise ConfigError(f'model.precision={setting!r} is not one of auto, float32.')
        self.base = base_dtype(base)
        self._auto = setting == 'auto'
        self._prepared = False

    def training(self, device: torch.device) -> AbstractContextManager[None]:
        """Within, the model trains in its precision, unless the runner has set its own.

        Args:
            device: Of the model.
        """
        if device.type == 'cuda' and not self._prepared:
            self._prepared = True
            _prepare_gpu(device, self._auto)
        return autocast(device, self.base or self.mixed(device))

    def predicting(self, device: torch.device) -> AbstractContextManager[None]:
        """Within, the model predicts in the precision of its weights.

        Args:
            device: Of the model.
        """
        return autocast(device, self.base)

    def mixed(self, device: torch.device) -> Optional[torch.dtype]:
        """Find the type that training mixes with float32 weights.

        Args:
            device: Of the model.

        Returns:
            bfloat16 where it is asked for and the device has it; None: float32 alone.
        """
        if not self._auto or device.type != 'cuda':
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None


def _prepare_gpu(device: torch.device, auto: bool) -> None:
    # cuDNN's attention makes a plan for every new shape, and ours differ from step to step in the
    # boxes, the tokens and the images' sizes; torch's other kernels make none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # TF32 came with the generation of GPUs that also has bfloat16.
    if auto and torch.cuda.get_device_capability(device) >= (8, 0):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        MMLogger.get_current_instance().info(
            'Training runs in bfloat16 mixed precision (where the optimizer wrapper does not ask '
            'for another), and float32 products in TF32; model.precision=float32 switches both off.'
        )


@contextmanager
def autocast(device: torch.device, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """Mix precisions for a model with cast weights, unless the runner has set its own.

    Args:
        device: Of the model.
        dtype: Of the frozen weights; None does nothing.
    """
    if dtype is None or torch.is_autocast_enabled(device.type):
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield


def as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Take a weight of one half type to the other where that one is autocast's.

    torch joins tensors of different types under autocast, but not of two half types: frozen
    weights in bfloat16 meet float16 wherever a run has mmdet's ``--amp``.

    Args:
        tensor: Of any type.

    Returns:
        Itself; in autocast's type if it is in half precision and autocast is on.
    """
    kind = tensor.device.type
    if tensor.dtype not in (torch.bfloat16, torch.float16) or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
