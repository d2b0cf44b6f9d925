"""What an operation costs the device itself: bytes read and written, or products of matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

#: Their time is that of products of matrices, or of a kernel of its own; by how names begin.
COMPUTING = (
    'addmm',
    'baddbmm',
    'bmm',
    'convolution',
    'mm',
    'ms_deform_attn',
    'scaled_dot_product_attention',
)

#: What lies in their first argument is overwritten unread.
WRITING = {'copy_', 'fill_', 'zero_', 'bernoulli_', '_foreach_copy_', '_foreach_zero_'}

#: They read as many numbers of their first argument as they write.
PICKING = {'embedding', 'gather', 'index', 'index_select'}

#: They change as many numbers of their first argument as they are given.
PUTTING = {'index_add_', 'index_put_', '_index_put_impl_', 'scatter_', 'scatter_add_'}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors' numbers: each tensor once, and once what is expanded."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        count = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride()):
            count *= length if stride or not length else 1
        total += count
    return total


def moved(function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operation reads and writes, where that is what it takes its time for.

    Args:
        function: ATen's overload; no view.
        args: Of the call.
        kwargs: The same.
        result: Of the call.

    Returns:
        Zero for what computes much of each number.
    """
    name = function._schema.name.split('::')[1]
    if name.startswith(COMPUTING):
        return 0
    read: list[Tensor] = []
    written: list[Tensor] = []
    changed = False
    for number, argument in enumerate(function._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        given = list(tensors_in(value))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += given
            changed = changed or bool(given)
        if not writes or not (argument.is_out or name in WRITING):
            read += given
    if not changed:
        written = list(tensors_in(result))
    if name.endswith('_like') or name.startswith('new_'):
        return size(written)
    if name in PICKING:
        return 2 * size(written) + size(read[1:])
    if name in PUTTING:
        return size(read[1:]) + 2 * size(read[-1:])
    return size(read) + size(written)


def multiplied(function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Floating point operations of a product of matrices or a convolution, as torch counts them.

    Args:
        function: ATen's overload.
        args: Of the call.
        kwargs: The same.
        result: Of the call.
    """
    packet = function._overloadpacket
    if packet not in flop_registry:
        name = function._schema.name.split('::')[1].rstrip('_')
        packet = {p.__name__: p for p in flop_registry}.get(name)
    return 0 if packet is None else int(flop_registry[packet](*args, **kwargs, out_val=result))
