"""The demo's options; light to import, so that `diffdoctor demo --help` is quick."""

from dataclasses import dataclass

from diffdoctor.runs.errors import UserError, expected


@dataclass
class DemoConfig:
    """Options of `diffdoctor demo`.

    Attributes:
        output: folder for everything that the demo makes; an interrupted demo resumes from the same folder.
        seed: of the damage, the training runs and the evaluation's latents.
        pictures: how many pictures the treated and the untreated pipeline draw for the measures.
        classifier_steps: training steps of the digit classifier (batch 64).
        detector_steps: of the detector (batch 64).
        judge_steps: of the judge (batch 64).
        autoencoder_steps: of the pipeline's autoencoder (batch 16).
        base_steps: of the pipeline's denoiser (batch 64).
        treat_steps: of the treatment (batch 32).
        treat_learning_rate: of the treatment; a higher one cures more and narrows the model more.
        shuffled_control: also treat with the maps shuffled across the batch (half a minute more).
        overwrite: start again where the folder holds a demo made with other options.
        threads: CPU threads; None: PyTorch's own choice.
        device: of the detectors' training and of the treatment, such as cpu or cuda:1; None: the fastest there is. The
            rest is computed on the CPU.
        strict: end with exit code 1 when a figure misses the acceptance checks of docs/demo.md.
    """

    output: str = "runs/demo"
    seed: int = 0
    pictures: int = 2000
    classifier_steps: int = 800
    detector_steps: int = 400
    judge_steps: int = 600
    autoencoder_steps: int = 1000
    base_steps: int = 1500
    treat_steps: int = 80
    treat_learning_rate: float = 5e-4
    shuffled_control: bool = False
    overwrite: bool = False
    threads: int | None = None
    device: str | None = None
    strict: bool = False

    def __post_init__(self):
        for name in ("classifier", "detector", "judge", "autoencoder", "base", "treat"):
            if getattr(self, f"{name}_steps") < 1:
                raise UserError(expected(f"{name}_steps", "at least 1", getattr(self, f"{name}_steps")))
        if self.pictures < 20:
            raise UserError(expected("pictures", "at least 20, two of each digit", self.pictures))
        if not self.treat_learning_rate > 0:
            raise UserError(expected("treat_learning_rate", "a positive number", self.treat_learning_rate))
        if self.seed < 0:
            raise UserError(expected("seed", "at least 0", self.seed))
        if self.threads is not None and self.threads < 1:
            raise UserError(expected("threads", "at least 1, or None for PyTorch's own choice", self.threads))
