"""Every YAML that ships composes and is typed; a misspelt key is refused by name."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from unclip.cli.evaluate_pictures import PictureEvaluateConfig
from unclip.cli.launch import SlurmConfig
from unclip.cli.train import CONF, forced
from unclip.config import identity, typed
from unclip.data.embed import EmbedConfig
from unclip.diffusion import Predict, Sampler, SamplerConfig, ScheduleName, Threshold, Timesteps, Weighting
from unclip.errors import ConfigError
from unclip.evaluation.prior import PriorEvaluateConfig
from unclip.models.clip import CLIP
from unclip.train import ClipTrainConfig, DecoderTrainConfig, PriorTrainConfig, UpsamplerTrainConfig

ROOTS = {
    "train_clip": (ClipTrainConfig, ["run=r", "data.path=d"]),
    "embed": (EmbedConfig, ["run=r", "clip=c", "data=d"]),
    "evaluate": (PriorEvaluateConfig, ["run=r", "prior=p", "data.path=d", "data.embeddings=e"]),
    "train_prior": (PriorTrainConfig, ["run=r", "data.path=d", "data.embeddings=e"]),
    "train_decoder": (DecoderTrainConfig, ["run=r", "data.path=d", "data.embeddings=e"]),
    "train_upsampler": (UpsamplerTrainConfig, ["run=r", "data.path=d"]),
}
SEEN = ["run=r", "drawn.folder=f", "real.split=s"]
EVALUATIONS = {  # KIND of unclip-evaluate
    "prior": ROOTS["evaluate"],
    "pictures": (PictureEvaluateConfig, SEEN),
    "coco": (PictureEvaluateConfig, ["run=r", "drawn.runs=c", "real.coco=o", "clip=j", "inception=w"]),
}
EVALUATIONS["coco_filtered"] = (PictureEvaluateConfig, [*EVALUATIONS["coco"][1], "train.split=t"])
STAGE_OF = {"clip": "train_clip", "prior": "train_prior", "decoder": "train_decoder", "upsampler": "train_upsampler"}


def composed(root: str, overrides: list[str]):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose(root, [forced(o) for o in overrides])
    if "launch" in raw:
        drop_launch(raw)
    kind = next((o.removeprefix("evaluation=") for o in overrides if o.startswith("evaluation=")), None)
    return typed(raw, EVALUATIONS[kind][0] if kind else ROOTS[root][0])


def drop_launch(raw: DictConfig) -> None:
    """Type the settings that the launcher reads and the command does not see."""
    with open_dict(raw):
        assert typed(OmegaConf.create(OmegaConf.to_container(raw.launch, resolve=True)), SlurmConfig).nodes == 1
        del raw.launch


def shipped() -> list[tuple[str, list[str]]]:
    cases: list[tuple[str, list[str]]] = [(root, []) for root in ROOTS]
    for path in sorted(CONF.glob("experiment/*.yaml")):
        stage = next((s for s in STAGE_OF if f"_{s}" in path.stem), "decoder")  # base128
        asked = ["data.others=[{path: second}]"] if path.stem == "paper_clip" else []
        cases.append((STAGE_OF[stage], [f"experiment={path.stem}", *asked]))
    cases += [("evaluate", [f"evaluation={path.stem}"]) for path in sorted(CONF.glob("evaluation/*.yaml"))]
    cases += [("embed", [f"launch={path.stem}"]) for path in sorted(CONF.glob("launch/*.yaml"))]
    cases += [("train_decoder", [f"logger={path.stem}"]) for path in sorted(CONF.glob("logger/*.yaml"))]
    sweeps = {path.stem: "evaluate" if "guidance" in path.stem else "train_prior" for path in CONF.glob("sweep/*.yaml")}
    cases += [(root, [f"sweep={name}"]) for name, root in sorted(sweeps.items())]
    priors = ("ar_prior", "diffusion_prior", "eclipse_prior", "identity", "linear_prior", "mlp_prior")
    cases += [("train_prior", [f"model={name}"]) for name in priors]
    cases += [("train_decoder", [f"trainer={path.stem}"]) for path in sorted(CONF.glob("trainer/*.yaml"))]
    return cases


def test_every_yaml_is_among_the_cases():
    covered = {f"{root}.yaml" for root in ROOTS} | {"hydra_quiet.yaml"}
    covered |= {f"{overrides[0].replace('=', '/')}.yaml" for _, overrides in shipped() if overrides}
    covered |= {f"model/{name}.yaml" for name in ("clip", "decoder", "upsampler")}
    assert {str(p.relative_to(CONF)) for p in Path(CONF).rglob("*.yaml")} == covered


@pytest.mark.parametrize(("root", "overrides"), shipped())
def test_config_is_valid(root: str, overrides: list[str]):
    cls, needed = ROOTS[root]
    if overrides and overrides[0].startswith("evaluation="):
        cls, needed = EVALUATIONS[overrides[0].removeprefix("evaluation=")]
    assert isinstance(composed(root, needed + overrides), cls)


def test_the_papers_clip_is_vit_h_16_on_two_data_sets_in_equal_parts():
    given = ["run=r", "data.path=first", "experiment=paper_clip"]
    with pytest.raises(ConfigError, match=r"data\.others is not set"):
        composed("train_clip", given)
    cfg = composed("train_clip", [*given, "data.others=[{path: second}]"])
    assert [(other.path, other.weight) for other in cfg.data.others] == [("second", cfg.data.weight)]
    with torch.device("meta"):
        clip = CLIP(cfg.model)
    blocks = clip.model.visual.transformer.resblocks
    assert (len(blocks), clip.model.visual.conv1.weight.shape) == (32, (1280, 3, 16, 16))
    assert (clip.image_size, clip.interface().embed_dim, clip.interface().text_width) == (256, 1024, 1024)
    assert 0.9e9 < sum(p.numel() for p in clip.parameters()) < 1.1e9


def test_the_papers_clip_averages_no_weights():
    given = ["run=r", "data.path=d", "experiment=paper_clip", "data.others=[{path: e}]"]
    assert composed("train_clip", given).optim.ema_decay == 0


@pytest.mark.parametrize("root", ["train_prior", "train_decoder"])
def test_every_sampling_and_diffusion_setting_is_reachable(root: str):
    sampling = "model.sampling"
    given = [
        *ROOTS[root][1],
        *(f"{sampling}.guidance.{value}" for value in ("scale=0.5", "interval=[0.2,0.8]", "rescale=0.7")),
        f"{sampling}.guidance.threshold=dynamic",
        *(f"{sampling}.sampler.{value}" for value in ("name=heun", "num_steps=15")),
        *("model.diffusion.schedule=linear", "model.diffusion.predict=v", "model.diffusion.weighting=p2"),
        *("model.diffusion.learned_variance=false", "model.diffusion.timesteps=logit_normal"),
        "model.diffusion.clip_range=3.0",
        *(["model.diffusion.resolution=256"] if root == "train_decoder" else []),
    ]
    model = composed(root, given).model
    assert model.diffusion.clip_range == 3.0
    guidance = model.sampling.guidance
    assert (guidance.scale, list(guidance.interval), guidance.rescale) == (0.5, [0.2, 0.8], 0.7)
    assert guidance.threshold is Threshold.dynamic
    assert model.sampling.sampler == SamplerConfig(Sampler.heun, 15)
    diffusion = model.diffusion
    assert (diffusion.schedule, diffusion.predict) == (ScheduleName.linear, Predict.v)
    assert (diffusion.weighting, diffusion.timesteps) == (Weighting.p2, Timesteps.logit_normal)
    assert diffusion.resolution == (256 if root == "train_decoder" else None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sampling.guidance.scale=-1"], "give it as the negative one"),
        (["sampling.sampler.eta=0.5"], r"set sampler\.name=ddim"),
        (
            ["diffusion.timesteps=logit_normal", "diffusion.learned_variance=true", "diffusion.clip_range=1.0"],
            "set timesteps=uniform or low_discrepancy",
        ),
    ],
)
def test_a_contradiction_in_the_config_is_refused_with_its_advice(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        composed("train_decoder", [*ROOTS["train_decoder"][1], *(f"model.{setting}" for setting in settings)])


@pytest.mark.parametrize("root", ["train_prior", "train_decoder", "train_upsampler"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["diffusion.num_timesteps=10", "sampling.sampler.num_steps=11"],
            "num_steps is 11, but diffusion.num_timesteps=10",
        ),
        (["sampling.guidance.threshold=dynamic", "diffusion.clip_range=null"], "threshold=dynamic needs a known range"),
        (
            ["sampling.sampler.name=karlo", "diffusion.schedule=flow", "diffusion.predict=flow"],
            "not for diffusion.schedule=flow",
        ),
    ],
)
def test_sampling_that_the_diffusion_cannot_have_is_refused_before_training(
    root: str, settings: list[str], message: str
):
    given = ["model.diffusion.learned_variance=false", *(f"model.{setting}" for setting in settings)]
    with pytest.raises(ConfigError, match=message):
        composed(root, [*ROOTS[root][1], *given])


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_misspelt_key_is_refused_by_name(prefix: str):
    with pytest.raises(ConfigError, match=r"unknown option 'model\.net\.widht'; did you mean 'width'"):
        composed("train_prior", [*ROOTS["train_prior"][1], f"{prefix}model.net.widht=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rnu=x", "unknown option 'rnu'; did you mean 'run'"),
        ("optim.lr=fast", r"optim\.lr='fast' is not a valid float"),
        ("trainer.precision=fp8", "is not one of: fp32, bf16"),
        ("model.sampling.sampler.eta=0.5", "eta applies to ddim only"),
        ("logger.offline=true", "offline applies to wandb only"),
        ("model.net=3", r"model\.net must be a group of settings"),
        ("model.diffusion.learned_variance=yes please", "is not a valid bool"),
        ("model=clip", r"model\.kind=clip does not fit this command; choose one of: ar_prior, diffusion_prior"),
        ("trainer.batch_size=3 trainer.devices=2", "it must be a multiple of"),
    ],
)
def test_wrong_values_are_refused(override: str, message: str):
    overrides = override.split(" ") if "trainer" in override else [override]
    with pytest.raises(ConfigError, match=message):
        composed("train_prior", ROOTS["train_prior"][1] + overrides)


def test_missing_run_is_asked_for():
    with pytest.raises(ConfigError, match="run is not set; give it on the command line: run="):
        composed("train_prior", ["data.path=d"])


def test_identity_leaves_out_what_may_change():
    names = identity(composed("train_decoder", ROOTS["train_decoder"][1]))
    assert "optim.lr" in names
    assert "model.net.channels" in names
    assert "trainer.batch_size" in names
    assert not {"trainer.devices", "trainer.log_every", "logger.name", "data.num_workers"} & set(names)


def test_a_misspelt_key_is_named_before_the_one_it_leaves_unset():
    with pytest.raises(ConfigError, match=r"unknown option 'data\.pth'; did you mean 'path'"):
        composed("train_prior", ["run=r", "data.pth=d"])


def test_sam_is_refused_where_gradients_are_sharded():
    with pytest.raises(ConfigError, match=r"take trainer\.strategy=ddp, or optim\.sam_rho=0"):
        composed("train_clip", ["run=r", "data.path=d", "optim.sam_rho=0.1", "trainer.strategy=fsdp2"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer.strategy=fsdp"], "take fsdp2, which replaces fsdp"),
        (["trainer.strategy=deepspeed"], "not one of auto, ddp, fsdp2"),
        (["trainer.strategy=fsdp2", "trainer.compile=true"], "leave one of them out"),
        (["trainer.strategy=fsdp2", "optim.muon_lr=0.02"], "Muon needs whole matrices"),
        (["trainer.checkpoint=whole"], "not one of auto, sharded, full"),
        (["trainer.checkpoint=sharded"], r"only trainer\.strategy=fsdp2 has shares to write"),
        (["trainer.strategy=fsdp2", "model.lora_rank=2"], r"take trainer\.strategy=ddp"),
    ],
)
def test_what_sharding_does_not_go_with_is_refused(given: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        composed("train_clip", ["run=r", "data.path=d", *given])


def test_a_group_keeps_the_settings_that_are_not_named():
    cfg = composed("train_decoder", [*ROOTS["train_decoder"][1], "model.diffusion.num_timesteps=500"])
    assert (cfg.model.diffusion.num_timesteps, cfg.model.diffusion.learned_variance) == (500, True)
    assert cfg.model.diffusion.clip_range == 1.0
    cfg = composed("train_decoder", [*ROOTS["train_decoder"][1], "model.sampling.guidance.scale=3"])
    assert (cfg.model.sampling.guidance.scale, cfg.model.sampling.sampler.num_steps) == (3.0, 250)


def test_coco_is_the_papers_protocol():
    cfg = composed("evaluate", ["evaluation=coco", *EVALUATIONS["coco"][1]])
    assert (cfg.drawn.num, cfg.size, cfg.real.num, cfg.real.coco_split) == (30_000, 256, None, "val2014")
    assert (cfg.drawn.sampling.decoder_guidance, cfg.drawn.sampling.prior_guidance) == (1.25, None)
    assert (cfg.features, cfg.metrics[0].name) == (["inception"], "fid")
    filtered = composed("evaluate", ["evaluation=coco_filtered", *EVALUATIONS["coco_filtered"][1]])
    assert (filtered.features, filtered.filtered_share) == (["clip", "inception"], 0.21), "by what CLIP sees"
    assert (filtered.drawn, filtered.metrics, filtered.size) == (cfg.drawn, cfg.metrics, cfg.size)
