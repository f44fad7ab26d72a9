"""Generated checkpoint files are read as they were written, or refused in one sentence; nothing of them runs."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import tempfile

import pytest
import torch
from safetensors.torch import save
from torch.testing import assert_close

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from pe_spatial.encoder.files import CheckpointError, read_checkpoint

MARK = os.path.join(tempfile.gettempdir(), "a_checkpoint_ran")
FUZZ = settings(max_examples=100, derandomize=True, deadline=None, database=None)


class Payload:
    def __reduce__(self):
        return os.mkdir, (MARK,)


names = st.from_regex(r"[a-z]{1,5}(\.[a-z0-9_]{1,5}){0,3}", fullmatch=True).filter(
    lambda n: n.split(".")[0] != "module"
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
tensors = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), st.lists(st.integers(0, 3), max_size=3), dtypes)
states = st.dictionaries(names, tensors, min_size=1, max_size=4)
prefixes = st.lists(st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module"]), max_size=3).map(
    lambda parts: "".join(f"{part}." for part in parts)
)
containers = st.lists(
    st.sampled_from(["state_dict", "model", "weights", "model_state_dict", "net", "teacher", "model_ema"]),
    max_size=2,
    unique=True,
)
harmless = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.datetimes(),
    st.text(min_size=1).map(pathlib.PurePosixPath), st.just(argparse.Namespace(out=pathlib.Path("/x"))),
    st.just(collections.defaultdict(list, a=[1])), st.just(collections.deque([1])), st.just(datetime.timedelta(1)),
    st.just(torch.torch_version.TorchVersion("2.1")), st.sets(st.integers()), st.complex_numbers(),
)  # fmt: skip
beside = st.dictionaries(
    st.sampled_from(["epoch", "args", "optimizer", "meta", "lr"]), st.recursive(harmless, st.lists, max_leaves=3)
)


def zipped(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def read(data, suffix):
    """Return the weights in `data`; None if it is refused as it has to be."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"w{suffix}")
        path.write_bytes(data)
        message = None
        try:
            return {name: value.clone() for name, value in read_checkpoint(path).state.items()}
        except CheckpointError as error:
            message = str(error)
        finally:
            assert not os.path.exists(MARK)
    assert str(path) in message
    assert "\n" not in message
    assert "weights_only" not in message
    return None


@FUZZ
@given(states, prefixes, containers, beside, st.sampled_from([".pt", ".pth", ".ckpt", ".bin", ""]), st.booleans())
def test_what_is_written_is_read(state, prefix, nest, rest, suffix, new_format):
    content = {prefix + name: value for name, value in state.items()}
    for container in nest:
        content = {**rest, container: content}
    found = read(zipped(content, _use_new_zipfile_serialization=new_format), suffix)
    assert found is not None
    assert_close(found, state, rtol=0, atol=0)


@FUZZ
@given(states, containers, st.data())
def test_damaged_files_are_refused_or_read(state, nest, data):
    content = state
    for container in nest:
        content = {container: content}
    kind = data.draw(st.sampled_from(["zip", "legacy", "safetensors"]))
    good = save(state) if kind == "safetensors" else zipped(content, _use_new_zipfile_serialization=kind == "zip")
    if data.draw(st.booleans()):
        keep = data.draw(st.integers(0, len(good) - 1))
        assert read(good[:keep], ".safetensors" if kind == "safetensors" else ".pth") is None or kind == "legacy"
    else:
        damaged = bytearray(good)
        for place in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=8)):
            damaged[place] = data.draw(st.integers(0, 255))
        read(bytes(damaged), ".pth")


@FUZZ
@given(states, containers, st.data())
def test_code_anywhere_is_refused(state, nest, data):
    content = dict(state) | {"x": Payload()}
    for container in nest:
        content = {container: content}
    bad = data.draw(st.sampled_from([content, [content], {"a": (Payload(),), **content}]))
    protocol = data.draw(st.integers(0, 4))
    written = data.draw(st.sampled_from([zipped, lambda x: pickle.dumps(x, protocol=protocol)]))
    assert read(written(bad), data.draw(st.sampled_from([".pt", ".safetensors", ".bin"]))) is None


@FUZZ
@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x08\0\0\0\0\0\0\0{"]))
def test_any_bytes_are_refused(noise, start):
    for suffix in (".pth", ".safetensors"):
        assert read(start + noise, suffix) in (None, {})


def test_a_file_that_contains_itself_is_refused():
    content = {}
    content["model"] = content
    assert read(zipped(content), ".pth") is None
