"""What is no Karlo is refused in words, before anything is written; nothing in a file is ever run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests_support import Canary
from tiny_karlo import components, text_to_image

from unclip.errors import ArtifactError, ConfigError, UnclipError
from unclip.interop.karlo import import_karlo


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "t2i"
    text_to_image(components()).save_pretrained(folder)
    return folder


def edited(path: str, **values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / path
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def cut(folder: Path) -> None:
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def renamed_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_inn.weight"] = state.pop("conv_in.weight")
    save_file(state, file)


def other_words(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    found = json.loads(file.read_text())
    words = found["model"]["vocab"]
    words["horse</w>"], words["house</w>"] = words["house</w>"], words["horse</w>"]
    file.write_text(json.dumps(found))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another pipeline": (
        edited("model_index.json", _class_name="StableDiffusionPipeline"),
        "is a StableDiffusionPipeline; only UnCLIPPipeline",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), "neither model_index.json nor .ckpt files"),
    "damaged index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is damaged"),
    "missing sub-folder": (lambda f: shutil.rmtree(f / "text_proj"), "text_proj is missing, which model_index.json names"),
    "missing entry": (edited("model_index.json", decoder=None), "names None as decoder where UNet2DConditionModel"),
    "wrong class": (
        edited("model_index.json", prior=["diffusers", "UNet2DModel"]), "names UNet2DModel as prior where PriorTransformer"
    ),
    "wrong class inside": (edited("prior/config.json", _class_name="UNet2DModel"), "describes a UNet2DModel, not a Prior"),
    "wrong encoder": (
        edited("text_encoder/config.json", architectures=["CLIPTextModel"]), "describes CLIPTextModel where CLIPTextModelW"
    ),
    "weights of another shape": (edited("prior/config.json", num_layers=3), "prior does not hold the weights that its"),
    "wider prior": (edited("prior/config.json", num_attention_heads=4), r"has the shape"),
    "renamed weight": (renamed_weight, "1 missing, such as net.unet.conv_in.weight; 1 unknown"),
    "another net": (edited("decoder/config.json", down_block_types=["DownBlock2D"] * 2), "down_block_types has DownBlock2D"),
    "another option": (edited("decoder/config.json", act_fn="gelu"), "act_fn is 'gelu'; only 'silu' can be imported"),
    "unknown option": (edited("prior/config.json", new_thing=7), "the setting new_thing=7 is unknown here"),
    "another schedule": (
        edited("decoder_scheduler/scheduler_config.json", beta_schedule="linear"), "beta_schedule is 'linear'"
    ),
    "variance without channels": (
        edited("decoder_scheduler/scheduler_config.json", variance_type="fixed_small_log"), "out_channels is 6"
    ),
    "unequal upsamplers": (edited("super_res_last/config.json", norm_num_groups=16), "nets of different shapes"),
    "no weights": (
        lambda f: (f / "prior" / "diffusion_pytorch_model.safetensors").unlink(), "prior holds no weights: neither"
    ),
    "file cut short": (cut, "cannot be read"),
    "another vocabulary": (other_words, "captions of this pipeline have other words than CLIP's"),
    "another CLIP": (edited("prior/config.json", num_embeddings=60), "captions of up to 60 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_and_nothing_is_written(whole: Path, tmp_path: Path, case: str):
    folder = shutil.copytree(whole, tmp_path / "t2i")
    spoil, message = CASES[case]
    spoil(folder)
    with pytest.raises(UnclipError, match=message):
        import_karlo(folder, tmp_path / "runs")
    assert not [*(tmp_path / "runs").glob("*")]


@pytest.mark.parametrize("inside", ["zip", "bare"])
def test_a_pickle_that_runs_code_does_not_run(whole: Path, tmp_path: Path, inside: str):
    folder = shutil.copytree(whole, tmp_path / "t2i")
    (folder / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    file, canary = folder / "prior" / "diffusion_pytorch_model.bin", tmp_path / "sung"
    state = {"proj_in.weight": torch.zeros(2), "song": Canary(canary)}
    if inside == "zip":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    with pytest.raises(ArtifactError, match=r"(holds more than weights; it was not loaded|cannot be read)"):
        import_karlo(folder, tmp_path / "runs")
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()


def test_a_missing_licence_is_told(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    import_karlo(whole, tmp_path / "runs")
    assert "holds no licence text. Karlo's weights are under CreativeML Open RAIL-M" in caplog.text
    with pytest.raises(ConfigError, match=r"clip is there already: give another --out"):
        import_karlo(whole, tmp_path / "runs")


def test_a_prior_that_was_never_trained_is_refused(whole: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(whole, tmp_path / "t2i")
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "clip_std": torch.zeros(1, 32)}, file)
    with pytest.raises(ArtifactError, match="clip_std is not positive"):
        import_karlo(folder, tmp_path / "runs")


def test_what_went_wrong_while_writing_leaves_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from unclip.interop import foreign

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(foreign, "_write_stage", fail)
    with pytest.raises(OSError, match="disk full"):
        import_karlo(whole, tmp_path / "runs")
    assert not [*(tmp_path / "runs").glob("*")]


def test_places_that_are_none(tmp_path: Path, whole: Path):
    with pytest.raises(ConfigError, match="is not a folder"):
        import_karlo(tmp_path / "nowhere", tmp_path / "runs")
    with pytest.raises(ConfigError, match="holds a UNet2DConditionModel, which is no whole pipeline"):
        import_karlo(whole / "decoder", tmp_path / "runs")
