"""Does this package work on the versions installed here? Runs what its users run, in a short form.

    make stack-lowest PYTHON=python3.10
    make stack-highest PYTHON=python3.12

Trains adapters on a few drawn images with validation and checkpoints, resumes, tests, merges,
exports, and predicts with what was exported; then trains with DoRA, PiSSA and their like. Every
command is one of tools/, in a process of its own; the first that fails ends the check with its
output. The last line names the versions that it ran on.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CONFIG = """\
_base_ = '{base}'
data_root = '{root}/'
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/new_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook'), logger=dict(interval=1))
custom_hooks = [dict(type='ResumableSeedHook')]
"""
#: Linear layers alone: PEFT has DoRA for no attention module and PiSSA for no convolution.
LINEAR = ['model.lora.preset=neck_and_heads', 'model.lora.exclude_modules=[conv]']
#: What PEFT computes from the base's weights, and other settings with code of their own in PEFT.
VARIANTS = {
    'DoRA': 'model.lora.use_dora=True',
    'PiSSA': 'model.lora.init_lora_weights=pissa_niter_4',
    'OLoRA': 'model.lora.init_lora_weights=olora',
    'rank-stabilised LoRA': 'model.lora.use_rslora=True',
}


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix='stack_') as folder:
        check(Path(folder))
    print(f'works on {versions()}')


def check(folder: Path) -> None:
    """Runs all commands.

    Args:
        folder: For data, config and results.
    """
    config = str(write_config(folder))
    run, resumed = folder / 'run', ['train_cfg.max_epochs=2']
    tool('train with validation', 'train.py', config, '--work-dir', run)
    tool('resume', 'train.py', config, '--work-dir', run, '--resume', '--cfg-options', *resumed)
    checkpoint = run / 'epoch_2.pth'
    tool('test', 'test.py', config, checkpoint, '--work-dir', folder / 'tested')
    same('the test of a checkpoint', precision(folder / 'tested'), precision(run))
    merged, plain = folder / 'merged.pth', ['model.lora=None', 'model.retain=None']
    tool('merge', 'merge_adapter.py', config, checkpoint, merged)
    tool(
        'test the merged', 'test.py', config, merged, '--work-dir', folder / 'plain',
        '--cfg-options', *plain,
    )  # fmt: skip
    same('the test of the merged checkpoint', precision(folder / 'plain'), precision(run))
    tool('export', 'export_adapter.py', config, checkpoint, folder / 'adapter')
    image = next((folder / 'shapes' / 'new_val').iterdir())
    tool(
        'predict with two adapters', 'image_demo.py', config, checkpoint, image,
        '--texts', 'purple star . cyan bar', '--out', folder / 'found.jpg',
        '--adapter', 'default=0.5', f'{folder / "adapter"}/=0.5',
    )  # fmt: skip
    for name, option in VARIANTS.items():
        work = ['--work-dir', folder / name.replace(' ', '_')]
        tool(f'train {name}', 'train.py', config, *work, '--cfg-options', *LINEAR, option)


def write_config(folder: Path) -> Path:
    """Draws 8 training and 4 validation images, and writes a config that trains on them.

    Args:
        folder: To write to.

    Returns:
        The config file.
    """
    sys.path.insert(0, str(TOOLS.parent))
    from mmdet_gdino_lora.datasets.shapes import NEW_CLASSES, Split, write_shapes

    splits = dict(new_train=Split(NEW_CLASSES, 8), new_val=Split(NEW_CLASSES, 4))
    root = write_shapes(folder / 'shapes', splits=splits)
    config = folder / 'shapes.py'
    base = TOOLS.parent / 'configs' / 'gdino_lora_shapes.py'
    config.write_text(CONFIG.format(base=base, root=root), encoding='utf-8')
    return config


def tool(title: str, script: str, *arguments: object) -> None:
    """Runs one of tools/ and prints how long it took.

    Args:
        title: What it does, for the screen.
        script: Its file.
        *arguments: Its command line.

    Raises:
        SystemExit: It failed; its output comes first.
    """
    begin = time.time()
    print(f'{title:30s} ', end='', flush=True)
    done = subprocess.run(
        [sys.executable, str(TOOLS / script), *map(str, arguments)],
        env=dict(os.environ, HF_HUB_OFFLINE='1'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f'{"failed" if done.returncode else "passed"} {time.time() - begin:5.0f} s', flush=True)
    if done.returncode:
        print('\n'.join(done.stdout.splitlines()[-40:]))
        sys.exit(f'error: {script} fails on {versions()}')


def precision(work_dir: Path) -> float:
    """AP50 of the last validation or test.

    Args:
        work_dir: Of the run.

    Returns:
        In 0..1.
    """
    logs = sorted(work_dir.glob('*/*.log'))
    return float(re.findall(r'bbox_mAP_50: (\S+)', logs[-1].read_text(encoding='utf-8'))[-1])


def same(what: str, found: float, wanted: float) -> None:
    """Compares a test with the validation that training ended with.

    Args:
        what: The test.
        found: Its AP50.
        wanted: The validation's.

    Raises:
        SystemExit: They differ, or are nought and tell nothing.
    """
    if not wanted or abs(found - wanted) > 2e-3:
        sys.exit(f'error: {what} has AP50 {found}, training ended with {wanted}, on {versions()}')


def versions() -> str:
    """Python and the packages that the ranges speak of."""
    packages = ('torch', 'mmcv', 'mmengine', 'mmdet', 'transformers', 'peft', 'numpy', 'scipy')
    found = [f'{package} {metadata.version(package)}' for package in packages]
    return ', '.join([f'Python {platform.python_version()}', *found])


if __name__ == '__main__':
    main()
