"""Other programs' words for the names that the operations take, so that an error can say which of ours is meant.

None is an alias: several trainers call different losses by one name (docs/ops.md has them by trainer).
"""

#: By the argument's name: what a user may write, in lower case with underscores, and what it is called here.
WORDS = {
    "loss_type": {
        "mse": "l2", "mse_loss": "l2", "l2_loss": "l2", "mean_squared_error": "l2",
        "mae": "l1", "mae_loss": "l1", "l1_loss": "l1", "mean_absolute_error": "l1",
        "huber_loss": "huber", "smooth_l1_loss": "smooth_l1", "smoothl1": "smooth_l1", "smoothl1_loss": "smooth_l1",
        "huber_pseudo": "pseudo_huber", "pseudohuber": "pseudo_huber", "pseudo_huber_loss": "pseudo_huber",
        "charbonnier": "pseudo_huber", "logcosh": "log_cosh", "log_cosh_loss": "log_cosh",
    },
    "prediction_type": {
        "eps": "epsilon", "noise": "epsilon", "e": "epsilon",
        "v": "v_prediction", "v_pred": "v_prediction", "vpred": "v_prediction", "velocity": "v_prediction",
        "x0": "sample", "x_0": "sample", "x_start": "sample", "latents": "sample", "original": "sample",
    },
    "interpolation": {
        "linear": "bilinear", "trilinear": "bilinear", "box": "area", "average": "area", "avg": "area", "mean": "area",
        "adaptive_avg": "area", "nearest_neighbor": "nearest", "nearest_neighbour": "nearest",
    },
    "reduction": {
        "none": "sample", "per_sample": "sample", "batch": "sample", "avg": "mean", "average": "mean", "total": "sum",
    },
    "normalize": {"per_sample": "sample", "mask": "sample", "area": "sample", "mean": "batch", "global": "batch"},
    "method": {"avg": "mean", "average": "mean", "amax": "max", "maximum": "max", "thresholded": "threshold"},
    "schedule": {"exp": "exponential", "const": "constant", "fixed": "constant"},
    "order": {"c_p_p": "c ph pw", "p_p_c": "ph pw c"},
    "Target": {
        "eps": "epsilon", "noise": "epsilon", "v": "velocity", "v_prediction": "velocity", "v_pred": "velocity",
        "x0": "sample", "x_start": "sample", "latents": "sample", "flow_matching": "flow", "flow_prediction": "flow",
        "rectified_flow": "flow", "edm": "preconditioned",
    },
}  # fmt: skip
