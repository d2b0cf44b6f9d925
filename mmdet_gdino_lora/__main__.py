"""`python -m mmdet_gdino_lora`: the same as `gdino-lora`."""

from __future__ import annotations

from gdino_lora import main

if __name__ == '__main__':
    main()
