"""The ``unclip`` command: data, imports, pictures and reports."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.draw import edit, generate, inpaint, interpolate, mix, repeat, vary
from unclip.cli.embeddings import export_embeddings, import_embeddings
from unclip.cli.exports import export_diffusers, export_onnx, export_open_clip
from unclip.cli.hub import pull, push
from unclip.cli.karlo import import_karlo
from unclip.cli.latents import edit_verdict, pca_probe, reconstruct, typographic_probe
from unclip.cli.options import Out, Runs, Seed
from unclip.cli.probing import binding_probe, busy_probe, enlarge_probe, sweep_probe, words_probe
from unclip.errors import ArtifactError, ConfigError, told_to_the_user
from unclip.job_notes import note_error

USAGE = 2  # typer's exit code for a command line that it refuses
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="Make data sets: webdataset shards with an index.")
imports = typer.Typer(no_args_is_help=True, help="Turn foreign weights and embeddings into ours.")
exports = typer.Typer(no_args_is_help=True, help="Turn ours into others' layouts.")
app.add_typer(data, name="data")
app.add_typer(imports, name="import")
app.add_typer(exports, name="export")
for command in (generate, vary, interpolate, edit, mix, inpaint, repeat):
    app.command()(command)
for command in (reconstruct, edit_verdict, pca_probe, typographic_probe):
    app.command()(command)
for command in (binding_probe, words_probe, busy_probe, sweep_probe, enlarge_probe):
    app.command()(command)
imports.command("embeddings")(import_embeddings)
imports.command("karlo")(import_karlo)
exports.command("embeddings")(export_embeddings)
exports.command("open-clip")(export_open_clip)
exports.command("diffusers")(export_diffusers)
exports.command("onnx")(export_onnx)
for command in (push, pull):
    app.command()(command)


def main() -> None:
    """Run the command line; errors for users end in one message and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    with told_to_the_user():
        try:
            app()
        except (ConfigError, ArtifactError) as error:
            note_error(error)
            raise
        except SystemExit as end:
            if end.code == USAGE:
                note_error(ConfigError("the command line is refused; the log says why"))
            raise


@data.command()
def shapes(
    out: Out,
    num: Annotated[int, typer.Option(help="Training pictures.")] = 20_000,
    size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pictures.")] = 0,
    objects: Annotated[str, typer.Option(help="Objects a picture, as LOW-HIGH, up to 8.")] = "1-2",
    signs: Annotated[float, typer.Option(help="Share of pictures that hold a sign with a word.")] = 0.0,
) -> None:
    """Generated scenes of coloured solids with captions; nothing is downloaded."""
    from unclip.data.shapes import write_shapes

    low, dash, high = objects.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise ConfigError(f"--objects {objects} is not a range such as 1-2")
    write_shapes(out, num=num, size=size, seed=seed, objects=(int(low), int(high or low)), signs=signs)


@data.command()
def emoji(
    out: Out,
    sizes: Annotated[str, typer.Option(help="Sides in pixels, comma-separated: 64,256 or 64,256,1024.")] = "64,256",
    seed: Seed = 0,
    tones: Annotated[bool, typer.Option(help="Also the variants by skin tone.")] = False,
) -> None:
    """Real pictures: Noto, Twemoji and Fluent emoji with their names as captions, fetched with npm."""
    from unclip.data.emoji import write_emoji

    if not all(part.isdecimal() for part in sizes.split(",")):
        raise ConfigError(f"--sizes {sizes} is not a list of sides such as 64,256")
    write_emoji(out, sizes=tuple(int(part) for part in sizes.split(",")), seed=seed, tones=tones)


@data.command()
def folder(
    src: Annotated[Path, typer.Argument(help="Folder of NAME.jpg|png|webp and NAME.txt, or a .csv, .jsonl, .parquet.")],
    out: Out,
    min_size: Annotated[int, typer.Option(help="Shorter side in pixels that a picture must have.")] = 32,
    val: Annotated[float, typer.Option(help="Share of the pictures for validation.")] = 0.05,
    seed: Seed = 0,
) -> None:
    """Your own pictures: a folder with captions beside them, or a table with the columns path and caption."""
    from unclip.data.folder import write_folder

    for line in write_folder(src, out, min_size=min_size, val=val, seed=seed).lines():
        typer.echo(line)
    typer.echo(f"wrote {out}; {out / 'report.json'} names every refused picture")


@data.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A data set, or one split of it.")],
    min_size: Annotated[int, typer.Option(help="Shorter side in pixels that a picture must have.")] = 32,
) -> None:
    """Read every sample of any webdataset; write its index, or verify the one that is there."""
    from unclip.data.check import check_data

    report = check_data(path, min_size=min_size)
    for split, count in report.samples.items():
        typer.echo(f"{split}: {count} good samples, index {report.index[split]}")
    for name, reason in report.bad.items():
        typer.echo(f"bad: {name}: {reason}")
    if not report.good:
        raise typer.Exit(1)


@imports.command("clip")
def import_clip(
    name: Annotated[str, typer.Argument(help="An open_clip name (ViT-B-32), hf-hub:OWNER/MODEL or local-dir:FOLDER.")],
    out: Out,
    pretrained: Annotated[
        str, typer.Option(help="A pretrained tag, or a local .pt or .safetensors file; hub and folder bring their own.")
    ] = "",
) -> None:
    """Make a CLIP artifact from pretrained weights, without training."""
    from unclip.artifact import Manifest, refuse_run, save
    from unclip.config import to_plain
    from unclip.models.clip import CLIP, CLIPConfig
    from unclip.models.clip_sources import is_foreign
    from unclip.report.run import report_quietly

    if not pretrained and not is_foreign(name):
        raise typer.BadParameter(f"{name} alone has no weights: add --pretrained TAG or --pretrained FILE")
    refuse_run(out)
    model = CLIP(CLIPConfig(name=name, pretrained=pretrained))
    model.fit()
    folder = save(out, model, Manifest("clip", "clip", to_plain(model.cfg), to_plain(model.interface())))
    report_quietly(out)
    typer.echo(f"wrote {folder}")


@app.command("wise-ft")
def wise_ft(
    start: Annotated[Path, typer.Argument(exists=True, help="The CLIP before fine-tuning: a run or an artifact.")],
    tuned: Annotated[Path, typer.Argument(exists=True, help="The CLIP that was fine-tuned from it.")],
    out: Out,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of the fine-tuned weights; the rest is the start's.")
    ] = 0.5,
) -> None:
    """Mix a fine-tuned CLIP with the one that it started from (WiSE-FT), which often keeps more of what that one knew."""
    from unclip.artifact import Manifest, load, refuse_run, save
    from unclip.models.clip import interpolate
    from unclip.report.run import report_quietly

    refuse_run(out)
    (before, first), (model, second) = load(start, kind="clip"), load(tuned, kind="clip")
    interpolate(before, model, share)
    parents = {"start": first.hash, "tuned": second.hash}
    folder = save(out, model, Manifest("clip", "clip", second.config, second.interface, parents))
    report_quietly(out)
    typer.echo(f"wrote {folder}")


@app.command()
def verdict(
    runs: Runs,
    data_path: Annotated[Path, typer.Option("--data", help="A data set made by `unclip data shapes`.")],
    out: Out,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 64,
) -> None:
    """Draw one picture for each of 256 fixed captions and let the oracle read objects, pairs and relations back."""
    from unclip.cli.verdict import judge_runs

    judge_runs(runs, data_path, out, seed=seed, batch_size=batch_size)


@app.command()
def compare(
    runs: Runs,
    split: Annotated[Path, typer.Option("--data", help="One split of a data set, such as DATA/test.")],
    out: Annotated[Path, typer.Option("--out", help="The PNG file to write.")],
    num: Annotated[int, typer.Option(min=1, help="Samples, spread evenly over the split.")] = 32,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 32,
) -> None:
    """A sheet of real pictures beside what the chain draws from their captions and from their own z_i."""
    from unclip.cli.pictures import compare_split

    compare_split(runs, split, out, num=num, seed=seed, batch_size=batch_size)


@app.command()
def measure(
    runs: Runs,
    data_path: Annotated[Path, typer.Option("--data", help="A data set that names concepts and styles: emoji.")],
    judge: Annotated[Path, typer.Option(help="Run of a CLIP of another seed, which looks at the drawn pictures.")],
    num: Annotated[int, typer.Option(min=4, help="Pictures a split at most.")] = 600,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 64,
) -> None:
    """KID, recall and style accuracy of a chain on pictures that it never saw (needs the extra eval)."""
    from unclip.cli.measure import measure as measure_runs

    measure_runs(runs, data_path, judge, num=num, seed=seed, batch_size=batch_size)


@app.command("prior-stats")
def prior_stats(
    run: Annotated[Path, typer.Argument(exists=True, help="Run or artifact of a diffusion prior.")],
    num: Annotated[int, typer.Option(min=1, help="Training samples to average over.")] = 256,
    data_path: Annotated[
        Path | None, typer.Option("--data", help="Data set to take instead of the one it was trained on.")
    ] = None,
    embeddings: Annotated[Path | None, typer.Option(help="Embeddings of that data set.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples looked at together.")] = 64,
) -> None:
    """Gather what a diffusion prior needs for sampler.name=analytic, into its artifact; its lineage stays whole."""
    from unclip.cli.prior_stats import add_statistics

    add_statistics(run, num=num, seed=seed, batch_size=batch_size, data=data_path, embeddings=embeddings)


@app.command()
def ema(
    run: Annotated[Path, typer.Argument(exists=True, help="A finished run with snapshots (optim.ema_profiles).")],
    sigma_rel: Annotated[float, typer.Option(help="Relative width of the average, such as 0.05 or 0.15.")],
    out: Out,
    step: Annotated[int | None, typer.Option(min=1, help="Snapshot to end at; default: the last.")] = None,
) -> None:
    """Make an artifact of a run with an average of the weights whose length is chosen afterwards (post-hoc EMA)."""
    from unclip.ema import reconstruct
    from unclip.report.run import report_quietly

    folder, rest = reconstruct(run, out, sigma_rel, step)
    report_quietly(out)
    typer.echo(
        f"wrote {folder}: sigma_rel {sigma_rel}, {100 * rest:.2g} % of its profile is out of the snapshots' reach"
    )


@app.command()
def plan(
    settings: Annotated[list[str], typer.Argument(help="experiment=… and further settings of the stage's command.")],
) -> None:
    """Parameters, FLOPs, memory a GPU and days of a training, without running it."""
    from unclip.cli.plan import print_plan

    print_plan(settings)


@app.command("zero-shot")
def zero_shot(
    clip: Annotated[Path, typer.Option(exists=True, help="Run or artifact of the CLIP.")],
    split: Annotated[Path, typer.Option("--data", exists=True, help="One split of a data set, such as DATA/val.")],
    classes: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="File with a class name a line.")],
    templates: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File with a caption a line, {} for the class name."),
    ] = None,
    label: Annotated[
        str, typer.Option(help="Field of a sample's metadata that holds its class, by name or number.")
    ] = "label",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")] = 256,
) -> None:
    """Zero-shot accuracy of a CLIP: how often a picture is nearest to its own class name."""
    from unclip.cli.zero_shot import write_accuracy

    write_accuracy(clip, split, classes, templates, label=label, batch_size=batch_size)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs; report.html and summary.json are written there.")],
    minutes: Annotated[float, typer.Option(help="The time budget, for the record.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Wall-clock seconds spent, for the record.")] = 0.0,
    cpu_seconds: Annotated[float, typer.Option(help="CPU seconds spent, for the record.")] = 0.0,
) -> None:
    """A self-contained report.html of a folder of runs: losses, times, sheets and verdicts."""
    from unclip.cli.report import write_report

    write_report(runs, {"seconds": seconds, "cpu_seconds": cpu_seconds, "minutes": minutes})


@app.command()
def ui(
    runs: Runs,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's only with --auth-file.")
    ] = ("127.0.0.1"),
    auth_file: Annotated[
        Path | None, typer.Option(help="File with a line NAME:PASSWORD for each who may use the page.")
    ] = None,
) -> None:
    """A web page to draw, vary, interpolate, edit and inpaint pictures, and to look at runs (needs the extra ui)."""
    from unclip.ui.serve import serve

    serve(runs, host=host, port=port, auth_file=auth_file)


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A run with logger=wandb.")],
) -> None:
    """Send a run that wandb kept offline to its server, or say what is needed for that."""
    from unclip.cli.sync import sync_run

    if not sync_run(run):
        raise typer.Exit(1)


@app.command("inspect")
def inspect_folder(
    path: Annotated[Path, typer.Argument(help="An embeddings folder, a run, an artifact, or a file of weights.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for plots of embeddings.")] = None,
    max_rows: Annotated[int, typer.Option(min=2, help="Rows of each split to read, spread evenly.")] = 1_000_000,
) -> None:
    """Say what a folder is: an artifact's manifest in words, or the norms, cosines and spectrum of embeddings.

    Of a checkpoint, such as dalle2-pytorch's, what it holds; no code in it is run.
    """
    from unclip.cli.inspect import inspect_path

    inspect_path(path, out, max_rows)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def job(command: Annotated[list[str], typer.Argument(metavar="COMMAND")]) -> None:
    """Within a SLURM job: run COMMAND in all its tasks, and requeue the job where trying again helps."""
    from unclip.cli.job import run_job

    raise typer.Exit(run_job(command))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--runs", help="Where runs will be written.")] = Path("runs"),
) -> None:
    """Say in words whether this machine is ready: versions, devices, disk, a CLIP, one training step of each net."""
    from unclip.cli.doctor import examine

    if not examine(folder):
        raise typer.Exit(1)
