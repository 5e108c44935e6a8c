"""Records where the authors' own optimizers carry a few matrices; run once, with clones of their repositories:

TORCHDYNAMO_DISABLE=1 python tests/reference/data/record_muon.py MUON_CLONE NORMUON_CLONE SCION_CLONE

NorMuon's takes no float32 weights (its row state meets a bfloat16 mean), so its orthogonalisation is made to hand out
float32. KellerJordan/Muon@857d1ad, zichongli5/NorMuon@d45c9a4, LIONS-EPFL/scion@f58a393; torch 2.13.0 on a CPU.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

SHAPES = [(12, 12), (6, 24), (24, 6)]
STEPS = 12


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, Path(folder) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def walked(make):
    rng = np.random.default_rng(0)
    params = [nn.Parameter(torch.tensor(rng.normal(size=s), dtype=torch.float32)) for s in SHAPES]
    optimizer = make(params)
    with torch.no_grad():
        for _ in range(STEPS):
            for p in params:
                p.grad = torch.tensor(rng.normal(size=p.shape), dtype=torch.float32)
            optimizer.step()
    return [[[round(x, 6) for x in row] for row in p.tolist()] for p in params]


if __name__ == "__main__":
    muon, normuon, scion = (load(f, n) for f, n in zip(sys.argv[1:], ("muon", "normuon", "scion"), strict=True))
    orthogonal = normuon.zeropower_via_newtonschulz5
    normuon.zeropower_via_newtonschulz5 = lambda g, steps: orthogonal(g, steps).float()

    def ball(norm):
        return lambda params: scion.Scion(params, lr=0.01, momentum=0.1, norm=norm, scale=5.0)

    found = {
        "KellerJordan/Muon@857d1ad": walked(lambda p: muon.SingleDeviceMuon(p, lr=0.02, weight_decay=0.1)),
        "zichongli5/NorMuon@d45c9a4": walked(lambda p: normuon.SingleDeviceNorMuon(p, lr=0.02, weight_decay=0.1)),
        **{
            f"LIONS-EPFL/scion@f58a393 {norm}": walked(ball(norm))
            for norm in ("Spectral", "Sign", "RowNorm", "ColNorm")
        },
    }
    Path(__file__).with_name("muon.json").write_text(json.dumps({"recorded by": __doc__.split("\n\n"), **found}) + "\n")
