"""Time and memory of a whole training step, against mmdet's and transformers' models.

    python tools/benchmarks/step.py [--device cpu|cuda] [--only ours] [--rounds 5]
    python tools/benchmarks/step.py --grow [--rounds 3]

The contenders live in one process, share their frozen weights, get the same images, class names and
boxes, and take turns; the median of the rounds counts. On the CPU Swin-T, 6 + 6 layers, 900 queries
and mmdet's denoising queries run on 320 x 320 pixels, batch 2, COCO's 80 names in the caption; on
CUDA on 800 x 1333, batch 4, in bfloat16 autocast. Weights are random.

Columns: seconds of the step and of its parts ("rest" is query selection and targets; transformers'
loss is part of its criterion); bytes of the tensors that autograd keeps for the backward pass, each
storage once and parameters left out; on the CPU the growth of the resident set at its peak, on CUDA
the allocator's peak, the kernels that a step launches and the times that the host waits for the
device. On CUDA the step is timed whole, with no wait between its parts, and its parts in a step of
their own. All contenders there sample with the same deformable attention: mmcv's kernel where mmcv
has it.

mmdet checkpoints its encoder with fairscale's help; without that package its contender is left out.

``--grow`` measures the adapters' step as images, class names and boxes grow.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contenders as cs
import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mmdet_gdino_lora  # noqa: F401

MODULES = ('text', 'image', 'encoder', 'decoder', 'criterion')
PARTS = ('data', *MODULES, 'rest', 'backward', 'optimizer')


class Watch:
    """Seconds by part of the step."""

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock
        self.by_part = True
        self.spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self.by_part:
            yield
            return
        begin = self._now()
        yield
        self.spent[part] += self._now() - begin

    def _now(self) -> float:
        if self.device == 'cuda':
            torch.cuda.synchronize()
        return self.clock()

    def whole(self, run: Callable[[], object]) -> float:
        """Seconds of ``run``, without a look at its parts."""
        self.by_part = False
        begin = self._now()
        run()
        spent = self._now() - begin
        self.by_part = True
        return spent

    def follow(self, contender: cs.Contender) -> None:
        """Times the contender's parts whenever they are called from now on."""
        for part, methods in contender.parts.items():
            for owner, name in methods:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return method(*args, **kwargs)

        return timed


class Kept:
    """Bytes of the storages that autograd keeps, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.storages: dict[int, int] = {}

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def megabytes(self) -> float:
        """All storages together."""
        return sum(self.storages.values()) / 1e6


class Peak:
    """Memory at its peak, above what was there before: CUDA's allocator or the resident set."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back to the system
            Path('/proc/self/clear_refs').write_text('5')  # sets the peak to what is there now
            self.before = self._resident('VmRSS')
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device == 'cuda':
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = self._resident('VmHWM')
        self.megabytes = (peak - self.before) / 1e6

    @staticmethod
    def _resident(key: str) -> int:
        status = Path('/proc/self/status').read_text()
        return int(re.search(rf'{key}:\s*(\d+) kB', status).group(1)) * 1024


@contextlib.contextmanager
def precision(device: str) -> Iterator[None]:
    """On CUDA bfloat16 autocast, and the same sampling for all; nothing on the CPU."""
    if device != 'cuda':
        yield
        return
    with torch.autocast('cuda', torch.bfloat16), cs.same_sampling():
        yield


def step(contender: cs.Contender, samples: list[dict], watch: Watch) -> float:
    """One training step; returns the loss."""
    with watch('data'):
        inputs = contender.data(samples)
    with watch('forward'), precision(watch.device):
        loss = contender.loss(inputs)
    with watch('backward'):
        loss.backward()
    with watch('optimizer'):
        torch.nn.utils.clip_grad_norm_(contender.trained, 0.1)
        contender.optimizer.step()
        contender.optimizer.zero_grad()
    return float(loss)


def host_waits(contender: cs.Contender, samples: list[dict], watch: Watch) -> int:
    """How many times the host waits for the device in one step, uploads included."""
    watch.by_part = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        with precision('cuda'):
            loss = contender.loss(contender.data(samples))
        loss.backward()
        torch.cuda.set_sync_debug_mode('default')
    watch.by_part = True
    contender.optimizer.zero_grad()
    return sum('synchronizing' in str(warning.message) for warning in caught)


def launches(contender: cs.Contender, samples: list[dict], watch: Watch) -> int:
    """How many kernels one step launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        watch.whole(lambda: step(contender, samples, watch))
    return sum(event.count for event in record.key_averages() if 'LaunchKernel' in event.key)


def measure(
    contenders: Sequence[cs.Contender], scale: cs.Scale, rounds: int, clock: Callable[[], float]
) -> list[dict[str, float]]:
    """Medians over the rounds, in which the contenders take turns after one step to warm up."""
    watches = [Watch(scale.device, clock) for _ in contenders]
    spent: list[list[dict[str, float]]] = [[] for _ in contenders]
    rows: list[dict[str, float]] = [{} for _ in contenders]
    for contender, watch, row in zip(contenders, watches, rows):
        watch.follow(contender)
        with Kept(contender.model) as kept:
            step(contender, scale.batch_of(0), watch)
        with Peak(scale.device) as peak:
            step(contender, scale.batch_of(0), watch)
        row.update(kept=kept.megabytes, peak=peak.megabytes)
        if scale.device == 'cuda':
            row['launches'] = launches(contender, scale.batch_of(0), watch)
            row['waits'] = host_waits(contender, scale.batch_of(0), watch)
    for turn in range(rounds):
        for number, (contender, watch) in enumerate(zip(contenders, watches)):
            samples = scale.batch_of(turn + 1)
            watch.spent.clear()
            step(contender, samples, watch)
            times = dict(watch.spent)
            forward = times.pop('forward')
            inside = sum(times.get(part, 0.0) for part in MODULES)
            times['rest'] = forward - inside
            times['step'] = sum(times.values())
            if scale.device == 'cuda':
                times['step'] = watch.whole(functools.partial(step, contender, samples, watch))
            spent[number].append(times)
            print(f'round {turn + 1}: {contender.name}: {times["step"]:.2f} s', file=sys.stderr)
    for row, times in zip(rows, spent):
        for part in ('step', *PARTS):
            row[part] = statistics.median(t.get(part, 0.0) for t in times)
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ['---', *['--:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def build(folder: str, scale: cs.Scale, only: str) -> list[cs.Contender]:
    """All contenders whose name contains ``only`` and whose packages are installed."""

    @functools.cache
    def adapted() -> cs.Contender:
        return cs.ours(folder, scale, 'decoder')

    makers: dict[str, Callable[[], cs.Contender]] = {
        'mmdet, full': lambda: cs.stock(folder, scale, False),
        'mmdet, full, checkpointing': lambda: cs.stock(folder, scale, True),
        'mmdet + PEFT, decoder': lambda: cs.stock_with_peft(folder, scale, adapted()),
        'transformers + PEFT, decoder': lambda: cs.transformers_with_peft(folder, scale),
        'ours, decoder': adapted,
        'ours, decoder, retain': lambda: cs.ours_retaining(folder, scale, 'decoder', adapted()),
        'ours, encoder': lambda: cs.ours(folder, scale, 'encoder'),
        'ours, all': lambda: cs.ours(folder, scale, 'all'),
        'ours, all, checkpointing': lambda: cs.ours(folder, scale, 'all', True),
    }
    names = [name for name in makers if re.search(only, name)]
    needing = 'mmdet, full, checkpointing'
    if needing in names and importlib.util.find_spec('fairscale') is None:
        names.remove(needing)
        print(f'left out: {needing} (pip install fairscale)', file=sys.stderr)
    if not names:
        sys.exit(f'error: --only {only!r} leaves none of the contenders: {"; ".join(makers)}')
    chosen = [makers[name]() for name in names]
    cs.share_frozen(chosen)
    return chosen


def compare(folder: str, scale: cs.Scale, args: argparse.Namespace) -> None:
    """The table of all contenders."""
    contenders = build(folder, scale, args.only)
    rows = measure(contenders, scale, args.rounds, args.clock)
    on_cuda = ['launches', 'host waits'] if scale.device == 'cuda' else []
    head = ['contender', 'trained (M)', 'step (s)', *PARTS, 'kept (MB)', 'peak (MB)', *on_cuda]
    body = []
    for contender, row in zip(contenders, rows):
        trained = sum(p.numel() for p in contender.trained) / 1e6
        times = [f'{row[part]:.3f}' for part in ('step', *PARTS)]
        sizes = [f'{row[key]:.0f}' for key in ('kept', 'peak', 'launches', 'waits') if key in row]
        body.append([contender.name, f'{trained:.1f}', *times, *sizes])
    print(table(head, body))


def grow(folder: str, args: argparse.Namespace) -> None:
    """The adapters' step as images, names and boxes grow."""
    rows = []
    for key, values in (
        ('image', [(256, 256), (320, 320), (448, 448), (640, 640)]),
        ('classes', [20, 80, 1203]),
        ('boxes', [2, 20, 100]),
    ):
        for value in values:
            scale = cs.Scale(**{key: value, 'device': args.device})
            contenders = [cs.ours(folder, scale, 'decoder')]
            if scale.classes <= 80:  # more don't fit into mmdet's caption
                contenders.append(cs.stock_with_peft(folder, scale, contenders[0]))
                cs.share_frozen(contenders)
            measured = measure(contenders, scale, args.rounds, args.clock)
            shown = value if isinstance(value, int) else ' x '.join(map(str, value))
            cells = [f'{row["step"]:.2f} / {row["kept"]:.0f}' for row in measured]
            rows.append([key, str(shown), *cells, *['-'] * (2 - len(cells))])
            print(rows[-1], file=sys.stderr)
    head = ['grows', 'to', 'ours, decoder (s / MB kept)', 'mmdet + PEFT, decoder']
    print(table(head, rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--only', default='', help='contenders whose name matches this expression')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--grow', action='store_true')
    parser.add_argument(
        '--cpu-time',
        dest='clock',
        action='store_const',
        const=time.process_time,
        default=time.perf_counter,
        help="the process's own seconds, for a machine that has other work",
    )
    args = parser.parse_args()
    init_default_scope('mmdet')
    MMLogger.get_instance('step', log_level='ERROR')
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as folder:
        cs.text_model(folder)
        if args.grow:
            grow(folder, args)
            return
        real = dict(image=(800, 1333), batch=4, boxes=20)
        scale = cs.Scale(device=args.device, **(real if args.device == 'cuda' else {}))
        compare(folder, scale, args)


if __name__ == '__main__':
    main()
