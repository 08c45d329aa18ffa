"""Puts the top-level folders ``launchers/`` and ``ds_configs/`` into the wheel.

They lie at the top of the checkout, where users read and copy them, and must work by name after
``pip install`` too, so the wheel carries them as ``s2s_scale/_shipped/``. An editable install
uses the checkout's folders. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHIPPED = ("launchers", "ds_configs")


class BuildWithShippedFiles(build_py):
    """``build_py``, then a copy of the shipped folders beside the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        destination = Path(self.build_lib) / "s2s_scale" / "_shipped"
        shutil.rmtree(destination, ignore_errors=True)  # build/ may hold files of an older version
        for folder in SHIPPED:
            shutil.copytree(HERE / folder, destination / folder)


setup(cmdclass={"build_py": BuildWithShippedFiles})
