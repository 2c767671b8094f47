"""The process that lengths.py measures: worker_lengths.py BUNDLE DEVICE."""

import json
import sys
import time

import numpy as np
from PIL import Image
from process import held, peak

import ppexport

SIDES = range(256, 1025, 64)
random = np.random.default_rng(0)
begin = time.perf_counter()
pipe = ppexport.load(sys.argv[1], sys.argv[2], threads=2)
row = {"load_seconds": time.perf_counter() - begin, "loaded": held() / 1e6, "loading_peak": peak() / 1e6}
for name, sides in (
    ("first", SIDES[:1]),
    ("rising", SIDES),
    ("falling", SIDES[::-1]),
    ("mixed", random.permutation(SIDES)),
):
    begin = time.perf_counter()
    for side in sides:
        pipe.engine.forget()
        pipe.encode(Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)))
    row |= {name: held() / 1e6, f"{name}_seconds": time.perf_counter() - begin}
print(json.dumps({**row, "peak": peak() / 1e6}), flush=True)
