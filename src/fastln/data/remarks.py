"""What the images of a dataset give reason to say, collected so that each thing is said once."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Remark(NamedTuple):
    """One thing about one image.

    Attributes:
        what: A phrase that follows "images", such as `hold several pictures`; equal phrases are counted together.
        detail: What it is in this image.
    """

    what: str
    detail: str


class Remarks:
    """Counts remarks by what they say, and keeps the first example of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._rules: Counter[str] = Counter()

    def add(self, name: object, remark: Remark) -> None:
        """Count a remark about the image of this name."""
        self._counts[remark.what] += 1
        self._examples.setdefault(remark.what, f"{name}: {remark.detail}" if remark.detail else str(name))

    def add_rule(self, rule: str) -> None:
        """Count an image whose brightness follows a rule."""
        self._rules[rule] += 1

    def tell(self, data: str) -> None:
        """Log one line for all rules, and one for each kind of remark."""
        if self._rules:
            rules = "; ".join(f"{count:,} {rule}" for rule, count in self._rules.most_common())
            logger.info(
                "%s: brightness of images of more than 8 bits, or with a grey scale of their own: %s", data, rules
            )
        for what, count in self._counts.items():
            logger.warning("%s: %s image(s) %s; the first is %s", data, f"{count:,}", what, self._examples[what])
