"""The report in a real browser, used by keyboard and mouse: what is seen, what is exported, and that nothing is fetched."""

import csv
import io
import json
from importlib.resources import files

import matplotlib.image
import numpy as np
import pytest
import yaml
from support.browser import Browser, needs_browser
from support.reports import write_validated_model

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.report.report import write_report
from nnssl_adapt.evaluation.report.viewer import BUNDLE

pytestmark = needs_browser

HOSTILE = "<img src=x onerror=alert(1)>"
CLASSES = {"background": 0, "</script><script>alert(2)</script>": 1, 'a\' onload="alert(3)" {{ 7*7 }}': 2}
NAMES = ("case_0", "case_1", "2: 'x' # & \"y\"", HOSTILE)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "results", "preprocessed"):
            patch.setenv(f"nnUNet_{name}", str(folder / f"nnUNet_{name}"))
        model = write_validated_model(folder, NAMES, CLASSES, second_class=True)
        missing = folder / "nnUNet_raw" / "Dataset991_Tiny" / "imagesTr" / "case_1_0000.nii.gz"
        missing.unlink()
        return write_report(model)


@pytest.fixture
def browser(page, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open(page)
        yield browser
        assert browser.complaints == [] and browser.from_network == []


def marks(browser):
    return browser.ask("[...document.querySelectorAll('article.case')].map(e => e.dataset.mark)")


def colours_of(browser, selector):
    """The distinct opaque colours of a picture of labels."""
    return {
        tuple(colour)
        for colour in browser.ask(
            f"""(async () => {{
            const image = document.querySelector({json.dumps(selector)});
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const found = new Set();
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < data.length; i += 4) found.add([data[i], data[i + 1], data[i + 2], data[i + 3]].join());
            return [...found].map(text => text.split(',').map(Number));
        }})()"""
        )
        if colour[3]
    }


def near(colour, expected):
    """Browsers round colours that are not opaque."""
    return all(abs(a - b) <= 3 for a, b in zip(colour, expected, strict=True))


def wait_for_colours(browser, selector, *hexadecimal):
    wanted = [tuple(bytes.fromhex(text.removeprefix("#"))) for text in hexadecimal]

    def shown():
        found = colours_of(browser, selector)
        return len(found) == len(wanted) and all(any(near(colour, one) for colour in found) for one in wanted)

    browser.wait(shown, f"the colours {hexadecimal} of {selector}")


def test_by_keyboard(browser):
    shown = browser.ask("[...document.querySelectorAll('article.case .name')].map(e => e.textContent)")
    assert shown == [HOSTILE, NAMES[2], "case_1", "case_0"]  # worst first, and whatever it is called, text
    assert "not drawn" in browser.ask("document.querySelector('#case-2 .problem').textContent")
    browser.click("#case-0 h3")
    browser.press("f", "j", "a", "j", "p", "j", "p", "u")
    assert marks(browser) == ["fail", "artifact", "pass", ""]
    assert browser.ask("document.getElementById('counts').textContent") == "1 pass · 1 fail · 1 artifact, of 4"
    browser.press("k", "k", "k")
    browser.until("document.querySelector('#case-0 .window.active') !== null")
    before = browser.ask("document.querySelector('#case-0 .number').textContent")
    browser.press("ArrowRight")
    after = browser.ask("document.querySelector('#case-0 .number').textContent")
    assert before.startswith("axial, z = ") and int(after.split()[-1]) == int(before.split()[-1]) + 1
    browser.press("3", "ArrowLeft")
    assert browser.ask("document.querySelector('#case-0 .window.active .number').textContent").startswith(
        "sagittal, x ="
    )
    visible = "getComputedStyle(document.querySelector('#case-0 .window .labels')).visibility"
    assert browser.ask(visible) == "visible"
    browser.press("o")
    assert browser.ask(visible) == "hidden"
    browser.press("o", "?")
    assert browser.ask("document.getElementById('help').hidden") is False
    browser.click("[data-export=fail]")
    assert yaml.safe_load(browser.downloaded("qc_fail.yml")) == {"FILES_SEG": [f"{HOSTILE}_0000.nii.gz"]}
    browser.click("[data-export=artifact]")
    assert yaml.safe_load(browser.downloaded("qc_artifact.yml")) == {"FILES_SEG": [f"{NAMES[2]}_0000.nii.gz"]}
    browser.click("[data-export=csv]")
    rows = list(csv.DictReader(io.StringIO(browser.downloaded("marks.csv"))))
    assert [(row["case"], row["mark"]) for row in rows] == [
        (HOSTILE, "fail"),
        (NAMES[2], "artifact"),
        ("case_1", "pass"),
        ("case_0", ""),
    ]
    assert float(rows[0]["mean_dice"]) < float(rows[3]["mean_dice"])


def test_by_mouse(browser):
    browser.click("#case-1 [data-mark=fail]")
    assert marks(browser) == ["", "fail", "", ""]
    browser.click("#case-1 [data-mark=fail]")  # once more: taken back
    assert marks(browser) == ["", "", "", ""]
    browser.click("#case-0 [data-mark=pass]")
    last = browser.ask("document.querySelector('#case-0 .window input').max")
    browser.click("#case-0 .film", across=0.99)
    assert browser.ask("document.querySelector('#case-0 .window input').value") == last
    browser.click("#case-0 .window input", across=0.02)
    assert browser.ask("document.querySelector('#case-0 .window input').value") == "0"
    browser.ask("document.getElementById('marked').value = 'pass'")
    browser.ask("document.getElementById('marked').dispatchEvent(new Event('change'))")
    assert browser.ask("[...document.querySelectorAll('article.case')].map(e => e.hidden)") == [False, True, True, True]


def test_colours_and_the_class_filter(browser):
    browser.click("#case-0 h3")
    film = "#case-0 .strip .labels"
    wait_for_colours(browser, film, "#2ca25f66", "#00b4ffe6", "#ffae00e6", "#ff2d95e6")
    browser.press("c")  # class 1: what is class 2 in one of the two is missed or added
    wait_for_colours(browser, film, "#2ca25f66", "#00b4ffe6", "#ffae00e6")
    browser.press("e")
    wait_for_colours(browser, film, "#e6194b80")
    browser.press("c")
    wait_for_colours(browser, film, "#3cb44b80")
    wait_for_colours(browser, "#case-0 .window .labels", "#3cb44b80")
    legend = "[...document.querySelectorAll('#legend span')].filter(e => !e.hidden).map(e => e.textContent)"
    assert browser.ask(legend) == list(CLASSES)[1:]


def test_marks_outlast_the_page(page, tmp_path):
    for expected in ("", "artifact"):
        with Browser(tmp_path) as browser:
            browser.open(page)
            assert marks(browser)[0] == expected
            if not expected:
                browser.click("#case-0 h3")
                browser.press("a")
                browser.open("about:blank")  # what a page keeps is written when it is left


def test_without_scripts_strips_are_shown(page, tmp_path):
    with Browser(tmp_path, scripts=False, height=2600) as browser:
        browser.open(page)
        picture = matplotlib.image.imread(browser.screenshot(tmp_path / "page.png"))
        assert browser.complaints == []
    pink = np.abs(picture[..., :3] - np.array([255, 45, 149]) / 255).max(axis=-1) < 0.15
    assert pink.sum() > 50  # a wrong class, on every strip


def test_a_page_can_be_shown_in_a_frame_of_a_notebook(page, tmp_path):
    from nnssl_adapt.evaluation.report.page import frame

    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><title>x</title>{frame(page.read_text(encoding='utf-8'))}", encoding="utf-8")
    with Browser(tmp_path) as browser:
        browser.open(outer)
        inside = "document.querySelector('iframe').contentDocument"
        browser.until(f"{inside}.querySelectorAll('article.case').length === 4")
        assert browser.complaints == [] and browser.from_network == []


def test_the_volumes_in_3d(tmp_path, monkeypatch):
    """The real NiiVue, where it was put into the package; what does not fit is left out and said."""
    if not (files("nnssl_adapt.assets") / "niivue" / BUNDLE).is_file():
        pytest.skip("needs NiiVue: pip install --no-deps -e . where the npm registry can be reached")
    for name in ("raw", "results", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    model = write_validated_model(tmp_path, NAMES, CLASSES, second_class=True)
    path = write_report(model, viewer=0.010)  # megabytes: two cases
    with Browser(tmp_path / "browser") as browser:
        browser.open(path)
        embedded = "[...document.querySelectorAll('script[type=\"text/plain\"]')].map(e => e.id)"
        shown = browser.ask(embedded)
        assert shown[:3] == ["volume-0-image", "volume-0-reference", "volume-0-prediction"] and len(shown) < 12
        assert "left out of the 3D viewer" in browser.ask("document.querySelector('#case-3 .problem').textContent")
        browser.click("#case-0 h3")
        browser.press("v")
        browser.until("document.getElementById('viewer').dataset.shown === '0'")
        assert browser.ask("document.querySelector('#viewer h3').textContent") == HOSTILE
        browser.ask("new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))")
        picture = matplotlib.image.imread(browser.screenshot(tmp_path / "viewer.png"))
        red = (picture[..., 0] > 0.5) & (picture[..., 0] - picture[..., 1] > 0.3)
        assert red.sum() > 500  # class 1
        browser.press("Escape")
        browser.until("!document.getElementById('viewer').open")
        assert browser.complaints == [] and browser.from_network == []


def test_an_installation_without_niivue(tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl_adapt.evaluation.report.viewer.BUNDLE", "none.js")
    with pytest.raises(ConfigurationError, match="NiiVue"):
        write_report(tmp_path, viewer=True)
