"""Writes what every preset adapts in a config's detector, as Markdown: docs/presets.md, for one.

preset_table.py CONFIG OUT.md [--rank 16] [--cfg-options KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gdino_lora import run
from mmdet_gdino_lora.commands.common import add_cfg_options, read_config

HEAD = """\
# What the presets adapt

Written by `python tools/preset_table.py {config} docs/presets.md`: {total:,} parameters in the
base, rank {rank}. `*` stands for every number; layers of a kind that differ in size share a line.

| preset | modules | kind | number | adapter parameters |
|---|---|---|--:|--:|
"""


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description='What every preset adapts, as Markdown')
    arguments.add_argument('config', help='config file with a LoRAGroundingDINO')
    arguments.add_argument('out', help='file to write')
    arguments.add_argument('--rank', type=int, default=16)
    add_cfg_options(arguments)
    args = arguments.parse_args()

    page = preset_table(read_config(args.config, args.cfg_options), args.config, args.rank)
    Path(args.out).write_text(page, encoding='utf-8')
    print(f'written: {args.out}')


def preset_table(cfg, name: str, rank: int = 16) -> str:
    """The presets' modules and adapter sizes in a detector, counted on the injected detector.

    Args:
        cfg: Config with a ``LoRAGroundingDINO``; its base is not read.
        name: Of the config, for the heading.
        rank: Of the adapters.

    Returns:
        A Markdown page.
    """
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmdet_gdino_lora.layers.exchange import LEAN
    from mmdet_gdino_lora.lora import GROUPS
    from mmdet_gdino_lora.lora.inject.presets import group_of
    from mmdet_gdino_lora.peft_layers.layers import adapter_layers

    register_all_modules()
    cfg.model.update(base_checkpoint=None, lora=dict(preset='all', r=rank))
    detector = MODELS.build(cfg.model)
    sizes = dict.fromkeys(adapter_layers(detector), 0)
    total = 0
    for parameter_name, parameter in detector.named_parameters():
        if '.lora_' in parameter_name:
            module = parameter_name.split('.lora_')[0].split('.base_layer')[0]
            sizes[module] += parameter.numel()
        else:
            total += parameter.numel()
    stock = {lean: kind for kind, lean in LEAN.items()}
    rows: dict[tuple[str, str, str], list[int]] = {}
    for module, layer in adapter_layers(detector).items():
        base_layer = type(layer.get_base_layer())
        kind = stock.get(base_layer, base_layer).__name__
        key = (group_of(module), re.sub(r'\d+', '*', module), kind)
        rows.setdefault(key, []).append(sizes[module])
    page = HEAD.format(config=name, total=total, rank=rank)
    for group in GROUPS:
        inside = {key: row for key, row in rows.items() if key[0] == group}
        for (_, modules, kind), row in inside.items():
            page += f'| `{group}` | `{modules}` | {kind} | {len(row)} | {sum(row):,} |\n'
        count, size = sum(map(len, inside.values())), sum(map(sum, inside.values()))
        page += f'| **`{group}`** | | | **{count}** | **{size:,}** |\n'
    count, size = sum(map(len, rows.values())), sum(map(sum, rows.values()))
    page += f'| **`all`** | | | **{count}** | **{size:,}** |\n'
    page += (
        '\nThe box branches (`bbox_head.reg_branches`) are trained whole beside any preset, '
        f'{_box_head(detector):,} parameters; `train_box_head=False` leaves them frozen, and then '
        '`neck_and_heads` adapts them.\n'
    )
    return page


def _box_head(detector) -> int:
    branches = detector.bbox_head.reg_branches
    return sum(p.numel() for p in branches.parameters() if p.requires_grad)


if __name__ == '__main__':
    run(main)
