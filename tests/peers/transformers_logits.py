"""Converted checkpoints in transformers: the same logits as in this runtime.

usage: transformers_logits.py GQLA     (in an environment with torch, transformers and safetensors)

Not among the checks that every change gets: PyPI has torch for Linux with its CUDA libraries alone, 5.6 GB installed.
"""

import array
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file

gqla = sys.argv[1]
root = pathlib.Path(__file__).resolve().parents[2]
print(f"transformers {transformers.__version__}, torch {torch.__version__}")


def held_out(count):
    ids = array.array("H")
    ids.frombytes((root / "tests/data/held-out.u16").read_bytes())
    return list(ids[:count])


def run(*arguments):
    subprocess.run([gqla, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def compare(name, model, calibration, tokens, *options):
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        out, lists, logits = place / "out", place / "lists.json", place / "logits.safetensors"
        run("convert", "--model", root / model, "--out", out, "--calibration", calibration, *options)
        lists.write_text(json.dumps([tokens]))
        run("score", "--model", out, "--tokens", lists, "--out", logits)
        ours = load_file(logits)["logits.0"].float()
        # A directory whose name transformers has not cached code for.
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
        with torch.no_grad():
            theirs = theirs.eval()(torch.tensor([tokens])).logits[0].float()
        difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        print(f"{name}: largest difference {difference:.2e} where the largest logit is {size:.2f}")
        assert difference <= 1e-4 * (1 + size)


text = root / "tests/data/calibration.u16"
small = ("--samples", 8, "--length", 256)
for method in ("pca", "attention-aware"):
    compare(f"GLM, {method}", "checkpoints/tiny-glm-mla", text, held_out(200), "--groups", 4, "--method", method, *small)
compare("GLM with an MTP layer", "checkpoints/tiny-glm-gqla", text, held_out(200), "--groups", 4, *small)
random.seed(1)
with tempfile.TemporaryDirectory() as place:
    made_up = pathlib.Path(place) / "made-up.u16"
    made_up.write_bytes(array.array("H", [random.randrange(512) for _ in range(16 * 256)]).tobytes())
    tokens = [random.randrange(512) for _ in range(200)]
    compare("DeepSeek-V3", "tests/data/fixtures/deepseek-v3-mla", made_up, tokens, "--groups", 4, "--samples", 16, "--length", 256)
