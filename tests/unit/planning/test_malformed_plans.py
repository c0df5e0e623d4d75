"""Any JSON of any type at any place of a plans file is read, or is one clear error that names the file."""

import copy
import json

import pytest
from support.model_folders import plans_content

from nnssl_adapt.errors import NnsslAdaptError, PlanError
from nnssl_adapt.planning.plan import FinetunePlan

ANYTHING = [None, True, -1, 0, 3.5, 1e400, "", "text", "../..", [], [1], ["a", None], [[0, 1, 2]], {}, {"a": [None]}]

PROVENANCE = {
    "version": "0.1.0",
    "source": {"source": "owner/name", "repo_id": "owner/name", "sha256": "ab" * 32, "filename": "a.pth"},
    "source_choices": {"fold": "3"},
    "transfer": {"scope": "auto", "channels": [0], "token_order": "auto", "waive": ["a.*"]},
    "spacing_mode": "fixed",
}


def good():
    content = json.loads(json.dumps(plans_content()))
    content["pretrain_info"] = {"checkpoint_path": "weights", "citations": [{"name": "MAE"}]}
    return {**content, "nnssl_adapt": copy.deepcopy(PROVENANCE)}


def places(content, path=()):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged(content, path, value):
    copied = copy.deepcopy(content)
    place = copied
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copied


def use(path):
    """Everything that preprocessing, training and prediction ask a plan."""
    plan = FinetunePlan.load(path)
    return (
        plan.settings,
        plan.resampling_for_export,
        plan.architecture,
        plan.patch_size,
        plan.batch_size,
        str(plan),
    ), (
        plan.store_folder,
        plan.plans_file,
        plan.transfer_settings,
        plan.pretrain_info,
        plan.replaced(batch_size=2),
    )


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))


def test_any_value_at_any_place_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "plans.json"
    content = good()
    path.write_text(json.dumps(content))
    use(path)
    cases = refused = 0
    for place in places(content):
        for value in [KeyError, *ANYTHING]:
            path.write_text(json.dumps(damaged(content, place, value)))
            cases += 1
            try:
                use(path)
            except NnsslAdaptError as error:
                refused += 1
                assert len(str(error)) < 2000 and "Traceback" not in str(error)
    assert cases >= 500 and refused > cases // 3


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("configurations",), {"3d_fullres": 5}),
        (("configurations",), [1]),
        (("configurations", "3d_fullres", "patch_size"), [16, "a", 32]),
        (("configurations", "3d_fullres", "batch_size"), True),
        (("configurations", "3d_fullres", "data_identifier"), "../elsewhere"),
        (("configurations", "3d_fullres", "spacing"), [1, 0, 1]),
        (("transpose_forward",), [0, 0, 1]),
        (("pretrain_info",), ["a"]),
        (("nnssl_adapt",), 3),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_file(tmp_path, place, value):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(damaged(good(), place, value)))
    with pytest.raises(PlanError, match=place[-1]) as caught:
        FinetunePlan.load(path)
    assert caught.value.path == path


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[]", '"text"'])
def test_what_is_no_plans_file_is_said(tmp_path, text):
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="plans"):
        FinetunePlan.load(path)
