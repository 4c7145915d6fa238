"""Versions of packages: what is installed, and what fastln is tested with. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import logging
import os

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

TESTED_VERSIONS = {"torch": ">=2.13,<2.14", "transformers": ">=5.23,<5.24"}
"""The versions that fastln is tested with, as in pyproject.toml. It uses private parts of these packages."""


def package_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def warn_of_untested_versions() -> None:
    """Warn, in one line, about versions of torch and transformers that fastln is not tested with.

    `FASTLN_UNTESTED_VERSIONS=1` silences the warning, for tests of such versions (`make test-newest`).
    """
    if os.environ.get("FASTLN_UNTESTED_VERSIONS", "0") != "0":
        return
    found = {package: package_version(package) for package in TESTED_VERSIONS}
    untested = [
        f"{package} {version} (tested: {TESTED_VERSIONS[package]})"
        for package, version in found.items()
        if version is not None and not SpecifierSet(TESTED_VERSIONS[package]).contains(version, prereleases=True)
    ]
    if untested:
        logger.warning(
            "fastln is not tested with %s: results may be wrong; install a tested version, or set "
            "FASTLN_UNTESTED_VERSIONS=1 to silence this",
            " and ".join(untested),
        )
