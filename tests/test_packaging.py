"""What pip and a package index read: versions, their bounds, the README."""

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import transformers_sled


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# No test on the lowest versions imports these.
WITHOUT_LOWEST = {"mypy", "ruff"}


def requirements(*extras):
    """What the package needs with these extras, and the extras that they name in turn."""
    parsed = [Requirement(line) for line in PROJECT["dependencies"]]
    parsed += [Requirement(line) for extra in extras for line in EXTRAS[extra]]
    own = {extra for requirement in parsed if requirement.name == PROJECT["name"] for extra in requirement.extras}
    if own - set(extras):
        return requirements(*own.union(extras))
    return {canonicalize_name(part.name): part.specifier for part in parsed if part.name != PROJECT["name"]}


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    return {canonicalize_name(package): Version(version) for package, version in (line.split("==") for line in lines)}


def test_lowest_versions_are_the_lower_bounds():
    lower = {
        name: Version(next(part.version for part in specifier if part.operator == ">="))
        for name, specifier in requirements("test").items()
        if name not in WITHOUT_LOWEST
    }
    assert pins("constraints-lowest.txt") == lower


def test_tested_versions_are_admitted():
    newest = pins("constraints.txt")
    for name, specifier in requirements(*EXTRAS).items():
        assert newest[name] in specifier, f"{name}: {newest[name]} is not in {specifier}"


def test_transformers_is_bounded_by_what_was_tested():
    newest = pins("constraints.txt")["transformers"]
    assert Version(f"{newest.major}.{newest.minor + 1}") not in requirements()["transformers"]


def test_an_extra_of_the_same_package_asks_for_the_same_version():
    bounds: dict[str, set[SpecifierSet]] = {}
    for lines in EXTRAS.values():
        for requirement in (Requirement(line) for line in lines):
            bounds.setdefault(canonicalize_name(requirement.name), set()).add(requirement.specifier)
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_version():
    assert Version(transformers_sled.__version__) >= Version("0.1.0")
    assert "version" in PROJECT["dynamic"]
