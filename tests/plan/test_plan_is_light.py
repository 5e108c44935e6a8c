"""The room stays light: it must be usable before torch, numpy, Hydra or anything heavy is imported."""

import subprocess
import sys


def test_plan_imports_nothing_heavy(repository):
    code = (
        "import sys, lightning_opt.plan as p; p.check; p.tuned_records(); p.flops_per_token; p.check_value; "
        "print(sorted({'torch', 'numpy', 'hydra', 'omegaconf', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.strip() == "[]"
