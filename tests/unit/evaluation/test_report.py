"""The page about a model: what it shows, what it leaves out, and that a browser shows it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from support.model_folders import plans_content, write_model_folder
from support.reports import write_validated_model

from nnssl_adapt.errors import ModelFolderError
from nnssl_adapt.evaluation.lesions import LesionRule
from nnssl_adapt.evaluation.report.content import CaseResult, gather_folds, worst_median_best
from nnssl_adapt.evaluation.report.report import make_report, write_report
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import scratch_report


class Page(HTMLParser):
    """Texts, addresses and unclosed tags of a page."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.addresses = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


@pytest.fixture
def trained(nnunet_folders):
    """A model folder with a validated fold of three cases; predictions get worse from case to case."""
    return write_validated_model(nnunet_folders)


def test_the_page_says_what_the_files_say(trained):
    plans = plans_content()
    plans["plans_name"] = "ptPlans__mae____X"
    plans["pretrain_info"] = {"citations": [{"name": "MAE", "apa_citations": ["He, K. & <others> (2022). Masked."]}]}
    plans["nnssl_adapt"] = {
        "source": {"repo_id": "owner/name", "revision": "abc123", "filename": "w.pth", "sha256": "0" * 64},
        "spacing_mode": "fixed",
    }
    (trained / "plans.json").write_text(json.dumps(plans))
    fold = trained / "fold_0"
    network = build_network(ModelFolder.open(trained).plan.architecture, 1, 3, (16, 24, 32))
    scratch_report(network).save(fold / "transfer_report.json")
    recipe = {"name": "short", "epochs": 2, "learning_rate": 0.001}
    (fold / "debug.json").write_text(json.dumps({"nnssl_adapt": "0.1", "torch": "2.x", "recipe": recipe}))
    (fold / "metrics.jsonl").write_text('{"epoch": 0, "seconds": 3000}\n{"epoch": 1, "seconds": 1500}\n')
    path = write_report(trained)
    assert path == trained / "report.html"
    page = Page(path)
    assert page.open == []
    for text in (
        "Dataset991_Tiny",
        "owner/name at revision abc123, w.pth",
        "He, K. & <others> (2022). Masked.",
        "from scratch",
        "mean Dice of 3 validation cases",
        "1.2 h",
        "learning_rate: 0.001",
        # The plan's axes are (1, 0, 2) of the image's: its spacing is given back in the image's order.
        "nnUNetv2_preprocess_like_nnssl -d 991 -n mae -pc owner/name@abc123 -am fixed -os 1 2 1.5",
        "nnUNetv2_train_pretrained -d 991 -c 3d_fullres -f 0 -p ptPlans__mae____X --recipe recipe.yaml",
    ):
        assert text in page.text, text
    assert page.text.index("case_2") < page.text.index("case_1") < page.text.index("case_0")  # worst first
    kinds = Counter(address.partition(",")[0] for address in page.addresses)
    strips = 3 * 3  # of three cases in three planes: the image, and the labels over it; and one picture of the network
    assert kinds == {"data:image/jpeg;base64": strips, "data:image/png;base64": strips + 1, "data:": 1}
    assert not re.search(r"https?://", path.read_text())


def test_figures_are_those_of_the_cases(trained):
    page = Page(write_report(trained, overlays=False))
    overlap = [1.0, 6 / 7, 5 / 7]  # of seven rows, as many as are not rolled away
    mean, deviation = sum(overlap) / 3, 1 / 7
    assert f"{mean:.3f} ± {deviation:.3f}" in page.text
    assert page.addresses == ["data:,"]  # the icon: none
    row = page.texts[page.texts.index("lesion", page.texts.index("lowest Dice")) :][:5]
    assert row == ["lesion", "–", "–", "–", "0"]  # in no case at all


def test_a_folder_of_nnunet_and_missing_images(trained, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    page = Page(write_report(trained, trained.parent / "elsewhere.html"))
    assert "none named in the plan" in page.text
    assert "3 of 3 cases are not drawn" in page.text and page.text.count("not drawn: ") == 3
    assert "-p nnUNetPlans -tr PretrainedTrainer" in page.text
    assert "nnUNetv2_preprocess_like_nnssl" not in page.text


def test_a_fold_that_was_not_validated(tmp_path):
    page = Page(write_report(write_model_folder(tmp_path, folds=(0, 3))))
    assert "folds 0, 3" in page.text
    assert "No fold has been validated yet." in page.text


def test_what_is_no_model_folder(tmp_path):
    with pytest.raises(ModelFolderError, match=r"plans\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([math.nan], []),
        ([0.5], [("worst", 0.5)]),
        ([0.9, 0.5], [("worst", 0.5), ("best", 0.9)]),
        ([0.9, math.nan, 0.5, 0.7, 0.1], [("worst", 0.1), ("median", 0.5), ("best", 0.9)]),
    ],
)
def test_worst_median_and_best_are_different_cases(values, expected):
    cases = [CaseResult(f"c{i}", "0", {"a": {"Dice": v}}, None, None) for i, v in enumerate(values)]
    assert [(what, case.mean_dice) for what, case in worst_median_best(cases)] == expected


def test_a_notebook_shows_it_in_a_frame(trained, tmp_path):
    report = make_report(trained, overlays=False)
    assert report.save(tmp_path / "page.html").read_text(encoding="utf-8") == report.html
    assert not (trained / "report.html").exists() and report.save() == trained / "report.html"
    frames = []

    class Notebook(HTMLParser):
        def handle_starttag(self, tag, attrs):
            frames.append((tag, dict(attrs).get("srcdoc")))

    Notebook().feed(report._repr_html_())
    assert frames == [("iframe", report.html)]


def test_lesions_of_the_validation_cases_are_counted_by_the_rule_that_was_asked_for(trained):
    page = make_report(trained, overlays=False, lesions=LesionRule(overlap=0.3, connectivity=6))
    assert "6-connected parts" in page.html and "intersection over union is at least 0.3" in page.html
    assert "lesion-wise Dice" in page.html
    assert "Lesions" not in make_report(trained, overlays=False).html


def test_the_classes_of_a_case_stand_in_the_order_of_their_labels(tmp_path, trained):
    labels = {"background": 0, **{f"part {value}": value for value in range(1, 12)}}
    path = trained / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    summary = trained / "fold_0" / "validation" / "summary.json"
    content = json.loads(summary.read_text())
    for case in content["metric_per_case"]:
        case["metrics"] = dict.fromkeys(sorted(map(str, range(1, 13))), case["metrics"]["1"])
    summary.write_text(json.dumps(content))
    (fold,) = gather_folds(ModelFolder.open(trained))
    assert list(fold.cases[0].metrics) == [*(f"part {value}" for value in range(1, 12)), "12"]
