"""Which runtimes compute the exported ONNX files alike: the table of clients in benchmarks/README.md.

    python benchmarks/clients.py [--folder FOLDER]

Each file of TwoConvNet and of a small transformer (two layers of width 256, tokens in, random weights, 4 bits; 8 for
onnx-int8) is run by onnxruntime for Python, for node and for the browser (wasm, one thread), by OpenVINO and by ONNX's
reference evaluator. Node and npm must be installed; npm puts its packages into FOLDER. A runtime that is missing is
left out with a word. Figures are largest differences: in the first row of a network from PyTorch's outputs of the
quantized model, in the others from that row's outputs, each as a share of the largest output.
"""

import argparse
import json
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clipquant.export import FORMATS, Example, Subject
from clipquant.export.parts.onnx_graph import dequantized_copy
from clipquant.export.parts.sessions import feeds, open_any
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import TwoConvNet

WIDTHS = {"onnx": 4, "onnx-int8": 8, "onnx-nbits": 4}
PACKAGES = ("onnxruntime-node", "onnxruntime-web")
RUN = """
const { readFileSync, writeFileSync } = require("node:fs");
const [kind, file, about] = process.argv.slice(2);
const kinds = { float32: Float32Array, int64: BigInt64Array };
async function main() {
  const ort = kind === "node" ? require("onnxruntime-node") : await import("onnxruntime-web/wasm");
  if (kind === "web") ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(kind === "node" ? file : readFileSync(file));
  const fed = {};
  for (const { name, dtype, dims, values } of JSON.parse(readFileSync(about))) {
    fed[name] = new ort.Tensor(dtype, kinds[dtype].from(dtype === "int64" ? values.map(BigInt) : values), dims);
  }
  const found = await session.run(fed);
  const outputs = session.outputNames.map((name) => Array.from(found[name].data));
  writeFileSync(about + ".out", JSON.stringify(outputs));
}
main().catch((error) => { console.error(String(error.message ?? error).split("\\n")[0]); process.exit(1); });
"""


class Transformer(nn.Module):
    """An encoder of tokens with a head, as small as layers may be that MatMulNBits computes."""

    def __init__(self, width=256):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.embedding = nn.Embedding(100, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def networks():
    """Yield each network's name, itself, and batches of its inputs."""
    torch.manual_seed(0)
    yield (
        "TwoConvNet",
        TwoConvNet().eval(),
        [Example((torch.randn(4, 1, 28, 28),)) for _ in range(4)],
    )
    calls = [Example((torch.randint(0, 100, (4, 16)),)) for _ in range(4)]
    yield "transformer", Transformer().eval(), calls


def python(path, fed):
    return open_any(path).run(None, fed)


def reference(path, fed):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(str(path)).run(None, fed)


def openvino(path, fed):
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(fed).values())


def javascript(kind, folder):
    """Return what runs a file in node, by the package for node or by that for browsers."""

    def run(path, fed):
        about = folder / "inputs.json"
        given = [
            {"name": n, "dtype": str(a.dtype), "dims": a.shape, "values": a.flatten().tolist()}
            for n, a in fed.items()
        ]
        about.write_text(json.dumps(given))
        command = ["node", str(folder / "run.cjs"), kind, str(path), str(about)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[0])
        outputs = json.loads(Path(f"{about}.out").read_text())
        return [np.array(values, dtype=np.float32) for values in outputs]

    return run


def clients(folder):
    """Return each client's name, with its version, and what runs a file."""
    (folder / "run.cjs").write_text(RUN)
    if not all((folder / "node_modules" / name).is_dir() for name in PACKAGES):
        # Without the scripts, which fetch libraries for graphics cards.
        command = ["npm", "install", "--ignore-scripts", *PACKAGES]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    about = {name: folder / "node_modules" / name / "package.json" for name in PACKAGES}
    node, web = (json.loads(about[name].read_text())["version"] for name in PACKAGES)
    found = {
        f"onnxruntime {version('onnxruntime')}, Python": python,
        f"onnxruntime-node {node}": javascript("node", folder),
        f"onnxruntime-web {web}, wasm": javascript("web", folder),
    }
    try:
        found[f"OpenVINO {version('openvino')}"] = openvino
    except ModuleNotFoundError:
        print("OpenVINO is left out: pip install openvino")
    return found | {f"ONNX {version('onnx')}, reference evaluator": reference}


def written(model, calls, folder):
    """Return format -> the file and PyTorch's outputs of the model that it holds."""
    files = {}
    for name, bits in WIDTHS.items():
        weights = quantize_weights(model, Recipe(bits, method="rtn"))
        subject = Subject(weights, model, calls[0], calibration=calls)
        record = FORMATS[name].write(subject, folder / f"model{FORMATS[name].suffix}")
        files[name] = record.path, calls[0].run(dequantized_copy(model, weights)).numpy()
    return files


def apart(found, expected):
    """Return the largest difference as a share of the largest output."""
    return float(np.abs(found[0].reshape(-1) - expected.reshape(-1)).max() / np.abs(expected).max())


def row(client, files, call, firsts):
    """Return the differences of a client, by format, or why it has none; `firsts` is what others are compared with."""
    cells = []
    for name, (path, expected) in files.items():
        fed = feeds(open_any(path), call)
        try:
            outputs = client(path, fed)
        except Exception as error:
            cells.append(f"no: {str(error).splitlines()[0][:70]}")
            continue
        cells.append(f"{apart(outputs, firsts.get(name, expected)):.1e}")
        firsts.setdefault(name, outputs[0])
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where npm's packages stand or are put")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        runs = clients(folder)
        print(f"| network | client | {' | '.join(WIDTHS)} |\n|---|---|{'---:|' * len(WIDTHS)}")
        for network, model, calls in networks():
            files, firsts = written(model, calls, Path(temporary)), {}
            for name, client in runs.items():
                cells = row(client, files, calls[0], firsts)
                print(f"| {network} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
