import dataclasses
import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from immunonet import RAILS, DkNN, Maturation, _store

SMALL = Maturation(population=60, neighbours=3, generations=2)
OTHER = Maturation(generations=10, population=18, neighbours=2, temperature=3, mutation_rate=(0.1, 0.2), crossover=None)
ANTIGENS = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(5))
FILE = "defence.json"


def halves(x):
    return x[..., ::2].square()


RAILS_FLAVOURS = {
    "one layer": {"layers": "2"},
    "affine": {"layers": "0"},
    "input": {"layers": "input"},
    "list": {"layers": ["0", "2", "input"]},
    "callable": {"layers": halves},
    "mixed": {"layers": ["2", halves]},
    "space": {"layers": "2", "space": "0"},
    "cell bounds": {"layers": "2", "space": "0", "cell_bounds": [(0, 1), (0, 2), (-1, 1), (0, 1)]},
    "maturations": {"layers": ["2", "5"], "maturation": [SMALL, OTHER]},
    "settings": {"layers": "2", "bounds": [(-1, 2)], "false_alarm": 0.3, "shared_noise": False, "seed": 2**63 - 1},
    "voice": {"layers": "2", "voice": 0.3},
}


@pytest.mark.parametrize("flavour", RAILS_FLAVOURS)
def test_rails_round_trip(flavour, functional_conv, images, tmp_path):
    settings = {"maturation": SMALL, **RAILS_FLAVOURS[flavour]}
    layers = settings.pop("layers")
    rails = RAILS(functional_conv, layers, **settings).fit(*images)
    rails.save(tmp_path)
    loaded = RAILS.load(tmp_path, functional_conv, layers=layers if flavour in ("callable", "mixed") else None)
    assert loaded.layers == rails.layers
    assert loaded.maturations == rails.maturations
    for name in ("space", "bounds", "cell_bounds", "false_alarm", "shared_noise", "seed", "voice", "classes"):
        assert getattr(loaded, name) == getattr(rails, name)
    one, other = (r.respond(ANTIGENS, seed=1 if r.seed is None else None) for r in (rails, loaded))
    for name in ("labels", "votes", "credibility", "foreign", "generations"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.plasma.x, other.plasma.x)
    assert torch.equal(loaded.repertoire.x, rails.repertoire.x)


def test_a_record_older_than_the_voice_has_none(functional_conv, images, tmp_path):
    silent, heard = (RAILS(functional_conv, "2", maturation=SMALL, seed=0, voice=v).fit(*images) for v in (0.0, 0.3))
    heard.save(tmp_path)
    record = json.loads((tmp_path / FILE).read_text())
    assert record["settings"].pop("voice") == 0.3
    del record["checksum"]
    _store.write_json(tmp_path / FILE, record | {"checksum": _store.fingerprint(record)})
    loaded = RAILS.load(tmp_path, functional_conv)
    assert loaded.voice == 0
    assert torch.equal(loaded.predict_proba(ANTIGENS), silent.predict_proba(ANTIGENS))


def test_a_network_with_a_voice_must_be_the_same_beyond_the_layers_too(functional_conv, images, tmp_path):
    RAILS(functional_conv, "2", maturation=SMALL, voice=0.3).fit(*images).save(tmp_path)
    assert RAILS.load(tmp_path, functional_conv).voice == 0.3
    functional_conv[6].bias.data += torch.tensor([1.0, 0.0, -1.0])
    with pytest.raises(ValueError, match="model, which has a voice, gives other logits"):
        RAILS.load(tmp_path, functional_conv)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("layers", ["2", ["0", "5"], halves])
def test_dknn_round_trip(metric, layers, functional_conv, images, tmp_path):
    dknn = DkNN(functional_conv, layers, neighbours=7, metric=metric, false_alarm=0.2).fit(*images)
    dknn.save(tmp_path)
    loaded = DkNN.load(str(tmp_path), functional_conv, layers=layers if callable(layers) else None)
    assert (loaded.neighbours, loaded.metric, loaded.false_alarm) == (7, metric, 0.2)
    for method in ("predict", "p_values", "foreign", "forward"):
        assert torch.equal(getattr(loaded, method)(ANTIGENS), getattr(dknn, method)(ANTIGENS))


@pytest.fixture
def saved(functional_conv, images, tmp_path):
    RAILS(functional_conv, "2", maturation=SMALL, seed=0).fit(*images).save(tmp_path)
    return tmp_path


def tensors_of(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def test_what_is_written(saved):
    assert sorted(p.name for p in saved.iterdir()) == [FILE, tensors_of(saved).name]
    record = json.loads((saved / FILE).read_text())
    assert record["format"] == 2
    assert record["kind"] == "rails"
    assert record["settings"]["maturation"] == [json.loads(json.dumps(dataclasses.asdict(SMALL)))]
    assert record["tensors"]["sha256"] == _store.sha256(tensors_of(saved))


def test_the_model_is_not_saved(saved):
    assert not [name for name in _store.read_tensors(tensors_of(saved)) if "weight" in name]


def test_saving_again_replaces_and_leaves_nothing_else(saved, functional_conv, images):
    before = tensors_of(saved).name
    loaded = RAILS.load(saved, functional_conv)
    loaded.save(saved)
    assert sorted(p.name for p in saved.iterdir()) == [FILE, before]
    x, y = images
    loaded.fit(x.flip(0), y.flip(0)).save(saved)
    assert len(list(saved.iterdir())) == 2
    assert tensors_of(saved).name != before
    assert torch.equal(RAILS.load(saved, functional_conv).predict(ANTIGENS), loaded.predict(ANTIGENS))


def test_layers_again(functional_conv, images, tmp_path):
    RAILS(functional_conv, ["2", halves], maturation=SMALL).fit(*images).save(tmp_path)
    with pytest.raises(ValueError, match="layers must be given again: 'halves' was a callable"):
        RAILS.load(tmp_path, functional_conv)
    with pytest.raises(ValueError, match=r"layers must be 2 as saved, \['2', 'halves'\], got \['2'\]"):
        RAILS.load(tmp_path, functional_conv, layers="2")
    with pytest.raises(ValueError, match="model gives other features at layer '4'"):
        RAILS.load(tmp_path, functional_conv, layers=["2", "4"])


# Files that cannot be used.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def edit(**changes):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_settings(path):
    path.write_text(path.read_text().replace('"false_alarm": 0.05', '"false_alarm": 0.5'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "defence.json is not valid JSON .*truncated"),
        (lambda path: path.write_text("[]"), "defence.json does not describe a defence; give the folder that save"),
        (lambda path: path.write_text('{"a": 1}'), "defence.json does not describe a defence"),
        (edit(format=3), "defence.json has format 3; this version reads formats 1 and 2"),
        (edit(format=None), "defence.json has format None; this version reads formats 1 and 2"),
        (edit(kind="dknn"), "defence.json holds a DkNN, not a RAILS"),
        (edit(kind="rials"), "defence.json holds a defence of kind 'rials'; nearest: rails; register it"),
        (edit(classes=5), "defence.json was edited: its content does not match its checksum"),
        (edit(checksum="0"), "defence.json was edited"),
        (edit_settings, "defence.json was edited"),
        (lambda path: path.write_text('{"format": 1, "defence": "RAILS"}'), "defence.json was edited"),
    ],
)
def test_damaged_records(saved, functional_conv, damage, message):
    damage(saved / FILE)
    with pytest.raises(ValueError, match=message):
        RAILS.load(saved, functional_conv)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.write_bytes(b"")])
def test_damaged_tensors(saved, functional_conv, damage):
    damage(tensors_of(saved))
    with pytest.raises(ValueError, match=r"tensors-.*safetensors was truncated or edited: its sha256 is"):
        RAILS.load(saved, functional_conv)


def test_missing_files(saved, functional_conv, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere.*defence\.json"):
        RAILS.load(tmp_path / "elsewhere", functional_conv)
    tensors_of(saved).unlink()
    with pytest.raises(FileNotFoundError, match=r"tensors-.*\.safetensors does not exist"):
        RAILS.load(saved, functional_conv)
    (saved / FILE).unlink()
    with pytest.raises(FileNotFoundError):
        RAILS.load(saved, functional_conv)


def test_another_defence(saved, functional_conv):
    with pytest.raises(ValueError, match=r"defence\.json holds a RAILS, not a DkNN"):
        DkNN.load(saved, functional_conv)


# Models that the defence was not fitted with.


def scaled(model):
    model[2].weight.data *= 1.05
    model[2].bias.data *= 1.05


def shifted(model):
    model[2].bias.data += 0.1


def retrained(model):
    for parameter in model[2].parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", ["2", "0"])
@pytest.mark.parametrize("change", [scaled, shifted, retrained])
def test_other_weights(functional_conv, images, tmp_path, change, layer):
    # Layer 0 is affine; it is kept reduced, and compared all the same.
    model = functional_conv if layer == "2" else nn.Sequential(nn.Identity(), nn.Identity(), *functional_conv)
    name = "2"
    RAILS(model, name, maturation=SMALL).fit(*images).save(tmp_path)
    change(model)
    with pytest.raises(ValueError, match=r"model gives other features at layer '2' than when .* was saved: load the w"):
        RAILS.load(tmp_path, model)


def test_weights_after_the_layers_do_not_matter(saved, functional_conv):
    expected = RAILS.load(saved, functional_conv).predict(ANTIGENS)
    functional_conv[6].weight.data += 1
    assert torch.equal(RAILS.load(saved, functional_conv).predict(ANTIGENS), expected)


def test_other_models(saved, mlp, conv, functional_conv):
    with pytest.raises(ValueError, match=r"layers='2' is no submodule|model fails on inputs of shape"):
        RAILS.load(saved, mlp)
    with pytest.raises(ValueError, match="layers='2' is no submodule of the model"):
        RAILS.load(saved, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    five = nn.Sequential(*list(functional_conv)[:-1], nn.Linear(36, 5))
    with pytest.raises(ValueError, match=r"model must give 3 logits, as when .* was saved, got 5"):
        RAILS.load(saved, five)
    # The same weights with activations in place are the same model.
    conv.load_state_dict(functional_conv.state_dict())
    assert RAILS.load(saved, conv).predict(ANTIGENS).shape == (6,)


def test_the_model_is_left_in_its_mode(saved, functional_conv):
    functional_conv.train()
    RAILS.load(saved, functional_conv).predict(ANTIGENS)
    assert functional_conv.training


# A full disk.


def half_written(*args, **_):
    (path,) = (part for part in args if hasattr(part, "write_bytes"))
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def safetensors_full(*args, **_):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


FULL = {
    "tensors": lambda patch: patch.setattr(_store, "save_file", half_written),
    "safetensors": lambda patch: patch.setattr(_store, "save_file", safetensors_full),
    "record": lambda patch: patch.setattr("pathlib.Path.write_text", half_written),
    "checksum": lambda patch: patch.setattr(_store, "sha256", half_written),
}


@pytest.mark.parametrize(("where", "changed"), [*((where, True) for where in FULL), ("record", False)])
def test_a_full_disk_keeps_the_old_save(saved, functional_conv, images, monkeypatch, where, changed):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    rails = RAILS.load(saved, functional_conv)
    expected = rails.predict(ANTIGENS)
    if changed:
        rails.fit(images[0].flip(0), images[1].flip(0))
    with monkeypatch.context() as patch:
        FULL[where](patch)
        with pytest.raises(OSError, match="No space left on device"):
            rails.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert torch.equal(RAILS.load(saved, functional_conv).predict(ANTIGENS), expected)
    # With room again, saving works.
    rails.save(saved)
    assert torch.equal(RAILS.load(saved, functional_conv).predict(ANTIGENS), rails.predict(ANTIGENS))


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_leaves_nothing_in_a_new_folder(functional_conv, images, tmp_path, monkeypatch, where):
    rails = RAILS(functional_conv, "2", maturation=SMALL).fit(*images)
    FULL[where](monkeypatch)
    with pytest.raises(OSError, match="No space left on device"):
        rails.save(tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())


def test_a_folder_that_is_a_file(functional_conv, images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RAILS(functional_conv, "2", maturation=SMALL).fit(*images).save(tmp_path / "file")
    shutil.rmtree(tmp_path)
