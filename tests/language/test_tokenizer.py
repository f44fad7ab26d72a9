"""Token ids are the released ones, and a text that does not fit is cut with a warning."""

import builtins
import logging

import pytest
from helpers.golden import read_json

pytest.importorskip("open_clip")

from pe_spatial.language import tokenizer
from pe_spatial.language.tokenizer import tokenize


@pytest.mark.parametrize("context", [32, 72, 77])
def test_ids_are_the_released_ones(golden, context):
    facts = read_json(golden / "clip" / "tokenizer.json")
    assert tokenize(facts["texts"], context).tolist() == facts["ids"][str(context)]


def test_long_text_is_cut_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        ids = tokenize(["word " * 300, "a cat"], 32)
    assert "cut to the 32 tokens of the context: 'word word" in caplog.text
    assert caplog.text.count("...") == 1
    assert ids[0, -1] == ids.max() == 49407
    caplog.clear()
    assert tokenize("word " * 30, 32)[0, -1] == 49407  # fits exactly
    assert not caplog.text


def test_any_script_has_ids():
    ids = tokenize(["犬と猫", "собака", "كلب", "", "😀"], 32)
    assert ids.shape == (5, 32)
    assert (ids.argmax(-1) > 1).tolist() == [True, True, True, False, True]
    assert tokenize([], 32).shape == (0, 32)


def test_absent_library_is_named(monkeypatch):
    def refuse(name, *args, **options):
        if name.startswith("open_clip"):
            raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
        return importing(name, *args, **options)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    tokenizer._tokenizer.cache_clear()
    with pytest.raises(ImportError, match=r"texts need open_clip: pip install 'pe_spatial\[language\]'"):
        tokenize("a cat", 32)
