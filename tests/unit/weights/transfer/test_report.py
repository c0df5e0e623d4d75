"""The account as numbers, as a table, as JSON and as a picture."""

import itertools
import json
import sys

import pytest
from support.transfer_pairs import GRID_PATCH, PATCH, pretrained, target

from nnssl_adapt.errors import OutputError, TransferError
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.report import TransferReport
from nnssl_adapt.weights.transfer.rows import SourceRow, TargetRow, percent
from nnssl_adapt.weights.transfer.transfer import scratch_report, transfer_weights


def row(name, fate, shape, part="encoder", fresh=0, reason="", alias_of=None):
    return TargetRow(name, fate, reason, None if fate == "fresh" else name, shape, shape, part, alias_of, fresh)


HAND_MADE = TransferReport(
    rows=(
        row("encoder.stem.convs.0.conv.weight", "adapted", (4, 5), "stem", fresh=5),
        row("encoder.stages.0.blocks.0.conv1.conv.weight", "copied", (60,)),
        row("encoder.stages.0.blocks.0.conv1.all_modules.0.weight", "copied", (60,), alias_of="…"),
        row("encoder.stages.1.blocks.0.conv1.conv.weight", "fresh", (20,), reason="stage 1 is not in the checkpoint"),
        row("decoder.stages.0.convs.0.conv.weight", "copied", (30,), "rest"),
        row("decoder.transpconvs.0.weight", "fresh", (10,), "rest", reason="why not"),
        row("decoder.seg_layers.0.weight", "fresh", (50,), "rest", reason="segmentation head"),
    ),
    source_rows=(SourceRow("encoder.stem.convs.0.conv.weight", "used", "", (4, 5)),),
    notes=("a note",),
    warnings=("a warning",),
    title="Made by hand",
)


def test_coverages_by_hand():
    assert HAND_MADE.coverage == HAND_MADE.encoder_coverage == (15 + 60) / 100
    assert HAND_MADE.decoder_coverage == 30 / 40
    assert HAND_MADE.parameter_coverage == 105 / 190
    assert HAND_MADE.head_modules == {"decoder.seg_layers.0"}
    assert TransferReport(()).coverage == TransferReport(()).decoder_coverage == 0


def test_the_table_ends_with_notes_warnings_and_coverage():
    lines = str(HAND_MADE).splitlines()
    assert lines[0] == "Made by hand"
    assert lines[-3:-1] == ["note: a note", "WARNING: a warning"]
    assert lines[-1] == "75.0% of the encoder is pre-trained, 75.0% of the decoder, 55.3% of all parameters"


def test_percentages_are_all_or_nothing_only_when_they_are():
    shown = [percent(value) for value in (0, 1e-6, 0.5, 1 - 1e-6, 1)]
    assert shown == ["0.0%", "0.1%", "50.0%", "99.9%", "100.0%"]
    assert [percent(value, 0) for value in (0.001, 0.999, 1)] == ["1%", "99%", "100%"]


def test_reasons_that_differ_in_numbers_share_a_line():
    source = pretrained()
    text = str(transfer_weights(source.checkpoint, target(features_per_stage=[5, 9, 13])))
    assert len(text.splitlines()) < 30
    assert "alike" in text


def reports():
    source = pretrained("Primus", patch=GRID_PATCH)
    yield transfer_weights(source.checkpoint, target("Primus", patch=GRID_PATCH))
    yield transfer_weights(pretrained().checkpoint, target(features_per_stage=[16, 24, 40]), scope="encoder+decoder")
    yield scratch_report(target())
    yield HAND_MADE


@pytest.mark.parametrize("index", range(4))
def test_a_saved_report_is_the_same_when_loaded(tmp_path, index):
    report = list(reports())[index]
    loaded = TransferReport.load(report.save(tmp_path / "transfer.json"))
    assert loaded == report
    assert str(loaded) == str(report)


def test_older_files_with_fewer_entries_can_be_loaded():
    content = json.loads(json.dumps(HAND_MADE.to_dict()))
    for key in ("title", "warnings", "notes", "origin", "decoder_coverage"):
        del content[key]
    for entry in content["target"]:
        del entry["fresh_numbers"]
    assert TransferReport.from_dict(content).coverage == 0.8


@pytest.mark.parametrize(
    "content", ['{"target": 3, "source": []}', "[]", '{"target": [{"nam": 1}], "source": []}', "{"]
)
def test_something_else_is_refused_by_name(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(TransferError, match=r"other\.json"):
        TransferReport.load(tmp_path / "other.json")
    with pytest.raises(TransferError, match=r"nowhere\.json"):
        TransferReport.load(tmp_path / "nowhere.json")


# -- the picture -----------------------------------------------------------------------------------------------------


def bars(figure):
    """Module → {colour: share of its bar}."""
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    shares = {name: {} for name in names}
    for patch in axes.patches:
        if patch.get_width() > 0:
            shares[names[round(patch.get_y() + patch.get_height() / 2)]][patch.get_facecolor()] = patch.get_width()
    return shares


def test_bars_have_the_shares_of_the_account():
    shares = bars(HAND_MADE.plot())
    assert list(shares) == ["stem", "encoder stage 0", "encoder stage 1", "decoder stage 0", "segmentation heads"]
    copied, fresh = (next(iter(shares[name])) for name in ("encoder stage 0", "encoder stage 1"))
    assert copied != fresh
    assert shares["encoder stage 0"] == {copied: 1}
    assert shares["encoder stage 1"] == shares["segmentation heads"] == {fresh: 1}
    assert shares["decoder stage 0"] == {copied: pytest.approx(0.75), fresh: pytest.approx(0.25)}
    adapted = next(colour for colour in shares["stem"] if colour != fresh)
    assert adapted not in (copied, fresh)
    assert shares["stem"] == {adapted: pytest.approx(0.75), fresh: pytest.approx(0.25)}


def test_colours_differ_in_lightness_too():
    colours = {colour for share in bars(HAND_MADE.plot()).values() for colour in share}
    lightness = sorted(0.3 * r + 0.6 * g + 0.1 * b for r, g, b, _ in colours)
    assert len(lightness) == 3
    assert min(b - a for a, b in itertools.pairwise(lightness)) > 0.1


def test_a_transformer_is_drawn_block_by_block():
    source = pretrained("Primus", patch=GRID_PATCH, eva_depth=11)
    report = transfer_weights(source.checkpoint, target("Primus", patch=GRID_PATCH, eva_depth=12))
    names = list(bars(report.plot()))
    assert names == [
        *("patch embedding", "positions", *(f"block {i}" for i in range(12))),
        *("last norm", "decoder", "segmentation heads"),
    ]


def test_legend_and_title_say_what_is_seen(tmp_path):
    source = pretrained()
    report = transfer_weights(source.checkpoint, build_network(source.checkpoint.architecture, 2, 3, PATCH))
    figure = report.plot(tmp_path / "new" / "transfer.png")
    assert (tmp_path / "new" / "transfer.png").stat().st_size > 5000
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["copied", "adapted", "fresh (as initialised)"]
    assert "ResidualEncoderUNet" in figure.get_suptitle()
    assert "100% of the encoder, 0% of the decoder" in figure.get_suptitle()


def test_no_state_of_pyplot_is_touched():
    before = "matplotlib.pyplot" in sys.modules
    HAND_MADE.plot()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        HAND_MADE.plot(tmp_path / "file" / "transfer.png")
    with pytest.raises(OutputError, match="can't be written"):
        HAND_MADE.plot(tmp_path / "transfer.unknown")
