"""Cells of the conformance suite: each ends exact or refused, and can be written down with --conformance-report."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from conformance.fixtures import KINDS
from conformance.paths import PATHS
from prefixkit.files import write_text

_PROPERTY = "conformance"


class Cell:
    """What one combination came to; a test that takes this fixture must say."""

    def __init__(self, family: str, path: str, settings: dict[str, str]) -> None:
        self.record: dict[str, Any] = {"family": family, "path": path, "settings": settings, "outcome": None}

    def exact(self, found: Any, expected: Any, within: float = 1e-10) -> None:
        """Compare numbers, or tokens, which must be equal."""
        __tracebackhide__ = True
        if isinstance(found, Tensor) and not found.is_floating_point():
            assert torch.equal(found, expected), f"{found.tolist()} is not {expected.tolist()}"
        elif isinstance(found, Tensor | list | tuple):
            torch.testing.assert_close(found, expected, rtol=within, atol=within)
        else:
            assert found == expected
        self.record["outcome"] = self.record["outcome"] or "exact"

    @contextmanager
    def refused(self, error: type[Exception] | tuple[type[Exception], ...], message: str) -> Iterator[None]:
        """Expect a refusal whose one line matches."""
        with pytest.raises(error, match=message) as caught:
            yield
        self.record |= {"outcome": "refused", "message": str(caught.value)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--conformance-report", metavar="FILE", help="write every conformance cell's outcome as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker; remember cells."""
    config.addinivalue_line("markers", "cell(path): a cell of the conformance suite, under a path of paths.PATHS")
    config.stash[_CELLS] = []
    config.pluginmanager.register(_Collector(config), "conformance-collector")


_CELLS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    """The cell this test is about, named by its marker and parameters."""
    marker = request.node.get_closest_marker("cell")
    assert marker is not None, "mark the test with a path of PATHS"
    assert marker.args[0] in PATHS, "mark the test with a path of PATHS"
    params = dict(request.node.callspec.params)
    family = next(str(params.pop(kind)) for kind in KINDS if kind in params)
    made = Cell(family, marker.args[0], {key: str(value) for key, value in params.items()})
    request.node.user_properties.append((_PROPERTY, made.record))
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """No third state: a cell whose test passed has said what it came to."""
    result = yield
    for name, record in item.user_properties:
        if name == _PROPERTY and record["outcome"] is None:
            pytest.fail("this cell ended neither exact nor refused")
    return result


class _Collector:
    """Gathers cells where reports arrive, which under xdist is the controller."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a cell's record out of its test's report."""
        if report.when == "call":
            for name, record in report.user_properties:
                if name == _PROPERTY:
                    self.config.stash[_CELLS].append(record | ({"outcome": "wrong"} if report.failed else {}))

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        path = self.config.getoption("--conformance-report")
        if path and not hasattr(self.config, "workerinput"):
            versions = {"python": platform.python_version(), "torch": torch.__version__,
                        "transformers": transformers.__version__}  # fmt: skip
            write_text(Path(path), json.dumps({"versions": versions, "cells": self.config.stash[_CELLS]}, indent=1))
