"""The loop of workers whose models answer as transformers' do (worker_reference.py has the protocol)."""

import json
import sys
import time
from itertools import pairwise

import torch
from PIL import Image
from process import peak, versions
from reference_processor import reference_processor
from transformers.generation.streamers import BaseStreamer

PACKAGES = ("transformers", "torch", "optimum-intel", "openvino", "nncf")


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def serve(model, more_inputs):
    """Answer requests from stdin. ``more_inputs``: given a request, its ids and the pixels, what ``generate`` takes."""
    processor = reference_processor()
    print(json.dumps({"ready": True, "packages": versions(*PACKAGES)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.tensor([request["ids"]])
        count = request["tokens"]
        clock = Clock()
        begin = time.perf_counter()
        batch = processor(images=[Image.open(request["image"]).convert("RGB")], return_tensors="pt")
        ready = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                image_grid_thw=batch["image_grid_thw"],
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                streamer=clock,
                **more_inputs(request, ids, batch["pixel_values"]),
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
