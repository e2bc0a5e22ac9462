"""The figures of a demo that met its acceptance checks, to be changed."""


def metrics_of(**changes):
    metrics = {
        "judge": {"false_positive_rate": 0.0, "hit_rate": 1.0},
        "detector": {"map50": 0.9},
        "artifact_rate": {
            "judge": {"before": 0.35, "after": 0.02, "after_interval": [0.01, 0.03], "ratio": 0.02 / 0.35},
            "detector": {"before": 0.36, "after": 0.01},
        },
        "digit_accuracy": {"before": 0.95, "after": 0.98},
        "fid": {"before": 2.0, "after": 1.2, "floor": 1.5, "ceiling": 3.0},
        "variance": {"before": 40.0, "after": 34.0},
        "control": {"uniform_map": {"before": 0.35, "after": 0.36}},
        "seconds": 400.0,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = metrics
        for parent in parents:
            place = place[parent]
        place[last] = value
    return metrics
