"""The command `gdino-lora`.

It lies beside the package, whose import takes seconds and a whole environment: help and mistakes of
the command line need neither.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Callable, Optional

#: Command: (file of mmdet_gdino_lora/commands/, what it does).
COMMANDS = {
    'new-config': ('new_config', 'write a config for a folder of labelled photos'),
    'check-dataset': ('check_dataset', "say what will go wrong with a config's data"),
    'browse-dataset': ('browse_dataset', 'draw what the model will see: images, boxes, captions'),
    'train': ('train', 'train the adapters that a config describes'),
    'test': ('test', 'evaluate a checkpoint or an adapter'),
    'image-demo': ('image_demo', 'detect what a text names in an image, and draw the boxes'),
    'playground': ('playground', 'try a tuned detector on a page in the browser'),
    'label': ('label', 'label more photos with a tuned detector'),
    'demo': ('demo', 'watch a small model learn new objects, on a CPU, in minutes'),
    'export': ('export_adapter', "write a run's adapter in PEFT's own format"),
    'export-onnx': ('export_onnx', 'write a tuned detector as an ONNX file'),
    'merge': ('merge_adapter', 'fold an adapter into its base'),
    'sweep': ('sweep_scale', 'measure an adapter at several strengths'),
    'report': ('report', 'write a page about a run: curves, AP, thresholds, pictures, mistakes'),
    'shrink': ('shrink_checkpoint', "write a checkpoint's weights in half precision"),
    'replay': ('replay', 'go through a training step again that was NaN or infinite'),
}
USAGE = """\
usage: gdino-lora COMMAND ...

Fine-tunes Grounding DINO in MMDetection 3 with LoRA adapters.

{commands}

`gdino-lora COMMAND --help` tells the arguments of one.
"""
#: Whether this process is one of the commands: then the package's import is put off.
starts = False


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command line.

    Args:
        argv: Without the program's name; None: the process's own.

    Raises:
        SystemExit: Help was asked for (0), or something is wrong (2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ('-h', '--help', 'help'):
        print(usage(), end='')
        sys.exit(0 if words else 2)
    name = full_name(words[0])
    if name is None:
        print(f'error: {unknown(words[0])}', file=sys.stderr)
        sys.exit(2)
    sys.argv = [f'gdino-lora {name}', *words[1:]]  # argparse names the program by it
    run_command(name)


def usage() -> str:
    """What `gdino-lora --help` says."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {told}' for name, (_, told) in COMMANDS.items()]
    return USAGE.format(commands='\n'.join(lines))


def full_name(word: str) -> Optional[str]:
    """The command that a word names: its name, or its file's in tools/; None if there is none."""
    names = {file.replace('_', '-'): name for name, (file, _) in COMMANDS.items()}
    names.update({name: name for name in COMMANDS})
    return names.get(word.removesuffix('.py').replace('_', '-'))


def unknown(word: str) -> str:
    """One sentence about a word that is no command.

    Args:
        word: As it was typed.
    """
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    meant = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(COMMANDS)}'
    return f'gdino-lora {word!r}: no such command; {meant}'


def typed(command: str) -> str:
    """How a person would type another of the commands, in the way in which this one was.

    Args:
        command: Such as ``train``.

    Returns:
        ``gdino-lora train``, or ``python tools/train.py`` of a clone.
    """
    folder, file = os.path.split(sys.argv[0])
    # mmdet has tools as well, which start none of these commands.
    if starts and file.endswith('.py') and os.path.basename(folder) == 'tools':
        return f'python {os.path.join(folder, COMMANDS[command][0])}.py'
    return f'gdino-lora {command}'


def run_command(name: str) -> None:
    """Runs a command on the process's arguments.

    Args:
        name: Of the command.
    """
    global starts
    starts = True
    # What mmengine and mmdet make Python and torch say in every run.
    for message in ('pkg_resources is deprecated', 'torch.meshgrid: in an upcoming release'):
        warnings.filterwarnings('ignore', message=message)
    run(lambda: importlib.import_module(f'mmdet_gdino_lora.commands.{COMMANDS[name][0]}').main())


def run(work: Callable[[], object]) -> None:
    """Runs a command. A ``ConfigError`` ends it with one sentence and status 2, no traceback.

    So does what ends a run from outside, such as a loader's worker that is killed.

    Args:
        work: What the command does.
    """
    try:
        work()
    except (ValueError, RuntimeError, OSError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        sys.stdout.flush()
        print(f'error: {sentence}', file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception) -> Optional[str]:
    try:
        from mmdet_gdino_lora.engine.endings import ending
    except Exception:  # the package can't be imported, which may be what the error says
        return str(error) if type(error).__name__ == 'ConfigError' else None
    return ending(error)
