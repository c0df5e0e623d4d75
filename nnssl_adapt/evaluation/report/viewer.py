"""The real volumes in a report, shown in 3D by NiiVue (BSD 2-Clause, https://github.com/niivue/niivue), without a network.

NiiVue's bundle is no part of the repository: it is put into the wheel when that is built (``assets/vendor_niivue.py``), with its
licence and those of the libraries in it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from markupsafe import Markup

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.report.page import asset
from nnssl_adapt.evaluation.volumes import nifti_bytes
from nnssl_adapt.text import size_text

DEFAULT_MEGABYTES = 100
"""Of all volumes in a page. Browsers open several hundred, slowly."""
BUNDLE = "niivue.umd.js"
LICENCES = ("LICENSE", "NOTICES")


@dataclass(frozen=True)
class Volume:
    """One case's volumes as they are embedded: base64 of gzipped NIfTI, by what they are (image, reference, prediction)."""

    texts: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return sum(len(text) for text in self.texts.values())


class Budget:
    """What may still be embedded; the worst cases come first."""

    def __init__(self, megabytes: float) -> None:
        if not megabytes > 0:
            raise ConfigurationError(f"--viewer-mb {megabytes:g}: expected a number of megabytes above 0")
        self.all = self.left = int(megabytes * 1e6)

    def take(self, volume: Volume) -> str:
        """Empty when the volume fits, which is then counted; else why it is left out."""
        if volume.size <= self.left:
            self.left -= volume.size
            return ""
        return (
            f"volumes left out of the 3D viewer: they need {size_text(volume.size)}, and {size_text(self.left)} of "
            f"{size_text(self.all)} are left (--viewer-mb allows more)"
        )


def viewer_context() -> dict[str, Markup]:
    """NiiVue and what drives it, for the template ``viewer.html``.

    Raises ConfigurationError when this installation has no NiiVue.
    """
    folder = files("nnssl_adapt.assets") / "niivue"
    if not (folder / BUNDLE).is_file():
        raise ConfigurationError(
            "this installation has no NiiVue, which is fetched when the package is built: install it again where the npm "
            "registry can be reached (pip install --force-reinstall --no-deps), or 'pip install --no-deps -e .' in a clone"
        )
    bundle = (folder / BUNDLE).read_text(encoding="utf-8").replace("</script", "<\\/script").replace("<!--", "<\\!--")
    licences = "\n".join((folder / name).read_text(encoding="utf-8") for name in LICENCES).replace("*/", "")
    return {"bundle": Markup(f"/*! NiiVue\n{licences}*/\n{bundle}"), "script": asset("viewer.js")}


def embed(arrays: Iterable[tuple[str, np.ndarray]], geometry: ImageGeometry) -> Volume:
    """The volumes of a case; arrays (Z, Y, X) as they are stored."""
    at = geometry.spacing, geometry.origin, geometry.direction
    return Volume({what: base64.b64encode(nifti_bytes(array, *at)).decode("ascii") for what, array in arrays})
