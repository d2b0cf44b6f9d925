"""Writes docs/two_lines.md: what two lines change of mmdet's own config, as the log says it.

LANG_MODEL in the environment names another text model, as in the project's configs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / 'docs' / 'two_lines.md'
CONFIG = 'mmdet::mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py'
HEAD = """\
# What two lines change

Written by `python tools/two_lines_page.py`. Every training run from a config of mmdet's with the
two lines

```python
custom_imports = dict(imports=['mmdet_gdino_lora'])
model = dict(type='LoRAGroundingDINO', lora=dict(preset='decoder', r=16))
```

begins its log with this table, made of that run's config. Here it is that of
`{config}`. What the table doesn't name is the config's own: data, schedule,
hooks, evaluation.

"""


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description='Write what two lines change').parse_args()
    PAGE.write_text(page(), encoding='utf-8')
    print(f'written: {PAGE.relative_to(ROOT)}')


def page() -> str:
    """The page as it should be."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    from mmdet_gdino_lora.changes import as_markdown, changes

    register_all_modules()
    cfg = Config.fromfile(_installed(CONFIG))
    cfg.model.update(type='LoRAGroundingDINO', lora=dict(preset='decoder', r=16))
    cfg.model.language_model.name = os.environ.get('LANG_MODEL', 'bert-base-uncased')
    detector = MODELS.build(cfg.model)
    return HEAD.format(config=CONFIG) + as_markdown(changes(detector, cfg))


def _installed(config: str) -> str:
    import mmdet

    return os.path.join(os.path.dirname(mmdet.__file__), '.mim/configs', config.partition('::')[2])


if __name__ == '__main__':
    main()
