"""``unclip export onnx``: nets as ONNX files with a dynamic batch, each checked with onnxruntime."""

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip import artifact
from unclip.drafts import complete_or_not
from unclip.errors import ArtifactError, ConfigError
from unclip.interop.onnx_steps import Step, steps_of

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # largest difference, relative to the largest output where that is above 1
LARGE = 1_500_000_000  # bytes; a file of ONNX ends at two GB, so larger weights stand in one beside it
BATCHES = (1, 3)  # sizes of the check; the export sees 2
INDEX = "index.json"


def export_onnx(runs: Path, out: Path, *, programs: bool = False) -> dict[str, float]:
    """Write the nets of a folder of runs, or of one run or artifact; the largest difference of each file is returned.

    ``programs``: also what torch.export made of each, ``NAME.pt2``. ``index.json`` names inputs, outputs and artifacts. Raises
    :class:`ConfigError` without the extra onnx and for stages that have no step, :class:`ArtifactError` where the check fails.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"export onnx needs {name}: pip install 'unclip[onnx]'")
    found: dict[str, float] = {}
    index: dict[str, Any] = {}
    with complete_or_not(out) as draft:
        for name, folder in artifact.stages_of(runs).items():
            model, manifest = artifact.load(folder)
            artifact.refuse_half(manifest, folder)
            for step in steps_of(name, model.float()):
                log.info("exporting %s", step.name)
                file = draft / f"{step.name}.onnx"
                program = write(step, file)
                if programs:
                    torch.export.save(program, file.with_suffix(".pt2"))
                found[file.name] = check(step, file)
                shapes = {key: ["batch", *value.shape[1:]] for key, value in step.inputs.items()}
                about = {"inputs": shapes, "outputs": step.outputs, "artifact": manifest.hash}
                index[file.name] = about | ({} if step.timesteps is None else {"timesteps": step.timesteps})
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return found


class _Named(nn.Module):
    """A step as torch.export wants it: tensors by position."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.module, self.run, self.names = step.module, step.run, list(step.inputs)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return self.run(dict(zip(self.names, given, strict=True)))


def write(step: Step, file: Path) -> torch.export.ExportedProgram:
    """``file``, and beside it for large weights ``NAME.onnx.data``; what torch.export made on the way is returned."""
    given = tuple(step.inputs.values())
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * len(given)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Named(step), given, dynamic_shapes=(dynamic,))
        made = torch.onnx.export(
            program, input_names=list(step.inputs), output_names=list(step.outputs), dynamo=True, verbose=False
        )
    assert made is not None
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    made.save(str(file), external_data=size > LARGE)
    return program


@torch.no_grad()
def check(step: Step, file: Path) -> float:
    """The largest difference to onnxruntime's outputs. Raises :class:`ArtifactError` where it is too large."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in BATCHES:
        given = {name: value[torch.arange(rows) % 2] for name, value in step.inputs.items()}
        outputs = session.run(list(step.outputs), {name: value.numpy() for name, value in given.items()})
        for found, wanted in zip(outputs, step.run(given), strict=True):
            difference = (torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            worst = max(worst, float(difference)) if difference == difference else float("nan")
    if not worst <= TOLERANCE:
        raise ArtifactError(
            f"onnxruntime's outputs of {step.name} differ by {worst:.2g}, more than {TOLERANCE}: nothing was written; report this"
        )
    return worst
