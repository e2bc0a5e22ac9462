"""Confidence maps for a training set: read, checked, and kept on their pictures through crop and flip.

A map that is not cropped with its picture is silently wrong, so picture and map are never transformed separately here:
`PairedTransform` draws one placement for both, and `attach_map` makes a map the fourth band of its picture for other
libraries' transforms. docs/trainers.md shows both in real trainers.
"""

from diffdoctor.maps.check import MapReport, MapWarning, check_maps
from diffdoctor.maps.clips import ClipTransform, clip_size, find_clip_map, read_clip, read_clip_map, read_clips
from diffdoctor.maps.dataset import MapDataset, StepBatches, collate
from diffdoctor.maps.derived import edit_map, map_stamp
from diffdoctor.maps.files import Record, find_map, read_map, read_picture, write_map
from diffdoctor.maps.frames import causal_frames
from diffdoctor.maps.geometry import PairedTransform, Placement, aspect_buckets, attach_map, detach_map
from diffdoctor.maps.ranking import PictureRanking, write_ranking
from diffdoctor.maps.sets import ShardRecords, read_folder, write_metadata

__all__ = [
    "ClipTransform",
    "MapDataset",
    "MapReport",
    "MapWarning",
    "PairedTransform",
    "PictureRanking",
    "Placement",
    "Record",
    "ShardRecords",
    "StepBatches",
    "aspect_buckets",
    "attach_map",
    "causal_frames",
    "check_maps",
    "clip_size",
    "collate",
    "detach_map",
    "edit_map",
    "find_clip_map",
    "find_map",
    "map_stamp",
    "read_clip",
    "read_clip_map",
    "read_clips",
    "read_folder",
    "read_map",
    "read_picture",
    "write_map",
    "write_metadata",
    "write_ranking",
]
