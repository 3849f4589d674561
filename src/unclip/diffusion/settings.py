"""What a diffusion model predicts and how it is trained: typed settings, and which of them contradict each other."""

from dataclasses import dataclass
from enum import Enum

from unclip.diffusion.schedule import ScheduleName


class Predict(Enum):
    """What the network's output means.

    v: alpha eps - sigma x0 (Salimans & Ho 2022). flow: eps - x0, the velocity of flow matching (Lipman et al. 2023).
    """

    eps = "eps"
    x0 = "x0"
    v = "v"
    flow = "flow"


class Weighting(Enum):
    """Weight of the squared error at each step.

    simple: 1 (Ho et al. 2020, eq. 14). min_snr: min(SNR, snr_limit) for the error in x0 (Hang et al. 2023). clamped_snr: the SNR
    within [1, snr_limit], so that noisy steps keep their part: max(SNR, 1) of Salimans & Ho (2022, sec. 4) with Min-SNR's limit.
    p2: 1 / (1 + SNR) for the error in eps, so that nearly clean steps lose theirs (Choi et al. 2022, k = gamma = 1).
    """

    simple = "simple"
    min_snr = "min_snr"
    clamped_snr = "clamped_snr"
    p2 = "p2"


class Timesteps(Enum):
    """How training steps are drawn.

    uniform: each by itself. low_discrepancy: uniform too, but spread evenly over neighbouring samples of the stream.
    logit_normal: sigmoid(N(0, 1)) of the schedule, most in its middle (Esser et al. 2024, sec. 3.1, rf/lognorm(0, 1)).
    """

    uniform = "uniform"
    low_discrepancy = "low_discrepancy"
    logit_normal = "logit_normal"


@dataclass
class DiffusionConfig:
    """A diffusion model, apart from its network. Raises ValueError for settings that contradict each other."""

    schedule: ScheduleName = ScheduleName.cosine
    resolution: int | None = None
    """Side of the pictures, whose log-SNR is then the schedule's + 2 log(64 / resolution): the same noise hides less of a
    larger picture (Hoogeboom et al. 2023, sec. 3.1). None: not shifted."""
    num_timesteps: int = 1000
    predict: Predict = Predict.eps
    learned_variance: bool = False
    """The network has 2C output channels: the prediction, then the variance's place v in [-1, 1] between its bounds."""
    weighting: Weighting = Weighting.simple
    snr_limit: float = 5.0
    """The largest weight of min_snr and clamped_snr: gamma of Hang et al. (2023, sec. 3.4)."""
    timesteps: Timesteps = Timesteps.uniform
    clip_range: float | None = None
    """Predicted x0 is limited to [-clip_range, clip_range] in sampling: 1.0 for pictures; None: unlimited."""
    float32_tables: bool = False
    """Compute the schedule in float32, as Karlo and diffusers do: for models imported from there."""
    self_conditioning: bool = False
    """The network also sees its last prediction of x0, in training every other time (Chen et al. 2023). Prior only."""

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps is {self.num_timesteps}; a schedule needs at least one, usually 1000")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(
                f"resolution is {self.resolution}; give the pictures' side in pixels, or null for no shift"
            )
        if not 1 <= self.snr_limit < float("inf"):
            raise ValueError(f"snr_limit is {self.snr_limit}, the largest weight of a step: at least 1, usually 5")
        if self.clip_range is not None and self.clip_range <= 0:
            raise ValueError(
                f"clip_range is {self.clip_range}; give the data's largest |x0| (1.0 for pictures) or null"
            )
        if self.learned_variance and self.clip_range != 1.0:
            raise ValueError(
                "learned_variance scores step 0 as the likelihood of 8-bit pixels in [-1, 1]: "
                "set clip_range=1.0 for pictures, or learned_variance=false for embeddings"
            )
        if self.learned_variance and self.timesteps is Timesteps.logit_normal:
            raise ValueError(
                "learned_variance trains on a sum over all steps alike, which logit_normal would weight: "
                "set timesteps=uniform or low_discrepancy"
            )
        self._check_flow()
        self._check_zero_snr()

    def _check_zero_snr(self) -> None:
        if ScheduleName(self.schedule) is not ScheduleName.cosine_zero_snr:
            return
        if self.predict is Predict.eps:
            raise ValueError("eps says nothing about x0 at zero SNR: set predict=v or x0, or schedule=cosine")
        if self.weighting in (Weighting.min_snr, Weighting.p2):
            raise ValueError(
                f"{self.weighting.name} never trains the zero-SNR step: set weighting=simple, or schedule=cosine"
            )
        if self.timesteps is Timesteps.logit_normal:
            raise ValueError("logit_normal never draws the zero-SNR step: set timesteps=uniform, or schedule=cosine")

    def _check_flow(self) -> None:
        is_flow = ScheduleName(self.schedule) is ScheduleName.flow
        if self.predict is Predict.flow and not is_flow:
            raise ValueError("predict=flow is the velocity of a straight line: set schedule=flow")
        if not is_flow:
            return
        if self.predict in (Predict.eps, Predict.v):
            raise ValueError(
                f"schedule=flow ends in pure noise, on a straight line: set predict=flow or x0, not {self.predict.name}"
            )
        if self.learned_variance:
            raise ValueError("learned variances are bounded by those of the cosine and linear schedules, not of flow")
        if self.weighting is not Weighting.simple:
            raise ValueError(
                f"schedule=flow is trained with equal weights: set weighting=simple, not {self.weighting.name}"
            )
