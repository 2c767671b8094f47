"""The authors' PixelPrune as a worker: run with a Python that has transformers 4.57.6, started by selector.py.

Reads lines of JSON {"pixels": file.npy, "tau": 0.0, "anchored": true, "resize": false} from stdin, writes {"ms": 1.0,
"keep": [...]} for each: the time of its processor (resize if asked for, rescale, normalise, patchify) and its selector.
"""

import json
import sys
import time

import numpy as np

sys.path.insert(0, sys.argv[1])
import torch
from pixelprune import compute_merged_keep_indices
from pixelprune.patches.qwen3_vl_hf import normalize_pixel_values_for_selector
from reference_processor import reference_processor

processor = reference_processor()
for line in sys.stdin:
    request = json.loads(line)
    pixels = np.load(request["pixels"])
    begin = time.perf_counter()
    batch = processor(images=[pixels], do_resize=request["resize"], return_tensors="pt")
    values = normalize_pixel_values_for_selector(batch["pixel_values"])
    with torch.no_grad():
        keep = compute_merged_keep_indices(
            values,
            batch["image_grid_thw"],
            2,
            method="pred_2d",
            metric="max",
            threshold=request["tau"],
            anchored=request["anchored"],
        )[0]
    ms = (time.perf_counter() - begin) * 1e3
    print(json.dumps({"ms": ms, "keep": keep.tolist()}), flush=True)
