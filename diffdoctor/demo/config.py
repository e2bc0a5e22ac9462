"""The demo's options; light to import, so that `diffdoctor demo --help` is quick."""

from dataclasses import dataclass


@dataclass
class DemoConfig:
    """Options of `diffdoctor demo`.

    Args:
        output: folder for everything that the demo makes; an interrupted demo given the same folder goes on.
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
        threads: CPU threads; 0 leaves the choice to PyTorch.
        strict: end with exit code 1 when a figure misses the bar of docs/demo.md.
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
    threads: int = 0
    strict: bool = False

    def __post_init__(self):
        for name in ("classifier", "detector", "judge", "autoencoder", "base", "treat"):
            if getattr(self, f"{name}_steps") < 1:
                raise ValueError(f"{name}_steps: at least 1 was expected, got {getattr(self, f'{name}_steps')}")
        if self.pictures < 20:
            raise ValueError(f"pictures: at least 20 was expected, two of each digit, got {self.pictures}")
        if not self.treat_learning_rate > 0:
            raise ValueError(f"treat_learning_rate: a positive number was expected, got {self.treat_learning_rate}")
        for name in ("seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: at least 0 was expected, got {getattr(self, name)}")
