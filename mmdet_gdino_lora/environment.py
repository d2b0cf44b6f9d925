"""Is the installed stack one that this package can work on? Asked once, when it is imported.

torch, mmcv, mmengine and mmdet are not in ``setup.py``, since pip would fetch an mmcv without its
compiled ops. So they are checked here, and what is missing is told in one sentence with the command
that mends it, before the first obscure ``ImportError`` of somebody else's module.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Optional

from packaging.version import Version

from mmdet_gdino_lora.errors import ConfigError

_MMCV = "MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir 'mmcv==2.1.0'"
#: package: (lowest version, first version too new, the command that installs one in between).
#: The lowest are requirements/lowest.txt's, which `make stack-lowest` runs on.
SUPPORTED = {
    'torch': ('2.6', None, "pip install 'torch==2.13.0'"),
    'mmengine': ('0.10.6', '1.0', "pip install 'mmengine==0.10.7'"),
    'mmcv': ('2.1.0', '2.2.0', f"pip install 'setuptools<81' wheel ninja && {_MMCV}"),
    'mmdet': ('3.3.0', '3.4', "pip install 'mmdet==3.3.0'"),
    'transformers': ('4.45', '6', "pip install 'transformers==5.23.0'"),
    'peft': ('0.16', '1', "pip install 'peft==0.21.2'"),
}


def installed_version(package: str) -> Optional[str]:
    """The installed version of ``package``, or None; read without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_environment() -> None:
    """Checks that the packages of :data:`SUPPORTED` are there, new enough, and mmcv with its ops.

    Raises:
        ConfigError: one sentence: the package, what was found, and the command that mends it.
    """
    for package, (lowest, too_new, command) in SUPPORTED.items():
        found = installed_version(package)
        wanted = f'{lowest} or newer' + (f', below {too_new}' if too_new else '')
        if found is None and package == 'mmcv' and installed_version('mmcv-lite'):
            raise ConfigError(
                'mmcv-lite is installed, which has no compiled ops, and Grounding DINO needs them: '
                f'pip uninstall -y mmcv-lite && {command}'
            )
        if found is None:
            raise ConfigError(f'{package} is not installed ({wanted} is needed): {command}')
        version = Version(found)
        # base_version: 2.2.0rc1 and 2.13.0+cpu count as 2.2.0 and 2.13.0.
        release = Version(version.base_version)
        if release < Version(lowest) or (too_new and release >= Version(too_new)):
            raise ConfigError(f'{package} {found} is installed, but {wanted} is needed: {command}')
    check_mmcv_ops()


def check_mmcv_ops() -> None:
    """Checks that mmcv was compiled with its ops, and for the torch that is installed.

    Raises:
        ConfigError: one sentence with the command that compiles them.
    """
    # The ops link against libraries whose place only torch knows.
    importlib.import_module('torch')
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        reason = (
            'has no compiled ops'
            if isinstance(error, ModuleNotFoundError)
            else 'has ops compiled for another torch than the one installed'
        )
        raise ConfigError(
            f'mmcv {installed_version("mmcv")} {reason}, and Grounding DINO needs them: '
            f'pip uninstall -y mmcv && {SUPPORTED["mmcv"][2]}'
        ) from error
