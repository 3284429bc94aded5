"""Files that are damaged, foreign or hostile: loading them runs nothing and says what is wrong."""

import io
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from small import assert_same

import numpyro_flows as nf
from numpyro_flows.io import load, save
from numpyro_flows.transforms import DiagonalScale


def rewrite(path, edit=lambda config: None, drop=(), replace=None):
    """Rewrite a file as an attacker or an accident would."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(entries["config.json"])
    edit(config)
    entries["config.json"] = json.dumps(config).encode()
    entries |= replace or {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name not in drop:
                archive.writestr(name, data)


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "flow", nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), DiagonalScale(2)))
    return tmp_path / "flow"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_damaged_files(path):
    data = path.read_bytes()
    for damaged in (b"", data[:-30], data[: len(data) // 2], b"not a zip"):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match="expected a whole file written by `nf.save`, got a dam"
        ):
            load(path)


def test_corrupted_array(path):
    # A bit of a number, so that only the checksum can tell.
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("base_dist.base_dist.scale.npy").header_offset
    data = bytearray(path.read_bytes())
    position = data.index(np.float32(1.0).tobytes(), start)
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"CRC.*base_dist\.base_dist\.scale"):
        load(path)


def test_any_flipped_byte_is_harmless(path):
    flow, data = load(path), path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x5A]) + data[position + 1 :])
        try:
            loaded = load(path)
        except ValueError:
            continue
        assert_same(loaded, flow)


def test_foreign_zip(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(ValueError, match="expected a whole file written by `nf.save`.*config.json"):
        load(tmp_path / "a.npz")


def test_missing_array(path):
    rewrite(path, drop=["transform.log_scale.npy"])
    with pytest.raises(ValueError, match="transform.log_scale"):
        load(path)


def test_other_formats_and_versions(path):
    rewrite(path, lambda config: config.update(version=2))
    with pytest.raises(ValueError, match="format version up to 1, got 2. Upgrade"):
        load(path)
    rewrite(path, lambda config: config.update(format="other"))
    with pytest.raises(ValueError, match="expected the format 'numpyro_flows', got 'other'"):
        load(path)


def edit_transform(name, fields=None):
    def edit(config):
        transform = config["flow"]["distribution"][1]["transform"]["module"]
        transform[0] = name
        if fields is not None:
            transform[1] = fields

    return edit


def test_unknown_class(path):
    rewrite(path, edit_transform("Mystery"))
    with pytest.raises(ValueError, match=r"known module class, got 'Mystery'.*nf\.io\.register"):
        load(path)


@pytest.mark.parametrize(
    "name", ["os.system", "numpyro_flows.load", "Module", "__import__", "MLP.__init__"]
)
def test_module_names_are_looked_up_in_the_registry_alone(path, name):
    rewrite(path, edit_transform(name))
    with pytest.raises(ValueError, match="known module class, got"):
        load(path)


@pytest.mark.parametrize(
    "name", ["biject_to", "constraints", "os.system", "Bernoulli", "Scaled", "Transform"]
)
def test_distribution_names_are_those_of_distributions(path, name):
    def edit(config):
        config["flow"]["distribution"][1]["base_dist"]["distribution"][0] = name

    rewrite(path, edit)
    with pytest.raises(ValueError, match="known distribution class, got"):
        load(path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dim": 2},
        {"dim": 2, "log_scale": 0.0, "__class__": "str"},
        {"dim": 2, "log_scale": 0.0, "forward_and_log_det": None},
    ],
)
def test_fields_are_exactly_those_of_the_class(path, fields):
    rewrite(path, edit_transform("DiagonalScale", fields))
    with pytest.raises(ValueError, match="expected the fields|damaged or foreign"):
        load(path)


@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        ("transform", "ExpTransform", {"_domain": {"constant": "real"}, "tree_flatten": None}),
        ("transform", "ExpTransform", {}),
        ("transform", "ExpTransform", {"domain": {"constant": "real"}}),
        ("constraint", "_GreaterThan", {"upper_bound": 1.0}),
        ("constraint", "_GreaterThan", {"lower_bound": 1.0, "__dict__": {"dict": []}}),
        ("constraint", "dependent_property", {}),
        ("distribution", "Normal", {"loc": 0.0}),
        ("module", "FlowTransform", {}),
        ("array", "x", {}),
    ],
)
def test_malformed_objects(path, kind, name, fields):
    edit = edit_transform("Fixed", {"value": {kind: [name, fields]}})
    rewrite(path, edit)
    with pytest.raises(ValueError, match="expected "):
        load(path)


def test_no_pickles(path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("the file ran code",)

    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    rewrite(path, replace={"transform.log_scale.npy": file.getvalue()})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load(path)


def test_the_root_is_a_flow(path):
    def edit(config):
        config["flow"] = config["flow"]["distribution"][1]["base_dist"]

    rewrite(path, edit)
    with pytest.raises(ValueError, match="expected a flow or a transform, got Indep"):
        load(path)


def test_deep_nesting(path):
    deep = b'{"format": "numpyro_flows", "version": 1, "flow": ' + b'{"list": [' * 10**5
    rewrite(path, replace={"config.json": deep})
    with pytest.raises(ValueError, match="damaged or foreign"):
        load(path)
