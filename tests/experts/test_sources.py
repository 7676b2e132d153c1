"""Local folders, the hub's cache on disk, links and pickles. Nothing here touches the network."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from loraweave.errors import LoraweaveError
from loraweave.experts.inspection import inspect
from loraweave.experts.reader import fingerprint, read_expert, read_experts

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(make_adapter, tmp_path):
    """A hub cache as ``huggingface_hub`` lays it out: blobs, links to them in snapshots, and refs that name commits."""
    repo = tmp_path / "cache" / "models--someone--some-lora"
    for commit, subfolder, alpha in ((COMMIT, "", 8), (COMMIT, "inner/deep", 12), (OLDER, "", 4)):
        folder = make_adapter(name=f"made-{commit[0]}-{alpha}", lora_alpha=alpha)
        snapshot = repo / "snapshots" / commit / subfolder
        snapshot.mkdir(parents=True, exist_ok=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            blob = repo / "blobs" / f"{commit}-{alpha}-{name}"
            shutil.copy(folder / name, blob)
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "v1").write_text(OLDER)
    return tmp_path / "cache"


def scale(expert):
    return next(iter(expert.factors.values())).scale


def test_hub_id_from_the_cache(cache):
    expert = read_expert("someone/some-lora", cache_dir=cache, local_files_only=True)
    assert (expert.name, expert.source, expert.revision, scale(expert)) == (
        "some-lora",
        "someone/some-lora",
        COMMIT,
        2.0,
    )
    assert fingerprint("someone/some-lora", cache_dir=cache, local_files_only=True) == expert.sha256
    report = inspect("someone/some-lora", cache_dir=cache, local_files_only=True)
    assert (report.revision, report.mixable, report.sha256) == (COMMIT, True, expert.sha256)


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_revisions(cache, revision):
    options = {"cache_dir": cache, "local_files_only": True}
    for expert in (
        read_expert("someone/some-lora", revision=revision, **options),
        read_expert(f"someone/some-lora@{revision}", **options),
        read_expert(f"someone/some-lora@{revision}", revision=revision, **options),
    ):
        assert (expert.revision, scale(expert)) == (OLDER, 1.0)
    with pytest.raises(LoraweaveError, match="names revision 'main', but revision='v1' was given; keep one"):
        read_expert("someone/some-lora@main", revision="v1", **options)
    with pytest.raises(LoraweaveError, match="could not be had from the hub"):
        read_expert("someone/some-lora@v2", **options)


def test_subfolders(cache):
    expert = read_expert("someone/some-lora/inner/deep@main", cache_dir=cache, local_files_only=True)
    assert (expert.name, expert.revision, scale(expert)) == ("deep", COMMIT, 3.0)
    with pytest.raises(LoraweaveError, match=r"inner.adapter_config\.json: file is missing.* subfolders deep have one"):
        read_expert("someone/some-lora/inner", cache_dir=cache, local_files_only=True)


def test_a_folder_inside_the_cache(cache):
    folder = cache / "models--someone--some-lora" / "snapshots" / COMMIT
    assert read_expert(folder).revision == COMMIT
    assert read_expert(folder / "inner" / "deep").revision == COMMIT


def test_offline_by_environment(cache, monkeypatch):
    """The variable is read when huggingface_hub is imported; its constant is what it sets."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert read_expert("someone/some-lora", cache_dir=cache).revision == COMMIT
    with pytest.raises(
        LoraweaveError, match=r"someone/other: no such folder here, and it could not be had from the hub"
    ):
        read_expert("someone/other", cache_dir=cache)


def test_several_from_cache_and_disk(cache, make_adapter):
    sources = {"hub": "someone/some-lora", "disk": make_adapter(lora_alpha=16)}
    experts = read_experts(sources, cache_dir=cache, local_files_only=True)
    assert [(expert.name, scale(expert)) for expert in experts] == [("hub", 2.0), ("disk", 4.0)]


def test_a_local_folder_wins(cache, make_adapter, tmp_path, monkeypatch):
    shutil.copytree(make_adapter(lora_alpha=20), tmp_path / "someone" / "some-lora")
    monkeypatch.chdir(tmp_path)
    expert = read_expert("someone/some-lora", cache_dir=cache, local_files_only=True)
    assert (expert.revision, scale(expert)) == (None, 5.0)
    with pytest.raises(LoraweaveError, match="is a local folder and has no revisions"):
        read_expert("someone/some-lora", revision="v1")


@pytest.mark.parametrize(
    "source", ["qa", "./loras/qa", "/loras/qa", "a/../b", "../a/b", "a b/c", "", "a/b@", "owner/name\n"]
)
def test_neither_folder_nor_hub_id(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source:
        with pytest.raises(LoraweaveError, match="no such folder; expected a PEFT folder"):
            read_expert(source, local_files_only=True)
    else:
        with pytest.raises(LoraweaveError, match=r"adapter_config\.json: file is missing"):
            read_expert(source, local_files_only=True)


def test_missing_files(make_adapter, tmp_path):
    folder = make_adapter(name="whole")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        partial = shutil.copytree(folder, tmp_path / name)
        (partial / name).unlink()
        with pytest.raises(LoraweaveError, match=rf"{name}.{name}: file is missing; expected a PEFT folder with"):
            read_expert(partial)


def test_the_folder_above(make_adapter, tmp_path):
    make_adapter(name="all/first")
    make_adapter(name="all/second")
    with pytest.raises(LoraweaveError, match="its subfolders first, second have one: name one of them"):
        read_expert(tmp_path / "all")


def test_pickled_weights_and_the_advice_that_helps(make_adapter, tmp_path, monkeypatch):
    folder = make_adapter()
    expected = read_expert(folder)
    weights = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    for source in (folder, folder / "adapter_model.bin"):
        with pytest.raises(LoraweaveError, match=r"adapter_model\.bin: pickled weights are refused") as caught:
            read_expert(source)
    with pytest.raises(LoraweaveError, match="pickled weights are refused"):
        inspect(folder)
    first, second = str(caught.value).split("`")[1::2]
    monkeypatch.chdir(folder)
    exec(f"{first}\n{second}", {})
    assert read_expert(folder).factors.keys() == expected.factors.keys()


def test_a_weight_file_instead_of_its_folder(make_adapter):
    folder = make_adapter()
    with pytest.raises(LoraweaveError, match=r"adapter_model\.safetensors: is a file; expected the folder"):
        read_expert(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_that_leave_the_folder(make_adapter, tmp_path, name):
    folder, outside = make_adapter(), tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(
        LoraweaveError, match=rf"{name}: leads outside its folder, to .*outside; put the file itself there"
    ):
        read_expert(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(LoraweaveError, match=rf"{name}: is a link to nothing"):
        read_expert(folder)


def test_links_within_the_folder_and_to_the_folder(make_adapter, tmp_path):
    folder = make_adapter()
    (folder / "adapter_model.safetensors").rename(folder / "weights")
    (folder / "adapter_model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to(folder)
    assert read_expert(tmp_path / "alias").factors


def test_a_cache_link_that_leaves_its_repository(cache, tmp_path):
    path = cache / "models--someone--some-lora" / "snapshots" / COMMIT / "adapter_model.safetensors"
    shutil.copy(path, tmp_path / "outside")
    path.unlink()
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(LoraweaveError, match="leads outside its folder"):
        read_expert("someone/some-lora", cache_dir=cache, local_files_only=True)
