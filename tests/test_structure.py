"""The packages' structure: dependencies point one way."""

import graphlib
import itertools
from collections import defaultdict
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("l2l_lightning", "l2l_kernels")
CHAIN = ("rules", "rollout", "comparison", "training", "cli")
"""Packages of l2l_lightning, each of which may depend on those before it and on no later one."""


@pytest.fixture(scope="module")
def imports():
    """Every module's own imports of others, within functions too, but for those of type checkers alone."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def order(graph):
    """The nodes, each after what it depends on; graphlib.CycleError names a circle."""
    return list(graphlib.TopologicalSorter(graph).static_order())


def package_of(module):
    """Its folder within l2l_lightning, or the module itself where it lies in none."""
    return ".".join(module.split(".")[: 2 if module.startswith("l2l_lightning") else 1])


def test_no_module_imports_itself_in_a_circle(imports):
    assert len(imports) > 80
    assert len(order(imports)) == len(imports)


def test_no_package_depends_on_itself_in_a_circle(imports):
    packages = defaultdict(set)
    for module, others in imports.items():
        if module not in PACKAGES:  # what only passes names on
            packages[package_of(module)] |= {package_of(other) for other in others if other not in PACKAGES}
    for package, others in packages.items():
        others.discard(package)
    assert len(order(packages)) == len(packages)
    for lower, higher in itertools.combinations(CHAIN, 2):
        assert f"l2l_lightning.{higher}" not in packages[f"l2l_lightning.{lower}"]
