"""The host's seconds of a training step whose operations cost nothing, against another checkout's.

    python tools/benchmarks/host.py [--against PATH] [--preset decoder] [--rounds 15]

Tensors are on torch's ``meta`` device: they have shapes and no numbers, and nothing is waited for.
Operations, below autograd, return what they returned in an earlier step of the same shapes: no
shape is reckoned twice. What remains is Python, torch's dispatcher and autograd: the time that a
GPU waits for where it is faster than its host. MM Grounding DINO with Swin-T, 6 + 6 layers, 900
queries and denoising; 2 images, COCO's 80 names, float32 (``meta`` has no autocast). What the host
reads for the matching is made up, the assignments are solved.

To be asked for costs an operation something here too, and a view more than elsewhere: what the step
asks for is asked for once more by itself, and that time is taken off ("without stubs"). On a GPU
launches stand in its place.

Both checkouts live in a process of their own and take turns; the median of the rounds counts, in
seconds of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = Path(__file__).resolve().parents[2]
PARTS = ('forward', 'backward', 'optimizer', 'step', 'stubs', 'operations')


@functools.cache
def made_up(name: str, shape: tuple[int, ...]) -> Any:
    """What the host might read: two tokens for each target, finite numbers, random costs."""
    array = np.ones(shape, np.float32)
    if name == 'spans':
        array[:, 2:] = 0
    elif name.endswith('costs'):
        array[:] = np.random.default_rng(0).random(shape)
    return array


class Kernels:
    """mmcv's extension for tensors without numbers."""

    @staticmethod
    def ms_deform_attn_forward(value: Any, *args: Any, **kwargs: Any) -> Any:
        """The shape of what is sampled."""
        queries = args[2].shape[1]
        return value.new_empty(len(value), queries, value.shape[2] * value.shape[3])

    @staticmethod
    def ms_deform_attn_backward(*args: Any, **kwargs: Any) -> None:
        """Nothing: the gradients are there already."""


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Within, a step on ``meta`` takes a GPU's way through the code."""
    from mmdet_gdino_lora.layers import deformable
    from mmdet_gdino_lora.objective import matches

    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def to_host(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: made_up(name, tuple(t.shape)) for name, t in tensors.items()}

    def attend(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Any:
        keeps = torch.is_grad_enabled()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, float('-inf'))
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]

    with (
        mock.patch.object(matches, 'to_host', to_host),
        mock.patch.object(deformable, 'sampler', lambda *_: deformable._sample_with_kernel),
        mock.patch('mmcv.ops.multi_scale_deform_attn.ext_module', Kernels),
        mock.patch.object(torch.nn.functional, 'scaled_dot_product_attention', attend),
        mock.patch('torch.nn.utils.clip_grad._device_has_foreach_support', lambda *_: True),
        # meta has no autocast, not even one that is switched off
        mock.patch.object(torch, 'is_autocast_enabled', lambda *_: enabled('cpu')),
        mock.patch.object(torch, 'autocast', lambda kind, *a, **k: autocast('cpu', *a, **k)),
    ):
        yield


class Operations(TorchDispatchMode):
    """Notes a step's operations, and answers the next step's with results of the same shapes.

    Attributes:
        calls: Of the noted step: each function with its arguments.
        known: What makes each result again: None where the operation is the host's and runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.known: list[Any] = []
        self.at: int | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard costs 0.2 ms an operation

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.at is None:
            result = function(*args, **kwargs)
            # Others than those given: autograd copies a gradient that somebody else holds.
            self.calls.append((function, *tree_map(_like, (args, kwargs))))
            self.known.append(_made(function, args, kwargs, result))
            return result
        noted, known = self.calls[self.at][0], self.known[self.at]
        self.at += 1
        assert noted is function, f'{function} where the noted step had {noted}'
        return function(*args, **kwargs) if known is None else known(args, kwargs)

    def answered(self) -> Operations:
        """Those of the device, views included."""
        alone = Operations()
        alone.known = [known for known in self.known if known is not None]
        alone.calls = [call for call, known in zip(self.calls, self.known) if known is not None]
        return alone


def _made(function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Callable | None:
    """How to make an operation's result again, views as such; None: it is the host's."""
    given = tree_leaves((result, args, kwargs))
    first = next((value for value in given if isinstance(value, torch.Tensor)), None)
    if first is None or first.device.type != 'meta':
        return None
    schema = function._schema
    aliases = [value.alias_info for value in schema.returns if value.alias_info is not None]
    if any(not alias.is_write for alias in aliases) or schema.name == 'aten::detach':
        return lambda args, kwargs: function(*args, **kwargs)
    if aliases:
        return lambda args, kwargs: kwargs['out'] if 'out' in kwargs else args[0]
    if isinstance(result, torch.Tensor):
        return functools.partial(_another, _kind(result))
    if result is None:
        return lambda args, kwargs: None
    kinds = [_kind(part) if isinstance(part, torch.Tensor) else None for part in result]
    group = type(result)
    return lambda args, kwargs: group(
        None if kind is None else _another(kind, args, kwargs) for kind in kinds
    )


def _like(value: Any) -> Any:
    return _another(_kind(value), (), {}) if isinstance(value, torch.Tensor) else value


def _kind(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _another(kind: tuple, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    shape, stride, dtype, device = kind
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


class Stepper:
    """A detector of this process's checkout that takes steps."""

    def __init__(self, folder: str, preset: str) -> None:
        import contenders as cs

        cs.text_model(folder)
        self.scale = cs.Scale(device='meta')
        # the check reads numbers, and is over after the first steps of a run
        self.contender = cs.ours(folder, self.scale, preset, check_adapters=False)
        self.contender.optimizer = torch.optim.AdamW(self.contender.trained, foreach=True)
        self.operations = Operations()
        for _ in range(2):  # what is remembered of names, sizes and gradients
            self.step()
        self.step(self.operations)
        self.alone = self.operations.answered()

    def step(self, mode: Any = None) -> dict[str, float]:
        """One step; seconds of the process by part."""
        contender, clock = self.contender, time.process_time
        inputs = contender.data(self.scale.batch_of(0))
        with mode or contextlib.nullcontext():
            times = [clock()]
            loss = contender.loss(inputs)
            times.append(clock())
            loss.backward()
            times.append(clock())
            torch.nn.utils.clip_grad_norm_(contender.trained, 0.1, foreach=True)
            contender.optimizer.step()
            contender.optimizer.zero_grad()
            times.append(clock())
        parts = [end - begin for begin, end in zip(times, times[1:])]
        return dict(zip(PARTS, [*parts, times[-1] - times[0]]))

    def measured(self) -> dict[str, float]:
        """A step whose operations are answered, and what the answers take by themselves."""
        self.operations.at = self.alone.at = 0
        row = self.step(self.operations)
        begin = time.process_time()
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), self.alone:
            for function, args, kwargs in self.alone.calls:
                function(*args, **kwargs)
        spent = time.process_time() - begin
        return dict(row, stubs=spent, operations=len(self.alone.calls))


def work(preset: str) -> None:
    """Answers each line with the figures of a step."""
    sys.path.insert(0, str(Path(os.environ['PYTHONPATH'], 'tools', 'benchmarks')))
    import mmengine.registry
    from mmengine.logging import MMLogger

    import mmdet_gdino_lora

    assert Path(mmdet_gdino_lora.__file__).is_relative_to(os.environ['PYTHONPATH'])
    torch.set_num_threads(1)
    mmengine.registry.init_default_scope('mmdet')
    MMLogger.get_instance('host', log_level='ERROR')
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder, without_numbers():
        stepper = Stepper(folder, preset)
        stepper.measured()
        print('ready', file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(stepper.measured()), file=answers, flush=True)


def started(checkout: Path, preset: str) -> subprocess.Popen:
    """A process that works with a checkout."""
    process = subprocess.Popen(
        [sys.executable, __file__, '--work', '--preset', preset],
        env={**os.environ, 'PYTHONPATH': str(checkout), 'PYTHONWARNINGS': 'ignore'},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    return process


def answer(process: subprocess.Popen) -> str:
    """The next line of a process."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f'error: the process of {process.args} has ended')
    return line


def measure(checkouts: list[Path], preset: str, rounds: int) -> list[dict[str, float]]:
    """Medians of each checkout over rounds in which they take turns."""
    processes = [started(checkout, preset) for checkout in checkouts]
    rows: list[list[dict[str, float]]] = [[] for _ in processes]
    try:
        for process in processes:
            answer(process)
        for _ in range(rounds):
            for process, found in zip(processes, rows):
                assert process.stdin is not None
                process.stdin.write('step\n')
                found.append(json.loads(answer(process)))
    finally:
        for process in processes:
            process.communicate()
    return [
        {part: statistics.median(row[part] for row in found) for part in PARTS} for found in rows
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--against', type=Path, help='another checkout of this project')
    parser.add_argument('--preset', default='decoder')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        warnings.filterwarnings('ignore')
        work(args.preset)
        return
    checkouts = [HERE] + ([args.against.resolve()] if args.against else [])
    rows = measure(checkouts, args.preset, args.rounds)
    for checkout, row in zip(checkouts, rows):
        row['without stubs'] = row['step'] - row['stubs']
        shown = [f'{key} {row[key] * 1e3:.1f}' for key in (*PARTS[:-1], 'without stubs')]
        print(f'{checkout}: ms: {", ".join(shown)}; operations {row["operations"]:.0f}')
    if args.against:
        for key in ('step', 'without stubs'):
            print(f'{key}: {rows[0][key] / rows[1][key]:.2f} of what it was')


if __name__ == '__main__':
    main()
