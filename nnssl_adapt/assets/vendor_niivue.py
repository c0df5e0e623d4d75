"""A step of the build: NiiVue, for ``report --viewer``, is put into the wheel. pyproject.toml names it for setuptools.

It is one file of a pinned version of its npm package, checked by the digest that the registry publishes. Without a network
the wheel is built without it, and the viewer says so. ``NNSSL_ADAPT_NIIVUE=FILE.tgz`` names a copy of the package;
``npm_config_registry`` another registry. An editable installation puts it into the clone. The package never imports this file.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import tarfile
import urllib.request
from pathlib import Path
from typing import ClassVar

from setuptools import Command
from setuptools.command.build import build

VERSION = "0.69.0"
INTEGRITY = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="  # SHA-512
MEMBER, TARGET = "package/dist/niivue.umd.js", "nnssl_adapt/assets/niivue/niivue.umd.js"
HERE = Path(__file__).resolve().parents[2]


class VendorNiivue(Command):  # type: ignore[misc]  # setuptools has no types
    """Fetch NiiVue's bundle, check it, and put it beside its licence."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    build_lib: str | None = None
    editable_mode = False

    def initialize_options(self) -> None:
        """Nothing to choose."""

    def finalize_options(self) -> None:
        build = self.distribution.get_command_obj("build", create=False)
        self.build_lib = None if build is None else build.build_lib

    def run(self) -> None:
        folder = HERE if self.editable_mode or self.build_lib is None else Path(self.build_lib)
        target, known = folder / TARGET, HERE / TARGET
        if known.is_file():
            bundle = known.read_bytes()
        else:
            try:
                package = self._package()
            except (OSError, http.client.HTTPException) as error:
                self.warn(f"built without NiiVue, which report --viewer needs: {error}")
                return
            digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
            if digest != INTEGRITY:  # a proxy's page, or a file that was exchanged: never put into a wheel
                self.warn(f"built without NiiVue: niivue {VERSION} has SHA-512 {digest}, expected {INTEGRITY}")
                return
            with tarfile.open(fileobj=io.BytesIO(package)) as archive:
                member = archive.extractfile(MEMBER)
                assert member is not None  # the digest is that of an archive that has it
                bundle = member.read()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bundle)

    def _package(self) -> bytes:
        if given := os.environ.get("NNSSL_ADAPT_NIIVUE"):
            return Path(given).read_bytes()
        registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")
        address = f"{registry}/@niivue/niivue/-/niivue-{VERSION}.tgz"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return bytes(answer.read())

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [] if self.build_lib is None else [str(Path(self.build_lib) / TARGET)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):  # type: ignore[misc]
    """setuptools' steps, and ours."""

    sub_commands = [*build.sub_commands, ("vendor_niivue", None)]
