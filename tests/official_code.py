"""What the official release's code computes; run by a Python that has it, without this project.

official_code.py CONFIG.py CHECKPOINT.pth INPUTS.pt OUTPUTS.pt
"""

from __future__ import annotations

import sys

import torch
from groundingdino.models import build_model
from groundingdino.util.misc import clean_state_dict
from groundingdino.util.slconfig import SLConfig


def main() -> None:
    """As its own `load_model`, but that no weight may be missing."""
    config, checkpoint, inputs, outputs = sys.argv[1:]
    settings = SLConfig.fromfile(config)
    settings.device = 'cpu'
    model = build_model(settings).eval()
    weights = clean_state_dict(torch.load(checkpoint, map_location='cpu')['model'])
    found = model.load_state_dict(weights, strict=False)
    given = torch.load(inputs)
    with torch.no_grad():
        result = model(given['images'], captions=given['captions'])
    kept = {name: result[name] for name in ('pred_logits', 'pred_boxes')}
    torch.save(dict(kept, missing=found.missing_keys, unexpected=found.unexpected_keys), outputs)


if __name__ == '__main__':
    main()
