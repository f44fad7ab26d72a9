"""The figure of scores by layer."""

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from pe_spatial.engine.report import draw_scores


@pytest.mark.parametrize(
    ("scores", "span"), [({0: 50.0, 1: 50.2}, 5.5), ({0: 20.0, 1: 80.0}, 66.0), ({0: float("nan"), 1: 0.0}, 2.0)]
)
def test_small_differences_do_not_fill_the_axis(scores, span, tmp_path, monkeypatch):
    axes = []
    add = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda *args, **keys: axes.append(add(*args, **keys)) or axes[0])
    draw_scores(tmp_path / "scores.png", scores, name="J&F", best=1)
    low, high = axes[0].get_ylim()
    assert high - low == pytest.approx(span, rel=0.01)
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == {
        f"best: {scores[1]:.4g} (layer 1)",
        f"deepest: {scores[1]:.4g} (layer 1)",
    }
