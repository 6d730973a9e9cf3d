"""The same parameters are not the same model: configuration, tokenizer and code count, too."""

from __future__ import annotations

import json
import math
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import merged, tiny_model
from safetensors.numpy import save_file

import meerkat
from meerkat.config import ModelSection, Runtime, parse_recipe
from meerkat.errors import JournalError, MaskError
from meerkat.models.loading import load_model, probe_logits
from meerkat.spaces.mask_file import Mask, load_mask, save_mask
from meerkat.transport.client_frames import Hello, decode_up
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof, difference, same_probe
from meerkat.transport.server_frames import Setup, decode_down

RUNTIME = Runtime(device="cpu")


def edited(source: Path, to: Path, file: str, **fields: object) -> Path:
    """A copy of a model's folder with fields of one of its JSON files changed."""
    shutil.copytree(source, to)
    content = json.loads((to / file).read_text("utf-8"))
    (to / file).write_text(json.dumps({**content, **fields}), "utf-8")
    return to


def loaded(folder: Path):
    return load_model(ModelSection(name=str(folder), dtype="float32"), RUNTIME)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"rms_norm_eps": 1e-2}),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
        ("tokenizer_config.json", {"bos_token": "</s>"}),
    ],
    ids=["eps", "theta", "tokenizer"],
)
def test_a_change_beside_the_parameters_is_seen(
    tiny_folder: Path, tmp_path: Path, file: str, fields: dict
) -> None:
    before = loaded(tiny_folder)
    after = loaded(edited(tiny_folder, tmp_path / "model", file, **fields))
    assert after.fingerprint == before.fingerprint
    if file == "config.json":
        assert after.configuration != before.configuration
        assert after.probe != before.probe
    else:
        tokens = [one.tokenizer.bos_token_id for one in (before, after)]
        assert tokens[0] != tokens[1]


def test_where_a_model_lies_does_not_matter(tiny_folder: Path, tmp_path: Path) -> None:
    before, after = loaded(tiny_folder), loaded(shutil.copytree(tiny_folder, tmp_path / "copy"))
    assert after.configuration == before.configuration
    assert same_probe(after.probe, before.probe)


def test_a_run_does_not_go_on_with_another_configuration(
    tiny_recipe_data: dict, tiny_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    data = merged(tiny_recipe_data, model={"name": str(model)})
    meerkat.run(parse_recipe(data), tmp_path / "run", observers=())
    (tmp_path / "run" / "journal.sqlite").rename(tmp_path / "kept")
    shutil.copy(tmp_path / "kept", tmp_path / "run" / "journal.sqlite")
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}), "utf-8")
    with pytest.raises((MaskError, JournalError), match="configuration"):
        meerkat.evaluate(tmp_path / "run")


def test_a_mask_of_another_configuration_is_not_taken_from_the_cache(
    tiny_recipe_data: dict, tiny_folder: Path, tmp_path: Path
) -> None:
    first = meerkat.calibrate(parse_recipe(tiny_recipe_data))
    other = edited(tiny_folder, tmp_path / "model", "config.json", rms_norm_eps=1e-2)
    second = meerkat.calibrate(parse_recipe(merged(tiny_recipe_data, model={"name": str(other)})))
    assert first.path != second.path
    assert first.mask.configuration != second.mask.configuration


def test_probes_are_compared_with_a_tolerance() -> None:
    probe = probe_logits(tiny_model("llama").model)
    assert len(probe) == 8
    assert same_probe([value * 1.01 for value in probe], probe)
    assert not same_probe([value * 1.2 for value in probe], probe)
    assert not same_probe([math.nan] * 8, probe)
    assert not same_probe(probe[:4], probe)
    assert same_probe((), probe)


def test_both_sides_ask_for_configuration_and_probe() -> None:
    run = Proof("ab" * 32, "cd" * 32, "ef" * 32, "12" * 32, (1.0, -2.0))
    assert difference(run, run) is None
    assert "configuration" in str(difference(replace(run, configuration="34" * 32), run))
    assert "other logits" in str(difference(replace(run, probe=(1.0, 2.0)), run))
    assert difference(run, replace(run, configuration="", probe=())) is None  # it does not know
    hello = Hello(1, 2, 3, 4, run)
    assert decode_up(encode(hello)) == hello
    setup = Setup("{}", run, "session", False)
    assert decode_down(encode(setup)) == setup


def test_a_mask_file_that_claims_too_much_takes_no_memory(tmp_path: Path) -> None:
    """344 bytes could ask for 3 GiB: a tensor that is masked as a whole lists no coordinates."""
    path = tmp_path / "mask"
    side = 20_000
    about = {"names": ["w"], "shapes": [[side, side]], "eligible": side**2, "model": "ab" * 32}
    about |= {
        "kind": "full",
        "concentration": None,
        "checksum": "",
        "configuration": "",
        "probe": [],
        "subspace": None,
    }
    metadata = {"format": "meerkat-mask-5", "mask": json.dumps(about)}
    save_file({"x": np.zeros(1, np.float32)}, path, metadata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MaskError, match="is not in the model"):
        load_mask(path, parameters={"w": (8, 8)})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_configuration_and_probe_are_in_the_file(tmp_path: Path) -> None:
    mask = Mask(("w",), ((4,),), (np.arange(2),), 4, "ab" * 32, "random")
    mask = replace(mask, configuration="cd" * 32, probe=(0.5, -1.0))
    save_mask(mask, tmp_path / "mask")
    found = load_mask(tmp_path / "mask")
    assert (found.configuration, found.probe) == (mask.configuration, mask.probe)
