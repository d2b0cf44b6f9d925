"""What `gdino-lora` and the files of tools/ run: a file for each command, with a ``main``."""
