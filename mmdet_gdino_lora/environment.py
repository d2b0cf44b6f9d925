"""Is the installed stack one that this package can work on? Asked once, when it is imported.

torch, mmcv, mmengine and mmdet are not in ``setup.py``, since pip would fetch an mmcv without its
compiled ops. So they are checked here, and what is missing is told in one sentence with the command
that mends it, before the first obscure ``ImportError`` of somebody else's module.

mmcv, mmengine and mmdet come from one of two families that share these import names: OpenMMLab's,
and OneDL's, which maintains them under other distribution names.
"""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Optional

from packaging.version import Version

from mmdet_gdino_lora.errors import ConfigError


class Package(NamedTuple):
    """What may be installed under one import name.

    Attributes:
        distribution: Its name for pip.
        lowest: The lowest version.
        too_new: The first version too new, or None.
        command: Installs a version in between.
    """

    distribution: str
    lowest: str
    too_new: Optional[str]
    command: str

    @property
    def wanted(self) -> str:
        """The range in words."""
        return f'{self.lowest} or newer' + (f', below {self.too_new}' if self.too_new else '')


def _compiled(requirement: str) -> str:
    pip = f"MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir '{requirement}'"
    return f"pip install 'setuptools<81' wheel ninja packaging && {pip}"


#: Import name: what may stand behind it, in both families. The lowest versions are those of
#: requirements/lowest.txt, which `make stack-lowest` runs on.
COMMON = {
    'torch': Package('torch', '2.6', None, "pip install 'torch==2.13.0'"),
    'transformers': Package('transformers', '4.45', '6', "pip install 'transformers==5.23.0'"),
    'peft': Package('peft', '0.16', '1', "pip install 'peft==0.21.2'"),
}
#: Family: import name: what stands behind it there. The order is that of installing them.
FAMILIES = {
    'OpenMMLab': {
        'mmengine': Package('mmengine', '0.10.6', '1.0', "pip install 'mmengine==0.10.7'"),
        'mmcv': Package('mmcv', '2.1.0', '2.2.0', _compiled('mmcv==2.1.0')),
        'mmdet': Package('mmdet', '3.3.0', '3.4', "pip install 'mmdet==3.3.0'"),
    },
    'OneDL': {
        'mmengine': Package(
            'onedl-mmengine', '0.10.12', '1.0', "pip install 'onedl-mmengine==0.10.12'"
        ),
        'mmcv': Package('onedl-mmcv', '2.3.6', '2.4', _compiled('onedl-mmcv==2.3.6')),
        'mmdet': Package(
            'onedl-mmdetection', '3.5.1', '3.6', "pip install 'onedl-mmdetection==3.5.1'"
        ),
    },
}
# mmcv's setup.py, in both families, asks the compiler for C++17; the last -std counts.
_CXX20 = (
    """printf '#!/bin/sh\\nexec c++ "$@" -std=c++20\\n' > g++ && chmod +x g++ && """
    'export CXX="$PWD/g++" && '
)
_CXX20_SINCE = Version('2.14')


def installed_version(distribution: str) -> Optional[str]:
    """Reads the version of a distribution, without importing anything of it.

    Args:
        distribution: Its name for pip.

    Returns:
        The version; None where it is not installed.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def module_version(module: str) -> Optional[str]:
    """Reads the version that a module says of itself, without importing it.

    Args:
        module: Import name.

    Returns:
        The version; an empty text where the module is there and says nothing of it; None where it
        is not there, or where a folder is all that is left of it.
    """
    spec = find_spec(module)
    if spec is None or not spec.origin:
        return None
    try:
        text = Path(spec.origin).with_name('version.py').read_text(encoding='utf-8')
    except OSError:
        return ''
    said = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    return said[1] if said else ''


def family() -> str:
    """Tells whose mmcv, mmengine and mmdet are installed.

    Returns:
        A key of :data:`FAMILIES`: the family of most of the three; OpenMMLab where none is there.
    """

    def there(name: str) -> int:
        return sum(installed_version(p.distribution) is not None for p in FAMILIES[name].values())

    return max(FAMILIES, key=there)


def supported(name: str) -> dict[str, Package]:
    """Lists what this package stands on.

    Args:
        name: Of the family.

    Returns:
        By import name, in the order in which they are asked for.
    """
    return {'torch': COMMON['torch'], **FAMILIES[name], **COMMON}


def remedy(package: Package) -> str:
    """Says the command that installs a package beside the torch that is there.

    Args:
        package: What is to be installed.

    Returns:
        A line for a shell.
    """
    torch = installed_version('torch')
    compiles = 'MMCV_WITH_OPS' in package.command
    if compiles and torch and Version(torch).release >= _CXX20_SINCE.release:
        return _CXX20 + package.command
    return package.command


def check_environment() -> None:
    """Checks that torch and the rest are there, new enough, of one family, and mmcv with its ops.

    Raises:
        ConfigError: one sentence: the package, what was found, and the command that mends it.
    """
    name = family()
    check_one_family(name)
    for module, package in supported(name).items():
        _check_package(module, package)
    check_mmcv_ops(FAMILIES[name]['mmcv'])


def check_one_family(name: str) -> None:
    """Checks that nothing of the other family is installed: it writes over the same files.

    Args:
        name: The family of most of what is there.

    Raises:
        ConfigError: one sentence with the command that leaves one family.
    """
    for module, package in FAMILIES[name].items():
        own = installed_version(package.distribution)
        others = [f[module].distribution for f in FAMILIES.values() if f[module] != package]
        for other in others:
            found = installed_version(other)
            if found is None:
                continue
            beside = (
                f'{package.distribution} {own}, which has the same files'
                if own
                else f"packages of {name}'s, which it does not go with"
            )
            alone = f'{package.distribution} {other}' if own else other
            raise ConfigError(
                f'{other} {found} is installed beside {beside}: pip uninstall -y {alone} && '
                f'{remedy(package)}'
            )


def _check_package(module: str, package: Package) -> None:
    found, said = installed_version(package.distribution), module_version(module)
    if found is None and not said:
        if module == 'mmcv' and installed_version('mmcv-lite'):
            raise ConfigError(
                'mmcv-lite is installed, which has no compiled ops, and Grounding DINO needs them: '
                f'pip uninstall -y mmcv-lite && {remedy(package)}'
            )
        raise ConfigError(
            f'{package.distribution} is not installed ({package.wanted} is needed): '
            f'{remedy(package)}'
        )
    if said is None:
        raise ConfigError(
            f'{package.distribution} {found} is installed, but its files are gone: '
            f'pip uninstall -y {package.distribution} && {remedy(package)}'
        )
    # A checkout on the path is what runs, whatever is installed beside it.
    version = Version(said or found or '0')
    # base_version: 2.2.0rc1 and 2.13.0+cpu count as 2.2.0 and 2.13.0.
    release = Version(version.base_version)
    too_new = package.too_new and release >= Version(package.too_new)
    if release < Version(package.lowest) or too_new:
        raise ConfigError(
            f'{package.distribution} {version} is installed, but {package.wanted} is needed: '
            f'{remedy(package)}'
        )


def check_mmcv_ops(mmcv: Package) -> None:
    """Checks that mmcv was compiled with its ops, and for the torch that is installed.

    Args:
        mmcv: The family's.

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
        found = installed_version(mmcv.distribution) or module_version('mmcv')
        raise ConfigError(
            f'{mmcv.distribution} {found} {reason}, and Grounding DINO needs them: '
            f'pip uninstall -y {mmcv.distribution} && {remedy(mmcv)}'
        ) from error
