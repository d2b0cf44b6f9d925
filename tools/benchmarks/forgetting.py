"""What is learned and what is forgotten: adapters, with and without `retain`, and full fine-tuning.

    python tools/benchmarks/forgetting.py [--only REGEX] [--out FOLDER]

Trains every contender on the new classes of the shapes data set from the shipped base, as `make
demo` does (configs/gdino_lora_shapes.py: 200 iterations of 8 images), each in a process of its own,
and measures it on the new and on the base classes' test images with its change to the base scaled
(`--scales`). Prints the tables that stand in the README, with times
relative to full fine-tuning's; what was measured stays in FOLDER, so that a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gdino_lora import run  # noqa: E402
from mmdet_gdino_lora.commands.common import build_runner, read_config  # noqa: E402

CONFIG = str(ROOT / 'configs' / 'gdino_lora_shapes.py')


def contenders() -> dict[str, dict]:
    """Settings of the demo's config that each contender changes.

    The learning rates are the best of those tried on the validation images: 0.0002, 0.0004, 0.0006
    and 0.001 for full fine-tuning, 0.001, 0.002 and 0.003 for adapters.
    """
    alone = {'model.retain': None}
    full = {**alone, 'model.lora': None, 'optim_wrapper.optimizer.lr': 0.0004}
    result: dict[str, dict] = {'frozen base': {'train': False}, 'full fine-tuning': full}
    for preset in ('decoder', 'encoder', 'encoder+decoder', 'all'):
        lora = {'model.lora.preset': preset}
        result[f'`{preset}`'] = {**lora, **alone}
        result[f'`{preset}`, retain'] = lora
    result['`all`, retain every 2nd iteration'] = {'model.retain.every': 2}
    wide = {'model.lora.r': 64, 'model.lora.lora_alpha': 128}
    result['`all`, r=64, retain with weight 2'] = {**wide, 'model.retain.weight': 2.0}
    result['`all`, r=4'] = {**alone, 'model.lora.r': 4, 'model.lora.lora_alpha': 8}
    result['`all`, old names as negatives'] = {**alone, 'negatives': True}
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument('--only', default='', help='contenders whose name matches this expression')
    parser.add_argument('--out', default='work_dirs/forgetting')
    parser.add_argument('--scales', type=float, nargs='+', default=[0.5, 0.75, 0.9, 1.0])
    parser.add_argument('--split', default='test', choices=['val', 'test'])
    parser.add_argument('--contender', help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = dict(split=args.split, scales=sorted({*args.scales, 1.0}))
    if args.contender:
        settings = contenders()[args.contender]
        measure_contender(args.contender, settings, result_path(args.out, args.contender), asked)
        return
    rows = {}
    for name in contenders():
        if not re.search(args.only, name):
            continue
        path = result_path(args.out, name)
        if not path.is_file() or json.loads(path.read_text())['asked'] != asked:
            print(f'{name} ...', flush=True)
            command = [sys.executable, __file__, '--contender', name, '--out', args.out]
            scales = [str(scale) for scale in asked['scales']]
            subprocess.run([*command, '--split', args.split, '--scales', *scales], check=True)
        rows[name] = json.loads(path.read_text())
    print(tables(rows))


RAW = argparse.RawDescriptionHelpFormatter


def result_path(out: str, name: str) -> Path:
    """Where a contender's figures lie."""
    return Path(out) / (re.sub(r'\W+', '_', name) + '.json')


def measure_contender(name: str, settings: dict, path: Path, asked: dict) -> None:
    """Trains one contender and writes its figures, and the split and scales they are of."""
    import torch
    from mmdet.registry import MODELS

    from mmdet_gdino_lora.datasets.shapes import BASE_CLASSES, NEW_CLASSES, SPLITS, write_shapes

    settings = dict(settings)
    train, negatives = settings.pop('train', True), settings.pop('negatives', False)
    cfg = read_config(CONFIG, settings, str(path.with_suffix('')))
    cfg.log_level = 'WARNING'
    write_shapes(cfg.data_root, splits={k: v for k, v in SPLITS.items() if k != 'base_train'})
    if negatives:
        prompt_with_old_names(cfg, BASE_CLASSES)
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    validation = {key: cfg.pop(key) for key in ('val_dataloader', 'val_evaluator', 'val_cfg')}
    runner = build_runner(cfg)
    base = plain_weights(runner.model)
    begin = time.time()
    if train:
        runner.train()
    seconds = time.time() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    tuned = plain_weights(runner.model)

    cfg.model.update(lora=None, retain=None)
    plain = MODELS.build(cfg.model)
    scales = {}
    for scale in asked['scales'] if train else [1.0]:
        weights = {
            key: torch.lerp(base[key], value, scale) if value.is_floating_point() else value
            for key, value in tuned.items()
        }
        plain.load_state_dict(weights)
        scales[scale] = {
            side: measure(plain, validation, cfg.data_root, f'{side}_{asked["split"]}', classes)
            for side, classes in dict(new=NEW_CLASSES, base=BASE_CLASSES).items()
        }
        print(name, scale, scales[scale], f'{seconds:.0f} s', flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = dict(
        asked=asked,
        trained=trained if train else 0,
        seconds=seconds,
        gigabytes=memory,
        scales=scales,
    )
    path.write_text(json.dumps(result, indent=1))


def prompt_with_old_names(cfg, names: tuple[str, ...]) -> None:
    """Adds classes without boxes to the training set, so that they are negatives of every image."""
    dataset = cfg.train_dataloader.dataset
    content = json.loads(Path(cfg.data_root, dataset.ann_file).read_text())
    first = len(content['categories']) + 1
    content['categories'] += [dict(id=first + i, name=name) for i, name in enumerate(names)]
    dataset.ann_file = dataset.ann_file.replace('.json', '_with_old_names.json')
    Path(cfg.data_root, dataset.ann_file).write_text(json.dumps(content))
    dataset.metainfo.classes = (*dataset.metainfo.classes, *names)
    cfg.model.bbox_head.num_classes = 32


def plain_weights(detector) -> dict:
    """Weights without adapters, those folded in where there are some."""
    from mmdet_gdino_lora.lora.state import lora_state
    from mmdet_gdino_lora.lora.store.merge import merged_weights

    if lora_state(detector).config is not None:
        return merged_weights(detector)
    return {key: value.detach().clone() for key, value in detector.state_dict().items()}


def measure(detector, validation: dict, root: str, split: str, classes: tuple) -> dict:
    """AP and AP50 on a split."""
    from mmdet_gdino_lora.commands.demo import evaluate, load_set

    found = evaluate(detector, *load_set(validation, root, split, classes))
    return dict(ap=found['coco/bbox_mAP'], ap50=found['coco/bbox_mAP_50'])


def tables(rows: dict[str, dict]) -> str:
    """Everything measured, as Markdown: costs and results, and results over scales."""
    full, base = (rows.get(name) for name in ('full fine-tuning', 'frozen base'))
    lines = [
        '| | trained | time | memory, GiB | new AP50 | base AP50 | new AP | base AP |',
        '|---|' + '--:|' * 7,
    ]
    for name, row in rows.items():
        time_ratio = f'{row["seconds"] / full["seconds"]:.2f}' if full and row['trained'] else ''
        memory = f'{row["gigabytes"]:.2f}' if row['trained'] else ''
        values = []
        for metric in ('ap50', 'ap'):
            for side, reference in dict(new=full, base=base).items():
                value = row['scales']['1.0'][side][metric]
                share = ''
                if reference:
                    share = f' ({value / reference["scales"]["1.0"][side][metric]:.0%})'
                values.append(f'{value:.3f}{share}')
        lines.append(
            f'| {name} | {row["trained"]:,} | {time_ratio} | {memory} | {" | ".join(values)} |'
        )
    scales = sorted({scale for row in rows.values() for scale in row['scales']}, key=float)
    lines += ['', '| AP50, new / base, at scale | ' + ' | '.join(scales) + ' |']
    lines.append('|---|' + '--:|' * len(scales))
    for name, row in rows.items():
        cells = [
            f'{row["scales"][s]["new"]["ap50"]:.3f} / {row["scales"][s]["base"]["ap50"]:.3f}'
            if s in row['scales']
            else ''
            for s in scales
        ]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main)
