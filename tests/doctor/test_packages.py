"""A package that is missing, or outside of the declared range, is a problem with its command."""

from __future__ import annotations

from packaging.requirements import Requirement

from qpref.doctor.packages import examine_packages, of_package, of_python


def test_a_version_in_the_range_is_fine():
    found = of_package(Requirement("peft>=0.21,<0.22"), "0.21.5")
    assert (found.status, found.message, found.fix) == ("ok", "peft 0.21.5 (<0.22,>=0.21)", "")


def test_a_build_of_a_version_in_the_range_is_fine():
    assert of_package(Requirement("torch>=2.11,<2.14"), "2.13.0+cu130").status == "ok"


def test_a_version_outside_of_the_range_is_a_problem():
    found = of_package(Requirement("peft>=0.21,<0.22"), "0.22.0")
    assert found.status == "problem"
    assert found.message.startswith("peft 0.22.0 is outside of the range")
    assert found.fix == "pip install 'peft<0.22,>=0.21'"


def test_a_missing_package_is_a_problem():
    found = of_package(Requirement("peft>=0.21,<0.22"), None)
    assert (found.status, found.message) == ("problem", "peft is not installed")


def test_an_old_python_is_a_problem():
    assert of_python("3.10.4", ">=3.11").message == "Python 3.10.4, and qpref needs >=3.11"
    assert of_python("3.12.0", ">=3.11").status == "ok"


def test_every_requirement_is_examined_and_no_extra():
    named = {finding.message.split()[0] for finding in examine_packages()}
    assert {"torch", "transformers", "peft", "bitsandbytes", "trl", "click", "pyyaml"} <= named
    assert not {"pytest", "ruff", "tensorboardX"} & named
