"""The authors' PixelPrune as a worker of end_to_end.py: run with a Python that has transformers 4.57.6.

    worker_reference.py PATH_OF_PIXELPRUNE CHECKPOINT float32|bfloat16 THREADS

Reads lines of JSON {"image": "a.png", "prune": true, "ids": [...], "tokens": 17} from stdin; ``ids`` are the tokens of
the prompt, placeholders of its image included. Answers each with {"preprocess": ms, "first": ms after that, "decode":
[ms per token], "tokens": [...], "rss": peak bytes}.
"""

import json
import os
import sys
import time
from itertools import pairwise

sys.path.insert(0, sys.argv[1])
import torch
from clock import Clock, peak
from PIL import Image
from pixelprune import apply_pixelprune
from reference_processor import reference_processor
from transformers import AutoModelForImageTextToText

torch.set_num_threads(int(sys.argv[4]))
apply_pixelprune(model="qwen3_vl")
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3])).eval()
processor = reference_processor()


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    os.environ["PIXELPRUNE_ENABLED"] = "true" if request["prune"] else "false"
    begin = time.perf_counter()
    batch = processor(images=[Image.open(request["image"]).convert("RGB")], return_tensors="pt")
    ready = time.perf_counter()
    ids, count, clock = torch.tensor([request["ids"]]), request["tokens"], Clock()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=batch["pixel_values"].to(model.dtype),
            image_grid_thw=batch["image_grid_thw"],
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            streamer=clock,
        )
    times = clock.times[1:]  # the first call is the prompt
    answer = {
        "preprocess": (ready - begin) * 1e3,
        "first": (times[0] - ready) * 1e3,
        "decode": [(b - a) * 1e3 for a, b in pairwise(times)],
        "tokens": out[0, -count:].tolist(),
        "rss": peak(),
    }
    print(json.dumps(answer), flush=True)
