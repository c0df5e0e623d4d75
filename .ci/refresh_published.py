"""Compare the catalogue of published networks with what the Hugging Face hub and web servers say today.

    python .ci/refresh_published.py [--write]

For every entry: does its address lead somewhere, does the repository hold the file, which licence does its page state, how large
is the file. Differences are printed. With --write licences and sizes are put into the catalogue, and what was second-hand and
is now confirmed is taken off its list. The exit code is 1 if an address leads nowhere.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from nnssl_adapt.text import size_text
from nnssl_adapt.weights.sources.hub import endpoint
from nnssl_adapt.weights.sources.hub_files import HubAddress
from nnssl_adapt.weights.sources.listing import is_weight_name

CATALOGUE = Path(__file__).parents[1] / "nnssl_adapt" / "weights" / "sources" / "published.json"
_LICENCE_UNREAD = "its licence: read its page"


def looked_up(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What its address tells: ``licence``, ``size``; ``problem`` where it leads nowhere; nothing for those without one."""
    source = entry.get("source")
    if not source:
        return {}
    address = HubAddress.parse(source)
    return _on_web(source) if address is None else _on_hub(address)


def _on_hub(address: HubAddress) -> dict[str, Any]:
    try:
        info = HfApi(endpoint=endpoint()).model_info(address.repo_id, revision=address.revision, files_metadata=True)
    except HfHubHTTPError as error:
        return {"problem": f"{address.repo_id}: {str(error).splitlines()[0]}"}
    wanted = address.filename
    held = {file.rfilename: file.size for file in info.siblings or ()}
    inside = {n: size for n, size in held.items() if wanted is None or n == wanted or n.startswith(f"{wanted}/")}
    if not inside:
        return {"problem": f"{address.repo_id} has no {wanted}; it holds {', '.join(sorted(held)[:12]) or 'nothing'}"}
    licence = getattr(info.card_data, "license", None) if info.card_data is not None else None
    sizes = [size for name, size in inside.items() if is_weight_name(name) and size]
    found: dict[str, Any] = {"licence": licence} if isinstance(licence, str) else {}
    return found | ({"size": size_text(sum(sizes))} if sizes else {})


def _on_web(source: str) -> dict[str, Any]:
    request = urllib.request.Request(source, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            length = answer.headers.get("Content-Length")
    except (urllib.error.URLError, OSError) as error:
        return {"problem": f"{source}: {error}"}
    return {"size": size_text(int(length))} if length else {}


def refreshed(entry: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with what was found; a licence that a person has written down in other words stays, and is only compared."""
    updated = {**entry, **({"size": found["size"]} if "size" in found else {})}
    if "licence" in found and "licence" not in entry:
        updated["licence"] = found["licence"]
        updated["unverified"] = [fact for fact in entry.get("unverified", ()) if fact != _LICENCE_UNREAD]
    return {key: value for key, value in updated.items() if value != []}


def differences(entry: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is different today, in words."""
    lines = [found["problem"]] if "problem" in found else []
    for key in ("licence", "size"):
        known = entry.get(key)
        if key in found and str(known).casefold() != str(found[key]).casefold():
            lines.append(f"{key}: {found[key]} (catalogue: {known})")
    return lines


def main(arguments: list[str] | None = None, catalogue: Path = CATALOGUE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put licences and sizes into the catalogue")
    write = parser.parse_args(arguments).write
    content = json.loads(catalogue.read_text(encoding="utf-8"))
    lost, models = 0, []
    for entry in content["models"]:
        found = looked_up(entry)
        lost += "problem" in found
        for line in differences(entry, found):
            print(f"{entry['id']}: {line}")
        models.append(refreshed(entry, found))
    if write:
        lines = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in models)
        about = json.dumps(content["about"], ensure_ascii=False)
        catalogue.write_text(f'{{\n "about": {about},\n "models": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{len(models)} networks, {lost} of them can't be found")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
