"""Paired comparisons of results whose differences are known."""

import json
import math

import numpy as np
import pytest
from scipy.stats import wilcoxon

from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.evaluation.compare import ALL, bootstrap_interval, compare, holm, load_results, signed_rank_p
from nnssl_adapt.evaluation.compare_output import comparison_table, save_comparisons

NAMES = {"1": "cord", "2": "lesion"}


def write_summary(path, cases, metric="Dice", names=NAMES, n_ref=100):
    """``cases``: identifier → values of the classes 1, 2, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "foreground_mean": {},
        "mean": {},
        "metric_per_case": [
            {
                "metrics": {str(i + 1): {"Dice": 0.5, metric: value, "n_ref": n_ref} for i, value in enumerate(values)},
                "prediction_file": f"/somewhere/{name}.nii.gz",
                "reference_file": f"/labels/{name}.nii.gz",
            }
            for name, values in cases.items()
        ],
    }
    if names:
        content["nnssl_adapt"] = {"class_names": names}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def results(tmp_path):
    """Eight cases in both; the second is better by 0.1, 0.11, ... at the cord, and undecided at the lesion."""
    first = {f"case_{n}": (0.5 + 0.01 * n, 0.6) for n in range(8)}
    second = {f"case_{n}": (0.6 + 0.02 * n, 0.6 + (-1) ** n * 0.05 * (n + 1)) for n in range(8)}
    first["case_7"] = (first["case_7"][0], math.nan)
    first["only_here"] = (0.1, 0.1)
    return write_summary(tmp_path / "a" / "summary.json", first), write_summary(tmp_path / "b" / "summary.json", second)


def test_differences(results):
    comparison = compare(load_results(results[0], name="scratch"), load_results(results[1].parent, name="tuned"))
    everything, cord, lesion = comparison.differences
    assert (everything.name, cord.name, lesion.name) == (ALL, "cord", "lesion")
    expected = np.array([0.1 + 0.01 * n for n in range(8)])
    assert cord.cases == 8 and cord.mean == pytest.approx(expected.mean())
    assert cord.low < cord.mean < cord.high and cord.low > expected.min()
    assert (cord.better, cord.worse) == (8, 0)
    assert cord.p == pytest.approx(2 / 2**8)  # the smallest that eight pairs can give
    assert cord.p_holm == pytest.approx(2 * cord.p)
    assert lesion.cases == 7 and lesion.worse == 3 and lesion.p > 0.5
    assert everything.cases == 8 and everything.p_holm == everything.p
    assert comparison.per_case[ALL]["case_7"] == pytest.approx(0.17)  # only the cord is known there
    assert comparison.only_first == ("only_here",) and comparison.only_second == ()
    table = comparison_table(comparison)
    assert "left out, since tuned lacks them: 1 case(s): only_here" in table and "+0.1350" in table
    assert (
        comparison.one_sided == {"lesion": ("case_7",)} and "left out of lesion: 1 case(s) in which only one" in table
    )


def test_the_same_seed_gives_the_same_interval(results):
    pair = [load_results(path) for path in results]
    assert compare(*pair, seed=3) == compare(*pair, seed=3)
    assert compare(*pair, seed=3).differences[1].low != compare(*pair, seed=4).differences[1].low


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(
        values.mean() + half, abs=0.02
    )
    assert all(math.isnan(limit) for limit in bootstrap_interval(values[:4]))


def test_drawing_in_pieces_gives_the_same(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("nnssl_adapt.evaluation.compare._AT_ONCE", 50 * 700)
    assert bootstrap_interval(values) == pytest.approx(whole, abs=1e-12)


def test_signed_ranks():
    values = np.array([0.3, -0.1, 0.2, 0.5, 0.4, -0.05, 0.6])
    assert signed_rank_p(values) == wilcoxon(values).pvalue
    assert signed_rank_p(np.append(values, [0, 1e-15])) == wilcoxon(values).pvalue
    assert signed_rank_p(np.zeros(6)) == 1 and math.isnan(signed_rank_p(np.ones(1)))


def test_holm_by_hand():
    # Sorted: 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.6 × 1; the NaN is no test.
    assert holm([0.03, 0.01, math.nan, 0.6, 0.02]) == pytest.approx([0.06, 0.04, math.nan, 0.6, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_for_distances_lower_is_better(tmp_path):
    a = write_summary(tmp_path / "a.json", {f"c{n}": (5.0 + n,) for n in range(6)}, "HD95")
    b = write_summary(tmp_path / "b.json", {f"c{n}": (4.0,) for n in range(6)}, "HD95")
    comparison = compare(load_results(a, "HD95"), load_results(b, "HD95"), "HD95")
    (cord,) = comparison.differences  # one class needs no mean over classes
    assert (cord.better, cord.worse) == (6, 0) and cord.mean == pytest.approx(-3.5)
    assert "lower is better" in comparison_table(comparison)


def test_a_volume_error_counts_without_its_sign(tmp_path):
    path = write_summary(tmp_path / "a.json", {"c": (-0.5, 0.25)}, "VolumeError")
    assert load_results(path, "VolumeError").values == {"c": {"cord": 0.5, "lesion": 0.25}}


def test_a_model_folder_means_all_its_folds(tmp_path):
    for fold, case in ((0, "a"), (1, "b"), ("all", "a")):
        write_summary(tmp_path / f"fold_{fold}" / "validation" / "summary.json", {case: (0.5, 0.6)}, names=None)
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MR"},
                "labels": {"background": 0, "cord": 1, "lesion": 2},
                "numTraining": 2,
                "file_ending": ".nii.gz",
            }
        )
    )
    assert load_results(tmp_path).values == {name: {"cord": 0.5, "lesion": 0.6} for name in "ab"}
    assert list(load_results(tmp_path / "fold_1").values) == ["b"]
    write_summary(tmp_path / "fold_1" / "validation" / "summary.json", {"a": (0.5, 0.6)})
    with pytest.raises(CaseError, match="a is in two summaries"):
        load_results(tmp_path)


def test_what_is_refused(results, tmp_path):
    first, second = (load_results(path, name=path.parent.name) for path in results)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "plans.json").write_text("{}")
    with pytest.raises(CaseError, match="no fold of this model has been validated"):
        load_results(tmp_path / "model")
    with pytest.raises(ConfigurationError, match="metric 'dice'"):
        load_results(results[0], "dice")
    with pytest.raises(CaseError, match="has no HD95: run nnssl-adapt evaluate -p .*a -g LABELS"):
        load_results(results[0], "HD95")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match=r"has no summary\.json: make it with"):
        load_results(tmp_path / "empty")
    with pytest.raises(CaseError, match="no such file"):
        load_results(tmp_path / "nowhere")
    strangers = load_results(write_summary(tmp_path / "c.json", {"x": (0.1, 0.2)}), name="c")
    with pytest.raises(CaseError, match=r"a and c have no case in common \(e\.g\. case_0 and x\)"):
        compare(first, strangers)
    other = write_summary(tmp_path / "d.json", {"case_1": (0.1, 0.2)}, names={"1": "heart", "2": "lung"})
    with pytest.raises(CaseError, match="a has cord, lesion.*d has heart, lung"):
        compare(first, load_results(other, name="d"))
    moved = write_summary(tmp_path / "e.json", {"case_1": (0.1, 0.2)}, n_ref=101)
    with pytest.raises(CaseError, match="case_1.*different labels.*100 voxels"):
        compare(first, load_results(moved, name="e"))
    assert second.values


def test_files_and_picture(results, tmp_path):
    comparison = compare(*(load_results(path, name=path.parent.name) for path in results))
    folder = save_comparisons([comparison, comparison], tmp_path / "out")
    content = json.loads((folder / "comparison.json").read_text())
    assert content[0]["differences"][1]["p"] == comparison.differences[1].p
    lines = (folder / "comparison.csv").read_text().splitlines()
    assert lines[0] == "first,second,metric,class,case,difference"
    assert len(lines) == 1 + 2 * (8 + 8 + 7)
    import matplotlib.image

    picture = matplotlib.image.imread(folder / "comparison.png")
    assert picture.shape[1] == 1350 and picture[..., :3].std() > 0.05


def test_only_what_was_measured_alike_is_compared(tmp_path):
    """A surface Dice at 2 mm is better than one at 1 mm, whatever the model."""

    def judged(name, metric, **how):
        path = write_summary(tmp_path / name / "summary.json", {"a": (0.5, 0.6), "b": (0.7, 0.8)}, metric)
        content = json.loads(path.read_text())
        content["nnssl_adapt"].update(how)
        path.write_text(json.dumps(content))
        return path

    one, two = (judged(f"at_{mm}", "NSD", empty="nan", tolerance_mm=mm) for mm in (1.0, 2.0))
    with pytest.raises(CaseError, match=r"different rules"):
        compare(load_results(one, "NSD"), load_results(two, "NSD"), "NSD")
    theirs, strict = judged("nnunet", "Dice"), judged("strict", "Dice", empty="0", tolerance_mm=1.0)
    loose = judged("loose", "Dice", empty="nan", tolerance_mm=2.0)
    assert compare(load_results(theirs), load_results(loose)).differences[0].cases == 2
    with pytest.raises(CaseError, match="empty classes: nan; empty classes: 0"):
        compare(load_results(theirs), load_results(strict))
    for fold, path in enumerate((loose, strict)):
        (tmp_path / "model" / f"fold_{fold}" / "validation").mkdir(parents=True)
        content = json.loads(path.read_text())
        content["metric_per_case"] = content["metric_per_case"][fold : fold + 1]
        (tmp_path / "model" / f"fold_{fold}" / "validation" / "summary.json").write_text(json.dumps(content))
    with pytest.raises(CaseError, match="folds were evaluated differently"):
        load_results(tmp_path / "model")
