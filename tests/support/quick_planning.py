"""nnU-Net's planning in a fraction of its time."""

import torch


def count_without_weights() -> None:
    """The counts are the same; the networks, tried in many sizes, are not filled with random numbers."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    with_weights = ExperimentPlanner.static_estimate_VRAM_usage

    def without_weights(*arguments, **named):
        with torch.device("meta"):
            return with_weights(*arguments, **named)

    ExperimentPlanner.static_estimate_VRAM_usage = staticmethod(without_weights)


def draw_few() -> None:
    """A thousandth of the 10⁸ intensities that it draws for a fingerprint, and sorts."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    made = DatasetFingerprintExtractor.__init__

    def made_for_few(self, *arguments, **named):
        made(self, *arguments, **named)
        self.num_foreground_voxels_for_intensitystats = 10e4

    DatasetFingerprintExtractor.__init__ = made_for_few
