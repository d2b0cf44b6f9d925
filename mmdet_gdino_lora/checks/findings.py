"""What a check found, and the one place that decides whether the run may go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Optional

from mmengine.logging import MMLogger

from mmdet_gdino_lora.checks.ranks import rank
from mmdet_gdino_lora.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is not as a person would have meant it.

    Args:
        sentence: It names the file or the config key, what was found there, and the remedy.
        fatal: Whether nothing would be left to learn from, or something else would be learned than
            was meant. What is not fatal is told, and the run goes on.
        cases: Files or entries that it is of, where the sentence names the first alone.
    """

    sentence: str
    fatal: bool = False
    cases: tuple[str, ...] = dataclasses.field(default=(), compare=False)


def tell(findings: Iterable[Finding], logger: Optional[MMLogger] = None) -> None:
    """Warns of what a run can bear, and stops it at what it can't.

    Of several processes the first alone warns; all of them stop.

    Args:
        findings: Of all checks; none is told twice.
        logger: Of the run; the current one where None.

    Raises:
        ConfigError: The first fatal finding's sentence, after every warning was told.
    """
    found = list(dict.fromkeys(findings))
    for finding in found:
        if not finding.fatal and rank() == 0:
            (logger or MMLogger.get_current_instance()).warning(finding.sentence)
    for finding in found:
        if finding.fatal:
            raise ConfigError(finding.sentence)
